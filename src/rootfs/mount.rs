//! One mount: from the words of a snapshotter to a mount at its place.
//!
//! Everything here blocks and belongs on a thread of its own that ends afterwards: some of it changes the thread's working folder and
//! mount namespace for good.
//!
//! Wherever possible a mount is made detached, gets its attributes, and only then appears at its place: a read-only bind is never seen
//! writable, and a thread that dies on the way leaves nothing.

use std::{
    borrow::Cow,
    ffi::CString,
    fmt, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount as mount2, umount2},
    sys::stat::Mode,
};

use super::{
    Mount, idmap,
    loopdev::LoopDevice,
    options::{self, Options},
    overlay::{self, OverlayApi},
    sys::{self, FsContext, MountAttr, attr},
};
use crate::error::{Context, Error, Kind, Result, kind_of_io};

/// The longest value that fsconfig(2) takes.
pub(super) const FSCONFIG_VALUE_MAX: usize = 255;

/// How often a look-up is begun anew that another process's rename disturbed (openat2(2), EAGAIN).
pub(crate) const LOOKUP_TRIES: u32 = 32;

/// What the kernel would not do.
#[derive(Debug)]
pub(crate) struct Refusal {
    what: String,
    pub(crate) cause: io::Error,
}

impl Refusal {
    pub(crate) fn new(what: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        Self {
            what: what.into(),
            cause: cause.into(),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal.cause.raw_os_error() {
            Some(libc::EINVAL | libc::ENOTDIR | libc::ELOOP | libc::ENAMETOOLONG) => Kind::InvalidArgument,
            Some(libc::ENODEV) => Kind::Unimplemented,
            _ => kind_of_io(&refusal.cause),
        };
        Error::new(kind, refusal.what).with_source(refusal.cause)
    }
}

/// The place of a mount, held open.
#[derive(Debug)]
pub(super) struct Target {
    rootfs: PathBuf,
    below: String,
    fd: OwnedFd,
}

impl Target {
    /// The place `below` inside `rootfs`. Symlinks on the way, which come from the image, are followed as if `rootfs` were `/`; they
    /// never lead out. `rootfs` itself must not be a symlink.
    pub(super) fn open(rootfs: &Path, below: &str) -> Result<Self> {
        let fd = open_below(rootfs, below)?;
        Ok(Self {
            rootfs: rootfs.to_path_buf(),
            below: below.to_owned(),
            fd,
        })
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// What is at the place now: the topmost mount.
    pub(super) fn top(&self) -> Result<OwnedFd> {
        open_below(&self.rootfs, &self.below)
    }

    /// The place as an absolute path without symlinks.
    pub(super) fn path(&self) -> Result<PathBuf> {
        std::fs::read_link(proc_path(&self.fd)).context(|| format!("cannot tell the path of {:?}", self.below))
    }
}

fn open_below(rootfs: &Path, below: &str) -> Result<OwnedFd> {
    let open = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(rootfs, open | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty()).map_err(|e| {
        Refusal::new(
            format!("cannot open rootfs {}; it must be a folder", rootfs.display()),
            e,
        )
    })?;
    let below = below.trim_start_matches('/');
    if below.is_empty() {
        return Ok(root);
    }
    let what = || {
        format!(
            "cannot open target {below:?} in rootfs {}; it must exist",
            rootfs.display()
        )
    };
    Ok(find(root.as_fd(), Path::new(below), true).map_err(|e| Refusal::new(what(), e))?)
}

/// What is at `path` below `root` now, the topmost mount; symlinks are followed as if `root` were `/`, unless there must be none.
pub(crate) fn find(root: BorrowedFd<'_>, path: &Path, symlinks: bool) -> nix::Result<OwnedFd> {
    let mut resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    if !symlinks {
        resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
    }
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    let mut result = Err(nix::Error::EAGAIN);
    for _ in 0..LOOKUP_TRIES {
        result = openat2(root, path, how);
        if !matches!(result, Err(nix::Error::EAGAIN)) {
            break;
        }
    }
    result
}

/// A path that leads to exactly what `fd` holds.
pub(super) fn proc_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Takes away the mount that `fd` holds, with everything on it, wherever it is. It may be gone already.
pub(super) fn detach(fd: &OwnedFd) -> io::Result<()> {
    // Nothing uses the mount yet, so a lazy unmount is a whole one; a plain one would refuse because of `fd` itself.
    match umount2(&proc_path(fd), MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Makes `mount` and puts it at its place in `rootfs`. The descriptor holds the mount, for [`detach`]; `None` for a remount, which
/// makes none.
///
/// # Errors
/// What the kernel and the file system say; nothing is mounted then.
pub(super) fn attach(mount: &Mount, options: &Options, rootfs: &Path, api: OverlayApi) -> Result<Option<OwnedFd>> {
    let target = Target::open(rootfs, &mount.target)?;
    if options.flags.contains(MsFlags::MS_REMOUNT) {
        return remount(mount, options, &target).map(|()| None);
    }
    let mounted = if mount.kind == "bind" || options.is_bind() {
        settle(bind(&mount.source, options)?, &target)?
    } else if mount.kind == "overlay" {
        overlay::attach(mount, options, &target, api)?
    } else {
        file_system(mount, options, &target)?
    };
    if let Err(e) = propagate(&mounted, options) {
        undo(&mounted);
        return Err(e);
    }
    Ok(Some(mounted))
}

/// Puts a detached mount at its place.
pub(super) fn settle(detached: OwnedFd, target: &Target) -> Result<OwnedFd> {
    sys::move_mount(detached.as_fd(), target.fd().as_fd())
        .map_err(|e| Refusal::new("cannot attach the mount to its target", e))?;
    Ok(detached)
}

fn undo(mounted: &OwnedFd) {
    if let Err(e) = detach(mounted) {
        log::warn!("cannot take a half-made mount away: {e}");
    }
}

/// Only an attached mount keeps its propagation: a shared parent would share it again while it is attached.
fn propagate(mounted: &OwnedFd, options: &Options) -> Result<()> {
    let Some(propagation) = options.propagation else {
        return Ok(());
    };
    let attributes = MountAttr {
        propagation: (propagation - MsFlags::MS_REC).bits(),
        ..MountAttr::default()
    };
    sys::mount_setattr(mounted.as_fd(), propagation.contains(MsFlags::MS_REC), &attributes)
        .map_err(|e| Refusal::new("cannot set the propagation", e).into())
}

fn remount(mount: &Mount, options: &Options, target: &Target) -> Result<()> {
    let data = page_of(&options.data)?;
    let (source, kind) = (mount.source.as_str(), mount.kind.as_str());
    mount2(
        Some(source),
        &proc_path(target.fd()),
        Some(kind),
        options.flags,
        Some(data.as_str()),
    )
    .map_err(|e| Refusal::new("remount", e).into())
}

/// A detached bind of `source`.
///
/// Options only ever forbid more than the mount of `source` does; `rw` or `exec` take nothing back. As with containerd they hold for
/// the topmost mount of a recursive bind.
pub(super) fn bind(source: &str, options: &Options) -> Result<OwnedFd> {
    let clone = sys::open_tree_clone(source, options.flags.contains(MsFlags::MS_REC))
        .map_err(|e| Refusal::new(format!("cannot bind {source:?}"), e))?;
    if !options.data.is_empty() {
        // A bind has no file system to ask; the kernel and containerd pass over such options too.
        log::debug!(
            "bind of {source:?}: {} options without meaning for a bind",
            options.data.len()
        );
    }
    let set = attributes(options.flags);
    let atime = MsFlags::MS_NOATIME | MsFlags::MS_RELATIME | MsFlags::MS_STRICTATIME;
    let clear = if options.flags.intersects(atime) {
        attr::ATIME
    } else {
        0
    };
    if set | clear != 0 {
        let change = MountAttr {
            set,
            clear,
            ..MountAttr::default()
        };
        sys::mount_setattr(clone.as_fd(), false, &change)
            .map_err(|e| Refusal::new("cannot set the options of the bind", e))?;
    }
    map_owners(&clone, options)?;
    Ok(clone)
}

fn map_owners(detached: &OwnedFd, options: &Options) -> Result<()> {
    let Some(map) = &options.idmap else { return Ok(()) };
    let namespace = idmap::user_namespace(map)?;
    idmap::apply(detached, &namespace, false).map_err(|e| Refusal::new(NO_IDMAP, e).into())
}

/// Said when the kernel will not map owners, which it mostly does not explain.
pub(super) const NO_IDMAP: &str = "cannot map owners (uidmap, gidmap); the file system may not know idmapped mounts";

/// The attributes of a mount that `flags` ask for, as mount(2) understands them.
pub(crate) fn attributes(flags: MsFlags) -> u64 {
    let pairs = [
        (MsFlags::MS_RDONLY, attr::RDONLY),
        (MsFlags::MS_NOSUID, attr::NOSUID),
        (MsFlags::MS_NODEV, attr::NODEV),
        (MsFlags::MS_NOEXEC, attr::NOEXEC),
        (MsFlags::MS_NODIRATIME, attr::NODIRATIME),
        (options::MS_NOSYMFOLLOW, attr::NOSYMFOLLOW),
    ];
    let mut attributes = pairs
        .iter()
        .filter(|(flag, _)| flags.contains(*flag))
        .fold(0, |sum, (_, attribute)| sum | attribute);
    if flags.contains(MsFlags::MS_STRICTATIME) {
        attributes |= attr::STRICTATIME;
    } else if flags.contains(MsFlags::MS_NOATIME) {
        attributes |= attr::NOATIME;
    }
    attributes
}

/// Any file system that is neither a bind nor an overlay.
fn file_system(mount: &Mount, options: &Options, target: &Target) -> Result<OwnedFd> {
    match file_system_from(mount, options, target, options.loop_device) {
        // A kernel that cannot mount an EROFS image from its file wants a block device.
        Err(refusal) if mount.kind == "erofs" && refusal.cause.raw_os_error() == Some(libc::ENOTBLK) => {
            Ok(file_system_from(mount, options, target, true)??)
        }
        made => Ok(made??),
    }
}

/// The outer error is the kernel's about the mount itself.
fn file_system_from(
    mount: &Mount,
    options: &Options,
    target: &Target,
    loops: bool,
) -> Result<Result<OwnedFd>, Refusal> {
    // Open until the file system holds them itself.
    let mut devices = Vec::new();
    let (source, data) = if loops {
        match behind_loops(mount, options, &mut devices) {
            Ok(backed) => backed,
            Err(e) => return Ok(Err(e)),
        }
    } else {
        (mount.source.clone(), options.data.clone())
    };
    let context = if fits_context(&mount.kind, options.flags) {
        parameters(&data)
    } else {
        None
    };
    if let Some(parameters) = context {
        let detached = from_context(&mount.kind, &source, options.flags, &parameters)?;
        return Ok(map_owners(&detached, options).and_then(|()| settle(detached, target)));
    }
    let data = match page_of(&data) {
        Ok(data) => data,
        Err(e) => return Ok(Err(e)),
    };
    mount2(
        Some(source.as_str()),
        &proc_path(target.fd()),
        Some(mount.kind.as_str()),
        options.flags,
        Some(data.as_str()),
    )
    .map_err(|e| Refusal::new("mount", e))?;
    Ok(hold(target).and_then(|mounted| remap(mounted, options, target)))
}

/// A descriptor of what mount(2) has just put at `target`.
pub(super) fn hold(target: &Target) -> Result<OwnedFd> {
    target.top().inspect_err(|_| {
        if let Ok(path) = target.path() {
            // Only the topmost mount there can be ours.
            let _ = umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    })
}

/// Owners of an attached mount cannot be mapped: a mapped copy takes its place.
fn remap(mounted: OwnedFd, options: &Options, target: &Target) -> Result<OwnedFd> {
    if options.idmap.is_none() {
        return Ok(mounted);
    }
    let copy = sys::open_tree_clone(&proc_path(&mounted), false).context(|| "cannot copy the mount to map its owners");
    undo(&mounted);
    let copy = copy?;
    map_owners(&copy, options)?;
    settle(copy, target)
}

/// Puts loop devices in front of the source, and of further `device=` files of an EROFS image.
fn behind_loops(mount: &Mount, options: &Options, devices: &mut Vec<LoopDevice>) -> Result<(String, Vec<String>)> {
    // EROFS never writes, and its images may lie where nothing can.
    let read_only = options.flags.contains(MsFlags::MS_RDONLY) || mount.kind == "erofs";
    let mut device_of = |file: &str| -> Result<String> {
        let device = LoopDevice::attach(Path::new(file), read_only, options.direct_io)?;
        let path = device.path.display().to_string();
        devices.push(device);
        Ok(path)
    };
    let source = device_of(&mount.source)?;
    let data = options.data.iter().map(|word| match word.strip_prefix("device=") {
        Some(file) if mount.kind == "erofs" && Path::new(file).is_file() => Ok(format!("device={}", device_of(file)?)),
        _ => Ok(word.clone()),
    });
    let data = data.collect::<Result<Vec<_>>>()?;
    Ok((source, data))
}

/// Whether fsopen(2) can express the mount. It has no word for two old flags, and OpenZFS is only at home with mount(2), which is what
/// mount.zfs(8) calls.
pub(crate) fn fits_context(kind: &str, flags: MsFlags) -> bool {
    kind != "zfs" && !flags.intersects(MsFlags::MS_SILENT | MsFlags::MS_I_VERSION)
}

/// An option on its way to fsconfig(2).
pub(crate) struct Parameter<'a> {
    pub(crate) key: &'a str,
    pub(super) value: Option<Cow<'a, str>>,
}

impl<'a> Parameter<'a> {
    pub(crate) fn new(word: &'a str) -> Self {
        match word.split_once('=') {
            Some((key, value)) => Self {
                key,
                value: Some(unquoted(key, value).into()),
            },
            None => Self { key: word, value: None },
        }
    }
}

impl fmt::Display for Parameter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(_) if options::is_secret(self.key) => write!(f, "{}=…", self.key),
            Some(value) => write!(f, "{}={value}", self.key),
            None => f.write_str(self.key),
        }
    }
}

/// SELinux labels come in quotes because they may hold commas; mount(2) takes the quotes off, fsconfig(2) does not.
fn unquoted<'a>(key: &str, value: &'a str) -> &'a str {
    match key {
        "context" | "fscontext" | "defcontext" | "rootcontext" => value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'))
            .unwrap_or(value),
        _ => value,
    }
}

