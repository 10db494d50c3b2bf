//! The keys: one table, by which every source is read, merged and checked.

use std::{fmt, path::Path};

use super::BACKENDS;
use crate::error::{Error, Result};

/// What one source says; a field that it does not name is `None`.
pub(super) type Layer = super::proto::proxmoxlxcri::Options;

/// Bounds of `runtime_timeout_ms`. Less than a second fails calls on a busy node, more than an hour is no bound.
const RUNTIME_TIMEOUT_MS: (u64, u64) = (1_000, 3_600_000);

/// Bounds of `drain_timeout_ms`. Delete waits for the drain, and its clients give up soon after ten seconds.
const DRAIN_TIMEOUT_MS: (u64, u64) = (0, 10_000);

/// Longest value that is taken; paths in Linux are shorter than this (PATH_MAX).
const TEXT_MAX_BYTES: usize = 4096;

/// A value as a source spells it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Text(&'a str),
    Flag(bool),
    Number(u64),
    /// Something that no key takes, by the name of its type.
    Other(&'static str),
}

impl Value<'_> {
    /// Whether it is what runc's options have where nothing was set.
    pub(super) fn is_unset(&self) -> bool {
        matches!(self, Self::Text("") | Self::Flag(false) | Self::Number(0))
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "string",
            Self::Flag(_) => "boolean",
            Self::Number(_) => "integer",
            Self::Other(name) => name,
        }
    }
}

type Check = fn(&str) -> Result<(), String>;

/// Where a key's value lives in a [`Layer`], and what it may be.
enum Slot {
    Text(fn(&mut Layer) -> &mut Option<String>, Check),
    Flag(fn(&mut Layer) -> &mut Option<bool>),
    /// A uid or gid.
    Owner(fn(&mut Layer) -> &mut Option<u32>),
    Millis(fn(&mut Layer) -> &mut Option<u64>, (u64, u64)),
}

/// One option that every source may set.
pub(super) struct Key {
    /// The name in all sources.
    pub(super) name: &'static str,
    /// The field number in `proto/options.proto`.
    pub(super) number: u32,
    /// Whether the author of a pod may set it by annotation when `[annotations] allow` says nothing: it can hurt nobody else.
    pub(super) safe: bool,
    slot: Slot,
}

const fn key(number: u32, name: &'static str, slot: Slot) -> Key {
    Key {
        name,
        number,
        safe: false,
        slot,
    }
}

const fn safe(key: Key) -> Key {
    Key { safe: true, ..key }
}

/// All keys, in the order of their field numbers.
pub(super) static KEYS: [Key; 15] = [
    safe(key(1, "backend", Slot::Text(|l| &mut l.backend, backend))),
    key(2, "crun_binary", Slot::Text(|l| &mut l.crun_binary, program)),
    key(3, "crun_root", Slot::Text(|l| &mut l.crun_root, folder)),
    key(4, "systemd_cgroup", Slot::Flag(|l| &mut l.systemd_cgroup)),
    key(5, "no_pivot_root", Slot::Flag(|l| &mut l.no_pivot_root)),
    key(6, "no_new_keyring", Slot::Flag(|l| &mut l.no_new_keyring)),
    key(7, "shim_cgroup", Slot::Text(|l| &mut l.shim_cgroup, cgroup)),
    key(8, "io_uid", Slot::Owner(|l| &mut l.io_uid)),
    key(9, "io_gid", Slot::Owner(|l| &mut l.io_gid)),
    key(10, "criu_image_path", Slot::Text(|l| &mut l.criu_image_path, folder)),
    key(11, "criu_work_path", Slot::Text(|l| &mut l.criu_work_path, folder)),
    key(
        12,
        "runtime_timeout_ms",
        Slot::Millis(|l| &mut l.runtime_timeout_ms, RUNTIME_TIMEOUT_MS),
    ),
    safe(key(
        13,
        "drain_timeout_ms",
        Slot::Millis(|l| &mut l.drain_timeout_ms, DRAIN_TIMEOUT_MS),
    )),
    key(14, "crun_debug", Slot::Flag(|l| &mut l.crun_debug)),
    key(15, "lxc_path", Slot::Text(|l| &mut l.lxc_path, folder)),
];

