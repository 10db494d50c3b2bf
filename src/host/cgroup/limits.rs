//! Limits: OCI `linux.resources` as files of a cgroup, for backends whose authority does not write them. The files and values are
//! those that crun writes (its `cgroup-resources.c`, OCI runtime-spec config-linux.md), so that a container has the same limits
//! whatever holds it. Device rules are not among them: on v2 they are a program, not a file.

use std::{collections::BTreeMap, fs::File, io, os::fd::AsFd, path::Path};

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxNetwork, LinuxPids, LinuxResources,
    LinuxThrottleDevice,
};

use super::{Cgroup, parse, tree};
use crate::error::{Context, Error, Result, kind_of_io};

/// What `cpu.cfs_period_us` is where nobody has set it, in microseconds.
const PERIOD_DEFAULT: u64 = 100_000;

/// One value to write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limit {
    /// In v1, the controller in whose folder the files are; in v2 all are in one.
    controller: &'static str,
    /// File and value; the next one where the kernel does not have the file.
    choices: Vec<(String, String)>,
    /// Whether a kernel without any of the files is fine.
    optional: bool,
}

/// The values for these resources, in the order in which they are to be written.
///
/// # Errors
/// `InvalidArgument` with the field that cannot be: because of its value, or because this version of cgroups has nothing for it.
fn limits(resources: &LinuxResources, v2: bool) -> Result<Vec<Limit>> {
    let mut limits = Limits { v2, all: Vec::new() };
    if let Some(memory) = resources.memory() {
        limits.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        limits.cpu(cpu)?;
    }
    if let Some(pids) = resources.pids() {
        limits.pids(pids);
    }
    if let Some(block_io) = resources.block_io() {
        limits.block_io(block_io)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        limits.huge_pages(limit)?;
    }
    if let Some(network) = resources.network() {
        limits.network(network)?;
    }
    for (device, rdma) in sorted(resources.rdma().iter().flatten()) {
        check_word("rdma", device)?;
        let counts = [("hca_handle", rdma.hca_handles()), ("hca_object", rdma.hca_objects())];
        let counts: Vec<String> = counts
            .into_iter()
            .filter_map(|(name, count)| count.map(|count| format!("{name}={count}")))
            .collect();
        if !counts.is_empty() {
            limits.write("rdma", "rdma.max", format!("{device} {}", counts.join(" ")));
        }
    }
    // Last: who names a file means it.
    for (file, value) in sorted(resources.unified().iter().flatten()) {
        limits.unified(file, value)?;
    }
    Ok(limits.all)
}

struct Limits {
    v2: bool,
    all: Vec<Limit>,
}

impl Limits {
    fn choose(&mut self, controller: &'static str, choices: &[(&str, String)], optional: bool) {
        let choices = choices.iter().map(|(file, value)| ((*file).to_owned(), value.clone()));
        self.all.push(Limit {
            controller,
            choices: choices.collect(),
            optional,
        });
    }

    fn write(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        self.choose(controller, &[(file, value.to_string())], false);
    }

    /// A value that has a file of another name in each version.
    fn write_either(&mut self, controller: &'static str, v1: &str, v2: &str, value: impl ToString) {
        self.write(controller, if self.v2 { v2 } else { v1 }, value);
    }