/// The words as single options; `None` when one of them is too long for fsconfig(2).
pub(crate) fn parameters(words: &[String]) -> Option<Vec<Parameter<'_>>> {
    let mut parameters = Vec::new();
    for word in words {
        // The kernel splits the string of mount(2) at commas outside of quotes, so a word may hold several options.
        let mut quoted = false;
        let parts = word.split(move |c| {
            quoted ^= c == '"';
            c == ',' && !quoted
        });
        parameters.extend(parts.filter(|part| !part.is_empty()).map(Parameter::new));
    }
    let fits = |parameter: &Parameter<'_>| {
        parameter
            .value
            .as_ref()
            .is_none_or(|value| value.len() <= FSCONFIG_VALUE_MAX)
    };
    parameters.iter().all(fits).then_some(parameters)
}

/// A detached mount of a new file system.
pub(crate) fn from_context(
    kind: &str,
    source: &str,
    flags: MsFlags,
    parameters: &[Parameter<'_>],
) -> Result<OwnedFd, Refusal> {
    let invalid = |_| Refusal::new("a mount holds a NUL byte", nix::Error::EINVAL);
    let text = |text: &str| CString::new(text).map_err(invalid);
    let context = FsContext::open(&text(kind)?).map_err(|e| match e.raw_os_error() {
        Some(libc::ENODEV) => Refusal::new(format!("the kernel knows no file system {kind}; load its module"), e),
        _ => Refusal::new("fsopen", e),
    })?;
    let refused = |what: String, e: io::Error| match context.complaints() {
        says if says.is_empty() => Refusal::new(what, e),
        says => Refusal::new(format!("{what}: {says}"), e),
    };
    if !source.is_empty() {
        context
            .set(c"source", &text(source)?)
            .map_err(|e| refused("source".to_owned(), e))?;
    }
    let flags_of_the_file_system = [
        (MsFlags::MS_RDONLY, c"ro"),
        (MsFlags::MS_SYNCHRONOUS, c"sync"),
        (MsFlags::MS_DIRSYNC, c"dirsync"),
        (MsFlags::MS_LAZYTIME, c"lazytime"),
        (MsFlags::MS_MANDLOCK, c"mand"),
    ];
    for (flag, name) in flags_of_the_file_system {
        if flags.contains(flag) {
            context
                .set_flag(name)
                .map_err(|e| refused(format!("option {}", name.to_string_lossy()), e))?;
        }
    }
    for parameter in parameters {
        let key = text(parameter.key)?;
        let result = match &parameter.value {
            Some(value) => context.set(&key, &text(value)?),
            None => context.set_flag(&key),
        };
        result.map_err(|e| refused(format!("option {parameter}"), e))?;
    }
    context
        .mount(attributes(flags))
        .map_err(|e| refused("mount".to_owned(), e))
}

/// The option string of mount(2).
///
/// # Errors
/// `InvalidArgument` when it is longer than the page that the kernel reads.
pub(crate) fn page_of(words: &[String]) -> Result<String> {
    let data = words.join(",");
    if data.len() >= page_bytes() {
        return Err(Error::invalid(format!(
            "mount options take {} bytes; mount(2) reads less than {}",
            data.len(),
            page_bytes()
        )));
    }
    Ok(data)
}

/// Size of a page of memory, bytes.
pub(super) fn page_bytes() -> usize {
    // SAFETY: the call has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// Number of the mount that `fd` is on, as in mountinfo.
pub(super) fn mount_id(fd: &OwnedFd) -> Result<u32> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    let id = text
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| Error::unknown(format!("no mnt_id in {path}")))
}

/// Whether a path is one that can hold a rootfs: absolute, and below another folder.
pub(super) fn check_rootfs(rootfs: &Path) -> Result<()> {
    if rootfs.is_absolute() && rootfs.file_name().is_some() && !rootfs.as_os_str().as_bytes().contains(&0) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "rootfs {} must be an absolute path of a folder other than /",
        rootfs.display()
    )))
}
