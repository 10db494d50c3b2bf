//! The program that containerd runs; see `proxmox_lxcri::shim`.

use std::process::ExitCode;

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
export!("waitpid", proxmox_lxcri::backend::lxc::monitor::waitpid);
export!("accept", proxmox_lxcri::backend::lxc::monitor::accept);
export!("execvp", proxmox_lxcri::backend::lxc::monitor::execvp);
export!("accept4", proxmox_lxcri::backend::lxc::monitor::accept4);
export!("mount", proxmox_lxcri::backend::lxc::monitor::mount);

fn main() -> ExitCode {
    proxmox_lxcri::shim::main(std::env::args_os().skip(1))
}