    /// A value that v2 has no file for.
    fn write_v1(&mut self, controller: &'static str, file: &str, value: impl ToString, field: &str) -> Result<()> {
        if self.v2 {
            return Err(Error::invalid(format!("cannot set {field} with cgroup v2")));
        }
        self.write(controller, file, value);
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        // v1 takes -1 for no limit, v2 a word.
        let bytes = |value: i64| match value {
            ..0 if self.v2 => "max".to_owned(),
            value => value.to_string(),
        };
        let limit = memory.limit().map(bytes);
        let swap = match (memory.swap(), memory.limit()) {
            // v1 counts memory and swap together, as OCI does, v2 swap alone. 0 is no swap, negative is as much as there is.
            (Some(swap), limit) if self.v2 && swap > 0 => match limit {
                None => return Err(Error::invalid("cannot set memory.swap without memory.limit")),
                Some(limit) if swap < limit => {
                    return Err(Error::invalid(format!(
                        "memory.swap {swap} counts memory too and is below memory.limit {limit}"
                    )));
                }
                Some(limit) => Some(bytes(swap - limit.max(0))),
            },
            (swap, _) => swap.map(bytes),
        };
        if let Some(limit) = limit {
            self.write_either("memory", "memory.limit_in_bytes", "memory.max", limit);
        }
        if let Some(swap) = swap {
            let file = match self.v2 {
                true => "memory.swap.max",
                false => "memory.memsw.limit_in_bytes",
            };
            // A kernel that does not account for swap has no file.
            self.choose("memory", &[(file, swap)], true);
        }
        if let Some(reservation) = memory.reservation() {
            self.write_either("memory", "memory.soft_limit_in_bytes", "memory.low", reservation);
        }
        if let Some(kernel) = memory.kernel() {
            self.write_v1("memory", "memory.kmem.limit_in_bytes", kernel, "memory.kernel")?;
        }
        if let Some(tcp) = memory.kernel_tcp() {
            self.write_v1("memory", "memory.kmem.tcp.limit_in_bytes", tcp, "memory.kernelTCP")?;
        }
        if let Some(swappiness) = memory.swappiness() {
            self.write_v1("memory", "memory.swappiness", swappiness, "memory.swappiness")?;
        }
        if let Some(hierarchy) = memory.use_hierarchy() {
            let value = u8::from(hierarchy);
            self.write_v1("memory", "memory.use_hierarchy", value, "memory.useHierarchy")?;
        }
        if memory.disable_oom_killer() == Some(true) {
            self.write_v1("memory", "memory.oom_control", 1, "memory.disableOOMKiller")?;
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<()> {
        let set = |number: Option<u64>| number.filter(|number| *number != 0);
        if let Some(shares) = set(cpu.shares()) {
            match self.v2 {
                true => self.write("cpu", "cpu.weight", weight_of_shares(shares)),
                false => self.write("cpu", "cpu.shares", shares),
            }
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = set(cpu.period());
        if self.v2 {
            if quota.is_some() || period.is_some() {
                let quota = match quota {
                    Some(quota @ 1..) => quota.to_string(),
                    _ => "max".to_owned(),
                };
                self.write(
                    "cpu",
                    "cpu.max",
                    format!("{quota} {}", period.unwrap_or(PERIOD_DEFAULT)),
                );
            }
        } else {
            if let Some(period) = period {
                self.write("cpu", "cpu.cfs_period_us", period);
            }
            if let Some(quota) = quota {
                self.write("cpu", "cpu.cfs_quota_us", quota);
            }
        }
        if let Some(burst) = cpu.burst() {
            self.write_either("cpu", "cpu.cfs_burst_us", "cpu.max.burst", burst);
        }
        if let Some(period) = set(cpu.realtime_period()) {
            self.write_v1("cpu", "cpu.rt_period_us", period, "cpu.realtimePeriod")?;
        }
        if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
            self.write_v1("cpu", "cpu.rt_runtime_us", runtime, "cpu.realtimeRuntime")?;
        }
        if let Some(idle) = cpu.idle() {
            self.write("cpu", "cpu.idle", idle);
        }
        // Where v1's cpuset is mounted with `noprefix`, its files have none.
        for (file, bare, list) in [("cpuset.cpus", "cpus", cpu.cpus()), ("cpuset.mems", "mems", cpu.mems())] {
            match list.as_deref() {
                None | Some("") => {}
                Some(list) if self.v2 => self.write("cpuset", file, list),
                Some(list) => self.choose("cpuset", &[(file, list.to_owned()), (bare, list.to_owned())], false),
            }
        }
        Ok(())
    }

    fn pids(&mut self, pids: &LinuxPids) {
        match pids.limit() {
            0 => {}
            ..0 => self.write("pids", "pids.max", "max"),
            limit => self.write("pids", "pids.max", limit),
        }
    }

    fn block_io(&mut self, io: &LinuxBlockIo) -> Result<()> {
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            let choices = match self.v2 {
                true => [
                    ("io.bfq.weight", weight.to_string()),
                    ("io.weight", format!("default {}", io_weight(weight))),
                ],
                false => [
                    ("blkio.weight", weight.to_string()),
                    ("blkio.bfq.weight", weight.to_string()),
                ],
            };
            self.choose("blkio", &choices, false);
        }
        if let Some(weight) = io.leaf_weight().filter(|weight| *weight != 0) {
            self.write_v1("blkio", "blkio.leaf_weight", weight, "blockIO.leafWeight")?;
        }
        for device in io.weight_device().iter().flatten() {
            let of_device = |weight: u16| format!("{}:{} {weight}", device.major(), device.minor());
            if let Some(weight) = device.weight() {
                let choices = match self.v2 {
                    true => [
                        ("io.bfq.weight", of_device(weight)),
                        ("io.weight", of_device(io_weight(weight))),
                    ],
                    false => [
                        ("blkio.weight_device", of_device(weight)),
                        ("blkio.bfq.weight_device", of_device(weight)),
                    ],
                };
                self.choose("blkio", &choices, false);
            }
            if let Some(weight) = device.leaf_weight() {
                let field = "blockIO.weightDevice.leafWeight";
                self.write_v1("blkio", "blkio.leaf_weight_device", of_device(weight), field)?;
            }
        }
        for (v1, v2, devices) in [
            ("blkio.throttle.read_bps_device", "rbps", io.throttle_read_bps_device()),
            (
                "blkio.throttle.write_bps_device",
                "wbps",
                io.throttle_write_bps_device(),
            ),
            (
                "blkio.throttle.read_iops_device",
                "riops",
                io.throttle_read_iops_device(),
            ),
            (
                "blkio.throttle.write_iops_device",
                "wiops",
                io.throttle_write_iops_device(),
            ),
        ] {
            for device in devices.iter().flatten() {
                self.throttle(v1, v2, device);
            }
        }
        Ok(())
    }

    fn throttle(&mut self, v1: &str, v2: &str, device: &LinuxThrottleDevice) {
        let (major, minor, rate) = (device.major(), device.minor(), device.rate());
        match self.v2 {
            true => self.write("blkio", "io.max", format!("{major}:{minor} {v2}={rate}")),
            false => self.write("blkio", v1, format!("{major}:{minor} {rate}")),
        }
    }

    fn huge_pages(&mut self, limit: &LinuxHugepageLimit) -> Result<()> {
        let size = limit.page_size();
        let number = size
            .strip_suffix("KB")
            .or(size.strip_suffix("MB"))
            .or(size.strip_suffix("GB"));
        if number.and_then(|number| number.parse::<u32>().ok()).is_none() {
            return Err(Error::invalid(format!(
                "hugepageLimits.pageSize {size:?} is not a size such as 2MB or 1GB"
            )));
        }
        let suffix = if self.v2 { "max" } else { "limit_in_bytes" };
        self.write("hugetlb", &format!("hugetlb.{size}.{suffix}"), limit.limit());
        Ok(())
    }

    fn network(&mut self, network: &LinuxNetwork) -> Result<()> {
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            self.write_v1("net_cls", "net_cls.classid", class, "network.classID")?;
        }
        for priority in network.priorities().iter().flatten() {
            check_word("network.priorities", priority.name())?;
            let value = format!("{} {}", priority.name(), priority.priority());
            self.write_v1("net_prio", "net_prio.ifpriomap", value, "network.priorities")?;
        }
        Ok(())
    }

