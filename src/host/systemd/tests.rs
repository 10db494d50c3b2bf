//! Bytes as Debian 13's dbus-daemon 1.16 and systemd 257 have exchanged them, and a bus of our own that fails.

use std::{
    os::unix::net::UnixListener,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use proptest::prelude::*;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
/// A bound that is to be reached: long enough for what comes before on a busy machine.
const SHORT: Duration = Duration::from_secs(2);
const UNIT: &str = "cri-raw.scope";
const FOLDER: &str = "/kt.slice/kt-pod1.slice/cri-raw.scope";
const JOB: &str = "/org/freedesktop/systemd1/job/174";
const OWNER: &str = ":1.3";

const JOB_REPLY: &[u8] = b"l\x02\x01\x01&\x00\x00\x00Q\x01\x00\x00-\x00\x00\x00\x05\x01u\x00\x04\x00\x00\x00\x06\x01s\x00\x05\x00\x00\x00:1.23\x00\x00\x00\x08\x01g\x00\x01o\x00\x00\x07\x01s\x00\x04\x00\x00\x00:1.3\x00\x00\x00\x00!\x00\x00\x00/org/freedesktop/systemd1/job/174\x00";
const JOB_REMOVED: &[u8] = b"l\x04\x01\x01I\x00\x00\x00W\x01\x00\x00\x8d\x00\x00\x00\x01\x01o\x00\x19\x00\x00\x00/org/freedesktop/systemd1\x00\x00\x00\x00\x00\x00\x00\x02\x01s\x00 \x00\x00\x00org.freedesktop.systemd1.Manager\x00\x00\x00\x00\x00\x00\x00\x00\x03\x01s\x00\n\x00\x00\x00JobRemoved\x00\x00\x00\x00\x00\x00\x08\x01g\x00\x04uoss\x00\x00\x00\x00\x00\x00\x00\x07\x01s\x00\x04\x00\x00\x00:1.3\x00\x00\x00\x00\xae\x00\x00\x00!\x00\x00\x00/org/freedesktop/systemd1/job/174\x00\x00\x00\r\x00\x00\x00cri-raw.scope\x00\x00\x00\x04\x00\x00\x00done\x00";
const UNIT_EXISTS: &[u8] = b"l\x03\x01\x01B\x00\x00\x00`\x01\x00\x00]\x00\x00\x00\x05\x01u\x00\x04\x00\x00\x00\x06\x01s\x00\x05\x00\x00\x00:1.24\x00\x00\x00\x04\x01s\x00#\x00\x00\x00org.freedesktop.systemd1.UnitExists\x00\x00\x00\x00\x00\x08\x01g\x00\x01s\x00\x00\x07\x01s\x00\x04\x00\x00\x00:1.3\x00\x00\x00\x00=\x00\x00\x00Unit cri-raw.scope was already loaded or has a fragment file.\x00";
const NAME_ACQUIRED: &[u8] = b"l\x04\x01\x01\n\x00\x00\x00\x02\x00\x00\x00\x8d\x00\x00\x00\x01\x01o\x00\x15\x00\x00\x00/org/freedesktop/DBus\x00\x00\x00\x02\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\x03\x01s\x00\x0c\x00\x00\x00NameAcquired\x00\x00\x00\x00\x06\x01s\x00\x05\x00\x00\x00:1.23\x00\x00\x00\x08\x01g\x00\x01s\x00\x00\x07\x01s\x00\x14\x00\x00\x00org.freedesktop.DBus\x00\x00\x00\x00\x05\x00\x00\x00:1.23\x00";
/// What systemd has taken: of process 672.
const START: &[u8] = b"l\x01\x02\x01\xd8\x00\x00\x00\x04\x00\x00\x00\xb6\x00\x00\x00\x01\x01o\x00\x19\x00\x00\x00/org/freedesktop/systemd1\x00\x00\x00\x00\x00\x00\x00\x02\x01s\x00 \x00\x00\x00org.freedesktop.systemd1.Manager\x00\x00\x00\x00\x00\x00\x00\x00\x03\x01s\x00\x12\x00\x00\x00StartTransientUnit\x00\x00\x00\x00\x00\x00\x06\x01s\x00\x18\x00\x00\x00org.freedesktop.systemd1\x00\x00\x00\x00\x00\x00\x00\x00\x08\x01g\x00\x10ssa(sv)a(sa(sv))\x00\x00\x00\r\x00\x00\x00cri-raw.scope\x00\x00\x00\x04\x00\x00\x00fail\x00\x00\x00\x00\xa8\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00Slice\x00\x01s\x00\x00\x00\x00\r\x00\x00\x00kt-pod1.slice\x00\x00\x00\x00\x00\x00\x00\x0b\x00\x00\x00Description\x00\x01s\x00\x00\x12\x00\x00\x00a container, tried\x00\x00\x00\x00\x00\x00\x13\x00\x00\x00DefaultDependencies\x00\x01b\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00Delegate\x00\x01b\x00\x01\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00PIDs\x00\x02au\x00\x00\x00\x00\x04\x00\x00\x00\xa0\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

fn malformed(bytes: &[u8]) -> Malformed {
    match Message::size(bytes) {
        Ok(_) => Message::parse(bytes).unwrap_err(),
        Err(e) => e,
    }
}

// The format.

#[test]
fn what_systemd_answers_is_read() {
    let reply = Message::parse(JOB_REPLY).unwrap();
    assert_eq!((reply.kind, reply.reply_serial), (Type::Reply, Some(4)));
    assert_eq!((reply.object(), reply.text()), (Some(JOB), None));
    let error = Message::parse(UNIT_EXISTS).unwrap();
    assert_eq!(error.kind, Type::Error);
    assert_eq!(error.error_name, "org.freedesktop.systemd1.UnitExists");
    assert_eq!(
        error.text(),
        Some("Unit cri-raw.scope was already loaded or has a fragment file.")
    );
    assert_eq!(refusal("x", &error).kind(), Kind::AlreadyExists);
}

#[test]
fn what_systemd_and_the_bus_signal_is_read() {
    let signal = Message::parse(JOB_REMOVED).unwrap();
    assert_eq!(signal.kind, Type::Signal);
    assert_eq!(
        (signal.path.as_str(), signal.interface.as_str()),
        (SYSTEMD_PATH, MANAGER)
    );
    assert_eq!((signal.member.as_str(), signal.sender.as_str()), ("JobRemoved", OWNER));
    let removed = signal.job_removed().unwrap();
    assert_eq!(
        (removed.job.as_str(), removed.unit.as_str(), removed.result.as_str()),
        (JOB, UNIT, "done")
    );
    let acquired = Message::parse(NAME_ACQUIRED).unwrap();
    assert_eq!(
        (acquired.destination.as_str(), acquired.text()),
        (":1.23", Some(":1.23"))
    );
    assert_eq!(acquired.job_removed(), None);
}

#[test]
fn a_start_is_written_as_systemd_has_taken_it() {
    let call = transient_unit(UNIT, "kt-pod1.slice", "a container, tried", &[672]);
    assert_eq!(
        call.encode(4).escape_ascii().to_string(),
        START.escape_ascii().to_string()
    );
}

#[test]
fn a_message_in_the_other_byte_order_is_read() {
    let bytes = b"B\x02\x01\x01\0\0\0\x06\0\0\0\x09\0\0\0\x0f\x05\x01u\0\0\0\0\x07\x08\x01g\0\x01o\0\0\0\0\0\x01/\0";
    let message = Message::parse(bytes).unwrap();
    assert_eq!((message.serial, message.reply_serial), (9, Some(7)));
    assert_eq!(message.object(), Some("/"));
}

#[test]
fn unknown_types_and_header_fields_are_passed_over() {
    let field = |field: &[u8]| {
        let mut bytes = b"l\x09\0\x01\0\0\0\0\x01\0\0\0".to_vec();
        bytes.extend(u32::try_from(field.len()).unwrap().to_le_bytes());
        bytes.extend(field);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Message::parse(&bytes)
    };
    assert_eq!(field(b"\x0a\x01o\0\x01\0\0\0/\0").unwrap().kind, Type::Unknown);
    assert!(field(b"\x63\x01y\0\x01").is_ok());
    assert!(field(b"\x63\x01t\0\0\0\0\0\x01\0\0\0\0\0\0\0").is_ok());
    // Nested, and a known field of another type.
    assert!(field(b"\x63\x02ay\0\0\0\0\0\0\0\0").is_err());
    assert!(field(b"\x05\x01s\0\x01\0\0\0/\0").is_err());
}

#[test]
fn what_is_no_message_is_refused_before_it_is_read() {
    let with = |at: usize, value: &[u8]| {
        let mut bytes = JOB_REPLY.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        malformed(&bytes).0
    };
    assert_eq!(with(0, b"H"), "no D-Bus message");
    assert_eq!(with(1, b"\0"), "a message whose header cannot be read");
    assert_eq!(with(3, b"\x02"), "another version of the protocol");
    assert_eq!(with(4, &u32::MAX.to_le_bytes()), "a message that is too long");
    assert_eq!(with(4, &(MAX_BYTES as u32).to_le_bytes()), "a message that is too long");
    assert_eq!(with(12, &u32::MAX.to_le_bytes()), "a message that is too long");
    assert_eq!(
        with(12, &0x2c_u32.to_le_bytes()),
        "a message whose header cannot be read"
    );
    assert_eq!(with(4, &0x25_u32.to_le_bytes()), "a message that is cut off");
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::size(&bytes);
        let _ = Message::parse(&bytes);
    }

    #[test]
    fn no_damage_to_a_message_makes_the_parser_panic(
        which in 0..5_usize,
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut bytes = [JOB_REPLY, JOB_REMOVED, UNIT_EXISTS, NAME_ACQUIRED, START][which].to_vec();
        let cut = cut.index(bytes.len());
        prop_assert!(Message::parse(&bytes[..cut]).is_err());
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(message) = Message::parse(&bytes) {
            let _ = (message.text(), message.object(), message.job_removed());
        }
    }

    #[test]
    fn a_call_comes_back(member in "[A-Za-z]{1,40}", text in "[^\0]{0,100}", numbers in proptest::collection::vec(any::<u32>(), 0..9), serial in 1..u32::MAX) {
        let call = manager_call(&member, "sa(sv)", |arguments| {
            arguments.string(&text);
            arguments.array(8, |array| array.property("PIDs", Value::Numbers(&numbers)));
        });
        let bytes = call.encode(serial);
        let message = Message::parse(&bytes).unwrap();
        prop_assert_eq!((message.kind, message.serial), (Type::Call, serial));
        prop_assert_eq!((&message.member, message.text()), (&member, Some(text.as_str())));
        prop_assert_eq!((message.path.as_str(), message.destination.as_str()), (SYSTEMD_PATH, SYSTEMD));
    }

    #[test]
    fn a_scope_lies_where_its_folder_is_expected(path in proptest::option::of("([a-c.:-]{0,8}\\.slice)?[a-c.:/ -]{0,20}"), id in "[a-z./]{1,10}") {
        if let Ok((unit, slice)) = scope_of(path.as_deref(), &id) {
            let folder = parse::container_path(path.as_deref(), true, &id).unwrap().unwrap();
            prop_assert_eq!(parse::slice_path(&slice).unwrap().join(unit), folder);
        }
    }
}

