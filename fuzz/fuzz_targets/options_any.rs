//! The `Any` of a request: the first byte chooses the type, the rest is the message.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::config::{Any, Container, Sources, resolve};

const TYPES: [&str; 5] = [
    "",
    "proxmoxlxcri.v1.Options",
    "runtimeoptions.v1.Options",
    "types.containerd.io/containerd.runc.v1.Options",
    "windows.v1.Options",
];

fuzz_target!(|data: &[u8]| {
    let Some((choice, value)) = data.split_first() else {
        return;
    };
    let _ = resolve(&Sources {
        runtime: Any {
            type_url: TYPES[usize::from(*choice) % TYPES.len()],
            value,
        },
        runtime_file: None,
        container: Container {
            namespace: "default",
            id: "c1",
            annotations: &BTreeMap::new(),
            cgroups_path: None,
        },
        file: None,
    });
});
