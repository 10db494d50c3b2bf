//! Annotations: lines `key=value`, every key allowed; the cgroupsPath is the first line.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::config::{ANNOTATION_PREFIX, Any, Container, Sources, Text, resolve};

const FILE: &str = r#"
[annotations]
allow = [
    "backend", "crun_binary", "crun_root", "systemd_cgroup", "no_pivot_root", "no_new_keyring", "shim_cgroup", "io_uid", "io_gid",
    "criu_image_path", "criu_work_path", "runtime_timeout_ms", "drain_timeout_ms", "crun_debug", "lxc_path",
]
[[route]]
image = "*a*?b"
name = "?*c"
"#;

fuzz_target!(|data: &str| {
    let mut lines = data.lines();
    let cgroups_path = lines.next();
    let annotations: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once('='))
        .flat_map(|(key, value)| {
            [
                (key.to_owned(), value.to_owned()),
                (format!("{ANNOTATION_PREFIX}{key}"), value.to_owned()),
            ]
        })
        .collect();
    let _ = resolve(&Sources {
        runtime: Any::default(),
        runtime_file: None,
        container: Container {
            namespace: "default",
            id: "c1",
            annotations: &annotations,
            cgroups_path,
        },
        file: Some(Text {
            origin: "config.toml",
            toml: FILE,
        }),
    });
});