// Names.

#[test]
fn a_scope_has_the_name_that_crun_gives_it() {
    let of = |path| scope_of(path, "id").map_err(|e| e.kind());
    let is = |unit: &str, slice: &str| Ok((unit.to_owned(), slice.to_owned()));
    let invalid = Err(Kind::InvalidArgument);
    assert_eq!(of(None), is("crun-id.scope", "system.slice"));
    assert_eq!(of(Some("")), is("crun-id.scope", "system.slice"));
    assert_eq!(of(Some(":p:x")), is("p-x.scope", "system.slice"));
    assert_eq!(
        of(Some("kubepods-burstable-pod1.slice:cri-containerd:x")),
        is("cri-containerd-x.scope", "kubepods-burstable-pod1.slice")
    );
    assert_eq!(of(Some("a.slice:x")), is("x.scope", "a.slice"));
    assert_eq!(of(Some("a.slice:p:x:y")), is("p-x:y.scope", "a.slice"));
    assert_eq!(of(Some("-.slice:p:x")), is("p-x.scope", "-.slice"));
    assert_eq!(of(Some("a.slice")), is("a.slice.scope", "a.slice"));
    for path in [
        "a.slice:p:../x",
        "a/b.slice:p:x",
        "a--b.slice:p:x",
        "/not/systemd",
        "a.slice:p:x y",
        "a.slice:p:x'",
    ] {
        assert_eq!(of(Some(path)), invalid, "{path}");
    }
    assert!(scope_of(None, "a/b").is_err());
    assert!(scope_of(None, &"a".repeat(250)).is_err());
}

