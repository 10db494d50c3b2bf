//! systemd, over D-Bus: the transient scope of a container, as crun makes it with `--systemd-cgroup` (its `cgroup-systemd.c`).
//!
//! ```text
//! connect ─▶ AUTH EXTERNAL ─▶ Hello ─▶ AddMatch(JobRemoved of the unit) ─▶ Subscribe ─▶ StartTransientUnit ─▶ JobRemoved "done"
//!                                                                             │ UnitExists, once
//!                                                                             └─ ResetFailedUnit, again
//! ```
//!
//! A client of its own, for a few calls: it blocks, each call has a connection of its own, and every wait ends at the call's bound.
//! A signal counts when the bus says that it is from the one who answers as systemd: anybody may send one.
//!
//! What systemd does to the cgroup of a scope (seen with 257 and cgroup v2):
//! - A folder that exists is taken, and a process that is in it stays. A process in a cgroup below is moved up, which fails when
//!   that cgroup has controllers.
//! - It writes every limit that it knows of: without one it is told the kernel's default, but `DefaultTasksMax` as `pids.max`. So
//!   limits of ours are to be written after [`start_scope`].
//! - With `Delegate` the controllers stay enabled in the slices above, and nothing below the scope is touched from then on.
//! - It writes its limits again when a property of the scope is changed, and after a `daemon-reload` when the next unit begins in the
//!   same slice. Ours are lost then, unless it was told them by [`keep_limits`].
//! - A program for devices that LXC has attached stays.
//! - When the last process is gone it removes the folder within a moment, and forgets the scope: `memory.events` goes with it.

mod limits;
mod message;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStringExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt},
    time::{TimeVal, TimeValLike},
};

use self::limits::Limit;
use self::message::{Call, JobRemoved, MAX_BYTES, Malformed, Message, Type, Value, Writer};
use super::cgroup::parse;
use crate::error::{Context, Error, Kind, Result, kind_of_io};

/// The system bus, where no other is named.
const SOCKET: &str = "/run/dbus/system_bus_socket";

/// Names another system bus (dbus-daemon(1)).
const ADDRESS_VARIABLE: &str = "DBUS_SYSTEM_BUS_ADDRESS";

const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Bound of a line of the authentication; the specification has none.
const LINE_MAX_BYTES: usize = 1 << 10;

/// What of a text of systemd's goes into an error.
const TEXT_MAX_CHARS: usize = 512;

/// Signals that are kept while a reply is awaited. There is a handful, for the bus sends only those of one unit.
const KEPT_MAX: usize = 64;

/// The longest name of a unit (systemd.unit(5)).
const UNIT_MAX_BYTES: usize = 255;

/// The scope of container `id` and the slice in which it is to lie, for the `linux.cgroupsPath` of a spec. Its folder is
/// [`parse::container_path`] with `systemd`. The slice is always named, for the folder tells it too.
///
/// # Errors
/// `InvalidArgument` for what systemd would refuse.
pub fn scope_of(cgroups_path: Option<&str>, id: &str) -> Result<(String, String)> {
    // The whole rule: also what cannot be a folder is refused.
    parse::container_path(cgroups_path, true, id)?;
    let (unit, slice) = parse::systemd_units(cgroups_path.unwrap_or_default(), id);
    check_unit(&unit, ".scope")?;
    check_unit(slice, ".slice")?;
    Ok((unit, slice.to_owned()))
}

/// Makes the transient scope `unit` in `slice` (empty: systemd's default) with the processes `pids`: they are in it, and it runs,
/// when this returns. Its cgroup may exist and the processes may be in it. A scope of that name which has failed is replaced.
///
/// Blocks for `bound` at most. Limits of the cgroup that were written before are gone afterwards.
///
/// # Errors
/// `Unavailable` without systemd on the bus, `AlreadyExists` while a scope of that name runs, `InvalidArgument` for a name that
/// cannot be one, `DeadlineExceeded` at `bound`, and what systemd says. The scope may be left behind; [`remove_scope`] removes it.
pub fn start_scope(unit: &str, slice: &str, description: &str, pids: &[u32], bound: Duration) -> Result<()> {
    start_scope_on(&address()?, unit, slice, description, pids, bound)
}

