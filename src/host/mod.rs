//! The kernel: processes ([`command`]) and cgroups ([`cgroup`]).

pub mod cgroup;
pub mod command;
