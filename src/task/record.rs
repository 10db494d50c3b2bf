//! Durable facts of a container, written before each side effect, so that a fresh process can undo or finish what a killed shim
//! began.
//!
//! The file is `<bundle>/proxmox-lxcri.json`, mode 0600, replaced atomically. It survives the death of the shim, not of the machine
//! (containerd's state folder does not either), so it is not synced to disk. Unknown fields are ignored: a newer shim may have
//! written it.
//!
//! The record of a pod's container has a second name in the bundle of the pod's sandbox: containerd 2 asks `delete` for the sandbox
//! alone when a shim has died, and has removed the other bundles by then or will do so without asking.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    backend::Exit,
    config::Options,
    error::{Context, Error, Result},
    host::cgroup::Cgroup,
};

/// Upper bound of a record; a larger file is not one. Ours have one or two KiB.
const RECORD_MAX_BYTES: u64 = 1 << 20;

/// File name of the record inside the bundle.
pub const RECORD_FILE: &str = "proxmox-lxcri.json";

/// What is before and after the id in a record's second name.
const SECOND_PREFIX: &str = "proxmox-lxcri.";
const SECOND_SUFFIX: &str = ".json";

/// What a fresh process has to know about a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The container's id, checked by [`crate::backend::check_id`].
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the bundle of the pod's sandbox, where the record has its second name; none for the sandbox itself and for a
    /// container without a pod. That bundle may be gone, or never have been.
    #[serde(default)]
    pub sandbox: Option<PathBuf>,
    /// Name of the backend that holds the container.
    pub backend: String,
    /// The options that were resolved at Create.
    pub options: Options,
    /// Absolute path of the rootfs, set when the shim mounts something there.
    #[serde(default)]
    pub rootfs: Option<PathBuf>,
    /// `linux.cgroupsPath` of the spec.
    #[serde(default)]
    pub cgroups_path: Option<String>,
    /// Whether init's death leaves processes behind (no pid namespace of its own).
    #[serde(default)]
    pub shares_pid_namespace: bool,
    /// Folder of a checkpoint to restore from.
    #[serde(default)]
    pub restore_from: Option<PathBuf>,
    /// The container's cgroup, once init lives in it.
    #[serde(default)]
    pub cgroup: Option<Cgroup>,
    /// The shim.
    #[serde(default)]
    pub shim: Option<Identity>,
    /// Init, once it exists.
    #[serde(default)]
    pub init: Option<Identity>,
    /// Set once init was reaped.
    #[serde(default)]
    pub exit: Option<Exit>,
}

/// A process, told apart from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid on the host.
    pub pid: u32,
    /// `starttime` of `/proc/<pid>/stat`, in clock ticks since boot.
    pub start_ticks: u64,
}

impl Record {
    /// Replaces the record on disk, atomically, and then what its second name names.
    ///
    /// # Errors
    /// The operating system's; the former record is untouched then, or the new one is complete and has no second name yet.
    pub fn save(&self) -> Result<()> {
        let target = self.bundle.join(RECORD_FILE);
        let partial = self.bundle.join(format!(".{RECORD_FILE}.new"));
        let text = serde_json::to_vec(self).map_err(|e| Error::unknown("cannot encode the record").with_source(e))?;
        let write = || {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(&text)?;
            fs::rename(&partial, &target)
        };
        write()
            .inspect_err(|_| {
                let _ = fs::remove_file(&partial);
            })
            .context(|| format!("cannot write record {}", target.display()))?;
        match self.second_name() {
            Some(second) => link(&target, &second).context(|| format!("cannot write record {}", second.display())),
            None => Ok(()),
        }
    }

    /// The path of the second name.
    fn second_name(&self) -> Option<PathBuf> {
        self.sandbox
            .as_ref()
            .map(|sandbox| sandbox.join(format!("{SECOND_PREFIX}{}{SECOND_SUFFIX}", self.id)))
    }

