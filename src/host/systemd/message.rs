//! D-Bus messages, as far as a client of systemd needs them; pure (D-Bus Specification, "Message Protocol").
//!
//! What is read comes from outside: whatever it is, nothing here panics, and nothing is longer than [`MAX_BYTES`].

/// Bound of a message, headers and all. The protocol's own is 128 MiB; what systemd has to say here fits into 1 KiB.
pub(super) const MAX_BYTES: usize = 64 << 10;

/// Bytes that tell how long a message is.
const HEAD_BYTES: usize = 16;

/// Where the length of the body stands, and the one of the header fields.
const BODY_LENGTH_AT: usize = 4;
const FIELDS_LENGTH_AT: usize = 12;

/// Not "please start this service": who is not on the bus cannot be started by it.
const NO_AUTO_START: u8 = 0x2;

/// Codes of the header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Call,
    Reply,
    Error,
    Signal,
    /// "Unknown types MUST be ignored."
    Unknown,
}

/// Bytes that are no message, or not one that this client takes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// A message that was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: Type,
    pub(super) serial: u32,
    pub(super) reply_serial: Option<u32>,
    /// Texts are empty when the message has none.
    pub(super) path: String,
    pub(super) interface: String,
    pub(super) member: String,
    pub(super) error_name: String,
    pub(super) destination: String,
    /// Set by the bus; a sender cannot choose it.
    pub(super) sender: String,
    pub(super) signature: String,
    body: Vec<u8>,
    big_endian: bool,
}

/// The signal `JobRemoved` of systemd's manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobRemoved {
    pub(super) job: String,
    pub(super) unit: String,
    pub(super) result: String,
}

impl Message {
    /// How long the message is that begins here. `None` while that cannot be known.
    pub(super) fn size(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let Some(head) = bytes.get(..HEAD_BYTES) else {
            return Ok(None);
        };
        let mut reader = Reader {
            bytes: head,
            at: 0,
            big_endian: big_endian(head[0])?,
        };
        if head[3] != 1 {
            return Err(Malformed("another version of the protocol"));
        }
        let mut length = |at| {
            reader.at = at;
            let length = reader.u32().and_then(|length| usize::try_from(length).ok());
            length
                .filter(|length| *length <= MAX_BYTES)
                .ok_or(Malformed("a message that is too long"))
        };
        let (body, fields) = (length(BODY_LENGTH_AT)?, length(FIELDS_LENGTH_AT)?);
        let size = HEAD_BYTES + fields.next_multiple_of(8) + body;
        match size <= MAX_BYTES {
            true => Ok(Some(size)),
            false => Err(Malformed("a message that is too long")),
        }
    }

    /// Reads one message of exactly the length that [`Message::size`] tells.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        if Self::size(bytes)? != Some(bytes.len()) {
            return Err(Malformed("a message that is cut off"));
        }
        let mut reader = Reader {
            bytes,
            at: 1,
            big_endian: big_endian(bytes[0])?,
        };
        Self::read(&mut reader).ok_or(Malformed("a message whose header cannot be read"))
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let kind = match reader.u8()? {
            0 => return None,
            1 => Type::Call,
            2 => Type::Reply,
            3 => Type::Error,
            4 => Type::Signal,
            _ => Type::Unknown,
        };
        reader.at = BODY_LENGTH_AT + 4;
        let mut message = Self {
            kind,
            serial: reader.u32()?,
            reply_serial: None,
            path: String::new(),
            interface: String::new(),
            member: String::new(),
            error_name: String::new(),
            destination: String::new(),
            sender: String::new(),
            signature: String::new(),
            body: Vec::new(),
            big_endian: reader.big_endian,
        };
        let end = usize::try_from(reader.u32()?).ok()?.checked_add(reader.at)?;
        while reader.at < end {
            reader.align(8)?;
            let code = reader.u8()?;
            let slot = match (code, reader.signature()?) {
                (REPLY_SERIAL, "u") => {
                    message.reply_serial = Some(reader.u32()?);
                    continue;
                }
                (SIGNATURE, "g") => {
                    message.signature = reader.signature()?.to_owned();
                    continue;
                }
                (PATH, "o") => &mut message.path,
                (INTERFACE, "s") => &mut message.interface,
                (MEMBER, "s") => &mut message.member,
                (ERROR_NAME, "s") => &mut message.error_name,
                (DESTINATION, "s") => &mut message.destination,
                (SENDER, "s") => &mut message.sender,
                (PATH..=SIGNATURE, _) => return None,
                // "Must be ignored."
                (_, signature) => {
                    reader.skip(signature)?;
                    continue;
                }
            };
            *slot = reader.string()?.to_owned();
        }
        if reader.at != end {
            return None;
        }
        reader.align(8)?;
        message.body = reader.bytes.get(reader.at..)?.to_vec();
        Some(message)
    }

    fn body(&self) -> Reader<'_> {
        Reader {
            bytes: &self.body,
            at: 0,
            big_endian: self.big_endian,
        }
    }

    /// The text that an error begins with.
    pub(super) fn text(&self) -> Option<&str> {
        self.signature.starts_with('s').then(|| self.body().string())?
    }

    /// The only thing that a reply holds: the path of an object.
    pub(super) fn object(&self) -> Option<&str> {
        (self.signature == "o").then(|| self.body().string())?
    }

    /// What a `JobRemoved` holds.
    pub(super) fn job_removed(&self) -> Option<JobRemoved> {
        if self.signature != "uoss" {
            return None;
        }
        let mut body = self.body();
        body.u32()?;
        Some(JobRemoved {
            job: body.string()?.to_owned(),
            unit: body.string()?.to_owned(),
            result: body.string()?.to_owned(),
        })
    }
}

