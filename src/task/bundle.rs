//! The bundle: what the shim itself reads of an OCI `config.json`.
//!
//! Only the fields that the engine decides on are read, so that a document with fields or values newer than this crate still runs
//! wherever the runtime program understands it. A backend that maps the whole document parses [`Bundle::config`] itself.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    backend::check_id,
    error::{Context, Error, Result},
};

/// Upper bound of a `config.json`; a larger one is refused. containerd's are 20 to 100 KiB.
const CONFIG_MAX_BYTES: u64 = 16 << 20;

/// Annotations that put containers into one group, the first one wins: a pod as CRI writes it, then what clients of runc's shim use.
const GROUP_ANNOTATIONS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.containerd.runc.v2.group"];

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
        let metadata = std::fs::metadata(&file).map_err(invalid)?;
        if !metadata.is_file() {
            return Err(Error::invalid(format!("{} is not a regular file", file.display())));
        }
        let size = metadata.len();
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

    /// The group of the container `id` whose bundle this is: who shares a shim with it. A pod's containers are in the group that has
    /// the id of the pod's sandbox; a container that is alone has its own.
    pub fn group<'a>(&'a self, id: &'a str) -> &'a str {
        GROUP_ANNOTATIONS
            .iter()
            .find_map(|name| self.config.annotations.get(*name))
            .map(String::as_str)
            .filter(|group| !group.is_empty())
            .unwrap_or(id)
    }

    /// Where the bundle of the pod's sandbox is, if the container `id` whose bundle this is belongs to the pod of another one: containerd
    /// keeps the bundles of a namespace side by side. It need not exist.
    pub fn sandbox(&self, id: &str) -> Option<PathBuf> {
        let group = self.group(id);
        (group != id && check_id("sandbox id", group).is_ok()).then(|| self.path.with_file_name(group))
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
    // serde would read an array as the fields in their order.
    if text.trim_ascii_start().first() != Some(&b'{') {
        return Err(Error::invalid("not an OCI config: not a JSON object"));
    }
    serde_json::from_slice(text).map_err(|e| Error::invalid("not an OCI config").with_source(e))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;

    fn refused(text: &[u8]) {
        let start = String::from_utf8_lossy(&text[..text.len().min(80)]);
        match parse(text) {
            Ok(config) => panic!("{start} is read as {config:?}"),
            Err(error) => assert_eq!(error.kind(), Kind::InvalidArgument, "{start}"),
        }
    }

    #[test]
    fn the_fields_that_decide_something_are_read_and_the_others_are_left_alone() {
        let text = br#"{
            "ociVersion": "99.0.0",
            "annotations": {"a": "b"},
            "root": {"path": "rootfs", "readonly": true},
            "process": {"terminal": true, "args": ["sh"], "later": {"x": [1, 2.5, null]}},
            "linux": {"cgroupsPath": "/a/b", "namespaces": [{"type": "pid"}, {"type": "net", "path": "/n"}], "later": 1e999999}
        }"#;
        let config = parse(text).unwrap();
        assert_eq!(config.annotations["a"], "b");
        assert_eq!(config.root.path, Path::new("rootfs"));
        assert!(config.process.unwrap().terminal);
        assert_eq!(config.linux.cgroups_path.unwrap(), "/a/b");
        assert_eq!(config.linux.namespaces.len(), 2);
    }

    #[test]
    fn an_own_pid_namespace_is_one_without_a_path() {
        for (namespaces, shares) in [
            ("[]", true),
            (r#"[{"type": "pid"}]"#, false),
            (r#"[{"type": "pid", "path": ""}]"#, false),
            (r#"[{"type": "pid", "path": "/proc/1/ns/pid"}]"#, true),
            (r#"[{"type": "network"}]"#, true),
        ] {
            let bundle = Bundle {
                path: "/b".into(),
                config: parse(format!(r#"{{"linux": {{"namespaces": {namespaces}}}}}"#).as_bytes()).unwrap(),
            };
            assert_eq!(bundle.shares_pid_namespace(), shares, "{namespaces}");
        }
    }

    #[test]
    fn the_sandbox_of_a_pod_is_beside_its_containers() {
        const CRI: &str = "io.kubernetes.cri.sandbox-id";
        const RUNC: &str = "io.containerd.runc.v2.group";
        for (annotations, group, sandbox) in [
            (&[][..], "c1", None),
            (&[(CRI, "pod")], "pod", Some("/run/ns/pod")),
            (&[(RUNC, "pod"), (CRI, "")], "c1", None),
            (&[(RUNC, "g"), (CRI, "pod")], "pod", Some("/run/ns/pod")),
            (&[(RUNC, "g")], "g", Some("/run/ns/g")),
            (&[(CRI, "c1")], "c1", None),
            (&[(CRI, "../../etc")], "../../etc", None),
            (&[(CRI, "/etc")], "/etc", None),
            (&[(CRI, "..")], "..", None),
        ] {
            let bundle = Bundle {
                path: "/run/ns/c1".into(),
                config: Config {
                    annotations: annotations
                        .iter()
                        .map(|(k, v)| (k.to_string(), v.to_string()))
                        .collect(),
                    ..Config::default()
                },
            };
            assert_eq!(bundle.group("c1"), group);
            assert_eq!(
                bundle.sandbox("c1").as_deref(),
                sandbox.map(Path::new),
                "{annotations:?}"
            );
        }
    }

    #[test]
    fn a_bundle_without_a_usable_config_is_refused_by_path() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        let refusal = |wanted: &str| {
            let error = Bundle::read(folder.path()).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
            let text = error.to_string();
            assert!(
                text.contains(config.to_str().unwrap()) && text.contains(wanted),
                "{text}"
            );
        };
        refusal("No such file");
        std::fs::write(&config, "{").unwrap();
        refusal("line 1");
        let file = std::fs::File::create(&config).unwrap();
        file.set_len(CONFIG_MAX_BYTES + 1).unwrap();
        refusal("bytes");
        std::fs::remove_file(&config).unwrap();
        nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRUSR).unwrap();
        refusal("not a regular file");
        let error = Bundle::read(Path::new("b")).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
    }

    #[test]
    fn hostile_json_is_an_error() {
        for text in [
            &b""[..],
            b"\xff\xfe",
            b"null",
            b"[]",
            br#"{"root": {"path": 1}}"#,
            br#"{"root": "rootfs"}"#,
            br#"{"process": {"terminal": "yes"}}"#,
            br#"{"annotations": {"a": 1}}"#,
            br#"{"annotations": {"a": null}}"#,
            br#"{"linux": {"cgroupsPath": []}}"#,
            br#"{"linux": {"namespaces": {"type": "pid"}}}"#,
            br#"{"linux": {}, "linux": {}}"#,
            br#"{} {}"#,
        ] {
            refused(text);
        }
        for text in [
            "[".repeat(200_000),
            "{\"a\":".repeat(200_000),
            format!("{{\"linux\":{{\"cgroupsPath\":{}}}}}", "9".repeat(200_000)),
        ] {
            refused(text.as_bytes());
        }
        // What nobody here reads is skipped without recursion.
        let deep = format!("{{\"hooks\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
        assert!(parse(deep.as_bytes()).is_ok());
    }

    /// JSON of any shape around the keys that are read.
    fn json_like() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            any::<bool>().prop_map(|v| v.to_string()),
            any::<i64>().prop_map(|v| v.to_string()),
            "[0-9]{1,40}(\\.[0-9]{1,5})?(e[0-9]{1,3})?",
            "[a-z/.]{0,8}".prop_map(|v| format!("{v:?}")),
        ];
        leaf.prop_recursive(6, 64, 8, |inner| {
            let key = prop_oneof![
                Just("annotations"),
                Just("root"),
                Just("path"),
                Just("process"),
                Just("terminal"),
                Just("linux"),
                Just("cgroupsPath"),
                Just("namespaces"),
                Just("type"),
                Just("other"),
            ];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(|items| format!("[{}]", items.join(","))),
                prop::collection::btree_map(key, inner, 0..6).prop_map(|members| {
                    let members: Vec<String> = members.iter().map(|(key, value)| format!("{key:?}:{value}")).collect();
                    format!("{{{}}}", members.join(","))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_config_or_an_error(text in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Err(error) = parse(&text) {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
            }
        }

        #[test]
        fn any_json_is_a_config_or_an_error(text in json_like()) {
            if let Err(error) = parse(text.as_bytes()) {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
            }
        }
    }
}
