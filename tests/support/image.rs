//! OCI images made on the spot from Debian's static busybox: no registry, no Docker.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use sha2::{Digest, Sha256};

/// The image of the tests' containers: a busybox with all applets, users `root` and `guest` (1000).
pub(crate) const BUSYBOX: &str = "lxcri.test/busybox:1";
/// The image of the pods' sandbox container: sleeps.
pub(crate) const PAUSE: &str = "lxcri.test/pause:1";

/// An image that was written as an OCI archive.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// Path of the tar file, for `ctr images import`.
    pub(crate) archive: PathBuf,
    /// The name of the snapshot that unpacking leaves (OCI image-spec, chain id).
    pub(crate) chain_id: String,
}

impl Image {
    /// Path of the archive as text.
    pub(crate) fn path(&self) -> String {
        self.archive.to_string_lossy().into_owned()
    }
}

/// Writes the image `name` into `<folder>/<file>.tar`: busybox, then `more_layers` layers with one file `/layer-<n>` each.
pub(crate) fn build(folder: &Path, file: &str, name: &str, command: &[&str], more_layers: usize) -> io::Result<Image> {
    let work = folder.join(format!("{file}.d"));
    let blobs = work.join("image/blobs/sha256");
    fs::create_dir_all(&blobs)?;

    let mut layers = vec![];
    let root = work.join("busybox");
    busybox_root(&root)?;
    layers.push(layer(&root, &work, &blobs)?);
    for number in 1..=more_layers {
        let root = work.join(format!("layer-{number}"));
        fs::create_dir(&root)?;
        fs::write(root.join(format!("layer-{number}")), format!("{number}\n"))?;
        layers.push(layer(&root, &work, &blobs)?);
    }

    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.digest.as_str()).collect();
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Entrypoint": command, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": layers.iter().map(|_| json!({"created_by": "tests"})).collect::<Vec<_>>(),
    });
    let config = blob(&blobs, config.to_string().as_bytes())?;
    let describe = |blob: &Blob, kind: &str| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": blob.digest, "size": blob.size});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe(&config, "config.v1+json"),
        "layers": layers.iter().map(|layer| describe(layer, "layer.v1.tar")).collect::<Vec<_>>(),
    });
    let manifest = blob(&blobs, manifest.to_string().as_bytes())?;
    let mut entry = describe(&manifest, "manifest.v1+json");
    entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"});
    let image = work.join("image");
    fs::write(
        image.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [entry]}).to_string(),
    )?;
    fs::write(
        image.join("oci-layout"),
        json!({"imageLayoutVersion": "1.0.0"}).to_string(),
    )?;
    let archive = folder.join(format!("{file}.tar"));
    tar(&image, &archive)?;
    fs::remove_dir_all(&work)?;

    let mut chain_id = layers[0].digest.clone();
    for layer in &layers[1..] {
        chain_id = digest(format!("{chain_id} {}", layer.digest).as_bytes());
    }
    Ok(Image { archive, chain_id })
}

/// Fills `root` with busybox, its applets, and what a program expects of a root file system.
pub(crate) fn busybox_root(root: &Path) -> io::Result<()> {
    for folder in ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "home/guest"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let program = find("busybox").ok_or_else(|| io::Error::other("no busybox in PATH; install busybox-static"))?;
    fs::copy(&program, root.join("bin/busybox"))?;
    // Debian's `busybox` is dynamic, and `busybox-static` cannot be installed beside it: take its libraries along.
    let libraries = Command::new("ldd").arg(&program).output()?.stdout;
    for library in String::from_utf8_lossy(&libraries)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let target = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(target.parent().unwrap_or(root))?;
        fs::copy(library, target)?;
    }
    let applets = Command::new(&program).arg("--list").output()?.stdout;
    for applet in String::from_utf8_lossy(&applets)
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000:guest:/home/guest:/bin/sh\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nguest:x:1000:\n")
}

/// The first file of that name in PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

struct Blob {
    digest: String,
    size: u64,
}

fn layer(root: &Path, work: &Path, blobs: &Path) -> io::Result<Blob> {
    let file = work.join("layer.tar");
    tar(root, &file)?;
    let layer = blob(blobs, &fs::read(&file)?)?;
    fs::remove_file(&file)?;
    Ok(layer)
}

fn blob(blobs: &Path, bytes: &[u8]) -> io::Result<Blob> {
    let digest = digest(bytes);
    fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes)?;
    Ok(Blob {
        digest,
        size: bytes.len() as u64,
    })
}

fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn tar(folder: &Path, file: &Path) -> io::Result<()> {
    let output = Command::new("tar")
        .args([
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mtime=@0",
            "-cf",
        ])
        .args([file, Path::new("-C"), folder, Path::new(".")])
        .output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("tar of {}: {text}", folder.display())));
    }
    Ok(())
}
