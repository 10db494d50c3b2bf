//! `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::{
    borrow::Cow,
    ffi::OsStr,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
};

/// One mount, as a line of mountinfo tells it. Escapes are decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Number of the mount; taken again after it is gone.
    pub id: u32,
    /// Number of the mount that it stands on.
    pub parent_id: u32,
    /// Device of the file system, major and minor.
    pub device: (u32, u32),
    /// The folder of the file system that is mounted.
    pub root: Cow<'a, Path>,
    /// Where it is mounted, seen from the root of the process.
    pub mount_point: Cow<'a, Path>,
    /// Options of this mount, joined by commas.
    pub options: Cow<'a, OsStr>,
    /// The optional fields (`shared:N`, `master:N`, …), as they stand: any number of words.
    pub optional: &'a [u8],
    /// File system type, with its subtype (`fuse.sshfs`).
    pub fs_type: Cow<'a, OsStr>,
    /// Device, dataset or what else the file system calls its source; may be empty.
    pub source: Cow<'a, OsStr>,
    /// Options of the file system, joined by commas.
    pub super_options: Cow<'a, OsStr>,
}

/// The mounts of a mountinfo text in its order: a mount comes after the one that it stands on.
///
/// A line that is not of the documented form is left out: one file system with an odd line must not hide all the others.
pub fn parse(text: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line)
}

/// One line without its newline; `None` when it is not of the documented form.
pub fn parse_line(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.splitn(7, |&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent_id = number(fields.next()?)?;
    let device = fields.next()?;
    let colon = device.iter().position(|&byte| byte == b':')?;
    let device = (number(&device[..colon])?, number(&device[colon + 1..])?);
    let root = path(fields.next()?);
    let mount_point = path(fields.next()?);
    let options = text(fields.next()?);
    let (optional, file_system) = split_at_separator(fields.next()?)?;
    let mut fields = file_system.splitn(3, |&byte| byte == b' ');
    Some(Entry {
        id,
        parent_id,
        device,
        root,
        mount_point,
        options,
        optional,
        fs_type: text(fields.next()?),
        source: text(fields.next()?),
        super_options: text(fields.next()?),
    })
}

/// The optional fields, and what follows the lonely `-` that ends them.
fn split_at_separator(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    if let Some(file_system) = rest.strip_prefix(b"- ") {
        return Some((&[], file_system));
    }
    let at = rest.windows(3).position(|window| window == b" - ")?;
    Some((&rest[..at], &rest[at + 3..]))
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> Cow<'_, OsStr> {
    match unescape(field) {
        Cow::Borrowed(bytes) => Cow::Borrowed(OsStr::from_bytes(bytes)),
        Cow::Owned(bytes) => Cow::Owned(std::ffi::OsString::from_vec(bytes)),
    }
}

fn path(field: &[u8]) -> Cow<'_, Path> {
    match text(field) {
        Cow::Borrowed(text) => Cow::Borrowed(Path::new(text)),
        Cow::Owned(text) => Cow::Owned(text.into()),
    }
}

/// Decodes `\ooo` to the byte with that octal number; a backslash that starts no such escape stays.
pub fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        match (byte, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                bytes.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    Cow::Owned(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_of_the_manual_page_is_understood() {
        let line =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue";
        let entry = parse_line(line).unwrap();
        assert_eq!((entry.id, entry.parent_id, entry.device), (36, 35, (98, 0)));
        assert_eq!(&*entry.root, Path::new("/mnt1"));
        assert_eq!(&*entry.mount_point, Path::new("/mnt 2"));
        assert_eq!(&*entry.options, "rw,noatime");
        assert_eq!(entry.optional, b"master:1 propagate_from:2");
        assert_eq!(
            (&*entry.fs_type, &*entry.source),
            (OsStr::new("ext3"), OsStr::new("/dev/root"))
        );
        assert_eq!(&*entry.super_options, "rw,errors=continue");
    }

    #[test]
    fn optional_fields_and_the_source_may_be_missing() {
        let entry = parse_line(b"1 0 0:1 / / rw - tmpfs  rw").unwrap();
        assert_eq!(entry.optional, b"");
        assert_eq!(&*parse_line(b"1 0 0:1 - - - - - - -").unwrap().fs_type, "-");
        assert_eq!(
            (&*entry.source, &*entry.super_options),
            (OsStr::new(""), OsStr::new("rw"))
        );
    }

    #[test]
    fn an_odd_line_does_not_hide_the_others() {
        let text =
            b"1 0 0:1 / / rw - tmpfs none rw\nodd\n\n2 x 0:1 / / rw - t s o\n3 1 0:2 / /b rw shared:1 - proc proc rw\n";
        assert_eq!(parse(text).map(|entry| entry.id).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn escapes_are_bytes_not_characters() {
        assert_eq!(
            &*unescape(br"a\040b\134040\303\244\400\09"),
            b"a b\\040\xc3\xa4\\400\\09"
        );
    }

    fn escape(bytes: &[u8]) -> Vec<u8> {
        let special = |byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\\' | b'#');
        bytes
            .iter()
            .flat_map(|&byte| {
                if special(byte) {
                    format!("\\{byte:03o}").into_bytes()
                } else {
                    vec![byte]
                }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&text).count();
        }

        #[test]
        fn what_the_kernel_escapes_comes_back(point in proptest::collection::vec(1_u8.., 1..60), optional in "(shared:[0-9]{1,3}( master:[0-9]{1,3})?)?") {
            let mut line = b"20 1 0:5 / ".to_vec();
            line.extend(escape(&point));
            line.extend(b" rw ");
            if !optional.is_empty() {
                line.extend(optional.as_bytes());
                line.push(b' ');
            }
            line.extend(b"- overlay overlay rw,lowerdir=/a");
            let entries: Vec<_> = parse(&line).collect();
            prop_assert_eq!(entries.len(), 1);
            prop_assert_eq!(entries[0].mount_point.as_os_str().as_bytes(), &point[..]);
            prop_assert_eq!(entries[0].optional, optional.as_bytes());
        }

        #[test]
        fn decoding_undoes_encoding(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let escaped = escape(&bytes);
            let decoded = unescape(&escaped);
            prop_assert_eq!(&*decoded, &bytes[..]);
        }
    }
}
