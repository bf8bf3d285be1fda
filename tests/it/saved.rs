//! Caches in files: what goes on from one is what goes on without, bit by bit; what is damaged or of another model is refused.

use std::path::{Path, PathBuf};

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{self, Loaded, WeightDtype};
use adaptive_kvcache::compress::{AdaptiveConfig, METHODS};
use adaptive_kvcache::model::Llama;
use adaptive_kvcache::saved::{Dialogue, SavedCache};
use adaptive_kvcache::tokenizer::{ChatInput, ChatMessage};
use candle_core::quantized::GgmlDType;
use serde_json::Value;
use tempfile::TempDir;

use crate::fuzz::tokenizers::byte_level;
use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, data};

/// Heads of 32 numbers, which there are blocks for.
pub fn model() -> Loaded {
    Fixture::read("head-dim").load(GgmlDType::F32, WeightDtype::Auto)
}

/// Ids without much of a pattern.
pub fn some_ids(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| u32::try_from((7 * i * i + 5 * i + 11 * seed) % 961 + 3).unwrap()).collect()
}

pub fn read(loaded: &Loaded, dtype: KvDtype, config: Option<&str>, tokens: usize) -> AdaptiveKvCache {
    let retention = config.map_or(Retention::Full, |config| adaptive(&loaded.tokenizer, config));
    let mut cache = loaded.model.new_cache(dtype, retention).unwrap();
    loaded.model.prefill(&some_ids(tokens, 1), &mut cache, &mut ()).unwrap();
    cache
}

/// Gives both caches the same tokens, one by one, in runs and as a further prompt, and compares all logits.
pub fn go_on(model: &Llama, caches: &mut [AdaptiveKvCache; 2], case: &str) {
    let [one, other] = caches;
    let same = |one: &[f32], other: &[f32], when: &str| {
        assert!(one.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}: {when}");
    };
    for (step, id) in some_ids(40, 2).into_iter().enumerate() {
        same(&model.decode(id, one).unwrap(), &model.decode(id, other).unwrap(), &format!("token {step}"));
    }
    if one.retention().eviction().is_none() && model.config().sliding_window.is_none() {
        let (mut logits, mut others) = (Vec::new(), Vec::new());
        model.decode_run(&[5, 6, 7, 8], one, &mut logits).unwrap();
        model.decode_run(&[5, 6, 7, 8], other, &mut others).unwrap();
        same(&logits, &others, "a run");
        model.take_back(3, one).unwrap();
        model.take_back(3, other).unwrap();
    }
    let prompt = some_ids(30, 3);
    let logits = [&mut *one, &mut *other].map(|cache| model.prefill(&prompt, cache, &mut ()).unwrap().logits);
    same(&logits[0], &logits[1], "a prompt");
    for id in some_ids(5, 4) {
        same(&model.decode(id, one).unwrap(), &model.decode(id, other).unwrap(), "after a prompt");
    }
    assert_eq!((one.ids(), one.bytes().kept), (other.ids(), other.bytes().kept), "{case}");
}

