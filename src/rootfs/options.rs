//! Mount options in the form of fstab(5): from words to what the system calls want. Pure.

use nix::mount::MsFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// `MS_NOSYMFOLLOW`, which nix does not name.
pub const MS_NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(0x100);

/// Ranges of ids as one `uidmap=` or `gidmap=` option lists them; the kernel takes at most 340.
const ID_RANGES_MAX: usize = 340;

/// What a list of mount options asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Flags of mount(2) that hold in the end (the last word on a flag wins); neither propagation nor `MS_REC` without `MS_BIND`.
    pub flags: MsFlags,
    /// Flags that were taken back by their opposite (`rw`, `exec`, …) and not set again later.
    pub cleared: MsFlags,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`, with `MS_REC` in the recursive form.
    pub propagation: Option<MsFlags>,
    /// What the file system itself has to understand, in order.
    pub data: Vec<String>,
    /// The source is a file that needs a loop device.
    pub loop_device: bool,
    /// That loop device shall use direct I/O.
    pub direct_io: bool,
    /// Owners to map: `uidmap=` and `gidmap=`.
    pub idmap: Option<IdMap>,
}

/// How the owners of an idmapped mount are shifted; containerd's options `uidmap=` and `gidmap=`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// User ids.
    pub uids: Vec<IdRange>,
    /// Group ids.
    pub gids: Vec<IdRange>,
}

/// One range, `container:host:size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// First id as it is on disk.
    pub container: u32,
    /// First id as the mount shows it.
    pub host: u32,
    /// How many.
    pub size: u32,
}

/// What one word does.
enum Word {
    Set(MsFlags),
    Clear(MsFlags),
    Propagation(MsFlags),
    Loop,
    DirectIo,
    UidMap,
    GidMap,
    Nothing,
    Data,
}

impl Options {
    /// Sorts the options of a mount.
    ///
    /// `X-containerd.*` and `x-*` speak to programs and are left out (containerd's mount options; mount(8), "x-"). A word that is
    /// not known goes to the file system, which may refuse it.
    ///
    /// # Errors
    /// `InvalidArgument` for a NUL byte, for a map of ids that is not `container:host:size[,…]`, and for a map of only one kind.
    pub fn parse<S: AsRef<str>>(words: &[S]) -> Result<Self> {
        let mut options = Self {
            flags: MsFlags::empty(),
            cleared: MsFlags::empty(),
            propagation: None,
            data: Vec::new(),
            loop_device: false,
            direct_io: false,
            idmap: None,
        };
        let (mut uids, mut gids) = (None, None);
        for word in words.iter().map(AsRef::as_ref) {
            if word.contains('\0') {
                return Err(Error::invalid("a mount option holds a NUL byte"));
            }
            match meaning(word) {
                Word::Set(flags) => {
                    options.flags |= flags;
                    options.cleared -= flags;
                }
                Word::Clear(flags) => {
                    options.flags -= flags;
                    options.cleared |= flags;
                }
                Word::Propagation(kind) => options.propagation = Some(kind),
                Word::Loop => options.loop_device = true,
                Word::DirectIo => options.direct_io = true,
                Word::UidMap => uids = Some(id_ranges(word)?),
                Word::GidMap => gids = Some(id_ranges(word)?),
                Word::Nothing => {}
                Word::Data => options.data.push(word.to_owned()),
            }
        }
        if options.direct_io && !options.loop_device {
            options.direct_io = false;
            options.data.push("direct-io".to_owned());
        }
        options.idmap = match (uids, gids) {
            (Some(uids), Some(gids)) => Some(IdMap { uids, gids }),
            (None, None) => None,
            // Mapping only one of them would show files under owners that nobody asked for.
            _ => {
                return Err(Error::invalid(
                    "mount options uidmap and gidmap need each other; give both or none",
                ));
            }
        };
        Ok(options)
    }

    /// Whether this is a bind, recursive or not.
    pub fn is_bind(&self) -> bool {
        self.flags.contains(MsFlags::MS_BIND)
    }

