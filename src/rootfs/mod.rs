//! What the container stands on: the mounts of its rootfs.
//!
//! ```text
//! prepare ──▶ options   words of a snapshotter → flags, data, owners (pure)
//!    │  └───▶ helper    types "fuse.*" and "fuse3.*", by a program
//!    ▼
//!  mount ───▶ overlay · loopdev · idmap ──▶ sys   one mount, made detached, then attached
//! release ──▶ mountinfo  what is mounted at and below a rootfs (pure)
//! ```
//!
//! A mount or unmount may hang for ever (network storage), so each runs on a short-lived thread of its own. A call that is given up
//! leaves its thread behind only as long as the kernel keeps it; then the thread undoes what it did.
//!
//! Nothing here needs a record to be undone from a fresh process: everything that outlives a thread is a mount at or below the rootfs,
//! which [`release`] finds in mountinfo. Loop devices go with their mount (autoclear); layers with mapped owners are mounted in a mount
//! namespace of the thread alone.
//!
//! Needs Linux 5.12; mapped owners of overlay layers need 5.19.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

use crate::{
    error::{Context, Error, Result},
    host::command::Reaper,
};

mod helper;
pub(crate) mod idmap;
mod loopdev;
pub(crate) mod mount;
pub mod mountinfo;
pub mod options;
mod overlay;
mod release;
pub(crate) mod sys;
#[cfg(test)]
mod tests;

use options::Options;
use overlay::OverlayApi;

/// Bound of [`prepare`] as a whole.
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);

/// Bound of [`release`] as a whole; containerd gives `shim delete` 5 s.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(4);

/// Of a mount's options and source this much is shown in an error, bytes: a hundred layers are longer than a message may be.
const SHOWN_BYTES_MAX: usize = 1024;

/// Stack of a mounting thread: system calls and small buffers.
const STACK_BYTES: usize = 256 << 10;

/// A mount as containerd's snapshotters hand it out (containerd api/types/mount.proto).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system type: "overlay", "bind", "zfs", …
    pub kind: String,
    /// Device, dataset or folder.
    pub source: String,
    /// Path below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// Options in the form of fstab(5).
    pub options: Vec<String>,
}

/// Mounts all of `mounts` in order, each at its target inside `rootfs`.
///
/// `rootfs` is made if it is missing; nothing is done without mounts. A target is looked up as if `rootfs` were `/`, so no symlink of an
/// image leads out; it must exist. Types "fuse.*" and "fuse3.*" are mounted by the program `mount.fuse` or `mount.fuse3`, spawned by
/// `reaper`, as containerd does it. MUST run on a tokio runtime with I/O and time enabled.
///
/// All or nothing: when one mount fails, the bound [`PREPARE_TIMEOUT`] passes, or the future is dropped, everything that was mounted is
/// undone, if need be later, when the kernel lets go of the thread that mounts.
///
/// # Errors
/// `InvalidArgument` for a rootfs that is no absolute path of a folder, and for options that are wrong in themselves or refused as such;
/// `Unimplemented` for a file system that the kernel does not know; `NotFound` for a missing source, target or helper program;
/// `DeadlineExceeded` at the bound; else the kernel's. The text names type, source, place and options; values of options that look
/// like secrets are not shown.
pub async fn prepare(reaper: &Reaper, mounts: &[Mount], rootfs: &Path) -> Result<()> {
    prepare_by(reaper, mounts, rootfs, OverlayApi::of_this_kernel()).await
}