#[test]
fn a_name_that_is_no_unit_is_not_sent() {
    let nowhere = Path::new("/nonexistent/bus");
    for unit in ["", ".scope", "a.service", "a'b.scope", "a b.scope", "a\0.scope"] {
        let error = start_scope_on(nowhere, unit, "", "", &[1], MINUTE).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{unit:?}");
        assert!(remove_scope_on(nowhere, unit, FOLDER, MINUTE).is_err());
    }
    let error = |slice, description| {
        start_scope_on(nowhere, UNIT, slice, description, &[1], MINUTE)
            .unwrap_err()
            .kind()
    };
    assert_eq!(error("a.scope", ""), Kind::InvalidArgument);
    assert_eq!(error("", "a\0"), Kind::InvalidArgument);
    assert_eq!(error("", ""), Kind::Unavailable);
}

#[test]
fn the_address_of_the_bus_is_taken_from_its_list() {
    let of = |list: &str| socket_in(OsStr::new(list)).map_err(|e| e.kind());
    let no = Err(Kind::FailedPrecondition);
    assert_eq!(of("unix:path=/run/a"), Ok("/run/a".into()));
    assert_eq!(of("unix:guid=1,path=/run/a%20b"), Ok("/run/a b".into()));
    assert_eq!(
        of("tcp:host=x,port=1;unix:abstract=/y;unix:path=/z,guid=2"),
        Ok("/z".into())
    );
    for list in [
        "",
        "tcp:host=x",
        "unix:path=relative",
        "unix:path=/a%2",
        "unix:path=/a%xx",
        "unix:path=",
    ] {
        assert_eq!(of(list), no, "{list}");
    }
}