    /// The value of the last `key=value` that goes to the file system.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.data
            .iter()
            .rev()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

fn meaning(word: &str) -> Word {
    let recursive = MsFlags::MS_REC;
    match word {
        "ro" => Word::Set(MsFlags::MS_RDONLY),
        "rw" => Word::Clear(MsFlags::MS_RDONLY),
        "nosuid" => Word::Set(MsFlags::MS_NOSUID),
        "suid" => Word::Clear(MsFlags::MS_NOSUID),
        "nodev" => Word::Set(MsFlags::MS_NODEV),
        "dev" => Word::Clear(MsFlags::MS_NODEV),
        "noexec" => Word::Set(MsFlags::MS_NOEXEC),
        "exec" => Word::Clear(MsFlags::MS_NOEXEC),
        "sync" => Word::Set(MsFlags::MS_SYNCHRONOUS),
        "async" => Word::Clear(MsFlags::MS_SYNCHRONOUS),
        "dirsync" => Word::Set(MsFlags::MS_DIRSYNC),
        "noatime" => Word::Set(MsFlags::MS_NOATIME),
        "atime" => Word::Clear(MsFlags::MS_NOATIME),
        "nodiratime" => Word::Set(MsFlags::MS_NODIRATIME),
        "diratime" => Word::Clear(MsFlags::MS_NODIRATIME),
        "relatime" => Word::Set(MsFlags::MS_RELATIME),
        "norelatime" => Word::Clear(MsFlags::MS_RELATIME),
        "strictatime" => Word::Set(MsFlags::MS_STRICTATIME),
        "nostrictatime" => Word::Clear(MsFlags::MS_STRICTATIME),
        "lazytime" => Word::Set(MsFlags::MS_LAZYTIME),
        "nolazytime" => Word::Clear(MsFlags::MS_LAZYTIME),
        "mand" => Word::Set(MsFlags::MS_MANDLOCK),
        "nomand" => Word::Clear(MsFlags::MS_MANDLOCK),
        "silent" => Word::Set(MsFlags::MS_SILENT),
        "loud" => Word::Clear(MsFlags::MS_SILENT),
        "iversion" => Word::Set(MsFlags::MS_I_VERSION),
        "noiversion" => Word::Clear(MsFlags::MS_I_VERSION),
        "nosymfollow" => Word::Set(MS_NOSYMFOLLOW),
        "symfollow" => Word::Clear(MS_NOSYMFOLLOW),
        "remount" => Word::Set(MsFlags::MS_REMOUNT),
        "bind" => Word::Set(MsFlags::MS_BIND),
        "rbind" => Word::Set(MsFlags::MS_BIND | recursive),
        "shared" => Word::Propagation(MsFlags::MS_SHARED),
        "slave" => Word::Propagation(MsFlags::MS_SLAVE),
        "private" => Word::Propagation(MsFlags::MS_PRIVATE),
        "unbindable" => Word::Propagation(MsFlags::MS_UNBINDABLE),
        "rshared" => Word::Propagation(MsFlags::MS_SHARED | recursive),
        "rslave" => Word::Propagation(MsFlags::MS_SLAVE | recursive),
        "rprivate" => Word::Propagation(MsFlags::MS_PRIVATE | recursive),
        "runbindable" => Word::Propagation(MsFlags::MS_UNBINDABLE | recursive),
        "loop" => Word::Loop,
        "direct-io" => Word::DirectIo,
        "" | "defaults" => Word::Nothing,
        _ if word.starts_with("uidmap=") => Word::UidMap,
        _ if word.starts_with("gidmap=") => Word::GidMap,
        _ if word.starts_with("X-containerd.") || word.starts_with("x-") => Word::Nothing,
        _ => Word::Data,
    }
}

fn id_ranges(word: &str) -> Result<Vec<IdRange>> {
    let invalid = || Error::invalid(format!("mount option {word:?} is not a list of container:host:size"));
    let (_, list) = word.split_once('=').ok_or_else(invalid)?;
    let mut ranges = Vec::new();
    for part in list.split(',') {
        let mut numbers = part.split(':').map(|number| match number.as_bytes() {
            // `parse` alone would take a leading "+".
            [b'0'..=b'9', ..] => number.parse::<u32>().ok(),
            _ => None,
        });
        let mut next = || numbers.next().flatten().ok_or_else(invalid);
        let range = IdRange {
            container: next()?,
            host: next()?,
            size: next()?,
        };
        let ends = |first: u32| first.checked_add(range.size).is_some();
        if numbers.next().is_some() || range.size == 0 || !ends(range.container) || !ends(range.host) {
            return Err(invalid());
        }
        ranges.push(range);
    }
    if ranges.len() > ID_RANGES_MAX {
        return Err(Error::invalid(format!(
            "a mount option maps {} ranges of ids; the kernel takes {ID_RANGES_MAX}",
            ranges.len()
        )));
    }
    Ok(ranges)
}

/// Splits at `separator`, except where a backslash escapes it. The parts keep their backslashes.
pub fn split_unescaped(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    text.split(move |c| {
        let here = c == separator && !escaped;
        escaped = c == '\\' && !escaped;
        here
    })
}

/// Removes the backslashes of escaped characters, as overlayfs does.
pub fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            _ => plain.push(c),
        }
    }
    plain
}