    fn unified(&mut self, file: &str, value: &str) -> Result<()> {
        if !self.v2 {
            return Err(Error::invalid("cannot set unified with cgroup v1"));
        }
        // A file of a controller; those of the core ("cgroup.procs") are no limits and would move processes about.
        let controller = file.split_once('.').map(|(controller, _)| controller);
        if file.contains('/') || matches!(controller, None | Some("" | "cgroup")) {
            return Err(Error::invalid(format!(
                "unified: {file:?} is not the file of a controller, such as memory.high"
            )));
        }
        for line in value.lines().filter(|line| !line.is_empty()) {
            self.write("", file, line);
        }
        Ok(())
    }
}

/// In an order that is the same each time.
fn sorted<'a, V>(map: impl Iterator<Item = (&'a String, &'a V)>) -> BTreeMap<&'a str, &'a V> {
    map.map(|(key, value)| (key.as_str(), value)).collect()
}

/// A name that the kernel reads up to the next blank.
fn check_word(field: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(Error::invalid(format!("{field}: {name:?} is not the name of a device")));
    }
    Ok(())
}

/// v1's shares (2 to 262144, default 1024) as v2's weight (1 to 10000, default 100), with the defaults on each other: the formula of
/// runc 1.3.2 and crun 1.23 (opencontainers/cgroups `ConvertCPUSharesToCgroupV2Value`). A linear one gives the default a third of the
/// weight of what does not run in containers.
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            // Not those of std, which are the C library's in a file of its own: loading it takes every start of a shim a tenth longer.
            let doublings = libm::log2(shares as f64);
            let exponent = (doublings * doublings + 125.0 * doublings) / 612.0 - 7.0 / 34.0;
            libm::ceil(libm::pow(10.0, exponent)) as u64
        }
    }
}

