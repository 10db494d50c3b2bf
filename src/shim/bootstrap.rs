//! What containerd tells `start` on stdin, and the form in which it wants the answer.
//!
//! | containerd | stdin | answer |
//! | --- | --- | --- |
//! | 1.6 | runtime options (`Any`) or nothing | the address, as plain text |
//! | 1.7 to 2.2 (`MAX_SHIM_VERSION=2`) | runtime options (`Any`) or nothing | JSON, version 2 |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! Nothing tells 1.7, which refuses version 3, from 2.0 to 2.2, which take both: all of them set `MAX_SHIM_VERSION=2`. So the
//! number is taken at its word. Nothing is lost by it: both versions of the task service are the same handlers.
//!
//! containerd 2.3 does not announce its protocol anywhere; like its own shims, the payload is tried as `BootstrapParams`, and
//! believed if id and namespace are those of the command line.

use std::{
    os::fd::BorrowedFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    protobuf::{Enum as _, Message as _, well_known_types::any::Any},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::args::Flags;
use crate::{
    config,
    error::{Context, Error, Result},
};

/// Upper bound of what is read from stdin; containerd's own shims have the same.
const INPUT_MAX_BYTES: usize = 10 << 20;

/// How long a caller may stay silent before it is taken for one that has nothing to say and leaves stdin open. containerd writes at
/// once or hands over `/dev/null`; even a payload that comes later than this does no harm: every containerd takes the older answers.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a caller that began to write may take to close stdin.
const PAYLOAD: Duration = Duration::from_secs(5);

/// The form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// containerd 1.6: the address.
    Plain,
    /// containerd 1.7 to 2.2: JSON with the version of the task service.
    Json {
        /// 2 or 3.
        version: i32,
    },
    /// containerd 2.3 and later.
    Protobuf,
}

/// What the environment of `start` says.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `TTRPC_ADDRESS`.
    pub ttrpc_address: Option<String>,
    /// `GRPC_ADDRESS`.
    pub grpc_address: Option<String>,
    /// `MAX_SHIM_VERSION`.
    pub max_shim_version: Option<String>,
}

/// What `start` was asked, whatever the form.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// How to answer.
    pub form: Form,
    /// containerd's gRPC socket.
    pub address: String,
    /// Where events are sent; `None` when nobody said so.
    pub ttrpc_address: Option<String>,
    /// Folder for the shim's socket; `None` for the usual one.
    pub socket_dir: Option<PathBuf>,
    /// Log debug messages.
    pub debug: bool,
    /// Runtime options and other extensions, undecoded.
    pub extensions: Vec<Any>,
}

impl Request {
    /// The runtime options among the extensions; empty if there are none.
    pub fn options(&self) -> config::Any<'_> {
        let mut extensions = self.extensions.iter().map(parts);
        match self.form {
            // Nothing else than options can be meant, so what is not known is refused by name.
            Form::Plain | Form::Json { .. } => extensions.next(),
            Form::Protobuf => extensions.find(config::Any::is_known),
        }
        .unwrap_or_default()
    }
}

/// An `Any` as [`config`] takes it.
pub fn parts(any: &Any) -> config::Any<'_> {
    config::Any {
        type_url: &any.type_url,
        value: &any.value,
    }
}

/// Reads stdin until its end, bounded in size and time; a terminal is not read.
///
/// # Errors
/// `InvalidArgument` when there is more than 10 MiB, `DeadlineExceeded` when a payload begins and does not end.
pub fn read_stdin(stdin: BorrowedFd<'_>) -> Result<Vec<u8>> {
    read_until(stdin, SILENCE, PAYLOAD)
}

fn read_until(stdin: BorrowedFd<'_>, silence: Duration, payload: Duration) -> Result<Vec<u8>> {
    let mut input = Vec::new();
    if nix::unistd::isatty(stdin).unwrap_or(false) {
        return Ok(input);
    }
    let mut deadline = Instant::now() + silence;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdin, PollFlags::POLLIN)], timeout) {
            Ok(0) if input.is_empty() => return Ok(input),
            Ok(0) => return Err(Error::deadline("stdin was not closed after the bootstrap parameters")),
            Err(Errno::EINTR) => continue,
            other => other.context(|| "cannot wait for stdin")?,
        };
        match nix::unistd::read(stdin, &mut buffer) {
            Ok(0) => return Ok(input),
            Ok(n) => {
                if input.is_empty() {
                    deadline = Instant::now() + payload;
                }
                input.extend_from_slice(&buffer[..n]);
                if input.len() > INPUT_MAX_BYTES {
                    return Err(Error::invalid(format!("stdin has more than {INPUT_MAX_BYTES} bytes")));
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // Closed, or opened for writing only: nobody can have said anything.
            Err(Errno::EBADF) => return Ok(input),
            Err(e) => return Err(e).context(|| "cannot read stdin"),
        }
    }
}

