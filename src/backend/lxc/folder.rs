//! `<lxcpath>/<name>`: the folder by which LXC and its tools know a container, and by which we know that it is ours.
//!
//! It gets its name when it is complete, so that of two who want the name one fails, and nothing of a killed attempt is mistaken for a
//! container. [`MARK`] in it says whose it is. A folder without it, or with another's, is never changed and never removed.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use super::config::Item;
use crate::{
    error::{Context, Error, Result},
    host::command::is_alive,
    rootfs::mountinfo,
    task::record::{Identity, Record},
};

/// The file that makes a folder ours.
const MARK: &str = "proxmox-lxcri.json";

/// Upper bound of it.
const MARK_MAX_BYTES: u64 = 64 << 10;

/// LXC's runtime folder, for its locks.
const LOCKS: &str = "/run/lxc/lock";

/// Whose folder it is, and what a fresh process has to know to undo the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// The container's, so that a copy of the folder is nobody's of ours.
    name: String,
    /// The bundle.
    pub(super) bundle: PathBuf,
    /// containerd's namespace.
    pub(super) namespace: String,
    /// The boot in which it was made; after another one nothing of it runs.
    pub(super) boot: String,
    /// The monitor, once it runs.
    #[serde(default)]
    pub(super) monitor: Option<Identity>,
}

/// The folder of one container.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    lxc_path: PathBuf,
    path: PathBuf,
    /// Where it is made.
    partial: PathBuf,
}

/// Whose a folder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is none.
    Nobody,
    /// This container's.
    Us(Mark),
    /// Somebody else's: who, for a person.
    Another(String),
}

impl Folder {
    /// The folder for a container, which need not exist.
    pub(super) fn of(rec: &Record, name: &str) -> Self {
        let lxc_path = rec.options.lxc_path.clone();
        Self {
            path: lxc_path.join(name),
            partial: lxc_path.join(partial(&rec.namespace, name)),
            lxc_path,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder with the container's configuration.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken, by whom, and then nothing was touched; the operating system's.
    pub(super) fn claim(&self, rec: &Record, items: &[Item]) -> Result<Mark> {
        let mark = Mark {
            name: self.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bundle: rec.bundle.clone(),
            namespace: rec.namespace.clone(),
            boot: boot()?,
            monitor: None,
        };
        let what = || format!("cannot make {}", self.path.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.lxc_path)
            .context(|| format!("cannot make the folder of LXC's containers {}", self.lxc_path.display()))?;
        self.remove_partial()?;
        DirBuilder::new().mode(0o700).create(&self.partial).context(what)?;
        let mut text = format!(
            "# Container {} of containerd's namespace {}, made by containerd-shim-proxmox-lxcri-v1.\n\
             # It lives and ends with its task: do not start it by hand, and change nothing here.\n\
             # What else it is made of: {}\n",
            rec.id,
            rec.namespace,
            rec.bundle.join("config.json").display()
        );
        for (key, value) in items {
            text.push_str(&format!("{key} = {value}\n"));
        }
        let made = fs::write(self.partial.join("config"), text)
            .context(what)
            .and_then(|()| self.write(&self.partial, &mark))
            .and_then(|()| {
                let name = renameat2(
                    AT_FDCWD,
                    &self.partial,
                    AT_FDCWD,
                    &self.path,
                    RenameFlags::RENAME_NOREPLACE,
                );
                match name {
                    Err(nix::errno::Errno::EEXIST | nix::errno::Errno::ENOTEMPTY) => Err(self.taken("somebody else's")),
                    name => name.context(what),
                }
            });
        if made.is_err() {
            let _ = self.remove_partial();
        }
        made.map(|()| mark)
    }

    /// The error for a name that somebody else has.
    pub(super) fn taken(&self, whose: &str) -> Error {
        Error::already_exists(format!(
            "{} exists and is {whose}; nothing of it was touched. Choose another id, or another lxc_path",
            self.path.display()
        ))
    }

    /// Whose folder it is. `namespace` and `bundle` are this container's.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn owner(&self, namespace: &str, bundle: &Path) -> Result<Owner> {
        match fs::symlink_metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Owner::Nobody),
            metadata => metadata.context(|| format!("cannot look at {}", self.path.display()))?,
        };
        let mark = match read(&self.path)? {
            Found::Nothing => return Ok(Owner::Another("no container of this runtime".into())),
            Found::Mark(mark) if self.path.file_name() == Some(OsStr::new(&mark.name)) => mark,
            Found::Strange | Found::Mark(_) => {
                return Ok(Owner::Another(format!("marked by a {MARK} that cannot be understood")));
            }
        };
        if mark.namespace == namespace && mark.bundle == bundle {
            return Ok(Owner::Us(mark));
        }
        Ok(Owner::Another(format!(
            "the container of bundle {} in containerd's namespace {}",
            mark.bundle.display(),
            mark.namespace
        )))
    }

    /// Notes down the monitor.
    ///
    /// # Errors
    /// The operating system's; the former mark is there then.
    pub(super) fn mark(&self, mark: &Mark) -> Result<()> {
        self.write(&self.path, mark)
    }

    fn write(&self, folder: &Path, mark: &Mark) -> Result<()> {
        let partial = folder.join(format!(".{MARK}.new"));
        let text = serde_json::to_vec(mark).map_err(|e| Error::unknown("cannot encode a mark").with_source(e))?;
        fs::write(&partial, text)
            .and_then(|()| fs::rename(&partial, folder.join(MARK)))
            .context(|| format!("cannot write {}", folder.join(MARK).display()))
    }

    /// Removes the folder, which MUST be ours, and what LXC keeps for the name elsewhere. Absence is success.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        nothing_is_mounted(&self.path)?;
        self.remove_lock(name)?;
        // By its other name it is nobody's container any more, whatever happens now.
        self.remove_partial()?;
        gone_is_fine(fs::rename(&self.path, &self.partial))
            .context(|| format!("cannot remove {}", self.path.display()))?;
        self.remove_partial()
    }

    /// Removes LXC's lock of the name. Absence is success.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn remove_lock(&self, name: &str) -> Result<()> {
        let below = self.lxc_path.strip_prefix("/").unwrap_or(&self.lxc_path);
        let lock = Path::new(LOCKS).join(below).join(format!(".{name}"));
        gone_is_fine(fs::remove_file(&lock)).context(|| format!("cannot remove {}", lock.display()))
    }

    fn remove_partial(&self) -> Result<()> {
        remove_all(&self.partial)
    }

    /// Removes what an attempt has left that was killed before the folder got its name.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn remove_attempt(&self) -> Result<()> {
        self.remove_partial()
    }
}

