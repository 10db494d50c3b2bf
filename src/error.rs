//! One error type: what failed, on which object, what to do; classified once, at the boundary that saw the cause.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a client can do about an error. Each kind is one gRPC/ttrpc status code (google.rpc.Code), so that containerd's
/// `errdefs` sees what its clients match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The request itself is wrong; asking again does not help.
    InvalidArgument,
    /// The object does not exist (any more).
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The object is in the wrong phase for this call.
    FailedPrecondition,
    /// This backend or this machine cannot do it.
    Unimplemented,
    /// A bound was reached; the text says what is left behind.
    DeadlineExceeded,
    /// A daemon or program is away; asking again may help.
    Unavailable,
    /// The kernel or a remote side refused for want of a right.
    PermissionDenied,
    /// Disk, memory, descriptors or processes ran out.
    ResourceExhausted,
    /// Given up because a Kill or Delete overtook the work.
    Aborted,
    /// Everything else.
    Unknown,
}

/// An error with its [`Kind`], a text for a person, and the cause as source.
///
/// `Display` prints the whole chain, joined by `: `, as it goes to the client.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),* $(,)?) => {$(
        $(#[$doc])*
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(Kind::$kind, message)
        }
    )*};
}

impl Error {
    /// An error without a cause.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    constructors! {
        /// See [`Kind::InvalidArgument`].
        invalid => InvalidArgument,
        /// See [`Kind::NotFound`].
        not_found => NotFound,
        /// See [`Kind::AlreadyExists`].
        already_exists => AlreadyExists,
        /// See [`Kind::FailedPrecondition`].
        precondition => FailedPrecondition,
        /// See [`Kind::Unimplemented`].
        unimplemented => Unimplemented,
        /// See [`Kind::DeadlineExceeded`].
        deadline => DeadlineExceeded,
        /// See [`Kind::Unavailable`].
        unavailable => Unavailable,
        /// See [`Kind::Aborted`].
        aborted => Aborted,
        /// See [`Kind::Unknown`].
        unknown => Unknown,
    }

    /// The same error with `source` as its cause; the text must not repeat it.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A sentence in front; the kind stays, this error becomes the cause.
    pub fn context(self, message: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            message: message.into(),
            source: Some(Box::new(self)),
        }
    }

    /// What a client can do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Joins what went wrong in a teardown that went on past its first error. `None` if nothing did.
    pub fn all(errors: Vec<Error>) -> Option<Self> {
        errors.into_iter().reduce(Self::then)
    }

    /// This error, with what went wrong after it.
    pub fn then(self, next: Self) -> Self {
        Self::new(self.kind, format!("{self}; then {next}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            // An `Error` prints its own chain; foreign errors are walked here.
            write!(f, ": {source}")?;
            if !source.is::<Error>() {
                let mut next = source.source();
                while let Some(cause) = next {
                    write!(f, ": {cause}")?;
                    next = cause.source();
                }
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// The kind that an operating-system error stands for.
pub fn kind_of_io(error: &std::io::Error) -> Kind {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => Kind::NotFound,
        Some(libc::EEXIST) => Kind::AlreadyExists,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Kind::PermissionDenied,
        Some(libc::ENOSPC | libc::EDQUOT | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN) => {
            Kind::ResourceExhausted
        }
        Some(libc::ENOSYS | libc::EOPNOTSUPP) => Kind::Unimplemented,
        Some(libc::ETIMEDOUT) => Kind::DeadlineExceeded,
        _ => Kind::Unknown,
    }
}

/// Adds the sentence "what failed, on which object" to a foreign error.
pub trait Context<T> {
    /// The sentence is built only when there is an error.
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::new(kind_of_io(&e), message()).with_source(e))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(std::io::Error::from).context(message)
    }
}

impl<T> Context<T> for Result<T> {
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.context(message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_prints_its_whole_chain_once() {
        let io = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Err::<(), _>(io)
            .context(|| "cannot write record /b/r.json")
            .unwrap_err();
        let error = error.context("cannot create task x");
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        assert_eq!(
            error.to_string(),
            "cannot create task x: cannot write record /b/r.json: No space left on device (os error 28)"
        );
    }

    #[test]
    fn a_teardown_reports_all_of_its_errors() {
        assert!(Error::all(vec![]).is_none());
        let all = Error::all(vec![Error::not_found("a"), Error::unknown("b")]).unwrap();
        assert_eq!(all.to_string(), "a; then b");
        assert_eq!(all.kind(), Kind::NotFound);
    }
}