fn big_endian(mark: u8) -> Result<bool, Malformed> {
    match mark {
        b'l' => Ok(false),
        b'B' => Ok(true),
        _ => Err(Malformed("no D-Bus message")),
    }
}

/// Reads values one after another; `None` where there is none.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big_endian: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// The body begins at a multiple of 8 too, so that positions in it count as well.
    fn align(&mut self, to: usize) -> Option<()> {
        let padding = self.at.next_multiple_of(to) - self.at;
        self.take(padding).map(|_| ())
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).and_then(|bytes| bytes.first().copied())
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4)?;
        let bytes: [u8; 4] = self.take(4)?.try_into().ok()?;
        Some(match self.big_endian {
            true => u32::from_be_bytes(bytes),
            false => u32::from_le_bytes(bytes),
        })
    }

    fn text(&mut self, length: usize) -> Option<&'a str> {
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        (self.u8()? == 0 && !text.contains('\0')).then_some(text)
    }

    /// A string or the path of an object.
    fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.text(length)
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = usize::from(self.u8()?);
        self.text(length)
    }

    fn skip(&mut self, signature: &str) -> Option<()> {
        let size = match signature {
            "s" | "o" => return self.string().map(|_| ()),
            "g" => return self.signature().map(|_| ()),
            "y" => 1,
            "n" | "q" => 2,
            "b" | "i" | "u" | "h" => 4,
            "x" | "t" | "d" => 8,
            _ => return None,
        };
        self.align(size)?;
        self.take(size).map(|_| ())
    }
}

/// Writes values one after another, little-endian.
#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn bool(&mut self, value: bool) {
        self.u32(value.into());
    }

    /// A string or the path of an object. It MUST NOT hold a NUL.
    pub(super) fn string(&mut self, text: &str) {
        self.u32(length(text.len()));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// At most 255 bytes.
    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements are aligned to `to`, and so is the first even where there is none.
    pub(super) fn array(&mut self, to: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(to);
        let begin = self.0.len();
        elements(self);
        let bytes = length(self.0.len() - begin).to_le_bytes();
        self.0[length_at..length_at + 4].copy_from_slice(&bytes);
    }

    /// One `(sv)` of systemd's properties.
    pub(super) fn property(&mut self, name: &str, value: Value<'_>) {
        self.align(8);
        self.string(name);
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Bool(value) => {
                self.signature("b");
                self.bool(value);
            }
            Value::Number(number) => {
                self.signature("t");
                self.u64(number);
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |array| array.0.extend(bytes));
            }
            Value::Numbers(numbers) => {
                self.signature("au");
                self.array(4, |array| numbers.iter().for_each(|number| array.u32(*number)));
            }
        }
    }

    fn field(&mut self, code: u8, signature: &str, text: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(signature);
        match signature {
            "g" => self.signature(text),
            _ => self.string(text),
        }
    }
}

/// The value of a property.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Text(&'a str),
    Bool(bool),
    Number(u64),
    Bytes(&'a [u8]),
    Numbers(&'a [u32]),
}

/// A method call.
pub(super) struct Call<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
    /// Empty without arguments.
    pub(super) signature: &'a str,
    pub(super) arguments: Writer,
}

impl Call<'_> {
    /// The message. `serial` is not 0.
    pub(super) fn encode(&self, serial: u32) -> Vec<u8> {
        let mut message = Writer(vec![b'l', 1, NO_AUTO_START, 1]);
        message.u32(length(self.arguments.0.len()));
        message.u32(serial);
        message.array(8, |fields| {
            fields.field(PATH, "o", self.path);
            fields.field(INTERFACE, "s", self.interface);
            fields.field(MEMBER, "s", self.member);
            fields.field(DESTINATION, "s", self.destination);
            if !self.signature.is_empty() {
                fields.field(SIGNATURE, "g", self.signature);
            }
        });
        message.align(8);
        message.0.extend(&self.arguments.0);
        message.0
    }
}

/// What is too long for a length is too long for [`MAX_BYTES`] as well, so that it is not sent.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
