//! The prefix store: what is found is what was read, cut exactly; it is held once, within the limit, and whole whoever else
//! uses the folder.

#[cfg(unix)]
mod processes;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::generate::{Batch, BatchLimits, BatchPrompt, Conversation, GenerationOptions};
use adaptive_kvcache::saved::SavedCache;
use adaptive_kvcache::store::{PrefixStore, Prefixes, Told};
use candle_core::quantized::GgmlDType;
use tempfile::TempDir;

use crate::saved::{go_on, model, read, some_ids};
use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, max_difference, smollm2};

const REPLAY: &str = r#"{"method": "replay", "kept_ratio": 0.5}"#;
const EVICT: &str = r#"{"method": "h2o", "kept_ratio": 0.5, "decode": "evict"}"#;

/// Logits of one text that was read in one piece, or in two, in f32: additions come in another order.
const ORDER: f32 = 1e-4;

fn retention(loaded: &Loaded, config: Option<&str>) -> Retention {
    config.map_or(Retention::Full, |config| adaptive(&loaded.tokenizer, config))
}

fn store(folder: &Path) -> PrefixStore {
    PrefixStore::open(folder, PrefixStore::DEFAULT_LIMIT).unwrap()
}

fn prefixes<'a>(store: &PrefixStore, loaded: &'a Loaded, dtype: KvDtype, config: Option<&str>) -> Prefixes<'a> {
    store.prefixes(loaded, dtype, &retention(loaded, config)).unwrap()
}

/// The entries of a folder.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "kv")).collect()
}

/// The tokens of all entries, ascending.
fn lengths(folder: &Path) -> Vec<usize> {
    let mut lengths: Vec<usize> =
        entries(folder).iter().map(|path| SavedCache::open(path).unwrap().num_tokens()).collect();
    lengths.sort_unstable();
    lengths
}

fn read_ids(loaded: &Loaded, dtype: KvDtype, config: Option<&str>, ids: &[u32]) -> AdaptiveKvCache {
    let mut cache = loaded.model.new_cache(dtype, retention(loaded, config)).unwrap();
    loaded.model.prefill(ids, &mut cache, &mut ()).unwrap();
    cache
}

