//! The program that containerd runs; see `proxmox_lxcri::shim`.

use std::process::ExitCode;

use proxmox_lxcri::{backend::lxc::monitor, shim};

// As symbols of the program itself, for liblxc to call in place of libc's; see `proxmox_lxcri::backend::lxc::monitor`, and build.rs. In
// assembly, because link-time optimisation hides what nobody in the program calls.
macro_rules! export {
    ($name:literal, $target:path) => {
        #[cfg(target_arch = "x86_64")]
        std::arch::global_asm!(
            concat!(".globl ", $name), concat!(".type ", $name, ",@function"), concat!($name, ":"), "jmp {target}",
            target = sym $target,
        );
        #[cfg(target_arch = "aarch64")]
        std::arch::global_asm!(
            concat!(".globl ", $name), concat!(".type ", $name, ",%function"), concat!($name, ":"), "b {target}",
            target = sym $target,
        );
    };
}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("export! lacks this architecture's jump, without which exits of LXC containers would be lost");
export!("waitpid", monitor::waitpid);
export!("accept", monitor::accept);
export!("execvp", monitor::execvp);
export!("accept4", monitor::accept4);
export!("mount", monitor::mount);

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    // No action of containerd's: the shim calls the program like this.
    if args.next_if(|first| first == monitor::ACTION).is_some() {
        return monitor::main(args);
    }
    shim::main(args)
}
