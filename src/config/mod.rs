//! Runtime options, annotations, routing rules, file and defaults → one [`Options`] value.
//!
//! ```text
//! Any of the request ─┐  first wins,
//! annotations ────────┤  key by key      checked
//! first [[route]] ────┼─────────────────▶ Options
//! [options] ──────────┤
//! defaults ───────────┘
//! ```
//!
//! Each source becomes a layer in which every key is set or open; layers are checked one by one, so that an error names the source,
//! and then laid over each other. [`resolve`] is pure; [`load`] reads the files.
//!
//! Trust: who may send a request to containerd, or write root's files, is root already. Annotations are different: the author of a
//! pod writes them. So only keys that cannot hurt others are taken from there, unless the file allows more. docs/configuration.md
//! tells operators about all of it.

mod file;
mod keys;
mod routing;
mod runtime;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use keys::{Key, Layer, Quoted};

/// The prost types of `proto/`.
pub mod proto {
    #![allow(missing_docs, unreachable_pub)]
    /// `proto/options.proto`.
    pub mod proxmoxlxcri {
        include!(concat!(env!("OUT_DIR"), "/proxmoxlxcri.v1.rs"));
    }
    /// `proto/runtimeoptions.proto`.
    pub mod runtimeoptions {
        include!(concat!(env!("OUT_DIR"), "/runtimeoptions.v1.rs"));
    }
}

/// The configuration file that is read when nobody names another.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/proxmox-lxcri/config.toml";

/// Names another configuration file, for a private containerd beside the machine's own.
///
/// The shim inherits its environment from containerd, so only root sets it; a container's environment never reaches the shim.
pub const CONFIG_FILE_VARIABLE: &str = "PROXMOX_LXCRI_CONFIG";

/// What an annotation's key begins with; the name of an option follows.
pub const ANNOTATION_PREFIX: &str = "io.proxmox-lxcri.";

/// The known backends; [`crate::backend::all`] says which of them are built.
pub const BACKENDS: [&str; 4] = ["crun", "lxc", "proxmox-lxc", "proxmox-vm"];

/// What was decided for one container; every field has its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// One of [`BACKENDS`].
    pub backend: String,
    /// The crun program: a name looked up in PATH, or an absolute path.
    pub crun_binary: PathBuf,
    /// Absolute path of the folder of crun's state; the containerd namespace is appended.
    pub crun_root: PathBuf,
    /// crun creates systemd scopes. Unless a source says otherwise: whether the spec's cgroupsPath has systemd's form.
    pub systemd_cgroup: bool,
    /// No pivot_root.
    pub no_pivot_root: bool,
    /// No new session keyring.
    pub no_new_keyring: bool,
    /// cgroup that the shim itself joins, below the root of the hierarchy; empty for none.
    pub shim_cgroup: String,
    /// Owner of the stdio pipes.
    pub io_uid: u32,
    /// Group of the stdio pipes.
    pub io_gid: u32,
    /// Absolute path of the folder for CRIU's images.
    pub criu_image_path: Option<PathBuf>,
    /// Absolute path of the folder for CRIU's work files.
    pub criu_work_path: Option<PathBuf>,
    /// Bound of one call of the runtime program, milliseconds: 1 000 to 3 600 000.
    pub runtime_timeout_ms: u64,
    /// Bound of the wait for the rest of the output after an exit, milliseconds: 0 to 10 000.
    pub drain_timeout_ms: u64,
    /// crun's debug messages go into the shim's log.
    pub crun_debug: bool,
    /// Absolute path of the folder of LXC's containers.
    pub lxc_path: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: "crun".into(),
            crun_binary: "crun".into(),
            crun_root: "/run/proxmox-lxcri/crun".into(),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            shim_cgroup: String::new(),
            io_uid: 0,
            io_gid: 0,
            criu_image_path: None,
            criu_work_path: None,
            runtime_timeout_ms: 120_000,
            drain_timeout_ms: 2_000,
            crun_debug: false,
            lxc_path: "/var/lib/lxc".into(),
        }
    }
}