async fn prepare_by(reaper: &Reaper, mounts: &[Mount], rootfs: &Path, api: OverlayApi) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    mount::check_rootfs(rootfs)?;
    let parse = |mount: &Mount| Options::parse(&mount.options).context(|| what(mount, rootfs));
    let options = mounts.iter().map(parse).collect::<Result<Vec<_>>>()?;
    let all = async {
        let mut undo = Undo::default();
        for (mount, options) in mounts.iter().zip(options) {
            // Who mounts holds what was mounted before. Undone by somebody else meanwhile, the new mount could come to lie on one that
            // is just being unmounted, be unmounted in its stead, and leave it behind.
            let made = match helper::program(&mount.kind) {
                Some(program) => helper::attach(reaper, program, mount, rootfs, undo).await,
                None => attach(mount.clone(), options, rootfs.to_path_buf(), api, undo).await,
            };
            undo = made.map_err(|e| without_secrets(e, mount).context(what(mount, rootfs)))?;
        }
        Ok(undo)
    };
    match tokio::time::timeout(PREPARE_TIMEOUT, all).await {
        Ok(made) => made.map(Undo::keep),
        Err(_) => Err(Error::deadline(format!(
            "mounting rootfs {} took more than {} s; it is undone once the kernel gives up",
            rootfs.display(),
            PREPARE_TIMEOUT.as_secs()
        ))),
    }
}

/// Unmounts everything at and below `rootfs`, stacked and nested mounts too. Deletes nothing. Idempotent; nothing there is success.
///
/// Follows no symlink below the parent folder of `rootfs`, and touches no mount elsewhere. What stays busy after a short while is
/// unmounted lazily, with a warning in the log. Needs no record. MUST run on a tokio runtime with time enabled.
///
/// # Errors
/// `InvalidArgument` for a path that is not absolute or is `/`; `DeadlineExceeded` after [`RELEASE_TIMEOUT`], the rest of the work goes on
/// in the background then; else the kernel's, all of them, after everything was tried.
pub async fn release(rootfs: &Path) -> Result<()> {
    mount::check_rootfs(rootfs)?;
    let path = rootfs.to_path_buf();
    let work = on_a_thread(move || release::all(&path));
    match tokio::time::timeout(RELEASE_TIMEOUT, work).await {
        Ok(result) => result?,
        Err(_) => Err(Error::deadline(format!(
            "unmounting rootfs {} takes more than {} s; the kernel goes on with it",
            rootfs.display(),
            RELEASE_TIMEOUT.as_secs()
        ))),
    }
}

/// Makes one mount on a thread of its own. Answers `before` and what it has made, or undoes both.
async fn attach(mount: Mount, options: Options, rootfs: PathBuf, api: OverlayApi, mut before: Undo) -> Result<Undo> {
    on_a_thread(move || {
        let made = make_folder(&rootfs).and_then(|mut made| match mount::attach(&mount, &options, &rootfs, api) {
            Ok(mounts) => {
                made.mounts.extend(mounts);
                Ok(made)
            }
            Err(e) => {
                made.undo();
                Err(e)
            }
        });
        match made {
            Ok(made) => {
                before.add(made);
                Ok(before)
            }
            Err(e) => {
                before.undo();
                Err(e)
            }
        }
    })
    .await?
}

/// Makes the rootfs where it is missing.
fn make_folder(rootfs: &Path) -> Result<Undo> {
    let folder = match std::fs::create_dir(rootfs) {
        Ok(()) => Some(rootfs.to_path_buf()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => None,
        Err(e) => return Err(e).context(|| format!("cannot make rootfs {}", rootfs.display())),
    };
    Ok(Undo {
        folder,
        mounts: Vec::new(),
    })
}

/// Runs `work` on a new thread. When the future is dropped, `work` still runs to its end, and its result is dropped.
async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name("mount".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // A result that nobody takes is dropped, and undoes itself.
            let _ = done.send(work());
        })
        .context(|| "cannot start a thread for a mount")?;
    result
        .await
        .map_err(|_| Error::unknown("the thread of a mount panicked"))
}

/// What was made so far. Undone when dropped, in the background, unless [`Undo::keep`] was called.
#[derive(Debug, Default)]
struct Undo {
    /// The rootfs, if it was made.
    folder: Option<PathBuf>,
    /// The mounts, oldest first.
    mounts: Vec<OwnedFd>,
}

impl Undo {
    fn add(&mut self, mut newer: Undo) {
        self.folder = self.folder.take().or(newer.folder.take());
        self.mounts.append(&mut newer.mounts);
    }

    fn keep(mut self) {
        self.folder = None;
        self.mounts.clear();
    }

