//! The shim's log: lines in containerd's own form, written to the fifo `<bundle>/log`, which containerd copies to its log.
//!
//! Writing never waits. Nobody may read the fifo (containerd is away), or a reader may be stuck: then messages are dropped and
//! counted, and the count is told when it goes on. A restarted containerd opens the fifo anew; so does this, at the next message.

use std::{
    borrow::Cow,
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::error::{Error, Result};

/// A line that is no longer than this reaches a fifo whole or not at all (pipe(7), PIPE_BUF).
const LINE_MAX_BYTES: usize = libc::PIPE_BUF;

/// Writes to the fifo of one bundle.
pub struct FifoLog {
    path: PathBuf,
    level: LevelFilter,
    /// Ends every line: who speaks.
    fields: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    fifo: Option<File>,
    dropped: u64,
}

impl FifoLog {
    /// A log to `<bundle>/log`. Opens nothing yet.
    pub fn new(bundle: &Path, namespace: &str, id: &str, debug: bool) -> Self {
        let mut fields = String::from("runtime=io.containerd.proxmox-lxcri.v1");
        field(&mut fields, "namespace", namespace);
        field(&mut fields, "id", id);
        Self {
            path: bundle.join("log"),
            level: if debug { LevelFilter::Debug } else { LevelFilter::Info },
            fields,
            state: Mutex::default(),
        }
    }

    /// Makes this the process's log, and writes panics into it.
    ///
    /// # Errors
    /// `FailedPrecondition` when the process has a log already.
    pub fn install(self) -> Result<()> {
        log::set_max_level(self.level);
        // Leaked: it lives as long as the process.
        log::set_logger(Box::leak(Box::new(self)))
            .map_err(|e| Error::precondition(format!("cannot set up the log: {e}")))?;
        std::panic::set_hook(Box::new(|panic| log::error!("panic: {panic}")));
        Ok(())
    }

    fn write(&self, level: Level, message: &str) {
        let now = SystemTime::now();
        // A panic while the lock was held leaves nothing half-done that matters here.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.dropped > 0 {
            let text = format!("{} log messages were dropped because nobody read them", state.dropped);
            if state.send(&self.path, line(now, Level::Warn, &text, &self.fields).as_bytes()) {
                state.dropped = 0;
            }
        }
        if state.dropped > 0 || !state.send(&self.path, line(now, level, message, &self.fields).as_bytes()) {
            state.dropped += 1;
        }
    }
}