    /// The records that have their second name in `bundle`: those of the other containers of the pod whose sandbox's bundle it is.
    /// None for a bundle that is gone.
    ///
    /// # Errors
    /// For the folder as for each record: those of [`Record::load`], and `FailedPrecondition` for a record that has another name
    /// than its file.
    pub fn of_pod(bundle: &Path) -> Result<Vec<Result<Self>>> {
        let entries = match fs::read_dir(bundle) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.context(|| format!("cannot read {}", bundle.display()))?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let name = entry
                .context(|| format!("cannot read {}", bundle.display()))?
                .file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_prefix(SECOND_PREFIX)?.strip_suffix(SECOND_SUFFIX));
            let Some(id) = id else { continue };
            let path = bundle.join(&name);
            let record = Self::read(&path).and_then(|record| match record {
                Some(other) if other.id != id => Err(Error::precondition(format!(
                    "record {} is of container {}; nothing of it was touched",
                    path.display(),
                    other.id
                ))),
                record => Ok(record),
            });
            records.extend(record.transpose());
        }
        Ok(records)
    }

    /// Reads the record of a bundle; `None` if there is none.
    ///
    /// # Errors
    /// The operating system's, or `Unknown` when the file is not a record.
    pub fn load(bundle: &Path) -> Result<Option<Self>> {
        Self::read(&bundle.join(RECORD_FILE))
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        let mut text = Vec::new();
        let read = fs::File::open(path).and_then(|file| file.take(RECORD_MAX_BYTES + 1).read_to_end(&mut text));
        match read {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(|| format!("cannot read record {}", path.display())),
        }
        Self::parse(&text)
            .context(|| format!("cannot parse record {}", path.display()))
            .map(Some)
    }

    /// Parses the text of a record.
    ///
    /// # Errors
    /// `Unknown`, with line and column.
    pub fn parse(text: &[u8]) -> Result<Self> {
        if text.len() as u64 > RECORD_MAX_BYTES {
            return Err(Error::unknown(format!(
                "not a record: larger than {RECORD_MAX_BYTES} bytes"
            )));
        }
        serde_json::from_slice(text).map_err(|e| Error::unknown("not a record").with_source(e))
    }

    /// Removes the record; absence is success.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self) -> Result<()> {
        self.remove_second_name()?;
        remove(&self.bundle.join(RECORD_FILE))
    }

    /// Removes the second name alone; absence is success. The record stays in the container's own bundle, if that is still there, for
    /// whoever asks for the exit.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove_second_name(&self) -> Result<()> {
        self.second_name().map_or(Ok(()), |path| remove(&path))
    }
}

