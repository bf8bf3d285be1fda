//! Machines and containers as their files describe them.

use std::collections::HashMap;

use super::super::Limit;
use super::*;

/// Files of a machine.
#[derive(Default)]
struct Machine(HashMap<PathBuf, String>);

impl Machine {
    /// A machine with these CPUs, whose cores are these lists.
    fn new(online: &str, cores: &[&str]) -> Self {
        let mut machine = Self::default().with("/sys/devices/system/cpu/online", online);
        for siblings in cores {
            for cpu in list(siblings).unwrap() {
                let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list");
                machine = machine.with(&path, siblings);
            }
        }
        machine
    }

    fn with(mut self, path: &str, text: &str) -> Self {
        self.0.insert(path.into(), format!("{text}\n"));
        self
    }

    /// In a control group of version 2.
    fn in_group(self, group: &str, mount_root: &str) -> Self {
        self.with("/proc/self/cgroup", &format!("0::{group}")).with(
            "/proc/self/mountinfo",
            &format!(
                "24 30 0:22 / /proc rw,nosuid - proc proc rw\n\
                 35 24 0:30 {mount_root} /sys/fs/cgroup ro,nosuid,nodev shared:4 master:9 - cgroup2 cgroup rw,nsdelegate"
            ),
        )
    }

    fn cores(&self, allowed: &str) -> Cores {
        of(&list(allowed).unwrap(), &|path| self.0.get(path).cloned())
    }
}

