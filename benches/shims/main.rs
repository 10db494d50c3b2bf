//! Measures shims side by side in one run: ours with crun and with LXC, containerd's Go shim with crun and with runc, and the bare
//! commands of crun and LXC as the limit.
//!
//! `cargo bench --bench shims -- --help` lists the options. The harness speaks ttrpc straight to the shim binaries; no containerd
//! takes part, and a containerd of the machine is not touched: everything lives in a mount and a process namespace of its own
//! and under one cgroup, and ends with them.
//!
//! ```text
//! main ─▶ stage (namespaces, clean-up)      ─▶ run ─▶ lifecycle · memory · stdio · burst   what is measured
//!                                                 │          │
//!                                                 │          ▼
//!                                                 │     shim · crun · lxc · bundle · events how the candidates are driven
//!                                                 ▼
//!                                            results ─▶ targets ─▶ report · chart           what is shown
//! ```

// The terminal is where the table belongs.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod bundle;
mod burst;
mod candidate;
mod chart;
mod crun;
mod events;
mod fifo;
mod lifecycle;
mod lxc;
mod machine;
mod memory;
mod process;
mod report;
mod results;
mod run;
mod shim;
mod stage;
mod stdio;
mod targets;

use std::process::ExitCode;

use arguments::{Arguments, Wish};
use stage::Role;

fn main() -> ExitCode {
    let wish = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(wish) => wish,
        Err(e) => {
            eprintln!("shims: {e}");
            return ExitCode::from(2);
        }
    };
    let done = match wish {
        Wish::Print(text) => {
            println!("{text}");
            Ok(ExitCode::SUCCESS)
        }
        Wish::Run(arguments) => match Role::find() {
            Ok(Role::Outer) => stage::supervise(),
            Ok(Role::First) => stage::stand_by(),
            Ok(Role::Inner(stage)) => run::run(&arguments, stage).map(|()| ExitCode::SUCCESS),
            Err(e) => Err(e),
        },
    };
    done.unwrap_or_else(|e| {
        eprintln!("shims: {e}");
        ExitCode::FAILURE
    })
}
