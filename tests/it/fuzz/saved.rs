//! Saved caches with something wrong in them whose checksums are right: each is checked and, if it can be, gone on with.

use std::path::Path;
use std::sync::OnceLock;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::saved::SavedCache;
use candle_core::quantized::GgmlDType;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use tempfile::TempDir;

use super::harness;
use super::texts::{change, damage};
use crate::support::adaptive;
use crate::support::fixture::Fixture;

/// What sections begin at a multiple of, and bytes of the header.
const ALIGN: usize = 64;

/// A file as the guide describes it: what it says of itself, and its sections.
#[derive(Clone)]
struct Parts {
    description: Value,
    sections: Vec<Vec<u8>>,
}

impl Parts {
    fn read(bytes: &[u8]) -> Self {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let (offset, length) = (number(24), number(32));
        let description: Value = serde_json::from_slice(&bytes[offset..offset + length]).unwrap();
        let section = |place: &Value| {
            let number = |index: usize| place[index].as_u64().unwrap() as usize;
            bytes[number(0)..number(0) + number(1)].to_vec()
        };
        Self { sections: description["sections"].as_array().unwrap().iter().map(section).collect(), description }
    }

    /// With checksums and places that are right for what is in it.
    fn write(&self) -> Vec<u8> {
        let mut file = vec![0; ALIGN];
        let mut places = Vec::new();
        for section in &self.sections {
            let offset = file.len();
            file.extend_from_slice(section);
            file.resize(file.len().next_multiple_of(ALIGN), 0);
            places.push(serde_json::json!([offset, file.len() - offset, crc32fast::hash(&file[offset..])]));
        }
        let mut description = self.description.clone();
        if description.is_object() && description["sections"].is_array() {
            description["sections"] = places.into();
        }
        let text = description.to_string();
        let offset = file.len();
        file.extend_from_slice(text.as_bytes());
        file.resize(file.len().next_multiple_of(ALIGN), 0);
        let crc = crc32fast::hash(&file[offset..]);
        let length = file.len();
        let header: Vec<u8> = [
            &b"AKVCACHE\x02\0\0\0"[..],
            &crc.to_le_bytes(),
            &(length as u64).to_le_bytes(),
            &(offset as u64).to_le_bytes(),
            &(text.len() as u64).to_le_bytes(),
        ]
        .concat();
        file[..header.len()].copy_from_slice(&header);
        let crc = crc32fast::hash(&file[..60]);
        file[60..64].copy_from_slice(&crc.to_le_bytes());
        file
    }
}

fn model() -> &'static Loaded {
    static MODEL: OnceLock<Loaded> = OnceLock::new();
    MODEL.get_or_init(|| Fixture::read("head-dim").load(GgmlDType::F32, WeightDtype::Auto))
}

/// Whole files, of caches of several kinds.
fn files() -> Vec<Parts> {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    let configs = [
        "full",
        r#"{"method": "replay", "kept_ratio": 0.5}"#,
        r#"{"method": "h2o", "kept_ratio": 0.6, "decode": "evict"}"#,
        r#"{"method": "rkv", "kept_ratio": 0.6, "decode": "evict"}"#,
        r#"{"criterion": "mass", "recovery_threshold": 0.9, "decode": "evict"}"#,
    ];
    let mut files = Vec::new();
    for (config, dtype) in
        configs.into_iter().zip([KvDtype::Mixed, KvDtype::F16, KvDtype::Q8_0, KvDtype::Q4_0, KvDtype::F32])
    {
        let retention = if config == "full" { Retention::Full } else { adaptive(&loaded.tokenizer, config) };
        let mut cache = loaded.model.new_cache(dtype, retention).unwrap();
        let ids: Vec<u32> = (0..70).map(|i| (i * i + 5) % 900).collect();
        loaded.model.prefill(&ids[..50], &mut cache, &mut ()).unwrap();
        for &id in &ids[50..] {
            loaded.model.decode(id, &mut cache).unwrap();
        }
        loaded.save_cache(&cache, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let parts = Parts::read(&bytes);
        // The tests' own writer, by what the guide says, makes the same file.
        assert!(parts.write() == bytes, "{config}");
        files.push(parts);
    }
    files
}

/// Asks a file for all that it has, and goes on with it.
fn try_out(path: &Path) -> adaptive_kvcache::Result<()> {
    let saved = SavedCache::open(path)?;
    let _ = (saved.ids(), saved.config(), saved.dialogue());
    let _ = saved.check();
    let loaded = model();
    let mut cache = saved.cache(loaded)?;
    loaded.model.decode(7, &mut cache)?;
    loaded.model.prefill(&[5, 6, 7], &mut cache, &mut ())?;
    loaded.model.decode(7, &mut cache).map(drop)
}

#[test]
fn fuzz_saved() {
    let (files, folder) = (files(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    let words: Vec<Value> = ["f16", "mixed", "q9", "full", "0"].map(Value::from).into();
    harness::run("saved", |rng: &mut StdRng| {
        let mut parts = files[rng.random_range(0..files.len())].clone();
        for _ in 0..rng.random_range(1..4) {
            if rng.random_ratio(1, 3) {
                parts.description = change(parts.description.clone(), &words, rng);
            } else {
                let section = rng.random_range(0..parts.sections.len());
                // Most of what can be wrong is at the beginning: counts and positions.
                let section = &mut parts.sections[section];
                if rng.random() && section.len() > 8 {
                    let at = rng.random_range(0..section.len().min(200) / 4) * 4;
                    let number: u32 =
                        [0, 1, 2, 16, 49, 50, 69, 70, 71, 255, 1 << 31, u32::MAX][rng.random_range(0..12)];
                    section[at..at + 4].copy_from_slice(&number.to_le_bytes());
                } else {
                    damage(section, rng);
                }
            }
        }
        let mut bytes = parts.write();
        if rng.random_ratio(1, 10) {
            damage(&mut bytes, rng);
        }
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = try_out(&path) {
            assert!(!error.to_string().is_empty());
        }
    });
}
