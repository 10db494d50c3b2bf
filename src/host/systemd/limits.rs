//! The limits of a scope as systemd's properties, from the files of its cgroup (v2); pure. Those of crun's `append_resources`.

use super::super::cgroup::parse;

/// systemd's word for no limit.
const INFINITY: u64 = u64::MAX;

/// More processors or nodes than a kernel has.
const BITS_MAX: usize = 1 << 13;

/// Files with one number. Only what is not the default is told of the last ones, which older versions of systemd do not know.
const NUMBERS: [(&str, &str, Option<u64>); 8] = [
    ("memory.max", "MemoryMax", None),
    ("memory.high", "MemoryHigh", None),
    ("memory.low", "MemoryLow", None),
    ("memory.min", "MemoryMin", None),
    ("memory.swap.max", "MemorySwapMax", None),
    ("pids.max", "TasksMax", None),
    ("cpu.weight", "CPUWeight", None),
    ("memory.zswap.max", "MemoryZSwapMax", Some(INFINITY)),
];

/// A property's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Limit {
    Number(u64),
    /// A bit for each processor or node.
    Bits(Vec<u8>),
}

/// The properties that make systemd write what the files hold. `read` has the text of a file, if there is one.
pub(super) fn properties(read: impl Fn(&str) -> Option<String>) -> Vec<(&'static str, Limit)> {
    let mut found = Vec::new();
    for (file, name, default) in NUMBERS {
        let number = read(file).and_then(|text| parse::number(&text));
        // A weight of 0 is that of an idle group and cannot be told.
        let told = number.filter(|number| Some(*number) != default && (name != "CPUWeight" || *number > 0));
        found.extend(told.map(|number| (name, Limit::Number(number))));
    }
    if let Some((quota, period)) = read("cpu.max").as_deref().and_then(quota) {
        found.push(("CPUQuotaPerSecUSec", Limit::Number(quota)));
        found.push(("CPUQuotaPeriodUSec", Limit::Number(period)));
    }
    let weight =
        read("io.weight").and_then(|text| parse::number(text.trim().strip_prefix("default ")?.lines().next()?));
    found.extend(
        weight
            .filter(|weight| *weight != 100)
            .map(|weight| ("IOWeight", Limit::Number(weight))),
    );
    for (file, name) in [("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")] {
        found.extend(
            read(file)
                .and_then(|text| bits(&text))
                .map(|bits| (name, Limit::Bits(bits))),
        );
    }
    found
}

/// Microseconds in each second, rounded up, and the period, for `quota period`.
fn quota(text: &str) -> Option<(u64, u64)> {
    let (quota, period) = text.trim().split_once(' ')?;
    let period: u64 = period.parse().ok().filter(|period| *period > 0)?;
    let per_second = match quota {
        "max" => INFINITY,
        // systemd keeps it as hundredths of a percent, rounded down.
        quota => quota
            .parse::<u64>()
            .ok()?
            .checked_mul(1_000_000)?
            .div_ceil(period)
            .checked_next_multiple_of(100)?,
    };
    Some((per_second, period))
}

/// The bits for `0-2,5`. An empty list is none: all are allowed.
fn bits(text: &str) -> Option<Vec<u8>> {
    let mut bits = Vec::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= BITS_MAX {
            return None;
        }
        for at in first..=last {
            if bits.len() <= at / 8 {
                bits.resize(at / 8 + 1, 0);
            }
            if let Some(byte) = bits.get_mut(at / 8) {
                *byte |= 1 << (at % 8);
            }
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(files: &[(&str, &str)]) -> Vec<(&'static str, Limit)> {
        properties(|file| {
            files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn the_files_of_a_limited_container_become_properties() {
        let files = [
            ("memory.max", "52428800\n"),
            ("memory.high", "max\n"),
            ("memory.zswap.max", "max\n"),
            ("pids.max", "77\n"),
            ("cpu.weight", "5000\n"),
            ("cpu.max", "50000 100000\n"),
            ("cpuset.cpus", "0-2,9\n"),
            ("cpuset.mems", "\n"),
            ("io.weight", "default 100\n"),
        ];
        let expected = [
            ("MemoryMax", Limit::Number(52_428_800)),
            ("MemoryHigh", Limit::Number(INFINITY)),
            ("TasksMax", Limit::Number(77)),
            ("CPUWeight", Limit::Number(5000)),
            ("CPUQuotaPerSecUSec", Limit::Number(500_000)),
            ("CPUQuotaPeriodUSec", Limit::Number(100_000)),
            ("AllowedCPUs", Limit::Bits(vec![0b111, 0b10])),
            ("AllowedMemoryNodes", Limit::Bits(vec![])),
        ];
        assert_eq!(of(&files), expected);
        assert_eq!(of(&[]), []);
    }

    #[test]
    fn limits_that_are_lifted_or_odd_are_told_too() {
        let files = [
            ("cpu.max", "max 100000\n"),
            ("cpu.weight", "0\n"),
            ("io.weight", "default 200\n8:0 300\n"),
            ("cpuset.cpus", "99999999\n"),
        ];
        let expected = [
            ("CPUQuotaPerSecUSec", Limit::Number(INFINITY)),
            ("CPUQuotaPeriodUSec", Limit::Number(100_000)),
            ("IOWeight", Limit::Number(200)),
        ];
        assert_eq!(of(&files), expected);
        assert_eq!(quota("1 3"), Some((333_400, 3)));
        assert_eq!(quota("1 0"), None);
    }

    proptest! {
        #[test]
        fn no_text_of_a_file_makes_it_panic(text in "[0-9a-z ,\n-]{0,40}") {
            let _ = properties(|_| Some(text.clone()));
        }
    }
}
