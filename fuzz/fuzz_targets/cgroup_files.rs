//! The files of cgroups v1 and v2, and `cgroupsPath`: a path that is accepted never leaves its hierarchy.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::host::cgroup::parse;

fn stays_below(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

fuzz_target!(|data: &str| {
    for mount in parse::mounts(data) {
        for membership in parse::memberships(data) {
            let _ = mount.has_controllers(membership.controllers);
            if let Some(folder) = parse::folder_in(&mount.root, &mount.point, membership.path) {
                assert!(folder.starts_with(&mount.point));
            }
        }
    }
    let _ = parse::number(data);
    let _ = parse::Keyed::parse(data).or_zero("oom_kill");
    let _ = parse::pids(data).count();
    let _ = parse::blkio(data).count();
    let _ = parse::io_stat(data).count();
    let _ = parse::rdma(data).count();
    let _ = parse::pressure(data).count();
    let _ = parse::partition(data, 8, 0);
    let _ = parse::huge_page_size(data);
    for systemd in [false, true] {
        if let Ok(Some(path)) = parse::container_path(Some(data), systemd, "c1") {
            assert!(stays_below(&path), "{path:?}");
        }
    }
});
