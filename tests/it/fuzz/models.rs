//! Models with something wrong in them that still look like models: each is loaded and, if it can be, run for one token.

use std::path::Path;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::{WeightDtype, load};
use adaptive_kvcache::compress::AdaptiveConfig;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::harness;
use super::texts::{change, damage, pick, text};
use super::tokenizers::byte_level;
use crate::cli::tiny_gguf::{Meta, TinyGguf};
use crate::support::data;

/// Loads a model, and gives it a prompt and one token.
fn try_out(path: &Path, dtype: KvDtype, rng: &mut StdRng) -> adaptive_kvcache::Result<()> {
    let dtype_of_weights = [WeightDtype::Auto, WeightDtype::F32, WeightDtype::Bf16][rng.random_range(0..3)];
    let loaded = load(path, dtype_of_weights)?;
    let ids = loaded.tokenizer.encode("ab ab c")?;
    let is_adaptive = rng.random();
    let mut cache =
        if is_adaptive { loaded.cache(dtype, &AdaptiveConfig::default())? } else { loaded.full_cache(dtype)? };
    loaded.model.prefill(&ids, &mut cache, &mut ())?;
    loaded.model.decode(0, &mut cache)?;
    Ok(())
}

fn any_dtype(rng: &mut StdRng) -> KvDtype {
    KvDtype::ALL[rng.random_range(0..KvDtype::ALL.len())]
}

/// A number of 32 bits that often is where others stop.
fn u32_value(rng: &mut StdRng) -> u32 {
    if rng.random() { rng.random_range(0..70) } else { *pick(rng, &[&0, &(1 << 16), &(1 << 31), &u32::MAX, &u32::MAX]) }
}

fn u64_value(rng: &mut StdRng) -> u64 {
    if rng.random() {
        rng.random_range(0..70)
    } else {
        *pick(rng, &[&0, &(1 << 31), &(1 << 32), &(1 << 60), &(1 << 63), &u64::MAX])
    }
}

const TEXTS: [&str; 16] = [
    "llama",
    "mistral",
    "gpt2",
    "llama-bpe",
    "default",
    "tekken",
    "linear",
    "yarn",
    "",
    "\u{0}",
    "a",
    "ab",
    "<|im_end|>",
    "\u{120}",
    "<0x0A>",
    "{{ messages[0].content }}",
];

fn meta(rng: &mut StdRng) -> Meta {
    let len = rng.random_range(0..12);
    match rng.random_range(0..8) {
        0 | 1 => Meta::U32(u32_value(rng)),
        2 => Meta::F32(*pick(rng, &[&0.0, &-1.0, &1e-5, &10_000.0, &f32::NAN, &f32::INFINITY, &1e38, &1e-45])),
        3 => Meta::Text(pick(rng, &TEXTS)),
        4 => Meta::Texts((0..len).map(|_| pick(rng, &TEXTS)).collect()),
        5 => Meta::I32s((0..len).map(|_| rng.random_range(-2..9)).collect()),
        6 => Meta::F32s((0..len).map(|_| rng.random_range(-9.0..1.0)).collect()),
        _ => {
            // A type, a length and bytes that need not fit.
            let mut bytes = rng.random_range(0..14_u32).to_le_bytes().to_vec();
            bytes.extend(u64_value(rng).to_le_bytes());
            bytes.extend((0..rng.random_range(0..40)).map(|_| rng.random::<u8>()));
            Meta::Raw(rng.random_range(0..14), bytes)
        }
    }
}

/// Keys that mean something, beside those that the file has.
const KEYS: [&str; 14] = [
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.vocab_size",
    "llama.expert_count",
    "split.count",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.eot_token_id",
    "general.file_type",
    "tokenizer.ggml.scores",
];

