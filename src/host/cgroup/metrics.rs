//! What containerd's Stats answers: the kernel's numbers as containerd's messages (github.com/containerd/cgroups, cgroup1/stats and
//! cgroup2/stats, whose units these are).
//!
//! A controller that is missing leaves its part unset; a single file that is missing leaves a 0.

use std::path::Path;

use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{Message, MessageField},
};

use super::{
    Cgroup,
    parse::{self, Keyed},
    read,
};
use crate::error::{Error, Result};

const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;

/// Encoded metrics with their type, as a `google.protobuf.Any` carries them to containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// "io.containerd.cgroups.v1.Metrics" or "io.containerd.cgroups.v2.Metrics".
    pub type_url: &'static str,
    /// The message.
    pub value: Vec<u8>,
}

impl Cgroup {
    /// The resource use of the cgroup and everything below it (containerd task API, Stats).
    ///
    /// v1: CPU in nanoseconds, no pids limit is 0. v2: CPU in microseconds, no limit is `u64::MAX`. Memory in bytes.
    ///
    /// # Errors
    /// `NotFound` "cgroup does not exist".
    pub fn metrics(&self) -> Result<Metrics> {
        if !self.folder().is_dir() {
            return Err(Error::not_found("cgroup does not exist"));
        }
        let (type_url, value) = match self {
            Self::V1(_) => ("io.containerd.cgroups.v1.Metrics", self.v1_metrics().write_to_bytes()),
            Self::V2(folder) => (
                "io.containerd.cgroups.v2.Metrics",
                v2_metrics(Files(folder)).write_to_bytes(),
            ),
        };
        let value = value.map_err(|e| Error::unknown("cannot encode cgroup metrics").with_source(e))?;
        Ok(Metrics { type_url, value })
    }

    fn v1_metrics(&self) -> v1::Metrics {
        let files = |controller| self.v1(controller).map(Files);
        let mut cpu = files("cpuacct").and_then(v1_cpu_usage);
        if let Some(throttling) = files("cpu").and_then(v1_throttling) {
            cpu.get_or_insert_default().throttling = some(throttling);
        }
        let memory = files("memory");
        v1::Metrics {
            hugetlb: files("hugetlb").map(v1_hugetlb).unwrap_or_default(),
            pids: files("pids").and_then(v1_pids).into(),
            cpu: cpu.into(),
            memory: memory.and_then(v1_memory).into(),
            memory_oom_control: memory.and_then(v1_oom_control).into(),
            blkio: files("blkio").map(v1_blkio).into(),
            rdma: files("rdma").and_then(v1_rdma).into(),
            ..v1::Metrics::default()
        }
    }
}

fn some<T>(value: T) -> MessageField<T> {
    MessageField::some(value)
}

/// The files of one cgroup in one hierarchy.
#[derive(Clone, Copy)]
struct Files<'a>(&'a Path);

impl Files<'_> {
    fn text(self, name: &str) -> Option<String> {
        read(&self.0.join(name)).ok()
    }

    fn number(self, name: &str) -> Option<u64> {
        parse::number(&self.text(name)?)
    }

    fn or_zero(self, name: &str) -> u64 {
        self.number(name).unwrap_or_default()
    }
}

/// The page sizes that this machine has, as the hugetlb files spell them.
fn huge_page_sizes() -> impl Iterator<Item = String> {
    std::fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .filter_map(|entry| parse::huge_page_size(entry.ok()?.file_name().to_str()?))
}

fn v1_cpu_usage(files: Files<'_>) -> Option<v1::CPUStat> {
    let total = files.number("cpuacct.usage")?;
    let stat = files.text("cpuacct.stat").unwrap_or_default();
    let stat = Keyed::parse(&stat);
    let per_cpu = files.text("cpuacct.usage_percpu").unwrap_or_default();
    let usage = v1::CPUUsage {
        total,
        kernel: ticks_to_nanoseconds(stat.or_zero("system"), clock_ticks_per_second()),
        user: ticks_to_nanoseconds(stat.or_zero("user"), clock_ticks_per_second()),
        per_cpu: per_cpu
            .split_ascii_whitespace()
            .filter_map(|cpu| cpu.parse().ok())
            .collect(),
        ..v1::CPUUsage::default()
    };
    Some(v1::CPUStat {
        usage: some(usage),
        ..v1::CPUStat::default()
    })
}

