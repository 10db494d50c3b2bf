//! What a dead shim left: ending and removing it, from a process of its own.

use std::{fs::File, io, path::Path, time::Duration};

use nix::fcntl::{Flock, FlockArg};
use tokio::task::{JoinSet, spawn_blocking};

use super::{Backends, CGROUP_BOUND, record::Record, remove_cgroup};
use crate::{
    backend::{Exit, check_id},
    error::{Context, Error, Result},
    host::command,
    rootfs,
};

/// Bound of each call of the runtime program in [`cleanup`], which has 5 s in all: what the program does not do in time is done by
/// hand.
const CLEANUP_CALL_BOUND: Duration = Duration::from_secs(2);

/// What [`cleanup`] found out about a container whose shim is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleaned {
    /// Init's pid, 0 if it never had one.
    pub pid: u32,
    /// The exit that the dead shim had recorded, or 137 now.
    pub exit: Exit,
}

/// Ends and removes whatever a dead shim left of a container: `shim delete`. Needs nothing but the bundle; idempotent.
///
/// For a pod's sandbox, what the dead shim left of the pod's other containers goes too: containerd 2 does not ask for them. Whoever
/// asks for one of them later hears its true exit all the same.
///
/// # Errors
/// Everything that could not be undone, joined; the records stay then, so that it can be called again.
pub async fn cleanup(bundle: &Path, namespace: &str, id: &str, backends: &Backends) -> Result<Cleaned> {
    check_id("task id", id)?;
    // At once, so that a container that resists takes no time from the others.
    let (own, pod) = tokio::join!(
        own(bundle, namespace, id, backends),
        rest_of_pod(bundle, namespace, backends)
    );
    let record = match (own, pod) {
        (Ok(record), Ok(())) => record,
        (Err(e), Ok(())) | (Ok(_), Err(e)) => return Err(e),
        (Err(own), Err(pod)) => return Err(own.then(pod)),
    };
    let unknown = Exit::now(137);
    let Some(record) = record else {
        return Ok(Cleaned { pid: 0, exit: unknown });
    };
    // Last: whoever asks again after a failure shall hear the true exit.
    record.remove()?;
    Ok(Cleaned {
        pid: record.init.map(|init| init.pid).unwrap_or_default(),
        exit: record.exit.unwrap_or(unknown),
    })
}

/// Undoes the container that was asked for; `None` when there is no record of it.
async fn own(bundle: &Path, namespace: &str, id: &str, backends: &Backends) -> Result<Option<Record>> {
    let _alone = alone(bundle).await?;
    let record = match Record::load(bundle) {
        Ok(Some(record)) if record.id == id && record.namespace == namespace => record,
        Ok(Some(other)) => {
            return Err(Error::precondition(format!(
                "the record in {} is of container {}/{}, not of {namespace}/{id}; nothing was touched",
                bundle.display(),
                other.namespace,
                other.id
            )));
        }
        Ok(None) => return Ok(None),
        Err(e) => {
            // A broken record must not keep the rootfs mounted for ever.
            rootfs::release(&bundle.join("rootfs")).await?;
            return Err(e.context(format!(
                "only the rootfs of container {id} was unmounted; end the rest by \"crun delete --force\", see docs/operations.md"
            )));
        }
    };
    undo(&record, backends).await?;
    Ok(Some(record))
}

/// Undoes the containers that have the second name of their record in `bundle` and whose shim is dead: a later shim of the pod may
/// have containers of its own.
async fn rest_of_pod(bundle: &Path, namespace: &str, backends: &Backends) -> Result<()> {
    let mut errors = Vec::new();
    let mut undoing = JoinSet::new();
    for record in Record::of_pod(bundle)? {
        match record {
            Ok(record) if record.namespace != namespace => log::warn!(
                "{} holds a record of container {}/{}; it is left alone",
                bundle.display(),
                record.namespace,
                record.id
            ),
            Ok(record) if record.shim.as_ref().is_none_or(command::is_alive) => {}
            Ok(record) => {
                let backends = backends.clone();
                undoing.spawn(async move {
                    let _alone = alone(&record.bundle).await?;
                    undo(&record, &backends).await?;
                    record.remove_second_name()
                });
            }
            Err(e) => errors.push(e),
        }
    }
    while let Some(undone) = undoing.join_next().await {
        match undone {
            Ok(undone) => errors.extend(undone.err()),
            Err(e) => errors.push(Error::unknown("cannot clean up a container of the pod").with_source(e)),
        }
    }
    Error::all(errors).map_or(Ok(()), Err)
}

/// Keeps every other process from cleaning up the container of this bundle, as long as the value lives. `None` for a bundle that is
/// gone: nobody can be asked for its container.
async fn alone(bundle: &Path) -> Result<Option<Flock<File>>> {
    let what = format!("cannot lock bundle {}", bundle.display());
    let folder = match File::open(bundle) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        folder => folder.context(|| &what)?,
    };
    // The caller's bound ends the wait, and the process.
    let locked = spawn_blocking(move || Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| e));
    locked
        .await
        .map_err(|e| Error::unknown(&what).with_source(e))?
        .map(Some)
        .context(|| &what)
}

/// Ends and removes the container, and goes on past errors.
async fn undo(record: &Record, backends: &Backends) -> Result<()> {
    let mut record = record.clone();
    let call_bound = u64::try_from(CLEANUP_CALL_BOUND.as_millis()).unwrap_or(u64::MAX);
    record.options.runtime_timeout_ms = record.options.runtime_timeout_ms.min(call_bound);
    let mut errors = Vec::new();
    if let Some(shim) = &record.shim {
        // Hooks of a runtime program that died with the shim.
        let left = command::left_of_session(shim, &record.options.shim_cgroup);
        for process in left.unwrap_or_else(|e| {
            errors.push(e);
            Vec::new()
        }) {
            errors.extend(command::end(&process, CGROUP_BOUND).await.err());
        }
    }
    match backends(&record.options) {
        Ok(backend) => {
            let deleted = match backend.delete(&record).await {
                Err(e) => backend.erase(&record, e).await,
                deleted => deleted,
            };
            errors.extend(deleted.err());
        }
        Err(e) => errors.push(e),
    }
    if let Some(init) = &record.init {
        errors.extend(command::end(init, CGROUP_BOUND).await.err());
    }
    errors.extend(remove_cgroup(&record).await.err());
    if let Some(rootfs) = &record.rootfs {
        errors.extend(rootfs::release(rootfs).await.err());
    }
    Error::all(errors).map_or(Ok(()), |e| {
        Err(e.context(format!("cannot clean up container {}", record.id)))
    })
}
