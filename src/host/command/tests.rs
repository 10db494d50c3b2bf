//! Real processes.

use std::{
    fs::{self, File},
    io::Read,
    sync::Arc,
    time::Duration,
};

use super::{
    isolation::block_on,
    pidfd::{Stat, parse_stat},
    reaper::STATUS_UNKNOWN,
    *,
};
use crate::{error::Kind, task::record::Identity};

const MINUTE: Duration = Duration::from_secs(60);

fn inside(name: &str) -> bool {
    isolation::inside(&format!("host::command::tests::{name}"), &["env"])
}

fn sh(script: &str) -> Command {
    Command::new("/bin/sh").args(["-c", script])
}

fn pipe_pair() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (read.into(), write)
}

/// Runs a script to its end and gives what it wrote.
async fn run(reaper: &Reaper, script: &str) -> (u32, String) {
    let output = reaper.output(sh(script), MINUTE).await.unwrap();
    (output.exit.status, String::from_utf8(output.stdout).unwrap())
}

/// Children of this process, dead or alive, except `except`.
fn children() -> Vec<(u32, u8)> {
    let me = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let after = text.rsplit_once(')').unwrap().1;
        let mut fields = after.split_ascii_whitespace();
        let state = fields.next().unwrap().as_bytes()[0];
        if fields.next().unwrap().parse::<u32>().unwrap() == me {
            found.push((pid, state));
        }
    }
    found
}

/// Lets the reaper work until `done`; a test that never gets there fails by the bound of `block_on`.
async fn until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn an_exit_status_and_a_signal_are_told_apart_as_in_a_shell() {
    block_on(async {
        let reaper = Reaper::new();
        for (script, status) in [
            ("exit 0", 0),
            ("exit 77", 77),
            ("kill -TERM $$", 143),
            ("kill -KILL $$", 137),
            // A real-time signal.
            ("kill -40 $$", 168),
        ] {
            let mut child = reaper.spawn(sh(script)).unwrap();
            assert_eq!(child.wait().await.unwrap().status, status, "{script}");
            let again = child.wait().await.unwrap();
            assert_eq!(again.status, status, "a second wait answers the same");
        }
    });
}

#[test]
fn a_missing_program_is_not_found_and_named() {
    block_on(async {
        let reaper = Reaper::new();
        for program in ["no-such-program-here", "/no/such/program"] {
            let error = reaper.spawn(Command::new(program)).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound);
            assert!(error.to_string().contains(program), "{error}");
        }
        let error = reaper.spawn(Command::new("/etc")).unwrap_err();
        assert_eq!(error.kind(), Kind::PermissionDenied);
        let error = reaper.spawn(sh("true").cwd("/no/such/folder")).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
        let error = reaper.spawn(Command::new("/bin/true").arg("a\0b")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
    });
}

#[test]
fn a_program_gets_its_arguments_environment_and_folder() {
    block_on(async {
        let reaper = Reaper::new();
        let command = sh("printf '%s|' \"$0\" \"$1\" \"$PWD\"; env")
            .args(["zero", "one two"])
            .cwd("/tmp")
            .env_clear()
            .env("A", "first")
            .env("A", "b=c");
        let output = reaper.output(command, MINUTE).await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("zero|one two|/tmp|"), "{text}");
        assert!(
            text.contains("A=b=c") && !text.contains("first") && !text.contains("CARGO"),
            "{text}"
        );
    });
}

