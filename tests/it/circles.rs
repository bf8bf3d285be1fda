//! No circles of files: of two files beside one another, at most one builds on the other, directly or through further ones.
//!
//! Parts of a folder may use what stands in its `mod.rs`, and the other way round: that is one unit, cut into files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Circles that are not undone yet. A line goes when its circle does.
const KNOWN: [&[&str]; 0] = [];

/// An interpreter: its expressions hold calls, and calls hold expressions.
const MUTUALLY_RECURSIVE: &str = "jinja";

/// A module's path below the crate: `["cache", "layer"]`.
type Module = Vec<String>;

/// The modules that are files, each with its code: no comments, no unit tests.
#[derive(Default)]
struct Sources {
    code: BTreeMap<Module, String>,
    /// Of each module, what its `pub use` lines give other names to.
    reexports: BTreeMap<Module, BTreeMap<String, Module>>,
}

impl Sources {
    fn read(folder: &Path, inside: &Module, sources: &mut Self) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let mut module = inside.clone();
            if path.is_dir() {
                module.push(name);
                Self::read(&path, &module, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                if !matches!(&*name, "mod" | "lib" | "main") {
                    module.push(name);
                }
                let code = std::fs::read_to_string(&path).unwrap();
                let code = code.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
                let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
                let code = lines.collect::<Vec<_>>().join(" ");
                sources.code.entry(module).or_default().push_str(&code);
            }
        }
    }

    fn of(root: &Path) -> Self {
        let mut sources = Self::default();
        Self::read(root, &Vec::new(), &mut sources);
        let modules: Vec<Module> = sources.code.keys().cloned().collect();
        for module in &modules {
            let uses = uses(&sources.code[module]);
            let public = uses.iter().filter(|(is_public, _)| *is_public);
            let named =
                public.filter_map(|(_, path)| Some((path.rsplit("::").next()?, sources.absolute(module, path)?)));
            let named = named.map(|(name, path)| (name.to_owned(), path)).collect();
            sources.reexports.insert(module.clone(), named);
        }
        sources
    }

    /// A path as it stands in a module, from the crate's root; `None` if it begins with another crate or a local name.
    fn absolute(&self, module: &Module, path: &str) -> Option<Module> {
        let mut parts = path.split("::").map(str::to_owned).peekable();
        let mut base = module.clone();
        match parts.peek()?.as_str() {
            "crate" => {
                parts.next();
                base.clear();
            }
            "self" => _ = parts.next(),
            "super" => {
                while parts.next_if(|part| part == "super").is_some() {
                    base.pop();
                }
            }
            first => {
                let child = [&base[..], &[first.to_owned()]].concat();
                self.code.contains_key(&child).then_some(())?;
            }
        }
        base.extend(parts.filter(|part| part != "self"));
        Some(base)
    }

    /// The file that holds what a path names, re-exports followed.
    fn file(&self, path: &Module, depth: usize) -> Option<Module> {
        let len = (1..=path.len()).rev().find(|&len| self.code.contains_key(&path[..len]))?;
        let (module, rest) = (path[..len].to_vec(), &path[len..]);
        match rest.first().and_then(|name| self.reexports[&module].get(name)) {
            Some(meant) if depth < 8 => self.file(&[&meant[..], &rest[1..]].concat(), depth + 1),
            _ => Some(module),
        }
    }

    /// The files beside a module that its code names.
    fn needs(&self, module: &Module) -> BTreeSet<Module> {
        let code = &self.code[module];
        let private = uses(code).into_iter().filter(|(is_public, _)| !is_public).map(|(_, path)| path);
        let found = private.chain(paths(code)).filter_map(|path| self.file(&self.absolute(module, &path)?, 0));
        found.filter(|file| !file.starts_with(module) && !module.starts_with(file)).collect()
    }
}

