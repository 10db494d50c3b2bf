use std::{
    fs::{self, File},
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::UnixStream,
        },
    },
    path::PathBuf,
    process,
};

use nix::{
    errno::Errno,
    pty::{OpenptyResult, openpty},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
        termios,
    },
    unistd::mkfifo,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::{Instant, timeout},
};

use super::*;
use crate::{error::Kind, host::command::isolation};

/// No test waits longer for anything.
const LONG: Duration = Duration::from_secs(60);

const NAMES: Names<'static> = Names {
    namespace: "ns",
    container: "c1",
    exec: None,
};

/// A folder with the fifos of a client.
struct Client {
    folder: TempDir,
}

impl Client {
    fn new() -> Self {
        Self {
            folder: TempDir::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().into()
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn reader(&self, name: &str) -> pipe::Receiver {
        pipe::OpenOptions::new().open_receiver(self.path(name)).unwrap()
    }

    fn writer(&self, name: &str) -> pipe::Sender {
        pipe::OpenOptions::new().open_sender(self.path(name)).unwrap()
    }

    async fn open(&self, config: &Config) -> Result<(Stdio, ChildIo)> {
        open(config, NAMES, self.folder.path(), (0, 0), &Reaper::new()).await
    }

    async fn pipes(&self, config: &Config) -> (Stdio, [Option<OwnedFd>; 3]) {
        let (stdio, child) = self.open(config).await.unwrap();
        let ChildIo::Pipes { stdin, stdout, stderr } = child else {
            panic!("no pipes");
        };
        (stdio, [stdin, stdout, stderr])
    }

    async fn terminal(&self, config: &Config) -> (Stdio, PathBuf) {
        let (stdio, child) = self.open(config).await.unwrap();
        let ChildIo::Terminal { console_socket } = child else {
            panic!("no terminal");
        };
        (stdio, console_socket)
    }
}

fn output(stdout: String) -> Config {
    Config {
        stdout,
        ..Config::default()
    }
}

fn terminal(stdin: String, stdout: String) -> Config {
    Config {
        stdin,
        stdout,
        terminal: true,
        ..Config::default()
    }
}

fn run(program: &str, args: &[&str], [stdin, stdout, stderr]: [Option<OwnedFd>; 3]) -> process::Child {
    let or_null = |fd: Option<OwnedFd>| fd.map_or_else(process::Stdio::null, process::Stdio::from);
    process::Command::new(program)
        .args(args)
        .stdin(or_null(stdin))
        .stdout(or_null(stdout))
        .stderr(or_null(stderr))
        .spawn()
        .unwrap()
}

async fn exit(mut child: process::Child) {
    elsewhere(move || child.wait()).await.unwrap();
}

/// Does what blocks, on a thread that a failed test does not wait for.
async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || tell.send(work()));
    timeout(LONG, told).await.expect("stuck").unwrap()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + LONG;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "{what} did not happen");
        tokio::task::yield_now().await;
    }
}

fn pending_bytes(fd: &impl AsFd) -> i32 {
    let mut bytes = 0;
    // SAFETY: FIONREAD stores one int at a live local.
    unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &mut bytes) };
    bytes
}

async fn read_all(mut reader: impl tokio::io::AsyncRead + Unpin) -> Vec<u8> {
    let mut all = Vec::new();
    timeout(LONG, reader.read_to_end(&mut all))
        .await
        .expect("no end of file")
        .unwrap();
    all
}

/// Bytes in which a missing, doubled or exchanged page shows.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes / 8 + 1)
        .flat_map(|n| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(bytes)
        .collect()
}

async fn send(mut sender: impl tokio::io::AsyncWrite + Unpin, bytes: Vec<u8>) {
    timeout(LONG, sender.write_all(&bytes)).await.expect("stuck").unwrap();
}

fn ours(fd: OwnedFd) -> pipe::Sender {
    pipe::Sender::from_owned_fd(fd).unwrap()
}

fn theirs(fd: OwnedFd) -> pipe::Receiver {
    pipe::Receiver::from_owned_fd(fd).unwrap()
}

