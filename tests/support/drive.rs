//! What the tests that drive a shim without containerd have in common: how they run, what they do to processes, and the container that
//! has to work afterwards.

use std::{fs, path::Path};

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::{
    pod::{Bundle, Daemon, Io, Pod, WHOLE, shell},
    universe,
};

/// Runs a test, one at a time, and asserts that nothing is left behind.
pub(crate) fn alone(test: impl AsyncFnOnce(&mut Daemon)) {
    universe::token();
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut daemon = Daemon::new().await;
        let ended = tokio::time::timeout(*WHOLE, test(&mut daemon)).await;
        assert!(ended.is_ok(), "not done after {:?}", *WHOLE);
        daemon.ends().await;
    });
}

/// SIGKILL, SIGSTOP, … to a process of the universe.
pub(crate) fn send(pid: u32, signal: i32) {
    // SAFETY: the pid is of the tests' private pid namespace.
    let result = unsafe { libc::kill(pid.cast_signed(), signal) };
    assert_eq!(result, 0, "kill {pid}: {}", std::io::Error::last_os_error());
}

/// Whether a process has not ended; a zombie has.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

/// A container that prints "fine" runs from Create to Delete.
pub(crate) async fn it_works(pod: &Pod, bundle: &Bundle) {
    let io = Io::fifos(&bundle.path, "works");
    let stdout = io.read_stdout();
    pod.run(bundle, &io).await;
    assert_eq!(pod.wait(&bundle.id, "").await.unwrap(), 0);
    assert_eq!(stdout.text().await, "fine\n");
    pod.delete(&bundle.id, "").await.unwrap();
}

/// A container of the same id, in a bundle of its own as containerd makes it, runs from start to end with these runtime options.
pub(crate) async fn the_next_works(daemon: &Daemon, former: &Bundle, options: Option<Any>) {
    // Fails where something is mounted.
    fs::remove_dir_all(&former.path).unwrap();
    let next = daemon.bundle(&former.id, &shell("echo fine"));
    let mut pod = Pod::start(daemon, &next).await;
    pod.options = options;
    it_works(&pod, &next).await;
    pod.shutdown().await;
    fs::remove_dir_all(&next.path).unwrap();
}

/// Removes the folders of liblxc's locks for `lxc_path`, as far as they are empty: it makes them for each path and shares them with LXC's
/// tools; the locks themselves may not stay.
pub(crate) fn remove_locks_of(lxc_path: &Path) {
    let all = Path::new("/run/lxc/lock");
    let folder = all.join(lxc_path.strip_prefix("/").unwrap());
    for folder in folder.ancestors().take_while(|folder| *folder != all) {
        let _ = fs::remove_dir(folder);
    }
}
