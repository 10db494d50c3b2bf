//! Delete: what ends and removes a container, from whatever step on.

use super::{
    KILL_TIMEOUT, Layout, Lxc, blocking, blueprint, bound_of,
    folder::{Folder, Owner},
    layout,
};
use crate::{
    error::{Error, Kind, Result},
    host::{
        cgroup::Cgroup,
        command::{Pidfd, end, is_alive},
        systemd,
    },
    task::record::Record,
};

impl Lxc {
    /// Ends and removes a container of ours.
    pub(super) async fn undo(&self, rec: &Record, folder: &Folder, poststop: Poststop) -> Result<()> {
        let live = self.live().remove(&rec.id);
        if let Some(live) = &live {
            live.monitor.release.notify_one();
        }
        let mark = match folder.owner(&rec.namespace, &rec.bundle)? {
            Owner::Us(mark) => Some(mark),
            Owner::Nobody => None,
            Owner::Another(whose) => {
                log::warn!("{} is {whose}; it is left alone", folder.path().display());
                None
            }
        };
        let known = mark.is_some() || live.is_some();
        if !known && rec.init.is_none() {
            return folder.remove_attempt();
        }
        let mut errors = Vec::new();
        let layout = layout(rec)?;
        // First, because it thaws: signals alone do not end what is frozen.
        let cgroup = match &rec.cgroup {
            Some(cgroup) => Some(cgroup.clone()),
            None => Cgroup::expected(Some(&layout.container), false, &rec.id)?,
        };
        if let Some(cgroup) = cgroup {
            errors.extend(cgroup.kill_all(KILL_TIMEOUT).await.err());
        }
        if let Some(init) = &rec.init {
            errors.extend(end(init, KILL_TIMEOUT).await.err());
        }
        if let Some(monitor) = mark.as_ref().and_then(|mark| mark.monitor).filter(is_alive) {
            // It removes the cgroups and ends, unless it hangs, or has not come to init yet.
            if rec.init.is_some() {
                let ended = async {
                    if let Ok(process) = Pidfd::open(monitor.pid)
                        && is_alive(&monitor)
                    {
                        process.wait_exited().await?;
                    }
                    Ok(())
                };
                match tokio::time::timeout(KILL_TIMEOUT / 3, ended).await {
                    Ok(ended) => errors.extend(Result::err(ended)),
                    Err(_) => log::warn!("the monitor of {} does not end; it is killed", rec.id),
                }
            }
            errors.extend(end(&monitor, KILL_TIMEOUT).await.err());
        }
        if rec.options.systemd_cgroup {
            errors.extend(leave_scope(rec, &layout).await.err());
        }
        for path in [&layout.container, &layout.monitor, &layout.pivot] {
            match Cgroup::expected(Some(path), false, &rec.id) {
                Ok(Some(cgroup)) => errors.extend(cgroup.remove(KILL_TIMEOUT).await.err()),
                Ok(None) => {}
                Err(e) => errors.push(e),
            }
        }
        // Not for who asks again when all is done.
        if known && rec.init.is_some() && poststop == Poststop::Run {
            self.poststop(rec).await;
        }
        if errors.is_empty() {
            let removed = match mark {
                Some(_) => folder.remove(&rec.id),
                None if !folder.path().exists() => folder.remove_lock(&rec.id).and_then(|()| folder.remove_attempt()),
                None => folder.remove_attempt(),
            };
            errors.extend(removed.err());
        }
        Error::all(errors).map_or(Ok(()), Err)
    }

    async fn poststop(&self, rec: &Record) {
        let (bundle, id) = (rec.bundle.clone(), rec.id.clone());
        let read = blocking(move || blueprint::poststop(&bundle, &id)).await;
        let (hooks, facts) = match read {
            Ok(read) => read,
            Err(e) => return log::warn!("no poststop hooks of {}: {e}", rec.id),
        };
        // The bound of the whole delete comes first, and is an error: who asks again runs them again.
        let bound = bound_of(rec) * 2;
        self.run_hooks_anyway(&hooks, &facts.state("stopped", None), rec, bound)
            .await;
    }
}

/// Whether the hooks of the end run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Poststop {
    Run,
    Skip,
}

/// Removes what [`enter_scope`] has made, in which nothing runs any more.
async fn leave_scope(rec: &Record, layout: &Layout) -> Result<()> {
    let (unit, _) = systemd::scope_of(rec.cgroups_path.as_deref(), &rec.id)?;
    let folder = layout.container.clone();
    match blocking(move || systemd::remove_scope(&unit, &folder, KILL_TIMEOUT)).await {
        // Without a bus there is no way to make one, and of one that is there systemd notices the end by itself.
        Err(e) if e.kind() == Kind::Unavailable => {
            log::warn!("container {}: {e}", rec.id);
            Ok(())
        }
        removed => removed,
    }
}