/// v1's and BFQ's weight (10 to 1000) as that of `io.weight` (1 to 10000).
fn io_weight(weight: u16) -> u16 {
    let weight = u32::from(weight.clamp(10, 1000));
    u16::try_from(1 + (weight - 10) * 9_999 / 990).unwrap_or(10_000)
}

impl Cgroup {
    /// Applies OCI resources, except device rules: to a new container, or as Update does to one that runs.
    ///
    /// A value that the kernel refuses is tried again when all others are written: of a pair of limits one may bound the other, and
    /// which has to come first depends on what was set before.
    ///
    /// # Errors
    /// Those of [`limits`] before anything is written. `FailedPrecondition` with `memory.checkBeforeUpdate` and a limit below the
    /// use. Else the kernel's, with file and value; some of the limits may be set then.
    pub fn limit(&self, resources: &LinuxResources) -> Result<()> {
        let all = limits(resources, self.is_v2())?;
        if let Some(memory) = resources.memory()
            && memory.check_before_update() == Some(true)
        {
            self.check_memory_use(memory)?;
        }
        let mut refused = Vec::new();
        for limit in &all {
            match self.write_limit(limit) {
                Err(e) if is_refusal(&e) => refused.push(limit),
                written => written.map_err(|e| self.limit_error(limit, e))?,
            }
        }
        for limit in refused {
            self.write_limit(limit).map_err(|e| self.limit_error(limit, e))?;
        }
        Ok(())
    }

    fn folder_of(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V2(folder) => Some(folder),
            Self::V1(_) => self.v1(controller),
        }
    }

    fn write_limit(&self, limit: &Limit) -> io::Result<()> {
        let missing = || io::Error::from_raw_os_error(libc::ENOENT);
        let folder = File::open(self.folder_of(limit.controller).ok_or_else(missing)?)?;
        let mut result = Err(missing());
        for (file, value) in &limit.choices {
            result = tree::write_at(folder.as_fd(), file, value);
            if !result.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ENOENT)) {
                return result;
            }
        }
        if limit.optional { Ok(()) } else { result }
    }

    fn limit_error(&self, limit: &Limit, error: io::Error) -> Error {
        let (file, value) = limit.choices.last().map_or(("", ""), |(file, value)| (file, value));
        let Some(folder) = self.folder_of(limit.controller) else {
            return Error::precondition(format!(
                "cannot set {file}: the container is in no cgroup of the controller {}; is it mounted?",
                limit.controller
            ));
        };
        let what = format!("cannot set {file} to {value:?} in {}", folder.display());
        // A controller that is not handed down has no files.
        let controller = file.split('.').next().unwrap_or_default();
        let handed_down = || {
            let folder = File::open(folder).ok()?;
            tree::read_at(folder.as_fd(), "cgroup.controllers").ok()
        };
        if error.raw_os_error() == Some(libc::ENOENT)
            && let Some(controllers) = handed_down()
            && !controllers.split_whitespace().any(|name| name == controller)
        {
            return Error::precondition(format!(
                "{what}: the controller {controller} is not enabled there; add it to cgroup.subtree_control of the cgroups above"
            ));
        }
        Error::new(kind_of_io(&error), what).with_source(error)
    }

    /// OCI config-linux.md, `memory.checkBeforeUpdate`: v1 refuses a limit below the use by itself, v2 kills.
    fn check_memory_use(&self, memory: &LinuxMemory) -> Result<()> {
        let (Self::V2(folder), Some(limit @ 0..)) = (self, memory.limit()) else {
            return Ok(());
        };
        let open = File::open(folder).context(|| format!("cannot open {}", folder.display()))?;
        let used = tree::read_at(open.as_fd(), "memory.current").context(|| "cannot read memory.current")?;
        let used = parse::number(&used).unwrap_or_default();
        if limit.unsigned_abs() <= used {
            return Err(Error::precondition(format!(
                "cannot set memory.limit to {limit}: the container uses {used} bytes"
            )));
        }
        Ok(())
    }
}

