//! The command line.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use proxmox_lxcri::error::{Error, Result};

use crate::candidate::Candidate;

const HELP: &str = "\
Measures this shim beside containerd-shim-runc-v2, bare crun and bare LXC, as root.

usage: cargo bench --bench shims -- [options]
  --iterations N     iterations of the lifecycle (default 30)
  --warm-up N        iterations before them that do not count (default 3)
  --only PART,…      lifecycle, memory, stdio, burst (default all)
  --candidates C,…   ours, ours-lxc, go-crun, go-runc, crun, lxc (default all)
  --ours PATH        our shim (default: the one that cargo built with this program)
  --go PATH          the Go shim (default: containerd-shim-runc-v2 from PATH)
  --quick            a few small rounds, to see that everything runs
  --readme           write docs/bench/shims.svg and the benchmark section of README.md
  --list             print the parts and the candidates
  --help             print this";

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Shim start to delete of one container.
    Lifecycle,
    /// Memory of idle shims.
    Memory,
    /// Throughput and CPU of the stdio copy.
    Stdio,
    /// Many pods at once.
    Burst,
}

impl Part {
    /// In the order in which they run.
    pub(crate) const ALL: [Self; 4] = [Self::Lifecycle, Self::Memory, Self::Stdio, Self::Burst];

    /// Its name on the command line.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::Memory => "memory",
            Self::Stdio => "stdio",
            Self::Burst => "burst",
        }
    }
}

/// What to measure, and how often.
#[derive(Debug, Clone)]
pub(crate) struct Arguments {
    /// Counted iterations of the lifecycle.
    pub(crate) iterations: usize,
    /// Iterations before those that count.
    pub(crate) warm_up: usize,
    /// Rounds of memory, stdio and burst, which are long.
    pub(crate) rounds: usize,
    /// Parts to run.
    pub(crate) parts: Vec<Part>,
    /// Who takes part.
    pub(crate) candidates: Vec<Candidate>,
    /// Our shim.
    pub(crate) ours: PathBuf,
    /// The Go shim: a path, or a name looked up in PATH.
    pub(crate) go: PathBuf,
    /// Pods side by side when memory is read.
    pub(crate) pods: usize,
    /// Containers of one pod when the memory of each further one is read.
    pub(crate) containers: usize,
    /// Idle time before memory is read.
    pub(crate) settle: Duration,
    /// Bytes copied for the throughput.
    pub(crate) stdio_bytes: u64,
    /// Pods started at once.
    pub(crate) burst: usize,
    /// Small rounds: the numbers say little.
    pub(crate) quick: bool,
    /// Write the chart and the section of the README.
    pub(crate) readme: bool,
}

/// What the command line asks for.
pub(crate) enum Wish {
    /// A text.
    Print(String),
    /// A measurement.
    Run(Box<Arguments>),
}

impl Arguments {
    fn full() -> Self {
        Self {
            iterations: 30,
            warm_up: 3,
            rounds: 5,
            parts: Part::ALL.to_vec(),
            candidates: Candidate::ALL.to_vec(),
            ours: PathBuf::from(env!("CARGO_BIN_EXE_containerd-shim-proxmox-lxcri-v1")),
            go: PathBuf::from("containerd-shim-runc-v2"),
            pods: 20,
            containers: 10,
            settle: Duration::from_secs(2),
            stdio_bytes: 256 << 20,
            burst: 50,
            quick: false,
            readme: false,
        }
    }

    /// Parses the words after the program's name. `--bench`, which cargo adds, is accepted.
    ///
    /// # Errors
    /// `InvalidArgument` naming the word.
    pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<Wish> {
        let mut arguments = Self::full();
        let mut words = words.map(|word| {
            word.into_string()
                .map_err(|word| Error::invalid(format!("argument {word:?} is not UTF-8")))
        });
        let mut iterations = None;
        while let Some(word) = words.next().transpose()? {
            let mut value = || {
                words
                    .next()
                    .transpose()?
                    .ok_or_else(|| Error::invalid(format!("{word} needs a value")))
            };
            match word.as_str() {
                "--bench" => {}
                "--help" | "-h" => return Ok(Wish::Print(HELP.into())),
                "--list" => return Ok(Wish::Print(list())),
                "--iterations" => iterations = Some(number(&word, &value()?)?.max(1)),
                "--warm-up" => arguments.warm_up = number(&word, &value()?)?,
                "--only" => arguments.parts = chosen(&word, &value()?, &Part::ALL, Part::key)?,
                "--candidates" => arguments.candidates = chosen(&word, &value()?, &Candidate::ALL, Candidate::key)?,
                "--ours" => arguments.ours = absolute(value()?)?,
                "--go" => arguments.go = value()?.into(),
                "--quick" => arguments.quick = true,
                "--readme" => arguments.readme = true,
                _ => return Err(Error::invalid(format!("unknown option {word}; see --help"))),
            }
        }
        if arguments.quick && arguments.readme {
            return Err(Error::invalid("--readme needs a whole run: leave out --quick"));
        }
        if arguments.quick {
            arguments.iterations = 2;
            arguments.warm_up = 0;
            arguments.rounds = 1;
            arguments.pods = 3;
            arguments.containers = 3;
            arguments.settle = Duration::from_millis(200);
            arguments.stdio_bytes = 16 << 20;
            arguments.burst = 5;
        }
        arguments.iterations = iterations.unwrap_or(arguments.iterations);
        Ok(Wish::Run(Box::new(arguments)))
    }
}

fn list() -> String {
    let parts: Vec<_> = Part::ALL.iter().map(|part| part.key()).collect();
    let candidates: Vec<_> = Candidate::ALL
        .iter()
        .map(|candidate| format!("  {:8} {}", candidate.key(), candidate.title()))
        .collect();
    format!("parts: {}\ncandidates:\n{}", parts.join(", "), candidates.join("\n"))
}

fn number(option: &str, word: &str) -> Result<usize> {
    word.parse()
        .map_err(|e| Error::invalid(format!("{option} {word:?}")).with_source(Box::new(e) as Box<_>))
}

fn absolute(path: String) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(|e| Error::invalid(format!("path {path:?}")).with_source(e))
}

fn chosen<T: Copy + PartialEq>(option: &str, words: &str, all: &[T], key: fn(T) -> &'static str) -> Result<Vec<T>> {
    let wanted: Vec<T> = words
        .split(',')
        .map(|word| {
            all.iter()
                .copied()
                .find(|item| key(*item) == word)
                .ok_or_else(|| Error::invalid(format!("{option}: unknown name {word:?}; see --list")))
        })
        .collect::<Result<_>>()?;
    // The order of the table, and nobody twice.
    Ok(all.iter().copied().filter(|item| wanted.contains(item)).collect())
}
