//! `/proc/<pid>/mountinfo` as the rootfs reads it, and options of a mount, one a line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::rootfs::{mountinfo, options::Options};

fuzz_target!(|data: &[u8]| {
    for entry in mountinfo::parse(data) {
        assert!(entry.mount_point.as_os_str().len() <= data.len());
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let words: Vec<&str> = text.lines().collect();
        let _ = Options::parse(&words);
    }
});