/// The paths of all `use` lines, and whether they are public.
fn uses(code: &str) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    for (start, _) in code.match_indices("use ") {
        let before = code[..start].trim_end();
        if !(before.is_empty() || before.ends_with([';', '}', '{', ')', ']']) || before.ends_with("pub")) {
            continue;
        }
        let Some((tree, _)) = code[start + 4..].split_once(';') else { continue };
        let is_public = before.ends_with("pub") || before.ends_with("pub(super)") || before.ends_with("pub(crate)");
        found.extend(expand(tree).into_iter().map(|path| (is_public, path)));
    }
    found
}

/// The paths of a tree such as `a::{b, c::{d, e as f}}`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, list)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or_default().trim().to_owned()];
    };
    let list = list.trim_end().strip_suffix('}').unwrap_or(list);
    let mut depth = 0;
    let parts = list.split(|c: char| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    let paths = parts.filter(|part| !part.trim().is_empty()).flat_map(expand);
    paths.map(|path| format!("{}{path}", prefix.trim())).collect()
}

/// Paths that begin with `crate` or `super`, wherever they stand.
fn paths(code: &str) -> impl Iterator<Item = String> {
    let is_of_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let words = code.split(move |c: char| !is_of_path(c));
    let paths = words.filter(|word| word.starts_with("crate::") || word.starts_with("super::"));
    paths.map(|path| path.trim_end_matches(':').to_owned())
}

/// Everything that can be reached from a module.
fn reached(graph: &BTreeMap<Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<Module> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(module) = open.pop() {
        open.extend(graph[module].iter().filter(|needed| seen.insert((*needed).clone())));
    }
    seen
}

/// The circles: files that can all be reached from one another.
fn circles(sources: &Sources) -> BTreeSet<BTreeSet<String>> {
    let graph: BTreeMap<_, _> = sources.code.keys().map(|module| (module.clone(), sources.needs(module))).collect();
    let reached: BTreeMap<_, _> = graph.keys().map(|module| (module, reached(&graph, module))).collect();
    let in_circle = graph.keys().filter(|module| reached[module].contains(*module));
    in_circle
        .map(|module| {
            let both = reached[module].iter().filter(|other| reached[other].contains(module));
            both.map(|module| module.join("::")).collect()
        })
        .collect()
}

#[test]
fn no_files_build_on_one_another() {
    let sources = Sources::of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let folder = format!("{MUTUALLY_RECURSIVE}::");
    let (recursive, found): (BTreeSet<_>, BTreeSet<_>) =
        circles(&sources).into_iter().partition(|circle| circle.iter().all(|file| file.starts_with(&folder)));
    assert_eq!(recursive.len(), 1, "{MUTUALLY_RECURSIVE} has no circle any more, or two: {recursive:?}");
    let known: BTreeSet<BTreeSet<String>> =
        KNOWN.iter().map(|circle| circle.iter().map(|&file| file.to_owned()).collect()).collect();
    let new: Vec<_> = found.difference(&known).collect();
    assert!(new.is_empty(), "circles of files: {new:?}");
    let gone: Vec<_> = known.difference(&found).collect();
    assert!(gone.is_empty(), "no circle any more, so no longer known: {gone:?}");
}

#[test]
fn a_circle_is_found_through_re_exports_and_a_folder_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, code: &str| std::fs::write(folder.path().join(name), code).unwrap();
    std::fs::create_dir(folder.path().join("a")).unwrap();
    write("lib.rs", "pub mod a;\npub mod b;\n");
    write("a/mod.rs", "mod c;\nmod d;\npub use c::{C as _, Thing};\nuse d::D;\npub struct Own;\n");
    write("a/c.rs", "use super::Own;\nfn f() { crate::b::g() }\n");
    write("a/d.rs", "use super::Own;\n#[cfg(test)]\nmod tests { use crate::b::B; }\n");
    write("b.rs", "use std::fmt;\nuse crate::a::{self, Thing};\n// use crate::a::D;\n");
    let circle = ["a::c", "b"].map(str::to_owned).into();
    assert_eq!(circles(&Sources::of(folder.path())), BTreeSet::from([circle]));
}