/// An AMD EPYC with two threads a core, as a desktop of 8 cores numbers them: siblings are 8 apart.
fn eight_cores() -> Machine {
    Machine::new("0-15", &["0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "7,15"])
}

#[test]
fn a_core_counts_once() {
    for (machine, allowed, expected) in [
        (eight_cores(), "0-15", (8, 8)),
        // Only one thread of each core, both of two, and one of one and both of another.
        (eight_cores(), "0-7", (8, 8)),
        (eight_cores(), "0,8,1,9", (8, 2)),
        (eight_cores(), "0-3", (8, 4)),
        (eight_cores(), "7,8,15", (8, 2)),
        // Without SMT, as two cores of this kind of a virtual machine.
        (Machine::new("0-1", &["0", "1"]), "0-1", (2, 2)),
        // Siblings side by side, as in many virtual machines: two CPUs are one core.
        (Machine::new("0-1", &["0-1"]), "0-1", (1, 1)),
        (Machine::new("0-3", &["0-1", "2-3"]), "1-2", (2, 2)),
        // POWER: four threads a core, two of them switched off.
        (Machine::new("0-1,4-5", &["0-1", "4-5"]), "0-1,4-5", (2, 2)),
        // A hybrid Intel Core: 6 fast cores with two threads, 8 slow ones with one.
        (
            Machine::new(
                "0-19",
                &["0-1", "2-3", "4-5", "6-7", "8-9", "10-11", "12", "13", "14", "15", "16", "17", "18", "19"],
            ),
            "0-19",
            (14, 14),
        ),
    ] {
        let cores = machine.cores(allowed);
        assert_eq!((cores.machine, cores.allowed, cores.quota), (expected.0, expected.1, None), "{allowed}");
    }
}

#[test]
fn without_topology_every_cpu_counts() {
    let known = Machine::default().with("/sys/devices/system/cpu/online", "0-5");
    assert_eq!(known.cores("0-3").threads(), (4, Limit::Affinity));
    assert_eq!(Machine::default().cores("0-3").threads(), (4, Limit::Cores));
    // The older name of the file; and lists that make no sense.
    let sibling = |cpu: usize| format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    let core = |cpu: usize| format!("/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list");
    let older = Machine::default().with(&sibling(0), "0,2").with(&sibling(2), "0,2");
    assert_eq!(older.cores("0-2").allowed, 2);
    let odd = Machine::default().with(&core(0), "1-0").with(&core(1), "many").with(&core(2), "7").with(&core(3), "");
    assert_eq!(odd.cores("0-3").allowed, 4);
    assert_eq!(Machine::default().with("/sys/devices/system/cpu/online", "0-99999999999").cores("0").machine, 1);
}

#[test]
fn lists_are_numbers_and_ranges() {
    assert_eq!(list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
    for text in ["", "\n", "3-", "-3", "a", "0,,1", "5-4", "0-18446744073709551615", "65536"] {
        assert_eq!(list(text), None, "{text:?}");
    }
}

#[test]
fn quotas_of_version_2_count_in_the_group_and_around_it() {
    let quota = |machine: Machine| machine.cores("0-15").quota;
    // A container sees its own group as the root.
    let container = || eight_cores().in_group("/", "/");
    assert_eq!(quota(container()), None);
    assert_eq!(quota(container().with("/sys/fs/cgroup/cpu.max", "max 100000")), None);
    let limited = container().with("/sys/fs/cgroup/cpu.max", "250000 100000");
    assert_eq!(limited.cores("0-15").threads(), (3, Limit::Quota));
    assert_eq!(quota(limited), Some(2.5));
    // A service whose slice has less than itself, and one that has no file.
    let service = || eight_cores().in_group("/system.slice/a.service", "/");
    let deep = service().with("/sys/fs/cgroup/system.slice/a.service/cpu.max", "400000 100000");
    assert_eq!(quota(deep), Some(4.0));
    let deep = service()
        .with("/sys/fs/cgroup/system.slice/a.service/cpu.max", "400000 100000")
        .with("/sys/fs/cgroup/system.slice/cpu.max", "150000 50000")
        .with("/sys/fs/cgroup/other/cpu.max", "1000 100000");
    assert_eq!(quota(deep), Some(3.0));
    // The group is mounted itself, without a namespace; and another one is.
    let bound = eight_cores().in_group("/docker/ab", "/docker/ab").with("/sys/fs/cgroup/cpu.max", "50000 100000");
    assert_eq!(quota(bound), Some(0.5));
    let elsewhere = eight_cores().in_group("/docker/ab", "/docker/c").with("/sys/fs/cgroup/cpu.max", "50000 100000");
    assert_eq!(quota(elsewhere), None);
    for text in ["", "max", "100000", "0 100000", "100000 0", "-5 100000", "a b", "1 2 3"] {
        assert_eq!(quota(container().with("/sys/fs/cgroup/cpu.max", text)), None, "{text:?}");
    }
}

#[test]
fn quotas_of_version_1_count_as_well() {
    const GROUPS: &str = "12:cpuset:/\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n0::/";
    const MOUNTS: &str = r"40 35 0:33 /docker/ab /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
41 35 0:34 /docker/ab /sys/fs/cgroup/cpu,cpuacct\040x ro,nosuid - cgroup cgroup rw,cpu,cpuacct
42 35 0:35 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
not a mount";
    let machine = |quota: &str, period: &str| {
        eight_cores()
            .with("/proc/self/cgroup", GROUPS)
            .with("/proc/self/mountinfo", MOUNTS)
            .with("/sys/fs/cgroup/cpu,cpuacct x/cpu.cfs_quota_us", quota)
            .with("/sys/fs/cgroup/cpu,cpuacct x/cpu.cfs_period_us", period)
    };
    assert_eq!(machine("-1", "100000").cores("0-15").quota, None);
    assert_eq!(machine("600000", "100000").cores("0-15").threads(), (6, Limit::Quota));
    assert_eq!(machine("600000", "100000").cores("0-3").threads(), (4, Limit::Affinity));
    // Of two versions the smaller quota counts.
    let both = machine("600000", "100000").with("/sys/fs/cgroup/unified/cpu.max", "100000 100000");
    assert_eq!(both.cores("0-15").quota, Some(1.0));
    assert_eq!(machine("600000", "").cores("0-15").quota, None);
}

/// The mask of a thread that is narrowed to one of its CPUs.
#[test]
fn the_affinity_mask_is_the_systems() {
    let all = affinity().unwrap();
    let one = all[all.len() - 1];
    let narrowed = std::thread::spawn(move || {
        // SAFETY: a mask is plain bits; the number is one of the system's own, and below what a mask holds or not set.
        let mut mask: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        if one >= libc::CPU_SETSIZE as usize {
            return vec![one];
        }
        // SAFETY: checked above.
        unsafe { libc::CPU_SET(one, &mut mask) };
        // SAFETY: the call reads these bytes.
        let status = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), &raw const mask) };
        assert_eq!(status, 0);
        affinity().unwrap()
    });
    assert_eq!(narrowed.join().unwrap(), [one]);
    assert_eq!(affinity().unwrap(), all);
}