impl State {
    /// Whether the line was taken.
    fn send(&mut self, path: &Path, line: &[u8]) -> bool {
        if let Some(fifo) = &mut self.fifo {
            match fifo.write(line) {
                Ok(_) => return true,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                // The reader left (EPIPE); there may be a new one.
                Err(_) => self.fifo = None,
            }
        }
        // ENXIO when nobody reads, ENOENT when the bundle is gone.
        let opened = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let Ok(fifo) = opened else {
            return false;
        };
        self.fifo.insert(fifo).write(line).is_ok()
    }
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.write(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// One line in the text form of logrus, which containerd uses: `time="…" level=… msg="…"`, no longer than [`LINE_MAX_BYTES`].
fn line(time: SystemTime, level: Level, message: &str, fields: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let mut line = format!("time=\"{}\" level={level}", rfc3339(time));
    // 2 line feeds' worth of slack; quoting may double a message, so it is cut until it fits.
    let room = LINE_MAX_BYTES.saturating_sub(line.len() + fields.len() + 2);
    let mut cut = message.len().min(room);
    loop {
        while !message.is_char_boundary(cut) {
            cut -= 1;
        }
        let mut text = Cow::Borrowed(&message[..cut]);
        if cut < message.len() {
            text.to_mut().push('…');
        }
        let mut quoted = String::new();
        field(&mut quoted, "msg", &text);
        if quoted.len() <= room || cut == 0 {
            line.push_str(&quoted);
            break;
        }
        cut -= (quoted.len() - room).div_ceil(2).min(cut);
    }
    let _ = writeln!(line, " {fields}");
    line
}

/// Appends ` name=value`, quoted where logrus would.
fn field(line: &mut String, name: &str, value: &str) {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._/@^+".contains(&b);
    if !value.is_empty() && value.bytes().all(plain) {
        let _ = write!(line, " {name}={value}");
    } else {
        let _ = write!(line, " {name}={value:?}");
    }
}

/// UTC with nanoseconds.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // The civil calendar counted in eras of 400 years from 0000-03-01, so that the leap day ends a year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use std::{io::Read, time::Duration};

    use nix::{sys::stat::Mode, unistd::mkfifo};
    use proptest::prelude::*;

    use super::*;

    fn fifo() -> (tempfile::TempDir, FifoLog) {
        let dir = tempfile::tempdir().unwrap();
        mkfifo(&dir.path().join("log"), Mode::from_bits_truncate(0o600)).unwrap();
        let log = FifoLog::new(dir.path(), "ns", "a", false);
        (dir, log)
    }

    fn reader(dir: &tempfile::TempDir) -> File {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(dir.path().join("log"))
            .unwrap()
    }

    fn read(reader: &mut File) -> String {
        let mut bytes = vec![0; 1 << 20];
        let mut length = 0;
        loop {
            match reader.read(&mut bytes[length..]) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_line_looks_like_containerds() {
        let time = UNIX_EPOCH + Duration::new(1_709_164_800, 5);
        let fields = FifoLog::new(Path::new("/"), "k8s.io", "a b", false).fields;
        assert_eq!(
            line(time, Level::Warn, "a \"b\"\nc", &fields),
            "time=\"2024-02-29T00:00:00.000000005Z\" level=warning msg=\"a \\\"b\\\"\\nc\" \
             runtime=io.containerd.proxmox-lxcri.v1 namespace=k8s.io id=\"a b\"\n"
        );
        assert!(line(time, Level::Info, "plain", "").contains(" msg=plain "));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00"),
            (951_827_696, "2000-02-29T12:34:56"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            let text = rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(text, format!("{date}.000000000Z"));
        }
    }

    #[test]
    fn without_a_reader_nothing_waits_and_the_loss_is_told_later() {
        let (dir, log) = fifo();
        log.write(Level::Info, "lost");
        log.write(Level::Info, "lost too");
        let mut reader = reader(&dir);
        log.write(Level::Info, "heard");
        let text = read(&mut reader);
        assert!(text.contains("2 log messages were dropped"), "{text}");
        assert!(text.contains("msg=heard"), "{text}");
        assert_eq!(text.lines().count(), 2, "{text}");
    }

    #[test]
    fn a_stuck_reader_loses_messages_but_stops_nobody() {
        let (dir, log) = fifo();
        let mut reader = reader(&dir);
        for n in 0..5_000 {
            log.write(Level::Info, &format!("message {n}"));
        }
        let text = read(&mut reader);
        assert!(text.contains("message 0\""));
        assert!(!text.contains("message 4999\""));
        log.write(Level::Info, "after");
        let text = read(&mut reader);
        assert!(text.contains("log messages were dropped"), "{text}");
        assert!(text.contains("msg=after"), "{text}");
    }

    #[test]
    fn a_new_reader_hears_what_is_said_after_the_old_one_left() {
        let (dir, log) = fifo();
        let mut first = reader(&dir);
        log.write(Level::Info, "one");
        assert!(read(&mut first).contains("msg=one"));
        drop(first);
        log.write(Level::Info, "unheard");
        let mut second = reader(&dir);
        log.write(Level::Info, "two");
        let text = read(&mut second);
        assert!(text.contains("1 log messages were dropped"), "{text}");
        assert!(text.contains("msg=two"), "{text}");
    }

    #[test]
    fn a_bundle_that_is_gone_is_no_trouble() {
        let (dir, log) = fifo();
        drop(dir);
        log.write(Level::Info, "nowhere");
        assert_eq!(log.state.lock().unwrap().dropped, 1);
    }

    proptest! {
        #[test]
        fn every_message_is_one_line_that_fits(message in "(?s).{0,3000}") {
            let line = line(SystemTime::now(), Level::Info, &message, "id=a");
            prop_assert!(line.len() <= LINE_MAX_BYTES, "{}", line.len());
            prop_assert_eq!(line.matches('\n').count(), 1);
        }
    }
}
