//! In a mount namespace of their own, with a devpts of their own.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, symlink},
        net::UnixStream,
    },
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    fcntl::open as open_file,
    mount::{MsFlags, mount},
};

use super::*;
use crate::{error::Kind, host::command::isolation};

fn inside(name: &str) -> bool {
    isolation::inside(
        &format!("backend::lxc::init::terminal::tests::{name}"),
        &["unshare", "--mount", "--propagation", "private", "setsid", "--wait"],
    )
}

/// A folder as a container's /dev.
fn dev() -> (tempfile::TempDir, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fs::create_dir(path.join("pts")).unwrap();
    let options = "newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount(
        Some("devpts"),
        &path.join("pts"),
        Some("devpts"),
        MsFlags::empty(),
        Some(options),
    )
    .unwrap();
    let fd = folder(path);
    (dir, fd)
}

fn folder(path: &Path) -> OwnedFd {
    open_file(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

#[test]
fn a_terminal_is_the_containers_own_and_has_its_owner_and_size() {
    if !inside("a_terminal_is_the_containers_own_and_has_its_owner_and_size") {
        return;
    }
    let (dir, dev) = dev();
    let size = Size { rows: 33, columns: 111 };
    let terminal = open(dev.as_fd(), 1234, Some(size)).unwrap();
    let node = fs::metadata(dir.path().join("pts/0")).unwrap();
    let slave = fstat(&terminal.slave).unwrap();
    assert_eq!((slave.st_ino, slave.st_rdev), (node.ino(), node.rdev()));
    assert_eq!((node.uid(), node.gid(), node.mode() & 0o777), (1234, 5, 0o620));
    let output = Command::new("stty")
        .arg("size")
        .stdin(terminal.slave.try_clone().unwrap())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "33 111\n");
    for fd in [&terminal.master, &terminal.slave] {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC);
    }
}

#[test]
fn what_is_no_devpts_is_refused() {
    if !inside("what_is_no_devpts_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dev = folder(dir.path());
    let pts = dir.path().join("pts");
    let refused = |why: &str| {
        let error = open(dev.as_fd(), 0, None).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{why}: {error}");
    };
    refused("nothing there");
    fs::write(&pts, "").unwrap();
    refused("a file");
    fs::remove_file(&pts).unwrap();
    symlink("/dev/pts", &pts).unwrap();
    refused("a link to that of the host");
    fs::remove_file(&pts).unwrap();
    fs::create_dir(&pts).unwrap();
    nix::sys::stat::mknod(
        &pts.join("ptmx"),
        nix::sys::stat::SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        nix::sys::stat::makedev(5, 2),
    )
    .unwrap();
    refused("a folder with the device");
    // The host's multiplexer, and a terminal of the container's own.
    for (other, own) in [("/dev/pts/ptmx", false), ("pts/0", true)] {
        let (real, dev) = self::dev();
        let _terminal = open(dev.as_fd(), 0, None).unwrap();
        let other = if own { real.path().join(other) } else { other.into() };
        let ptmx = real.path().join("pts/ptmx");
        mount(Some(&other), &ptmx, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let error = open(dev.as_fd(), 0, None).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    }
}

#[test]
fn the_terminal_is_mounted_on_the_console_made_or_found() {
    if !inside("the_terminal_is_mounted_on_the_console_made_or_found") {
        return;
    }
    for found in [false, true] {
        let (dir, dev) = dev();
        let console = dir.path().join("console");
        if found {
            fs::write(&console, "").unwrap();
        }
        let terminal = open(dev.as_fd(), 0, None).unwrap();
        bind_console(dev.as_fd(), terminal.slave.as_fd()).unwrap();
        let node = fs::metadata(&console).unwrap();
        assert!(node.file_type().is_char_device());
        assert_eq!(node.rdev(), fstat(&terminal.slave).unwrap().st_rdev);
        let mut file = File::options()
            .write(true)
            .custom(libc::O_NOCTTY)
            .open(&console)
            .unwrap();
        file.write_all(b"hello\n").unwrap();
        let mut text = [0; 7];
        File::from(terminal.master).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello\r\n");
    }
}

trait Custom {
    fn custom(&mut self, flags: i32) -> &mut Self;
}

impl Custom for fs::OpenOptions {
    fn custom(&mut self, flags: i32) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, flags)
    }
}

