//! The TOML texts: `config.toml`, and the bare keys of `runtimeoptions.v1.Options`.

use std::{
    borrow::Cow,
    fs::OpenOptions,
    io::{ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Text,
    keys::{self, Key, Layer, Quoted, Value},
    routing::{Attribute, PATTERN_MAX_BYTES, Route},
};
use crate::error::{Context, Error, Result};

/// Upper bound of a configuration text; ours are a few hundred bytes.
pub(super) const TEXT_MAX_BYTES: usize = 64 << 10;

/// What `config.toml` says.
#[derive(Default)]
pub(super) struct Document {
    /// `[options]`.
    pub(super) options: Layer,
    /// `[annotations] allow`; `None` leaves the safe keys.
    pub(super) allow: Option<Vec<&'static str>>,
    /// `[[route]]`, in the order of the file.
    pub(super) routes: Vec<Route>,
}

/// Reads a configuration file that decides what runs as root; so only root may be able to write it.
///
/// `None` if the file does not exist and nobody `required` it. The checks are made on the open file, so that it cannot be exchanged
/// in between, and the open does not wait for the other end of a fifo.
///
/// # Errors
/// The operating system's; `FailedPrecondition` when the owner or the mode is wrong; `InvalidArgument` when it is not a regular
/// file, too large or not UTF-8.
pub(super) fn read(path: &Path, required: bool) -> Result<Option<String>> {
    let name = path.display();
    let cannot = || format!("cannot read configuration {name}");
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match opened {
        Err(e) if e.kind() == ErrorKind::NotFound && !required => return Ok(None),
        opened => opened.context(cannot)?,
    };
    let metadata = file.metadata().context(cannot)?;
    if !metadata.is_file() {
        return Err(Error::invalid(format!("configuration {name} is not a regular file")));
    }
    if metadata.uid() != 0 {
        return Err(Error::precondition(format!(
            "configuration {name} belongs to uid {}, who could run programs as root by it; chown root {name}",
            metadata.uid()
        )));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(Error::precondition(format!(
            "configuration {name} has mode {:04o}, so others than root can write it; chmod go-w {name}",
            metadata.mode() & 0o7777
        )));
    }
    let mut text = Vec::new();
    file.take(TEXT_MAX_BYTES as u64 + 1)
        .read_to_end(&mut text)
        .context(cannot)?;
    if text.len() > TEXT_MAX_BYTES {
        return Err(Error::invalid(format!(
            "configuration {name} is larger than {TEXT_MAX_BYTES} bytes"
        )));
    }
    let text = String::from_utf8(text)
        .map_err(|e| Error::invalid(format!("configuration {name} is not UTF-8")).with_source(e))?;
    Ok(Some(text))
}

/// Parses `config.toml`.
///
/// # Errors
/// `InvalidArgument` with file, line and key.
pub(super) fn parse(text: &Text<'_>) -> Result<Document> {
    let root = Table::parse(text)?;
    let mut document = Document::default();
    for entry in root.entries() {
        match entry.key {
            "options" => {
                for entry in entry.table("[options]")?.entries() {
                    entry.option(&mut document.options)?;
                }
            }
            "annotations" => {
                for entry in entry.table("[annotations]")?.entries() {
                    match entry.key {
                        "allow" => document.allow = Some(entry.keys()?),
                        _ => return Err(entry.unknown("allow")),
                    }
                }
            }
            "route" => {
                for table in entry.tables("[[route]]")? {
                    document.routes.push(route(&table)?);
                }
            }
            key if Key::find(key).is_some() => {
                return Err(entry.error(&format!("{key} stands outside of a table; put it under [options]")));
            }
            _ => return Err(entry.unknown("[options], [annotations] and [[route]]")),
        }
    }
    Ok(document)
}

/// Parses a text that holds our keys and no table: what CRI makes of a runtime's options table, or the file of
/// `ctr run --runtime-config-path`. runc's options keep working, under their names there and as runc's shim reads them: empty, zero
/// and false are not set. A key of ours wins over one of theirs.
///
/// # Errors
/// `InvalidArgument` with origin, line and key.
pub(super) fn parse_bare(text: &Text<'_>) -> Result<Layer> {
    let root = Table::parse(text)?;
    let (mut layer, mut of_runc) = (Layer::default(), Layer::default());
    for entry in root.entries() {
        match entry.key {
            // CRI hands on the whole options table, with the key that it reads itself.
            "TypeUrl" | "type_url" => {}
            "options" | "annotations" | "route" => {
                return Err(entry.error(&format!(
                    "the table {} belongs into {}; here the keys stand without a table",
                    entry.key,
                    super::DEFAULT_CONFIG_FILE
                )));
            }
            name => match keys::of_runc(name) {
                Some(Some(key)) if !entry.value().is_unset() => {
                    entry.set(key, &mut of_runc)?;
                    let binary = of_runc.crun_binary.as_deref().unwrap_or_default();
                    keys::refuse_runc(binary).map_err(|problem| entry.error(&problem))?;
                }
                Some(_) => {}
                None => entry.option(&mut layer)?,
            },
        }
    }
    keys::fill(&mut layer, of_runc);
    Ok(layer)
}

fn route(table: &Table<'_>) -> Result<Route> {
    let mut route = Route::default();
    for entry in table.entries() {
        let Some(attribute) = Attribute::find(entry.key) else {
            entry.option(&mut route.options)?;
            continue;
        };
        match entry.value {
            DeValue::String(pattern) if !pattern.is_empty() && pattern.len() <= PATTERN_MAX_BYTES => {
                route.patterns.push((attribute, pattern.clone().into_owned()));
            }
            _ => {
                return Err(entry.error(&format!(
                    "pattern {} must be a string of 1 to {PATTERN_MAX_BYTES} bytes",
                    entry.key
                )));
            }
        }
    }
    if route.patterns.is_empty() {
        return Err(table.error(
            "a [[route]] without namespace, pod_namespace, image or name matches every container; put its keys under [options]",
        ));
    }
    Ok(route)
}

/// A table and the text it came from, for messages.
struct Table<'a> {
    text: &'a Text<'a>,
    /// Byte in the text where it begins.
    start: usize,
    table: Cow<'a, DeTable<'a>>,
}