/// `cpuacct.stat` counts in USER_HZ.
fn clock_ticks_per_second() -> u64 {
    // SAFETY: sysconf reads a constant of the system; no memory is passed.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

fn ticks_to_nanoseconds(ticks: u64, per_second: u64) -> u64 {
    let nanoseconds = u128::from(ticks) * u128::from(NANOSECONDS_PER_SECOND) / u128::from(per_second);
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

fn v1_throttling(files: Files<'_>) -> Option<v1::Throttle> {
    let stat = files.text("cpu.stat")?;
    let stat = Keyed::parse(&stat);
    Some(v1::Throttle {
        periods: stat.or_zero("nr_periods"),
        throttled_periods: stat.or_zero("nr_throttled"),
        throttled_time: stat.or_zero("throttled_time"),
        ..v1::Throttle::default()
    })
}

fn v1_pids(files: Files<'_>) -> Option<v1::PidsStat> {
    Some(v1::PidsStat {
        current: files.number("pids.current")?,
        // containerd/cgroups: no limit is 0 here, unlike v2.
        limit: files
            .number("pids.max")
            .filter(|max| *max != u64::MAX)
            .unwrap_or_default(),
        ..v1::PidsStat::default()
    })
}

fn v1_memory(files: Files<'_>) -> Option<v1::MemoryStat> {
    let stat = files.text("memory.stat")?;
    let stat = Keyed::parse(&stat);
    let entry = |module: &str| {
        let value = |name: &str| files.or_zero(&format!("memory.{module}{name}"));
        some(v1::MemoryEntry {
            limit: value("limit_in_bytes"),
            usage: value("usage_in_bytes"),
            max: value("max_usage_in_bytes"),
            failcnt: value("failcnt"),
            ..v1::MemoryEntry::default()
        })
    };
    Some(v1::MemoryStat {
        cache: stat.or_zero("cache"),
        rss: stat.or_zero("rss"),
        rss_huge: stat.or_zero("rss_huge"),
        mapped_file: stat.or_zero("mapped_file"),
        dirty: stat.or_zero("dirty"),
        writeback: stat.or_zero("writeback"),
        pg_pg_in: stat.or_zero("pgpgin"),
        pg_pg_out: stat.or_zero("pgpgout"),
        pg_fault: stat.or_zero("pgfault"),
        pg_maj_fault: stat.or_zero("pgmajfault"),
        inactive_anon: stat.or_zero("inactive_anon"),
        active_anon: stat.or_zero("active_anon"),
        inactive_file: stat.or_zero("inactive_file"),
        active_file: stat.or_zero("active_file"),
        unevictable: stat.or_zero("unevictable"),
        hierarchical_memory_limit: stat.or_zero("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.or_zero("hierarchical_memsw_limit"),
        total_cache: stat.or_zero("total_cache"),
        total_rss: stat.or_zero("total_rss"),
        total_rss_huge: stat.or_zero("total_rss_huge"),
        total_mapped_file: stat.or_zero("total_mapped_file"),
        total_dirty: stat.or_zero("total_dirty"),
        total_writeback: stat.or_zero("total_writeback"),
        total_pg_pg_in: stat.or_zero("total_pgpgin"),
        total_pg_pg_out: stat.or_zero("total_pgpgout"),
        total_pg_fault: stat.or_zero("total_pgfault"),
        total_pg_maj_fault: stat.or_zero("total_pgmajfault"),
        total_inactive_anon: stat.or_zero("total_inactive_anon"),
        total_active_anon: stat.or_zero("total_active_anon"),
        total_inactive_file: stat.or_zero("total_inactive_file"),
        total_active_file: stat.or_zero("total_active_file"),
        total_unevictable: stat.or_zero("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..v1::MemoryStat::default()
    })
}

fn v1_oom_control(files: Files<'_>) -> Option<v1::MemoryOomControl> {
    let control = files.text("memory.oom_control")?;
    let control = Keyed::parse(&control);
    Some(v1::MemoryOomControl {
        oom_kill_disable: control.or_zero("oom_kill_disable"),
        under_oom: control.or_zero("under_oom"),
        oom_kill: control.or_zero("oom_kill"),
        ..v1::MemoryOomControl::default()
    })
}

fn v1_blkio(files: Files<'_>) -> v1::BlkIOStat {
    let partitions = read(Path::new("/proc/partitions")).unwrap_or_default();
    let entries = |name: &str| -> Vec<v1::BlkIOEntry> {
        let text = files.text(&format!("blkio.{name}")).unwrap_or_default();
        parse::blkio(&text)
            .map(|line| v1::BlkIOEntry {
                op: line.op.to_owned(),
                device: parse::partition(&partitions, line.major, line.minor)
                    .map(|name| format!("/dev/{name}"))
                    .unwrap_or_default(),
                major: line.major,
                minor: line.minor,
                value: line.value,
                ..v1::BlkIOEntry::default()
            })
            .collect()
    };
    // CFQ's files of old kernels; then what BFQ counts, which is only its own devices; then the block layer's own counters, whose
    // recursive form came with Linux 4.18.
    let first = |names: [&str; 4]| {
        names
            .into_iter()
            .map(entries)
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: first([
            "io_service_bytes_recursive",
            "bfq.io_service_bytes_recursive",
            "throttle.io_service_bytes_recursive",
            "throttle.io_service_bytes",
        ]),
        io_serviced_recursive: first([
            "io_serviced_recursive",
            "bfq.io_serviced_recursive",
            "throttle.io_serviced_recursive",
            "throttle.io_serviced",
        ]),
        io_queued_recursive: entries("io_queued_recursive"),
        io_service_time_recursive: entries("io_service_time_recursive"),
        io_wait_time_recursive: entries("io_wait_time_recursive"),
        io_merged_recursive: entries("io_merged_recursive"),
        io_time_recursive: entries("time_recursive"),
        sectors_recursive: entries("sectors_recursive"),
        ..v1::BlkIOStat::default()
    }
}

fn v1_hugetlb(files: Files<'_>) -> Vec<v1::HugetlbStat> {
    huge_page_sizes()
        .filter_map(|pagesize| {
            Some(v1::HugetlbStat {
                usage: files.number(&format!("hugetlb.{pagesize}.usage_in_bytes"))?,
                max: files.or_zero(&format!("hugetlb.{pagesize}.max_usage_in_bytes")),
                failcnt: files.or_zero(&format!("hugetlb.{pagesize}.failcnt")),
                pagesize,
                ..v1::HugetlbStat::default()
            })
        })
        .collect()
}

fn v1_rdma(files: Files<'_>) -> Option<v1::RdmaStat> {
    let entries = |name: &str| -> Option<Vec<v1::RdmaEntry>> {
        let text = files.text(name)?;
        let entries = parse::rdma(&text).map(|line| v1::RdmaEntry {
            device: line.device.to_owned(),
            hca_handles: line.hca_handles,
            hca_objects: line.hca_objects,
            ..v1::RdmaEntry::default()
        });
        Some(entries.collect())
    };
    Some(v1::RdmaStat {
        current: entries("rdma.current")?,
        limit: entries("rdma.max").unwrap_or_default(),
        ..v1::RdmaStat::default()
    })
}

fn v2_metrics(files: Files<'_>) -> v2::Metrics {
    v2::Metrics {
        pids: v2_pids(files).into(),
        cpu: v2_cpu(files).into(),
        memory: v2_memory(files).into(),
        memory_events: v2_memory_events(files).into(),
        io: v2_io(files).into(),
        rdma: v2_rdma(files).into(),
        hugetlb: v2_hugetlb(files),
        ..v2::Metrics::default()
    }
}

fn v2_pids(files: Files<'_>) -> Option<v2::PidsStat> {
    Some(v2::PidsStat {
        current: files.number("pids.current")?,
        limit: files.or_zero("pids.max"),
        ..v2::PidsStat::default()
    })
}

fn v2_cpu(files: Files<'_>) -> Option<v2::CPUStat> {
    let stat = files.text("cpu.stat")?;
    let stat = Keyed::parse(&stat);
    Some(v2::CPUStat {
        usage_usec: stat.or_zero("usage_usec"),
        user_usec: stat.or_zero("user_usec"),
        system_usec: stat.or_zero("system_usec"),
        nr_periods: stat.or_zero("nr_periods"),
        nr_throttled: stat.or_zero("nr_throttled"),
        throttled_usec: stat.or_zero("throttled_usec"),
        nr_bursts: stat.or_zero("nr_bursts"),
        burst_usec: stat.or_zero("burst_usec"),
        psi: v2_pressure(files, "cpu.pressure").into(),
        ..v2::CPUStat::default()
    })
}

fn v2_memory(files: Files<'_>) -> Option<v2::MemoryStat> {
    let stat = files.text("memory.stat")?;
    let stat = Keyed::parse(&stat);
    // Linux 5.9 split these in two.
    let both = |key: &str| {
        let split = |kind: &str| stat.or_zero(&format!("{key}_{kind}"));
        stat.get(key)
            .unwrap_or_else(|| split("anon").saturating_add(split("file")))
    };
    Some(v2::MemoryStat {
        anon: stat.or_zero("anon"),
        file: stat.or_zero("file"),
        kernel_stack: stat.or_zero("kernel_stack"),
        slab: stat.or_zero("slab"),
        sock: stat.or_zero("sock"),
        shmem: stat.or_zero("shmem"),
        file_mapped: stat.or_zero("file_mapped"),
        file_dirty: stat.or_zero("file_dirty"),
        file_writeback: stat.or_zero("file_writeback"),
        anon_thp: stat.or_zero("anon_thp"),
        inactive_anon: stat.or_zero("inactive_anon"),
        active_anon: stat.or_zero("active_anon"),
        inactive_file: stat.or_zero("inactive_file"),
        active_file: stat.or_zero("active_file"),
        unevictable: stat.or_zero("unevictable"),
        slab_reclaimable: stat.or_zero("slab_reclaimable"),
        slab_unreclaimable: stat.or_zero("slab_unreclaimable"),
        pgfault: stat.or_zero("pgfault"),
        pgmajfault: stat.or_zero("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: stat.or_zero("workingset_nodereclaim"),
        pgrefill: stat.or_zero("pgrefill"),
        pgscan: stat.or_zero("pgscan"),
        pgsteal: stat.or_zero("pgsteal"),
        pgactivate: stat.or_zero("pgactivate"),
        pgdeactivate: stat.or_zero("pgdeactivate"),
        pglazyfree: stat.or_zero("pglazyfree"),
        pglazyfreed: stat.or_zero("pglazyfreed"),
        thp_fault_alloc: stat.or_zero("thp_fault_alloc"),
        thp_collapse_alloc: stat.or_zero("thp_collapse_alloc"),
        usage: files.or_zero("memory.current"),
        usage_limit: files.or_zero("memory.max"),
        max_usage: files.or_zero("memory.peak"),
        swap_usage: files.or_zero("memory.swap.current"),
        swap_limit: files.or_zero("memory.swap.max"),
        swap_max_usage: files.or_zero("memory.swap.peak"),
        psi: v2_pressure(files, "memory.pressure").into(),
        ..v2::MemoryStat::default()
    })
}

fn v2_memory_events(files: Files<'_>) -> Option<v2::MemoryEvents> {
    let events = files.text("memory.events")?;
    let events = Keyed::parse(&events);
    Some(v2::MemoryEvents {
        low: events.or_zero("low"),
        high: events.or_zero("high"),
        max: events.or_zero("max"),
        oom: events.or_zero("oom"),
        oom_kill: events.or_zero("oom_kill"),
        oom_group_kill: events.or_zero("oom_group_kill"),
        ..v2::MemoryEvents::default()
    })
}

fn v2_io(files: Files<'_>) -> Option<v2::IOStat> {
    let stat = files.text("io.stat")?;
    let usage = parse::io_stat(&stat).map(|line| v2::IOEntry {
        major: line.major,
        minor: line.minor,
        rbytes: line.rbytes,
        wbytes: line.wbytes,
        rios: line.rios,
        wios: line.wios,
        ..v2::IOEntry::default()
    });
    Some(v2::IOStat {
        usage: usage.collect(),
        psi: v2_pressure(files, "io.pressure").into(),
        ..v2::IOStat::default()
    })
}

fn v2_rdma(files: Files<'_>) -> Option<v2::RdmaStat> {
    let entries = |name: &str| -> Option<Vec<v2::RdmaEntry>> {
        let text = files.text(name)?;
        let entries = parse::rdma(&text).map(|line| v2::RdmaEntry {
            device: line.device.to_owned(),
            hca_handles: line.hca_handles,
            hca_objects: line.hca_objects,
            ..v2::RdmaEntry::default()
        });
        Some(entries.collect())
    };
    Some(v2::RdmaStat {
        current: entries("rdma.current")?,
        limit: entries("rdma.max").unwrap_or_default(),
        ..v2::RdmaStat::default()
    })
}

fn v2_hugetlb(files: Files<'_>) -> Vec<v2::HugeTlbStat> {
    huge_page_sizes()
        .filter_map(|pagesize| {
            let current = files.number(&format!("hugetlb.{pagesize}.current"))?;
            let events = files.text(&format!("hugetlb.{pagesize}.events")).unwrap_or_default();
            Some(v2::HugeTlbStat {
                current,
                max: files.or_zero(&format!("hugetlb.{pagesize}.max")),
                failcnt: Keyed::parse(&events).or_zero("max"),
                pagesize,
                ..v2::HugeTlbStat::default()
            })
        })
        .collect()
}

/// Pressure stall information; `None` where the kernel does not keep it.
fn v2_pressure(files: Files<'_>, name: &str) -> Option<v2::PSIStats> {
    let text = files.text(name)?;
    let mut psi = v2::PSIStats::default();
    for line in parse::pressure(&text) {
        let [avg10, avg60, avg300] = line.averages;
        let data = some(v2::PSIData {
            avg10,
            avg60,
            avg300,
            total: line.total,
            ..v2::PSIData::default()
        });
        match line.share {
            "some" => psi.some = data,
            "full" => psi.full = data,
            _ => {}
        }
    }
    (psi.some.is_some() || psi.full.is_some()).then_some(psi)
}
