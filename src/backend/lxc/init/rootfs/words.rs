//! The options of `mounts[]`: what fstab(5) knows, and the words that only OCI runtimes have. Pure.

use nix::mount::MsFlags;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    rootfs::{options::Options, sys::attr},
};

/// Attributes of a mount that are set, and that are taken back (mount_setattr(2)).
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) set: u64,
    pub(super) clear: u64,
}

impl Attributes {
    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn set(&mut self, attribute: u64) {
        self.set |= attribute;
        self.clear &= !attribute;
    }

    fn unset(&mut self, attribute: u64) {
        self.set &= !attribute;
        self.clear |= attribute;
    }

    /// One of the values of [`attr::ATIME`], which is a field; the kernel wants all of it cleared.
    fn atime(&mut self, value: u64) {
        self.unset(attr::ATIME);
        self.set |= value;
    }
}

/// Which mounts and unmounts reach a mount, and which leave it.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Propagation {
    pub(super) kind: Kind,
    /// All mounts below as well.
    pub(super) recursive: bool,
}

/// The kinds of mount_namespaces(7).
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Shared,
    Slave,
    Private,
    Unbindable,
}

impl Default for Propagation {
    fn default() -> Self {
        Self {
            kind: Kind::Private,
            recursive: true,
        }
    }
}

impl Propagation {
    pub(super) fn parse(word: &str) -> Option<Self> {
        Self::of(Options::parse(&[word]).ok()?.propagation?)
    }

    /// From the flags of mount(2).
    pub(super) fn of(flags: MsFlags) -> Option<Self> {
        let kind = match flags - MsFlags::MS_REC {
            MsFlags::MS_SHARED => Kind::Shared,
            MsFlags::MS_SLAVE => Kind::Slave,
            MsFlags::MS_PRIVATE => Kind::Private,
            MsFlags::MS_UNBINDABLE => Kind::Unbindable,
            _ => return None,
        };
        Some(Self {
            kind,
            recursive: flags.contains(MsFlags::MS_REC),
        })
    }
}

impl Kind {
    /// As mount_setattr(2) wants it.
    pub(super) fn flags(self) -> u64 {
        match self {
            Self::Shared => MsFlags::MS_SHARED.bits(),
            Self::Slave => MsFlags::MS_SLAVE.bits(),
            Self::Private => MsFlags::MS_PRIVATE.bits(),
            Self::Unbindable => MsFlags::MS_UNBINDABLE.bits(),
        }
    }
}

/// What a list of options asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Words {
    pub(super) options: Options,
    pub(super) recursive: Attributes,
    pub(super) copy_up: bool,
    /// `idmap`, or `ridmap` if true.
    pub(super) idmap: Option<bool>,
    pub(super) copy_symlink: bool,
}

impl Words {
    /// # Errors
    /// `InvalidArgument` for a recursive word that the kernel has no attribute for, and what [`Options::parse`] refuses.
    pub(super) fn parse(words: &[String]) -> Result<Self> {
        let mut rest = Vec::new();
        let mut recursive = Attributes::default();
        let (mut copy_up, mut idmap, mut copy_symlink) = (false, None, false);
        for word in words {
            match word.as_str() {
                "rro" => recursive.set(attr::RDONLY),
                "rrw" => recursive.unset(attr::RDONLY),
                "rnosuid" => recursive.set(attr::NOSUID),
                "rsuid" => recursive.unset(attr::NOSUID),
                "rnodev" => recursive.set(attr::NODEV),
                "rdev" => recursive.unset(attr::NODEV),
                "rnoexec" => recursive.set(attr::NOEXEC),
                "rexec" => recursive.unset(attr::NOEXEC),
                "rnodiratime" => recursive.set(attr::NODIRATIME),
                "rdiratime" => recursive.unset(attr::NODIRATIME),
                "rnosymfollow" => recursive.set(attr::NOSYMFOLLOW),
                "rsymfollow" => recursive.unset(attr::NOSYMFOLLOW),
                "rnoatime" => recursive.atime(attr::NOATIME),
                "rstrictatime" => recursive.atime(attr::STRICTATIME),
                // What is neither of these two is relatime.
                "rrelatime" | "rnorelatime" | "ratime" | "rnostrictatime" => recursive.atime(0),
                "rsync" | "rasync" | "rdirsync" | "rmand" | "rnomand" => {
                    return Err(Error::invalid(format!(
                        "{word} is a matter of file systems, not of the mounts below"
                    )));
                }
                "tmpcopyup" => copy_up = true,
                "idmap" => idmap = Some(false),
                "ridmap" => idmap = Some(true),
                "copy-symlink" => copy_symlink = true,
                other if other.starts_with("idmap=") || other.starts_with("ridmap=") => {
                    return Err(Error::invalid(format!(
                        "{other:?}: say mounts[].uidMappings and gidMappings"
                    )));
                }
                other => rest.push(other),
            }
        }
        Ok(Self {
            options: Options::parse(&rest)?,
            recursive,
            copy_up,
            idmap,
            copy_symlink,
        })
    }
}
