//! Durable facts of a container, written before each side effect, so that a fresh process can undo or finish what a killed shim
//! began.
//!
//! The file is `<bundle>/proxmox-lxcri.json`, mode 0600, replaced atomically. It survives the death of the shim, not of the machine
//! (containerd's state folder does not either), so it is not synced to disk. Unknown fields are ignored: a newer shim may have
//! written it.

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    backend::Exit,
    config::Options,
    error::{Context, Error, Result},
};

/// File name of the record inside the bundle.
pub const RECORD_FILE: &str = "proxmox-lxcri.json";

/// What a fresh process has to know about a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The container's id, checked by [`crate::backend::check_id`].
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
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
    /// Replaces the record on disk, atomically.
    ///
    /// # Errors
    /// The operating system's; the former record is untouched then.
    pub fn save(&self) -> Result<()> {
        let target = self.bundle.join(RECORD_FILE);
        let partial = self.bundle.join(".proxmox-lxcri.json.new");
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
            .context(|| format!("cannot write record {}", target.display()))
    }

    /// Reads the record of a bundle; `None` if there is none.
    ///
    /// # Errors
    /// The operating system's, or `Unknown` when the file is not a record.
    pub fn load(bundle: &Path) -> Result<Option<Self>> {
        let path = bundle.join(RECORD_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(|| format!("cannot read record {}", path.display())),
        };
        let record = serde_json::from_slice(&text)
            .map_err(|e| Error::unknown(format!("cannot parse record {}", path.display())).with_source(e))?;
        Ok(Some(record))
    }

    /// Removes the record; absence is success.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self) -> Result<()> {
        let path = self.bundle.join(RECORD_FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context(|| format!("cannot remove record {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}
