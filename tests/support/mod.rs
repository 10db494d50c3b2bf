//! The tests' harness: a private containerd in a private universe, images made on the spot, and a check that nothing is left behind.
//!
//! ```text
//! universe   namespaces of the test process, entered before main; see there for what is private
//! node       configuration, images, ctr, the clients
//! daemon     containerd itself: start, crash, restart; as a child or as systemd's unit
//! image      OCI images from busybox
//! task       a container through containerd's API: fifos, create, start, exec, wait, delete
//! events     what containerd says that happened
//! leaks      before and after
//! backend    which backends are built, and what is known of each
//! patience   how long to wait
//! skip       skips that nobody can overlook
//! cri        a pod and its containers through CRI
//! websocket  CRI's exec and attach streams
//! ```
//!
//! A test is `node(async |node| { … })`. The tests of a process run one after the other, each on the same daemon; after each of them
//! nothing may be there that was not there before.
//!
//! Environment:
//! - `LXCRI_TEST_RUNTIME=io.containerd.runc.v2` validates the suite on another runtime, with the OCI runtime `LXCRI_TEST_OCI` (crun or
//!   runc); see [`node::Runtime`]. `make test` then lists what was not asked of it as skipped.
//! - `LXCRI_TEST_BACKEND=lxc`: the node's configuration puts every container on that backend; see [`backend`].
//! - `LXCRI_TEST_SHIM`: our shim's program, instead of the one that Cargo built for the tests.
//! - `LXCRI_TEST_MAX_SHIM_VERSION=3`: the version of the task service that the shim is asked for, instead of containerd's wish.
//! - `LXCRI_TEST_SYSTEMD=1`: the machine is the tests' own and systemd runs it; see [`universe::by_systemd`].
//! - `LXCRI_TEST_SNAPSHOTTER=zfs`: where root file systems come from, instead of overlayfs; zfs wants a pool named `lxcri`.
//! - `LXCRI_TEST_SLOWNESS`: how much longer than a machine of our days this one may take; see [`patience`].
//! - `LXCRI_TEST_LOGS`: the folder for containerd's log of a test that failed, instead of Cargo's `target/tmp`.
//! - `LXCRI_SKIP_LOG`, `CI`: see [`skip::skip`].

#![allow(dead_code, reason = "each test file uses another part of the harness")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a harness fails by panicking, and speaks to a person"
)]

pub(crate) mod backend;
pub(crate) mod cri;
pub(crate) mod daemon;
pub(crate) mod events;
pub(crate) mod image;
pub(crate) mod leaks;
pub(crate) mod node;
pub(crate) mod patience;
pub(crate) mod skip;
pub(crate) mod task;
pub(crate) mod universe;
pub(crate) mod websocket;

#[allow(unused_imports, reason = "each test file uses another part of the harness")]
pub(crate) use node::{Node, until};

/// Runs a test on a node with containerd alone; see [`node::run`].
pub(crate) fn node<F: AsyncFnOnce(&Node)>(test: F) {
    node::run(&name_of(&test), false, test);
}

/// Runs a test on a node whose containerd serves CRI too; see [`node::run`].
pub(crate) fn cri_node<F: AsyncFnOnce(&Node)>(test: F) {
    node::run(&name_of(&test), true, test);
}

/// `file::test`, from the type of the test's closure: libtest's thread names are not there when it runs one thread.
fn name_of<F>(_: &F) -> String {
    std::any::type_name::<F>().trim_end_matches("::{{closure}}").to_string()
}