/// Every method, and those that go on evicting.
fn configurations() -> Vec<Option<String>> {
    let methods = METHODS.iter().map(|method| format!(r#"{{"method": "{}", "kept_ratio": 0.7}}"#, method.name()));
    let evict = METHODS.iter().filter(|method| method.eviction().is_some());
    let evict =
        evict.map(|method| format!(r#"{{"method": "{}", "kept_ratio": 0.7, "decode": "evict"}}"#, method.name()));
    let search = [
        r#"{"criterion": "mass", "recovery_threshold": 0.9}"#,
        r#"{"criterion": "mass", "recovery_threshold": 0.9, "decode": "evict"}"#,
        r#"{"method": "replay", "kept_ratio": 0.4, "refit": true}"#,
    ];
    let configs = methods.chain(evict).chain(search.map(str::to_owned));
    std::iter::once(None).chain(configs.map(Some)).collect()
}

#[test]
fn every_method_goes_on_bit_by_bit() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    for config in configurations() {
        // Row counts before, at and behind the ends of tiles, and more than a block of scores.
        for tokens in [180, 208] {
            let case = format!("{config:?}, {tokens} tokens");
            let before = read(&loaded, KvDtype::F16, config.as_deref(), tokens);
            let path = folder.path().join("a.kv");
            loaded.save_cache(&before, &path).unwrap();
            let after = loaded.saved_cache(&path).unwrap();
            assert_eq!(after.retention().eviction().is_some(), before.retention().eviction().is_some(), "{case}");
            let bytes = after.bytes();
            assert!(bytes.mapped > bytes.kept / 2 && bytes.kept == before.bytes().kept, "{case}: {bytes:?}");
            go_on(&loaded.model, &mut [before, after], &case);
        }
    }
}

#[test]
fn every_format_goes_on_bit_by_bit_wherever_it_was_saved() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    for dtype in KvDtype::ALL {
        for config in [None, Some(r#"{"method": "replay", "kept_ratio": 0.8}"#)] {
            for (tokens, decoded) in [(200, 0), (160, 50), (3, 1), (160, 16)] {
                let case = format!("{dtype:?}, {config:?}, {tokens} + {decoded} tokens");
                let mut before = read(&loaded, dtype, config, tokens);
                for id in some_ids(decoded, 9) {
                    loaded.model.decode(id, &mut before).unwrap();
                }
                loaded.save_cache(&before, &path).unwrap();
                let after = loaded.saved_cache(&path).unwrap();
                // Forks share what is mapped, do not see one another, and grow by little more than their own rows.
                let mut fork = after.clone();
                loaded.model.decode(7, &mut fork).unwrap();
                let (new, rows) = (fork.bytes(), 8 * (16 + 16));
                assert!(
                    new.allocated <= after.bytes().allocated + rows * fork.token_bytes().max(68),
                    "{case}: {new:?}"
                );
                go_on(&loaded.model, &mut [before, after], &case);
            }
        }
    }
}

#[test]
fn a_saved_cache_is_saved_again_as_it_was() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let [one, other] = ["a.kv", "b.kv"].map(|name| folder.path().join(name));
    for dtype in KvDtype::ALL {
        loaded.save_cache(&read(&loaded, dtype, Some(r#"{"method": "snapkv"}"#), 150), &one).unwrap();
        loaded.save_cache(&loaded.saved_cache(&one).unwrap(), &other).unwrap();
        assert!(std::fs::read(&one).unwrap() == std::fs::read(&other).unwrap(), "{dtype:?}");
    }
}

#[test]
fn layers_with_a_window_and_other_rotations() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.kv");
    for name in ["mistral-window", "qwen2-window", "qwen3", "yarn", "dynamic"] {
        // They come without a tokenizer.
        let model = folder.path().join(name);
        std::fs::create_dir(&model).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(data("checkpoints").join(name).join(file), model.join(file)).unwrap();
        }
        let mut tokenizer = byte_level(60, &Value::Null, Vec::new());
        tokenizer["model"]["merges"] = Value::Array(Vec::new());
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let loaded = checkpoint::load(&model, WeightDtype::F32).unwrap();
        let ids: Vec<u32> = some_ids(60, 1).into_iter().map(|id| id % 61).collect();
        let mut before = loaded.full_cache(KvDtype::F16).unwrap();
        loaded.model.prefill(&ids, &mut before, &mut ()).unwrap();
        loaded.save_cache(&before, &path).unwrap();
        let mut after = loaded.saved_cache(&path).unwrap();
        for &id in &ids[..20] {
            let logits = [&mut before, &mut after].map(|cache| loaded.model.decode(id, cache).unwrap());
            assert_eq!(logits[0], logits[1], "{name}");
        }
    }
}

#[test]
fn an_empty_cache_can_be_saved() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    for config in [None, Some(r#"{"method": "h2o", "decode": "evict"}"#)] {
        let retention = config.map_or(Retention::Full, |config| adaptive(&loaded.tokenizer, config));
        let mut before = loaded.model.new_cache(KvDtype::Q8_0, retention).unwrap();
        loaded.save_cache(&before, &path).unwrap();
        SavedCache::open(&path).unwrap().check().unwrap();
        let mut after = loaded.saved_cache(&path).unwrap();
        assert_eq!((after.seen(), after.bytes().kept), (0, 0));
        let ids = some_ids(40, 1);
        let logits = [&mut before, &mut after].map(|cache| loaded.model.prefill(&ids, cache, &mut ()).unwrap().logits);
        assert_eq!(logits[0], logits[1]);
        go_on(&loaded.model, &mut [before, after], "empty");
    }
}

#[test]
fn what_a_file_says_of_itself() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    let config = r#"{"method": "replay", "kept_ratio": 0.25}"#;
    let mut cache = read(&loaded, KvDtype::Q8_0, Some(config), 200);
    loaded.model.decode(999, &mut cache).unwrap();
    let input = ChatInput {
        messages: vec![ChatMessage::new("user", "Who?"), ChatMessage::new("assistant", "I")],
        ..ChatInput::default()
    };
    let dialogue = Dialogue { input, opening: 1, unread: Some(17) };
    loaded.save_dialogue(&cache, Some(&dialogue), &path).unwrap();
    let saved = SavedCache::open(&path).unwrap();
    assert_eq!(saved.ids(), cache.ids());
    assert_eq!(saved.dialogue().unwrap(), Some(dialogue));
    assert_eq!(saved.config().unwrap().unwrap(), AdaptiveConfig::parse(config, None).unwrap());
    assert_eq!(
        (saved.kv_dtype(), saved.num_tokens(), saved.layout()),
        (KvDtype::Q8_0, 201, loaded.model.config().heads)
    );
    assert_eq!(saved.kept_and_raw_bytes(), (cache.bytes().kept, cache.bytes().raw));
    assert_eq!(saved.file_bytes() as u64, path.metadata().unwrap().len());
    saved.check().unwrap();
}

/// A byte that is changed anywhere, and an end that is missing, are found without a model.
#[test]
fn damage_is_found_wherever_it_is() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    loaded.save_cache(&read(&loaded, KvDtype::Q4_0, Some(r#"{"method": "replay"}"#), 60), &path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let verdict = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        SavedCache::open(&path).and_then(|saved| saved.check())
    };
    verdict(&whole).unwrap();
    let step = if cfg!(debug_assertions) { 7 } else { 1 };
    for at in (0..whole.len()).step_by(step) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let error = verdict(&bytes).expect_err(&format!("byte {at}"));
        assert!(error.to_string().contains("a.kv") && error.hint().is_some(), "byte {at}: {error}");
    }
    for len in (0..whole.len()).step_by(61).chain([whole.len() - 1]) {
        let error = verdict(&whole[..len]).expect_err(&format!("{len} bytes"));
        assert!(error.to_string().contains("a.kv"), "{len} bytes: {error}");
    }
    assert!(verdict(&[&whole[..], b"\0"].concat()).is_err());
}

#[test]
fn a_file_of_another_model_is_refused_with_what_differs() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    loaded.save_cache(&read(&loaded, KvDtype::F16, None, 20), &path).unwrap();
    let refusal = |loaded: &Loaded| loaded.saved_cache(&path).unwrap_err().to_string();
    let other = refusal(&Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto));
    for part in ["a.kv", "another model", "KV heads 4, here 2", "head dimension 32, here 8"] {
        assert!(other.contains(part), "{other}");
    }
    // The same text, rounded otherwise: nothing but the weights.
    let rounded = refusal(&Fixture::read("head-dim").load(GgmlDType::F16, WeightDtype::Auto));
    assert!(rounded.contains("weights") && !rounded.contains("vocabulary") && !rounded.contains("heads"), "{rounded}");
    let candle = Fixture::read("head-dim").load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::Auto);
    let cache = candle.full_cache(KvDtype::F16).unwrap();
    for error in [candle.saved_cache(&path).unwrap_err(), candle.save_cache(&cache, &path).unwrap_err()] {
        assert!(matches!(error, Error::Unsupported { .. }) && error.hint().is_some(), "{error}");
    }
    SavedCache::open(&path).unwrap().check().unwrap();
}