#[test]
fn a_whole_prefix_goes_on_bit_by_bit() {
    let loaded = model();
    for dtype in [KvDtype::F16, KvDtype::Q8_0, KvDtype::Q4_0] {
        for config in [None, Some(REPLAY), Some(EVICT), Some(r#"{"method": "replay", "refit": true}"#)] {
            let case = format!("{dtype:?} {config:?}");
            let folder = TempDir::new().unwrap();
            let prefixes = prefixes(&store(folder.path()), &loaded, dtype, config);
            let before = read(&loaded, dtype, config, 200);
            assert!(prefixes.longest(&some_ids(200, 1)).is_none(), "{case}");
            assert!(prefixes.try_put(&before).unwrap(), "{case}");
            let prompt = [some_ids(200, 1), some_ids(7, 5)].concat();
            let found = prefixes.longest(&prompt).unwrap();
            assert_eq!(found.ids(), &prompt[..200], "{case}");
            go_on(&loaded.model, &mut [before, found], &case);
        }
    }
}

/// What came after the last prompt can be taken back exactly; what a profile has decided can't.
#[test]
fn a_compressed_prefix_goes_back_to_its_last_prompt_and_no_further() {
    let loaded = model();
    for dtype in [KvDtype::F16, KvDtype::Mixed, KvDtype::Q8_0] {
        let folder = TempDir::new().unwrap();
        let prefixes = prefixes(&store(folder.path()), &loaded, dtype, Some(REPLAY));
        let mut cache = read(&loaded, dtype, Some(REPLAY), 150);
        let answer = some_ids(70, 2);
        let mut at = Vec::new();
        for &id in &answer {
            at.push(cache.clone());
            loaded.model.decode(id, &mut cache).unwrap();
        }
        prefixes.put(&cache);
        for taken in [0, 1, 33, 69] {
            let prompt = [&some_ids(150, 1)[..], &answer[..taken], &[3, 4, 5]].concat();
            let found = prefixes.longest(&prompt).unwrap();
            assert_eq!(found.seen(), 150 + taken);
            go_on(&loaded.model, &mut [at[taken].clone(), found], &format!("{dtype:?}, {taken} of the answer"));
        }
        assert!(prefixes.longest(&[&some_ids(149, 1)[..], &[1, 2]].concat()).is_none());
        // The next token's logits come from a token that is read.
        assert!(prefixes.longest(&some_ids(150, 1)).is_none());
    }
    // Where rows go while tokens are generated, all or nothing.
    let folder = TempDir::new().unwrap();
    let prefixes = prefixes(&store(folder.path()), &loaded, KvDtype::F16, Some(EVICT));
    let mut cache = read(&loaded, KvDtype::F16, Some(EVICT), 150);
    loaded.model.decode(7, &mut cache).unwrap();
    prefixes.put(&cache);
    assert!(prefixes.longest(&[&some_ids(150, 1)[..], &[8, 9]].concat()).is_none());
    assert_eq!(prefixes.longest(&[&some_ids(150, 1)[..], &[7, 9]].concat()).unwrap().seen(), 151);
}

/// The logits are those of a text that is read anew, but for the order of additions and the numbers that rows are stored in.
#[test]
fn a_full_prefix_is_cut_anywhere() {
    let loaded = model();
    let ids = some_ids(400, 1);
    let rest = some_ids(20, 6);
    let close = [(KvDtype::F32, ORDER), (KvDtype::F16, 3e-2), (KvDtype::Q8_0, 1e-1), (KvDtype::Mixed, 1.0)];
    for (dtype, tolerance) in close {
        let folder = TempDir::new().unwrap();
        let prefixes = prefixes(&store(folder.path()), &loaded, dtype, None);
        let mut whole = read_ids(&loaded, dtype, None, &ids[..300]);
        for &id in &ids[300..] {
            loaded.model.decode(id, &mut whole).unwrap();
        }
        prefixes.put(&whole);
        for common in [64, 79, 80, 81, 160, 250, 300, 333, 399, 400] {
            let case = format!("{common} tokens, {dtype:?}");
            let prompt = [&ids[..common], &rest].concat();
            let mut found = prefixes.longest(&prompt).unwrap();
            assert_eq!(found.ids(), &ids[..common], "{case}");
            assert!(found.bytes().mapped > found.bytes().kept / 2, "{case}: {:?}", found.bytes());
            // The same cut of what never was in a file.
            let mut cut = whole.clone();
            cut.keep_first(common).unwrap();
            go_on(&loaded.model, &mut [cut, found.clone()], &case);
            let logits = loaded.model.prefill(&rest, &mut found, &mut ()).unwrap().logits;
            let mut fresh = loaded.full_cache(dtype).unwrap();
            let expected = loaded.model.prefill(&prompt, &mut fresh, &mut ()).unwrap().logits;
            let difference = max_difference(&logits, &expected);
            assert!(difference <= tolerance, "{case}: {difference}");
            assert_eq!((found.seen(), found.bytes().kept), (fresh.seen(), fresh.bytes().kept), "{case}");
        }
        // One that is the prompt itself leaves its last token to be read; a few tokens are no prefix.
        assert_eq!(prefixes.longest(&ids).unwrap().seen(), 399);
        assert!(prefixes.longest(&[&ids[..63], &rest].concat()).is_none());
        assert!(prefixes.longest(&ids[..40]).is_none() && prefixes.longest(&[]).is_none());
        assert_eq!(lengths(folder.path()), [400]);
    }
}

#[test]
fn only_full_caches_are_cut() {
    let loaded = model();
    let mut cache = read(&loaded, KvDtype::F16, Some(REPLAY), 100);
    assert!(matches!(cache.keep_first(50), Err(Error::Unsupported { .. })));
    assert_eq!(cache.seen(), 100);
    let mut cache = read(&loaded, KvDtype::F16, None, 100);
    assert!(matches!(cache.keep_first(101), Err(Error::Shape { .. })));
    cache.keep_first(100).unwrap();
    cache.keep_first(0).unwrap();
    assert_eq!((cache.seen(), cache.bytes().kept), (0, 0));
    let mut fresh = loaded.full_cache(KvDtype::F16).unwrap();
    let logits =
        [&mut cache, &mut fresh].map(|cache| loaded.model.prefill(&some_ids(30, 3), cache, &mut ()).unwrap().logits);
    assert_eq!(logits[0], logits[1]);
}

#[test]
fn a_prefix_is_held_once() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let full = prefixes(&store(folder.path()), &loaded, KvDtype::F16, None);
    let put = |prefixes: &Prefixes<'_>, config: Option<&str>, ids: &[u32]| {
        prefixes.try_put(&read_ids(&loaded, KvDtype::F16, config, ids)).unwrap()
    };
    let ids = some_ids(400, 1);
    assert!(!put(&full, None, &ids[..63]), "a short one is not worth it");
    assert!(put(&full, None, &ids[..100]));
    assert!(!put(&full, None, &ids[..100]) && !put(&full, None, &ids[..80]));
    // A longer one takes the place of what it begins with, once it is longer by something.
    assert!(!put(&full, None, &ids[..163]));
    assert!(put(&full, None, &ids[..164]));
    assert_eq!(lengths(folder.path()), [164]);
    assert!(put(&full, None, &[&ids[..70], &some_ids(200, 9)].concat()));
    assert_eq!(lengths(folder.path()), [164, 270]);
    // A compressed one can't be had of another.
    let replay = prefixes(&store(folder.path()), &loaded, KvDtype::F16, Some(REPLAY));
    assert!(put(&replay, Some(REPLAY), &ids[..100]) && put(&replay, Some(REPLAY), &ids[..200]));
    assert!(!put(&replay, Some(REPLAY), &ids[..200]));
    assert_eq!(lengths(folder.path()), [100, 164, 200, 270]);
    assert_eq!(replay.longest(&ids[..150]).unwrap().seen(), 100);
    assert_eq!(replay.longest(&ids[..250]).unwrap().seen(), 200);
    let wrong = full.try_put(&read_ids(&loaded, KvDtype::F16, Some(REPLAY), &ids[..300]));
    assert!(matches!(wrong, Err(Error::Input { .. })));
    let wrong = full.try_put(&read_ids(&loaded, KvDtype::F32, None, &ids[..300]));
    assert!(matches!(wrong, Err(Error::Input { .. })));
}

