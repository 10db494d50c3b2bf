mod plan;
mod real;

use std::path::Path;

use serde_json::{Value, json};

use super::Root;
use crate::error::Result;

/// The plan of a bundle with these `mounts` and further fields of `linux`. It has a mount namespace of its own.
fn planned(bundle: &Path, mounts: Value, linux: Value) -> Result<Root> {
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "mount"}]},
    });
    for (key, value) in linux.as_object().unwrap() {
        spec["linux"][key] = value.clone();
    }
    of(&spec, bundle)
}

fn of(spec: &Value, bundle: &Path) -> Result<Root> {
    Root::of(&serde_json::from_value(spec.clone()).unwrap(), bundle, false)
}