/// Makes sense of stdin, flags and environment.
///
/// # Errors
/// `InvalidArgument` when stdin carries parameters for another container, or a `MAX_SHIM_VERSION` that is no number.
pub fn decode(input: &[u8], flags: &Flags, environment: &Environment) -> Result<Request> {
    if let Some(params) = params(input, flags)? {
        return Ok(Request {
            form: Form::Protobuf,
            address: some(params.containerd_grpc_address).unwrap_or_else(|| flags.address.clone()),
            ttrpc_address: some(params.containerd_ttrpc_address).or(environment.ttrpc_address.clone().and_then(some)),
            socket_dir: params.socket_dir.and_then(some).map(PathBuf::from),
            debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
            extensions: params
                .extensions
                .into_iter()
                .filter_map(|e| e.value.into_option())
                .collect(),
        });
    }
    let form = match environment.max_shim_version.as_deref() {
        None | Some("") => Form::Plain,
        Some(text) => match text.parse::<i32>() {
            Ok(version) if version >= 3 => Form::Json { version: 3 },
            Ok(2) => Form::Json { version: 2 },
            _ => {
                return Err(Error::invalid(format!(
                    "MAX_SHIM_VERSION {text:?} is not supported; this shim speaks 2 and 3"
                )));
            }
        },
    };
    Ok(Request {
        form,
        address: some(flags.address.clone())
            .or(environment.grpc_address.clone())
            .unwrap_or_default(),
        ttrpc_address: environment.ttrpc_address.clone().and_then(some),
        socket_dir: None,
        debug: flags.debug,
        extensions: options(input).into_iter().collect(),
    })
}

/// The runtime options that a legacy caller pipes in. A payload that is no `Any` is nobody's options.
pub fn options(input: &[u8]) -> Option<Any> {
    Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty())
}