// Talks.

/// The bus's side of a connection.
struct Fake {
    stream: UnixStream,
    inbox: Vec<u8>,
}

fn text_bytes(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.push(0);
    bytes
}

/// A message with fields of texts; in `body`, what is text is aligned.
fn message(kind: u8, fields: &[(u8, &str, &str)], reply_serial: u32, signature: &str, body: &[&str]) -> Vec<u8> {
    let pad = |bytes: &mut Vec<u8>, to| bytes.resize(bytes.len().next_multiple_of(to), 0);
    let mut body_bytes = Vec::new();
    if signature.starts_with('u') {
        body_bytes.extend([7, 0, 0, 0]);
    }
    for text in body {
        pad(&mut body_bytes, 4);
        body_bytes.extend(text_bytes(text));
    }
    let mut array = vec![5, 1, b'u', 0];
    array.extend(reply_serial.to_le_bytes());
    for (code, of, text) in fields {
        pad(&mut array, 8);
        array.extend([*code, 1, of.as_bytes()[0], 0]);
        array.extend(text_bytes(text));
    }
    if !signature.is_empty() {
        pad(&mut array, 8);
        array.extend([8, 1, b'g', 0, u8::try_from(signature.len()).unwrap()]);
        array.extend(signature.as_bytes());
        array.push(0);
    }
    let mut bytes = vec![b'l', kind, 0, 1];
    for number in [body_bytes.len(), 99, array.len()] {
        bytes.extend(u32::try_from(number).unwrap().to_le_bytes());
    }
    bytes.extend(array);
    pad(&mut bytes, 8);
    bytes.extend(body_bytes);
    bytes
}

