//! What `start` gets: arguments, one a line, then an empty line, then stdin.
#![no_main]

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::shim::{
    args::{self, Flags},
    bootstrap::{Environment, decode},
};

fuzz_target!(|data: &[u8]| {
    let mut words = Vec::new();
    let mut rest = data;
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (word, behind) = (&rest[..end], &rest[end + 1..]);
        rest = behind;
        if word.is_empty() {
            break;
        }
        words.push(OsString::from_vec(word.to_vec()));
    }
    let flags = match args::parse(words) {
        Ok((_, flags)) => flags,
        Err(_) => Flags {
            namespace: "default".into(),
            id: "c1".into(),
            ..Flags::default()
        },
    };
    for max_shim_version in [None, Some("2".to_owned())] {
        let environment = Environment {
            max_shim_version,
            ..Environment::default()
        };
        let _ = decode(rest, &flags, &environment);
    }
});
