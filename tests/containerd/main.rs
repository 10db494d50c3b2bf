//! The runtime under a real containerd, through its API and through `ctr`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

mod ctr;
mod exec;
mod faults;
mod lifecycle;
mod resources;
mod rootfs;
mod stdio;
#[path = "../support/mod.rs"]
mod support;
