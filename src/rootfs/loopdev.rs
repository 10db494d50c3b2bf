//! Loop devices (loop(4)): a file as a block device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use crate::error::{Context, Error, Result};

const LOOP_CTL_GET_FREE: u64 = 0x4C82;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another process may take the free device before us until we give up.
const TRIES: u32 = 100;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device that the kernel takes back when its last user is gone: this value, or the file system mounted from it.
#[derive(Debug)]
pub(super) struct LoopDevice {
    /// `/dev/loop<N>`.
    pub(super) path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Puts `file` behind a free loop device.
    ///
    /// # Errors
    /// The kernel's; no device is left behind then.
    pub(super) fn attach(file: &Path, read_only: bool, direct_io: bool) -> Result<Self> {
        let mut access = OpenOptions::new();
        access.read(true).write(!read_only);
        let backing = access
            .open(file)
            .context(|| format!("cannot open {} for a loop device", file.display()))?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .context(|| "cannot open /dev/loop-control; is the module loop loaded?")?;
        for _ in 0..TRIES {
            // SAFETY: this request takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as libc::Ioctl) };
            if number < 0 {
                return Err(io::Error::last_os_error()).context(|| "cannot get a free loop device");
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = access
                .open(&path)
                .context(|| format!("cannot open {}", path.display()))?;
            match configure(&device, &backing, file, read_only, direct_io) {
                Ok(()) => return Ok(Self { path, _open: device }),
                // Somebody else was faster; the next free one has another number.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e).context(|| format!("cannot set up {} for {}", path.display(), file.display())),
            }
        }
        Err(Error::unavailable(format!(
            "no loop device for {}: others took each free one {TRIES} times",
            file.display()
        )))
    }
}

fn configure(device: &File, backing: &File, name: &Path, read_only: bool, direct_io: bool) -> io::Result<()> {
    // SAFETY: the structure is plain numbers; zero is valid for each of them.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = backing.as_raw_fd() as u32;
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    if read_only {
        config.info.flags |= LO_FLAGS_READ_ONLY;
    }
    if direct_io {
        config.info.flags |= LO_FLAGS_DIRECT_IO;
    }
    // For people who read losetup(8); the kernel wants a NUL at the end.
    let name = name.as_os_str().as_bytes();
    let length = name.len().min(config.info.file_name.len() - 1);
    config.info.file_name[..length].copy_from_slice(&name[..length]);
    // SAFETY: `config` is a `struct loop_config` that lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as libc::Ioctl, &raw const config) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
