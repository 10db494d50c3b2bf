//! The only place that forks and reaps.

use std::os::fd::OwnedFd;

/// A process, held by a pidfd: its number cannot be taken by another.
#[derive(Debug)]
pub struct Pidfd {
    /// Number on the host, for messages and events.
    pub pid: u32,
    fd: OwnedFd,
}

impl Pidfd {
    /// The descriptor.
    pub fn as_fd(&self) -> &OwnedFd {
        &self.fd
    }
}
