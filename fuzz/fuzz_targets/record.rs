//! The record of a bundle; what was read must be written and read the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::task::record::Record;

fuzz_target!(|data: &[u8]| {
    let Ok(record) = Record::parse(data) else {
        return;
    };
    let text = serde_json::to_vec(&record).expect("a record is written");
    let again = Record::parse(&text).expect("what was written is read");
    assert_eq!(serde_json::to_vec(&again).expect("a record is written"), text);
});
