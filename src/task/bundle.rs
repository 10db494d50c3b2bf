//! The bundle: what the shim itself reads of an OCI `config.json`.
//!
//! Only the fields that the engine decides on are read, so that a document with fields or values newer than this crate still runs
//! wherever the runtime program understands it. A backend that maps the whole document parses [`Bundle::config`] itself.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::error::{Context, Error, Result};

/// Upper bound of a `config.json`; a larger one is refused. containerd's are 20 to 100 KiB.
const CONFIG_MAX_BYTES: u64 = 16 << 20;

/// A bundle folder and its parsed `config.json`.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute path of the folder.
    pub path: PathBuf,
    /// The fields that the engine reads.
    pub config: Config,
}

/// The part of an OCI runtime-spec config.json that decides something here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Config {
    /// `annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `root`.
    pub root: Root,
    /// `process`, absent in a bundle that never runs a program.
    pub process: Option<Process>,
    /// `linux`.
    pub linux: Linux,
}

/// OCI `root`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Path of the rootfs, relative to the bundle or absolute.
    pub path: PathBuf,
}

/// OCI `process`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Whether a terminal is attached.
    pub terminal: bool,
}

/// OCI `linux`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// `cgroupsPath`, in the cgroupfs form (`/a/b`) or the systemd form (`slice:prefix:name`).
    pub cgroups_path: Option<String>,
    /// `namespaces`.
    pub namespaces: Vec<Namespace>,
}

/// OCI `linux.namespaces[]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// "pid", "network", …
    #[serde(rename = "type")]
    pub kind: String,
    /// A namespace to join; a new one when absent or empty.
    pub path: Option<PathBuf>,
}

impl Bundle {
    /// Reads `<path>/config.json`.
    ///
    /// # Errors
    /// `InvalidArgument` when the path is not absolute, the file is missing, too large or not JSON of the right shape.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.is_absolute() {
            return Err(Error::invalid(format!(
                "bundle path {} is not absolute",
                path.display()
            )));
        }
        let file = path.join("config.json");
        let invalid = |e: std::io::Error| Error::invalid(format!("cannot read {}", file.display())).with_source(e);
        let size = std::fs::metadata(&file).map_err(invalid)?.len();
        if size > CONFIG_MAX_BYTES {
            return Err(Error::invalid(format!(
                "{} has {size} bytes; at most {CONFIG_MAX_BYTES} are read",
                file.display()
            )));
        }
        let text = std::fs::read(&file).map_err(invalid)?;
        let config = parse(&text).context(|| format!("cannot parse {}", file.display()))?;
        Ok(Self {
            path: path.to_path_buf(),
            config,
        })
    }

    /// Whether processes of the container may outlive its init because it has no pid namespace of its own.
    pub fn shares_pid_namespace(&self) -> bool {
        !self
            .config
            .linux
            .namespaces
            .iter()
            .any(|ns| ns.kind == "pid" && ns.path.as_ref().is_none_or(|path| path.as_os_str().is_empty()))
    }
}

/// Parses the text of a `config.json`.
///
/// # Errors
/// `InvalidArgument` with line and column.
pub fn parse(text: &[u8]) -> Result<Config> {
    serde_json::from_slice(text).map_err(|e| Error::invalid("not an OCI config").with_source(e))
}