#[test]
fn a_child_sees_only_the_descriptors_it_was_given_at_the_numbers_it_was_given() {
    block_on(async {
        let reaper = Reaper::new();
        // A descriptor that somebody forgot to make close-on-exec.
        let leaky = File::open("/dev/zero").unwrap();
        nix::fcntl::fcntl(&leaky, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let open = |path| OwnedFd::from(File::open(path).unwrap());
        // Each source is likely to have the number that another one wants.
        let fds = [open("/etc/passwd"), open("/etc/group"), open("/etc/hostname")];
        let mut command = Command::new("/bin/ls").args(["-l", "/proc/self/fd"]);
        for (number, fd) in (3..).zip(fds) {
            command = command.fd(number, fd);
        }
        let output = reaper.output(command, MINUTE).await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for line in [
            "3 -> /etc/passwd",
            "4 -> /etc/group",
            "5 -> /etc/hostname",
            "0 -> /dev/null",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!text.contains("/dev/zero"), "{text}");
        // 0 to 5, and the folder that ls reads.
        assert_eq!(text.matches(" -> ").count(), 7, "{text}");
        drop(leaky);
    });
}

#[test]
fn a_child_starts_with_no_signal_blocked_or_ignored() {
    if !inside("a_child_starts_with_no_signal_blocked_or_ignored") {
        return;
    }
    block_on(async {
        let reaper = Reaper::new();
        // SAFETY: SIG_IGN is no handler.
        unsafe { nix::sys::signal::signal(nix::sys::signal::SIGTERM, nix::sys::signal::SigHandler::SigIgn) }.unwrap();
        nix::sys::signal::SigSet::all().thread_block().unwrap();
        let (_, status) = run(&reaper, "exec cat /proc/self/status").await;
        nix::sys::signal::SigSet::all().thread_unblock().unwrap();
        for field in ["SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000"] {
            assert!(status.contains(field), "{status}");
        }
    });
}

#[test]
fn a_group_and_a_session_are_led_by_the_child() {
    block_on(async {
        let reaper = Reaper::new();
        let (read, write) = pipe_pair();
        let script = "cut -d' ' -f1,5,6 /proc/self/stat >&1; echo $$";
        let mut child = reaper.spawn(sh(script).session().stdout(write)).unwrap();
        assert_eq!(child.wait().await.unwrap().status, 0);
        let mut text = String::new();
        { read }.read_to_string(&mut text).unwrap();
        let numbers: Vec<u32> = text.split_ascii_whitespace().map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[1..], [child.pid(); 3]);
    });
}

#[test]
fn a_number_that_only_a_thread_has_is_no_process() {
    // What the kernel answers here is also its answer for a process that is being reaped at the same moment.
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        // SAFETY: no arguments, cannot fail.
        tell.send(unsafe { libc::gettid() }).unwrap();
        let _ = ended.recv();
    });
    let error = Pidfd::open(told.recv().unwrap() as u32).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (Kind::NotFound, "process already finished")
    );
    drop(end);
    thread.join().unwrap();
}

#[test]
fn a_process_that_has_ended_takes_no_signals_even_before_it_is_reaped() {
    block_on(async {
        let reaper = Reaper::new();
        let mut child = reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap();
        let pidfd = child.pidfd();
        pidfd.signal(0).unwrap();
        assert_eq!(pidfd.signal(999).unwrap_err().kind(), Kind::InvalidArgument);
        pidfd.signal(libc::SIGTERM).unwrap();
        pidfd.wait_exited().await.unwrap();
        let zombie = pidfd.signal(libc::SIGTERM).unwrap_err();
        assert_eq!(child.wait().await.unwrap().status, 143);
        let reaped = pidfd.signal(libc::SIGTERM).unwrap_err();
        for error in [zombie, reaped] {
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (Kind::NotFound, "process already finished")
            );
        }
        let error = Pidfd::open(child.pid()).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::NotFound, "process already finished")
        );
        assert_eq!(Pidfd::open(0).unwrap_err().kind(), Kind::InvalidArgument);
    });
}

#[test]
fn many_may_wait_for_one_process() {
    block_on(async {
        let reaper = Reaper::new();
        let mut child = reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap();
        let pidfd = child.pidfd();
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let pidfd = Arc::clone(&pidfd);
                tokio::spawn(async move { pidfd.wait_exited().await })
            })
            .collect();
        tokio::task::yield_now().await;
        pidfd.signal(libc::SIGKILL).unwrap();
        for waiter in waiting {
            waiter.await.unwrap().unwrap();
        }
        assert_eq!(child.wait().await.unwrap().status, 137);
    });
}

#[test]
fn a_process_is_told_apart_from_a_later_one_with_its_number() {
    block_on(async {
        let reaper = Reaper::new();
        let mut child = reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap();
        let identity = identity(child.pid()).unwrap();
        assert!(is_alive(&identity));
        let other = Identity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        assert!(!is_alive(&other));
        child.kill();
        child.pidfd().wait_exited().await.unwrap();
        assert!(!is_alive(&identity), "a zombie does not live");
        child.wait().await.unwrap();
        assert!(!is_alive(&identity));
        assert_eq!(super::identity(child.pid()).unwrap_err().kind(), Kind::NotFound);
    });
}