#[test]
fn caches_of_another_kind_are_not_found() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let store = store(folder.path());
    let ids = some_ids(200, 1);
    prefixes(&store, &loaded, KvDtype::F16, None).put(&read_ids(&loaded, KvDtype::F16, None, &ids[..150]));
    let rounded = Fixture::read("head-dim").load(GgmlDType::F32, WeightDtype::F16);
    let other = Fixture::read("head-dim").load(GgmlDType::F16, WeightDtype::Auto);
    let shape = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let told = Mutex::new(Vec::new());
    for (loaded, dtype, config) in [
        (&loaded, KvDtype::F32, None),
        (&loaded, KvDtype::F16, Some(REPLAY)),
        (&rounded, KvDtype::F16, None),
        (&other, KvDtype::F16, None),
        (&shape, KvDtype::F16, None),
    ] {
        let prefixes = prefixes(&store, loaded, dtype, config).with_listener(|event| match event {
            Told::Found { tokens, of } => told.lock().unwrap().push((tokens, of)),
            other => panic!("{other:?}"),
        });
        assert!(prefixes.longest(&ids).is_none());
    }
    assert_eq!(*told.lock().unwrap(), [(0, 200); 5]);
    assert!(prefixes(&store, &loaded, KvDtype::F16, None).longest(&ids).is_some());
    let candle = Fixture::read("head-dim").load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::Auto);
    let refused = store.prefixes(&candle, KvDtype::F16, &Retention::Full).unwrap_err();
    assert!(matches!(refused, Error::Unsupported { .. }) && refused.hint().is_some(), "{refused}");
}

#[test]
fn what_is_damaged_is_told_once_removed_and_never_used() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let store = store(folder.path());
    let ids = some_ids(200, 1);
    let told = Mutex::new(Vec::new());
    let prefixes = prefixes(&store, &loaded, KvDtype::F16, None).with_listener(|event| match event {
        Told::Unusable(error) => told.lock().unwrap().push(error.to_string()),
        Told::Found { .. } => {}
        Told::NotStored(error) => panic!("{error}"),
    });
    let cache = read_ids(&loaded, KvDtype::F16, None, &ids[..150]);
    prefixes.put(&cache);
    let path = entries(folder.path()).pop().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let damaged = [
        changed(3),
        changed(70),
        changed(whole.len() / 2),
        changed(whole.len() - 80),
        whole[..whole.len() / 3].to_vec(),
        Vec::new(),
        b"GGUF\x03\0\0\0".to_vec(),
    ];
    for (case, bytes) in damaged.into_iter().enumerate() {
        std::fs::write(&path, &bytes).unwrap();
        assert!(prefixes.longest(&ids).is_none(), "case {case}");
        assert!(!path.exists(), "case {case}");
        // It is stored anew.
        assert!(prefixes.try_put(&cache).unwrap(), "case {case}");
        assert_eq!(prefixes.longest(&ids).unwrap().seen(), 150, "case {case}");
    }
    // One of another version of the format is not this program's to judge.
    let mut newer = whole.clone();
    newer[8] = 99;
    std::fs::write(&path, newer).unwrap();
    assert!(prefixes.longest(&ids).is_none() && path.exists());
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1, "one file, which is told of once: {told:?}");
    assert!(told[0].contains("prefix-"), "{told:?}");
}