/// What a bound on one value by another one looks like.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::error::Kind;

    fn resources(text: serde_json::Value) -> LinuxResources {
        serde_json::from_value(text).unwrap()
    }

    /// "controller file=value", with "|" between choices and "?" where none of the files has to be there.
    fn written(text: serde_json::Value, v2: bool) -> std::result::Result<Vec<String>, String> {
        let limits = limits(&resources(text), v2).map_err(|e| {
            assert_eq!(e.kind(), Kind::InvalidArgument, "{e}");
            e.to_string()
        })?;
        let tell = |limit: Limit| {
            let choices: Vec<String> = limit
                .choices
                .iter()
                .map(|(file, value)| format!("{file}={value}"))
                .collect();
            let optional = if limit.optional { "?" } else { "" };
            format!("{} {}{optional}", limit.controller, choices.join(" | "))
        };
        Ok(limits.into_iter().map(tell).collect())
    }

    #[test]
    fn each_field_has_its_file_and_unit_in_each_version() {
        for (text, v1, v2) in [
            (json!({}), &[][..], &[][..]),
            (
                json!({"memory": {"limit": 1048576, "swap": 3145728, "reservation": 4096}}),
                &[
                    "memory memory.limit_in_bytes=1048576",
                    "memory memory.memsw.limit_in_bytes=3145728?",
                    "memory memory.soft_limit_in_bytes=4096",
                ],
                &[
                    "memory memory.max=1048576",
                    "memory memory.swap.max=2097152?",
                    "memory memory.low=4096",
                ],
            ),
            (
                json!({"memory": {"limit": -1, "swap": -1}}),
                &[
                    "memory memory.limit_in_bytes=-1",
                    "memory memory.memsw.limit_in_bytes=-1?",
                ],
                &["memory memory.max=max", "memory memory.swap.max=max?"],
            ),
            (
                json!({"memory": {"limit": 8192, "swap": 0}}),
                &[
                    "memory memory.limit_in_bytes=8192",
                    "memory memory.memsw.limit_in_bytes=0?",
                ],
                &["memory memory.max=8192", "memory memory.swap.max=0?"],
            ),
            (
                json!({"memory": {"disableOOMKiller": false, "checkBeforeUpdate": true}}),
                &[],
                &[],
            ),
            (
                json!({"cpu": {"shares": 1024, "quota": 50000, "period": 20000, "burst": 1000, "idle": 0}}),
                &[
                    "cpu cpu.shares=1024",
                    "cpu cpu.cfs_period_us=20000",
                    "cpu cpu.cfs_quota_us=50000",
                    "cpu cpu.cfs_burst_us=1000",
                    "cpu cpu.idle=0",
                ],
                &[
                    "cpu cpu.weight=100",
                    "cpu cpu.max=50000 20000",
                    "cpu cpu.max.burst=1000",
                    "cpu cpu.idle=0",
                ],
            ),
            (
                json!({"cpu": {"quota": -1}}),
                &["cpu cpu.cfs_quota_us=-1"],
                &["cpu cpu.max=max 100000"],
            ),
            (
                json!({"cpu": {"period": 50000}}),
                &["cpu cpu.cfs_period_us=50000"],
                &["cpu cpu.max=max 50000"],
            ),
            // What containerd writes for "not set".
            (
                json!({"cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""}}),
                &[],
                &[],
            ),
            (
                json!({"cpu": {"cpus": "0-1,3", "mems": "0"}}),
                &["cpuset cpuset.cpus=0-1,3 | cpus=0-1,3", "cpuset cpuset.mems=0 | mems=0"],
                &["cpuset cpuset.cpus=0-1,3", "cpuset cpuset.mems=0"],
            ),
            (json!({"pids": {"limit": 0}}), &[], &[]),
            (
                json!({"pids": {"limit": 7}}),
                &["pids pids.max=7"],
                &["pids pids.max=7"],
            ),
            (
                json!({"pids": {"limit": -1}}),
                &["pids pids.max=max"],
                &["pids pids.max=max"],
            ),
            (
                json!({"blockIO": {"weight": 10, "weightDevice": [{"major": 8, "minor": 0, "weight": 1000}]}}),
                &[
                    "blkio blkio.weight=10 | blkio.bfq.weight=10",
                    "blkio blkio.weight_device=8:0 1000 | blkio.bfq.weight_device=8:0 1000",
                ],
                &[
                    "blkio io.bfq.weight=10 | io.weight=default 1",
                    "blkio io.bfq.weight=8:0 1000 | io.weight=8:0 10000",
                ],
            ),
            (
                json!({"blockIO": {
                    "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 10}, {"major": 8, "minor": 2, "rate": 11}],
                    "throttleWriteBpsDevice": [{"major": 8, "minor": 1, "rate": 20}],
                    "throttleReadIOPSDevice": [{"major": 8, "minor": 1, "rate": 30}],
                    "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 40}],
                }}),
                &[
                    "blkio blkio.throttle.read_bps_device=8:1 10",
                    "blkio blkio.throttle.read_bps_device=8:2 11",
                    "blkio blkio.throttle.write_bps_device=8:1 20",
                    "blkio blkio.throttle.read_iops_device=8:1 30",
                    "blkio blkio.throttle.write_iops_device=8:1 40",
                ],
                &[
                    "blkio io.max=8:1 rbps=10",
                    "blkio io.max=8:2 rbps=11",
                    "blkio io.max=8:1 wbps=20",
                    "blkio io.max=8:1 riops=30",
                    "blkio io.max=8:1 wiops=40",
                ],
            ),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}, {"pageSize": "1GB", "limit": 0}]}),
                &[
                    "hugetlb hugetlb.2MB.limit_in_bytes=4194304",
                    "hugetlb hugetlb.1GB.limit_in_bytes=0",
                ],
                &["hugetlb hugetlb.2MB.max=4194304", "hugetlb hugetlb.1GB.max=0"],
            ),
            (
                json!({"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 4}, "a": {"hcaObjects": 1}, "b": {}}}),
                &[
                    "rdma rdma.max=a hca_object=1",
                    "rdma rdma.max=mlx5_1 hca_handle=3 hca_object=4",
                ],
                &[
                    "rdma rdma.max=a hca_object=1",
                    "rdma rdma.max=mlx5_1 hca_handle=3 hca_object=4",
                ],
            ),
        ] {
            assert_eq!(written(text.clone(), false).unwrap(), v1, "{text} on v1");
            assert_eq!(written(text.clone(), true).unwrap(), v2, "{text} on v2");
        }
    }

    #[test]
    fn what_one_version_lacks_is_refused_there_by_name() {
        for (text, v1, field) in [
            (
                json!({"memory": {"kernel": 1}}),
                "memory memory.kmem.limit_in_bytes=1",
                "memory.kernel",
            ),
            (
                json!({"memory": {"kernelTCP": 1}}),
                "memory memory.kmem.tcp.limit_in_bytes=1",
                "memory.kernelTCP",
            ),
            (
                json!({"memory": {"swappiness": 0}}),
                "memory memory.swappiness=0",
                "memory.swappiness",
            ),
            (
                json!({"memory": {"useHierarchy": false}}),
                "memory memory.use_hierarchy=0",
                "memory.useHierarchy",
            ),
            (
                json!({"memory": {"disableOOMKiller": true}}),
                "memory memory.oom_control=1",
                "memory.disableOOMKiller",
            ),
            (
                json!({"cpu": {"realtimePeriod": 5}}),
                "cpu cpu.rt_period_us=5",
                "cpu.realtimePeriod",
            ),
            (
                json!({"cpu": {"realtimeRuntime": 5}}),
                "cpu cpu.rt_runtime_us=5",
                "cpu.realtimeRuntime",
            ),
            (
                json!({"blockIO": {"leafWeight": 20}}),
                "blkio blkio.leaf_weight=20",
                "blockIO.leafWeight",
            ),
            (
                json!({"blockIO": {"weightDevice": [{"major": 1, "minor": 2, "leafWeight": 30}]}}),
                "blkio blkio.leaf_weight_device=1:2 30",
                "blockIO.weightDevice.leafWeight",
            ),
            (
                json!({"network": {"classID": 9}}),
                "net_cls net_cls.classid=9",
                "network.classID",
            ),
            (
                json!({"network": {"priorities": [{"name": "eth0", "priority": 2}]}}),
                "net_prio net_prio.ifpriomap=eth0 2",
                "network.priorities",
            ),
        ] {
            assert_eq!(written(text.clone(), false).unwrap(), [v1]);
            let error = written(text, true).unwrap_err();
            assert_eq!(error, format!("cannot set {field} with cgroup v2"));
        }
        let unified =
            json!({"unified": {"memory.high": "4096", "cpuset.cpus": "", "io.max": "8:0 rbps=1\n8:1 rbps=2"}});
        assert_eq!(
            written(unified.clone(), true).unwrap(),
            [" io.max=8:0 rbps=1", " io.max=8:1 rbps=2", " memory.high=4096"]
        );
        assert_eq!(
            written(unified, false).unwrap_err(),
            "cannot set unified with cgroup v1"
        );
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_name() {
        for (text, wanted) in [
            (json!({"memory": {"swap": 10}}), "memory.swap without memory.limit"),
            (json!({"memory": {"swap": 10, "limit": 20}}), "below memory.limit 20"),
            (
                json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
                "\"../x\" is not a size",
            ),
            (
                json!({"hugepageLimits": [{"pageSize": "MB", "limit": 1}]}),
                "is not a size",
            ),
            (json!({"rdma": {"a b": {"hcaObjects": 1}}}), "rdma: \"a b\""),
            (
                json!({"unified": {"../memory.max": "1"}}),
                "\"../memory.max\" is not the file",
            ),
            (
                json!({"unified": {"cgroup.procs": "1"}}),
                "\"cgroup.procs\" is not the file",
            ),
            (json!({"unified": {"cgroup.freeze": "1"}}), "is not the file"),
            (json!({"unified": {"memory": "1"}}), "is not the file"),
            (json!({"unified": {".max": "1"}}), "is not the file"),
        ] {
            let error = written(text.clone(), true).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        let error = written(
            json!({"network": {"priorities": [{"name": "a\nb", "priority": 1}]}}),
            false,
        )
        .unwrap_err();
        assert!(error.contains("network.priorities"), "{error}");
    }

    #[test]
    fn weights_keep_their_ends_and_their_defaults() {
        for (shares, weight) in [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
        for (weight, of_io) in [(0, 1), (10, 1), (500, 4_950), (1000, 10_000), (u16::MAX, 10_000)] {
            assert_eq!(io_weight(weight), of_io, "{weight}");
        }
    }

    proptest! {
        #[test]
        fn more_shares_are_never_less_weight(shares in 0_u64..300_000) {
            let weight = weight_of_shares(shares);
            prop_assert!((1..=10_000).contains(&weight));
            prop_assert!(weight <= weight_of_shares(shares + 1));
        }
    }
}
