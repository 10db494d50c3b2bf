//! Files of a procfs that the caller vouches for by a descriptor of its root folder.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::BorrowedFd,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    fcntl::openat,
    sys::{
        stat::Mode,
        statfs::{FsType, fstatfs},
    },
};

const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// A file that a container has put in the place of one of /proc's is not written to: what is written decides how confined it is.
fn open(proc: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<File> {
    // O_NONBLOCK, since before the check it may be a fifo.
    let file = openat(
        proc,
        path,
        flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK,
        Mode::empty(),
    )?;
    if fstatfs(&file)?.filesystem_type() != FsType(PROC_SUPER_MAGIC) {
        return Err(Errno::EXDEV.into());
    }
    Ok(file.into())
}

/// The text of a file, at most 64 KiB.
pub(super) fn read(proc: BorrowedFd<'_>, path: &str) -> io::Result<String> {
    let mut text = Vec::new();
    open(proc, path, OFlag::O_RDONLY)?
        .take(64 << 10)
        .read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Writes a file by one write(2).
pub(super) fn write(proc: BorrowedFd<'_>, path: &str, text: &str) -> io::Result<()> {
    open(proc, path, OFlag::O_WRONLY)?.write_all(text.as_bytes())
}
