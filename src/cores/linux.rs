//! What Linux tells of cores: the affinity mask by a call, topology in `/sys/devices/system/cpu`, and quotas in the files
//! of control groups, of version 1 or 2 (<https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files>,
//! <https://docs.kernel.org/scheduler/sched-bwc.html>).
//!
//! All but the mask are texts of files, which a test puts in their place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Cores;

/// Text of a file; `None` if there is none.
type Read<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// No machine has so many CPUs: a longer list is none.
const MOST_CPUS: usize = 1 << 16;

/// `None` if the system does not tell where this process may run.
pub(super) fn cores() -> Option<Cores> {
    affinity().map(|allowed| of(&allowed, &|path| std::fs::read_to_string(path).ok()))
}

/// The CPUs that this process may run on, in order.
fn affinity() -> Option<Vec<usize>> {
    /// CPUs of a part of a mask.
    const PART: usize = libc::CPU_SETSIZE as usize;
    let mut parts = 1;
    loop {
        // SAFETY: a mask is plain bits.
        let mut mask: Vec<libc::cpu_set_t> = vec![unsafe { std::mem::zeroed() }; parts];
        // SAFETY: the call writes to no more than these bytes.
        let status = unsafe { libc::sched_getaffinity(0, size_of_val(mask.as_slice()), mask.as_mut_ptr()) };
        if status == 0 {
            // SAFETY: the number is below that of a part's CPUs.
            let is_set = |cpu: &usize| unsafe { libc::CPU_ISSET(cpu % PART, &mask[cpu / PART]) };
            let cpus: Vec<usize> = (0..parts * PART).filter(is_set).collect();
            return Some(cpus).filter(|cpus| !cpus.is_empty());
        }
        // A mask that is too short for the kernel is refused.
        parts *= 2;
        if parts * PART > MOST_CPUS {
            return None;
        }
    }
}

/// Decides by what files say.
///
/// * `allowed`: numbers of CPUs, at least one
fn of(allowed: &[usize], read: Read<'_>) -> Cores {
    let online = read(Path::new("/sys/devices/system/cpu/online")).and_then(|text| list(&text)).unwrap_or_default();
    let allowed_cores = physical(allowed, read);
    let machine = physical(&online, read).max(allowed_cores);
    Cores { machine, allowed: allowed_cores, quota: quota(read) }
}

/// How many cores some CPUs are on. One whose siblings are not known is a core.
fn physical(cpus: &[usize], read: Read<'_>) -> usize {
    let siblings = |cpu: usize| {
        // The second is the older name of the same.
        ["core_cpus_list", "thread_siblings_list"].into_iter().find_map(|name| {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/{name}");
            read(Path::new(&path)).and_then(|text| list(&text)).filter(|siblings| siblings.contains(&cpu))
        })
    };
    // A core's name is its first CPU.
    let core = |&cpu: &usize| siblings(cpu).and_then(|siblings| siblings.into_iter().min()).unwrap_or(cpu);
    cpus.iter().map(core).collect::<BTreeSet<_>>().len()
}

/// Numbers as in `0-3,8,10-11`.
fn list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first || last >= MOST_CPUS {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// A version of control groups.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where a hierarchy of control groups is mounted.
struct Mount {
    version: Version,
    /// The group that is found at `point`.
    root: String,
    point: PathBuf,
}

impl Mount {
    /// A line of `/proc/self/mountinfo`: `36 35 0:31 /root /point options [optional fields] - type source options`.
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let version = match (after.next()?, after.nth(1)?) {
            ("cgroup", options) if options.split(',').any(|option| option == "cpu") => Version::One,
            ("cgroup2", _) => Version::Two,
            _ => return None,
        };
        Some(Self { version, root: plain(root), point: plain(point).into() })
    }
}

/// A path as it is: in that file, spaces, tabs, line feeds and backslashes are octal numbers.
fn plain(path: &str) -> String {
    [(r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", r"\")]
        .into_iter()
        .fold(path.to_owned(), |path, (octal, character)| path.replace(octal, character))
}

/// The smallest quota of this process's control group and of those around it, in CPUs.
fn quota(read: Read<'_>) -> Option<f64> {
    let (groups, mounts) = (read(Path::new("/proc/self/cgroup"))?, read(Path::new("/proc/self/mountinfo"))?);
    let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
    let mut quotas = Vec::new();
    for line in groups.lines() {
        // `4:cpu,cpuacct:/path`, or `0::/path` of version 2.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let version = match controllers {
            "" => Version::Two,
            _ if controllers.split(',').any(|controller| controller == "cpu") => Version::One,
            _ => continue,
        };
        for mount in mounts.iter().filter(|mount| mount.version == version) {
            // Of a group elsewhere there is nothing to be seen here.
            let Ok(below) = Path::new(path).strip_prefix(&mount.root) else { continue };
            let group = mount.point.join(below);
            let around = group.ancestors().take_while(|group| group.starts_with(&mount.point));
            quotas.extend(around.filter_map(|group| quota_of(version, group, read)));
        }
    }
    quotas.into_iter().min_by(f64::total_cmp)
}

/// The quota of one group, if it has one.
fn quota_of(version: Version, group: &Path, read: Read<'_>) -> Option<f64> {
    let (quota, period) = match version {
        Version::One => (read(&group.join("cpu.cfs_quota_us"))?, read(&group.join("cpu.cfs_period_us"))?),
        Version::Two => {
            let text = read(&group.join("cpu.max"))?;
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.to_owned(), period.to_owned())
        }
    };
    // Without a limit it is -1, or `max`.
    let (quota, period): (u32, u32) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0 && period > 0).then(|| f64::from(quota) / f64::from(period))
}

#[cfg(test)]
mod tests;