#[test]
fn a_console_that_is_a_symlink_or_a_folder_is_refused() {
    if !inside("a_console_that_is_a_symlink_or_a_folder_is_refused") {
        return;
    }
    let (dir, dev) = dev();
    let console = dir.path().join("console");
    let terminal = open(dev.as_fd(), 0, None).unwrap();
    let target = dir.path().join("target");
    fs::write(&target, "").unwrap();
    symlink(&target, &console).unwrap();
    let refused = || bind_console(dev.as_fd(), terminal.slave.as_fd()).unwrap_err().kind();
    assert_eq!(refused(), Kind::InvalidArgument);
    assert!(
        fs::metadata(&target).unwrap().is_file(),
        "nothing was mounted on the target"
    );
    fs::remove_file(&console).unwrap();
    fs::create_dir(&console).unwrap();
    assert_eq!(refused(), Kind::InvalidArgument);
}

#[test]
fn the_master_arrives_where_a_shim_waits_for_it() {
    if !inside("the_master_arrives_where_a_shim_waits_for_it") {
        return;
    }
    let (_dir, dev) = dev();
    let terminal = open(dev.as_fd(), 0, None).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(theirs.into(), terminal.master).unwrap();
    let mut buffer = [0; 64];
    let mut iov = [std::io::IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!([i32; 2]);
    let message = nix::sys::socket::recvmsg::<()>(
        ours.as_raw_fd(),
        &mut iov,
        Some(&mut control),
        nix::sys::socket::MsgFlags::empty(),
    )
    .unwrap();
    let rights: Vec<_> = message
        .cmsgs()
        .unwrap()
        .flat_map(|message| match message {
            nix::sys::socket::ControlMessageOwned::ScmRights(fds) => fds,
            _ => vec![],
        })
        .collect();
    assert_eq!(rights.len(), 1);
    // SAFETY: just received, nobody else's.
    let mut master = unsafe { File::from_raw_fd(rights[0]) };
    File::from(terminal.slave).write_all(b"x").unwrap();
    let mut byte = [0];
    master.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_controlling_terminal_is_stdio_and_hangs_up_its_session() {
    if !inside("a_controlling_terminal_is_stdio_and_hangs_up_its_session") {
        return;
    }
    let (_dir, dev) = dev();
    let terminal = open(dev.as_fd(), 0, None).unwrap();
    let slave = terminal.slave.try_clone().unwrap();
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "cut -d' ' -f6,7,8 /proc/self/stat; echo to /dev/tty >/dev/tty; exec sleep 1000",
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let again = std::sync::Mutex::new(Some(slave));
    // SAFETY: the child of this single-threaded test only makes system calls.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            // Who runs the tests under nohup ignores it, and so would the child.
            nix::sys::signal::signal(nix::sys::signal::Signal::SIGHUP, nix::sys::signal::SigHandler::SigDfl)?;
            let slave = again
                .lock()
                .ok()
                .and_then(|mut slave| slave.take())
                .ok_or(Errno::EBADF)?;
            make_controlling(slave).map_err(std::io::Error::other)
        })
    };
    let mut child = command.spawn().unwrap();
    drop(command);
    let device = fstat(&terminal.slave).unwrap().st_rdev;
    drop(terminal.slave);
    let mut master = File::from(terminal.master);
    let mut text = String::new();
    let mut buffer = [0; 256];
    while !text.ends_with("to /dev/tty\r\n") {
        let length = master.read(&mut buffer).unwrap();
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    let fields: Vec<u64> = text
        .lines()
        .next()
        .unwrap()
        .split_ascii_whitespace()
        .map(|field| field.parse().unwrap())
        .collect();
    let pid = u64::from(child.id());
    assert_eq!(fields, [pid, device, pid], "session, terminal, foreground group");
    drop(master);
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
        Some(libc::SIGHUP)
    );
}
