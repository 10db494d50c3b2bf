//! `-info`: what this runtime is, for containerd's introspection.

use std::{collections::BTreeMap, os::fd::AsFd, time::Duration};

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use super::{RUNTIME, bootstrap};
use crate::{
    backend::crun::Crun,
    config::{self, Options},
    error::{Error, Result},
    host::command::Reaper,
};

/// The name under which containerd's consumers decode OCI features (containerd/typeurl; runtime-spec features.md). The value is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Bound of the question to the runtime program.
const FEATURES_BOUND: Duration = Duration::from_secs(5);

/// Reads runtime options from stdin (an `Any`, may be empty) and returns the `RuntimeInfo` that is to be printed.
///
/// The annotation `containerd.io/runtime-allow-mounts` is not set: it takes mounts away from containerd's mount manager (loop devices,
/// formatting, templates), which does them as well, before the shim sees the rest.
///
/// # Errors
/// Those of stdin and of [`config::load`], and `Unknown` when the protobuf encoder fails. A backend that cannot be asked for its features is no error:
/// containerd takes their absence for "unknown".
pub fn info() -> Result<Vec<u8>> {
    let sent = bootstrap::options(&bootstrap::read_stdin(std::io::stdin().as_fd())?);
    let container = config::Container {
        namespace: "",
        id: "",
        annotations: &BTreeMap::new(),
        cgroups_path: None,
    };
    let runtime = sent.as_ref().map(bootstrap::parts).unwrap_or_default();
    let options = config::load(&config::config_file(), runtime, container)?;
    let features = features(&options).map(|value| Any {
        type_url: FEATURES_TYPE.into(),
        value,
        ..Default::default()
    });
    RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        options: sent.into(),
        features: features.into(),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(|e| Error::unknown("cannot encode the runtime's description").with_source(e))
}

/// OCI features (JSON) of the backend that `options` choose; `None` if it cannot tell.
fn features(options: &Options) -> Option<Vec<u8>> {
    if options.backend != "crun" {
        return None;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let crun = Crun::new(Reaper::new());
    let asked = runtime.block_on(async { tokio::time::timeout(FEATURES_BOUND, crun.features(options)).await });
    serde_json::to_vec(&asked.ok()?.ok()?).ok()
}
