//! What a dead shim left: ending and removing it, from a process of its own.

use std::{path::Path, time::Duration};

use super::{Backends, CGROUP_BOUND, record::Record, remove_cgroup};
use crate::{
    backend::{Exit, check_id},
    error::{Error, Result},
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
/// # Errors
/// Everything that could not be undone, joined; the record stays then, so that it can be called again.
pub async fn cleanup(bundle: &Path, namespace: &str, id: &str, backends: &Backends) -> Result<Cleaned> {
    check_id("task id", id)?;
    let unknown = Exit::now(137);
    let mut record = match Record::load(bundle) {
        Ok(Some(record)) if record.id == id && record.namespace == namespace => record,
        Ok(Some(other)) => {
            return Err(Error::precondition(format!(
                "the record in {} is of container {}/{}, not of {namespace}/{id}; nothing was touched",
                bundle.display(),
                other.namespace,
                other.id
            )));
        }
        Ok(None) => return Ok(Cleaned { pid: 0, exit: unknown }),
        Err(e) => {
            // A broken record must not keep the rootfs mounted for ever.
            rootfs::release(&bundle.join("rootfs")).await?;
            return Err(e.context(format!(
                "only the rootfs of container {id} was unmounted; end the rest by \"crun delete --force\", see docs/operations.md"
            )));
        }
    };
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
    if let Some(error) = Error::all(errors) {
        return Err(error.context(format!("cannot clean up container {id}")));
    }
    record.remove()?;
    Ok(Cleaned {
        pid: record.init.map(|init| init.pid).unwrap_or_default(),
        exit: record.exit.unwrap_or(unknown),
    })
}
