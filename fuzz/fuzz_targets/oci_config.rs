//! `config.json` of a bundle.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::task::bundle;

fuzz_target!(|data: &[u8]| {
    let _ = bundle::parse(data);
});
