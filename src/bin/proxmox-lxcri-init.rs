//! The program that becomes a container's init; see `proxmox_lxcri::backend::lxc::init`.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxmox_lxcri::backend::lxc::init::main(std::env::args_os().skip(1))
}
