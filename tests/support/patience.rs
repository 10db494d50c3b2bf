//! How long the tests wait for what must happen before they call it a failure.

use std::{sync::LazyLock, time::Duration};

/// How much longer than a machine of our days this one may take: `LXCRI_TEST_SLOWNESS`, 1 when unset. Only the node of `make test-node`
/// sets it, where every instruction is emulated.
static SLOWNESS: LazyLock<u64> = LazyLock::new(|| match std::env::var("LXCRI_TEST_SLOWNESS") {
    Ok(text) => text
        .parse()
        .unwrap_or_else(|_| panic!("LXCRI_TEST_SLOWNESS={text:?} is no whole number")),
    Err(_) => 1,
});

/// The bound of a wait that takes far less than `seconds` on a machine of our days, busy ones too.
pub(crate) fn patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds * *SLOWNESS)
}

/// Between two looks at what is waited for: a look costs something, too.
pub(crate) fn pause() -> Duration {
    Duration::from_millis(5 * *SLOWNESS)
}