/// Whether the value of `key` must not be shown to anybody (`password`, `credentials`, a ceph `secret`, …).
pub fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    ["pass", "cred", "secret", "token", "key"]
        .iter()
        .any(|part| key.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_generic_word_sets_or_clears_its_flag() {
        let pairs = [
            ("ro", "rw", MsFlags::MS_RDONLY),
            ("nosuid", "suid", MsFlags::MS_NOSUID),
            ("nodev", "dev", MsFlags::MS_NODEV),
            ("noexec", "exec", MsFlags::MS_NOEXEC),
            ("sync", "async", MsFlags::MS_SYNCHRONOUS),
            ("noatime", "atime", MsFlags::MS_NOATIME),
            ("nodiratime", "diratime", MsFlags::MS_NODIRATIME),
            ("relatime", "norelatime", MsFlags::MS_RELATIME),
            ("strictatime", "nostrictatime", MsFlags::MS_STRICTATIME),
            ("lazytime", "nolazytime", MsFlags::MS_LAZYTIME),
            ("mand", "nomand", MsFlags::MS_MANDLOCK),
            ("silent", "loud", MsFlags::MS_SILENT),
            ("iversion", "noiversion", MsFlags::MS_I_VERSION),
            ("nosymfollow", "symfollow", MS_NOSYMFOLLOW),
        ];
        for (set, clear, flag) in pairs {
            let on = Options::parse(&[set]).unwrap();
            assert_eq!((on.flags, on.cleared), (flag, MsFlags::empty()), "{set}");
            let off = Options::parse(&[set, clear]).unwrap();
            assert_eq!((off.flags, off.cleared), (MsFlags::empty(), flag), "{clear}");
            let on_again = Options::parse(&[clear, set]).unwrap();
            assert_eq!(
                (on_again.flags, on_again.cleared),
                (flag, MsFlags::empty()),
                "{clear},{set}"
            );
            assert!(on.data.is_empty() && off.data.is_empty());
        }
        let only = [
            ("dirsync", MsFlags::MS_DIRSYNC),
            ("remount", MsFlags::MS_REMOUNT),
            ("bind", MsFlags::MS_BIND),
            ("rbind", MsFlags::MS_BIND | MsFlags::MS_REC),
            ("defaults", MsFlags::empty()),
        ];
        for (word, flags) in only {
            let options = Options::parse(&[word]).unwrap();
            assert_eq!((options.flags, options.data.len()), (flags, 0), "{word}");
        }
    }

    #[test]
    fn propagation_is_kept_apart_from_the_flags() {
        let kinds = [
            ("shared", MsFlags::MS_SHARED),
            ("slave", MsFlags::MS_SLAVE),
            ("private", MsFlags::MS_PRIVATE),
            ("unbindable", MsFlags::MS_UNBINDABLE),
        ];
        for (word, kind) in kinds {
            let options = Options::parse(&["rbind", word]).unwrap();
            assert_eq!(options.propagation, Some(kind));
            assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_REC);
            let options = Options::parse(&[format!("r{word}")]).unwrap();
            assert_eq!(options.propagation, Some(kind | MsFlags::MS_REC));
            assert_eq!(options.flags, MsFlags::empty());
        }
    }

    #[test]
    fn the_file_system_gets_what_nobody_else_knows() {
        let words = [
            "index=off",
            "userxattr",
            "lowerdir=/a:/b",
            "X-containerd.mkdir.path=/x",
            "x-systemd.automount",
            "X-mount.idmap=1",
            "loop",
        ];
        let options = Options::parse(&words).unwrap();
        assert_eq!(
            options.data,
            ["index=off", "userxattr", "lowerdir=/a:/b", "X-mount.idmap=1"]
        );
        assert!(options.loop_device);
        assert_eq!(options.value("lowerdir"), Some("/a:/b"));
        assert_eq!(options.value("lower"), None);
        assert_eq!(Options::parse(&["direct-io"]).unwrap().data, ["direct-io"]);
        assert!(Options::parse(&["direct-io", "loop"]).unwrap().direct_io);
    }

    #[test]
    fn maps_of_ids_are_read_in_full_or_refused() {
        let options = Options::parse(&["uidmap=0:1000:10,10:5000:1", "gidmap=0:2000:65536"]).unwrap();
        let range = |container, host, size| IdRange { container, host, size };
        let idmap = options.idmap.unwrap();
        assert_eq!(idmap.uids, [range(0, 1000, 10), range(10, 5000, 1)]);
        assert_eq!(idmap.gids, [range(0, 2000, 65536)]);
        for wrong in [
            "",
            "0",
            "0:1",
            "0:1:0",
            "0:1:2:3",
            "0:-1:2",
            "+0:1:2",
            "0:1:2,",
            "0:4294967295:2",
            "a:b:c",
            "0:1:2;",
        ] {
            let words = [format!("uidmap={wrong}"), "gidmap=0:0:1".to_owned()];
            let error = Options::parse(&words).expect_err(wrong);
            assert_eq!(error.kind(), crate::error::Kind::InvalidArgument);
        }
        assert!(Options::parse(&["uidmap=0:1:2"]).is_err(), "one map without the other");
        let many = format!("uidmap={}", vec!["0:0:1"; 341].join(","));
        assert!(Options::parse(&[many.as_str(), "gidmap=0:0:1"]).is_err());
    }

    #[test]
    fn escaped_separators_do_not_separate() {
        let parts: Vec<_> = split_unescaped(r"/a\:b:/c\\:/d", ':').collect();
        assert_eq!(parts, [r"/a\:b", r"/c\\", "/d"]);
        assert_eq!(
            parts.into_iter().map(unescape).collect::<Vec<_>>(),
            ["/a:b", r"/c\", "/d"]
        );
    }

    #[test]
    fn keys_of_secrets_are_known() {
        for key in [
            "password",
            "PASSWD",
            "pass2",
            "credentials",
            "cred",
            "secret",
            "keyring",
            "session_token",
        ] {
            assert!(is_secret(key), "{key}");
        }
        for key in ["lowerdir", "user", "size", "index"] {
            assert!(!is_secret(key), "{key}");
        }
    }

    proptest! {
        #[test]
        fn no_words_make_the_parser_panic(words in proptest::collection::vec("\\PC{0,40}|uidmap=[0-9:,]{0,20}|gidmap=[0-9:,+-]{0,20}", 0..8)) {
            if let Ok(options) = Options::parse(&words) {
                prop_assert!((options.flags & options.cleared).is_empty());
                prop_assert!(!options.flags.intersects(
                    MsFlags::MS_SHARED | MsFlags::MS_SLAVE | MsFlags::MS_PRIVATE | MsFlags::MS_UNBINDABLE
                ));
            }
        }

        #[test]
        fn a_list_of_escaped_layers_comes_back(layers in proptest::collection::vec("[^\\x00]{1,20}", 1..6)) {
            let escape = |layer: &String| layer.replace('\\', r"\\").replace(':', r"\:");
            let list = layers.iter().map(escape).collect::<Vec<_>>().join(":");
            let back: Vec<String> = split_unescaped(&list, ':').map(unescape).collect();
            prop_assert_eq!(back, layers);
        }
    }
}
