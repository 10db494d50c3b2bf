//! Types "fuse.*" and "fuse3.*": mounted by a program, as containerd does it
//! (`mount.fuse3 SOURCE TARGET -o OPTION… -t SUBTYPE`).

use std::{path::Path, time::Duration};

use tokio::sync::oneshot;

use super::{
    Mount, Undo,
    mount::{self, Target},
    on_a_thread,
};
use crate::{
    error::{Error, Result},
    host::command::{Command, Output, Reaper},
};

/// Bound of a helper program; it is killed then.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);

/// Of what a failed helper says this much is repeated, bytes.
const SAID_BYTES_MAX: usize = 512;

/// The program for a type of file system, and the subtype that it is told; `None` for a type that the kernel mounts.
pub(super) fn program(kind: &str) -> Option<(&'static str, &str)> {
    let fuse = kind.strip_prefix("fuse.").map(|subtype| ("mount.fuse", subtype));
    fuse.or_else(|| kind.strip_prefix("fuse3.").map(|subtype| ("mount.fuse3", subtype)))
}

/// Mounts by a helper program. Answers `before` and what it has made, or undoes both.
///
/// The work goes on when the future is dropped: a program that is killed in the middle of a mount leaves nobody who knows whether there
/// is one. What it made is undone then.
pub(super) async fn attach(
    reaper: &Reaper,
    (program, subtype): (&'static str, &str),
    mount: &Mount,
    rootfs: &Path,
    mut before: Undo,
) -> Result<Undo> {
    let (reaper, subtype, mount, rootfs) = (reaper.clone(), subtype.to_owned(), mount.clone(), rootfs.to_path_buf());
    let (done, result) = oneshot::channel();
    tokio::spawn(async move {
        let made = match run(&reaper, program, &subtype, mount, &rootfs).await {
            Ok(made) => {
                before.add(made);
                Ok(before)
            }
            Err(e) => {
                before.now().await;
                Err(e)
            }
        };
        let _ = done.send(made);
    });
    result
        .await
        .map_err(|_| Error::aborted(format!("{program} was given up: the runtime ends")))?
}

async fn run(reaper: &Reaper, program: &str, subtype: &str, mount: Mount, rootfs: &Path) -> Result<Undo> {
    let mut undo = Undo::default();
    let (folder, below) = (rootfs.to_path_buf(), mount.target.clone());
    let before = on_a_thread(move || {
        let made = super::make_folder(&folder)?;
        let target = Target::open(&folder, &below)?;
        Ok::<_, Error>((made, target.path()?, mount::mount_id(target.fd())?))
    });
    let (made, path, id) = before.await??;
    undo.add(made);

    let mut command = Command::new(program).arg(&mount.source).arg(path);
    for word in &mount.options {
        command = command.arg("-o").arg(word);
    }
    let output = reaper.output(command.arg("-t").arg(subtype), HELPER_TIMEOUT).await;

    // Whatever the program says of itself, what it has mounted has to be known.
    let (folder, below) = (rootfs.to_path_buf(), mount.target);
    let after = on_a_thread(move || {
        let target = Target::open(&folder, &below)?;
        let mut undo = Undo::default();
        if mount::mount_id(target.fd())? != id {
            undo.mounts.push(target.into_fd());
        }
        Ok::<_, Error>(undo)
    });
    let mounted = after.await??;
    let nothing = mounted.mounts.is_empty();
    undo.add(mounted);
    let result = succeeded(program, output).and_then(|()| match nothing {
        true => Err(Error::unknown(format!(
            "{program} reports success, but nothing is mounted"
        ))),
        false => Ok(()),
    });
    match result {
        Ok(()) => Ok(undo),
        Err(e) => {
            undo.now().await;
            Err(e)
        }
    }
}

fn succeeded(program: &str, output: Result<Output>) -> Result<()> {
    let output = output?;
    if output.exit.status == 0 {
        return Ok(());
    }
    let says = String::from_utf8_lossy(&output.stderr);
    let says: String = says.trim().chars().take(SAID_BYTES_MAX).collect();
    Err(Error::unknown(format!(
        "{program} ended with status {}: {says}",
        output.exit.status
    )))
}