#[tokio::test]
async fn twenty_mebibytes_through_cat_reach_a_reader_that_starts_late() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        stdout: format!("fifo://{}", client.fifo("out")),
        ..Config::default()
    };
    let (stdio, ends) = client.pipes(&config).await;
    let cat = run("cat", &[], ends);
    let bytes = pattern(20 << 20);
    let writer = tokio::spawn(send(client.writer("in"), bytes.clone()));
    let late = client.reader("out");
    until("a full fifo", || pending_bytes(&late) >= 64 << 10).await;
    let reader = tokio::spawn(read_all(late));
    writer.await.unwrap();
    stdio.close_stdin();
    assert!(reader.await.unwrap() == bytes);
    exit(cat).await;
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn eight_mebibytes_written_right_before_the_exit_are_delivered() {
    let client = Client::new();
    let config = Config {
        stdout: client.fifo("out"),
        stderr: client.fifo("err"),
        ..Config::default()
    };
    let (stdio, ends) = client.pipes(&config).await;
    let script = "yes 0123456789abcde | head -c 8388608; printf late >&2";
    let child = run("sh", &["-c", script], ends);
    let stdio = Arc::new(stdio);
    let draining = tokio::spawn({
        let stdio = Arc::clone(&stdio);
        async move { stdio.drain(LONG).await }
    });
    let out = client.reader("out");
    until("a full fifo", || pending_bytes(&out) >= 64 << 10).await;
    let (out, err) = tokio::join!(read_all(out), read_all(client.reader("err")));
    assert!(out == b"0123456789abcde\n".repeat(8 << 16));
    assert_eq!(err, b"late");
    exit(child).await;
    assert!(draining.await.unwrap());
}

