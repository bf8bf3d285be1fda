//! Checkpoints in every layout: what they compute, against transformers' logits.
//!
//! `tests/data/checkpoints` is made by `make.py` there. Logits are computed from ids, without any tokenizer.

mod files;
mod foreign;
mod gguf;
mod layouts;
mod memory;
mod refused;
mod relatives;

use std::collections::HashMap;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use adaptive_kvcache::Error;
use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use adaptive_kvcache::checkpoint::weights::{Assembly, Bias, Naming, OutputLayer, assemble as assemble_model};
use adaptive_kvcache::checkpoint::{self, Checkpoint, Format, WeightDtype};
use adaptive_kvcache::fidelity::argmax;
use adaptive_kvcache::kernels::quant::{SharedBytes, WeightFormat};
use adaptive_kvcache::memory::process_memory;
use adaptive_kvcache::model::{Llama, RopeLayout};
use candle_core::quantized::gguf_file::{self, Value as GgufValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::fixture::{Fixture, interleave};
use crate::support::{candle_on_cpu, data, ids, json as read_json, max_difference};

const FIXTURES: [&str; 4] = ["mha", "gqa-tied", "head-dim", "llama3-rope"];

/// Tiny models of `tests/data/checkpoints`, and how their rotation is scaled.
const CHECKPOINTS: [(&str, &str); 11] = [
    ("biases", "none"),
    ("linear", "linear"),
    ("dynamic", "dynamic"),
    ("yarn", "yarn"),
    ("yarn-mscale", "yarn"),
    ("old-spelling", "llama3"),
    ("mistral", "none"),
    ("qwen2", "none"),
    ("qwen3", "none"),
    ("f16", "none"),
    ("bf16", "none"),
];

/// Against logits of up to 30 that another library computed in f32 and that were printed with five digits.
const TOLERANCE: f32 = 1e-4;

/// Between two orders of the same f32 additions.
const SAME_WEIGHTS_TOLERANCE: f32 = 5e-5;

/// Rounded weights are off by up to 2^-11 (f16) or 2^-8 (bf16) of themselves. An error of that size in every product of
/// a few layers shows in the logits as a few times that share of the largest.
const F16_TOLERANCE_RATIO: f32 = 8.0 / 2048.0;
const BF16_TOLERANCE_RATIO: f32 = 8.0 / 256.0;

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn checkpoints(name: &str) -> PathBuf {
    data("checkpoints").join(name)
}

fn model(path: impl AsRef<Path>, dtype: WeightDtype) -> Llama {
    checkpoint::open(path).unwrap().model(&BackendKind::default(), dtype, &mut |_, _| {}).unwrap()
}

/// Logits after a prompt and after each of some further tokens, one after the other.
fn logits(model: &Llama, prompt: &[u32], further: &[u32]) -> Vec<f32> {
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let mut rows = model.prefill(prompt, &mut cache, &mut ()).unwrap().logits;
    for &id in further {
        rows.extend(model.decode(id, &mut cache).unwrap());
    }
    rows
}

/// A folder with a copy of a fixture or tiny checkpoint.
fn copy_of(source: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// A folder with a copy of a fixture whose configuration is changed.
fn with_config(source: &Path, change: impl FnOnce(&mut Value)) -> TempDir {
    let folder = copy_of(source);
    let mut config = read_json(source.join("config.json"));
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// A copy of a tiny checkpoint with other tensors.
fn with_tensors(source: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> TempDir {
    let folder = copy_of(source);
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    folder
}

/// What opening a checkpoint and making its model fails with: one sentence of one line.
fn refusal(path: &Path) -> String {
    let error = checkpoint::open(path)
        .and_then(|checkpoint| checkpoint.model(&BackendKind::default(), WeightDtype::Auto, &mut |_, _| {}))
        .expect_err("a checkpoint that cannot be used");
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 500, "{text}");
    assert!(!matches!(error, Error::Tensor(_) | Error::Shape { .. }), "{text}");
    [text, error.hint().map(|hint| format!("; {hint}")).unwrap_or_default()].concat()
}

fn assert_names(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn folders_compute_what_transformers_computes() {
    for name in FIXTURES {
        let folder = data("fixtures").join(name);
        for dtype in [WeightDtype::F32, WeightDtype::Auto] {
            let model = model(&folder, dtype);
            for case in read_json(folder.join("expected.json")).as_array().unwrap() {
                let (prompt, greedy) = (ids(&case["ids"]), ids(&case["greedy"]));
                let rows = logits(&model, &prompt, &greedy);
                let mut rows = rows.chunks(model.config().vocab_size);
                let first = rows.next().unwrap();
                let difference = max_difference(first, &numbers(&case["last_logits"]));
                assert!(difference < TOLERANCE, "{name}, {dtype:?}: {difference}");
                let mut best = std::iter::once(first).chain(rows).map(|row| argmax(row).unwrap() as u32);
                for expected in greedy {
                    assert_eq!(best.next(), Some(expected), "{name}, {dtype:?}");
                }
            }
        }
    }
}

/// Compares a model with what transformers computed of a tiny checkpoint: prompts, and tokens decoded after each.
#[track_caller]
fn expect_all_cases(name: &str, model: &Llama) {
    let expected = read_json(checkpoints(name).join("expected.json"));
    for case in expected["cases"].as_array().unwrap() {
        let prompt = ids(&case["ids"]);
        let decoded = case["decoded"].as_array().unwrap();
        let further: Vec<u32> = decoded.iter().map(|step| step["id"].as_u64().unwrap() as u32).collect();
        let mut rows = numbers(&case["last_logits"]);
        rows.extend(decoded.iter().flat_map(|step| numbers(&step["logits"])));
        let difference = max_difference(&logits(model, &prompt, &further), &rows);
        assert!(difference < TOLERANCE, "{name}, {} tokens, {}: {difference}", prompt.len(), model.backend());
    }
}

#[test]
fn every_setting_computes_what_transformers_computes() {
    for (name, scaling) in CHECKPOINTS {
        for dtype in [WeightDtype::F32, WeightDtype::Auto] {
            let model = model(checkpoints(name), dtype);
            assert_eq!(model.config().rope.scaling, scaling, "{name}");
            expect_all_cases(name, &model);
        }
    }
}

/// Else agreement with transformers would say nothing of the setting.
#[test]
fn every_rotary_setting_shows_in_the_logits() {
    for (name, scaling) in CHECKPOINTS.into_iter().filter(|(_, scaling)| *scaling != "none") {
        let folder = with_config(&checkpoints(name), |config| {
            let map = config.as_object_mut().unwrap();
            map.remove("rope_scaling");
            map.remove("rope_parameters");
            config["rope_theta"] = json!(if name == "old-spelling" { 5000.0 } else { 10_000.0 });
            config["max_position_embeddings"] = json!(256);
        });
        let cases = read_json(checkpoints(name).join("expected.json"))["cases"].clone();
        for case in cases.as_array().unwrap().iter().filter(|case| case["ids"].as_array().unwrap().len() > 32) {
            let plain = logits(&model(folder.path(), WeightDtype::F32), &ids(&case["ids"]), &[]);
            let difference = max_difference(&plain, &numbers(&case["last_logits"]));
            assert!(difference > 100.0 * TOLERANCE, "{name}, {scaling}: {difference}");
        }
    }
}

/// Tensors that are made when they are needed, under Meta's names, with query and key rows interleaved.
#[test]
fn tensors_need_not_lie_in_a_file() {
    let source = data("fixtures/gqa-tied");
    let fixture = Fixture::read("gqa-tied");
    let names = [
        ("input_layernorm", "attention_norm"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("model.embed_tokens", "tok_embeddings"),
        ("model.norm", "norm"),
        ("model.", ""),
    ];
    let mut tensors = Tensors::new("memory");
    for (name, weight) in &fixture.weights {
        let name = names.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
        let heads = match name.as_str() {
            name if name.ends_with("wq.weight") => fixture.size("num_attention_heads"),
            name if name.ends_with("wk.weight") => fixture.size("num_key_value_heads"),
            _ => 0,
        };
        let weight = if heads > 0 { interleave(weight, heads) } else { weight.clone() };
        let bytes: Vec<u8> =
            weight.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
        let len = bytes.len();
        let bytes: SharedBytes = Arc::new(bytes);
        let data = TensorData::Made { len, make: Arc::new(move || Ok((Arc::clone(&bytes), 0..len))) };
        let dtype = StoredDtype::Usable(WeightFormat::F32);
        let tensor = StoredTensor { path: Path::new("memory").into(), dtype, shape: weight.dims().to_vec(), data };
        tensors.insert(name, tensor).unwrap();
    }
    let mut config = checkpoint::open(&source).unwrap().config().clone();
    config.rope.layout = RopeLayout::Interleaved;
    let assembly = Assembly {
        naming: Naming::Meta,
        attention_bias: Bias::Never,
        attention_output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        output: OutputLayer::Tied,
    };
    let meta =
        assemble_model(&BackendKind::default(), &tensors, assembly, config, WeightDtype::Auto, &mut |_, _| {}).unwrap();
    let run = |model: &Llama| logits(model, &[1, 7, 300, 5], &[9, 8]);
    let difference = max_difference(&run(&meta), &run(&model(&source, WeightDtype::Auto)));
    assert!(difference < SAME_WEIGHTS_TOLERANCE, "{difference}");
}

#[test]
fn inspect_shows_folders() {
    let inspect = |path: &Path| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache")).arg("inspect").arg("--model").arg(path).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = inspect(&checkpoints("mistral"));
    assert_names(
        &text,
        &[
            "safetensors",
            "architecture        mistral",
            "context             256",
            "sliding window      48",
            "F32",
            "its own",
            "none that is usable",
        ],
    );
    assert_names(&inspect(&checkpoints("dynamic")), &["scaling dynamic, 4, beyond 32 tokens", "128"]);
    assert_names(&inspect(&checkpoints("yarn").join("model.safetensors")), &["scaling yarn"]);
}

#[test]
fn converted_weights_are_close() {
    for name in ["mha", "gqa-tied", "llama3-rope"] {
        let folder = data("fixtures").join(name);
        let prompt: Vec<u32> = (0..40).map(|i| (i * i + 3) % 1000).collect();
        let exact = logits(&model(&folder, WeightDtype::F32), &prompt, &[5, 6]);
        let largest = exact.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for (dtype, ratio) in [(WeightDtype::F16, F16_TOLERANCE_RATIO), (WeightDtype::Bf16, BF16_TOLERANCE_RATIO)] {
            let difference = max_difference(&logits(&model(&folder, dtype), &prompt, &[5, 6]), &exact);
            assert!(difference > 0.0 && difference < ratio * largest, "{name}, {dtype:?}: {difference} of {largest}");
        }
    }
    // Weights that are stored so are not touched.
    for (name, dtype) in [("f16", WeightDtype::F16), ("bf16", WeightDtype::Bf16)] {
        let run = |dtype| logits(&model(checkpoints(name), dtype), &[1, 5, 9], &[3]);
        assert_eq!(run(dtype), run(WeightDtype::Auto), "{name}");
    }
}

#[test]
fn numbers_that_f16_cannot_hold_are_refused() {
    let folder = copy_of(&checkpoints("bf16"));
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    tensors.insert(name.to_owned(), (tensors[name].to_dtype(DType::F32).unwrap() * 1e6).unwrap());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let checkpoint = checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.model(&BackendKind::default(), WeightDtype::F16, &mut |_, _| {}).unwrap_err();
    assert_names(&error.to_string(), &[name, "too large for F16", "model.safetensors"]);
    assert!(checkpoint.model(&BackendKind::default(), WeightDtype::Bf16, &mut |_, _| {}).is_ok());
}

#[test]
fn what_a_checkpoint_says_of_itself() {
    let checkpoint = checkpoint::open(checkpoints("bf16")).unwrap();
    assert_eq!((checkpoint.format(), checkpoint.format().name()), (Format::Safetensors, "safetensors"));
    assert_eq!(checkpoint.dtype_name(WeightDtype::Auto), "bf16");
    assert_eq!(checkpoint.dtype_name(WeightDtype::F32), "f32");
    assert!(!checkpoint.is_tied() && checkpoint::open(checkpoints("f16")).unwrap().is_tied());
    let ids = adaptive_kvcache::checkpoint::hf_config::read(&checkpoints("bf16")).unwrap().ids;
    assert_eq!((ids.bos_id, ids.eos_ids), (Some(1), vec![5, 9]));
    let mistral = adaptive_kvcache::checkpoint::hf_config::read(&checkpoints("mistral")).unwrap();
    assert_eq!(mistral.ids.eos_ids, [2, 7]);
    assert_eq!((mistral.config.context_length, mistral.config.window(1)), (256, Some(48)));
    let dynamic = checkpoint::open(checkpoints("dynamic")).unwrap();
    assert_eq!((dynamic.config().context_length, dynamic.config().window(0)), (128, None));
}

#[test]
fn a_window_may_be_none_or_left_to_transformers() {
    for (window, expected) in [(json!(null), None), (json!(256), Some(256)), (json!(4096), Some(4096))] {
        let folder = with_config(&checkpoints("mistral"), |config| config["sliding_window"] = window);
        let config = checkpoint::open(folder.path()).unwrap().config().clone();
        assert_eq!((config.context_length, config.window(0), config.window(1)), (256, expected, expected));
        assert_eq!(config.held_tokens(250), 500, "the window is not shorter than that");
    }
    // transformers takes 4096 if nothing is said.
    let folder = with_config(&checkpoints("mistral"), |config| {
        config.as_object_mut().unwrap().remove("sliding_window");
        config["max_position_embeddings"] = json!(32_768);
    });
    assert_eq!(checkpoint::open(folder.path()).unwrap().config().window(0), Some(4096));
}

/// Splits a fixture into three files with an index.
fn shard(source: &Path, folder: &Path) {
    let tensors = candle_core::safetensors::load(source.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut weight_map = serde_json::Map::new();
    for (index, names) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let shard = format!("model-{:05}-of-00003.safetensors", index + 1);
        let part: HashMap<String, Tensor> = names.iter().map(|&name| (name.clone(), tensors[name].clone())).collect();
        candle_core::safetensors::save(&part, folder.join(&shard)).unwrap();
        weight_map.extend(part.into_keys().map(|name| (name, json!(shard))));
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::copy(source.join("config.json"), folder.join("config.json")).unwrap();
}

/// A safetensors file: its header's text as it is, and the bytes of the data.
fn assemble(header: &str, bytes: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()
}

fn split_header(file: &[u8]) -> (String, Vec<u8>) {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (String::from_utf8(file[8..8 + len].to_vec()).unwrap(), file[8 + len..].to_vec())
}

/// Splits a GGUF file into parts as llama.cpp does; only the first has the model's metadata.
fn split_gguf(source: &Path, folder: &Path, count: usize, change: impl Fn(usize, &mut Vec<(&str, GgufValue)>)) {
    let mut file = std::fs::File::open(source).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    for (index, part) in names.chunks(names.len().div_ceil(count)).enumerate() {
        let tensors: Vec<(&str, QTensor)> =
            part.iter().map(|name| (name.as_str(), content.tensor(&mut file, name, &Device::Cpu).unwrap())).collect();
        let mut metadata = vec![
            ("split.no", GgufValue::U16(index as u16)),
            ("split.count", GgufValue::U16(count as u16)),
            ("split.tensors.count", GgufValue::I32(i32::try_from(names.len()).unwrap())),
        ];
        if index == 0 {
            metadata.extend(content.metadata.iter().map(|(key, value)| (key.as_str(), value.clone())));
        }
        change(index, &mut metadata);
        let metadata: Vec<(&str, &GgufValue)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let path = folder.join(format!("tiny-{:05}-of-{count:05}.gguf", index + 1));
        gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

/// llama.cpp's `YaRN` is transformers' without `mscale`, on rows that are interleaved.
#[test]
fn yarn_is_the_same_in_gguf() {
    let fixture = Fixture::read("mha");
    let folder = with_config(&data("fixtures/mha"), |config| {
        config["rope_parameters"] = json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                           "original_max_position_embeddings": 32});
    });
    let gguf = tempfile::tempdir().unwrap();
    let whole = gguf.path().join("plain");
    fixture.write_gguf(&whole, GgmlDType::F32);
    split_gguf(&whole, gguf.path(), 1, |_, metadata| {
        metadata.extend([
            ("llama.rope.scaling.type", GgufValue::String("yarn".to_owned())),
            ("llama.rope.scaling.factor", GgufValue::F32(4.0)),
            ("llama.rope.scaling.original_context_length", GgufValue::U32(32)),
        ]);
    });
    let prompt: Vec<u32> = (0..200).map(|i| (i * i + 3) % 1000).collect();
    let run = |path: &Path| logits(&model(path, WeightDtype::F32), &prompt, &[9, 8]);
    let expected = run(folder.path());
    let difference = max_difference(&run(gguf.path()), &expected);
    assert!(difference < SAME_WEIGHTS_TOLERANCE, "{difference}");
    assert!(max_difference(&run(&data("fixtures/mha")), &expected) > 0.1);
}

#[test]
fn what_is_left_out_has_the_usual_values() {
    let folder = with_config(&checkpoints("linear"), |config| {
        let map = config.as_object_mut().unwrap();
        for key in ["head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "architectures"] {
            map.remove(key);
        }
        config["num_key_value_heads"] = json!(2);
        config["rope_scaling"] = json!({"type": "linear", "factor": 4});
        config["rope_theta"] = json!(10_000);
    });
    let run = |path: &Path| logits(&model(path, WeightDtype::Auto), &[1, 7, 30, 5], &[9, 8]);
    assert_eq!(run(folder.path()), run(&checkpoints("linear")));
}