/// Stops the scope `unit` with everything in it, and makes systemd forget that it failed. Absence is success, and so is a unit of that
/// name that has another cgroup than `folder` (below the root of the hierarchy, beginning with a slash): it is somebody else's, who goes
/// on.
///
/// Blocks for `bound` at most. systemd sends SIGTERM and waits for 90 s before SIGKILL: kill first whoever does not listen.
///
/// # Errors
/// As [`start_scope`]; the scope may be there still, and the call can be repeated.
pub fn remove_scope(unit: &str, folder: &str, bound: Duration) -> Result<()> {
    remove_scope_on(&address()?, unit, folder, bound)
}

/// Makes systemd know the limits that the cgroup `folder` (v2) of the running scope `unit` has, so that they stay when it writes its
/// own again. To be called after each change of them. It writes at once, and also what it cannot be told: `memory.oom.group` is 0 then.
///
/// Blocks for `bound` at most.
///
/// # Errors
/// As [`start_scope`]; `NotFound` without such a scope. The limits hold all the same, until the next `daemon-reload`.
pub fn keep_limits(unit: &str, folder: &Path, bound: Duration) -> Result<()> {
    keep_limits_on(&address()?, unit, folder, bound)
}

fn keep_limits_on(bus: &Path, unit: &str, folder: &Path, bound: Duration) -> Result<()> {
    check_unit(unit, ".scope")?;
    let what = || format!("cannot tell systemd the limits of scope {unit}; they hold until systemctl daemon-reload");
    let found = limits::properties(|file| {
        let bytes = super::read_kernel_file(folder.join(file)).ok()?;
        String::from_utf8(bytes).ok()
    });
    let call = manager_call("SetUnitProperties", "sba(sv)", |arguments| {
        arguments.string(unit);
        // Not beyond a reboot.
        arguments.bool(true);
        arguments.array(8, |properties| {
            for (name, limit) in &found {
                properties.property(
                    name,
                    match limit {
                        Limit::Number(number) => Value::Number(*number),
                        Limit::Bits(bits) => Value::Bytes(bits),
                    },
                );
            }
        });
    });
    let mut bus = Bus::connect(bus, bound).context(what)?;
    bus.call(call).map(|_| ()).context(what)
}

fn start_scope_on(bus: &Path, unit: &str, slice: &str, description: &str, pids: &[u32], bound: Duration) -> Result<()> {
    check_unit(unit, ".scope")?;
    if !slice.is_empty() {
        check_unit(slice, ".slice")?;
    }
    if description.contains('\0') {
        return Err(Error::invalid(format!("scope {unit}: a NUL byte in the description")));
    }
    let what = || format!("cannot start scope {unit}");
    let mut bus = Bus::connect(bus, bound).context(what)?;
    bus.watch(unit).context(what)?;
    let start = || transient_unit(unit, slice, description, pids);
    let started = bus.job(start()).or_else(|e| {
        if e.kind() != Kind::AlreadyExists {
            return Err(e);
        }
        // Of one that runs nothing is reset, and it exists as before.
        gone_is_fine(bus.reset_failed(unit))?;
        bus.job(start())
    });
    let removed = started.and_then(|job| bus.removal(&job));
    removed
        .and_then(|removed| done(&removed, unit))
        .map_err(|e| match e.kind() {
            Kind::DeadlineExceeded | Kind::Unavailable => e.context(format!(
                "cannot start scope {unit}; it may be left behind: systemctl stop {unit}"
            )),
            Kind::AlreadyExists => e.context(format!(
                "cannot start scope {unit}: it is in use; systemctl status {unit} tells by whom"
            )),
            _ => e.context(what()),
        })
}

fn remove_scope_on(bus: &Path, unit: &str, folder: &str, bound: Duration) -> Result<()> {
    check_unit(unit, ".scope")?;
    let what = || format!("cannot remove scope {unit}; systemctl status {unit} tells what is left of it");
    let mut bus = Bus::connect(bus, bound).context(what)?;
    bus.watch(unit).context(what)?;
    let stopped = match bus.has(unit, folder).context(what)? {
        true => bus
            .job(manager_call("StopUnit", "ss", |arguments| {
                arguments.string(unit);
                arguments.string("replace");
            }))
            .and_then(|job| bus.removal(&job))
            .and_then(|removed| done(&removed, unit)),
        // One that has failed has no cgroup any more.
        false => Ok(()),
    };
    let results = [gone_is_fine(stopped), gone_is_fine(bus.reset_failed(unit))];
    let errors = results.into_iter().filter_map(Result::err).collect();
    Error::all(errors).map_or(Ok(()), Err).context(what)
}

fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if e.kind() == Kind::NotFound => Ok(()),
        result => result,
    }
}

/// Whether a job has come to its end as it should.
fn done(removed: &JobRemoved, unit: &str) -> Result<()> {
    match removed.result.as_str() {
        "done" => Ok(()),
        result => Err(Error::unknown(format!(
            "systemd's job for it ended as {:?}; journalctl --unit {unit} tells why",
            printable(result)
        ))),
    }
}

fn check_unit(name: &str, suffix: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    let fits = name.len() > suffix.len() && name.len() <= UNIT_MAX_BYTES && name.ends_with(suffix);
    if fits && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "invalid systemd unit {name:?}: letters, digits and \":-_.\\@\", at most {UNIT_MAX_BYTES} with {suffix} at the end"
    )))
}

fn manager_call<'a>(member: &'a str, signature: &'a str, arguments: impl FnOnce(&mut Writer)) -> Call<'a> {
    let mut writer = Writer::default();
    arguments(&mut writer);
    Call {
        destination: SYSTEMD,
        path: SYSTEMD_PATH,
        interface: MANAGER,
        member,
        signature,
        arguments: writer,
    }
}

fn bus_call<'a>(member: &'a str, signature: &'a str, arguments: impl FnOnce(&mut Writer)) -> Call<'a> {
    Call {
        destination: BUS,
        path: BUS_PATH,
        interface: BUS,
        ..manager_call(member, signature, arguments)
    }
}

/// crun's, but for the properties of the limits: those are written as files.
fn transient_unit(unit: &str, slice: &str, description: &str, pids: &[u32]) -> Call<'static> {
    manager_call("StartTransientUnit", "ssa(sv)a(sa(sv))", |arguments| {
        arguments.string(unit);
        arguments.string("fail");
        arguments.array(8, |properties| {
            if !slice.is_empty() {
                properties.property("Slice", Value::Text(slice));
            }
            properties.property("Description", Value::Text(description));
            properties.property("DefaultDependencies", Value::Bool(false));
            properties.property("Delegate", Value::Bool(true));
            properties.property("PIDs", Value::Numbers(pids));
        });
        // Units that go along with it.
        arguments.array(8, |_| {});
    })
}

/// The socket of the system bus.
fn address() -> Result<PathBuf> {
    match std::env::var_os(ADDRESS_VARIABLE) {
        Some(list) if !list.is_empty() => socket_in(&list),
        _ => Ok(PathBuf::from(SOCKET)),
    }
}

/// The first socket that has a path in a list of addresses (D-Bus Specification, "Server Addresses").
fn socket_in(list: &OsStr) -> Result<PathBuf> {
    let found = list.to_str().and_then(|list| {
        list.split(';').find_map(|address| {
            let pairs = address.strip_prefix("unix:")?;
            unescape(pairs.split(',').find_map(|pair| pair.strip_prefix("path="))?)
        })
    });
    found.ok_or_else(|| {
        Error::precondition(format!(
            "cannot reach systemd: {ADDRESS_VARIABLE}={} has no unix:path=/…",
            list.display()
        ))
    })
}

/// Decodes `%20` and its like; `None` where that is not possible, and for what is no absolute path.
fn unescape(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        bytes.push(match (first, tail) {
            (b'%', [high, low, after @ ..]) => {
                rest = after;
                let digit = |byte: &u8| {
                    char::from(*byte)
                        .to_digit(16)
                        .and_then(|digit| u8::try_from(digit).ok())
                };
                digit(high)? << 4 | digit(low)?
            }
            (b'%', _) => return None,
            (byte, _) => *byte,
        });
    }
    let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
    path.is_absolute().then_some(path)
}

/// A connection to the bus, for one piece of work.
struct Bus {
    stream: UnixStream,
    bound: Duration,
    deadline: Instant,
    /// Of the last message that was sent.
    serial: u32,
    /// What was read and not yet understood.
    inbox: Vec<u8>,
    /// The unique name of the one who answers as systemd.
    systemd: String,
    /// Signals that came before they were asked for.
    kept: Vec<JobRemoved>,
}