/// This boot of the machine.
fn boot() -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    fs::read_to_string(FILE)
        .map(|text| text.trim().to_owned())
        .context(|| format!("cannot read {FILE}"))
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Where a container's folder is made. LXC's tools pass over names that begin with a dot; no id and no namespace has a colon.
fn partial(namespace: &str, name: &str) -> String {
    format!(".proxmox-lxcri.{namespace}:{name}")
}

/// What a folder has by way of a mark.
enum Found {
    Nothing,
    /// Root has not written it, or it is of another form.
    Strange,
    Mark(Mark),
}

/// Reads the mark of a folder, which may be anybody's: nothing in it is followed, waited for, or read without a bound.
fn read(folder: &Path) -> Result<Found> {
    let path = folder.join(MARK);
    let what = || format!("cannot read {}", path.display());
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let file = match File::options().read(true).custom_flags(flags).open(&path) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(Found::Nothing),
        // A symlink; a socket or a device without anything behind it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENXIO | libc::ENODEV)) => {
            return Ok(Found::Strange);
        }
        file => file.context(what)?,
    };
    let metadata = file.metadata().context(what)?;
    if !metadata.is_file() || metadata.uid() != 0 {
        return Ok(Found::Strange);
    }
    let mut text = Vec::new();
    file.take(MARK_MAX_BYTES).read_to_end(&mut text).context(what)?;
    Ok(serde_json::from_slice(&text).map_or(Found::Strange, Found::Mark))
}

/// Removes a folder with all that is in it. Absence is success.
fn remove_all(folder: &Path) -> Result<()> {
    nothing_is_mounted(folder)?;
    gone_is_fine(fs::remove_dir_all(folder)).context(|| format!("cannot remove {}", folder.display()))
}

/// What somebody has mounted in a folder of ours is not ours.
fn nothing_is_mounted(folder: &Path) -> Result<()> {
    const FILE: &str = "/proc/self/mountinfo";
    let Ok(folder) = folder.canonicalize() else {
        return Ok(());
    };
    let text = fs::read(FILE).context(|| format!("cannot read {FILE}"))?;
    match mountinfo::parse(&text).find(|entry| entry.mount_point.starts_with(&folder)) {
        None => Ok(()),
        Some(entry) => Err(Error::precondition(format!(
            "{} is to be removed, and something is mounted at {}; unmount it, and delete again",
            folder.display(),
            entry.mount_point.display()
        ))),
    }
}

