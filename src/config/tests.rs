use std::{fs, os::unix::fs::PermissionsExt};

use containerd_shim_protos::{protobuf::Message as _, shim::oci};
use proptest::prelude::*;
use prost::Message as _;
use serde_json::{Value as Json, json};

use super::*;
use crate::error::Kind;

const OURS: &str = "proxmoxlxcri.v1.Options";
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
const RUNC: &str = "containerd.runc.v1.Options";

/// Two values of a key that differ from each other; the first one also from the default.
struct Sample {
    key: &'static str,
    first: Json,
    second: Json,
    /// Sets the key in our protobuf message.
    ours: fn(&mut Layer, &Json),
    /// Sets the key in runc's protobuf message, where it has the key.
    runc: Option<fn(&mut oci::Options, &Json)>,
}

fn text(value: &Json) -> String {
    value.as_str().unwrap().to_owned()
}

fn number(value: &Json) -> u64 {
    value.as_u64().unwrap()
}

fn samples() -> Vec<Sample> {
    let sample = |key, first: Json, second: Json, ours| Sample {
        key,
        first,
        second,
        ours,
        runc: None,
    };
    let mut all = vec![
        sample("backend", json!("lxc"), json!("proxmox-vm"), |l, v| {
            l.backend = Some(text(v));
        }),
        sample("crun_binary", json!("/usr/bin/crun"), json!("crun-1.21"), |l, v| {
            l.crun_binary = Some(text(v));
        }),
        sample("crun_root", json!("/run/a"), json!("/run/b"), |l, v| {
            l.crun_root = Some(text(v));
        }),
        sample("systemd_cgroup", json!(true), json!(false), |l, v| {
            l.systemd_cgroup = v.as_bool();
        }),
        sample("no_pivot_root", json!(true), json!(false), |l, v| {
            l.no_pivot_root = v.as_bool();
        }),
        sample("no_new_keyring", json!(true), json!(false), |l, v| {
            l.no_new_keyring = v.as_bool();
        }),
        sample("shim_cgroup", json!("/shims"), json!("/others"), |l, v| {
            l.shim_cgroup = Some(text(v));
        }),
        sample("io_uid", json!(1000), json!(4_294_967_294_u32), |l, v| {
            l.io_uid = Some(number(v) as u32);
        }),
        sample("io_gid", json!(1001), json!(7), |l, v| {
            l.io_gid = Some(number(v) as u32);
        }),
        sample("criu_image_path", json!("/images"), json!("/var/images"), |l, v| {
            l.criu_image_path = Some(text(v));
        }),
        sample("criu_work_path", json!("/work"), json!("/var/work"), |l, v| {
            l.criu_work_path = Some(text(v));
        }),
        sample("runtime_timeout_ms", json!(1000), json!(3_600_000), |l, v| {
            l.runtime_timeout_ms = v.as_u64();
        }),
        sample("drain_timeout_ms", json!(0), json!(10_000), |l, v| {
            l.drain_timeout_ms = v.as_u64();
        }),
        sample("crun_debug", json!(true), json!(false), |l, v| {
            l.crun_debug = v.as_bool()
        }),
        sample("lxc_path", json!("/srv/lxc"), json!("/run/lxc"), |l, v| {
            l.lxc_path = Some(text(v));
        }),
    ];
    for sample in &mut all {
        sample.runc = match sample.key {
            "crun_binary" => Some(|o, v| o.binary_name = text(v)),
            "crun_root" => Some(|o, v| o.root = text(v)),
            "systemd_cgroup" => Some(|o, v| o.systemd_cgroup = v == true),
            "no_pivot_root" => Some(|o, v| o.no_pivot_root = v == true),
            "no_new_keyring" => Some(|o, v| o.no_new_keyring = v == true),
            "shim_cgroup" => Some(|o, v| o.shim_cgroup = text(v)),
            "io_uid" => Some(|o, v| o.io_uid = number(v) as u32),
            "io_gid" => Some(|o, v| o.io_gid = number(v) as u32),
            "criu_image_path" => Some(|o, v| o.criu_image_path = text(v)),
            "criu_work_path" => Some(|o, v| o.criu_work_path = text(v)),
            _ => None,
        };
    }
    all
}

/// Sources that own their texts.
#[derive(Default)]
struct Given {
    type_url: String,
    value: Vec<u8>,
    runtime_file: Option<String>,
    annotations: BTreeMap<String, String>,
    cgroups_path: Option<String>,
    file: Option<String>,
}

impl Given {
    fn file(text: &str) -> Self {
        Self {
            file: Some(text.into()),
            ..Self::default()
        }
    }

    fn any(type_url: &str, value: Vec<u8>) -> Self {
        Self {
            type_url: type_url.into(),
            value,
            ..Self::default()
        }
    }

    fn body(toml: &str) -> Self {
        Self::any(RUNTIME_OPTIONS, runtime_options("", toml))
    }

    fn annotation(key: &str, value: &str) -> Self {
        Self::default().with(key, value)
    }

