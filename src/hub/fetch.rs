//! Fetching a model's files once into the cache that other programs share.
//!
//! The layout is `models--owner--name/{blobs,snapshots,refs}`
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>); what is asked for are the hub's
//! `api/models/{id}/revision/{revision}` and `{id}/resolve/{commit}/{file}`. A reference is written last, so that what it
//! leads to is complete; a transfer that ends early is continued by the next one. What is there is compared with what the
//! hub says of it, and fetched anew if it is damaged.
//!
//! Not for: settings from the environment (the caller's), uploads, data sets, reading the files.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::choice::{self, Choice, Target};
use super::http::{Client, Failure, tell};
use super::id::{HubId, has_extension};
use super::settings::{HubSettings, Observer, Progress};
use super::sums::{damage, is_whole};
use crate::error::{Error, Result};
use crate::json::bytes_without_bom;

/// Folders within folders that a snapshot is searched through.
const MAX_DEPTH: usize = 4;

/// Finds a model in the cache, or fetches what is missing of it; the path of its folder, or of its GGUF file.
///
/// If the hub is not to be asked or cannot be reached, the newest complete copy in the cache is taken, and
/// [`Progress::Cached`] says so.
///
/// # Errors
/// [`Error::Input`] if `id` is none, or a setting cannot be used; [`Error::Hub`] if the hub refuses, has not what is
/// needed, cannot be reached, or sends what it should not; [`Error::Unsupported`] for weights of a kind that is not read;
/// [`Error::Io`] if the cache cannot be written; [`Error::Interrupted`] after a [`ControlFlow::Break`].
pub fn fetch(
    id: &str,
    settings: &HubSettings,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<PathBuf> {
    let hub_id = HubId::parse(id).ok_or_else(|| {
        Error::input(format!("`{id}` is not the id of a model")).with_hint("expected owner/name[@revision][:file.gguf]")
    })?;
    let store = Store::new(&settings.cache, &hub_id);
    let failure = if settings.offline {
        Failure::Network {
            reason: "the hub is not asked (offline)".to_owned(),
            hint: "unset HF_HUB_OFFLINE to fetch it, or give a local path",
        }
    } else {
        match fetch_online(&hub_id, settings, &store, progress) {
            Ok(path) => return Ok(path),
            Err(failure) => failure,
        }
    };
    let (reason, hint) = match failure {
        Failure::Final(error) => return Err(error),
        Failure::Network { reason, hint } => (reason, hint),
    };
    if let Some(path) = store.complete(&hub_id)? {
        tell(progress, Progress::Cached { reason: &reason, path: &path })?;
        return Ok(path);
    }
    let place = settings.cache.display();
    Err(Error::hub(format!("`{id}` is not in the cache `{place}`, and {reason}")).with_hint(hint))
}

fn fetch_online(
    id: &HubId<'_>,
    settings: &HubSettings,
    store: &Store,
    observer: &mut Observer<'_>,
) -> Result<PathBuf, Failure> {
    let client = Client::new(settings, id.repo)?;
    let (endpoint, revision) = (client.endpoint(), escape(id.revision, false));
    tell(observer, Progress::Asking { what: id.repo })?;
    let url = format!("{endpoint}/api/models/{}/revision/{revision}", id.repo);
    let info = client.get(&url)?;
    let bad =
        || Error::hub(format!("`{endpoint}` does not answer as a hub does at `{url}`")).with_hint("check HF_ENDPOINT");
    let info: Value = serde_json::from_slice(&info).map_err(|_| bad())?;
    let commit = info["sha"].as_str().filter(|sha| is_commit(sha)).ok_or_else(bad)?;
    let siblings = info["siblings"].as_array().ok_or_else(bad)?;
    // A name that could lead elsewhere is one that is never asked for.
    let names = siblings.iter().filter_map(|sibling| safe_name(sibling["rfilename"].as_str()?).ok());
    let names: Vec<String> = names.collect();

    let mut get = |name: &str| -> Result<(), Failure> {
        let pointer = store.pointer(commit, name);
        tell(observer, Progress::Asking { what: name })?;
        let url = format!("{endpoint}/{}/resolve/{commit}/{}", id.repo, escape(name, true));
        let metadata = client.metadata(&url)?;
        let blob = store.folder.join("blobs").join(&metadata.etag);
        for path in [&pointer, &blob] {
            if path.is_file()
                && let Some(reason) = damage(path, &metadata)?
            {
                tell(observer, Progress::Damaged { name, reason: &reason })?;
                // A link keeps leading to the content's place, where it is fetched to.
                let content = path.canonicalize().unwrap_or_else(|_| path.clone());
                std::fs::remove_file(&content).map_err(|source| Error::io("remove", &content, source))?;
            }
        }
        if pointer.is_file() {
            return Ok(());
        }
        make_folder(&blob)?;
        if !is_whole(&blob, &metadata)? {
            client.download(name, &url, &metadata, &blob, observer)?;
        }
        link(&blob, &pointer, name).map_err(Failure::from)
    };
    let choice = choice::choose(id.repo, &names, id.file)?;
    for name in &choice.files {
        get(name)?;
    }
    for shard in store.shards(commit, &choice)? {
        if !names.contains(&shard) {
            return Err(Error::hub(format!("`{}` has no file `{shard}`, which its index names", id.repo)).into());
        }
        get(&shard)?;
    }
    make_folder(&store.reference)?;
    std::fs::write(&store.reference, commit).map_err(|source| Error::io("write", &store.reference, source))?;
    Ok(store.target(commit, &choice))
}

/// A model's place in the cache.
struct Store {
    folder: PathBuf,
    /// Where the revision's commit is written.
    reference: PathBuf,
}

impl Store {
    fn new(cache: &Path, id: &HubId<'_>) -> Self {
        let folder = cache.join(format!("models--{}", id.repo.replace('/', "--")));
        let reference = folder.join("refs").join(id.revision);
        Self { folder, reference }
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    fn pointer(&self, commit: &str, name: &str) -> PathBuf {
        self.snapshot(commit).join(name)
    }

    fn target(&self, commit: &str, choice: &Choice) -> PathBuf {
        match &choice.target {
            Target::Folder("") => self.snapshot(commit),
            Target::Folder(name) => self.pointer(commit, name.trim_end_matches('/')),
            Target::File(name) => self.pointer(commit, name),
        }
    }

    /// The files that a snapshot's index names.
    fn shards(&self, commit: &str, choice: &Choice) -> Result<BTreeSet<String>> {
        let Some(index) = choice.index else { return Ok(BTreeSet::new()) };
        let path = self.pointer(commit, index);
        let text = std::fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
        let index: Value = serde_json::from_slice(bytes_without_bom(&text))
            .map_err(|error| Error::bad_file(&path, format!("it is not JSON: {error}")))?;
        let map = index["weight_map"].as_object().ok_or_else(|| Error::bad_file(&path, "it has no `weight_map`"))?;
        let shard = |name: &Value| {
            let name = name.as_str().ok_or_else(|| Error::bad_file(&path, "its `weight_map` holds what is no name"));
            name.and_then(safe_name)
        };
        map.values().map(shard).collect()
    }

    /// The copy that the revision's reference leads to, if all that is needed is there.
    ///
    /// # Errors
    /// [`Error::Hub`] if it has several GGUF files, none of which is asked for.
    fn complete(&self, id: &HubId<'_>) -> Result<Option<PathBuf>> {
        let commit = std::fs::read_to_string(&self.reference).unwrap_or_default();
        // A commit that is asked for by its own name may have no reference.
        let commit = if commit.is_empty() { id.revision } else { commit.trim() };
        let folder = self.snapshot(commit);
        if !is_commit(commit) || !folder.is_dir() {
            return Ok(None);
        }
        let mut names = Vec::new();
        list(&folder, "", MAX_DEPTH, &mut names);
        let choice = match choice::choose(id.repo, &names, id.file) {
            Ok(choice) => choice,
            Err(error) if id.file.is_none() && names.iter().filter(|name| has_extension(name, "gguf")).count() > 1 => {
                return Err(error);
            }
            Err(_) => return Ok(None),
        };
        let is_there = |name: &String| self.pointer(commit, name).is_file();
        let has_config = choice.target != Target::Folder("") || names.iter().any(|name| name == "config.json");
        let is_complete = has_config && self.shards(commit, &choice).is_ok_and(|shards| shards.iter().all(is_there));
        Ok(is_complete.then(|| self.target(commit, &choice)))
    }
}

/// Adds the names of the files in a folder, relative to it.
fn list(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else { continue };
        if path.is_file() {
            names.push(format!("{prefix}{name}"));
        } else if depth > 0 && path.is_dir() {
            list(&path, &format!("{prefix}{name}/"), depth - 1, names);
        }
    }
}

fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A file's name that cannot lead out of its folder.
fn safe_name(name: &str) -> Result<String> {
    let is_part = |part: &str| !matches!(part, "" | "." | "..");
    let is_safe = name.split('/').all(is_part) && !name.contains(['\\', ':']) && !name.contains(char::is_control);
    if is_safe {
        return Ok(name.to_owned());
    }
    Err(Error::hub(format!("the hub names a file `{name}`, which could lie outside of the model's folder")))
}

/// Escapes what has a meaning in an address.
///
/// * `keep_slash`: slashes stay
fn escape(text: &str, keep_slash: bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') || (byte == b'/' && keep_slash) {
            escaped.push(char::from(byte));
        } else {
            escaped.push('%');
            escaped.extend([byte >> 4, byte & 15].map(|digit| char::from(b"0123456789ABCDEF"[usize::from(digit)])));
        }
    }
    escaped
}

