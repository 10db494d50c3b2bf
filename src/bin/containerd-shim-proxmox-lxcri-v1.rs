//! The program that containerd runs; see `proxmox_lxcri::shim`.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxmox_lxcri::shim::main(std::env::args_os().skip(1))
}
