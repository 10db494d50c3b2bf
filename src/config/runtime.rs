//! Runtime options: the protobuf `Any` of a CreateTaskRequest and of `start`'s standard input.

use std::path::{Path, PathBuf};

use containerd_shim_protos::{
    protobuf::{Message as _, UnknownValueRef, well_known_types::empty::Empty},
    shim::oci,
};
use prost::Message as _;

use super::{
    Any, Text, file,
    keys::{self, KEYS, Layer, Quoted},
    proto,
};
use crate::error::{Error, Result};

const OURS: &str = "proxmoxlxcri.v1.Options";
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
/// The name of the same message in the CRI plugin before it moved into containerd's API.
const CRI_RUNTIME_OPTIONS: &str = "cri.runtimeoptions.v1.Options";
const RUNC: &str = "containerd.runc.v1.Options";
/// What `ctr run --uidmap` still sends, whatever the runtime: the options of containerd's first shim.
const RUNC_FIRST: &str = "containerd.linux.runc.CreateOptions";

/// Upper bound of the encoded options: a TOML body as large as a file may be, and its envelope.
const VALUE_MAX_BYTES: usize = file::TEXT_MAX_BYTES + 4096;

/// What the options turned out to be.
pub(super) enum Decoded {
    /// The values themselves.
    Layer(Layer),
    /// The path of a file with the values.
    File(PathBuf),
}

/// Decodes the options of a request. No type and no value: nothing is set.
///
/// # Errors
/// `InvalidArgument` that names the type, or the key.
pub(super) fn decode(any: Any<'_>) -> Result<Decoded> {
    if any.value.len() > VALUE_MAX_BYTES {
        return Err(Error::invalid(format!(
            "runtime options of {} bytes are too large; at most {VALUE_MAX_BYTES} are taken",
            any.value.len()
        )));
    }
    if any.type_url.is_empty() && any.value.is_empty() {
        return Ok(Decoded::Layer(Layer::default()));
    }
    if is(any.type_url, OURS) {
        ours(any.value).map(Decoded::Layer)
    } else if is(any.type_url, RUNTIME_OPTIONS) || is(any.type_url, CRI_RUNTIME_OPTIONS) {
        runtime_options(any.value)
    } else if is(any.type_url, RUNC) {
        runc(any.value).map(Decoded::Layer)
    } else if is(any.type_url, RUNC_FIRST) {
        runc_first(any.value).map(Decoded::Layer)
    } else {
        Err(Error::invalid(format!(
            "unknown type {} of runtime options; known are {OURS}, {RUNTIME_OPTIONS} and {RUNC}",
            Quoted(any.type_url)
        )))
    }
}

/// Whether a type URL names options that [`decode`] takes.
pub(super) fn is_known(type_url: &str) -> bool {
    [OURS, RUNTIME_OPTIONS, CRI_RUNTIME_OPTIONS, RUNC, RUNC_FIRST]
        .iter()
        .any(|name| is(type_url, name))
}

/// Whether a type URL names a message: bare, or behind a host (`types.containerd.io/…`); with dots, or with slashes as containerd's
/// registry of types joins names.
fn is(type_url: &str, name: &str) -> bool {
    let ends = |name: &str| {
        type_url
            .strip_suffix(name)
            .is_some_and(|host| host.is_empty() || host.ends_with('/'))
    };
    ends(name) || ends(&name.replace('.', "/"))
}

fn undecodable(name: &str) -> Error {
    Error::invalid(format!("runtime options are not a {name}"))
}