fn job_removed(sender: &str, job: &str, result: &str) -> Vec<u8> {
    let fields = [
        (1, "o", SYSTEMD_PATH),
        (2, "s", MANAGER),
        (3, "s", "JobRemoved"),
        (7, "s", sender),
    ];
    message(4, &fields, 0, "uoss", &[job, UNIT, result])
}

impl Fake {
    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn read(&mut self) {
        let mut chunk = [0; 4096];
        let read = self.stream.read(&mut chunk).unwrap();
        assert_ne!(read, 0, "the client is gone");
        self.inbox.extend(&chunk[..read]);
    }

    fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.inbox.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<u8> = self.inbox.drain(..end + 2).collect();
                return String::from_utf8(line).unwrap();
            }
            self.read();
        }
    }

    fn authenticate(&mut self) {
        assert!(self.line().starts_with("\0AUTH EXTERNAL 3"));
        self.send(b"OK 10e216a138b7cdd6307ef0a36b08394a\r\n");
        assert_eq!(self.line(), "BEGIN\r\n");
    }

    fn call(&mut self, member: &str) -> Message {
        loop {
            if let Ok(Some(size)) = Message::size(&self.inbox)
                && self.inbox.len() >= size
            {
                let bytes: Vec<u8> = self.inbox.drain(..size).collect();
                let call = Message::parse(&bytes).unwrap();
                assert_eq!((call.kind, call.member.as_str()), (Type::Call, member));
                return call;
            }
            self.read();
        }
    }

    fn answer(&mut self, member: &str, sender: &str, signature: &str, body: &[&str]) {
        let call = self.call(member);
        self.send(&message(2, &[(7, "s", sender)], call.serial, signature, body));
    }

    fn refuse(&mut self, member: &str, name: &str) {
        let call = self.call(member);
        let name = format!("org.freedesktop.systemd1.{name}");
        let fields = [(4, "s", name.as_str()), (7, "s", OWNER)];
        self.send(&message(3, &fields, call.serial, "s", &["for\na reason"]));
    }

    /// As far as the unit is watched.
    fn greet(&mut self) {
        self.authenticate();
        self.answer("Hello", BUS, "s", &[":1.23"]);
        self.send(NAME_ACQUIRED);
        self.answer("AddMatch", BUS, "", &[]);
        self.answer("Subscribe", OWNER, "", &[]);
    }

    fn start(&mut self) {
        self.answer("StartTransientUnit", OWNER, "o", &[JOB]);
    }

    /// Whose the name is, and whose the folder.
    fn belongs(&mut self, unit: &str, folder: &str) {
        self.answer("GetUnit", OWNER, "o", &[unit]);
        let asked = self.call("GetUnitByControlGroup");
        assert_eq!(asked.text(), Some(FOLDER));
        self.send(&message(2, &[(7, "s", OWNER)], asked.serial, "o", &[folder]));
    }
}

/// Runs `work` with the socket of a bus that does as `script` says, and hangs up when both are done.
fn with_bus<T>(script: impl FnOnce(&mut Fake) + Send + 'static, work: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bus");
    let listener = UnixListener::bind(&path).unwrap();
    let bus = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut fake = Fake {
            stream,
            inbox: Vec::new(),
        };
        script(&mut fake);
        fake
    });
    let result = work(&path);
    drop(bus.join().unwrap());
    result
}

