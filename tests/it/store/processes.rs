//! Several processes in one folder, and those that are killed there.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype};
use adaptive_kvcache::checkpoint::Loaded;
use adaptive_kvcache::saved::SavedCache;
use adaptive_kvcache::store::{PrefixStore, Told};
use tempfile::TempDir;

use super::{entries, prefixes, read_ids};
use crate::saved::{model, some_ids};

/// Names the folder that a process of these tests is to store in, and how often (0: until it is killed).
const PLACE: &str = "TEST_STORES_HERE";
const ROUNDS: &str = "TEST_STORES_ROUNDS";

const KILLS: u64 = 200;

/// Texts of different lengths, of which two are the beginning of another.
fn texts() -> Vec<Vec<u32>> {
    let long = some_ids(400, 1);
    let others = (2..5).map(|seed| some_ids(100 * seed, seed));
    [long[..100].to_vec(), long[..250].to_vec(), long].into_iter().chain(others).collect()
}

/// Room for about half of them.
fn limited(folder: &Path, caches: &[AdaptiveKvCache]) -> (PrefixStore, usize) {
    let limit = caches.iter().map(|cache| cache.bytes().kept).sum::<usize>() / 2;
    (PrefixStore::open(folder, limit).unwrap(), limit)
}

fn caches(loaded: &Loaded) -> Vec<AdaptiveKvCache> {
    texts().iter().map(|ids| read_ids(loaded, KvDtype::F16, None, ids)).collect()
}

/// Stores and looks up, in an order of its own.
fn work(folder: &Path, rounds: usize) {
    let loaded = model();
    let (texts, caches) = (texts(), caches(&loaded));
    let (store, _) = limited(folder, &caches);
    let prefixes = prefixes(&store, &loaded, KvDtype::F16, None).with_listener(|event| match event {
        Told::Found { .. } => {}
        other => panic!("{other:?}"),
    });
    let start = std::process::id() as usize;
    for round in 0.. {
        if rounds > 0 && round == rounds {
            return;
        }
        let (one, other) = ((start + round * 5) % texts.len(), (start + round) % texts.len());
        prefixes.put(&caches[one]);
        let prompt = [&texts[other][..], &[7, 8, 9]].concat();
        if let Some(found) = prefixes.longest(&prompt) {
            assert_eq!(found.ids(), &prompt[..found.seen()]);
        }
    }
}

/// Starts a process that works in a folder.
fn start(folder: &Path, rounds: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "store::processes::several_processes_use_one_folder"]);
    command.env(PLACE, folder).env(ROUNDS, rounds.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// All entries are whole, and what they say they are.
fn assert_whole(folder: &Path) {
    for path in entries(folder) {
        let saved = SavedCache::open(&path).unwrap_or_else(|error| panic!("{error}"));
        saved.check().unwrap();
        assert!(texts().contains(&saved.ids()), "{}", path.display());
    }
}

#[test]
fn several_processes_use_one_folder() {
    if let Some(folder) = std::env::var_os(PLACE) {
        return work(Path::new(&folder), std::env::var(ROUNDS).unwrap().parse().unwrap());
    }
    let folder = TempDir::new().unwrap();
    let mut processes: Vec<Child> = (0..3).map(|_| start(folder.path(), 60)).collect();
    for process in &mut processes {
        assert!(process.wait().unwrap().success());
    }
    assert_whole(folder.path());
    assert!(!entries(folder.path()).is_empty());
    let loaded = model();
    let (store, limit) = limited(folder.path(), &caches(&loaded));
    // One may have stored its last while another trimmed for what it was about to store.
    prefixes(&store, &loaded, KvDtype::F16, None).put(&read_ids(&loaded, KvDtype::F16, None, &some_ids(70, 9)));
    assert!(store.bytes().unwrap() <= limit as u64);
}

/// A process that stores and trims over and over again is killed at any moment: what is there is whole, and can be used.
#[test]
fn a_kill_at_any_moment_leaves_whole_entries() {
    let folder = TempDir::new().unwrap();
    let state = || {
        let mut state: Vec<_> = entries(folder.path())
            .into_iter()
            .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
            .collect();
        state.sort();
        state
    };
    for kill in 0..KILLS {
        let before = state();
        let mut working = start(folder.path(), 0);
        // It has begun once the folder is another.
        while state() == before {
            assert!(working.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(Duration::from_micros(300));
        }
        std::thread::sleep(Duration::from_micros(kill * 7919 % 9000));
        working.kill().unwrap();
        working.wait().unwrap();
        assert_whole(folder.path());
    }
    // What the killed ones have left goes when the next one opens the folder, and it goes on as if nothing had been.
    let loaded = model();
    let (store, _) = limited(folder.path(), &caches(&loaded));
    let prefixes = prefixes(&store, &loaded, KvDtype::F16, None);
    let ids = some_ids(120, 8);
    assert!(prefixes.try_put(&read_ids(&loaded, KvDtype::F16, None, &ids)).unwrap());
    assert_eq!(prefixes.longest(&ids).unwrap().seen(), 119);
    let names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}