#[test]
fn a_name_that_lies_and_files_of_others() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let store = store(folder.path());
    let ids = some_ids(200, 1);
    let told = Mutex::new(0);
    let count = |event: Told<'_>| *told.lock().unwrap() += usize::from(matches!(event, Told::Unusable(_)));
    let full = prefixes(&store, &loaded, KvDtype::F16, None).with_listener(count);
    let replay = prefixes(&store, &loaded, KvDtype::F16, Some(REPLAY));
    full.put(&read_ids(&loaded, KvDtype::F16, None, &ids[..100]));
    let path = entries(folder.path()).pop().unwrap();
    replay.put(&read_ids(&loaded, KvDtype::F16, Some(REPLAY), &ids[..150]));
    let other = entries(folder.path()).into_iter().find(|other| *other != path).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert!(full.longest(&ids).is_none());
    assert_eq!((*told.lock().unwrap(), entries(folder.path()).len()), (1, 0));
    // A cache of somebody's own is neither used nor removed, and neither is anything else.
    loaded.save_cache(&read_ids(&loaded, KvDtype::F16, None, &ids[..150]), folder.path().join("book.kv")).unwrap();
    std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(full.longest(&ids).is_none());
    let small = PrefixStore::open(folder.path(), 1).unwrap();
    let small = prefixes(&small, &loaded, KvDtype::F16, None);
    small.put(&read_ids(&loaded, KvDtype::F16, None, &ids[..100]));
    for name in ["book.kv", "notes.txt", path.file_name().unwrap().to_str().unwrap()] {
        assert!(folder.path().join(name).exists(), "{name}");
    }
}

#[test]
fn the_limit_holds_and_what_was_used_last_stays() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let text = |seed: usize| some_ids(100, seed);
    let caches: Vec<AdaptiveKvCache> = (1..7).map(|seed| read_ids(&loaded, KvDtype::F16, None, &text(seed))).collect();
    let one = prefixes(&store(folder.path()), &loaded, KvDtype::F16, None);
    one.put(&caches[0]);
    let size = usize::try_from(store(folder.path()).bytes().unwrap()).unwrap();
    let limited = PrefixStore::open(folder.path(), 3 * size + size / 2).unwrap();
    let prefixes = prefixes(&limited, &loaded, KvDtype::F16, None);
    let is_there = |seed: usize| prefixes.longest(&[text(seed), vec![1, 2]].concat()).is_some();
    // Times of files may be coarse.
    let later = || std::thread::sleep(std::time::Duration::from_millis(20));
    for cache in &caches[1..3] {
        later();
        prefixes.put(cache);
    }
    later();
    assert!(is_there(1));
    for cache in &caches[3..5] {
        later();
        prefixes.put(cache);
        assert!(limited.bytes().unwrap() <= 3 * size as u64 + size as u64 / 2);
    }
    assert_eq!((1..7).map(is_there).collect::<Vec<_>>(), [true, false, false, true, true, false]);
    // What is larger than the limit leaves all as it was, and is told once.
    let told = Mutex::new(Vec::new());
    let tiny = PrefixStore::open(folder.path(), size / 2).unwrap();
    let tiny = tiny.prefixes(&loaded, KvDtype::F16, &Retention::Full).unwrap().with_listener(|event| match event {
        Told::NotStored(error) => told.lock().unwrap().push(error.to_string()),
        other => panic!("{other:?}"),
    });
    tiny.put(&caches[5]);
    tiny.put(&caches[5]);
    assert_eq!(lengths(folder.path()), [100; 3]);
    assert!(matches!(&told.lock().unwrap()[..], [one] if one.contains("limit")));
    let barely = PrefixStore::open(folder.path(), size - 1).unwrap();
    let barely = barely.prefixes(&loaded, KvDtype::F16, &Retention::Full).unwrap();
    assert!(matches!(barely.try_put(&caches[5]), Err(Error::Input { .. })));
    assert!(limited.bytes().unwrap() < size as u64, "no more than what may be there");
}

