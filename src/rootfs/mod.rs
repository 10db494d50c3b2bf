//! What the container stands on: the mounts of its rootfs.
