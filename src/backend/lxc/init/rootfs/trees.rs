//! What the shim opens on the host for init: detached copies of mounts.
//!
//! A copy that is made in the host's mount namespace stays in the peer group of what it is a copy of, and a descriptor of it can be
//! attached by an init that could not have opened the path.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use super::{
    Root,
    plan::{Action, Device, Map, Mount, Node, Owners},
    words::{Attributes, Kind},
};
use crate::{
    error::{Context, Error, Result},
    rootfs::{
        idmap,
        sys::{self, MountAttr},
    },
};

pub(super) fn open(root: &Root) -> Result<Vec<OwnedFd>> {
    for sysctl in &root.sysctls {
        if let Some((kind, path)) = &sysctl.not_of_host {
            let field = || format!("linux.sysctl: {}", sysctl.key);
            not_of_host(kind, path).context(field)?;
        }
    }
    let mut trees = vec![root_tree(&root.path)?];
    if root.user_namespace {
        trees.push(sys::open_tree_clone("/proc", false).context(|| "cannot open /proc of the host")?);
    }
    if root.sys_of_host {
        let tree = sys::open_tree_clone("/sys", true).context(|| "cannot open /sys of the host")?;
        propagate(&tree, true, Kind::Slave).context(|| "cannot make a copy of /sys a slave")?;
        trees.push(tree);
    }
    for mount in &root.mounts {
        if let Some(tree) = bind(mount)? {
            trees.push(tree);
        }
    }
    for device in &root.devices {
        if needs_tree(root, device) {
            trees.push(node(device).context(|| device.field())?);
        }
    }
    Ok(trees)
}

/// Whether a device comes as a descriptor: only fifos are made in a user namespace.
pub(super) fn needs_tree(root: &Root, device: &Device) -> bool {
    root.user_namespace && device.kind != Node::Fifo
}

fn not_of_host(kind: &str, path: &Path) -> Result<()> {
    let of = |path: &Path| {
        let file = std::fs::metadata(path).context(|| format!("cannot open {}", path.display()))?;
        Ok::<_, Error>((file.dev(), file.ino()))
    };
    let ours = PathBuf::from(format!("/proc/self/ns/{kind}"));
    if of(path)? == of(&ours)? {
        return Err(Error::invalid(format!(
            "the {kind} namespace {} is the host's",
            path.display()
        )));
    }
    Ok(())
}

fn root_tree(path: &Path) -> Result<OwnedFd> {
    let tree = sys::open_tree_clone(path, true).context(|| format!("root.path: cannot open {}", path.display()))?;
    // Nothing that is mounted for the container may come back through a peer.
    propagate(&tree, true, Kind::Private).context(|| "cannot make the root private")?;
    Ok(tree)
}

fn bind(mount: &Mount) -> Result<Option<OwnedFd>> {
    let Action::Bind {
        source,
        recursive,
        attributes,
        owners,
        copy_symlink,
    } = &mount.action
    else {
        return Ok(None);
    };
    let what = |what: &str| {
        format!(
            "mounts[{}]: cannot {what} {} for {}",
            mount.number,
            source.display(),
            mount.destination.display()
        )
    };
    if *copy_symlink && source.is_symlink() {
        // Its descriptor tells the helper where it leads.
        let mut options = File::options();
        let symlink = options.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        return Ok(Some(symlink.open(source).context(|| what("open"))?.into()));
    }
    let tree = sys::open_tree_clone(source, *recursive).context(|| what("open"))?;
    set(&tree, false, *attributes).context(|| what("set the options of"))?;
    set(&tree, true, mount.recursive).context(|| what("set the recursive options of"))?;
    if let Some(owners) = owners {
        shift(&tree, owners).context(|| what("map the owners of"))?;
    }
    // Its propagation is set by init, when it is attached: a shared place would share it again.
    Ok(Some(tree))
}

pub(super) fn set(mount: &OwnedFd, recursive: bool, attributes: Attributes) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let change = MountAttr {
        set: attributes.set,
        clear: attributes.clear,
        ..MountAttr::default()
    };
    sys::mount_setattr(mount.as_fd(), recursive, &change)
}

pub(super) fn propagate(mount: &OwnedFd, recursive: bool, kind: Kind) -> io::Result<()> {
    let change = MountAttr {
        propagation: kind.flags(),
        ..MountAttr::default()
    };
    sys::mount_setattr(mount.as_fd(), recursive, &change)
}

fn shift(tree: &OwnedFd, owners: &Owners) -> Result<()> {
    let namespace = match &owners.map {
        Map::Ranges(map) => idmap::user_namespace(map)?,
        Map::Of(path) => File::open(path)
            .context(|| format!("cannot open the user namespace {}", path.display()))?
            .into(),
    };
    idmap::apply(tree, &namespace, owners.recursive).context(|| "the kernel refuses; the file system may not know it")
}

/// The host's node of a device: at the same path, or where the kernel's numbers lead.
fn node(device: &Device) -> Result<OwnedFd> {
    let folder = match device.kind {
        Node::Block => "/dev/block",
        _ => "/dev/char",
    };
    let by_number = PathBuf::from(format!("{folder}/{}:{}", device.major, device.minor));
    let fits = |path: &&PathBuf| {
        std::fs::metadata(path).is_ok_and(|file| {
            let kind = match device.kind {
                Node::Block => file.file_type().is_block_device(),
                _ => file.file_type().is_char_device(),
            };
            kind && file.rdev() == libc::makedev(device.major, device.minor)
        })
    };
    let Some(path) = [&device.path, &by_number].into_iter().find(fits) else {
        return Err(Error::not_found(format!(
            "the host has no such node, neither at {} nor at {}; in a user namespace none can be made",
            device.path.display(),
            by_number.display()
        )));
    };
    let tree = sys::open_tree_clone(path, false).context(|| format!("cannot open {}", path.display()))?;
    propagate(&tree, false, Kind::Private).context(|| "cannot make the node private")?;
    Ok(tree)
}