/// Runtime options as they arrive: a protobuf `Any`, taken apart. Both parts empty: the client sent none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Any<'a> {
    /// Full name of the message, possibly behind a host.
    pub type_url: &'a str,
    /// The encoded message.
    pub value: &'a [u8],
}

impl Any<'_> {
    /// Whether these are runtime options of a known type, and not something else that containerd sends along.
    pub fn is_known(&self) -> bool {
        runtime::is_known(self.type_url)
    }
}

/// What the rules and defaults look at.
#[derive(Debug, Clone, Copy)]
pub struct Container<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// `annotations` of the spec.
    pub annotations: &'a BTreeMap<String, String>,
    /// `linux.cgroupsPath` of the spec.
    pub cgroups_path: Option<&'a str>,
}

/// A configuration text.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Where it comes from, for messages.
    pub origin: &'a str,
    /// The text.
    pub toml: &'a str,
}

/// All that [`resolve`] decides on, highest precedence first.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// Options of the request.
    pub runtime: Any<'a>,
    /// The text of the file that `runtime` names, see [`named_file`].
    pub runtime_file: Option<Text<'a>>,
    /// The container, with its annotations.
    pub container: Container<'a>,
    /// The text of `config.toml`: routing rules and `[options]`. `None` if there is no such file.
    pub file: Option<Text<'a>>,
}

/// Decides the options of one container. The first source that sets a key wins: runtime options, annotations, the first routing rule
/// that matches, `[options]` of the file, defaults.
///
/// Every source is checked as a whole, also where another one wins.
///
/// # Errors
/// `InvalidArgument` that names the key and the source: an unknown type of options, an unknown key, a wrong value, an annotation that
/// is not allowed, a text that is not TOML.
pub fn resolve(sources: &Sources<'_>) -> Result<Options> {
    let mut layer = match (runtime::decode(sources.runtime)?, &sources.runtime_file) {
        (runtime::Decoded::Layer(layer), _) => layer,
        (runtime::Decoded::File(_), Some(text)) => file::parse_bare(text)?,
        (runtime::Decoded::File(path), None) => {
            return Err(Error::invalid(format!(
                "config_path {} of the runtime options was not read",
                path.display()
            )));
        }
    };
    let document = match &sources.file {
        Some(text) => file::parse(text)?,
        None => file::Document::default(),
    };
    let origin = sources.file.map_or(DEFAULT_CONFIG_FILE, |text| text.origin);
    keys::fill(
        &mut layer,
        from_annotations(sources.container.annotations, document.allow.as_deref(), origin)?,
    );
    let mut routes = document.routes.into_iter();
    if let Some(route) = routes.find(|route| route.matches(&sources.container)) {
        keys::fill(&mut layer, route.options);
    }
    keys::fill(&mut layer, document.options);
    Ok(with_defaults(layer, &sources.container))
}

/// The file that the runtime options name (`ctr run --runtime-config-path`, `ConfigPath` of a runtime in CRI's configuration), if
/// they do.
///
/// # Errors
/// As [`resolve`], for the runtime options.
pub fn named_file(runtime: Any<'_>) -> Result<Option<PathBuf>> {
    Ok(match runtime::decode(runtime)? {
        runtime::Decoded::Layer(_) => None,
        runtime::Decoded::File(path) => Some(path),
    })
}

/// The configuration file of this process: what [`CONFIG_FILE_VARIABLE`] says, or [`DEFAULT_CONFIG_FILE`].
pub fn config_file() -> PathBuf {
    config_file_from(std::env::var_os(CONFIG_FILE_VARIABLE))
}

fn config_file_from(variable: Option<OsString>) -> PathBuf {
    variable
        .filter(|path| !path.is_empty())
        .map_or_else(|| DEFAULT_CONFIG_FILE.into(), PathBuf::from)
}

