//! Which files of a model's folder on the hub are needed, and what is given to the loader afterwards.
//!
//! Knows names only. Not for: fetching them.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Files beside the weights that the loaders read.
#[rustfmt::skip]
const SIDE_FILES: [&str; 10] = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Where a folder in Meta's layout may be.
const META_FOLDERS: [&str; 2] = ["", "original/"];
/// Most names that a message lists.
const MAX_LISTED: usize = 40;

/// What is to be opened, relative to the snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Folder(&'static str),
    File(String),
}

/// The files that are needed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// In the order in which they are fetched: small ones first.
    pub files: Vec<String>,
    /// The one of `files` that names further files.
    pub index: Option<&'static str>,
    pub target: Target,
}

/// Chooses among the names of a repository's files.
///
/// * `wanted`: the GGUF file that was asked for by name
///
/// # Errors
/// [`Error::Unsupported`] if there are no weights of a known kind; [`Error::Hub`] if there are several GGUF files to
/// choose from, or if one that is needed is not there.
pub(super) fn choose(repo: &str, names: &[String], wanted: Option<&str>) -> Result<Choice> {
    if let Some(wanted) = wanted {
        return gguf(repo, names, Some(wanted));
    }
    let has = |name: &str| names.iter().any(|other| other == name);
    let mut files: Vec<String> = SIDE_FILES.into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    for (weights, index) in [(SINGLE, None), (INDEX, Some(INDEX))] {
        if has(weights) {
            files.push(weights.to_owned());
            return Ok(Choice { files, index, target: Target::Folder("") });
        }
    }
    for folder in META_FOLDERS {
        let is_part = |name: &&String| {
            let part = name.strip_prefix(folder).and_then(|name| name.strip_prefix("consolidated."));
            part.and_then(|part| part.strip_suffix(".pth")).is_some_and(|number| !number.contains('/'))
        };
        let mut parts: Vec<String> = names.iter().filter(is_part).cloned().collect();
        let params = format!("{folder}params.json");
        if !parts.is_empty() && has(&params) {
            let side = SIDE_FILES.into_iter().map(|name| format!("{folder}{name}"));
            let mut files: Vec<String> = side.chain([params]).filter(|name| has(name)).collect();
            parts.sort();
            files.append(&mut parts);
            return Ok(Choice { files, index: None, target: Target::Folder(folder) });
        }
    }
    gguf(repo, names, None)
}

/// Chooses one GGUF file, or one that is split.
fn gguf(repo: &str, names: &[String], wanted: Option<&str>) -> Result<Choice> {
    let mut sets: BTreeMap<(&str, Option<usize>), Vec<&str>> = BTreeMap::new();
    for name in names.iter().map(String::as_str).filter(|name| super::id::has_extension(name, "gguf")) {
        let key = split(name).map_or((name, None), |(stem, count)| (stem, Some(count)));
        sets.entry(key).or_default().push(name);
    }
    let list = || {
        let mut list: Vec<_> = sets.values().filter_map(|set| set.iter().min().copied()).collect();
        let more = list.len().saturating_sub(MAX_LISTED);
        list.truncate(MAX_LISTED);
        format!("{}{}", list.join(", "), if more > 0 { format!(" and {more} more") } else { String::new() })
    };
    let (key, set) = match wanted {
        Some(wanted) => sets.iter().find(|(_, set)| set.contains(&wanted)).ok_or_else(|| {
            let error = Error::hub(format!("`{repo}` has no file `{wanted}`"));
            if sets.is_empty() { error } else { error.with_hint(format!("it has {}", list())) }
        })?,
        None if sets.len() > 1 => {
            let hint = format!("name one, as in {repo}:file.gguf");
            return Err(Error::hub(format!("`{repo}` has several GGUF files: {}", list())).with_hint(hint));
        }
        None => sets.iter().next().ok_or_else(|| no_weights(repo, names))?,
    };
    let mut files: Vec<String> = set.iter().map(|&name| name.to_owned()).collect();
    files.sort();
    if let Some(count) = key.1
        && files.len() != count
    {
        return Err(Error::hub(format!("`{repo}` has {} of the {count} parts of `{}`", files.len(), files[0])));
    }
    let first = files[0].clone();
    Ok(Choice { files, index: None, target: Target::File(first) })
}

