//! `-info`: what this runtime is, for containerd's introspection.

use std::os::fd::AsFd;

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci,
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use super::{RUNTIME, bootstrap};
use crate::error::{Error, Result};

/// The name under which containerd's consumers decode OCI features (containerd/typeurl; runtime-spec features.md). The value is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Reads runtime options from stdin (an `Any`, may be empty) and returns the `RuntimeInfo` that is to be printed.
///
/// The annotation `containerd.io/runtime-allow-mounts` is not set: it takes mounts away from containerd's mount manager (loop devices,
/// formatting, templates), which does them as well, before the shim sees the rest.
///
/// # Errors
/// Those of stdin, and `Unknown` when the protobuf encoder fails. A backend that cannot be asked for its features is no error:
/// containerd takes their absence for "unknown".
pub fn info() -> Result<Vec<u8>> {
    let options = bootstrap::options(&bootstrap::read_stdin(std::io::stdin().as_fd())?);
    let features = features(options.as_ref()).map(|value| Any {
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
        options: options.into(),
        features: features.into(),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(|e| Error::unknown("cannot encode the runtime's description").with_source(e))
}

/// OCI features of the backend that `options` choose, JSON.
fn features(options: Option<&Any>) -> Option<Vec<u8>> {
    let _ = options;
    None
}

/// The cgroup that runtime options among `extensions` want the shim in.
///
/// # Errors
/// `InvalidArgument` when the options cannot be read.
pub fn shim_cgroup(extensions: &[Any]) -> Result<Option<String>> {
    let Some(any) = extensions
        .iter()
        .find(|any| any.type_url.ends_with("containerd.runc.v1.Options"))
    else {
        return Ok(None);
    };
    let options = oci::Options::parse_from_bytes(&any.value)
        .map_err(|e| Error::invalid("cannot read the runtime options").with_source(e))?;
    Ok(Some(options.shim_cgroup).filter(|cgroup| !cgroup.is_empty()))
}