/// Removes folders of ours of which nothing runs and for which nobody will ask: the bundle is gone, and the monitor too, or it was of a
/// former boot of the machine.
///
/// # Errors
/// Everything that could not be removed, joined.
pub(super) fn sweep(lxc_path: &Path) -> Result<()> {
    let now = boot()?;
    let entries = match fs::read_dir(lxc_path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.context(|| format!("cannot read {}", lxc_path.display()))?,
    };
    let mut errors = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(Found::Mark(mark)) = read(&path) else { continue };
        let name = entry.file_name();
        if name != *mark.name && name != *partial(&mark.namespace, &mark.name) {
            continue;
        }
        let runs = mark.boot == now && mark.monitor.as_ref().is_none_or(is_alive);
        if !runs && !mark.bundle.exists() {
            log::info!(
                "{} is left of a container whose bundle {} is gone; it is removed",
                path.display(),
                mark.bundle.display()
            );
            errors.extend(remove_all(&path).err());
        }
    }
    Error::all(errors).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::{config::Options, error::Kind};

    fn record(lxc_path: &Path, id: &str, namespace: &str, bundle: &Path) -> Record {
        let record = serde_json::json!({
            "id": id, "namespace": namespace, "bundle": bundle, "backend": "lxc",
            "options": Options { lxc_path: lxc_path.into(), ..Options::default() },
        });
        serde_json::from_value(record).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_folder_is_made_whole_is_ours_and_goes_whole() {
        let root = tempfile::tempdir().unwrap();
        let lxc_path = root.path().join("not/yet");
        let rec = record(&lxc_path, "c1", "ns", Path::new("/b"));
        let folder = Folder::of(&rec, "c1");
        assert_eq!(folder.owner("ns", Path::new("/b")).unwrap(), Owner::Nobody);
        let mut mark = folder.claim(&rec, &[("lxc.x".into(), "y z".into())]).unwrap();
        assert_eq!(names(&lxc_path), ["c1"]);
        assert_eq!(names(&lxc_path.join("c1")), ["config", MARK]);
        let config = fs::read_to_string(lxc_path.join("c1/config")).unwrap();
        assert!(
            config.ends_with("lxc.x = y z\n") && config.contains("/b/config.json"),
            "{config}"
        );
        mark.monitor = Some(Identity { pid: 7, start_ticks: 8 });
        folder.mark(&mark).unwrap();
        assert_eq!(folder.owner("ns", Path::new("/b")).unwrap(), Owner::Us(mark));
        // What LXC has put there goes too.
        fs::create_dir(lxc_path.join("c1/rootfs")).unwrap();
        folder.remove("c1").unwrap();
        folder.remove("c1").unwrap();
        assert_eq!(names(&lxc_path), [""; 0]);
    }

    #[test]
    fn what_is_not_ours_is_told_and_never_touched() {
        let root = tempfile::tempdir().unwrap();
        let rec = record(root.path(), "c1", "ns", Path::new("/b"));
        let folder = Folder::of(&rec, "c1");
        let path = root.path().join("c1");
        let refused = |whose: &str| {
            let error = folder.claim(&rec, &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::AlreadyExists, "{error}");
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()), "{text}");
            match folder.owner("ns", Path::new("/b")).unwrap() {
                Owner::Another(told) => assert!(told.contains(whose), "{told}"),
                owner => panic!("{owner:?}"),
            }
            assert_eq!(names(root.path()), ["c1"]);
        };
        // An operator's container, a file, a link to somewhere, a mark that is none.
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config"), "lxc.uts.name = mine\n").unwrap();
        refused("no container of this runtime");
        fs::write(path.join(MARK), "{").unwrap();
        refused("cannot be understood");
        fs::remove_dir_all(&path).unwrap();
        fs::write(&path, "").unwrap();
        refused("no container of this runtime");
        fs::remove_file(&path).unwrap();
        symlink("/nowhere", &path).unwrap();
        refused("no container of this runtime");
        fs::remove_file(&path).unwrap();
        // The same id in another namespace, and of another bundle.
        for (namespace, bundle) in [("other", "/b"), ("ns", "/other")] {
            let other = record(root.path(), "c1", namespace, Path::new(bundle));
            Folder::of(&other, "c1").claim(&other, &[]).unwrap();
            refused(&format!("bundle {bundle} in containerd's namespace {namespace}"));
            Folder::of(&other, "c1").remove("c1").unwrap();
        }
    }

    #[test]
    fn what_a_killed_attempt_has_left_is_no_container_and_goes() {
        let root = tempfile::tempdir().unwrap();
        let rec = record(root.path(), "c1", "ns", Path::new("/b"));
        let folder = Folder::of(&rec, "c1");
        fs::create_dir(&folder.partial).unwrap();
        fs::write(folder.partial.join("config"), "half").unwrap();
        assert_eq!(folder.owner("ns", Path::new("/b")).unwrap(), Owner::Nobody);
        folder.claim(&rec, &[]).unwrap();
        assert_eq!(names(root.path()), ["c1"]);
        fs::create_dir(&folder.partial).unwrap();
        folder.remove_attempt().unwrap();
        assert_eq!(names(root.path()), ["c1"]);
    }

    #[test]
    fn only_what_nobody_will_ask_for_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        let lxc_path = root.path().join("lxc");
        let gone = root.path().join("gone");
        let own = crate::host::command::identity(std::process::id()).unwrap();
        let dead = Identity {
            pid: own.pid,
            start_ticks: own.start_ticks + 1,
        };
        let make = |id: &str, bundle: &Path, boot: Option<&str>, monitor: Option<Identity>| {
            let rec = record(&lxc_path, id, "ns", bundle);
            let folder = Folder::of(&rec, id);
            let mut mark = folder.claim(&rec, &[]).unwrap();
            mark.boot = boot.map_or(mark.boot, str::to_owned);
            mark.monitor = monitor;
            folder.mark(&mark).unwrap();
        };
        make("being-made", &gone, None, None);
        make("runs", &gone, None, Some(own));
        make("of-a-bundle", &bundle, Some("before"), Some(dead));
        make("of-the-dead", &gone, None, Some(dead));
        make("of-a-former-boot", &gone, Some("before"), Some(own));
        fs::create_dir(lxc_path.join("mine")).unwrap();
        sweep(&lxc_path).unwrap();
        assert_eq!(names(&lxc_path), ["being-made", "mine", "of-a-bundle", "runs"]);
        sweep(&root.path().join("nowhere")).unwrap();
    }

    /// A folder with the mark of a container of a former boot, whose bundle is gone.
    fn left(lxc_path: &Path, folder: &str, name: &str) -> PathBuf {
        let mark = Mark {
            name: name.into(),
            bundle: "/nonexistent/bundle".into(),
            namespace: "k8s.io".into(),
            boot: "another".into(),
            monitor: None,
        };
        let path = lxc_path.join(folder);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config"), "").unwrap();
        fs::write(path.join(MARK), serde_json::to_vec(&mark).unwrap()).unwrap();
        path
    }

    #[test]
    fn only_what_root_has_marked_as_that_very_folder_is_swept() {
        let lxc_path = tempfile::tempdir().unwrap();
        let lxc_path = lxc_path.path();
        let ours = [left(lxc_path, "a", "a"), left(lxc_path, &partial("k8s.io", "b"), "b")];
        let copy = left(lxc_path, "copy", "a");
        let fifo = left(lxc_path, "fifo", "fifo");
        fs::remove_file(fifo.join(MARK)).unwrap();
        mkfifo(&fifo.join(MARK), Mode::from_bits_truncate(0o600)).unwrap();
        let link = left(lxc_path, "link", "link");
        fs::rename(link.join(MARK), lxc_path.join("mark")).unwrap();
        symlink(lxc_path.join("mark"), link.join(MARK)).unwrap();
        let mut others = vec![copy, fifo, link];
        let strange = left(lxc_path, "strange", "strange");
        if chown(strange.join(MARK), Some(1000), None).is_ok() {
            others.push(strange);
        }
        sweep(lxc_path).unwrap();
        assert!(ours.iter().all(|path| !path.exists()));
        for path in others {
            assert!(path.join("config").exists(), "{}", path.display());
        }
    }

    #[test]
    fn a_folder_is_ours_by_its_name_namespace_and_bundle() {
        let lxc_path = tempfile::tempdir().unwrap();
        let lxc_path = lxc_path.path();
        let owner = |name: &str, namespace: &str, bundle: &str| {
            let folder = Folder {
                lxc_path: lxc_path.into(),
                path: lxc_path.join(name),
                partial: lxc_path.join(partial(namespace, name)),
            };
            folder.owner(namespace, Path::new(bundle)).unwrap()
        };
        left(lxc_path, "a", "a");
        left(lxc_path, "copy", "a");
        assert!(matches!(owner("a", "k8s.io", "/nonexistent/bundle"), Owner::Us(_)));
        assert_eq!(owner("b", "k8s.io", "/nonexistent/bundle"), Owner::Nobody);
        for (name, namespace, bundle) in [
            ("a", "moby", "/nonexistent/bundle"),
            ("a", "k8s.io", "/nonexistent/other"),
            ("copy", "k8s.io", "/nonexistent/bundle"),
        ] {
            assert!(
                matches!(owner(name, namespace, bundle), Owner::Another(_)),
                "{name} {namespace}"
            );
        }
        // "a.b" and "c", "a" and "b.c".
        assert_ne!(partial("a.b", "c"), partial("a", "b.c"));
    }
}
