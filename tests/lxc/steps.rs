//! kill -9 at each step of a container's life: a tracer sends it in the place of a system call.

use std::{fs, path::Path};

use super::{
    lxc,
    support::{
        patience::patience,
        pod::{Answer, Bundle, Daemon, Io, Pod, delete_dead, options, process},
    },
    tracer::Tracer,
};

/// System calls that change the world, or tell somebody that it was changed, as strace names them; not every architecture has each.
const STEPS: &str = "?mkdir,?mkdirat,?rmdir,?rename,?renameat,?renameat2,?unlink,?unlinkat,?symlinkat,?mknodat,?clone,?clone3,\
    ?open_tree,?mount_setattr,?move_mount,?mount,?umount2,?pivot_root,?setns,?unshare,?sethostname,?sendmsg,?execve,?execveat,\
    ?pidfd_send_signal,?kill";

/// A whole life, of a program that ends by itself, and of an exec.
async fn lives_and_ends(pod: &Pod, a: &Bundle, io: &Io) -> Answer<()> {
    pod.create(a, io).await?;
    let stdin = io.open_stdin();
    pod.start_process("a", "").await?;
    pod.exec("a", "e1", &process(&["true"]), &Io::none()).await?;
    pod.start_process("a", "e1").await?;
    pod.wait("a", "e1").await?;
    pod.delete("a", "e1").await?;
    drop(stdin);
    pod.close_stdin("a", "").await?;
    pod.wait("a", "").await?;
    pod.delete("a", "").await?;
    Ok(())
}

/// One life, with a kill at `step`; whether anybody came to that step.
async fn killed_at(daemon: &Daemon, step: usize) -> bool {
    let a = daemon.bundle("a", &["cat"]);
    let mut pod = Pod::start(daemon, &a).await;
    // liblxc waits for ever for an init that was killed before it had said a word; the bound of a create ends that.
    let bound = patience(4).as_millis();
    pod.options = Some(options(&format!("backend = \"lxc\"\nruntime_timeout_ms = {bound}")));
    let io = Io::fifos(&a.path, "init");
    // Whoever comes to its own `step`th of them is sent SIGKILL there.
    let trace = format!("trace={STEPS}");
    let inject = format!("inject={STEPS}:signal=SIGKILL:when={step}");
    let killer = Tracer::of(daemon, &pod, &["-e", "signal=KILL", "-e", &trace, "-e", &inject]).await;
    let (shim, pid) = (pod.pidfd(), pod.pid);
    let lived = lives_and_ends(&pod, &a, &io).await;
    if lived.is_err() {
        let _ = pod.kill("a", "", libc::SIGKILL, true).await;
        let _ = pod.delete("a", "").await;
        assert!(pod.state("a", "").await.is_err(), "step {step}: {lived:?}");
    }
    pod.shutdown_of(shim).await;
    let killed = killer.told("killed by SIGKILL").await;
    assert!(lived.is_ok() || !killed.is_empty(), "step {step}: {lived:?}");
    if killed.iter().any(|line| line.starts_with(&format!("{pid} "))) {
        delete_dead(daemon, &a).unwrap_or_else(|e| panic!("step {step}: {e}"));
    }
    daemon.assert_nothing_left();
    fs::remove_dir_all(&a.path).unwrap();
    !killed.is_empty()
}

#[test]
fn whoever_is_killed_at_whatever_step_leaves_nothing() {
    lxc(async |daemon| {
        let mut step = 1;
        // An emulated machine, on which a life takes several seconds, leaves out two of three; every other one tries them all.
        let stride = usize::try_from(patience(1).as_secs()).unwrap().min(3);
        while killed_at(daemon, step).await {
            step += stride;
        }
        // A tracer that kills nobody would look as good. There are fewer steps on cgroup v2, with its one hierarchy.
        assert!(step > 10, "only {step} steps");
        assert!(Path::new(super::LXC_PATH).read_dir().unwrap().next().is_none());
    });
}
