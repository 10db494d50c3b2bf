//! The backends under test, and what the tests know of each beside the Task API.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use super::leaks::{self, Process};

/// The backends that are built; `tests/run` reads the file too.
const BUILT: &str = include_str!("../backends");
/// Chooses one of them.
const CHOICE: &str = "LXCRI_TEST_BACKEND";

/// The backends that are built.
pub(crate) fn built() -> Vec<&'static str> {
    let names = BUILT.lines().map(str::trim);
    names
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .collect()
}

/// The backend that `LXCRI_TEST_BACKEND` names, if it names one.
///
/// # Panics
/// When it is not built.
pub(crate) fn chosen() -> Option<&'static str> {
    let name = std::env::var(CHOICE).ok().filter(|name| !name.is_empty())?;
    let built = built();
    let known = built.iter().find(|known| **known == name);
    Some(known.unwrap_or_else(|| panic!("{CHOICE}={name:?}: the backends are {built:?}")))
}

/// The chosen backend, or all that are built.
pub(crate) fn wanted() -> Vec<&'static str> {
    chosen().map_or_else(built, |one| vec![one])
}

/// Runs `test` on each of `backends`, also after one has failed.
///
/// # Panics
/// Naming the backends on which it failed.
pub(crate) fn each(backends: &[&'static str], test: impl Fn(&'static str)) {
    let mut failed = Vec::new();
    for backend in backends {
        if catch_unwind(AssertUnwindSafe(|| test(backend))).is_err() {
            eprintln!("^ that was on backend {backend}");
            failed.push(*backend);
        }
    }
    assert!(failed.is_empty(), "failed on backend {}", failed.join(", "));
}

/// The backends that have the container `id` of containerd's `namespace`, by what each has on the machine while it runs.
pub(crate) fn holding(namespace: &str, id: &str) -> Vec<&'static str> {
    let crun = Path::new("/run/proxmox-lxcri/crun").join(namespace).join(id).exists();
    let lxc = leaks::abstract_sockets().contains(&format!("@{}/{id}/command", leaks::LXC_PATH));
    let all = [("crun", crun), ("lxc", lxc)];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

/// The processes that `backend` itself has for the container `id` at this moment, and that can be killed behind the shim's back:
/// crun, while it works; LXC's monitor, as long as the container exists, and what becomes its init until that is the user's program.
pub(crate) fn own_processes(backend: &str, id: &str) -> Vec<Process> {
    let mut all = leaks::processes();
    let names = |process: &Process| process.command.split([' ', '=', '/']).any(|word| word == id);
    all.retain(|process| match backend {
        "crun" => process.program() == "crun" && names(process),
        _ => {
            let ours = process.program() == leaks::shim_program(leaks::OURS) && !process.is_a_shim();
            // liblxc gives a process that it makes a monitor this name.
            let liblxcs = process.command.starts_with("[lxc monitor]");
            (ours || liblxcs || process.program() == LXC_INIT) && names(process)
        }
    });
    all
}

/// The program that becomes init of an LXC container.
pub(crate) const LXC_INIT: &str = "proxmox-lxcri-init";
