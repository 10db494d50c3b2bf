//! The command line, in the syntax of Go's `flag` package, because that is what containerd was written against.

use std::{ffi::OsString, path::PathBuf};

use crate::error::{Error, Result};

/// What the program is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `-h`, `-help`: print [`HELP`].
    Help,
    /// `-v`, `-version`: print the version.
    Version,
    /// `-info`: print what this runtime is able to do.
    Info,
    /// `start`: find or start the shim of a container's group and print its address.
    Start,
    /// `delete`: clean up after a shim that died.
    Delete,
    /// No action: be the shim. Only `start` calls the program like this.
    Serve,
}

/// The command line of one call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container, for a server the first container of its group.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-publish-binary`: containerd's own program; accepted, events go over ttrpc.
    pub publish_binary: String,
    /// `-bundle`: the bundle, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// `-debug`: log debug messages.
    pub debug: bool,
}

/// The text of `-h`.
pub const HELP: &str = "\
containerd-shim-proxmox-lxcri-v1: runtime io.containerd.proxmox-lxcri.v1 of containerd

containerd runs this program by itself. To use it, name the runtime:
  ctr run --runtime io.containerd.proxmox-lxcri.v1 IMAGE ID
  nerdctl run --runtime io.containerd.proxmox-lxcri.v1 IMAGE
  CRI: runtime_type = \"io.containerd.proxmox-lxcri.v1\" and a RuntimeClass

usage: containerd-shim-proxmox-lxcri-v1 [flags] start|delete
  start   find or start the shim of the bundle in the working directory, print its address
  delete  clean up after a shim that died, print a DeleteResponse (protobuf)

flags (-flag value, -flag=value or --flag value)
  -namespace NAME        namespace of containerd that owns the container
  -id ID                 id of the container
  -address PATH          gRPC socket of containerd
  -publish-binary PATH   accepted for containerd; events go to TTRPC_ADDRESS
  -bundle PATH           bundle, if it is not the working directory (delete)
  -debug                 log debug messages to the fifo <bundle>/log
  -info                  read runtime options (protobuf) from stdin, print RuntimeInfo (protobuf)
  -v, -version           print the version
  -h, -help              print this text

environment, inherited from containerd
  TTRPC_ADDRESS          where events are sent
  MAX_SHIM_VERSION       the newest form of answer that containerd understands
  SCHED_CORE             give the shim and its containers a core-scheduling domain of their own
  PROXMOX_LXCRI_CONFIG   configuration file, instead of /etc/proxmox-lxcri/config.toml

manual: containerd-shim-proxmox-lxcri-v1(8)
";

/// Parses the arguments after the program's name. Flags end at the first word that is not one; what follows the action is ignored,
/// as Go shims do.
///
/// # Errors
/// `InvalidArgument` with the offending flag or action, or the flag that `start` and `delete` miss.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<(Action, Flags)> {
    let mut flags = Flags::default();
    let (mut help, mut version, mut info) = (false, false, false);
    let mut args = args.into_iter();
    let mut positional = None;
    while let Some(arg) = args.next() {
        let arg = utf8(arg)?;
        let Some(flag) = arg.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            positional = Some(arg);
            break;
        };
        if flag == "-" {
            positional = args.next().map(utf8).transpose()?;
            break;
        }
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "h" | "help" => help = boolean(name, inline)?,
            "v" | "version" => version = boolean(name, inline)?,
            "info" => info = boolean(name, inline)?,
            "debug" => flags.debug = boolean(name, inline)?,
            "namespace" | "id" | "address" | "publish-binary" | "bundle" => {
                let value = match inline {
                    Some(value) => value,
                    None => utf8(
                        args.next()
                            .ok_or_else(|| Error::invalid(format!("flag -{name} needs a value; see -h")))?,
                    )?,
                };
                match name {
                    "namespace" => flags.namespace = value,
                    "id" => flags.id = value,
                    "address" => flags.address = value,
                    "publish-binary" => flags.publish_binary = value,
                    _ => flags.bundle = Some(value.into()).filter(|path: &PathBuf| !path.as_os_str().is_empty()),
                }
            }
            _ => return Err(Error::invalid(format!("unknown flag {arg:?}; -h lists the flags"))),
        }
    }
    let action = if help {
        Action::Help
    } else if version {
        Action::Version
    } else if info {
        Action::Info
    } else {
        match positional.as_deref() {
            None => Action::Serve,
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "unknown action {other:?}; known are start and delete, see -h"
                )));
            }
        }
    };
    if matches!(action, Action::Start | Action::Delete) {
        for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
            if value.is_empty() {
                return Err(Error::invalid(format!(
                    "flag -{name} is missing; containerd gives it with start and delete, see -h"
                )));
            }
        }
    }
    Ok((action, flags))
}