#[tokio::test]
async fn output_waits_in_the_fifo_for_a_reader_that_comes_after_the_exit() {
    let client = Client::new();
    let (stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let child = run("sh", &["-c", "echo hello"], [None, stdout, None]);
    exit(child).await;
    let drain = stdio.drain(LONG);
    tokio::pin!(drain);
    for _ in 0..1000 {
        assert!(
            futures_pending(&mut drain).await,
            "drained although nobody has read anything"
        );
    }
    let reader = client.reader("out");
    assert!(drain.await);
    assert_eq!(read_all(reader).await, b"hello\n");
}

/// Polls once, lets the other tasks go on, and tells whether the future is still pending.
async fn futures_pending<F: Future + Unpin>(future: &mut F) -> bool {
    let pending =
        std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await;
    tokio::task::yield_now().await;
    pending
}

#[tokio::test]
async fn the_client_sees_the_end_of_file_before_anybody_drains() {
    let client = Client::new();
    let (_stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let reader = client.reader("out");
    let child = run("sh", &["-c", "echo hello"], [None, stdout, None]);
    assert_eq!(read_all(reader).await, b"hello\n");
    exit(child).await;
}

#[tokio::test]
async fn a_reader_that_leaves_and_comes_back_misses_nothing_and_kills_nobody() {
    let client = Client::new();
    let (stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let mut process = ours(stdout.unwrap());
    process.write_all(b"one").await.unwrap();
    let mut reader = client.reader("out");
    let mut three = [0; 3];
    reader.read_exact(&mut three).await.unwrap();
    assert_eq!(&three, b"one");
    drop(reader);
    // Enough to be spliced as well as copied.
    let bytes = pattern(50_000);
    send(&mut process, bytes.clone()).await;
    process.write_all(b"three").await.unwrap();
    let back = client.reader("out");
    until("the rest to arrive", || pending_bytes(&back) == 50_005).await;
    drop(process);
    let all = read_all(back).await;
    assert!(all[..50_000] == bytes && &all[50_000..] == b"three");
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn short_lines_do_not_use_up_the_fifo() {
    let client = Client::new();
    let (_stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let reader = client.reader("out");
    let mut process = ours(stdout.unwrap());
    for n in 1..=1000 {
        process.write_all(b"line\n").await.unwrap();
        until("a line to arrive", || pending_bytes(&reader) == n * 5).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_stdin() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        ..Config::default()
    };
    let (stdio, [stdin, _, _]) = client.pipes(&config).await;
    let mut process = theirs(stdin.unwrap());
    let mut byte = [0];
    for client_byte in [b"a", b"b"] {
        client.writer("in").write_all(client_byte).await.unwrap();
        assert_eq!(process.read(&mut byte).await.unwrap(), 1);
        assert_eq!(&byte, client_byte);
    }
    let holds_on = client.writer("in");
    stdio.close_stdin();
    for _ in 0..100 {
        tokio::task::yield_now().await;
        let read = process.try_read(&mut byte);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    drop(holds_on);
    assert_eq!(read_all(process).await, b"");
}

#[tokio::test]
async fn stdin_ends_after_what_the_client_has_written() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        ..Config::default()
    };
    let (stdio, [stdin, _, _]) = client.pipes(&config).await;
    let process = theirs(stdin.unwrap());
    let bytes = pattern(100_000);
    send(client.writer("in"), bytes.clone()).await;
    stdio.close_stdin();
    stdio.close_stdin();
    assert!(read_all(process).await == bytes);
}

#[tokio::test]
async fn a_process_that_closes_its_stdin_breaks_the_clients_pipe_and_nothing_else() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        stdout: client.fifo("out"),
        ..Config::default()
    };
    let (stdio, [stdin, stdout, _]) = client.pipes(&config).await;
    drop(stdin);
    let writer = client.writer("in");
    until(
        "a broken pipe",
        || matches!(writer.try_write(b"x"), Err(e) if e.kind() == io::ErrorKind::BrokenPipe),
    )
    .await;
    let reader = client.reader("out");
    send(ours(stdout.unwrap()), b"alive".into()).await;
    assert_eq!(read_all(reader).await, b"alive");
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn the_ends_of_the_process_are_blocking_close_on_exec_and_its_owners() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        stdout: client.fifo("out"),
        stderr: client.fifo("err"),
        terminal: false,
    };
    let (_stdio, child) = open(&config, NAMES, client.folder.path(), (1234, 5678), &Reaper::new())
        .await
        .unwrap();
    let ChildIo::Pipes { stdin, stdout, stderr } = child else {
        panic!("no pipes");
    };
    for end in [stdin, stdout, stderr] {
        let end = end.unwrap();
        let status = fcntl(&end, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(status).contains(OFlag::O_NONBLOCK));
        assert_eq!(
            fcntl(&end, FcntlArg::F_GETFD).unwrap() & libc::FD_CLOEXEC,
            libc::FD_CLOEXEC
        );
        let metadata = File::from(end).metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    }
}

#[tokio::test]
async fn streams_that_nobody_wants_are_none() {
    let client = Client::new();
    let (stdio, ends) = client.pipes(&Config::default()).await;
    assert!(ends.iter().all(Option::is_none));
    stdio.launched().await.unwrap();
    stdio.resize(80, 25).unwrap();
    stdio.close_stdin();
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn file_targets_are_appended_to_with_their_folders_made() {
    let client = Client::new();
    let path = client.path("a b/c/log");
    fs::create_dir(client.path("a b")).unwrap();
    let uri = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    for _ in 0..2 {
        let config = Config {
            stdout: uri.clone(),
            stderr: uri.clone(),
            ..Config::default()
        };
        let (stdio, [_, stdout, stderr]) = client.pipes(&config).await;
        send(ours(stdout.unwrap()), vec![b'o'; 100_000]).await;
        send(ours(stderr.unwrap()), vec![b'e'; 100_000]).await;
        assert!(stdio.drain(LONG).await);
    }
    let text = fs::read(&path).unwrap();
    assert_eq!(text.iter().filter(|b| **b == b'o').count(), 200_000);
    assert_eq!(text.iter().filter(|b| **b == b'e').count(), 200_000);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777 & !0o644, 0);
}

#[tokio::test]
async fn a_plain_path_to_a_file_is_appended_to() {
    let client = Client::new();
    let path = client.path("log");
    fs::write(&path, "old\n").unwrap();
    let (stdio, [_, stdout, _]) = client.pipes(&output(path.to_str().unwrap().into())).await;
    send(ours(stdout.unwrap()), b"new\n".into()).await;
    assert!(stdio.drain(LONG).await);
    assert_eq!(fs::read(&path).unwrap(), b"old\nnew\n");
}

#[tokio::test]
async fn a_full_disk_loses_output_and_neither_blocks_nor_kills_the_process() {
    let client = Client::new();
    let (stdio, [_, stdout, _]) = client.pipes(&output("/dev/full".into())).await;
    send(ours(stdout.unwrap()), pattern(1 << 20)).await;
    assert!(!stdio.drain(LONG).await);
}

#[tokio::test(start_paused = true)]
async fn the_drain_does_not_wait_for_a_grandchild_that_holds_the_pipe() {
    let client = Client::new();
    let (stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let mut stdout = stdout.unwrap();
    let grandchild = stdout.try_clone().unwrap();
    let reader = client.reader("out");
    let bytes = pattern(60_000);
    File::from(stdout).write_all(&bytes).unwrap();
    let before = Instant::now();
    assert!(!stdio.drain(Duration::from_secs(7)).await);
    assert_eq!(before.elapsed(), Duration::from_secs(7));
    assert!(read_all(reader).await == bytes);
    stdout = grandchild;
    assert_eq!(nix::unistd::write(&stdout, b"x"), Err(Errno::EPIPE));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_never_reads_cannot_hang_the_drain() {
    let client = Client::new();
    let (stdio, [_, stdout, _]) = client.pipes(&output(client.fifo("out"))).await;
    let _reader = client.reader("out");
    let mut process = ours(stdout.unwrap());
    // Paused time only passes when nothing moves any more.
    let stuck = timeout(Duration::from_secs(1), process.write_all(&pattern(8 << 20))).await;
    assert!(stuck.is_err());
    drop(process);
    assert!(!stdio.drain(Duration::from_secs(7)).await);
    // Again, without a wait.
    assert!(!stdio.drain(Duration::from_secs(7)).await);
}

#[tokio::test]
async fn a_process_that_was_never_launched_does_not_hang_the_drain() {
    let client = Client::new();
    let config = Config {
        stdin: client.fifo("in"),
        stdout: client.fifo("out"),
        stderr: client.fifo("err"),
        terminal: false,
    };
    let (stdio, child) = client.open(&config).await.unwrap();
    drop(child);
    assert!(stdio.drain(LONG).await);
    let config = Config {
        terminal: true,
        ..config
    };
    let (stdio, child) = client.open(&config).await.unwrap();
    drop(child);
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn what_is_not_there_or_no_fifo_is_a_clear_error() {
    let client = Client::new();
    let missing = client.path("missing").to_str().unwrap().to_string();
    let file = client.path("file").to_str().unwrap().to_string();
    fs::write(&file, "").unwrap();
    let folder = client.folder.path().to_str().unwrap().to_string();
    let input = |stdin: &str| Config {
        stdin: stdin.into(),
        ..Config::default()
    };
    let cases = [
        (output(missing.clone()), Kind::NotFound, missing.as_str()),
        (input(&missing), Kind::NotFound, missing.as_str()),
        (output(folder.clone()), Kind::InvalidArgument, folder.as_str()),
        (input(&file), Kind::InvalidArgument, file.as_str()),
        (input("binary:///bin/true"), Kind::InvalidArgument, "binary:///bin/true"),
        (output("relative".into()), Kind::InvalidArgument, "relative"),
        (output("http:///x".into()), Kind::InvalidArgument, "scheme"),
        (
            output("binary:///missing/logger".into()),
            Kind::NotFound,
            "/missing/logger",
        ),
    ];
    for (config, kind, names) in cases {
        let error = client.open(&config).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(names), "{error}");
    }
}

#[test]
fn a_stream_that_never_rests_leaves_time_to_others() {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        isolation::block_on(async {
            // A pipe that is copied into itself always has bytes, and always room.
            let (read_end, write_end) = pipe((0, 0)).unwrap();
            let watch = |fd, interest| watched(nonblocking(fd).unwrap(), interest).unwrap();
            nix::unistd::write(&write_end, &pattern(10_000)).unwrap();
            let copy = Copy::new(
                "a ring".into(),
                Source::Pipe(watch(read_end, Interest::READABLE)),
                Sink::Pipe(watch(write_end, Interest::WRITABLE)),
            );
            let (finish, order) = tokio::sync::watch::channel(false);
            let ring = tokio::spawn(copy.run(order));
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert!(!ring.is_finished());
            finish.send_replace(true);
            ring.await.unwrap();
        });
        tell.send(()).unwrap();
    });
    told.recv_timeout(LONG).expect("nobody else had a turn");
}

// Terminals.

fn connect(socket: &Path) -> UnixStream {
    UnixStream::connect(socket).unwrap()
}

fn send_fds(stream: &UnixStream, fds: &[&OwnedFd]) {
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let control: &[_] = &[ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { control };
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(b"/dev/pts/0")],
        control,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

fn pty() -> OpenptyResult {
    openpty(None, None).unwrap()
}

fn size_of_terminal(slave: &OwnedFd) -> (u16, u16) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ stores one winsize at a live local.
    let result = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    assert_eq!(result, 0);
    (size.ws_col, size.ws_row)
}

#[tokio::test]
async fn a_terminal_echoes_takes_sizes_and_ends_with_its_last_holder() {
    let client = Client::new();
    let (stdio, socket) = client.terminal(&terminal(client.fifo("in"), client.fifo("out"))).await;
    stdio.resize(100, 30).unwrap();
    let OpenptyResult { master, slave } = pty();
    send_fds(&connect(&socket), &[&master]);
    drop(master);
    stdio.launched().await.unwrap();
    assert!(!socket.exists());
    assert_eq!(size_of_terminal(&slave), (100, 30));
    stdio.resize(120, 40).unwrap();
    assert_eq!(size_of_terminal(&slave), (120, 40));
    assert_eq!(stdio.resize(70_000, 1).unwrap_err().kind(), Kind::InvalidArgument);

    let mut out = client.reader("out");
    client.writer("in").write_all(b"hello\n").await.unwrap();
    let mut echo = [0; 7];
    timeout(LONG, out.read_exact(&mut echo)).await.unwrap().unwrap();
    assert_eq!(&echo, b"hello\r\n");
    let mut process = File::from(slave);
    let mut line = [0; 16];
    assert_eq!(process.read(&mut line).unwrap(), 6);
    // The end of stdin does not end the terminal.
    stdio.close_stdin();
    let cat = run(
        "sh",
        &["-c", "yes 0123456789abcde | head -c 1000000"],
        [None, Some(process.into()), None],
    );
    let all = read_all(out).await;
    assert!(all == b"0123456789abcde\r\n".repeat(1_000_000 / 16));
    exit(cat).await;
    assert!(stdio.drain(LONG).await);
    stdio.resize(1, 1).unwrap();
}

#[tokio::test]
async fn the_input_of_a_terminal_is_delivered_however_slowly_it_is_read() {
    let client = Client::new();
    let (stdio, socket) = client.terminal(&terminal(client.fifo("in"), String::new())).await;
    let OpenptyResult { master, slave } = pty();
    let mut raw = termios::tcgetattr(&slave).unwrap();
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(&slave, termios::SetArg::TCSANOW, &raw).unwrap();
    send_fds(&connect(&socket), &[&master]);
    drop(master);
    stdio.launched().await.unwrap();
    let bytes = pattern(200_000);
    let writer = tokio::spawn(send(client.writer("in"), bytes.clone()));
    let process = elsewhere(move || {
        let mut all = vec![0; 200_000];
        File::from(slave).read_exact(&mut all).unwrap();
        all
    });
    assert!(process.await == bytes);
    writer.await.unwrap();
    assert!(stdio.drain(LONG).await);
}

#[tokio::test]
async fn a_bundle_with_a_long_path_has_a_console_socket_that_can_be_reached() {
    let client = Client::new();
    let bundle = client.path(&"b".repeat(120));
    fs::create_dir(&bundle).unwrap();
    let config = terminal(String::new(), client.fifo("out"));
    let (stdio, child) = open(&config, NAMES, &bundle, (0, 0), &Reaper::new()).await.unwrap();
    let ChildIo::Terminal { console_socket } = child else {
        panic!("no terminal");
    };
    assert!(console_socket.is_absolute() && console_socket.as_os_str().len() < 108);
    let files = || fs::read_dir(&bundle).unwrap().collect::<io::Result<Vec<_>>>().unwrap();
    assert_eq!(files().len(), 1);
    assert_eq!(files()[0].metadata().unwrap().mode() & 0o777, 0o600);
    let OpenptyResult { master, slave } = pty();
    // From another process, as the runtime will.
    let reached = run("test", &["-S", console_socket.to_str().unwrap()], [None, None, None])
        .wait()
        .unwrap();
    assert!(reached.success());
    send_fds(&connect(&console_socket), &[&master]);
    drop(master);
    stdio.launched().await.unwrap();
    assert!(files().is_empty());
    let out = client.reader("out");
    File::from(slave).write_all(b"hi").unwrap();
    assert_eq!(read_all(out).await, b"hi");
}

#[tokio::test]
async fn garbage_on_the_console_socket_is_refused_and_nothing_stays_open() {
    let OpenptyResult { master, slave } = pty();
    let (other, _) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let many = vec![&master; 20];
    let cases: [(&str, Option<&[&OwnedFd]>); 7] = [
        ("nothing but a connection", None),
        ("no descriptor", Some(&[])),
        ("a pipe", Some(&[&other])),
        ("the wrong side of a pty", Some(&[&slave])),
        ("two masters", Some(&[&master, &master])),
        ("three masters", Some(&[&master, &master, &master])),
        ("many masters", Some(&many)),
    ];
    let masters = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let ino = nix::sys::stat::fstat(&other).unwrap().st_ino;
        links
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter(|link| link.to_str() == Some(&format!("pipe:[{ino}]")))
            .count()
    };
    let before = masters();
    for (case, fds) in cases {
        let client = Client::new();
        let (stdio, socket) = client.terminal(&terminal(client.fifo("in"), client.fifo("out"))).await;
        let stream = connect(&socket);
        if let Some(fds) = fds {
            send_fds(&stream, fds);
        }
        drop(stream);
        let error = stdio.launched().await.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{case}: {error}");
        assert!(!socket.exists(), "{case}");
        assert!(stdio.drain(LONG).await, "{case}");
        assert_eq!(masters(), before, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_terminal_that_never_comes_is_waited_for_ten_seconds() {
    let client = Client::new();
    let (stdio, socket) = client.terminal(&terminal(client.fifo("in"), client.fifo("out"))).await;
    let before = Instant::now();
    let error = stdio.launched().await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    assert_eq!(before.elapsed(), Duration::from_secs(10));
    assert!(!socket.exists());
    assert_eq!(stdio.launched().await.unwrap_err().kind(), Kind::FailedPrecondition);
}

// Loggers.

/// Copies its streams to files beside it, and says so when it is done.
const GOOD_LOGGER: &str = r#"
cd "${0%/*}"
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $COLOUR $#:$*" >>start
cat <&3 >out.$$ 5>&- & cat <&4 >err.$$ 5>&- & exec 5>&-
wait; cat out.$$ >>out; cat err.$$ >>err; echo >>end
"#;

#[tokio::test]
async fn one_logger_gets_both_streams_its_arguments_and_the_names() {
    let client = Client::new();
    let logger = client.script("logger", GOOD_LOGGER);
    let uri = format!(
        "binary://{}?b=2&a=1&flag&env.COLOUR=sky+blue&env.CONTAINER_ID=forged",
        logger.display()
    );
    let config = Config {
        stdout: uri.clone(),
        stderr: uri,
        ..Config::default()
    };
    let names = Names {
        exec: Some("e1"),
        ..NAMES
    };
    for (names, id) in [(NAMES, "c1"), (names, "e1")] {
        let (stdio, child) = open(&config, names, client.folder.path(), (0, 0), &Reaper::new())
            .await
            .unwrap();
        let ChildIo::Pipes { stdout, stderr, .. } = child else {
            panic!("no pipes");
        };
        let (out, err) = (vec![b'o'; 1 << 20], vec![b'e'; 1 << 20]);
        tokio::join!(
            send(ours(stdout.unwrap()), out.clone()),
            send(ours(stderr.unwrap()), err.clone())
        );
        assert!(stdio.drain(LONG).await);
        let take = |name: &str| {
            let bytes = fs::read(client.path(name)).unwrap();
            fs::remove_file(client.path(name)).unwrap();
            bytes
        };
        assert!(take("out") == out && take("err") == err);
        assert_eq!(
            String::from_utf8(take("start")).unwrap(),
            format!("ns {id} sky blue 6:b 2 a 1 flag \n")
        );
        assert_eq!(take("end"), b"\n");
    }
}

#[tokio::test]
async fn two_loggers_are_two_processes() {
    let client = Client::new();
    let logger = client.script("logger", GOOD_LOGGER);
    let config = Config {
        stdout: format!("binary://{}?out", logger.display()),
        stderr: format!("binary://{}?err", logger.display()),
        ..Config::default()
    };
    let (stdio, [_, stdout, stderr]) = client.pipes(&config).await;
    send(ours(stdout.unwrap()), b"o".into()).await;
    send(ours(stderr.unwrap()), b"e".into()).await;
    assert!(stdio.drain(LONG).await);
    let read = |name: &str| fs::read_to_string(client.path(name)).unwrap();
    assert_eq!(
        (read("out").as_str(), read("err").as_str(), read("end").as_str()),
        ("o", "e", "\n\n")
    );
}

#[tokio::test]
async fn a_logger_gets_the_output_of_a_terminal() {
    let client = Client::new();
    let logger = client.script("logger", GOOD_LOGGER);
    let (stdio, socket) = client
        .terminal(&terminal(String::new(), format!("binary://{}", logger.display())))
        .await;
    let OpenptyResult { master, slave } = pty();
    send_fds(&connect(&socket), &[&master]);
    drop(master);
    stdio.launched().await.unwrap();
    File::from(slave).write_all(b"hello").unwrap();
    assert!(stdio.drain(LONG).await);
    assert_eq!(fs::read(client.path("out")).unwrap(), b"hello");
}

#[tokio::test]
async fn a_logger_that_dies_neither_blocks_nor_kills_the_process() {
    for end in ["exit 3", "exit 0", "kill -9 $$"] {
        let client = Client::new();
        let logger = client.script("logger", &format!("exec 5>&-\nread line <&3\n{end}"));
        let uri = format!("binary://{}", logger.display());
        let config = Config {
            stdout: uri.clone(),
            stderr: uri,
            ..Config::default()
        };
        let (stdio, [_, stdout, stderr]) = client.pipes(&config).await;
        let (mut stdout, mut stderr) = (ours(stdout.unwrap()), ours(stderr.unwrap()));
        send(&mut stdout, b"die\n".into()).await;
        tokio::join!(send(&mut stdout, pattern(3 << 20)), send(&mut stderr, pattern(3 << 20)));
        drop((stdout, stderr));
        assert!(!stdio.drain(LONG).await, "{end}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_logger_that_does_not_get_ready_is_killed_after_ten_seconds() {
    let client = Client::new();
    let logger = client.script("logger", "exec cat <&3");
    let before = Instant::now();
    let error = client
        .open(&output(format!("binary://{}", logger.display())))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    assert!(error.to_string().contains(logger.to_str().unwrap()), "{error}");
    assert_eq!(before.elapsed(), Duration::from_secs(10));
}

#[tokio::test]
async fn a_slow_logger_is_left_to_finish_after_the_bound() {
    let client = Client::new();
    let go = client.fifo("go");
    let logger = client.script(
        "logger",
        &format!("exec 5>&-\nread go <{go}\ncat <&3 >${{0}}.out\necho >{go}"),
    );
    let (stdio, [_, stdout, _]) = client.pipes(&output(format!("binary://{}", logger.display()))).await;
    send(ours(stdout.unwrap()), b"late".into()).await;
    assert!(!stdio.drain(Duration::ZERO).await);
    drop(stdio);
    let said = elsewhere(move || {
        fs::write(&go, "go\n").unwrap();
        fs::read(&go).unwrap()
    });
    assert_eq!(said.await, b"\n");
    assert_eq!(fs::read(client.path("logger.out")).unwrap(), b"late");
}

// Leaks.

#[test]
fn two_hundred_processes_leave_no_descriptor_behind() {
    // Alone: other tests open descriptors at the same time.
    let name = "task::stdio::tests::two_hundred_processes_leave_no_descriptor_behind";
    if isolation::inside(name, &["env"]) {
        isolation::block_on(open_and_drop_two_hundred());
    }
}

async fn open_and_drop_two_hundred() {
    let client = Client::new();
    let logger = client.script("logger", "exec 5>&-; cat <&3 >/dev/null");
    let (stdin, stdout, stderr) = (client.fifo("in"), client.fifo("out"), client.fifo("err"));
    let pipes = Config {
        stdin: stdin.clone(),
        stdout: stdout.clone(),
        stderr,
        terminal: false,
    };
    let configs = [
        pipes.clone(),
        terminal(stdin, stdout.clone()),
        output(format!("file://{}/log", client.folder.path().display())),
        Config {
            stderr: "/missing".into(),
            ..pipes
        },
    ];
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let reaper = Reaper::new();
    let mut before = 0;
    for round in 0..50 {
        for config in &configs {
            let Ok((stdio, child)) = open(config, NAMES, client.folder.path(), (0, 0), &reaper).await else {
                continue;
            };
            match child {
                ChildIo::Terminal { console_socket } if round % 2 == 0 => {
                    let OpenptyResult { master, slave } = pty();
                    send_fds(&connect(&console_socket), &[&master]);
                    stdio.launched().await.unwrap();
                    drop((master, slave));
                }
                // Bytes that nobody reads.
                ChildIo::Pipes {
                    stdout: Some(stdout), ..
                } if round % 2 == 0 => {
                    File::from(stdout).write_all(b"x").unwrap();
                }
                _ => {}
            }
            if round % 3 == 0 {
                stdio.drain(Duration::from_millis(1)).await;
            }
        }
        let (stdio, _) = client.pipes(&output(format!("binary://{}", logger.display()))).await;
        assert!(stdio.drain(LONG).await);
        drop(stdio);
        if round == 0 {
            before = {
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                count()
            };
        }
    }
    until("every descriptor to be closed", || count() <= before).await;
    let files = fs::read_dir(client.folder.path()).unwrap().count();
    assert_eq!(files, 5, "the three fifos, the logger and the log");
}

// Strings of clients.

#[test]
fn strings_of_clients_mean_what_containerd_means_by_them() {
    let parsed = |text| target::parse("stdout", text).unwrap();
    assert_eq!(parsed(""), Target::Nothing);
    assert_eq!(parsed("/a%20b:c"), Target::Path("/a%20b:c".into()));
    assert_eq!(parsed("fifo:///a%20b"), Target::Path("/a b".into()));
    assert_eq!(parsed("file:/a#b?c"), Target::File("/a".into()));
    let logger = |args: &[&str], env: &[(&str, &str)]| {
        Target::Logger(target::LoggerCommand {
            program: "/x".into(),
            args: args.iter().map(Into::into).collect(),
            env: env.iter().map(|(key, value)| (key.into(), value.into())).collect(),
        })
    };
    assert_eq!(parsed("binary:///x"), logger(&[], &[]));
    assert_eq!(
        parsed("binary:///x?a=1&b&a=2&c+d=%26&env.E=e=f"),
        logger(&["a", "1", "b", "", "c d", "&"], &[("E", "e=f")])
    );
    for bad in [
        "x",
        "://x",
        "fifo://host/x",
        "file:///a%2",
        "file:///%00",
        "binary:///x?env.=1",
        "binary:///x?env.A%3DB=1",
        "binary:///x?%zz",
        "/a\0b",
        "FILE:///x",
    ] {
        let error = target::parse("stdout", bad).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn whatever_a_client_sends_is_an_absolute_path_or_an_error(
        scheme in "(fifo:|file:|binary:|)(//)?",
        rest in "[/a-f0-9%?&=+#.\u{0}-\u{ff}]{0,24}",
    ) {
        match target::parse("stdin", &format!("{scheme}{rest}")) {
            Ok(Target::Nothing) => proptest::prop_assert!(scheme.is_empty() && rest.is_empty()),
            Ok(Target::Path(path) | Target::File(path)) => proptest::prop_assert!(path.is_absolute()),
            Ok(Target::Logger(command)) => {
                proptest::prop_assert!(command.program.is_absolute());
                proptest::prop_assert!(command.args.len() % 2 == 0);
            }
            Err(error) => proptest::prop_assert_eq!(error.kind(), Kind::InvalidArgument),
        }
    }
}
