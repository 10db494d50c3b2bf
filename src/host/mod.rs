//! The machine: processes ([`command`]), cgroups ([`cgroup`]) and systemd's scopes ([`systemd`]).

pub mod cgroup;
pub mod command;
pub mod systemd;

use std::{fs::File, io::Read, path::Path};

/// Reads a file of procfs, sysfs or cgroupfs with two reads where the size is usual. Such files say that they have no size, so a
/// reader that feels its way makes the kernel write the text again and again.
pub(crate) fn read_kernel_file(path: impl AsRef<Path>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(8 << 10);
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}