/// runc's options by their names in containerd's file, and our keys for them. Without one they decide nothing here: crun has CRIU as a
/// library, and the rest is read by containerd itself.
const OF_RUNC: [(&str, Option<&str>); 13] = [
    ("BinaryName", Some("crun_binary")),
    ("Root", Some("crun_root")),
    ("SystemdCgroup", Some("systemd_cgroup")),
    ("NoPivotRoot", Some("no_pivot_root")),
    ("NoNewKeyring", Some("no_new_keyring")),
    ("ShimCgroup", Some("shim_cgroup")),
    ("IoUid", Some("io_uid")),
    ("IoGid", Some("io_gid")),
    ("CriuImagePath", Some("criu_image_path")),
    ("CriuWorkPath", Some("criu_work_path")),
    ("CriuPath", None),
    ("TaskApiAddress", None),
    ("TaskApiVersion", None),
];

/// Whether `name` is an option of runc in containerd's file, and the key that it sets.
pub(super) fn of_runc(name: &str) -> Option<Option<&'static Key>> {
    let (_, key) = OF_RUNC.iter().find(|(runcs, _)| *runcs == name)?;
    Some(key.and_then(Key::find))
}

/// Refuses runc where it was named as the program: this runtime drives crun, and a silent exchange would hide it.
pub(super) fn refuse_runc(binary: &str) -> Result<(), String> {
    if Path::new(binary).file_name().is_some_and(|name| name == "runc") {
        return Err(format!(
            "BinaryName {} names runc, but this runtime runs containers by crun; leave BinaryName out, or set it to crun",
            Quoted(binary)
        ));
    }
    Ok(())
}

impl Key {
    /// The key of that name.
    pub(super) fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Checks `value` and writes it into `layer`; the error is the sentence's end: "must be …".
    pub(super) fn set(&self, layer: &mut Layer, value: Value<'_>) -> Result<(), String> {
        match (&self.slot, value) {
            (Slot::Text(slot, check), Value::Text(text)) => {
                if text.len() > TEXT_MAX_BYTES {
                    return Err(format!(
                        "must be at most {TEXT_MAX_BYTES} bytes long, not {}",
                        text.len()
                    ));
                }
                if text.contains('\0') {
                    return Err("must not contain NUL".into());
                }
                check(text)?;
                *slot(layer) = Some(text.into());
            }
            (Slot::Flag(slot), Value::Flag(flag)) => *slot(layer) = Some(flag),
            (Slot::Owner(slot), Value::Number(number)) => {
                // chown(2) takes the highest id for "leave as it is".
                let id = u32::try_from(number).ok().filter(|id| *id != u32::MAX);
                let id = id.ok_or_else(|| format!("must be an id from 0 to {}, not {number}", u32::MAX - 1))?;
                *slot(layer) = Some(id);
            }
            (Slot::Millis(slot, (least, most)), Value::Number(number)) => {
                if !(*least..=*most).contains(&number) {
                    return Err(format!("must be {least} to {most} milliseconds, not {number}"));
                }
                *slot(layer) = Some(number);
            }
            (slot, other) => {
                let wanted = match slot {
                    Slot::Text(..) => "a string",
                    Slot::Flag(_) => "true or false",
                    Slot::Owner(_) | Slot::Millis(..) => "a whole number that is not negative",
                };
                return Err(format!("must be {wanted}, not of type {}", other.type_name()));
            }
        }
        Ok(())
    }

    /// As [`Key::set`], from the text of an annotation.
    pub(super) fn set_text(&self, layer: &mut Layer, text: &str) -> Result<(), String> {
        let value = match self.slot {
            Slot::Text(..) => Value::Text(text),
            Slot::Flag(_) => match text {
                "true" => Value::Flag(true),
                "false" => Value::Flag(false),
                _ => return Err(format!("must be true or false, not {}", Quoted(text))),
            },
            Slot::Owner(_) | Slot::Millis(..) => {
                let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                match text.parse() {
                    Ok(number) if digits => Value::Number(number),
                    _ => return Err(format!("must be a whole number, not {}", Quoted(text))),
                }
            }
        };
        self.set(layer, value)
    }

    /// Checks what `layer` holds for this key, as if it were set now.
    fn check(&self, layer: &mut Layer) -> Result<(), String> {
        match &self.slot {
            Slot::Text(slot, _) => match slot(layer).take() {
                Some(text) => self.set(layer, Value::Text(&text)),
                None => Ok(()),
            },
            Slot::Owner(slot) => match *slot(layer) {
                Some(id) => self.set(layer, Value::Number(id.into())),
                None => Ok(()),
            },
            Slot::Millis(slot, _) => match *slot(layer) {
                Some(number) => self.set(layer, Value::Number(number)),
                None => Ok(()),
            },
            Slot::Flag(_) => Ok(()),
        }
    }

