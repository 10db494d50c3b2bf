//! Skips that nobody can overlook.
//!
//! A test that runs on the backend `LXCRI_TEST_BACKEND`, other than crun, has another name there: `file::name@lxc`. What it lacks on
//! one backend is so not allowed to lack on the other.
//!
//! libtest knows no skip and hides what a passed test prints. So a skip goes past its capture, to the process's stderr, and into the
//! file that `LXCRI_SKIP_LOG` names (for the summary of `make test`). With `CI=true` a skip fails unless `tests/skips.txt` allows it.

use std::io::Write;

/// Lines of `<test> <reason>`; `#` begins a comment.
const ALLOWED: &str = include_str!("../skips.txt");

/// Says that `test` (as `file::name`) cannot run because of `missing`; the caller returns after it.
///
/// # Panics
/// With `CI=true`, when `tests/skips.txt` does not name the test.
pub(crate) fn skip(test: &str, missing: &str) {
    let test = &name(test, std::env::var("LXCRI_TEST_BACKEND").ok().as_deref());
    let line = format!("SKIPPED {test}: {missing}\n");
    // `eprint!` would be captured.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("LXCRI_SKIP_LOG") {
        let written = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|e| panic!("cannot note a skip in {}: {e}", path.display()));
    }
    if std::env::var("CI").as_deref() == Ok("true") {
        assert!(
            allowed(ALLOWED, test),
            "{test} was skipped: {missing}; in CI a skip must be named in tests/skips.txt with its reason"
        );
    }
}

/// The name of `test` on `backend`.
pub(crate) fn name(test: &str, backend: Option<&str>) -> String {
    match backend {
        None | Some("" | "crun") => test.into(),
        Some(other) => format!("{test}@{other}"),
    }
}

/// Whether `list` names `test` and a reason.
pub(crate) fn allowed(list: &str, test: &str) -> bool {
    list.lines().any(|line| {
        let mut words = line.split_whitespace();
        !line.starts_with('#') && words.next() == Some(test) && words.next().is_some()
    })
}