impl Bus {
    /// # Errors
    /// `Unavailable` if nobody is there, `PermissionDenied` if the bus does not want us.
    fn connect(path: &Path, bound: Duration) -> Result<Self> {
        let deadline = Instant::now() + bound;
        let what = || format!("cannot reach systemd over {}; is dbus running?", path.display());
        let stream = open(path, bound).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => late(bound).context(what()),
            io::ErrorKind::PermissionDenied => Error::new(Kind::PermissionDenied, what()).with_source(e),
            _ => Error::unavailable(what()).with_source(e),
        })?;
        let mut bus = Self {
            stream,
            bound,
            deadline,
            serial: 0,
            inbox: Vec::new(),
            systemd: String::new(),
            kept: Vec::new(),
        };
        bus.authenticate().and_then(|()| bus.hello()).context(what)?;
        Ok(bus)
    }

    /// As who the kernel says that we are (D-Bus Specification, "Authentication Protocol").
    fn authenticate(&mut self) -> Result<()> {
        let uid = nix::unistd::geteuid().to_string();
        let hex: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
        self.send(format!("\0AUTH EXTERNAL {hex}\r\n").as_bytes())?;
        let line = self.line()?;
        if line != "OK" && !line.starts_with("OK ") {
            return Err(Error::new(
                Kind::PermissionDenied,
                format!("the bus does not take user {uid}: {:?}", printable(&line)),
            ));
        }
        self.send(b"BEGIN\r\n")
    }

    fn hello(&mut self) -> Result<()> {
        self.call(bus_call("Hello", "", |_| {})).map(|_| ())
    }

    /// Makes the ends of the jobs of `unit` be told.
    fn watch(&mut self, unit: &str) -> Result<()> {
        // A unit's name has nothing in it that ends a quotation.
        let rule = format!(
            "type='signal',sender='{SYSTEMD}',path='{SYSTEMD_PATH}',interface='{MANAGER}',member='JobRemoved',arg2='{unit}'"
        );
        self.call(bus_call("AddMatch", "s", |arguments| arguments.string(&rule)))?;
        let reply = self.call(manager_call("Subscribe", "", |_| {}))?;
        self.systemd = reply.sender;
        Ok(())
    }

    /// Calls a method that answers with a job.
    fn job(&mut self, call: Call<'_>) -> Result<String> {
        let reply = self.call(call)?;
        let job = reply
            .object()
            .ok_or_else(|| Error::unknown("systemd does not answer with a job"))?;
        Ok(job.to_owned())
    }

    /// Waits until a job has ended.
    fn removal(&mut self, job: &str) -> Result<JobRemoved> {
        loop {
            if let Some(at) = self.kept.iter().position(|removed| removed.job == job) {
                return Ok(self.kept.swap_remove(at));
            }
            let message = self.receive()?;
            self.keep(&message);
        }
    }

    /// Whether the cgroup `folder` is that of `unit`. systemd answers for a cgroup that is no unit's with the unit around it.
    fn has(&mut self, unit: &str, folder: &str) -> Result<bool> {
        let mut ask = |member, text: &str| {
            let found = self.call(manager_call(member, "s", |arguments| arguments.string(text)));
            match found {
                Ok(message) => Ok(message.object().map(str::to_owned)),
                Err(e) if e.kind() == Kind::NotFound => Ok(None),
                Err(e) => Err(e),
            }
        };
        let Some(unit) = ask("GetUnit", unit)? else {
            return Ok(false);
        };
        Ok(ask("GetUnitByControlGroup", folder)?.as_ref() == Some(&unit))
    }

    fn reset_failed(&mut self, unit: &str) -> Result<()> {
        self.call(manager_call("ResetFailedUnit", "s", |arguments| arguments.string(unit)))
            .map(|_| ())
    }

    /// # Errors
    /// What the other side says, by what it means.
    fn call(&mut self, call: Call<'_>) -> Result<Message> {
        self.serial += 1;
        let message = call.encode(self.serial);
        if message.len() > MAX_BYTES {
            return Err(Error::invalid(format!(
                "{} with {} bytes of arguments",
                call.member,
                message.len()
            )));
        }
        self.send(&message)?;
        loop {
            let message = self.receive()?;
            match message.kind {
                Type::Reply if message.reply_serial == Some(self.serial) => return Ok(message),
                Type::Error if message.reply_serial == Some(self.serial) => return Err(refusal(call.member, &message)),
                _ => self.keep(&message),
            }
        }
    }

    /// Keeps a message that tells of a job's end.
    fn keep(&mut self, message: &Message) {
        let told = message.kind == Type::Signal
            && message.member == "JobRemoved"
            && message.interface == MANAGER
            && message.path == SYSTEMD_PATH
            && !message.sender.is_empty()
            && message.sender == self.systemd;
        if told && self.kept.len() < KEPT_MAX {
            self.kept.extend(message.job_removed());
        }
    }

    fn receive(&mut self) -> Result<Message> {
        let strange = |Malformed(what)| Error::unknown(format!("the bus sends {what}"));
        loop {
            if let Some(size) = Message::size(&self.inbox).map_err(strange)?
                && let Some(bytes) = self.inbox.get(..size)
            {
                let message = Message::parse(bytes).map_err(strange)?;
                self.inbox.drain(..size);
                return Ok(message);
            }
            self.fill()?;
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.inbox.windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8_lossy(self.inbox.get(..end).unwrap_or_default()).into_owned();
                self.inbox.drain(..end + 2);
                return Ok(line);
            }
            if self.inbox.len() > LINE_MAX_BYTES {
                return Err(Error::unknown("the bus sends a line that is too long"));
            }
            self.fill()?;
        }
    }

    /// Reads what there is, at least one byte.
    fn fill(&mut self) -> Result<()> {
        let mut chunk = [0; 4 << 10];
        loop {
            let rest = self.rest()?;
            self.stream
                .set_read_timeout(Some(rest))
                .context(|| "cannot bound a read")?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::unavailable("the bus has closed the connection")),
                Ok(read) => {
                    self.inbox.extend(chunk.iter().take(read));
                    return Ok(());
                }
                Err(e) => self.pass(e)?,
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let rest = self.rest()?;
            self.stream
                .set_write_timeout(Some(rest))
                .context(|| "cannot bound a write")?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(e) => self.pass(e)?,
            }
        }
        Ok(())
    }

    fn rest(&self) -> Result<Duration> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(late(self.bound)),
            rest => Ok(rest),
        }
    }

    /// Lets pass an error after which it is tried again, or found to be too late.
    fn pass(&self, error: io::Error) -> Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Err(Error::unavailable("the bus has closed the connection").with_source(error))
            }
            _ => Err(Error::new(kind_of_io(&error), "cannot talk to the bus").with_source(error)),
        }
    }
}