fn params(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>> {
    if input.is_empty() {
        return Ok(None);
    }
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    // The `Any` of a legacy caller decodes too, its type as the id and its value as the namespace. Whatever sets more than these
    // two is meant for another container.
    let mut rest = params.clone();
    rest.instance_id.clear();
    rest.namespace.clear();
    if rest == BootstrapParams::default() {
        return Ok(None);
    }
    Err(Error::invalid(format!(
        "stdin has bootstrap parameters for {:?} in namespace {:?}, the flags name {:?} in {:?}",
        params.instance_id, params.namespace, flags.id, flags.namespace
    )))
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Writes down the answer.
///
/// # Errors
/// `Unknown` when the protobuf encoder fails.
pub fn encode(form: Form, address: &str) -> Result<Vec<u8>> {
    match form {
        Form::Plain => Ok(address.as_bytes().to_vec()),
        Form::Json { version } => Ok(serde_json::json!({
            "version": version,
            "address": address,
            "protocol": "ttrpc",
        })
        .to_string()
        .into_bytes()),
        Form::Protobuf => BootstrapResult {
            version: 3,
            address: address.into(),
            protocol: "ttrpc".into(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(|e| Error::unknown("cannot encode the bootstrap result").with_source(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use containerd_shim_protos::{bootstrap_api::Extension, protobuf::EnumOrUnknown};
    use proptest::prelude::*;

    use super::*;

    fn flags() -> Flags {
        Flags {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn environment(max: Option<&str>) -> Environment {
        Environment {
            ttrpc_address: Some("/run/c.sock.ttrpc".into()),
            grpc_address: None,
            max_shim_version: max.map(Into::into),
        }
    }

    fn runc_any() -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            // shim_cgroup = "/shims"
            value: b"\x1a\x06/shims".to_vec(),
            ..Default::default()
        }
    }

    fn sent() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_TRACE),
            containerd_version: "v2.3.0".into(),
            containerd_ttrpc_address: "/run/other.ttrpc".into(),
            containerd_grpc_address: "/run/other".into(),
            socket_dir: Some("/run/s".into()),
            extensions: vec![Extension {
                value: Some(runc_any()).into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn each_containerd_gets_the_answer_that_it_reads() {
        let any = runc_any().write_to_bytes().unwrap();
        let params = sent().write_to_bytes().unwrap();
        let json2 = r#"{"address":"unix:///s","protocol":"ttrpc","version":2}"#;
        let json3 = r#"{"address":"unix:///s","protocol":"ttrpc","version":3}"#;
        let protobuf = "\x08\x03\x12\x09unix:///s\x1a\x05ttrpc";
        for (release, input, max, answer) in [
            ("1.6, no options", &b""[..], None, "unix:///s"),
            ("1.6, options", &any, None, "unix:///s"),
            ("1.7 to 2.2, no options", b"", Some("2"), json2),
            ("1.7 to 2.2, options", &any, Some("2"), json2),
            ("a caller that takes 3", b"", Some("3"), json3),
            ("a later one", b"", Some("4"), json3),
            ("2.3", &params, Some("2"), protobuf),
            ("2.3 without the variable", &params, None, protobuf),
            ("bytes that are nothing", b"\xff\xff\xff", Some("2"), json2),
        ] {
            let request = decode(input, &flags(), &environment(max)).unwrap();
            let reply = encode(request.form, "unix:///s").unwrap();
            assert_eq!(String::from_utf8(reply).unwrap(), answer, "{release}");
        }
    }

    #[test]
    fn both_protocols_say_the_same_things() {
        let legacy = decode(&runc_any().write_to_bytes().unwrap(), &flags(), &environment(None)).unwrap();
        assert_eq!(legacy.extensions, [runc_any()]);
        assert_eq!(legacy.address, "/run/c.sock");
        assert_eq!(legacy.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        assert!(!legacy.debug);

        let request = decode(&sent().write_to_bytes().unwrap(), &flags(), &environment(None)).unwrap();
        assert_eq!(request.extensions, [runc_any()]);
        assert_eq!(request.address, "/run/other");
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/other.ttrpc"));
        assert_eq!(request.socket_dir, Some("/run/s".into()));
        assert!(request.debug);
    }

    #[test]
    fn runtime_options_are_found_among_other_extensions() {
        let mut params = sent();
        let other = Any {
            type_url: "containerd.io/nri.v1.Options.Other".into(),
            ..Default::default()
        };
        params.extensions.insert(
            0,
            Extension {
                value: Some(other.clone()).into(),
                ..Default::default()
            },
        );
        let request = decode(&params.write_to_bytes().unwrap(), &flags(), &environment(None)).unwrap();
        assert_eq!(request.options().type_url, "containerd.runc.v1.Options");
        let request = decode(&other.write_to_bytes().unwrap(), &flags(), &environment(None)).unwrap();
        assert_eq!(request.options().type_url, other.type_url);
        let request = decode(b"", &flags(), &environment(None)).unwrap();
        assert_eq!(request.options().type_url, "");
    }

    #[test]
    fn a_missing_ttrpc_address_is_looked_for_and_then_done_without() {
        let mut params = sent();
        params.containerd_ttrpc_address.clear();
        let input = params.write_to_bytes().unwrap();
        let request = decode(&input, &flags(), &environment(None)).unwrap();
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        let request = decode(&input, &flags(), &Environment::default()).unwrap();
        assert_eq!(request.ttrpc_address, None);
    }

    #[test]
    fn parameters_of_another_container_are_refused() {
        let mut params = sent();
        params.instance_id = "xyz".into();
        let error = decode(&params.write_to_bytes().unwrap(), &flags(), &environment(None)).unwrap_err();
        assert!(error.to_string().contains("\"xyz\""), "{error}");
        let error = decode(b"", &flags(), &environment(Some("1"))).unwrap_err();
        assert!(error.to_string().contains("MAX_SHIM_VERSION \"1\""), "{error}");
    }

    #[test]
    fn stdin_is_read_to_its_end() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let payload = vec![7; 100_000];
        let sender = std::thread::spawn(move || writer.write_all(&payload).map(|()| payload));
        let input = read_stdin(reader.as_fd()).unwrap();
        assert_eq!(input, sender.join().unwrap().unwrap());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(read_stdin(null.as_fd()).unwrap().is_empty());
    }

    #[test]
    fn a_stdin_that_stays_open_does_not_hold_up_anybody() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let bound = Duration::from_millis(20);
        assert!(read_until(reader.as_fd(), bound, bound).unwrap().is_empty());
        writer.write_all(b"x").unwrap();
        let error = read_until(reader.as_fd(), Duration::from_secs(60), bound).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::DeadlineExceeded);
    }

    #[test]
    fn a_stdin_without_end_is_refused() {
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let error = read_stdin(zero.as_fd()).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::InvalidArgument);
    }

    proptest! {
        #[test]
        fn no_input_panics(input in prop::collection::vec(any::<u8>(), 0..200), max in prop::option::of(".{0,3}")) {
            let _ = decode(&input, &flags(), &environment(max.as_deref()));
        }

        #[test]
        fn no_damaged_parameters_panic(at in 0usize..200, byte in any::<u8>()) {
            let mut input = sent().write_to_bytes().unwrap();
            let at = at % input.len();
            input[at] = byte;
            let _ = decode(&input, &flags(), &environment(None));
        }
    }
}