/// Makes the folder that a file is to lie in.
fn make_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(|source| Error::io("create", folder, source))
}

/// Makes a snapshot's file lead to its content.
fn link(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    make_folder(pointer)?;
    #[cfg(unix)]
    {
        // `snapshots/COMMIT`, and the folders in the file's name.
        let up = "../".repeat(2 + name.matches('/').count());
        let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
        let mut result = std::os::unix::fs::symlink(&target, pointer);
        if result.is_err() && !pointer.is_file() {
            // A link that leads nowhere is in the way; if there is none, there is nothing to remove.
            let _ = std::fs::remove_file(pointer);
            result = std::os::unix::fs::symlink(&target, pointer);
        }
        if result.is_ok() || pointer.is_file() {
            return Ok(());
        }
    }
    #[cfg(not(unix))]
    let _ = name;
    std::fs::rename(blob, pointer).map_err(|source| Error::io("create", pointer, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for name in ["../x", "/x", "a/../../x", "a\\x", "..\\x", "", "a//x", "./x", "C:x", "x\n", ".."] {
            assert!(safe_name(name).is_err(), "{name:?}");
        }
        assert_eq!(safe_name("a/x-1..gguf").unwrap(), "a/x-1..gguf");
    }

    #[test]
    fn the_token_is_not_shown() {
        let (cache, endpoint) = (PathBuf::new(), String::new());
        let settings = HubSettings { cache, endpoint, token: Some("secret".to_owned()), offline: false, proxy: None };
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(escape("a b/c?d#e%", true), "a%20b/c%3Fd%23e%25");
        assert_eq!(escape("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
