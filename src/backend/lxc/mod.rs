//! OCI bundles as LXC containers, on liblxc. Not a backend yet: what is here are the parts that need nothing else.

pub mod config;
mod dynamic;
pub mod init;
pub mod seccomp;
pub mod system;
