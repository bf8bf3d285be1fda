//! The files that a run writes: no two of them may be the same, however they are spelt.
//!
//! Not for: whether a file can be written.

use std::fs::Metadata;
use std::path::{Component, Path, PathBuf};

use adaptive_kvcache::{Error, Result};

/// Longer chains of links are circles.
const MAX_LINKS: u32 = 16;

/// The only output that is added to; all others are replaced.
const LOG: &str = "--log-file";

/// Refuses two outputs that are one file, by whatever names and links, and one that would replace the file that standard
/// output or standard error is sent to. Devices may be named more than once.
///
/// * `outputs`: each with the option that names it
///
/// # Errors
/// [`Error::Input`] with both options and the path.
pub fn distinct(outputs: &[(&str, &Path)]) -> Result<()> {
    for (index, (option, path)) in outputs.iter().enumerate() {
        if let Some((earlier, _)) = outputs[..index].iter().find(|(_, earlier)| same_file(earlier, path)) {
            let reason = format!("{earlier} and {option} name the same file `{}`", path.display());
            return Err(Error::input(reason).with_hint("give each a file of its own"));
        }
        if *option != LOG
            && let Some(stream) = stream_of(path)
        {
            let reason = format!("{option} names the file that {stream} goes to, `{}`", path.display());
            return Err(Error::input(reason).with_hint("give each a file of its own"));
        }
    }
    Ok(())
}

/// Whether two paths lead to one file, or would if it were made. Never for devices, which can take everything.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (Place::of(a), Place::of(b)) {
        (Some(a), Some(b)) => a == b,
        _ => false,
    }
}

/// The standard stream that is sent to the file of this path; `None` for names that mean the stream itself.
fn stream_of(path: &Path) -> Option<&'static str> {
    let is_regular = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    if !is_regular || path.starts_with("/dev") || path.starts_with("/proc") {
        return None;
    }
    [("/dev/stdout", "standard output"), ("/dev/stderr", "standard error")]
        .into_iter()
        .find_map(|(stream, name)| same_file(Path::new(stream), path).then_some(name))
}

/// What is at the end of a path.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Device and number of what is there, equal for hard links.
    #[cfg(unix)]
    There(u64, u64),
    /// Where it would be made.
    Named(PathBuf),
}

impl Place {
    fn of(path: &Path) -> Option<Self> {
        match std::fs::metadata(path) {
            Ok(metadata) if is_device(&metadata) => None,
            #[cfg(unix)]
            Ok(metadata) => {
                use std::os::unix::fs::MetadataExt;
                Some(Self::There(metadata.dev(), metadata.ino()))
            }
            _ => Some(Self::Named(resolved(path, MAX_LINKS))),
        }
    }
}

#[cfg(unix)]
fn is_device(metadata: &Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_char_device(&metadata.file_type())
}

#[cfg(not(unix))]
fn is_device(metadata: &Metadata) -> bool {
    !metadata.is_file() && !metadata.is_dir()
}

/// The one name of a path whose end, or more of it, may not be there yet.
fn resolved(path: &Path, links: u32) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if links > 0
        && let Ok(link) = path.read_link()
    {
        return resolved(&folder.join(link), links - 1);
    }
    match path.components().next_back() {
        Some(Component::Normal(name)) => resolved(folder, links).join(name),
        Some(Component::ParentDir) => {
            let mut folder = resolved(folder, links);
            folder.pop();
            folder
        }
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_is_known_by_all_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("there"), "").unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        let same = |a: &str, b: &str| {
            let same = same_file(&path(a), &path(b));
            assert_eq!(same, same_file(&path(b), &path(a)), "{a} {b}");
            same
        };
        for (a, b) in [
            ("there", "there"),
            ("there", "./there"),
            ("there", "folder/../there"),
            ("new", "folder/.././new"),
            ("missing/new", "missing//new"),
            ("missing/../new", "new"),
            ("missing/a/../new", "./missing/new"),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for (a, b) in [("there", "new"), ("new", "newer"), ("new", "folder/new"), ("missing/../new", "missing/new")] {
            assert!(!same(a, b), "{a} {b}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::symlink;
            symlink("there", path("link")).unwrap();
            symlink("new", path("dangling")).unwrap();
            symlink("folder", path("other")).unwrap();
            symlink("circle", path("circle")).unwrap();
            std::fs::hard_link(path("there"), path("hard")).unwrap();
            for (a, b) in [
                ("link", "there"),
                ("hard", "there"),
                ("hard", "link"),
                ("dangling", "new"),
                ("other/new", "folder/new"),
                ("circle", "circle"),
            ] {
                assert!(same(a, b), "{a} {b}");
            }
            assert!(!same("circle", "there") && !same("dangling", "there"));
            assert!(!same_file(Path::new("/dev/null"), Path::new("/dev/null")));
        }
    }

    #[test]
    fn both_options_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        assert!(distinct(&[("--json", &a), ("--csv", &b)]).is_ok());
        assert!(distinct(&[("--json", Path::new("/dev/null")), ("--csv", Path::new("/dev/null"))]).is_ok());
        let error = distinct(&[("--json", &a), ("--csv", &b), ("--plot", &a)]).unwrap_err();
        assert!(error.is_usage());
        assert_eq!(error.to_string(), format!("--json and --plot name the same file `{}`", a.display()));
    }
}