#[test]
fn the_name_of_a_program_cannot_forge_its_start_time() {
    let line = b"42 (a) R 1 (b\n) c) S 1 42 43 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 2000 100\n";
    let stat = Stat {
        state: b'S',
        parent: 1,
        group: 42,
        session: 43,
        start_ticks: 777,
    };
    assert_eq!(parse_stat(line), Some(stat));
    assert_eq!(parse_stat(b""), None);
    assert_eq!(parse_stat(b"42 (a) S 1 2"), None);
    assert_eq!(parse_stat(b"42 a S 1 2"), None);
}

#[test]
fn output_is_captured_up_to_its_bound_and_the_program_still_ends() {
    block_on(async {
        let reaper = Reaper::new();
        let output = reaper
            .output(
                sh("head -c 3000000 /dev/zero; head -c 1000 /dev/zero >&2; exit 3"),
                MINUTE,
            )
            .await
            .unwrap();
        assert_eq!(output.exit.status, 3);
        assert_eq!(output.stdout.len(), OUTPUT_MAX_BYTES);
        assert_eq!(output.stderr.len(), 1000);
    });
}

#[test]
fn a_descendant_that_keeps_the_output_open_is_not_waited_for() {
    block_on(async {
        let reaper = Reaper::new();
        let (status, text) = run(&reaper, "sleep 1000 & echo $!").await;
        assert_eq!(status, 0);
        Pidfd::open(text.trim().parse().unwrap())
            .unwrap()
            .signal(libc::SIGKILL)
            .unwrap();
    });
}

#[test]
fn a_program_that_hangs_is_killed_with_its_group_at_the_bound_and_reaped() {
    block_on(async {
        let reaper = Reaper::new();
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = format!("sleep 1000 & echo $! $$ > {}; wait", file.path().display());
        let output = reaper.output(sh(&script), Duration::from_millis(300));
        let error = output.await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        assert!(
            error.to_string().contains("/bin/sh did not end within 300 ms"),
            "{error}"
        );
        let text = fs::read_to_string(file.path()).unwrap();
        let pids: Vec<u32> = text.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect();
        assert_eq!(
            Pidfd::open(pids[1]).unwrap_err().kind(),
            Kind::NotFound,
            "the program is reaped"
        );
        // Its descendant is another's child.
        if let Ok(sleep) = Pidfd::open(pids[0]) {
            sleep.wait_exited().await.unwrap();
        }
    });
}

#[test]
fn an_output_that_is_dropped_leaves_no_process() {
    if !inside("an_output_that_is_dropped_leaves_no_process") {
        return;
    }
    block_on(async {
        let reaper = Reaper::new();
        let running = tokio::spawn({
            let reaper = reaper.clone();
            async move { reaper.run().await }
        });
        tokio::select! {
            _ = reaper.output(sh("sleep 1000 & wait"), MINUTE) => panic!("it does not end"),
            () = until(|| !children().is_empty()) => {}
        }
        until(|| children().is_empty()).await;
        running.abort();
    });
}

#[test]
fn a_dropped_child_is_killed_and_leaves_no_zombie() {
    if !inside("a_dropped_child_is_killed_and_leaves_no_zombie") {
        return;
    }
    block_on(async {
        let reaper = Reaper::new();
        // Dropped before the reaper runs, and while it runs.
        drop(reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap());
        let running = tokio::spawn({
            let reaper = reaper.clone();
            async move { reaper.run().await }
        });
        until(|| children().is_empty()).await;
        let child = reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap();
        tokio::task::yield_now().await;
        drop(child);
        until(|| children().is_empty()).await;
        running.abort();
    });
}

#[test]
fn a_child_dies_with_its_parent() {
    block_on(async {
        let reaper = Reaper::new();
        let (read, write) = pipe_pair();
        // The parent is a thread: it is what the kernel looks at.
        let pid = std::thread::spawn(move || {
            block_on(async {
                let reaper = Reaper::new();
                let child = reaper
                    .spawn(Command::new("/bin/sleep").arg("1000").die_with_parent().stdout(write))
                    .unwrap();
                let pid = child.pid();
                // Not killed by the drop.
                std::mem::forget(child);
                pid
            })
        })
        .join()
        .unwrap();
        let (pidfd, exit) = reaper.adopt(pid).unwrap();
        assert_eq!(exit.await.status, 137);
        assert!(pidfd.has_exited());
        // The pipe's end is gone with it.
        assert_eq!({ read }.read(&mut [0; 1]).unwrap(), 0);
    });
}