    /// Undoes and waits for it. Goes on in the background when the future is dropped.
    async fn now(mut self) {
        let work = std::mem::take(&mut self);
        if let Err(e) = on_a_thread(move || work.undo()).await {
            log::warn!("cannot wait for the undoing of mounts: {e}");
        }
    }

    /// Goes past errors: each mount is tried. Blocks.
    fn undo(mut self) {
        while let Some(mount) = self.mounts.pop() {
            if let Err(e) = mount::detach(&mount) {
                log::warn!("cannot undo a mount: {e}");
            }
        }
        if let Some(folder) = self.folder.take()
            && let Err(e) = std::fs::remove_dir(&folder)
        {
            log::warn!("cannot remove {}: {e}", folder.display());
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.mounts.is_empty() && self.folder.is_none() {
            return;
        }
        let work = std::mem::take(self);
        // Not here: an unmount may block, and this may be the thread of the runtime.
        let spawned = thread::Builder::new()
            .name("unmount".into())
            .stack_size(STACK_BYTES)
            .spawn(move || work.undo());
        if let Err(e) = spawned {
            log::warn!("cannot start a thread to undo mounts: {e}; they stay until the rootfs is released");
        }
    }
}

/// The sentence "what failed, on which object" of a mount.
fn what(mount: &Mount, rootfs: &Path) -> String {
    let place = match mount.target.trim_start_matches('/') {
        "" => rootfs.display().to_string(),
        below => rootfs.join(below).display().to_string(),
    };
    let options: Vec<_> = mount.options.iter().map(|word| shown(word)).collect();
    format!(
        "cannot mount {} {:?} at {place} with options {:?}",
        if mount.kind.is_empty() {
            "a file system without type"
        } else {
            &mount.kind
        },
        shortened(&without_password(&mount.source)),
        shortened(&options.join(","))
    )
}

/// An option without its secrets. A word may hold several options.
fn shown(word: &str) -> String {
    let part = |part: &str| match part.split_once('=') {
        Some((key, _)) if options::is_secret(key) => format!("{key}=…"),
        _ => part.to_owned(),
    };
    // A comma inside a secret would show the rest of it: from a secret on, nothing more of the word is shown.
    let mut parts = Vec::new();
    for text in word.split(',') {
        let shown = part(text);
        let secret = shown != text;
        parts.push(shown);
        if secret {
            break;
        }
    }
    parts.join(",")
}

/// A source such as `ftp://user:secret@host/` without the password.
fn without_password(source: &str) -> String {
    let Some((scheme, rest)) = source.split_once("//") else {
        return source.to_owned();
    };
    let Some((user, host)) = rest.split_once('@') else {
        return source.to_owned();
    };
    match user.split_once(':') {
        Some((user, _)) => format!("{scheme}//{user}:…@{host}"),
        None => source.to_owned(),
    }
}

fn shortened(text: &str) -> String {
    match text
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|&end| end <= SHOWN_BYTES_MAX)
        .last()
    {
        Some(end) if end < text.len() => format!("{}… ({} bytes more)", &text[..end], text.len() - end),
        _ => text.to_owned(),
    }
}

/// A file system or a helper program may repeat what it was told.
fn without_secrets(error: Error, mount: &Mount) -> Error {
    let mut secrets = Vec::new();
    for word in &mount.options {
        let mut rest = Some(word.as_str());
        while let Some(text) = rest {
            if let Some((key, value)) = text.split_once('=')
                && options::is_secret(key.split(',').next_back().unwrap_or(key))
                && !value.is_empty()
            {
                // With all that follows, should a comma belong to it, and up to the comma.
                secrets.extend([value, value.split(',').next().unwrap_or(value)]);
            }
            rest = text.split_once(',').map(|(_, rest)| rest);
        }
    }
    secrets.retain(|secret| !secret.is_empty());
    if secrets.is_empty() {
        return error;
    }
    let text = secrets
        .iter()
        .fold(error.to_string(), |text, secret| text.replace(*secret, "…"));
    Error::new(error.kind(), text)
}
