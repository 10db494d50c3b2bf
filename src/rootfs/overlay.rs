//! overlayfs: layers in any number and of any length, on old and new kernels, with mapped owners.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, openat},
    mount::{MsFlags, mount as mount2},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, mkdirat},
};

use super::{
    Mount, idmap,
    mount::{
        self, FSCONFIG_VALUE_MAX, NO_IDMAP, Parameter, Refusal, Target, from_context, hold, page_bytes, proc_path,
        settle,
    },
    options::{IdMap, Options, split_unescaped, unescape},
    sys,
};
use crate::error::{Context, Error, Result};

/// How layers reach overlayfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OverlayApi {
    /// One by one, by fsconfig(2) `lowerdir+`; Linux 6.8.
    Layers,
    /// All of them in the one page of options that mount(2) reads.
    Page,
}

impl OverlayApi {
    /// What the running kernel has.
    pub(super) fn of_this_kernel() -> Self {
        let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
        match release {
            Ok(release) if version(&release) >= (6, 8) => Self::Layers,
            _ => Self::Page,
        }
    }
}

/// Major and minor number of a kernel release such as `6.1.0-37-amd64`; zeros where there are none.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The layers of a `lowerdir=` value, upmost first, as plain paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Layers {
    lower: Vec<String>,
    /// Layers that only hold file contents, behind `::`.
    data: Vec<String>,
}

impl Layers {
    /// `None` for a list that overlayfs refuses, or that is of a form only its own parser knows.
    fn parse(list: &str) -> Option<Self> {
        let mut layers = Self::default();
        let mut parts = split_unescaped(list, ':').peekable();
        while let Some(part) = parts.next() {
            match part {
                "" if layers.lower.is_empty() => return None,
                "" => layers
                    .data
                    .push(unescape(parts.next().filter(|part| !part.is_empty())?)),
                _ if !layers.data.is_empty() => return None,
                _ => layers.lower.push(unescape(part)),
            }
        }
        (!layers.lower.is_empty()).then_some(layers)
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        self.lower.iter().chain(&self.data)
    }

    /// The value of `lowerdir=` when each layer is called as `name` says.
    fn list(&self, mut name: impl FnMut(&str) -> String) -> String {
        let lower: Vec<_> = self.lower.iter().map(|layer| name(layer)).collect();
        let data: String = self.data.iter().map(|layer| format!("::{}", name(layer))).collect();
        lower.join(":") + &data
    }
}

/// Puts an overlay at its place.
pub(super) fn attach(mount: &Mount, options: &Options, target: &Target, api: OverlayApi) -> Result<OwnedFd> {
    let words: Vec<&str> = options
        .data
        .iter()
        .flat_map(|word| split_unescaped(word, ','))
        .collect();
    let value = |key: &str| words.iter().rev().find_map(|word| word.strip_prefix(key));
    let others: Vec<&str> = words
        .iter()
        .copied()
        .filter(|word| !word.is_empty() && !word.starts_with("lowerdir="))
        .collect();
    let Some(layers) = value("lowerdir=").and_then(Layers::parse) else {
        if options.idmap.is_some() {
            return Err(Error::invalid(
                "an overlay with uidmap and gidmap needs a list of layers in lowerdir",
            ));
        }
        return from_page(mount, options, target, None, &words.join(","));
    };
    let overlay = Overlay {
        mount,
        options,
        layers,
        others,
    };
    if let ([only], None, true) = (
        &overlay.layers.lower[..],
        value("upperdir="),
        overlay.layers.data.is_empty(),
    ) {
        // overlayfs wants two layers; a read-only view of one is a bind.
        let mut view = options.clone();
        view.flags |= MsFlags::MS_RDONLY;
        view.data.clear();
        return settle(mount::bind(only, &view)?, target);
    }
    match (&options.idmap, api) {
        (Some(map), _) => settle(overlay.idmapped(map, target, api)?, target),
        (None, OverlayApi::Layers) => settle(overlay.by_layers(&overlay.layers)?, target),
        (None, OverlayApi::Page) => {
            let page = overlay.page()?;
            from_page(mount, options, target, page.folder.as_deref(), &page.data)
        }
    }
}

struct Overlay<'a> {
    mount: &'a Mount,
    options: &'a Options,
    layers: Layers,
    /// All options but `lowerdir`.
    others: Vec<&'a str>,
}

/// The option string of mount(2) and the folder in which its names hold.
#[derive(Debug)]
struct Page {
    folder: Option<PathBuf>,
    data: String,
    /// The layers, where their names are numbers of descriptors.
    _open: Vec<OwnedFd>,
}

