//! `delete`: cleans up after a shim that died, in a process of its own.

use std::{
    env, fs,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField},
};

use super::{
    address_file,
    args::Flags,
    events::timestamp,
    socket::{DEFAULT_DIR, Place},
};
use crate::{
    backend::{self, check_id},
    error::{Context, Error, Result},
    host::command::Reaper,
    task::{self, bundle::Bundle},
};

/// containerd gives 5 s and kills then; what it would kill could not say what is left.
const BOUND: Duration = Duration::from_millis(4_500);

/// Made as they are needed. Each container of a pod may wait for another process in one, and none may keep the others from their work.
const BLOCKING_THREADS: usize = 128;

/// What is worth a warning goes to stderr, which containerd puts into its log.
struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            // Nobody is left who could be told that this failed.
            let _ = io::stderr().write_all(format!("{}\n", record.args()).as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Does it, for the bundle that `-bundle` names or the working directory. Returns what is to be printed. Idempotent.
///
/// # Errors
/// Those of [`task::cleanup`], and `DeadlineExceeded` after 4.5 s; containerd calls again when it is started the next time.
pub fn delete(flags: &Flags) -> Result<Vec<u8>> {
    check_id("namespace", &flags.namespace)?;
    check_id("id", &flags.id)?;
    if log::set_logger(&StderrLog).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    let bundle = match &flags.bundle {
        Some(path) => path.clone(),
        None => env::current_dir().context(|| "cannot see the working directory")?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context(|| "cannot start the runtime")?;
    let cleaned = runtime.block_on(async {
        let backends = backend::all(&Reaper::new());
        tokio::time::timeout(BOUND, task::cleanup(&bundle, &flags.namespace, &flags.id, &backends))
            .await
            .unwrap_or_else(|_| {
                Err(Error::deadline(format!(
                    "cleaning up {} took more than {BOUND:?}; what is left is named in {}",
                    flags.id,
                    bundle.join(task::record::RECORD_FILE).display()
                )))
            })
    });
    runtime.shutdown_background();
    let socket = remove_socket(flags, &bundle);
    let cleaned = cleaned?;
    if let Err(e) = socket {
        // The container is gone; a file too many is worth a warning only.
        log::warn!("{e}");
    }
    DeleteResponse {
        pid: cleaned.pid,
        exit_status: cleaned.exit.status,
        exited_at: MessageField::some(timestamp(cleaned.exit.at)),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(|e| Error::unknown("cannot encode the answer").with_source(e))
}

/// Removes the socket of the container's group unless somebody listens on it.
fn remove_socket(flags: &Flags, path: &Path) -> Result<()> {
    let bundle = Bundle::read(path).ok();
    let group = bundle
        .as_ref()
        .map_or(flags.id.as_str(), |bundle| bundle.group(&flags.id));
    let usual = Place::new(Path::new(DEFAULT_DIR), &flags.address, &flags.namespace, group)?;
    // containerd may have named another folder, to `start` only; its answer is in the bundle.
    let written = fs::read_to_string(address_file(path)).ok();
    let place = written.and_then(|address| usual.relocated(&address)).unwrap_or(usual);
    place.remove_if_dead().map(drop)
}
