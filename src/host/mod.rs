//! The machine: processes ([`command`]), cgroups ([`cgroup`]) and systemd's scopes ([`systemd`]).

pub mod cgroup;
pub mod command;
pub mod systemd;

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::Path};

use nix::{
    errno::Errno,
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::error::{Context, Result};

/// A file in memory with this content, close-on-exec, to be read from its beginning. It ends with its last descriptor, whatever happens.
///
/// # Errors
/// The operating system's.
pub(crate) fn memory_file(content: &[u8]) -> Result<File> {
    let make = |more| memfd_create(c"proxmox-lxcri", MFdFlags::MFD_CLOEXEC | more);
    // Hardened kernels (vm.memfd_noexec=2) demand the flag, those before 6.3 refuse it.
    let file = match make(MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
        Err(Errno::EINVAL) => make(MFdFlags::empty()),
        made => made,
    };
    let file = File::from(file.context(|| "cannot make a file in memory")?);
    file.write_all_at(content, 0).context(|| "cannot write to memory")?;
    Ok(file)
}

/// Reads a file of procfs, sysfs or cgroupfs with two reads where the size is usual. Such files say that they have no size, so a
/// reader that feels its way makes the kernel write the text again and again.
pub(crate) fn read_kernel_file(path: impl AsRef<Path>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(8 << 10);
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}