/// Gives `target` the name `second` too, in place of whatever has it. A folder that does not exist is fine.
fn link(target: &Path, second: &Path) -> io::Result<()> {
    let partial = second.with_extension("new");
    let linked = fs::hard_link(target, &partial).or_else(|e| match e.kind() {
        // Of one that was killed right here.
        io::ErrorKind::AlreadyExists => fs::remove_file(&partial).and_then(|()| fs::hard_link(target, &partial)),
        _ => Err(e),
    });
    match linked {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        linked => linked.and_then(|()| fs::rename(&partial, second)),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).context(|| format!("cannot remove record {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{backend::Exit, error::Kind};

    fn record(bundle: &Path) -> Record {
        Record {
            id: "c1".into(),
            namespace: "k8s.io".into(),
            bundle: bundle.into(),
            sandbox: None,
            backend: "crun".into(),
            options: Options::default(),
            rootfs: Some(bundle.join("rootfs")),
            cgroups_path: Some("/k8s.io/c1".into()),
            shares_pid_namespace: true,
            restore_from: None,
            cgroup: None,
            shim: None,
            init: Some(Identity {
                pid: 7,
                start_ticks: u64::MAX,
            }),
            exit: Some(Exit::now(137)),
        }
    }

    fn as_json(record: &Record) -> Value {
        serde_json::to_value(record).unwrap()
    }

    #[test]
    fn a_record_reads_as_it_was_saved_and_is_gone_when_removed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Record::load(folder.path()).unwrap().is_none());
        let record = record(folder.path());
        record.save().unwrap();
        let loaded = Record::load(folder.path()).unwrap().unwrap();
        assert_eq!(as_json(&loaded), as_json(&record));
        record.remove().unwrap();
        record.remove().unwrap();
        assert!(Record::load(folder.path()).unwrap().is_none());
    }

    #[test]
    fn a_record_of_a_pod_has_a_second_name_in_its_sandbox() {
        let folder = tempfile::tempdir().unwrap();
        let [sandbox, bundle] = ["sandbox", "c1"].map(|name| folder.path().join(name));
        fs::create_dir(&bundle).unwrap();
        let mut record = Record {
            sandbox: Some(sandbox.clone()),
            ..record(&bundle)
        };
        let of_pod = || -> Vec<Value> {
            let records = Record::of_pod(&sandbox).unwrap().into_iter();
            records.map(|record| as_json(&record.unwrap())).collect()
        };
        // A sandbox that is not there is nobody's fault.
        record.save().unwrap();
        assert_eq!(of_pod(), [Value::Null; 0]);
        fs::create_dir(&sandbox).unwrap();
        // One that was killed while it gave the name, and files of others.
        fs::write(sandbox.join("proxmox-lxcri.c1.new"), "").unwrap();
        fs::write(sandbox.join(RECORD_FILE), "").unwrap();
        fs::write(sandbox.join("config.json"), "").unwrap();
        record.save().unwrap();
        assert_eq!(of_pod(), [as_json(&record)]);
        record.exit = None;
        record.save().unwrap();
        assert_eq!(of_pod(), [as_json(&record)]);
        record.remove_second_name().unwrap();
        record.remove_second_name().unwrap();
        assert_eq!(of_pod(), [Value::Null; 0]);
        assert!(Record::load(&bundle).unwrap().is_some());
        record.save().unwrap();
        record.remove().unwrap();
        assert_eq!(of_pod(), [Value::Null; 0]);
        assert!(Record::load(&bundle).unwrap().is_none());
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&sandbox).unwrap().count(), 2);
    }

    #[test]
    fn a_second_name_that_cannot_be_given_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        let second = folder.path().join("sandbox/proxmox-lxcri.c1.json");
        record.sandbox = Some(folder.path().join("sandbox"));
        fs::create_dir_all(second.join("in the way")).unwrap();
        for error in [record.save().unwrap_err(), record.remove().unwrap_err()] {
            assert!(error.to_string().contains(second.to_str().unwrap()), "{error}");
        }
        assert!(Record::of_pod(folder.path().join("sandbox").as_path()).unwrap()[0].is_err());
        assert!(Record::of_pod(&folder.path().join(RECORD_FILE)).is_err());
    }

    #[test]
    fn a_record_of_a_newer_shim_is_read() {
        let mut text = as_json(&record(Path::new("/b")));
        text["later"] = json!({"a": [1]});
        text["options"]["later"] = json!(true);
        let read = Record::parse(text.to_string().as_bytes()).unwrap();
        assert_eq!(
            as_json(&read),
            as_json(&Record::parse(text.to_string().as_bytes()).unwrap())
        );
        assert_eq!((read.id.as_str(), read.options), ("c1", Options::default()));
    }

    #[test]
    fn a_file_that_is_no_record_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECORD_FILE);
        let huge = vec![b' '; RECORD_MAX_BYTES as usize + 1];
        for text in [&b""[..], b"{}", b"[]", b"{\"id\":1}", b"\xff", &huge] {
            fs::write(&path, text).unwrap();
            let error = Record::load(folder.path()).unwrap_err();
            assert_eq!(error.kind(), Kind::Unknown);
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn hostile_json_is_an_error() {
        let good = as_json(&record(Path::new("/b")));
        let keys: Vec<String> = good.as_object().unwrap().keys().cloned().collect();
        let hostile = [
            json!(-1),
            json!(1e300),
            json!([[[[]]]]),
            json!({"pid": 4_294_967_296_u64, "start_ticks": 1}),
            json!({"status": 1, "at": {"secs_since_epoch": u64::MAX, "nanos_since_epoch": 4_000_000_000_u32}}),
        ];
        for key in &keys {
            for value in &hostile {
                let mut text = good.clone();
                text[key] = value.clone();
                // The options have a default for everything, so that a foreign object in their place reads as the defaults.
                if key == "options" && value.is_object() {
                    continue;
                }
                assert!(Record::parse(text.to_string().as_bytes()).is_err(), "{key}: {value}");
            }
        }
        for text in [
            "[".repeat(100_000),
            "{\"a\":".repeat(100_000),
            format!("{{\"id\":{}", "[".repeat(100_000)),
            format!("{{\"id\":{}}}", "9".repeat(100_000)),
        ] {
            assert!(Record::parse(text.as_bytes()).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::parse(&text);
        }

        #[test]
        fn a_damaged_record_is_a_record_or_an_error(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
            let mut text = as_json(&record(Path::new("/b"))).to_string().into_bytes();
            let at = at.index(text.len());
            text[at] = byte;
            if cut {
                text.truncate(at);
            }
            if let Ok(read) = Record::parse(&text) {
                let again = Record::parse(as_json(&read).to_string().as_bytes()).unwrap();
                prop_assert_eq!(as_json(&again), as_json(&read));
            }
        }
    }
}
