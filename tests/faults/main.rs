//! Faults that the real world does not produce on demand: after each of them the answers are true, nothing is left, and the next
//! container works.
//!
//! Drives the real shim over its socket, without containerd. Everything is real but crun, which is behind a script that misbehaves
//! where a test says so.
//!
//! What is not about crun's program happens on each backend, see `tests/backends` and `LXCRI_TEST_BACKEND`: there is no program of
//! LXC's to put a script before, so that there a hook of the bundle is what hangs or fails.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

mod clients;
mod killed;
mod runtime;
/// The part of the harness that needs no containerd.
#[path = "../support"]
mod support {
    #![allow(dead_code, reason = "each test file uses another part of the harness")]

    pub(crate) mod backend;
    pub(crate) mod drive;
    pub(crate) mod gate;
    pub(crate) mod image;
    pub(crate) mod leaks;
    pub(crate) mod patience;
    pub(crate) mod pod;
    pub(crate) mod skip;
    pub(crate) mod universe;
}
mod world;

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::PathBuf,
};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use support::{
    backend,
    drive::{self, alone, it_works, lives, send},
    pod::{Bundle, Daemon, FOREVER, Pod, appears, options, shell, until, until_told},
};

/// Runs a test on each backend, one at a time, and asserts that nothing is left behind.
fn fault<F: AsyncFn(&mut Daemon, &Stub)>(test: F) {
    on(&backend::wanted(), test);
}

/// Runs a test on crun alone: it is about that program.
fn fault_of_crun<F: AsyncFn(&mut Daemon, &Stub)>(test: F) {
    let mut backends = backend::wanted();
    backends.retain(|backend| *backend == "crun");
    on(&backends, test);
}

/// Runs a test on LXC alone: no program of crun's does that.
fn fault_of_lxc<F: AsyncFn(&mut Daemon, &Stub)>(test: F) {
    let mut backends = backend::wanted();
    backends.retain(|backend| *backend == "lxc");
    on(&backends, test);
}

fn on<F: AsyncFn(&mut Daemon, &Stub)>(backends: &[&'static str], test: F) {
    backend::each(backends, |backend| {
        alone(async |daemon| {
            let stub = Stub::new(daemon, backend);
            test(daemon, &stub).await;
        });
    });
}

/// The backend, which a test can lead astray: crun, behind a script, at each command; another one where hooks run.
struct Stub {
    folder: PathBuf,
    backend: &'static str,
}

impl Stub {
    fn new(daemon: &Daemon, backend: &'static str) -> Self {
        let folder = daemon.folder.join("stub");
        fs::create_dir(&folder).unwrap();
        let stub = Self { folder, backend };
        stub.install();
        stub
    }

    fn is_crun(&self) -> bool {
        self.backend == "crun"
    }

    fn program(&self) -> PathBuf {
        self.folder.join("crun")
    }

    /// Puts the program in its place (again).
    fn install(&self) {
        let script = format!(
            "#!/bin/sh\n\
             for word; do case $word in create|start|exec|delete|update) break ;; esac; done\n\
             fault={}/$word.fault\n\
             [ ! -e \"$fault\" ] || . \"$fault\"\n\
             exec crun \"$@\"\n",
            self.folder.display()
        );
        fs::write(self.program(), script).unwrap();
        fs::set_permissions(self.program(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Takes the program away.
    fn uninstall(&self) {
        fs::remove_file(self.program()).unwrap();
    }

    /// From now on each run of this command of crun begins with `script`.
    fn at(&self, verb: &str, script: &str) {
        fs::write(self.folder.join(format!("{verb}.fault")), format!("{script}\n")).unwrap();
    }

    /// Every run of this command hangs before crun does anything.
    fn holds_before(&self, verb: &str) -> Gate {
        let gate = Gate::new(self.folder.join(format!("before-{verb}")));
        // The end of the file is no error.
        self.at(verb, &format!("read word <{} || :", gate.0.display()));
        gate
    }

    /// Every run of this command hangs when crun is done.
    fn holds_after(&self, verb: &str) -> Gate {
        let gate = Gate::new(self.folder.join(format!("after-{verb}")));
        self.at(
            verb,
            &format!("crun \"$@\"; status=$?; read word <{}; exit $status", gate.0.display()),
        );
        gate
    }

    /// `step` (create, start or delete) hangs: before crun does anything, or else in a hook of `bundle`, which is yet to be created.
    fn holds(&self, step: &str, bundle: &mut Bundle) -> Gate {
        self.hook(step, bundle);
        self.holds_before(step)
    }

    /// As [`Stub::holds`], and `step` fails.
    fn fails(&self, step: &str, bundle: &mut Bundle) {
        self.hook(step, bundle);
        self.at(step, "exit 1");
    }

    /// Where the backend has no program of its own, a hook does what is said for this step.
    fn hook(&self, step: &str, bundle: &mut Bundle) {
        if self.is_crun() {
            return;
        }
        let name = match step {
            "create" => "createRuntime",
            "start" => "poststart",
            "delete" => "poststop",
            other => panic!("no hook runs in {other}"),
        };
        let fault = self.folder.join(format!("{step}.fault")).display().to_string();
        let script = format!("[ ! -e {fault} ] || . {fault}");
        bundle.spec["hooks"][name] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    }

    /// No fault any more.
    fn heal(&self) {
        for entry in fs::read_dir(&self.folder).unwrap().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "fault") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }

    /// Runtime options that name the backend and, for crun, the program; and `more` lines of TOML.
    fn options(&self, more: &str) -> Option<Any> {
        let backend = match self.is_crun() {
            true => format!("crun_binary = \"{}\"", self.program().display()),
            false => format!("backend = \"{}\"", self.backend),
        };
        Some(options(&format!("{backend}\n{more}")))
    }

    /// What a call says that was ended at its bound of a second.
    fn late(&self) -> &'static str {
        match self.is_crun() {
            true => "crun did not end within 1000 ms",
            false => "LXC was not done within 1000 ms",
        }
    }
}

/// Something that waits until the test lets it go.
struct Gate(PathBuf);

/// Somebody waits at a gate, until this is dropped.
struct Held {
    _writer: fs::File,
}

impl Gate {
    fn new(path: PathBuf) -> Self {
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        Self(path)
    }

    /// A hook that waits at this gate.
    fn hook(&self) -> Value {
        json!([{"path": "/bin/cat", "args": ["cat", self.0]}])
    }

    /// Waits until somebody is there.
    async fn reached(&self) -> Held {
        // Without a reader the open fails.
        let open = || {
            fs::OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&self.0)
                .ok()
        };
        Held {
            _writer: until("somebody is at the gate", open).await,
        }
    }

    /// Waits until `call` has led somebody here, and goes away from the call as a client does whose deadline is over.
    async fn holds<T: std::fmt::Debug>(&self, call: impl Future<Output = T>) -> Held {
        tokio::select! {
            ended = call => panic!("not held: {ended:?}"),
            held = self.reached() => held,
        }
    }
}

/// A pod whose runtime is the stub, with its first bundle.
async fn pod(daemon: &Daemon, stub: &Stub, args: &[&str]) -> (Pod, Bundle) {
    let bundle = daemon.bundle("a", args);
    let mut pod = Pod::start(daemon, &bundle).await;
    pod.options = stub.options("");
    (pod, bundle)
}

/// A container of the same id works, once there is no fault any more.
async fn the_next_works(daemon: &Daemon, stub: &Stub, former: &Bundle) {
    stub.heal();
    drive::the_next_works(daemon, former, stub.options("")).await;
}