fn started(bound: Duration, script: impl FnOnce(&mut Fake) + Send + 'static) -> Result<()> {
    with_bus(script, |bus| {
        start_scope_on(bus, UNIT, "kt-pod1.slice", "a container", &[672], bound)
    })
}

fn removed(script: impl FnOnce(&mut Fake) + Send + 'static) -> Result<()> {
    with_bus(script, |bus| remove_scope_on(bus, UNIT, FOLDER, MINUTE))
}

#[test]
fn a_started_scope_runs() {
    started(MINUTE, |bus| {
        bus.greet();
        bus.start();
        bus.send(&job_removed(OWNER, JOB, "done"));
    })
    .unwrap();
}

#[test]
fn only_the_ends_of_jobs_of_this_unit_are_asked_for() {
    started(MINUTE, |bus| {
        bus.authenticate();
        bus.answer("Hello", BUS, "s", &[":1.23"]);
        let rule = bus.call("AddMatch");
        let text = rule.text().unwrap();
        assert!(text.contains("sender='org.freedesktop.systemd1'") && text.ends_with(",arg2='cri-raw.scope'"));
        bus.send(&message(2, &[(7, "s", BUS)], rule.serial, "", &[]));
        bus.answer("Subscribe", OWNER, "", &[]);
        bus.start();
        bus.send(&job_removed(OWNER, JOB, "done"));
    })
    .unwrap();
}

#[test]
fn a_job_that_ends_before_the_reply_to_its_call_counts() {
    started(MINUTE, |bus| {
        bus.greet();
        bus.send(&job_removed(OWNER, JOB, "done"));
        bus.start();
    })
    .unwrap();
}