    fn with(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    fn resolve(&self) -> Result<Options> {
        resolve(&Sources {
            runtime: Any {
                type_url: &self.type_url,
                value: &self.value,
            },
            runtime_file: self.runtime_file.as_deref().map(|toml| Text {
                origin: "/given/options.toml",
                toml,
            }),
            container: Container {
                namespace: "k8s.io",
                id: "c1",
                annotations: &self.annotations,
                cgroups_path: self.cgroups_path.as_deref(),
            },
            file: self.file.as_deref().map(|toml| Text {
                origin: "/given/config.toml",
                toml,
            }),
        })
    }

    /// The text of the error, which must be the client's fault.
    fn refusal(&self) -> String {
        let error = self.resolve().unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
        error.to_string()
    }

    /// Sets one key in one source, beside what is there.
    fn set(&mut self, source: Source, sample: &Sample, value: &Json) {
        let line = format!("{} = {value}\n", sample.key);
        let file = self.file.get_or_insert_with(|| {
            let all: Vec<&str> = samples().iter().map(|sample| sample.key).collect();
            format!("annotations.allow = {all:?}\n")
        });
        match source {
            Source::Ours => {
                let mut layer = Layer::default();
                (sample.ours)(&mut layer, value);
                (self.type_url, self.value) = (OURS.into(), layer.encode_to_vec());
            }
            Source::Runc => {
                let mut options = oci::Options::default();
                (sample.runc.unwrap())(&mut options, value);
                (self.type_url, self.value) = (RUNC.into(), options.write_to_bytes().unwrap());
            }
            Source::Body => {
                (self.type_url, self.value) = (RUNTIME_OPTIONS.into(), runtime_options("", &line));
            }
            Source::Path => {
                (self.type_url, self.value) = (RUNTIME_OPTIONS.into(), runtime_options("/given/options.toml", ""));
                self.runtime_file = Some(line);
            }
            Source::Annotation => {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                self.annotations
                    .insert(format!("{ANNOTATION_PREFIX}{}", sample.key), value);
            }
            Source::Route => file.push_str(&format!("[[route]]\nname = \"c?\"\n{line}")),
            Source::File => file.push_str(&format!("[options]\n{line}")),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Source {
    Ours,
    Runc,
    Body,
    Path,
    Annotation,
    Route,
    File,
}

impl Source {
    const ALL: [Self; 7] = [
        Self::Ours,
        Self::Runc,
        Self::Body,
        Self::Path,
        Self::Annotation,
        Self::Route,
        Self::File,
    ];

    /// A lower rank wins. One request has one of the first four.
    fn rank(self) -> usize {
        match self {
            Self::Ours | Self::Runc | Self::Body | Self::Path => 0,
            Self::Annotation => 1,
            Self::Route => 2,
            Self::File => 3,
        }
    }

    /// Whether this source can say `value` for the key: runc's message has some keys only, and cannot say "false".
    fn can_set(self, sample: &Sample, value: &Json) -> bool {
        self != Self::Runc || (sample.runc.is_some() && *value != json!(false))
    }
}

fn runtime_options(config_path: &str, config_body: &str) -> Vec<u8> {
    proto::runtimeoptions::Options {
        type_url: String::new(),
        config_path: config_path.into(),
        config_body: config_body.into(),
    }
    .encode_to_vec()
}

fn as_json(options: &Options) -> Json {
    serde_json::to_value(options).unwrap()
}

#[test]
fn every_key_can_be_set_by_every_source_and_touches_no_other_key() {
    for sample in samples() {
        for source in Source::ALL {
            if !source.can_set(&sample, &sample.first) {
                continue;
            }
            let mut given = Given::default();
            given.set(source, &sample, &sample.first);
            let mut wanted = as_json(&Options::default());
            wanted[sample.key] = sample.first.clone();
            let found = given
                .resolve()
                .unwrap_or_else(|e| panic!("{} by {source:?}: {e}", sample.key));
            assert_eq!(as_json(&found), wanted, "{} by {source:?}", sample.key);
        }
    }
}

#[test]
fn for_every_key_the_source_that_stands_first_wins() {
    let mut compared = 0;
    for sample in samples() {
        for upper in Source::ALL {
            for lower in Source::ALL.into_iter().filter(|lower| lower.rank() > upper.rank()) {
                for (first, second) in [(&sample.first, &sample.second), (&sample.second, &sample.first)] {
                    if !upper.can_set(&sample, first) {
                        continue;
                    }
                    let mut given = Given::default();
                    given.set(upper, &sample, first);
                    given.set(lower, &sample, second);
                    let found = as_json(&given.resolve().unwrap());
                    assert_eq!(found[sample.key], *first, "{}: {upper:?} over {lower:?}", sample.key);
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 300, "{compared}");
}

#[test]
fn different_keys_come_from_different_sources() {
    let mut given = Given::annotation("io.proxmox-lxcri.drain_timeout_ms", "30");
    given.type_url = OURS.into();
    given.value = Layer {
        crun_binary: Some("/opt/crun".into()),
        ..Layer::default()
    }
    .encode_to_vec();
    given.file = Some("[options]\nio_uid = 4\n[[route]]\nname = 'c*'\nio_gid = 3".into());
    let wanted = Options {
        crun_binary: "/opt/crun".into(),
        drain_timeout_ms: 30,
        io_gid: 3,
        io_uid: 4,
        ..Options::default()
    };
    assert_eq!(given.resolve().unwrap(), wanted);
}

#[test]
fn no_source_at_all_gives_the_defaults() {
    assert_eq!(Given::default().resolve().unwrap(), Options::default());
    for type_url in [OURS, RUNTIME_OPTIONS, RUNC] {
        let given = Given::any(type_url, vec![]);
        assert_eq!(given.resolve().unwrap(), Options::default(), "{type_url}");
    }
    assert_eq!(Given::file("").resolve().unwrap(), Options::default());
}

#[test]
fn the_table_of_keys_the_message_the_example_and_the_documents_agree() {
    let keys: Vec<(String, u32)> = keys::KEYS.iter().map(|key| (key.name.into(), key.number)).collect();

    let proto: Vec<(String, u32)> = include_str!("../../proto/options.proto")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("optional ")?.strip_suffix(';'))
        .map(|field| {
            let (left, number) = field.split_once(" = ").unwrap();
            let name = left.split_once(' ').unwrap().1;
            (name.to_owned(), number.parse().unwrap())
        })
        .collect();
    assert_eq!(proto, keys);

    let names: Vec<&str> = keys.iter().map(|(name, _)| name.as_str()).collect();
    let document = include_str!("../../docs/configuration.md");
    let section = document.split("\n## ").find(|part| part.starts_with("Keys\n")).unwrap();
    let documented: Vec<&str> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name))
        .collect();
    assert_eq!(documented, names);

    let Json::Object(fields) = as_json(&Options::default()) else {
        unreachable!()
    };
    let mut sorted = names.clone();
    sorted.sort_unstable();
    let mut field_names: Vec<&str> = fields.keys().map(String::as_str).collect();
    field_names.sort_unstable();
    assert_eq!(field_names, sorted);

    let sampled: Vec<&str> = samples().iter().map(|sample| sample.key).collect();
    assert_eq!(sampled, names, "a key without a sample is not tested");
}

#[test]
fn the_example_file_shows_every_key_with_its_default() {
    let example = include_str!("../../packaging/config.toml");
    assert_eq!(Given::file(example).resolve().unwrap(), Options::default());

    let uncommented: Vec<&str> = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest,
            _ => line,
        })
        .collect();
    let uncommented = uncommented.join("\n");
    let shown: Vec<&str> = uncommented
        .lines()
        .skip_while(|line| *line != "[options]")
        .take_while(|line| *line != "[annotations]")
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(" = ").map(|(key, _)| key))
        .collect();
    let names: Vec<&str> = keys::KEYS.iter().map(|key| key.name).collect();
    assert_eq!(shown, names);

    let mut found = Given::file(&uncommented).resolve().unwrap();
    assert!(found.criu_image_path.take().is_some() && found.criu_work_path.take().is_some());
    assert_eq!(found, Options::default());

    let allow = file::parse(&Text {
        origin: "example",
        toml: &uncommented,
    })
    .unwrap()
    .allow
    .unwrap();
    let safe: Vec<&str> = keys::KEYS.iter().filter(|key| key.safe).map(|key| key.name).collect();
    assert_eq!(allow, safe);
}

#[test]
fn the_examples_of_the_documents_are_accepted() {
    let document = include_str!("../../docs/configuration.md");
    let tables = |language: &str| -> Vec<String> {
        document
            .split(&format!("```{language}\n"))
            .skip(1)
            .map(|rest| rest.split("```").next().unwrap().to_owned())
            .collect()
    };
    let ours: Vec<String> = tables("toml")
        .into_iter()
        .filter(|text| text.contains("[[route]]") || text.contains("[annotations]"))
        .collect();
    assert_eq!(ours.len(), 2);
    for text in ours {
        Given::file(&text).resolve().unwrap();
    }
    for text in tables("toml") {
        text.parse::<toml::Table>().unwrap();
    }
}

#[test]
fn the_type_url_of_runtime_options_may_have_a_host_dots_or_slashes() {
    let body = runtime_options("", "io_uid = 5");
    for type_url in [
        "runtimeoptions.v1.Options",
        "types.containerd.io/runtimeoptions.v1.Options",
        "type.googleapis.com/runtimeoptions.v1.Options",
        "runtimeoptions/v1/Options",
        "cri.runtimeoptions.v1.Options",
        "types.containerd.io/cri/runtimeoptions/v1/Options",
    ] {
        assert_eq!(
            Given::any(type_url, body.clone()).resolve().unwrap().io_uid,
            5,
            "{type_url}"
        );
    }
}

#[test]
fn an_unknown_type_of_options_is_refused_by_name() {
    for type_url in [
        "windows.v1.Options",
        "xruntimeoptions.v1.Options",
        "containerd.runc.v1.CheckpointOptions",
        "Options",
    ] {
        let refusal = Given::any(type_url, vec![]).refusal();
        assert!(
            refusal.contains(type_url) && refusal.contains("unknown type"),
            "{refusal}"
        );
    }
    let refusal = Given::any("", vec![8, 1]).refusal();
    assert!(refusal.contains("unknown type \"\""), "{refusal}");
}

#[test]
fn options_that_are_not_the_message_they_claim_to_be_are_refused() {
    for (type_url, name) in [(OURS, OURS), (RUNTIME_OPTIONS, RUNTIME_OPTIONS), (RUNC, RUNC)] {
        let refusal = Given::any(type_url, vec![0xff; 5]).refusal();
        assert!(refusal.contains(name), "{refusal}");
    }
    let refusal = Given::any(OURS, vec![0; 1 << 20]).refusal();
    assert!(refusal.contains("too large"), "{refusal}");
}

#[test]
fn a_field_of_our_options_that_this_shim_does_not_know_is_refused() {
    // Field 99, varint 1.
    let refusal = Given::any(OURS, vec![0x98, 0x06, 0x01]).refusal();
    assert!(refusal.contains("unknown field 99"), "{refusal}");
}

#[test]
fn fields_of_runc_that_decide_nothing_here_are_taken() {
    let mut options = oci::Options {
        task_api_address: "ttrpc+unix:///run/x".into(),
        task_api_version: 3,
        io_gid: 9,
        ..Default::default()
    };
    // criu_path of containerd 1.x, field 8.
    options
        .special_fields
        .mut_unknown_fields()
        .add_length_delimited(8, b"/usr/sbin/criu".to_vec());
    let found = Given::any(RUNC, options.write_to_bytes().unwrap()).resolve().unwrap();
    assert_eq!(
        found,
        Options {
            io_gid: 9,
            ..Options::default()
        }
    );
}

#[test]
fn what_ctr_sends_for_a_user_namespace_is_taken() {
    // io_uid (field 10) = io_gid (field 11) = 231072, as `ctr run --uidmap` encodes it.
    let value = [0x50, 0xa0, 0x8d, 0x0e, 0x58, 0xa0, 0x8d, 0x0e];
    let options = Given::any("containerd.linux.runc.CreateOptions", value.into())
        .resolve()
        .unwrap();
    assert_eq!((options.io_uid, options.io_gid), (231_072, 231_072));
}

#[test]
fn a_binary_name_of_runc_is_refused_and_one_of_crun_works() {
    let with = |name: &str| {
        let options = oci::Options {
            binary_name: name.into(),
            ..Default::default()
        };
        Given::any(RUNC, options.write_to_bytes().unwrap())
    };
    for name in ["runc", "/usr/bin/runc"] {
        let refusal = with(name).refusal();
        assert!(
            refusal.contains(name) && refusal.contains("set it to crun"),
            "{refusal}"
        );
    }
    for name in ["crun", "/usr/bin/crun", "/runc/bin/crun"] {
        assert_eq!(with(name).resolve().unwrap().crun_binary, Path::new(name));
    }
}

#[test]
fn a_table_of_options_that_was_made_for_runc_keeps_working() {
    // As runc's own shim reads them: empty, zero and false are not set; what is not listed decides nothing here.
    let body = "TypeUrl = ''\nBinaryName = '/usr/bin/crun'\nRoot = '/run/crun-k8s'\nSystemdCgroup = true\nNoPivotRoot = true\n\
                NoNewKeyring = true\nShimCgroup = '/shims'\nIoUid = 7\nIoGid = 8\nCriuImagePath = '/images'\nCriuWorkPath = '/work'\n\
                CriuPath = '/usr/sbin/criu'\nTaskApiAddress = 'x'\nTaskApiVersion = 3\n";
    let expected = Options {
        crun_binary: "/usr/bin/crun".into(),
        crun_root: "/run/crun-k8s".into(),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: "/shims".into(),
        io_uid: 7,
        io_gid: 8,
        criu_image_path: Some("/images".into()),
        criu_work_path: Some("/work".into()),
        ..Options::default()
    };
    assert_eq!(Given::body(body).resolve().unwrap(), expected);
    let nothing = "BinaryName = ''\nRoot = ''\nSystemdCgroup = false\nIoUid = 0\nCriuImagePath = ''\n";
    assert_eq!(Given::body(nothing).resolve().unwrap(), Options::default());

    // A key of ours says what ours shall do, wherever it stands.
    for body in [
        "SystemdCgroup = true\nsystemd_cgroup = false\n",
        "systemd_cgroup = false\nSystemdCgroup = true\n",
    ] {
        assert!(!Given::body(body).resolve().unwrap().systemd_cgroup, "{body}");
    }
    for (body, wanted) in [
        ("IoUid = 1\nBinaryName = '/usr/sbin/runc'", "names runc"),
        (
            "IoUid = 1\nSystemdCgroup = 'yes'",
            "line 2: SystemdCgroup must be true or false",
        ),
        ("IoUid = 1\nRoot = 'relative'", "line 2: Root must be an absolute path"),
        ("systemdcgroup = true", "did you mean systemd_cgroup?"),
    ] {
        let refusal = Given::body(body).refusal();
        assert!(refusal.contains(wanted), "{body}: {refusal}");
    }
}

#[test]
fn a_wrong_value_is_refused_with_its_key_wherever_it_stands() {
    let long = format!("\"/{}\"", "a".repeat(5000));
    let table = [
        ("backend", "\"docker\""),
        ("backend", "\"\""),
        ("backend", "\"CRUN\""),
        ("crun_binary", "\"\""),
        ("crun_binary", "\"bin/crun\""),
        ("crun_binary", "\"/usr/../tmp/crun\""),
        ("crun_binary", "\"..\""),
        ("crun_binary", "\"a\\u0000b\""),
        ("crun_root", "\"run\""),
        ("crun_root", "\"/\""),
        ("crun_root", "\"\""),
        ("crun_root", long.as_str()),
        ("shim_cgroup", "\"/a/../..\""),
        ("criu_image_path", "\"images\""),
        ("criu_work_path", "\"/a/..\""),
        ("io_uid", "4294967295"),
        ("io_gid", "4294967295"),
        ("runtime_timeout_ms", "999"),
        ("runtime_timeout_ms", "3600001"),
        ("drain_timeout_ms", "10001"),
    ];
    for (key, value) in table {
        let value: Json = serde_json::from_str(value).unwrap();
        let all = samples();
        let sample = all.iter().find(|sample| sample.key == key).unwrap();
        for source in Source::ALL {
            // Zero and empty are "not set" in runc's message.
            if !source.can_set(sample, &value) || (source == Source::Runc && value == "") {
                continue;
            }
            let mut given = Given::default();
            given.set(source, sample, &value);
            let refusal = given.refusal();
            assert!(
                refusal.contains(key) && refusal.contains("must "),
                "{source:?}: {refusal}"
            );
            assert!(refusal.len() < 400, "{source:?}: {refusal}");
        }
    }
}

#[test]
fn a_value_of_the_wrong_type_is_refused() {
    for (line, wanted) in [
        ("backend = 1", "a string, not of type integer"),
        ("backend = ['crun']", "a string, not of type array"),
        ("systemd_cgroup = 'true'", "true or false, not of type string"),
        ("systemd_cgroup = 1", "true or false"),
        ("io_uid = 'root'", "a whole number"),
        ("io_uid = -1", "negative or too large"),
        ("io_uid = 99999999999999999999", "negative or too large"),
        ("drain_timeout_ms = 1.5", "not of type float"),
        ("drain_timeout_ms = 1979-05-27", "not of type datetime"),
        ("drain_timeout_ms = {}", "not of type table"),
    ] {
        let refusal = Given::body(line).refusal();
        assert!(
            refusal.contains(wanted) && refusal.contains("line 1"),
            "{line}: {refusal}"
        );
    }
    for (key, value) in [
        ("systemd_cgroup", "yes"),
        ("systemd_cgroup", "True"),
        ("systemd_cgroup", ""),
        ("io_uid", "+5"),
        ("io_uid", "-5"),
        ("io_uid", " 5"),
        ("io_uid", ""),
        ("io_uid", "0x5"),
        ("drain_timeout_ms", "99999999999999999999999"),
    ] {
        let mut given = Given::annotation(&format!("io.proxmox-lxcri.{key}"), value);
        given.file = Some(format!("[annotations]\nallow = ['{key}']"));
        let refusal = given.refusal();
        assert!(refusal.contains(key) && refusal.contains("must be"), "{refusal}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_place() {
    for (text, wanted) in [
        (
            "[options]\nio_uid = 1\nbackand = 'crun'",
            "unknown key \"backand\" in /given/config.toml line 3",
        ),
        ("[[route]]\nname = 'x'\nimages = '*'", "line 3"),
        ("\n[option]\n", "/given/config.toml line 2: unknown key \"option\""),
        ("[annotations]\ndeny = []", "line 2: unknown key \"deny\""),
        (
            "backend = 'crun'",
            "backend stands outside of a table; put it under [options]",
        ),
        ("[annotations]\nallow = ['all']", "unknown key \"all\""),
        ("[options]\nSystemdCgroup = true", "did you mean systemd_cgroup?"),
        ("[options]\nBinaryName = 'crun'", "did you mean crun_binary?"),
    ] {
        let refusal = Given::file(text).refusal();
        assert!(refusal.contains(wanted), "{text}: {refusal}");
    }
    let refusal = Given::body("TypeUrl = 'x'\nio_uid = 1\nnope = 1").refusal();
    assert!(
        refusal.contains("\"nope\" in config_body of the runtime options line 3"),
        "{refusal}"
    );
    let refusal = Given::body("[options]\nio_uid = 1").refusal();
    assert!(refusal.contains("without a table"), "{refusal}");
    let refusal = Given::annotation("io.proxmox-lxcri.nope", "1").refusal();
    assert!(refusal.contains("io.proxmox-lxcri.nope"), "{refusal}");
}

#[test]
fn a_wrong_shape_of_the_file_is_refused_with_its_line() {
    for (text, wanted) in [
        ("options = 1", "options must be a table"),
        ("[[options]]", "options must be a table"),
        ("annotations = []", "annotations must be a table"),
        ("[route]\nname = 'x'", "array of tables"),
        ("route = [1]", "array of tables"),
        ("[annotations]\nallow = 'backend'", "array of names"),
        ("[annotations]\nallow = [1]", "array of names"),
        ("[[route]]\nbackend = 'crun'", "matches every container"),
        ("[[route]]\nname = ''", "line 2: pattern name"),
        ("[[route]]\nname = 5", "line 2: pattern name"),
        ("[options]\nio_uid = 1\nio_uid = 2", "line 3: not TOML"),
        ("[options\n", "line 1: not TOML"),
    ] {
        let refusal = Given::file(text).refusal();
        assert!(
            refusal.contains(wanted) && refusal.contains("/given/config.toml line"),
            "{text}: {refusal}"
        );
    }
    let pattern = "a".repeat(routing::PATTERN_MAX_BYTES + 1);
    let refusal = Given::file(&format!("[[route]]\nname = '{pattern}'")).refusal();
    assert!(refusal.contains("pattern name"), "{refusal}");
    let refusal = Given::body(&"#".repeat(file::TEXT_MAX_BYTES + 1)).refusal();
    assert!(refusal.contains("larger than"), "{refusal}");
}

#[test]
fn a_secret_is_refused_and_not_repeated() {
    for key in [
        "api_token",
        "token_id",
        "Password",
        "passwd",
        "client-secret",
        "apiKey",
        "private_key",
        "credentials",
    ] {
        for given in [
            Given::file(&format!("[options]\n{key} = \"hunter2\"")),
            Given::file(&format!("[[route]]\nname='x'\n{key} = \"hunter2\"")),
            Given::body(&format!("{key} = \"hunter2\"")),
            Given::annotation(&format!("io.proxmox-lxcri.{key}"), "hunter2"),
        ] {
            let refusal = given.refusal();
            assert!(refusal.contains(key) && refusal.contains("0600"), "{refusal}");
            assert!(!refusal.contains("hunter2"), "{refusal}");
        }
    }
    let refusal = Given::file("[options]\ntoken = \"hunter2\" oops").refusal();
    assert!(!refusal.contains("hunter2"), "{refusal}");
}

#[test]
fn an_annotation_of_a_pod_cannot_choose_what_runs_as_root() {
    for sample in samples() {
        let value = sample
            .first
            .as_str()
            .map_or_else(|| sample.first.to_string(), str::to_owned);
        let given = Given::annotation(&format!("{ANNOTATION_PREFIX}{}", sample.key), &value);
        if ["backend", "drain_timeout_ms"].contains(&sample.key) {
            given.resolve().unwrap();
            continue;
        }
        let refusal = given.refusal();
        for wanted in [
            sample.key,
            "not allowed",
            "[annotations]",
            "/etc/proxmox-lxcri/config.toml",
        ] {
            assert!(refusal.contains(wanted), "{refusal}");
        }
    }
}

#[test]
fn the_list_of_allowed_annotations_replaces_the_safe_ones() {
    let mut given = Given::annotation("io.proxmox-lxcri.backend", "lxc");
    given.file = Some("[annotations]\nallow = []".into());
    assert!(given.refusal().contains("/given/config.toml"));
    given.file = Some("[annotations]\nallow = ['io_uid']".into());
    given.refusal();
    given.file = Some("[annotations]\nallow = ['io_uid', 'backend']".into());
    assert_eq!(given.resolve().unwrap().backend, "lxc");
}

#[test]
fn annotations_of_others_are_none_of_our_business() {
    let given = Given::annotation("io.proxmox-lxcri", "1")
        .with("io.proxmox-lxcrix.backend", "1")
        .with("io.kubernetes.cri.sandbox-id", "abc");
    assert_eq!(given.resolve().unwrap(), Options::default());
}

#[test]
fn the_first_rule_that_matches_with_all_of_its_patterns_gives_all_its_options() {
    let file = "
        [[route]]
        namespace = 'moby'
        backend = 'proxmox-vm'
        [[route]]
        pod_namespace = 'build-*'
        image = '*/vm/*'
        backend = 'proxmox-vm'
        io_uid = 1
        [[route]]
        name = 'exempt'
        [[route]]
        namespace = 'k8s.??'
        image = '*'
        backend = 'lxc'
        [[route]]
        name = 'c1'
        backend = 'proxmox-lxc'
        [options]
        io_gid = 2
    ";
    let image = "io.kubernetes.cri.image-name";
    let pod_namespace = "io.kubernetes.cri.sandbox-namespace";
    let name = "io.kubernetes.cri.container-name";
    let none = Given::default;
    for (given, backend, io_uid) in [
        (none(), "proxmox-lxc", 0),
        (none().with(name, "web"), "crun", 0),
        (none().with("nerdctl/name", "web"), "crun", 0),
        (none().with("nerdctl/name", "web").with(name, "c1"), "proxmox-lxc", 0),
        (none().with(image, "docker.io/library/busybox:1"), "lxc", 0),
        (none().with(image, ""), "proxmox-lxc", 0),
        (
            none().with("io.kubernetes.cri.podsandbox.image-name", "pause"),
            "lxc",
            0,
        ),
        (none().with(image, "r/vm/a").with(pod_namespace, "prod"), "lxc", 0),
        (
            none().with(image, "r/vm/a").with(pod_namespace, "build-7"),
            "proxmox-vm",
            1,
        ),
        (none().with(image, "r/a").with(name, "exempt"), "crun", 0),
    ] {
        let given = Given {
            file: Some(file.into()),
            ..given
        };
        let found = given.resolve().unwrap();
        assert_eq!(
            (found.backend.as_str(), found.io_uid, found.io_gid),
            (backend, io_uid, 2),
            "{:?}",
            given.annotations
        );
    }
}

#[test]
fn a_cgroups_path_in_systemds_form_asks_for_systemd_unless_a_source_says_no() {
    for (path, systemd) in [
        ("kubepods-besteffort-pod1.slice:cri-containerd:abc", true),
        ("system.slice:nerdctl:abc", true),
        (":runc:abc", true),
        ("/default/abc", false),
        ("/a.slice:b:c", false),
        ("a:b:c", false),
        ("a.slice:b", false),
        ("a.slice:b:", false),
        ("a.slice:b:c:d", false),
        ("", false),
    ] {
        let mut given = Given {
            cgroups_path: Some(path.into()),
            ..Given::default()
        };
        assert_eq!(given.resolve().unwrap().systemd_cgroup, systemd, "{path}");
        given.file = Some("[options]\nsystemd_cgroup = false".into());
        assert!(!given.resolve().unwrap().systemd_cgroup, "{path}");
    }
}

#[test]
fn globs_match_whole_texts() {
    for (pattern, text, matches) in [
        ("*", "", true),
        ("*", "a/b", true),
        ("a*", "a", true),
        ("*a", "ba", true),
        ("*a", "ab", false),
        ("a*b*c", "a--b--b--c", true),
        ("a*b*c", "a--c--b", false),
        ("?", "", false),
        ("?", "ä", true),
        ("??", "ä", false),
        ("a", "A", false),
        ("a.c", "abc", false),
        ("[a]", "a", false),
        ("\\*", "*", false),
        ("\\*", "\\x", true),
        ("**?", "x", true),
        ("**?", "", false),
        ("*aab", "aaaab", true),
        ("*.io/*:?", "quay.io/a/b:1", true),
    ] {
        assert_eq!(routing::glob(pattern, text), matches, "{pattern} {text}");
    }
}

#[test]
fn a_hostile_glob_ends() {
    // Exponential in a matcher that tries every star anew: this would outlive the machine.
    let pattern = "a*".repeat(100) + "b";
    assert!(!routing::glob(&pattern, &"a".repeat(20_000)));
}

/// The definition, spelled out.
fn glob_by_definition(pattern: &[char], text: &[char]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some(('*', rest)) => (0..=text.len()).any(|skip| glob_by_definition(rest, &text[skip..])),
        Some((wanted, rest)) => text
            .split_first()
            .is_some_and(|(found, behind)| (*wanted == '?' || wanted == found) && glob_by_definition(rest, behind)),
    }
}

/// Fragments that get past the first check of a parser.
fn toml_like() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("[options]\n".to_owned()),
        Just("[[route]]\n".to_owned()),
        Just("[annotations]\n".to_owned()),
        Just("name = \"*\"\n".to_owned()),
        Just("allow = [\"io_uid\"]\n".to_owned()),
        Just("io_uid = 1\n".to_owned()),
        Just("route = [{}, [[1]]]\n".to_owned()),
        Just("a.b.c = {d.e = [[{}]]}\n".to_owned()),
        (0_usize..14, "\\PC{0,20}").prop_map(|(i, value)| format!("{} = {value}\n", keys::KEYS[i].name)),
        (0_usize..14, any::<i64>()).prop_map(|(i, value)| format!("{} = {value}\n", keys::KEYS[i].name)),
        "\\PC{0,20}\n",
        "[\\[\\]{}='\".a\n#_0-9]{0,30}",
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn globs_match_as_defined(pattern in "[ab?*ä]{0,8}", text in "[abcä]{0,8}") {
        let chars: (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
        prop_assert_eq!(routing::glob(&pattern, &text), glob_by_definition(&chars.0, &chars.1));
    }

    #[test]
    fn any_glob_and_text_end_without_a_panic(pattern in "\\PC{0,64}", text in "\\PC{0,256}") {
        let _ = routing::glob(&pattern, &text);
        prop_assert!(routing::glob(&"?".repeat(text.chars().count()), &text));
        prop_assert!(routing::glob("*", &text));
    }

    #[test]
    fn any_bytes_as_options_are_decoded_or_refused(
        type_url in prop_oneof![Just(OURS), Just(RUNTIME_OPTIONS), Just(RUNC)],
        value in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let given = Given::any(type_url, value);
        if let Err(error) = given.resolve() {
            prop_assert_eq!(error.kind(), Kind::InvalidArgument);
        }
    }

    #[test]
    fn any_options_survive_their_encoding_or_are_refused(
        backend in prop::option::of(prop_oneof!["[a-z-]{0,12}", Just("crun".to_owned())]),
        crun_root in prop::option::of("\\PC{0,30}|/[a-z./]{0,20}"),
        io_uid in prop::option::of(any::<u32>()),
        drain in prop::option::of(0_u64..20_000),
    ) {
        let layer = Layer { backend, crun_root, io_uid, drain_timeout_ms: drain, ..Layer::default() };
        match Given::any(OURS, layer.encode_to_vec()).resolve() {
            Err(error) => prop_assert_eq!(error.kind(), Kind::InvalidArgument),
            Ok(options) => {
                let default = Options::default();
                prop_assert_eq!(options.backend, layer.backend.unwrap_or(default.backend));
                prop_assert_eq!(options.crun_root, layer.crun_root.map_or(default.crun_root, PathBuf::from));
                prop_assert_eq!(options.io_uid, layer.io_uid.unwrap_or(0));
                prop_assert_eq!(options.drain_timeout_ms, layer.drain_timeout_ms.unwrap_or(2_000));
            }
        }
    }

    #[test]
    fn any_annotation_is_taken_or_refused(key in "\\PC{0,20}", known in 0_usize..14, value in "\\PC{0,40}|[0-9]{0,30}") {
        let all: Vec<&str> = keys::KEYS.iter().map(|key| key.name).collect();
        for key in [key.as_str(), all[known]] {
            let mut given = Given::annotation(&format!("{ANNOTATION_PREFIX}{key}"), &value);
            given.file = Some(format!("[annotations]\nallow = {all:?}"));
            if let Err(error) = given.resolve() {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
                prop_assert!(error.to_string().len() < 1500, "{}", error);
            }
        }
    }

    #[test]
    fn any_text_is_taken_or_refused(text in toml_like()) {
        for given in [Given::file(&text), Given::body(&text)] {
            if let Err(error) = given.resolve() {
                prop_assert_eq!(error.kind(), Kind::InvalidArgument);
            }
        }
    }
}

#[test]
fn a_deeply_nested_text_is_refused() {
    for text in [
        format!("[options]\nbackend = {}", "[".repeat(30_000)),
        format!("[options]\nbackend = {}1", "{a=".repeat(20_000)),
        format!("{}=1", vec!["a"; 30_000].join(".")),
    ] {
        Given::file(&text).refusal();
    }
}

/// A folder with a file of that text and mode, and its path.
fn file_with(text: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    (folder, path)
}

fn load_plain(path: &Path, runtime: Any<'_>) -> Result<Options> {
    let annotations = BTreeMap::new();
    let container = Container {
        namespace: "default",
        id: "c1",
        annotations: &annotations,
        cgroups_path: None,
    };
    load(path, runtime, container)
}

#[test]
fn the_file_is_read_from_the_path_that_was_given() {
    let (_folder, path) = file_with(b"[options]\nio_uid = 12", 0o644);
    assert_eq!(load_plain(&path, Any::default()).unwrap().io_uid, 12);
    fs::write(&path, "[options]\nnope = 12").unwrap();
    let error = load_plain(&path, Any::default()).unwrap_err().to_string();
    assert!(error.contains(&format!("{} line 2", path.display())), "{error}");
}

#[test]
fn the_file_that_the_options_name_is_read_and_wins() {
    let (_folder, path) = file_with(b"[options]\nio_uid = 12\nio_gid = 12", 0o644);
    let (_named_folder, named) = file_with(b"io_uid = 13", 0o600);
    let value = runtime_options(named.to_str().unwrap(), "");
    let runtime = Any {
        type_url: RUNTIME_OPTIONS,
        value: &value,
    };
    let found = load_plain(&path, runtime).unwrap();
    assert_eq!((found.io_uid, found.io_gid), (13, 12));

    fs::set_permissions(&named, fs::Permissions::from_mode(0o602)).unwrap();
    let error = load_plain(&path, runtime).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition, "{error}");

    fs::remove_file(&named).unwrap();
    let error = load_plain(&path, runtime).unwrap_err();
    assert!(error.to_string().contains(named.to_str().unwrap()), "{error}");

    let relative = runtime_options("options.toml", "");
    let runtime = Any {
        type_url: RUNTIME_OPTIONS,
        value: &relative,
    };
    let error = load_plain(&path, runtime).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
}

#[test]
fn a_missing_file_is_fine_only_where_nobody_named_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    assert!(file::read(&path, false).unwrap().is_none());
    let error = load_plain(&path, Any::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    let error = load_plain(Path::new("config.toml"), Any::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
}

#[test]
fn the_environment_of_the_shim_names_another_file() {
    assert_eq!(config_file_from(None), Path::new(DEFAULT_CONFIG_FILE));
    assert_eq!(config_file_from(Some("".into())), Path::new(DEFAULT_CONFIG_FILE));
    assert_eq!(config_file_from(Some("/x/y.toml".into())), Path::new("/x/y.toml"));
}

#[test]
fn a_file_that_others_can_write_or_own_is_refused() {
    for mode in [0o664, 0o646, 0o666, 0o4620] {
        let (_folder, path) = file_with(b"", mode);
        let error = load_plain(&path, Any::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition, "{mode:o}");
        let text = error.to_string();
        assert!(
            text.contains(path.to_str().unwrap()) && text.contains("chmod go-w"),
            "{text}"
        );
    }
    let (_folder, path) = file_with(b"", 0o644);
    std::os::unix::fs::chown(&path, Some(1000), None).unwrap();
    let error = load_plain(&path, Any::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(
        error.to_string().contains("uid 1000") && error.to_string().contains("chown root"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_no_text_is_refused() {
    let (_folder, path) = file_with(b"[options]\nbackend = \"\xff\"", 0o644);
    assert!(
        load_plain(&path, Any::default())
            .unwrap_err()
            .to_string()
            .contains("not UTF-8")
    );

    let (_folder, path) = file_with(&vec![b'#'; file::TEXT_MAX_BYTES + 1], 0o644);
    assert!(
        load_plain(&path, Any::default())
            .unwrap_err()
            .to_string()
            .contains("larger than")
    );
    let (_folder, path) = file_with(&vec![b'#'; file::TEXT_MAX_BYTES], 0o644);
    load_plain(&path, Any::default()).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    for path in [fifo.as_path(), folder.path(), Path::new("/dev/zero")] {
        let error = load_plain(path, Any::default()).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
}