fn change_gguf(file: &mut TinyGguf, rng: &mut StdRng) {
    match rng.random_range(0..10) {
        0..=3 => {
            let at = rng.random_range(0..file.metadata.len());
            file.metadata[at].1 = meta(rng);
        }
        4 => {
            let key = pick(rng, &KEYS);
            file.set(key, meta(rng));
        }
        5 => {
            let at = rng.random_range(0..file.metadata.len());
            let entry = file.metadata.remove(at);
            if rng.random() {
                file.metadata.extend([entry.clone(), entry]);
            }
        }
        6 => file.version = u32_value(rng),
        7 if rng.random() => file.tensor_count = Some(u64_value(rng)),
        7 => file.metadata_count = Some(u64_value(rng)),
        _ => {
            let at = rng.random_range(0..file.tensors.len());
            let other = rng.random_range(0..file.tensors.len());
            let (name, dims) = (file.tensors[other].name.clone(), file.tensors[other].dims.clone());
            let tensor = &mut file.tensors[at];
            match rng.random_range(0..6) {
                0 => tensor.name = name,
                1 => tensor.dims = dims,
                2 => tensor.dims = (0..rng.random_range(0..6)).map(|_| u64_value(rng)).collect(),
                3 => tensor.format = rng.random_range(0..42),
                4 => tensor.offset = u64_value(rng),
                // Numbers of another format need fewer bytes than there are.
                _ => tensor.format = *pick(rng, &[&1, &2, &3, &6, &7, &8, &30]),
            }
        }
    }
}

#[test]
fn fuzz_gguf_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    harness::run("gguf_models", |rng| {
        let mut file = if rng.random() { TinyGguf::new() } else { TinyGguf::sentence_piece() };
        for _ in 0..rng.random_range(0..4) {
            change_gguf(&mut file, rng);
        }
        let mut bytes = file.bytes();
        if rng.random_bool(0.3) {
            damage(&mut bytes, rng);
        }
        if rng.random_bool(0.3) && bytes.len() > 5000 {
            // Weights are any bits.
            let at = rng.random_range(4000..bytes.len() - 64);
            bytes[at..at + 64].iter_mut().for_each(|byte| *byte = rng.random());
        }
        std::fs::write(&path, bytes).unwrap();
        let dtype = any_dtype(rng);
        let _ = try_out(&path, dtype, rng);
    });
}

#[test]
fn fuzz_safetensors_models() {
    let original = data("checkpoints/f16");
    let config: Value = serde_json::from_slice(&std::fs::read(original.join("config.json")).unwrap()).unwrap();
    let weights = std::fs::read(original.join("model.safetensors")).unwrap();
    let header_len = usize::try_from(u64::from_le_bytes(weights[..8].try_into().unwrap())).unwrap();
    let header: Value = serde_json::from_slice(&weights[8..8 + header_len]).unwrap();
    let numbers = &weights[8 + header_len..];
    let tokenizer = byte_level(64, &Value::Null, Vec::new());
    let words: Vec<Value> = [
        json!("LlamaForCausalLM"),
        json!("MistralForCausalLM"),
        json!("llama"),
        json!("float16"),
        json!("F16"),
        json!("BF16"),
        json!("F64"),
        json!({"type": "linear", "factor": 2.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        json!({"rope_type": "dynamic", "factor": 4.0}),
        json!({"dtype": "F16", "shape": [8, 8], "data_offsets": [0, 128]}),
        json!([1, 2]),
        json!([32]),
        json!(32),
    ]
    .into();
    harness::run("safetensors_models", |rng| {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let changed = |value: &Value, often: f64, rng: &mut StdRng| {
            if rng.random_bool(often) { change(value.clone(), &words, rng) } else { value.clone() }
        };
        write("config.json", changed(&config, 0.6, rng).to_string().as_bytes());
        write("tokenizer.json", changed(&tokenizer, 0.1, rng).to_string().as_bytes());
        if rng.random_bool(0.2) {
            let ids = json!({"bos_token_id": 1, "eos_token_id": [2, 3]});
            write("generation_config.json", changed(&ids, 0.7, rng).to_string().as_bytes());
        }
        let header = changed(&header, 0.5, rng).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(numbers);
        if rng.random_bool(0.2) {
            damage(&mut file, rng);
        }
        write(pick(rng, &["model.safetensors", "model.safetensors", "a.safetensors"]), &file);
        if rng.random_bool(0.1) {
            let index = json!({"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors", "x": text(rng)}});
            write("model.safetensors.index.json", changed(&index, 0.5, rng).to_string().as_bytes());
        }
        let dtype = any_dtype(rng);
        let _ = try_out(folder.path(), dtype, rng);
    });
}