#[test]
fn folders_that_cannot_be_are_refused() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("file"), "x").unwrap();
    for bad in [folder.path().join("file"), folder.path().join("file/deeper")] {
        assert!(matches!(PrefixStore::open(&bad, 100), Err(Error::Io { .. })), "{bad:?}");
    }
    assert!(matches!(PrefixStore::open("", 100), Err(Error::Input { .. })));
    let deep = folder.path().join("a/b");
    assert_eq!(PrefixStore::open(&deep, 100).unwrap().bytes().unwrap(), 0);
    assert!(deep.is_dir());
    // A folder that goes while it is in use loses prefixes and nothing else.
    let loaded = model();
    let told = Mutex::new(0);
    let prefixes = prefixes(&store(&deep), &loaded, KvDtype::F16, None)
        .with_listener(|event| *told.lock().unwrap() += usize::from(matches!(event, Told::NotStored(_))));
    std::fs::remove_dir(&deep).unwrap();
    assert!(prefixes.longest(&some_ids(100, 1)).is_none());
    prefixes.put(&read(&loaded, KvDtype::F16, None, 100));
    assert_eq!(*told.lock().unwrap(), 1);
}

/// A batch and conversations look up and store by themselves, and their texts stay the same.
#[test]
fn a_batch_reads_what_its_prompts_share_once() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let prefixes = prefixes(&store(folder.path()), &loaded, KvDtype::F32, None);
    let shared = some_ids(200, 1);
    let run = |prefixes: Option<&Prefixes<'_>>| {
        let prompt = |index: usize| {
            let ids = [&shared[..], &some_ids(10, 20 + index)].concat();
            BatchPrompt { name: format!("prompt {index}"), ids, options: None }
        };
        let limits = BatchLimits { sequences: 3, kv_bytes: None };
        let options = GenerationOptions { max_new_tokens: 8, ignore_eos: true, ..GenerationOptions::default() };
        let cache = loaded.full_cache(KvDtype::F32).unwrap();
        let prompts = (0..5).map(prompt).collect();
        let mut batch = Batch::new(&loaded.model, &loaded.tokenizer, cache, prompts, &options, limits)
            .unwrap()
            .with_prefixes(prefixes);
        let mut texts = Vec::new();
        let summary = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text)).unwrap();
        texts.sort_by_key(|text| text.index);
        let texts: Vec<_> = texts.into_iter().map(|text| (text.prompt_tokens, text.ids)).collect();
        (summary.prompt_tokens, texts)
    };
    let (all, expected) = run(None);
    assert_eq!(all, 5 * 210);
    assert_eq!(run(Some(&prefixes)), (210 + 4 * 10, expected.clone()));
    // All of the first prompt but its last token, and of the others what they share with it.
    assert_eq!(run(Some(&prefixes)), (1 + 4 * 10, expected));
    assert_eq!(lengths(folder.path()), [210]);
}

#[test]
fn a_conversation_that_is_read_anew_is_found() {
    let (loaded, folder) = (smollm2(), TempDir::new().unwrap());
    let store = store(folder.path());
    let prefixes = prefixes(&store, loaded, KvDtype::F32, None);
    let long = "Please remember that my cat is called Fix, that my dog is called Aouda, that the club opens at nine and \
                closes at midnight but on Sundays, and that its library was founded by Passepartout in the year 1836. \
                What is my cat called?";
    let talk = |prefixes: Option<&Prefixes<'_>>| {
        let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
        let conversation = Conversation::new(model, tokenizer, KvDtype::F32, Retention::Full, Vec::new()).unwrap();
        let mut conversation = conversation.with_prefixes(prefixes);
        let options = GenerationOptions { max_new_tokens: 24, ..GenerationOptions::default() };
        let mut read = Vec::new();
        for question in [long, "And my dog?"] {
            let turn = conversation.ask(question, &options, &mut (), &mut |_| ControlFlow::Continue(())).unwrap();
            read.push(turn.prompt_tokens);
            if let Some(prefixes) = prefixes {
                prefixes.put(conversation.cache());
            }
        }
        (read, conversation.messages().to_vec())
    };
    let (read, expected) = talk(None);
    assert_eq!(talk(Some(&prefixes)), (read.clone(), expected.clone()));
    let (again, messages) = talk(Some(&prefixes));
    // The first turn's last token is read; the second follows on what the cache holds, as ever.
    assert_eq!((again, messages), (vec![1, read[1]], expected.clone()));
    // What can't be used leaves nothing behind: the answer is that of a fresh cache.
    let [path] = &entries(folder.path())[..] else { panic!("{:?}", lengths(folder.path())) };
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
    assert_eq!(talk(Some(&prefixes)), (read, expected));
}