fn ours(value: &[u8]) -> Result<Layer> {
    let mut layer = Layer::decode(value).map_err(|e| undecodable(OURS).with_source(e))?;
    // prost skips what it does not know; a message without fields keeps all of it.
    let fields = Empty::parse_from_bytes(value).map_err(|e| undecodable(OURS).with_source(e))?;
    let known = |number: u32| KEYS.iter().any(|key| key.number == number);
    let unknown = fields
        .special_fields
        .unknown_fields()
        .iter()
        .find(|(number, _): &(u32, UnknownValueRef<'_>)| !known(*number));
    if let Some((number, _)) = unknown {
        return Err(Error::invalid(format!(
            "unknown field {number} in runtime options {OURS}; update this shim, or leave the field out"
        )));
    }
    keys::check(&mut layer, "the runtime options")?;
    Ok(layer)
}

fn runtime_options(value: &[u8]) -> Result<Decoded> {
    let options =
        proto::runtimeoptions::Options::decode(value).map_err(|e| undecodable(RUNTIME_OPTIONS).with_source(e))?;
    if !options.config_body.is_empty() {
        let toml = std::str::from_utf8(&options.config_body)
            .map_err(|e| Error::invalid("config_body of the runtime options is not UTF-8").with_source(e))?;
        return file::parse_bare(&Text {
            origin: "config_body of the runtime options",
            toml,
        })
        .map(Decoded::Layer);
    }
    if options.config_path.is_empty() {
        return Ok(Decoded::Layer(Layer::default()));
    }
    let path = Path::new(&options.config_path);
    if !path.is_absolute() || options.config_path.contains('\0') {
        return Err(Error::invalid(format!(
            "config_path {} of the runtime options is not an absolute path",
            Quoted(&options.config_path)
        )));
    }
    Ok(Decoded::File(path.into()))
}

/// The fields of `containerd.linux.runc.CreateOptions` that decide something here (containerd: api/types/runc, runctypes).
#[derive(Clone, PartialEq, prost::Message)]
struct CreateOptions {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "8")]
    no_new_keyring: bool,
    #[prost(string, tag = "9")]
    shim_cgroup: String,
    #[prost(uint32, tag = "10")]
    io_uid: u32,
    #[prost(uint32, tag = "11")]
    io_gid: u32,
    #[prost(string, tag = "12")]
    criu_work_path: String,
    #[prost(string, tag = "13")]
    criu_image_path: String,
}

fn runc_first(value: &[u8]) -> Result<Layer> {
    let old = CreateOptions::decode(value).map_err(|e| undecodable(RUNC_FIRST).with_source(e))?;
    let same = oci::Options {
        no_pivot_root: old.no_pivot_root,
        no_new_keyring: old.no_new_keyring,
        shim_cgroup: old.shim_cgroup,
        io_uid: old.io_uid,
        io_gid: old.io_gid,
        criu_work_path: old.criu_work_path,
        criu_image_path: old.criu_image_path,
        ..oci::Options::default()
    };
    runc_layer(same)
}

/// The options of containerd's runc shim. In this message unset, empty, zero and false are the same: not set.
///
/// `criu_path` (crun has CRIU as a library), `task_api_address` and `task_api_version` (read by containerd itself) decide nothing
/// here. Fields newer than this crate are runc's business.
fn runc(value: &[u8]) -> Result<Layer> {
    runc_layer(oci::Options::parse_from_bytes(value).map_err(|e| undecodable(RUNC).with_source(e))?)
}

fn runc_layer(options: oci::Options) -> Result<Layer> {
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let flag = |flag: bool| flag.then_some(true);
    let id = |id: u32| Some(id).filter(|id| *id != 0);
    keys::refuse_runc(&options.binary_name).map_err(Error::invalid)?;
    let mut layer = Layer {
        crun_binary: text(options.binary_name),
        crun_root: text(options.root),
        systemd_cgroup: flag(options.systemd_cgroup),
        no_pivot_root: flag(options.no_pivot_root),
        no_new_keyring: flag(options.no_new_keyring),
        shim_cgroup: text(options.shim_cgroup),
        io_uid: id(options.io_uid),
        io_gid: id(options.io_gid),
        criu_image_path: text(options.criu_image_path),
        criu_work_path: text(options.criu_work_path),
        ..Layer::default()
    };
    keys::check(&mut layer, "the runtime options of runc")?;
    Ok(layer)
}
