//! What the container stands on: the mounts of its rootfs.

/// A mount as containerd's snapshotters hand it out (containerd api/types/mount.proto).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system type: "overlay", "bind", "zfs", …
    pub kind: String,
    /// Device, dataset or folder.
    pub source: String,
    /// Path below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// Options in the form of fstab(5).
    pub options: Vec<String>,
}
