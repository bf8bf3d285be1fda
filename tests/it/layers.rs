//! The order of layers that `src/lib.rs` states: a module uses only those that stand behind it in the table there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is still against the order: a module, and one before it that it uses. A line goes when its cause is undone.
const KNOWN: [(&str, &str); 0] = [];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The modules in the order of the table: from the top row down, in a row from left to right.
fn order() -> Vec<String> {
    let lib = read(&source().join("lib.rs"));
    let rows = lib.lines().filter_map(|line| line.strip_prefix("//! | ")?.split(" | ").next());
    rows.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// The library's files, each with its path inside `src`; the command line's are a program of their own.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Top modules that a file's code names, unit tests and comments aside.
///
/// * `depth`: how many modules the file is inside of, itself included: 1 for `a.rs` and `a/mod.rs`
fn uses(code: &str, depth: usize) -> BTreeSet<String> {
    let code = code.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    let mut names = BTreeSet::new();
    for root in ["crate::".to_owned(), "super::".repeat(depth)] {
        for (start, _) in code.match_indices(&root) {
            let (before, behind) = (&code[..start], &code[start + root.len()..]);
            let is_inside = before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if is_inside || behind.starts_with("super::") {
                continue;
            }
            assert!(!behind.starts_with('{'), "a list of modules in one `use`: write a line for each");
            names.insert(behind.chars().take_while(|&c| c.is_alphanumeric() || c == '_').collect());
        }
    }
    names
}

#[test]
fn every_module_has_one_place_in_the_order() {
    let lib = read(&source().join("lib.rs"));
    let mut modules: Vec<_> = lib
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    let mut order = order();
    order.sort_unstable();
    modules.sort_unstable();
    assert_eq!(order, modules);
}

#[test]
fn a_module_uses_only_those_behind_it() {
    let order = order();
    let place = |name: &str| order.iter().position(|known| known == name);
    let mut found = Vec::new();
    files(&source(), &mut found);
    let mut against = BTreeSet::new();
    for path in &found {
        let inside: Vec<_> = path
            .strip_prefix(source())
            .unwrap()
            .with_extension("")
            .iter()
            .map(std::borrow::ToOwned::to_owned)
            .collect();
        let module = inside[0].to_str().unwrap();
        if matches!(module, "lib" | "main" | "cli" | "allocator") {
            continue;
        }
        let depth = inside.len() - usize::from(inside.last().is_some_and(|name| name == "mod"));
        let own = place(module).unwrap_or_else(|| panic!("`{module}` is not in the order"));
        for used in uses(&read(path), depth) {
            // Items of the crate's root are re-exported from below.
            if place(&used).is_some_and(|place| place < own) {
                against.insert((module.to_owned(), used));
            }
        }
    }
    let known: BTreeSet<_> = KNOWN.iter().map(|&(module, used)| (module.to_owned(), used.to_owned())).collect();
    let new: Vec<_> = against.difference(&known).collect();
    assert!(new.is_empty(), "against the order of layers in src/lib.rs: {new:?}");
    let gone: Vec<_> = known.difference(&against).collect();
    assert!(gone.is_empty(), "no longer against the order, so no longer known: {gone:?}");
}

#[test]
fn what_a_file_uses_is_found() {
    let code = "//! [`crate::no`]\nuse crate::a::{B, C};\nuse super::super::d::E;\nfn f() { crate::g::h() } // crate::no\n\
                use super::no;\n#[cfg(test)]\nmod tests { use crate::no; }";
    assert_eq!(uses(code, 2), ["a", "d", "g"].map(str::to_owned).into());
    assert_eq!(uses("use super::a::B;", 1), ["a"].map(str::to_owned).into());
    assert_eq!(uses("use super::a::B;", 2), BTreeSet::new());
}