impl Overlay<'_> {
    /// A detached overlay whose layers are handed over one by one.
    fn by_layers(&self, layers: &Layers) -> Result<OwnedFd> {
        let mut open = Vec::new();
        let mut parameters = Vec::new();
        for word in &self.others {
            let mut parameter = Parameter::new(word);
            if let Some(value) = parameter
                .value
                .as_mut()
                .filter(|value| value.len() > FSCONFIG_VALUE_MAX)
            {
                *value = short_name(&unescape(value), &mut open)?.into();
            }
            parameters.push(parameter);
        }
        for (key, layers) in [("lowerdir+", &layers.lower), ("datadir+", &layers.data)] {
            for layer in layers {
                let value = match layer.len() {
                    ..=FSCONFIG_VALUE_MAX => layer.into(),
                    _ => short_name(layer, &mut open)?.into(),
                };
                parameters.push(Parameter {
                    key,
                    value: Some(value),
                });
            }
        }
        Ok(from_context(
            "overlay",
            &self.mount.source,
            self.options.flags,
            &parameters,
        )?)
    }

    /// The options as one page, shortened as little as possible: in full, then relative to the folder that holds all layers (which
    /// leaves names that a person can follow), then as descriptors.
    fn page(&self) -> Result<Page> {
        let fits = |data: &String| data.len() < page_bytes();
        let in_full = self.words(&self.layers.list(escape));
        if fits(&in_full) {
            return Ok(Page {
                folder: None,
                data: in_full,
                _open: Vec::new(),
            });
        }
        if let Some(folder) = common_folder(self.layers.all()) {
            let relative = |layer: &str| match Path::new(layer).strip_prefix(&folder) {
                Ok(name) => escape(&name.to_string_lossy()),
                Err(_) => escape(layer),
            };
            let data = self.words(&self.layers.list(relative));
            if fits(&data) {
                return Ok(Page {
                    folder: Some(folder),
                    data,
                    _open: Vec::new(),
                });
            }
        }
        let mut open = Vec::new();
        let mut names = Vec::new();
        for layer in self.layers.all() {
            let path = short_name(layer, &mut open)?;
            names.push(path.rsplit('/').next().unwrap_or_default().to_owned());
        }
        let mut names = names.into_iter();
        let data = self.words(&self.layers.list(|_| names.next().unwrap_or_default()));
        if fits(&data) {
            return Ok(Page {
                folder: Some("/proc/self/fd".into()),
                data,
                _open: open,
            });
        }
        Err(Error::invalid(format!(
            "{} layers do not fit into the page of options that this kernel reads; Linux 6.8 takes them",
            self.layers.all().count()
        )))
    }

    fn words(&self, lowerdir: &str) -> String {
        let lowerdir = format!("lowerdir={lowerdir}");
        let words: Vec<&str> = self.others.iter().copied().chain([lowerdir.as_str()]).collect();
        words.join(",")
    }

    /// A detached overlay whose lower layers show mapped owners.
    ///
    /// overlayfs only takes layers that are mounted somewhere. That somewhere is a mount namespace which this thread has for itself:
    /// nobody sees the mapped layers, and whatever ends this thread, SIGKILL too, takes them away. The overlay keeps what it needs of
    /// them.
    fn idmapped(&self, map: &IdMap, target: &Target, api: OverlayApi) -> Result<OwnedFd> {
        let owners = idmap::user_namespace(map)?;
        let scratch = target.path()?;
        let home = File::open("/proc/thread-self/ns/mnt").context(|| "cannot open the mount namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).context(|| "cannot make a mount namespace for the mapped layers")?;
        let made = self.over_mapped_layers(&owners, &scratch, api);
        setns(&home, CloneFlags::CLONE_NEWNS).context(|| "cannot go back to the mount namespace")?;
        made
    }

    fn over_mapped_layers(&self, owners: &OwnedFd, scratch: &Path, api: OverlayApi) -> Result<OwnedFd> {
        let none = None::<&str>;
        mount2(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context(|| "cannot make a mount namespace private")?;
        let mapped = self.layers.all().map(|layer| {
            let copy = sys::open_tree_clone(layer.as_str(), false)
                .map_err(|e| Refusal::new(format!("cannot copy layer {layer:?}"), e))?;
            idmap::apply(&copy, owners, false).map_err(|e| Refusal::new(format!("layer {layer:?}: {NO_IDMAP}"), e))?;
            Ok(copy)
        });
        let mapped = mapped.collect::<Result<Vec<_>>>()?;

        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount2(
            Some("tmpfs"),
            scratch,
            Some("tmpfs"),
            flags,
            Some("mode=0700,size=1m,nr_inodes=2k"),
        )
        .context(|| "cannot mount a folder for the mapped layers")?;
        nix::unistd::chdir(scratch).context(|| "cannot enter the folder of the mapped layers")?;
        let folder = |name: &str| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            mkdirat(nix::fcntl::AT_FDCWD, name, Mode::S_IRWXU)?;
            openat(nix::fcntl::AT_FDCWD, name, flags, Mode::empty())
        };
        for (number, copy) in mapped.iter().enumerate() {
            let place = folder(&number.to_string()).context(|| "cannot make a folder for a mapped layer")?;
            sys::move_mount(copy.as_fd(), place.as_fd()).context(|| "cannot mount a mapped layer")?;
        }
        let mut numbers = (0..mapped.len()).map(|number| number.to_string());
        let layers = Layers {
            lower: numbers.by_ref().take(self.layers.lower.len()).collect(),
            data: numbers.collect(),
        };
        match api {
            OverlayApi::Layers => self.by_layers(&layers),
            OverlayApi::Page => {
                folder("overlay").context(|| "cannot make a folder for the overlay")?;
                let data = mount::page_of(&[self.words(&layers.list(str::to_owned))])?;
                let source = Some(self.mount.source.as_str());
                mount2(
                    source,
                    "overlay",
                    Some("overlay"),
                    self.options.flags,
                    Some(data.as_str()),
                )
                .map_err(|e| Refusal::new("mount", e))?;
                sys::open_tree_clone("overlay", false).context(|| "cannot take the overlay out of its namespace")
            }
        }
    }
}