fn utf8(arg: OsString) -> Result<String> {
    arg.into_string()
        .map_err(|arg| Error::invalid(format!("argument {arg:?} is not UTF-8")))
}

/// The spellings that Go's `strconv.ParseBool` takes.
fn boolean(name: &str, value: Option<String>) -> Result<bool> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(Error::invalid(format!(
            "flag -{name}={other:?} is neither true nor false"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_words(words: &[&str]) -> Result<(Action, Flags)> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn the_calls_of_containerd_are_understood() {
        let (action, flags) = parse_words(&[
            "-namespace",
            "k8s.io",
            "-address",
            "/run/c.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "a",
            "-debug",
            "start",
        ])
        .unwrap();
        assert_eq!(action, Action::Start);
        assert_eq!(
            flags,
            Flags {
                namespace: "k8s.io".into(),
                id: "a".into(),
                address: "/run/c.sock".into(),
                publish_binary: "/usr/bin/containerd".into(),
                bundle: None,
                debug: true,
            }
        );
        let (action, flags) =
            parse_words(&["-namespace", "n", "-id", "a", "-bundle", "/b", "delete", "whatever"]).unwrap();
        assert_eq!((action, flags.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(parse_words(&["-namespace", "n", "-id", "a"]).unwrap().0, Action::Serve);
    }

    #[test]
    fn every_spelling_of_go_flags_is_understood() {
        for words in [&["-id", "x"][..], &["-id=x"], &["--id", "x"], &["--id=x"]] {
            assert_eq!(parse_words(words).unwrap().1.id, "x", "{words:?}");
        }
        assert!(parse_words(&["-debug=T"]).unwrap().1.debug);
        assert!(!parse_words(&["-debug", "-debug=0"]).unwrap().1.debug);
        assert_eq!(parse_words(&["-id", "-x"]).unwrap().1.id, "-x");
        assert_eq!(parse_words(&["-id="]).unwrap().1.id, "");
        let ended_by_dashes = ["-namespace", "n", "-id", "x", "--", "start", "-x"];
        assert_eq!(parse_words(&ended_by_dashes).unwrap().0, Action::Start);
        for (word, action) in [
            ("-h", Action::Help),
            ("--help", Action::Help),
            ("-v", Action::Version),
            ("-version", Action::Version),
            ("-info", Action::Info),
        ] {
            assert_eq!(parse_words(&[word]).unwrap().0, action, "{word}");
        }
    }

    #[test]
    fn a_wrong_command_line_is_named() {
        for (words, text) in [
            (&["-wrong"][..], "unknown flag \"-wrong\""),
            (&["-id"], "flag -id needs a value"),
            (&["-debug=maybe"], "neither true nor false"),
            (&["run"], "unknown action \"run\""),
            (&["start"], "flag -namespace is missing"),
            (&["-namespace", "n", "-id", "", "delete"], "flag -id is missing"),
            (&["-"], "unknown action \"-\""),
        ] {
            let error = parse_words(words).unwrap_err().to_string();
            assert!(error.contains(text), "{words:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_command_line_panics(words in prop::collection::vec("-{0,3}[a-z=\u{0}é -]{0,12}", 0..8)) {
            let _ = parse(words.into_iter().map(OsString::from));
        }
    }
}