/// A key of a table with its value.
struct Entry<'a> {
    text: &'a Text<'a>,
    start: usize,
    key: &'a str,
    value: &'a DeValue<'a>,
}

impl<'a> Table<'a> {
    fn parse(text: &'a Text<'a>) -> Result<Self> {
        if text.toml.len() > TEXT_MAX_BYTES {
            return Err(Error::invalid(format!(
                "{} is larger than {TEXT_MAX_BYTES} bytes",
                text.origin
            )));
        }
        let table = DeTable::parse(text.toml).map_err(|e| {
            // The error's own text quotes the line, which may hold what must not be shown.
            let start = e.span().map_or(0, |span| span.start);
            error(text, start, &format!("not TOML: {}", e.message()))
        })?;
        Ok(Self {
            text,
            start: 0,
            table: Cow::Owned(table.into_inner()),
        })
    }

    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.table.iter().map(|(key, value)| Entry {
            text: self.text,
            start: key.span().start,
            key: key.get_ref().as_ref(),
            value: value.get_ref(),
        })
    }

    fn error(&self, problem: &str) -> Error {
        error(self.text, self.start, problem)
    }
}

impl<'a> Entry<'a> {
    fn error(&self, problem: &str) -> Error {
        error(self.text, self.start, problem)
    }

    /// An unknown key where no option can stand.
    fn unknown(&self, known: &str) -> Error {
        self.error(&format!("unknown key {}; known are {known}", Quoted(self.key)))
    }

    fn option(&self, layer: &mut Layer) -> Result<()> {
        let Some(key) = Key::find(self.key) else {
            return Err(keys::unknown(self.key, &place(self.text, self.start)));
        };
        self.set(key, layer)
    }

    fn value(&self) -> Value<'_> {
        match self.value {
            DeValue::String(text) => Value::Text(text),
            DeValue::Boolean(flag) => Value::Flag(*flag),
            DeValue::Integer(digits) => match u64::from_str_radix(digits.as_str(), digits.radix()) {
                Ok(number) => Value::Number(number),
                Err(_) => Value::Other("negative or too large integer"),
            },
            other => Value::Other(other.type_str()),
        }
    }

    /// Sets `key` to the value, under whatever name that has here.
    fn set(&self, key: &Key, layer: &mut Layer) -> Result<()> {
        key.set(layer, self.value())
            .map_err(|problem| self.error(&format!("{} {problem}", self.key)))
    }

    fn table(&self, name: &str) -> Result<Table<'a>> {
        let DeValue::Table(table) = self.value else {
            return Err(self.error(&format!("{} must be a table, {name}", self.key)));
        };
        Ok(Table {
            text: self.text,
            start: self.start,
            table: Cow::Borrowed(table),
        })
    }

    fn tables(&self, name: &str) -> Result<Vec<Table<'a>>> {
        let wrong = || self.error(&format!("{} must be an array of tables, {name}", self.key));
        let DeValue::Array(array) = self.value else {
            return Err(wrong());
        };
        let table = |value: &'a Spanned<DeValue<'a>>| match value.get_ref() {
            DeValue::Table(table) => Ok(Table {
                text: self.text,
                start: value.span().start,
                table: Cow::Borrowed(table),
            }),
            _ => Err(wrong()),
        };
        array.iter().map(table).collect()
    }

    /// The value as a list of names of keys.
    fn keys(&self) -> Result<Vec<&'static str>> {
        let wrong = || self.error(&format!("{} must be an array of names of keys", self.key));
        let DeValue::Array(array) = self.value else {
            return Err(wrong());
        };
        let name = |value: &Spanned<DeValue<'_>>| match value.get_ref() {
            DeValue::String(name) => match Key::find(name) {
                Some(key) => Ok(key.name),
                None => Err(keys::unknown(name, &place(self.text, value.span().start))),
            },
            _ => Err(wrong()),
        };
        array.iter().map(name).collect()
    }
}

fn error(text: &Text<'_>, start: usize, problem: &str) -> Error {
    Error::invalid(format!("{}: {problem}", place(text, start)))
}

/// "<origin> line <n>".
fn place(text: &Text<'_>, start: usize) -> String {
    let before = &text.toml.as_bytes()[..start.min(text.toml.len())];
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    format!("{} line {line}", text.origin)
}