/// Connects. A bus that does not accept makes that wait, too (unix(7), SO_SNDTIMEO).
fn open(path: &Path, bound: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Zero would be for ever.
    let micros = i64::try_from(bound.as_micros()).unwrap_or(i64::MAX).max(1);
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(UnixStream::from(socket))
}

fn late(bound: Duration) -> Error {
    Error::deadline(format!("no answer within {bound:?}"))
}

/// What an error of systemd's or of the bus means.
fn refusal(member: &str, message: &Message) -> Error {
    let name = message.error_name.as_str();
    let last = name.rsplit('.').next().unwrap_or(name);
    let kind = match last {
        "UnitExists" => Kind::AlreadyExists,
        "NoSuchUnit" | "UnixProcessIdUnknown" | "NoSuchProcess" | "ESRCH" => Kind::NotFound,
        "ServiceUnknown" | "NameHasNoOwner" | "Disconnected" | "NoReply" | "NoServer" | "ShuttingDown" => {
            Kind::Unavailable
        }
        "AccessDenied" | "AuthFailed" | "InteractiveAuthorizationRequired" => Kind::PermissionDenied,
        "InvalidArgs" | "BadUnitSetting" | "PropertyReadOnly" => Kind::InvalidArgument,
        "LimitsExceeded" | "NoMemory" => Kind::ResourceExhausted,
        "Timeout" | "TimedOut" => Kind::DeadlineExceeded,
        _ => Kind::Unknown,
    };
    let text = printable(message.text().unwrap_or_default());
    Error::new(kind, format!("{member}: {}: {text}", printable(last)))
}

/// A text from outside for an error: one line, not too long.
fn printable(text: &str) -> String {
    let shown = text.trim().chars().take(TEXT_MAX_CHARS);
    shown.map(|c| if c.is_control() { ' ' } else { c }).collect()
}
