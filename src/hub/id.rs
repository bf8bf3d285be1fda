//! What the id of a model on a hub looks like. Not for: whether there is such a model.

use std::path::Path;

/// The revision that is meant if none is given.
const DEFAULT_REVISION: &str = "main";

/// The parts of `owner/name[@revision][:file.gguf]`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HubId<'a> {
    pub repo: &'a str,
    pub revision: &'a str,
    pub file: Option<&'a str>,
}

impl<'a> HubId<'a> {
    pub fn parse(text: &'a str) -> Option<Self> {
        let (head, file) = text.split_once(':').map_or((text, None), |(head, file)| (head, Some(file)));
        let (repo, revision) = head.split_once('@').unwrap_or((head, DEFAULT_REVISION));
        let (owner, name) = repo.split_once('/')?;
        let is_name = |name: &str| {
            let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty() && !name.starts_with(['.', '-']) && !name.contains("..") && name.chars().all(is_known)
        };
        let is_path = |path: &str| path.split('/').all(is_name);
        let is_file = ["gguf", "safetensors", "json", "bin", "pt", "pth"].iter().any(|end| has_extension(name, end));
        let is_valid = is_name(owner)
            && is_name(name)
            && !is_file
            && is_path(revision)
            && file.is_none_or(|file| is_path(file) && has_extension(file, "gguf"));
        is_valid.then_some(Self { repo, revision, file })
    }
}

/// Whether a text looks like a model's id on a hub: `owner/name`, `owner/name@revision` or `owner/name:file.gguf`.
///
/// What ends as a model file does is taken for a path; whether there is such a path is not looked up.
#[must_use]
pub fn is_hub_id(text: &str) -> bool {
    HubId::parse(text).is_some()
}

pub(super) fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|end| end.eq_ignore_ascii_case(extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in
            ["a/b", "meta-llama/Llama-3.2-1B", "a/b@main", "a/b@refs/pr/1", "a/b:c.gguf", "a/b@v1:q/c.GGUF", "a/b-GGUF"]
        {
            assert!(is_hub_id(id), "{id}");
        }
        for path in [
            "",
            "a",
            "/a/b",
            "./b",
            "../b",
            "~/b",
            "a/b/c",
            "a/",
            "/",
            "a/b.gguf",
            "a/model.safetensors",
            "a/b@",
            "a/b:",
            "a/b:c.bin",
            "a/b:../c.gguf",
            "a/b@../c",
            "a/..",
            "a b/c",
            "a/b c",
            "C:/a",
            "a\\b/c",
            "a/-b",
            "ä/b",
            "a/b:/c.gguf",
        ] {
            assert!(!is_hub_id(path), "{path}");
        }
        let id = HubId::parse("a/b@v1:q/c.gguf").unwrap();
        assert_eq!(id, HubId { repo: "a/b", revision: "v1", file: Some("q/c.gguf") });
        assert_eq!(HubId::parse("a/b").unwrap().revision, "main");
    }
}