/// A sleeping grandchild that becomes our child: the pid, as a runtime program leaves it in a file.
async fn orphan(reaper: &Reaper) -> u32 {
    let (_, text) = run(reaper, "sleep 1000 >/dev/null 2>&1 & echo $!").await;
    text.trim().parse().unwrap()
}

#[test]
fn an_adopted_process_tells_its_exit_even_if_it_ended_before_anybody_asked() {
    if !inside("an_adopted_process_tells_its_exit_even_if_it_ended_before_anybody_asked") {
        return;
    }
    become_subreaper().unwrap();
    block_on(async {
        let reaper = Reaper::new();
        let running = tokio::spawn({
            let reaper = reaper.clone();
            async move { reaper.run().await }
        });
        tokio::task::yield_now().await;
        let hold = reaper.hold();
        let pid = orphan(&reaper).await;
        // A stranger behind it, whom the hold keeps too.
        let stranger = orphan(&reaper).await;
        for pid in [pid, stranger] {
            Pidfd::open(pid).unwrap().signal(libc::SIGTERM).unwrap();
        }
        until(|| children().contains(&(pid, b'Z')) && children().contains(&(stranger, b'Z'))).await;
        let (pidfd, exit) = reaper.adopt(pid).unwrap();
        drop(hold);
        // Owned, not waited for: it neither stays a zombie nor hides the stranger, and its exit is kept.
        until(|| children().is_empty()).await;
        assert!(pidfd.has_exited());
        assert_eq!(exit.await.status, 143);
        // Nobody wants the exit: no zombie either.
        let hold = reaper.hold();
        let pid = orphan(&reaper).await;
        let (pidfd, exit) = reaper.adopt(pid).unwrap();
        drop((exit, hold));
        pidfd.signal(libc::SIGKILL).unwrap();
        until(|| children().is_empty()).await;
        running.abort();
    });
}

#[test]
fn a_process_that_is_not_our_child_ends_with_status_255() {
    if !inside("a_process_that_is_not_our_child_ends_with_status_255") {
        return;
    }
    block_on(async {
        let reaper = Reaper::new();
        let (status, text) = run(&reaper, "sleep 1000 >/dev/null 2>&1 & echo $!").await;
        assert_eq!(status, 0);
        // Orphaned: the child of another, because the tests are no subreaper.
        let (pidfd, exit) = reaper.adopt(text.trim().parse().unwrap()).unwrap();
        pidfd.signal(libc::SIGTERM).unwrap();
        assert_eq!(exit.await.status, STATUS_UNKNOWN);
    });
}

#[test]
fn hundreds_of_children_and_strangers_leave_their_status_and_nothing_else() {
    if !inside("hundreds_of_children_and_strangers_leave_their_status_and_nothing_else") {
        return;
    }
    become_subreaper().unwrap();
    block_on(async {
        let reaper = Reaper::new();
        let running = tokio::spawn({
            let reaper = reaper.clone();
            async move { reaper.run().await }
        });
        tokio::task::yield_now().await;
        let before = descriptors();
        let mut waiting = Vec::new();
        for round in 0..300u32 {
            let status = round % 200;
            // Each leaves a stranger behind.
            let mut child = reaper.spawn(sh(&format!("sleep 0 & exit {status}"))).unwrap();
            waiting.push(tokio::spawn(async move {
                assert_eq!(child.wait().await.unwrap().status, status);
            }));
            if round % 3 == 0 {
                drop(reaper.spawn(Command::new("/bin/sleep").arg("1000")).unwrap());
            }
            if round % 20 == 0 {
                assert_eq!(reaper.output(sh("exit 5"), MINUTE).await.unwrap().exit.status, 5);
            }
        }
        for waiter in waiting {
            waiter.await.unwrap();
        }
        until(|| children().is_empty()).await;
        assert_eq!(descriptors(), before);
        assert!(reaper.lock().owned.is_empty());
        running.abort();
    });
}
