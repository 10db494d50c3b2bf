//! Device nodes, fifos, and the symlinks of `/dev`.

use std::{
    ffi::OsString,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::AtFlags,
    mount::{MntFlags, umount2},
    sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, mknodat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat},
};

use super::{
    attach::Work,
    place::{self, Entry, Make, is},
    plan::{Device, Node},
};
use crate::{
    error::{Context, Error, Result},
    rootfs::sys,
};

/// What every `/dev` has, and where it leads.
const SYMLINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
];

impl Device {
    /// Its name in errors.
    pub(super) fn field(&self) -> String {
        let path = self.path.display();
        match self.number {
            Some(number) => format!("linux.devices[{number}]: {path}"),
            None => format!("device {path}"),
        }
    }

    fn format(&self) -> SFlag {
        match self.kind {
            Node::Character => SFlag::S_IFCHR,
            Node::Block => SFlag::S_IFBLK,
            Node::Fifo => SFlag::S_IFIFO,
        }
    }

    fn is(&self, stat: &FileStat) -> bool {
        let same_device = self.kind == Node::Fifo || stat.st_rdev == libc::makedev(self.major, self.minor);
        is(stat, self.format().bits()) && same_device
    }
}

/// Makes the node of `device`, or attaches `tree`, which is the host's, in its place.
pub(super) fn make(work: &Work<'_>, device: &Device, tree: Option<OwnedFd>) -> Result<()> {
    make_one(work, device, tree).context(|| device.field())
}

fn make_one(work: &Work<'_>, device: &Device, tree: Option<OwnedFd>) -> Result<()> {
    let entry = place::entry(work.root.as_fd(), &device.path).context(|| "cannot make its folder")?;
    if let Some(tree) = tree {
        return bind(&entry, device, &tree);
    }
    let number = libc::makedev(device.major, device.minor);
    // The umask is 0 here.
    let mode = Mode::from_bits_truncate(device.mode);
    match mknodat(&entry.parent, entry.name.as_os_str(), device.format(), mode, number) {
        Ok(()) => owner_and_mode(&entry, device),
        Err(nix::Error::EEXIST) => there_already(&entry, device),
        Err(nix::Error::EPERM) if device.kind != Node::Fifo => {
            let path = &device.path;
            let tree = sys::open_tree_clone(path, false)
                .context(|| format!("no node can be made, nor {} of the host be opened", path.display()))?;
            let stat = fstat(&tree).context(|| "cannot stat the host's node")?;
            if !device.is(&stat) {
                return Err(Error::precondition(
                    "no node can be made, and the host's is another device",
                ));
            }
            bind(&entry, device, &tree)
        }
        Err(e) => Err(e).context(|| "cannot make the node"),
    }
}

fn owner_and_mode(entry: &Entry, device: &Device) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    let name = entry.name.as_os_str();
    fchownat(&entry.parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
        .context(|| format!("cannot give it to {}:{}", device.uid, device.gid))?;
    // After the owner, whose change takes bits away; and an access list of the folder's may have taken some.
    let mode = Mode::from_bits_truncate(device.mode);
    fchmodat(&entry.parent, name, mode, FchmodatFlags::FollowSymlink)
        .context(|| format!("cannot set its mode {:#o}", device.mode))
}

fn there_already(entry: &Entry, device: &Device) -> Result<()> {
    let there = entry.open().and_then(fstat).context(|| "cannot stat what is there")?;
    match (device.is(&there), device.number) {
        (true, Some(_)) => owner_and_mode(entry, device),
        (true, None) => Ok(()),
        (false, Some(_)) => Err(Error::precondition("something else is there already")),
        // As with crun, an image may have something of its own there.
        (false, None) => Ok(()),
    }
}

fn bind(entry: &Entry, device: &Device, tree: &OwnedFd) -> Result<()> {
    match entry.file() {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(e) => return Err(e).context(|| "cannot make a file for the host's node"),
    }
    let file = entry.open().context(|| "cannot open the file for the host's node")?;
    let stat = fstat(&file).context(|| "cannot stat the file for the host's node")?;
    if device.is(&stat) {
        // Such as one that the image's own mounts brought along.
        return Ok(());
    }
    sys::move_mount(tree.as_fd(), file.as_fd()).context(|| "cannot put the host's node there")
}

/// `/dev/fd` and its like where nothing is, and `/dev/ptmx` in any case: another one would be of another devpts.
pub(super) fn symlinks(work: &Work<'_>) -> Result<()> {
    let dev = work.place(Path::new("dev"), Make::Folder, true).context(|| "/dev")?;
    for (target, name) in SYMLINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(e) => return Err(e).context(|| format!("cannot make the symlink /dev/{name}")),
        }
    }
    let entry = Entry {
        parent: dev,
        name: OsString::from("ptmx"),
    };
    ptmx(&entry).context(|| "cannot make the symlink /dev/ptmx")
}

fn ptmx(entry: &Entry) -> Result<()> {
    let link = || symlinkat("pts/ptmx", &entry.parent, "ptmx");
    match link() {
        Ok(()) => return Ok(()),
        Err(nix::Error::EEXIST) => {}
        Err(e) => return Err(e).context(|| "symlink"),
    }
    let removed = match entry.unlink() {
        Err(nix::Error::EISDIR) => unlinkat(&entry.parent, "ptmx", UnlinkatFlags::RemoveDir),
        // Something is mounted on it.
        Err(nix::Error::EBUSY) => uncover(entry).and_then(|()| entry.unlink()),
        removed => removed,
    };
    removed.context(|| "cannot remove what is there")?;
    link().context(|| "symlink")
}

fn uncover(entry: &Entry) -> nix::Result<()> {
    let before = nix::fcntl::open(
        ".",
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    nix::unistd::fchdir(&entry.parent)?;
    let gone = umount2("ptmx", MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    nix::unistd::fchdir(before)?;
    gone
}
