//! What containerd sees.
//!
//! containerd runs the program with an action ([`args`]). `start` finds the shim of the container's group or makes one
//! ([`start`], [`bootstrap`], [`socket`]), prints its address and ends. The shim ([`server`]) serves the task service, sends
//! events ([`events`]) and writes a log ([`log`]) until its last container is gone. `delete` cleans up after a shim that died.

pub mod args;
pub mod bootstrap;
pub mod delete;
pub mod events;
pub mod info;
pub mod log;
pub mod server;
pub mod service;
pub mod socket;
pub mod start;

use std::{ffi::OsString, io::Write, path::Path, process::ExitCode, sync::Arc};

use args::Action;

use crate::{
    backend, config,
    error::{Context, Result},
    host::command::Reaper,
    task::{Engine, bundle::Bundle},
};

/// The name under which containerd knows this runtime.
pub const RUNTIME: &str = "io.containerd.proxmox-lxcri.v1";

/// Runs the program: does what the arguments (without the program's name) ask for. On failure one sentence is written to stderr.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Nobody may be left who could be told.
            let _ = writeln!(std::io::stderr(), "{RUNTIME}: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let (action, flags) = args::parse(args)?;
    match action {
        Action::Help => print(args::HELP.as_bytes()),
        Action::Version => {
            let version = env!("CARGO_PKG_VERSION");
            print(format!("containerd-shim-proxmox-lxcri-v1:\n  Version:  {version}\n").as_bytes())
        }
        Action::Info => print(&info::info()?),
        Action::Start => {
            let started = start::start(&flags)?;
            print(&started.answer)?;
            started.shim.map_or(Ok(()), start::Newborn::is_known)
        }
        Action::Delete => print(&delete::delete(&flags)?),
        Action::Serve => server::serve(&flags, engine),
    }
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(answer)
        .and_then(|()| stdout.flush())
        .context(|| "cannot write the answer")
}

/// The container as the routing rules see it.
fn container<'a>(flags: &'a args::Flags, bundle: &'a Bundle) -> config::Container<'a> {
    config::Container {
        namespace: &flags.namespace,
        id: &flags.id,
        annotations: &bundle.config.annotations,
        cgroups_path: bundle.config.linux.cgroups_path.as_deref(),
    }
}

/// The engine that the server serves.
fn engine(flags: &args::Flags, publisher: Arc<events::Publisher>) -> server::Parts {
    let reaper = Reaper::new();
    tokio::spawn({
        let reaper = reaper.clone();
        async move {
            if let Err(e) = reaper.run().await {
                ::log::error!("orphans are not reaped: {e}");
            }
        }
    });
    let engine = Engine::new(
        &flags.namespace,
        &config::config_file(),
        publisher,
        backend::all(&reaper),
        reaper,
    );
    server::Parts {
        services: service::services(&engine),
        busy: Box::new({
            let engine = engine.clone();
            move || !engine.is_idle()
        }),
        end_if_empty: Box::new({
            let engine = engine.clone();
            move || engine.end_if_empty()
        }),
        done: Box::pin(async move { engine.done().await }),
    }
}

/// File in a bundle that holds the address of its shim: containerd 1.6 reads it after a restart, `delete` always.
const ADDRESS_FILE: &str = "address";

fn address_file(bundle: &Path) -> std::path::PathBuf {
    bundle.join(ADDRESS_FILE)
}