/// Reads the files and [resolves](resolve). `config_file` comes from [`config_file`], or from a test.
///
/// [`DEFAULT_CONFIG_FILE`] may be missing; any other path was named by somebody and must exist.
///
/// # Errors
/// As [`resolve`]; and for a file that cannot be read, that is not absolute, not a regular file, not UTF-8, larger than 64 KiB
/// (`InvalidArgument`), or that others than root own or can write (`FailedPrecondition`).
pub fn load(config_file: &Path, runtime: Any<'_>, container: Container<'_>) -> Result<Options> {
    if !config_file.is_absolute() {
        return Err(Error::invalid(format!(
            "configuration path {} ({CONFIG_FILE_VARIABLE}) is not absolute",
            config_file.display()
        )));
    }
    let named = named_file(runtime)?;
    let named_text = match &named {
        Some(path) => file::read(path, true)?,
        None => None,
    };
    let named_origin = named.map(|path| path.display().to_string()).unwrap_or_default();
    let text = file::read(config_file, config_file != Path::new(DEFAULT_CONFIG_FILE))?;
    let origin = config_file.display().to_string();
    resolve(&Sources {
        runtime,
        runtime_file: named_text.as_deref().map(|toml| Text {
            origin: &named_origin,
            toml,
        }),
        container,
        file: text.as_deref().map(|toml| Text { origin: &origin, toml }),
    })
}

/// The layer of the annotations. `allow` replaces the keys that are safe by themselves.
fn from_annotations(annotations: &BTreeMap<String, String>, allow: Option<&[&str]>, file: &str) -> Result<Layer> {
    let mut layer = Layer::default();
    for (annotation, value) in annotations {
        let Some(name) = annotation.strip_prefix(ANNOTATION_PREFIX) else {
            continue;
        };
        let Some(key) = Key::find(name) else {
            return Err(keys::unknown(name, &format!("annotation {}", Quoted(annotation))));
        };
        let allowed = allow.map_or(key.safe, |allow| allow.contains(&key.name));
        if !allowed {
            return Err(Error::invalid(format!(
                "annotation {annotation} is not allowed, because a pod's author could set it; to allow it, list {:?} in allow under \
                 [annotations] in {file}",
                key.name
            )));
        }
        key.set_text(&mut layer, value)
            .map_err(|problem| Error::invalid(format!("annotation {annotation} {problem}")))?;
    }
    Ok(layer)
}

fn with_defaults(layer: Layer, container: &Container<'_>) -> Options {
    let default = Options::default();
    let path = |path: Option<String>, default: PathBuf| path.map_or(default, PathBuf::from);
    Options {
        backend: layer.backend.unwrap_or(default.backend),
        crun_binary: path(layer.crun_binary, default.crun_binary),
        crun_root: path(layer.crun_root, default.crun_root),
        systemd_cgroup: layer
            .systemd_cgroup
            .unwrap_or_else(|| container.cgroups_path.is_some_and(is_systemd_cgroup)),
        no_pivot_root: layer.no_pivot_root.unwrap_or(default.no_pivot_root),
        no_new_keyring: layer.no_new_keyring.unwrap_or(default.no_new_keyring),
        shim_cgroup: layer.shim_cgroup.unwrap_or(default.shim_cgroup),
        io_uid: layer.io_uid.unwrap_or(default.io_uid),
        io_gid: layer.io_gid.unwrap_or(default.io_gid),
        criu_image_path: layer.criu_image_path.map(PathBuf::from),
        criu_work_path: layer.criu_work_path.map(PathBuf::from),
        runtime_timeout_ms: layer.runtime_timeout_ms.unwrap_or(default.runtime_timeout_ms),
        drain_timeout_ms: layer.drain_timeout_ms.unwrap_or(default.drain_timeout_ms),
        crun_debug: layer.crun_debug.unwrap_or(default.crun_debug),
        lxc_path: layer.lxc_path.map_or(default.lxc_path, PathBuf::from),
    }
}

/// Whether a cgroupsPath has the form `slice:prefix:name`. Clients that manage cgroups by systemd write it, and some of them (nerdctl)
/// cannot tell a runtime type that they do not know.
fn is_systemd_cgroup(path: &str) -> bool {
    let mut parts = path.split(':');
    let (Some(slice), Some(_), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    !path.contains('/') && !name.is_empty() && (slice.is_empty() || slice.ends_with(".slice"))
}