#[test]
fn what_others_say_about_a_job_does_not_count() {
    let error = started(MINUTE, |bus| {
        bus.authenticate();
        bus.answer("Hello", BUS, "s", &[":1.23"]);
        // Before it is known who systemd is.
        bus.send(&job_removed("", JOB, "done"));
        bus.answer("AddMatch", BUS, "", &[]);
        bus.answer("Subscribe", OWNER, "", &[]);
        bus.send(&job_removed(":1.66", JOB, "done"));
        bus.start();
        bus.send(&job_removed(":1.66", JOB, "done"));
        bus.send(&job_removed(OWNER, "/org/freedesktop/systemd1/job/1", "done"));
        bus.send(&job_removed(OWNER, JOB, "timeout"));
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::Unknown);
    assert!(error.to_string().contains("\"timeout\""), "{error}");
}

#[test]
fn a_scope_that_fails_is_an_error_with_its_name_and_result() {
    let error = started(MINUTE, |bus| {
        bus.greet();
        bus.start();
        bus.send(&job_removed(OWNER, JOB, "failed"));
    });
    assert_eq!(
        error.unwrap_err().to_string(),
        "cannot start scope cri-raw.scope: systemd's job for it ended as \"failed\"; journalctl --unit cri-raw.scope tells why"
    );
}

#[test]
fn a_scope_that_failed_formerly_is_replaced() {
    for gone in [false, true] {
        started(MINUTE, move |bus| {
            bus.greet();
            bus.refuse("StartTransientUnit", "UnitExists");
            match gone {
                true => bus.refuse("ResetFailedUnit", "NoSuchUnit"),
                false => bus.answer("ResetFailedUnit", OWNER, "", &[]),
            }
            bus.start();
            bus.send(&job_removed(OWNER, JOB, "done"));
        })
        .unwrap();
    }
}

#[test]
fn a_scope_that_runs_is_not_replaced() {
    let error = started(MINUTE, |bus| {
        bus.greet();
        bus.refuse("StartTransientUnit", "UnitExists");
        bus.answer("ResetFailedUnit", OWNER, "", &[]);
        bus.refuse("StartTransientUnit", "UnitExists");
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert!(
        error
            .to_string()
            .ends_with("StartTransientUnit: UnitExists: for a reason"),
        "{error}"
    );
}

#[test]
fn a_refusal_is_not_repeated() {
    let error = started(MINUTE, |bus| {
        bus.greet();
        bus.refuse("StartTransientUnit", "UnixProcessIdUnknown");
    });
    assert_eq!(error.unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_bus_without_systemd_is_unavailable() {
    let error = started(MINUTE, |bus| {
        bus.authenticate();
        bus.answer("Hello", BUS, "s", &[":1.23"]);
        bus.answer("AddMatch", BUS, "", &[]);
        bus.refuse("Subscribe", "ServiceUnknown");
    });
    assert_eq!(error.unwrap_err().kind(), Kind::Unavailable);
}

#[test]
fn the_limits_of_a_folder_are_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pids.max"), "77\n").unwrap();
    std::fs::write(folder.path().join("cpuset.cpus"), "0-2\n").unwrap();
    let script = |bus: &mut Fake| {
        bus.authenticate();
        bus.answer("Hello", BUS, "s", &[":1.23"]);
        let call = bus.call("SetUnitProperties");
        assert_eq!((call.signature.as_str(), call.text()), ("sba(sv)", Some(UNIT)));
        bus.send(&message(2, &[(7, "s", OWNER)], call.serial, "", &[]));
    };
    with_bus(script, |bus| keep_limits_on(bus, UNIT, folder.path(), MINUTE)).unwrap();
}

#[test]
fn a_removed_scope_is_stopped_and_forgotten() {
    removed(|bus| {
        bus.greet();
        bus.belongs("/unit", "/unit");
        bus.answer("StopUnit", OWNER, "o", &[JOB]);
        bus.send(&job_removed(OWNER, JOB, "done"));
        bus.answer("ResetFailedUnit", OWNER, "", &[]);
    })
    .unwrap();
}

#[test]
fn the_absence_of_a_scope_is_success() {
    removed(|bus| {
        bus.greet();
        bus.refuse("GetUnit", "NoSuchUnit");
        bus.refuse("ResetFailedUnit", "NoSuchUnit");
    })
    .unwrap();
    // Since it was asked for.
    removed(|bus| {
        bus.greet();
        bus.belongs("/unit", "/unit");
        bus.refuse("StopUnit", "NoSuchUnit");
        bus.refuse("ResetFailedUnit", "NoSuchUnit");
    })
    .unwrap();
    removed(|bus| {
        bus.greet();
        bus.belongs("/unit", "/unit");
        bus.answer("StopUnit", OWNER, "o", &[JOB]);
        bus.send(&job_removed(OWNER, JOB, "done"));
        bus.refuse("ResetFailedUnit", "NoSuchUnit");
    })
    .unwrap();
}

#[test]
fn a_removal_tells_all_that_went_wrong() {
    let error = removed(|bus| {
        bus.greet();
        bus.belongs("/unit", "/unit");
        bus.answer("StopUnit", OWNER, "o", &[JOB]);
        bus.send(&job_removed(OWNER, JOB, "canceled"));
        bus.refuse("ResetFailedUnit", "SomethingElse");
    });
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("cri-raw.scope") && error.contains("\"canceled\"") && error.contains("SomethingElse"),
        "{error}"
    );
}

#[test]
fn a_unit_of_that_name_in_another_cgroup_is_not_stopped() {
    // The slice around the folder, and a folder that systemd knows nothing of.
    removed(|bus| {
        bus.greet();
        bus.belongs("/unit", "/slice");
        bus.answer("ResetFailedUnit", OWNER, "", &[]);
    })
    .unwrap();
    removed(|bus| {
        bus.greet();
        bus.answer("GetUnit", OWNER, "o", &["/unit"]);
        bus.refuse("GetUnitByControlGroup", "NoSuchUnit");
        bus.answer("ResetFailedUnit", OWNER, "", &[]);
    })
    .unwrap();
    let error = removed(|bus| {
        bus.greet();
        bus.refuse("GetUnit", "SomethingElse");
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("GetUnit: SomethingElse"), "{error}");
}

#[test]
fn a_bus_that_refuses_this_user_is_named() {
    let error = started(MINUTE, |bus| {
        bus.line();
        bus.send(b"REJECTED KERBEROS_V4\r\n");
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::PermissionDenied);
    assert!(error.to_string().contains("/bus; is dbus running?"), "{error}");
}

#[test]
fn nobody_at_the_socket_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bus");
    let error = remove_scope_on(&path, UNIT, FOLDER, MINUTE).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    let expected = format!("cannot reach systemd over {}; is dbus running?", path.display());
    assert!(error.to_string().contains(&expected), "{error}");
    drop(UnixListener::bind(&path).unwrap());
    assert_eq!(
        remove_scope_on(&path, UNIT, FOLDER, MINUTE).unwrap_err().kind(),
        Kind::Unavailable
    );
}

/// How far a conversation gets, and whether systemd has been asked by then, so that something may be left behind.
const STATIONS: [(usize, bool); 5] = [(0, false), (1, false), (2, false), (3, true), (4, true)];

fn as_far_as(station: usize) -> impl FnOnce(&mut Fake) + Send + 'static {
    move |bus| match station {
        0 => {}
        1 => {
            bus.line();
        }
        2 => bus.authenticate(),
        3 => {
            bus.greet();
            bus.call("StartTransientUnit");
        }
        _ => {
            bus.greet();
            bus.start();
        }
    }
}

#[test]
fn a_bus_that_hangs_up_is_unavailable_wherever_it_does() {
    for (station, sent) in STATIONS {
        let error = started(MINUTE, move |bus| {
            as_far_as(station)(bus);
            bus.stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        let error = error.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{station}: {error}");
        assert_eq!(
            error.to_string().contains("systemctl stop cri-raw.scope"),
            sent,
            "{error}"
        );
    }
}

#[test]
fn a_bus_that_is_silent_is_waited_for_until_the_bound() {
    thread::scope(|scope| {
        for (station, sent) in STATIONS {
            scope.spawn(move || {
                let error = started(SHORT, as_far_as(station)).unwrap_err();
                assert_eq!(error.kind(), Kind::DeadlineExceeded, "{station}: {error}");
                assert_eq!(
                    error.to_string().contains("systemctl stop cri-raw.scope"),
                    sent,
                    "{error}"
                );
            });
        }
    });
}

#[test]
fn a_bus_that_talks_for_ever_is_listened_to_until_the_bound() {
    let sent = std::sync::Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let error = started(SHORT, move |bus| {
        bus.greet();
        bus.start();
        let other = job_removed(OWNER, "/org/freedesktop/systemd1/job/1", "done");
        while bus.stream.write_all(&other).is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(error.unwrap_err().kind(), Kind::DeadlineExceeded);
    assert!(sent.load(Ordering::Relaxed) > KEPT_MAX);
}

#[test]
fn a_bus_that_does_not_accept_is_waited_for_until_the_bound() {
    use nix::sys::socket::{Backlog, bind, listen};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bus");
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let error = remove_scope_on(&path, UNIT, FOLDER, Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded, "{error}");
}

#[test]
fn lengths_that_cannot_be_are_refused_at_once() {
    let error = started(MINUTE, |bus| {
        bus.authenticate();
        bus.send(b"l\x02\x01\x01\xff\xff\xff\x7f\x01\0\0\0\x10\0\0\0");
    });
    let error = error.unwrap_err().to_string();
    assert!(error.ends_with("the bus sends a message that is too long"), "{error}");
    let error = started(MINUTE, |bus| {
        bus.line();
        bus.send(&[b'x'; LINE_MAX_BYTES + 1]);
    });
    let error = error.unwrap_err().to_string();
    assert!(error.ends_with("the bus sends a line that is too long"), "{error}");
}