    fn fill(&self, upper: &mut Layer, lower: &mut Layer) {
        fn take<T>(upper: &mut Option<T>, lower: &mut Option<T>) {
            if upper.is_none() {
                *upper = lower.take();
            }
        }
        match self.slot {
            Slot::Text(slot, _) => take(slot(upper), slot(lower)),
            Slot::Flag(slot) => take(slot(upper), slot(lower)),
            Slot::Owner(slot) => take(slot(upper), slot(lower)),
            Slot::Millis(slot, _) => take(slot(upper), slot(lower)),
        }
    }
}

/// Checks a layer that came as a whole, from `origin`.
pub(super) fn check(layer: &mut Layer, origin: &str) -> Result<()> {
    for key in &KEYS {
        key.check(layer)
            .map_err(|problem| Error::invalid(format!("option {} in {origin} {problem}", key.name)))?;
    }
    Ok(())
}

/// Fills the fields that `upper` leaves open from `lower`.
pub(super) fn fill(upper: &mut Layer, mut lower: Layer) {
    for key in &KEYS {
        key.fill(upper, &mut lower);
    }
}

/// The error about a key that nobody knows, in `place`.
///
/// A key that looks like a secret gets its own text, because a secret in these places is readable by others: annotations and options
/// are stored by containerd and Kubernetes, and show up in their output.
pub(super) fn unknown(name: &str, place: &str) -> Error {
    let plain: String = name
        .chars()
        .filter(|c| c.is_ascii_alphanumeric())
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let secret = ["token", "passw", "secret", "credential", "apikey", "privatekey"];
    if secret.iter().any(|word| plain.contains(word)) {
        return Error::invalid(format!(
            "key {} in {place} looks like a secret: options, annotations and the configuration are no place for one; keep it in a \
             file of its own, owned by root, mode 0600",
            Quoted(name)
        ));
    }
    let meant = match plain.as_str() {
        "binaryname" => Some("crun_binary"),
        "root" => Some("crun_root"),
        _ => KEYS
            .iter()
            .map(|key| key.name)
            .find(|key| key.replace('_', "") == plain),
    };
    let hint = match meant {
        Some(key) => format!("did you mean {key}?"),
        None => {
            let names: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
            format!("known are {}", names.join(", "))
        }
    };
    Error::invalid(format!("unknown key {} in {place}; {hint}", Quoted(name)))
}

/// A foreign text in an error: in quotes, escaped, and never longer than a line.
pub(super) struct Quoted<'a>(pub(super) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_CHARS: usize = 80;
        match self.0.char_indices().nth(MAX_CHARS) {
            Some((end, _)) => write!(f, "{:?}…", &self.0[..end]),
            None => write!(f, "{:?}", self.0),
        }
    }
}

fn backend(text: &str) -> Result<(), String> {
    if BACKENDS.contains(&text) {
        return Ok(());
    }
    Err(format!("must be one of {}, not {}", BACKENDS.join(", "), Quoted(text)))
}

fn program(text: &str) -> Result<(), String> {
    let name = !text.is_empty() && !text.contains('/') && text != "." && text != "..";
    if name || (text.starts_with('/') && !text.ends_with('/') && is_plain(text)) {
        return Ok(());
    }
    Err(format!(
        "must be the name of a program in PATH or an absolute path without \"..\", not {}",
        Quoted(text)
    ))
}

fn folder(text: &str) -> Result<(), String> {
    if text.starts_with('/') && text != "/" && is_plain(text) {
        return Ok(());
    }
    Err(format!("must be an absolute path without \"..\", not {}", Quoted(text)))
}

fn cgroup(text: &str) -> Result<(), String> {
    if is_plain(text) {
        return Ok(());
    }
    Err(format!(
        "must be the path of a cgroup without \"..\", not {}",
        Quoted(text)
    ))
}

/// No component that leads elsewhere.
fn is_plain(path: &str) -> bool {
    !Path::new(path)
        .components()
        .any(|part| matches!(part, std::path::Component::ParentDir))
}