fn no_weights(repo: &str, names: &[String]) -> Error {
    let is_torch = |name: &String| ["bin", "pt", "pth"].iter().any(|end| super::id::has_extension(name, end));
    if names.iter().any(is_torch) {
        return Error::unsupported(format!("`{repo}`, which has PyTorch's .bin weights only,"))
            .with_hint("convert it to safetensors or GGUF, or take a copy of the model that is");
    }
    Error::unsupported(format!("`{repo}`, which has no weights of a known kind,"))
        .with_hint("expected model.safetensors, its index, a GGUF file, or params.json and consolidated.*.pth")
}

/// Stem and number of parts of a split file's name, `stem-00001-of-00003.gguf`.
fn split(name: &str) -> Option<(&str, usize)> {
    const DIGITS: usize = 5;
    let name = name.get(..name.len().checked_sub(".gguf".len())?)?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        let is_number = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse::<usize>().ok()).flatten()
    };
    number(part)?;
    Some((stem, number(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str], wanted: Option<&str>) -> Result<Choice> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        choose("a/b", &names, wanted)
    }

    #[test]
    fn safetensors_come_before_all_else() {
        let choice =
            of(&["x.gguf", "model.safetensors", "README.md", "config.json", "pytorch_model.bin"], None).unwrap();
        assert_eq!(choice.files, ["config.json", "model.safetensors"]);
        assert_eq!((choice.index, choice.target), (None, Target::Folder("")));
        let choice = of(&["model-1.safetensors", INDEX, "tokenizer.json"], None).unwrap();
        assert_eq!(choice.files, ["tokenizer.json", INDEX]);
        assert_eq!(choice.index, Some(INDEX));
    }

    #[test]
    fn metas_layout_may_be_in_a_folder_of_its_own() {
        let names = ["original/consolidated.01.pth", "original/consolidated.00.pth", "original/params.json"];
        let choice = of(&[&names[..], &["original/tokenizer.model", "config.json"]].concat(), None).unwrap();
        assert_eq!(choice.target, Target::Folder("original/"));
        assert_eq!(choice.files, ["original/tokenizer.model", names[2], names[1], names[0]]);
        assert!(of(&["consolidated.00.pth"], None).is_err(), "params.json is needed");
    }

    #[test]
    fn one_gguf_file_is_taken_and_several_are_listed() {
        assert_eq!(of(&["README.md", "q/m.gguf"], None).unwrap().target, Target::File("q/m.gguf".to_owned()));
        let split = ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"];
        assert_eq!(of(&split, None).unwrap().files, [split[1], split[0]]);
        let error = of(&split[..1], None).unwrap_err().to_string();
        assert!(error.contains("1 of the 2 parts"), "{error}");

        let names = [&split[..], &["n.gguf"]].concat();
        let error = of(&names, None).unwrap_err();
        assert!(error.to_string().contains("m-00001-of-00002.gguf, n.gguf"), "{error}");
        assert!(error.hint().unwrap().contains("a/b:file.gguf"));
        assert_eq!(of(&names, Some("n.gguf")).unwrap().files, ["n.gguf"]);
        assert_eq!(of(&names, Some(split[0])).unwrap().target, Target::File(split[1].to_owned()));
        let error = of(&names, Some("o.gguf")).unwrap_err();
        assert!(error.to_string().contains("o.gguf") && error.hint().unwrap().contains("n.gguf"), "{error}");
    }

    #[test]
    fn other_weights_are_refused() {
        let error = of(&["config.json", "pytorch_model.bin"], None).unwrap_err();
        assert!(error.to_string().contains(".bin") && error.hint().unwrap().contains("convert"), "{error}");
        assert!(of(&["config.json"], None).unwrap_err().to_string().contains("no weights"));
    }
}