/// mount(2) from within `folder`.
fn from_page(mount: &Mount, options: &Options, target: &Target, folder: Option<&Path>, data: &str) -> Result<OwnedFd> {
    let data = mount::page_of(&[data.to_owned()])?;
    if let Some(folder) = folder {
        // The working folder is the process's until this thread has one of its own.
        unshare(CloneFlags::CLONE_FS).context(|| "cannot give the thread a working folder of its own")?;
        nix::unistd::chdir(folder).context(|| format!("cannot enter {}, which holds the layers", folder.display()))?;
    }
    mount2(
        Some(mount.source.as_str()),
        &proc_path(target.fd()),
        Some("overlay"),
        options.flags,
        Some(data.as_str()),
    )
    .map_err(|e| Refusal::new("mount", e))?;
    hold(target)
}

/// A short path that leads to the folder `path`, as long as its descriptor in `open` lives.
fn short_name(path: &str, open: &mut Vec<OwnedFd>) -> Result<String> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(path, flags, Mode::empty())
        .map_err(|e| Refusal::new(format!("cannot open layer {path:?}"), e))?;
    let name = proc_path(&fd).display().to_string();
    open.push(fd);
    Ok(name)
}

/// The deepest folder that holds all of `layers` below it; `None` when it would be `/`, or a layer is relative.
fn common_folder<'a>(mut layers: impl Iterator<Item = &'a String>) -> Option<PathBuf> {
    let mut folder = Path::new(layers.next()?).parent()?.to_path_buf();
    for layer in layers {
        let parent = Path::new(layer).parent()?;
        while !parent.starts_with(&folder) {
            folder = folder.parent()?.to_path_buf();
        }
    }
    (folder.is_absolute() && folder.parent().is_some()).then_some(folder)
}

/// Escapes what overlayfs takes for a separator.
fn escape(layer: &str) -> String {
    let mut text = String::with_capacity(layer.len());
    for c in layer.chars() {
        if matches!(c, '\\' | ':' | ',') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(lower: &[&str], data: &[&str]) -> Layers {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Layers {
            lower: owned(lower),
            data: owned(data),
        }
    }

    #[test]
    fn lists_of_layers_are_understood_or_left_to_the_kernel() {
        assert_eq!(Layers::parse("/a:/b"), Some(layers(&["/a", "/b"], &[])));
        assert_eq!(Layers::parse(r"/a\:x:/b\\"), Some(layers(&["/a:x", r"/b\"], &[])));
        assert_eq!(
            Layers::parse("/a:/b::/c::/d"),
            Some(layers(&["/a", "/b"], &["/c", "/d"]))
        );
        for odd in ["", ":/a", "/a:", "/a::", "/a::/b:/c", "::/a", "/a:::/b"] {
            assert_eq!(Layers::parse(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn a_list_that_was_taken_apart_can_be_put_together() {
        for list in [r"/a\:x:/b\\:/c\,d", "/a:/b::/c::/d", "/a"] {
            assert_eq!(Layers::parse(list).unwrap().list(escape), list);
        }
    }

    #[test]
    fn the_common_folder_holds_all_layers_below_it() {
        let common = |layers: &[&str]| common_folder(layers.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>().iter());
        assert_eq!(common(&["/s/1/fs", "/s/12/fs"]), Some("/s".into()));
        assert_eq!(common(&["/s/1", "/s/1/2"]), Some("/s".into()));
        assert_eq!(common(&["/s/x", "/sx/x"]), None);
        assert_eq!(common(&["a/b", "a/c"]), None);
        assert_eq!(common(&["/a"]), None);
    }

    #[test]
    fn releases_of_kernels_are_compared_by_number() {
        assert_eq!(version("6.1.0-37-amd64"), (6, 1));
        assert_eq!(version("6.14.11-3-pve"), (6, 14));
        assert_eq!(version("7"), (7, 0));
        assert_eq!(version("odd"), (0, 0));
    }
}
