//! Stdio of a process.

/// Where a process's stdio goes, as the client asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Fifo path or URI; empty for none.
    pub stdin: String,
    /// Fifo path or URI; empty for none.
    pub stdout: String,
    /// Fifo path or URI; empty for none, and always empty with a terminal.
    pub stderr: String,
    /// A pty instead of pipes.
    pub terminal: bool,
}
