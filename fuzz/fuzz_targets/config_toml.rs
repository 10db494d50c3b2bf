//! `config.toml` with its routing rules, and the same text as the body of `runtimeoptions.v1.Options`.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::config::{Any, Container, Sources, Text, resolve};

/// `runtimeoptions.v1.Options` with config_path "/x", field 2.
const NAMES_A_FILE: [u8; 4] = [0x12, 2, b'/', b'x'];

fuzz_target!(|data: &str| {
    let annotations = BTreeMap::from([(
        "io.kubernetes.cri.image-name".to_owned(),
        "docker.io/library/a:1".to_owned(),
    )]);
    let text = Some(Text {
        origin: "config.toml",
        toml: data,
    });
    let container = Container {
        namespace: "k8s.io",
        id: "c1",
        annotations: &annotations,
        cgroups_path: None,
    };
    let _ = resolve(&Sources {
        runtime: Any::default(),
        runtime_file: None,
        container,
        file: text,
    });
    let _ = resolve(&Sources {
        runtime: Any {
            type_url: "runtimeoptions.v1.Options",
            value: &NAMES_A_FILE,
        },
        runtime_file: text,
        container,
        file: None,
    });
});