#[test]
fn files_that_are_none_are_called_by_their_names() {
    let folder = TempDir::new().unwrap();
    let (loaded, path) = (model(), folder.path().join("a.kv"));
    let opened = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        SavedCache::open(&path).unwrap_err().to_string()
    };
    assert!(opened(b"GGUF\x03\0\0\0").contains("GGUF"), "{}", opened(b"GGUF\x03\0\0\0"));
    assert!(opened(b"").contains("a.kv"));
    loaded.save_cache(&read(&loaded, KvDtype::F16, None, 20), &path).unwrap();
    let mut newer = std::fs::read(&path).unwrap();
    newer[8] = 3;
    assert!(opened(&newer).contains("version 3"), "{}", opened(&newer));
    assert!(matches!(SavedCache::open(folder.path()), Err(Error::Unsupported { .. })));
    assert!(matches!(SavedCache::open(PathBuf::from("missing.kv")), Err(Error::Io { .. })));
    // And a saved cache is no model.
    std::fs::write(&path, b"AKVCACHE\x02\0\0\0").unwrap();
    let error = checkpoint::open(&path).unwrap_err();
    assert!(error.to_string().contains("a cache that this program has saved"), "{error}");
}

#[test]
fn what_cannot_be_written_leaves_what_was_there() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    let cache = read(&loaded, KvDtype::F16, None, 20);
    std::fs::write(&path, "old").unwrap();
    for bad in [folder.path().join("missing/a.kv"), folder.path().to_owned(), Path::new("").to_owned()] {
        assert!(loaded.save_cache(&cache, &bad).is_err(), "{bad:?}");
    }
    #[cfg(unix)]
    assert!(loaded.save_cache(&cache, "/dev/null").unwrap_err().to_string().contains("no regular file"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// What is stored beside kept keys, values and positions: at most 2 % for a text of some length.
#[test]
fn a_file_is_hardly_larger_than_what_is_kept() {
    let (loaded, folder) = (crate::support::smollm2(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    let text = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    let ids = &loaded.tokenizer.encode(&text).unwrap()[..512];
    for (dtype, config) in [(KvDtype::F16, "full"), (KvDtype::Q8_0, r#"{"method": "replay"}"#)] {
        let retention = if config == "full" { Retention::Full } else { adaptive(&loaded.tokenizer, config) };
        let mut before = loaded.model.new_cache(dtype, retention).unwrap();
        let logits = loaded.model.prefill(ids, &mut before, &mut ()).unwrap().logits;
        loaded.save_cache(&before, &path).unwrap();
        let rows: usize = before.ledgers().iter().map(|ledger| ledger.num_rows()).sum();
        let (file, kept) = (path.metadata().unwrap().len() as usize, before.bytes().kept);
        assert!((file as f64) < 1.02 * (kept + size_of::<u32>() * rows) as f64, "{file} bytes for {kept}, {config}");
        let after = loaded.saved_cache(&path).unwrap();
        assert!(after.bytes().allocated < kept / 10, "{:?}", after.bytes());
        let mut caches = [before, after];
        let id = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
        let [one, other] = caches.each_mut().map(|cache| loaded.model.decode(id, cache).unwrap());
        assert_eq!(one, other, "{config}");
    }
}

/// A process that saves over and over again is killed at any moment: the file is always one of the two that it saves.
#[cfg(unix)]
#[test]
fn a_kill_at_any_moment_leaves_a_whole_file() {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    const PLACE: &str = "TEST_SAVES_HERE";
    const KILLS: u64 = 200;
    let loaded = model();
    let caches = [40, 400].map(|tokens| read(&loaded, KvDtype::F16, None, tokens));
    if let Some(path) = std::env::var_os(PLACE) {
        loop {
            for cache in &caches {
                loaded.save_cache(cache, &path).unwrap();
            }
        }
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.kv");
    let mut found = [0; 2];
    for kill in 0..KILLS {
        let mut saving = Command::new(std::env::current_exe().unwrap());
        saving.args(["--exact", "saved::a_kill_at_any_moment_leaves_a_whole_file"]).env(PLACE, &path);
        let mut saving = saving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let before = path.metadata().and_then(|metadata| metadata.modified()).ok();
        // It has begun once the file is another.
        while path.metadata().and_then(|metadata| metadata.modified()).ok() == before {
            assert!(saving.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(Duration::from_micros(300));
        }
        std::thread::sleep(Duration::from_micros(kill * 7919 % 9000));
        saving.kill().unwrap();
        saving.wait().unwrap();
        let saved = SavedCache::open(&path).unwrap();
        saved.check().unwrap();
        found[usize::from(saved.num_tokens() == 400)] += 1;
    }
    assert!(found.iter().all(|&times| times > 0), "{found:?}");
    // What the killed ones have left goes when the next one saves.
    loaded.save_cache(&caches[0], &path).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
