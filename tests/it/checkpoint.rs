//! Checkpoints in every layout: what they compute, against transformers' logits, and what is wrong with those that cannot
//! be used.
//!
//! `tests/data/checkpoints` is made by `make.py` there. Logits are computed from ids, without any tokenizer.

mod foreign;
mod gguf;
mod layouts;

use std::collections::HashMap;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use adaptive_kvcache::checkpoint::weights::{Assembly, Bias, Naming, OutputLayer, assemble as assemble_model};
use adaptive_kvcache::checkpoint::{self, Checkpoint, Format, WeightDtype};
use adaptive_kvcache::fidelity::argmax;
use adaptive_kvcache::kernels::quant::SharedBytes;
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
use crate::support::{data, ids, json as read_json, max_difference};

const FIXTURES: [&str; 4] = ["mha", "gqa-tied", "head-dim", "llama3-rope"];

/// Tiny models of `tests/data/checkpoints`, and how their rotation is scaled.
const CHECKPOINTS: [(&str, &str); 9] = [
    ("biases", "none"),
    ("linear", "linear"),
    ("dynamic", "dynamic"),
    ("yarn", "yarn"),
    ("yarn-mscale", "yarn"),
    ("old-spelling", "llama3"),
    ("mistral", "none"),
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
    checkpoint::open(path).unwrap().model(dtype, &mut |_, _| {}).unwrap()
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

/// What opening a checkpoint and making its model fails with: one sentence of one line.
fn refusal(path: &Path) -> String {
    let error = checkpoint::open(path)
        .and_then(|checkpoint| checkpoint.model(WeightDtype::Auto, &mut |_, _| {}))
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

#[test]
fn every_setting_computes_what_transformers_computes() {
    for (name, scaling) in CHECKPOINTS {
        let expected = read_json(checkpoints(name).join("expected.json"));
        for dtype in [WeightDtype::F32, WeightDtype::Auto] {
            let model = model(checkpoints(name), dtype);
            assert_eq!(model.config().rope.scaling, scaling, "{name}");
            for case in expected["cases"].as_array().unwrap() {
                let prompt = ids(&case["ids"]);
                let decoded = case["decoded"].as_array().unwrap();
                let further: Vec<u32> = decoded.iter().map(|step| step["id"].as_u64().unwrap() as u32).collect();
                let mut rows = numbers(&case["last_logits"]);
                rows.extend(decoded.iter().flat_map(|step| numbers(&step["logits"])));
                let difference = max_difference(&logits(&model, &prompt, &further), &rows);
                assert!(difference < TOLERANCE, "{name}, {} tokens, {dtype:?}: {difference}", prompt.len());
            }
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
        let dtype = StoredDtype::Usable(GgmlDType::F32);
        let tensor = StoredTensor { path: Path::new("memory").into(), dtype, shape: weight.dims().to_vec(), data };
        tensors.insert(name, tensor).unwrap();
    }
    let mut config = checkpoint::open(&source).unwrap().config().clone();
    config.rope.layout = RopeLayout::Interleaved;
    let assembly = Assembly {
        naming: Naming::Meta,
        attention_bias: Bias::Never,
        mlp_bias: Bias::Never,
        output: OutputLayer::Tied,
    };
    let meta = assemble_model(&tensors, assembly, config, WeightDtype::Auto, &mut |_, _| {}).unwrap();
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
    assert_names(&text, &["safetensors", "48, the sliding window", "F32", "its own", "none that is usable"]);
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
    let error = checkpoint.model(WeightDtype::F16, &mut |_, _| {}).unwrap_err();
    assert_names(&error.to_string(), &[name, "too large for F16", "model.safetensors"]);
    assert!(checkpoint.model(WeightDtype::Bf16, &mut |_, _| {}).is_ok());
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
    assert_eq!((mistral.config.context_length, mistral.config.sliding_window), (48, Some(48)));
    let dynamic = checkpoint::open(checkpoints("dynamic")).unwrap();
    assert_eq!((dynamic.config().context_length, dynamic.config().sliding_window), (128, None));
}

#[test]
fn a_window_that_is_not_shorter_than_the_context_changes_nothing() {
    for window in [json!(null), json!(256), json!(4096)] {
        let folder = with_config(&checkpoints("mistral"), |config| config["sliding_window"] = window);
        let config = checkpoint::open(folder.path()).unwrap().config().clone();
        assert_eq!((config.context_length, config.sliding_window), (256, None));
    }
    // transformers takes 4096 if nothing is said.
    let folder = with_config(&checkpoints("mistral"), |config| {
        config.as_object_mut().unwrap().remove("sliding_window");
        config["max_position_embeddings"] = json!(32_768);
    });
    assert_eq!(checkpoint::open(folder.path()).unwrap().config().sliding_window, Some(4096));
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

#[test]
fn several_files_are_as_good_as_one() {
    for name in FIXTURES {
        let source = data("fixtures").join(name);
        let folder = tempfile::tempdir().unwrap();
        shard(&source, folder.path());
        let run = |path: &Path| logits(&model(path, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]);
        let expected = run(&source);
        assert_eq!(run(folder.path()), expected);
        // Any of the files stands for the model.
        assert_eq!(run(&folder.path().join("model-00002-of-00003.safetensors")), expected);
        assert_eq!(run(&folder.path().join("model.safetensors.index.json")), expected);
        assert_eq!(run(&source.join("model.safetensors")), expected);
    }
}

/// A safetensors file: its header's text as it is, and the bytes of the data.
fn assemble(header: &str, bytes: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()
}

fn split_header(file: &[u8]) -> (String, Vec<u8>) {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (String::from_utf8(file[8..8 + len].to_vec()).unwrap(), file[8 + len..].to_vec())
}

#[test]
fn numbers_at_odd_addresses_are_computed_with_all_the_same() {
    for name in ["biases", "f16", "bf16"] {
        let folder = copy_of(&checkpoints(name));
        let run = |path: &Path, dtype| logits(&model(path, dtype), &[1, 7, 30, 5], &[9, 8]);
        let path = folder.path().join("model.safetensors");
        let (header, bytes) = split_header(&std::fs::read(&path).unwrap());
        for spaces in 1..4 {
            // Older writers did not fill the header up to a multiple of 8.
            std::fs::write(&path, assemble(&format!("{}{}", header.trim_end(), " ".repeat(spaces)), &bytes)).unwrap();
            for dtype in [WeightDtype::Auto, WeightDtype::F32, WeightDtype::F16] {
                assert_eq!(run(folder.path(), dtype), run(&checkpoints(name), dtype), "{name}, {spaces} spaces");
            }
        }
    }
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

#[test]
fn a_split_gguf_model_is_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    Fixture::read("llama3-rope").write_gguf(&whole, GgmlDType::F16);
    let parts = tempfile::tempdir().unwrap();
    split_gguf(&whole, parts.path(), 3, |_, _| {});
    let expected = logits(&model(&whole, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]);
    let part = |index: usize| parts.path().join(format!("tiny-{index:05}-of-00003.gguf"));
    for path in [part(1), part(2), part(3), parts.path().to_owned()] {
        assert_eq!(logits(&model(&path, WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]), expected);
    }
    assert_eq!(logits(&model(folder.path(), WeightDtype::Auto), &[1, 7, 300, 5], &[9, 8]), expected);
    let loaded = checkpoint::load(part(2), WeightDtype::Auto, &mut |_, _| {}).unwrap();
    assert_eq!((loaded.format, loaded.dtype.as_str()), (Format::Gguf, "f16"));

    std::fs::rename(part(2), parts.path().join("elsewhere")).unwrap();
    assert_names(&refusal(&part(1)), &["tiny-00002-of-00003.gguf", "No such file", "3 parts"]);
    std::fs::copy(part(3), part(2)).unwrap();
    assert_names(&refusal(&part(1)), &["tiny-00002-of-00003.gguf", "expected part 1 of 3", "got 2 of 3"]);
    std::fs::rename(part(1), parts.path().join("renamed.gguf")).unwrap();
    assert_names(&refusal(&parts.path().join("renamed.gguf")), &["renamed.gguf", "one of 3 parts"]);

    split_gguf(&whole, parts.path(), 3, |index, metadata| {
        if index == 0 {
            metadata[2].1 = GgufValue::I32(7);
        }
    });
    assert_names(&refusal(&part(1)), &["expected 7 tensors in all 3 parts"]);
    // Two models in one folder: nobody knows which is meant.
    std::fs::copy(&whole, parts.path().join("whole.gguf")).unwrap();
    assert_names(&refusal(parts.path()), &["holds 3 models", "path of one"]);
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
fn a_configuration_that_is_not_computed_is_refused_by_name() {
    let source = checkpoints("linear");
    let check = |change: &dyn Fn(&mut Value), parts: &[&str]| {
        let folder = with_config(&source, change);
        let text = refusal(folder.path());
        assert_names(&text, &["config.json"]);
        assert_names(&text, parts);
    };
    for name in
        ["MixtralForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "MllamaForConditionalGeneration", "LlamaModel"]
    {
        check(&|config| config["architectures"] = json!([name]), &[name, "not supported", "LlamaForCausalLM"]);
    }
    check(
        &|config| {
            config.as_object_mut().unwrap().remove("architectures");
            config["model_type"] = json!("llama4");
        },
        &["`llama4`", "not supported"],
    );
    check(&|config| config["model_type"] = json!("mistral"), &["`architectures` and `model_type`"]);
    check(&|config| config["quantization_config"] = json!({"quant_method": "awq"}), &["`awq`", "GGUF"]);
    check(&|config| config["hidden_act"] = json!("gelu"), &["`gelu`", "not supported"]);
    check(&|config| config["partial_rotary_factor"] = json!(0.5), &["partial_rotary_factor", "not supported"]);
    let rope = |value: Value| move |config: &mut Value| config["rope_parameters"] = value.clone();
    check(&rope(json!({"rope_type": "longrope", "factor": 2})), &["`longrope`", "yarn"]);
    check(&rope(json!({"type": "su", "factor": 2})), &["`su`", "not supported"]);
    check(&rope(json!({"type": "linear", "rope_type": "yarn", "factor": 2})), &["`yarn`", "`linear`", "contradict"]);
    check(&rope(json!({"rope_type": "linear"})), &["rope_parameters.factor", "expected a number above 0", "nothing"]);
    check(&rope(json!({"rope_type": "linear", "factor": -1})), &["rope_parameters.factor", "`-1`"]);
    check(&rope(json!({"rope_type": "dynamic", "factor": 0.5})), &["factor", "at least 1"]);
    check(&rope(json!({"factor": 2.0})), &["no `rope_type`"]);
    check(&rope(json!({"full_attention": {"rope_type": "default"}})), &["`full_attention`", "not supported"]);
    check(
        &rope(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
        &["high_freq_factor", "low_freq_factor"],
    );
    check(&|config| config["rope_theta"] = json!(5.0), &["`rope_theta` is given twice", "`10000.0`", "`5.0`"]);
    check(
        &|config| config["rope_scaling"] = json!({"rope_type": "linear", "factor": 3.0}),
        &["`factor` is given twice", "`4.0`", "`3.0`"],
    );

    for key in ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"] {
        for (value, shown) in [(json!(0), "`0`"), (json!(-3), "`-3`"), (json!("7"), "`\"7\"`"), (json!(1e30), "1e+30")]
        {
            check(&|config| config[key] = value.clone(), &[key, "expected a whole number", shown]);
        }
        check(&|config| _ = config.as_object_mut().unwrap().remove(key), &[key, "got nothing"]);
    }
    check(&|config| config["num_key_value_heads"] = json!(3), &["4 query heads cannot share 3 KV heads"]);
    check(&|config| config["head_dim"] = json!(100_000), &["head dimension 100000"]);
    check(&|config| config["head_dim"] = json!(7), &["head dimension 7 is odd"]);
    check(
        &|config| {
            config["head_dim"] = json!(null);
            config["hidden_size"] = json!(33);
        },
        &["33 is not a multiple"],
    );
    check(&|config| config["rms_norm_eps"] = json!("x"), &["rms_norm_eps", "`\"x\"`"]);
    check(&|config| config["eos_token_id"] = json!([2, "x"]), &["eos_token_id", "a token id or a list"]);
    check(&|config| config["attention_bias"] = json!(1), &["attention_bias", "true or false"]);
    for text in ["", "{", "[]", "\u{feff}{", &"[".repeat(100_000)] {
        let folder = copy_of(&source);
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        assert_names(&refusal(folder.path()), &["config.json", "JSON"]);
    }
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

/// A copy of a tiny checkpoint with other tensors.
fn with_tensors(source: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> TempDir {
    let folder = copy_of(source);
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    folder
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let check = |source: &str, change: &dyn Fn(&mut HashMap<String, Tensor>), parts: &[&str]| {
        let folder = with_tensors(&checkpoints(source), change);
        let text = refusal(folder.path());
        assert_names(&text, &["model.safetensors"]);
        assert_names(&text, parts);
    };
    check("linear", &|tensors| _ = tensors.remove(NAME), &[NAME, "is missing"]);
    check("linear", &|tensors| _ = tensors.remove("lm_head.weight"), &["lm_head.weight", "is missing"]);
    check(
        "linear",
        &|tensors| _ = tensors.insert(NAME.to_owned(), zeros(&[32, 20], DType::F32)),
        &[NAME, "expected shape [20, 32], got [32, 20]"],
    );
    for (dtype, name) in [(DType::F64, "F64"), (DType::U8, "U8"), (DType::I64, "I64")] {
        check(
            "linear",
            &|tensors| _ = tensors.insert(NAME.to_owned(), zeros(&[20, 32], dtype)),
            &[NAME, name, "not supported", "BF16"],
        );
    }
    check(
        "linear",
        &|tensors| _ = tensors.insert("model.layers.0.self_attn.q_norm.weight".to_owned(), zeros(&[8], DType::F32)),
        &["q_norm", "not part of a LLaMA model of 2 layers", "lost"],
    );
    check(
        "linear",
        &|tensors| _ = tensors.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), zeros(&[32], DType::F32)),
        &["q_proj.bias", "no bias"],
    );
    check(
        "linear",
        &|tensors| _ = tensors.insert("model.layers.0.mlp.up_proj.qweight".to_owned(), zeros(&[4], DType::U32)),
        &["qweight", "GPTQ", "GGUF"],
    );
    check(
        "biases",
        &|tensors| _ = tensors.remove("model.layers.1.mlp.down_proj.bias"),
        &["model.layers.1.mlp.down_proj.bias", "is missing"],
    );

    // These say nothing that the configuration does not say.
    let run = |path: &Path| logits(&model(path, WeightDtype::Auto), &[1, 7, 30, 5], &[9, 8]);
    let folder = with_tensors(&checkpoints("linear"), |tensors| {
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), zeros(&[4], DType::F32));
    });
    assert_eq!(run(folder.path()), run(&checkpoints("linear")));
}

#[test]
fn headers_that_are_not_what_they_say_are_refused() {
    let source = checkpoints("f16");
    let whole = std::fs::read(source.join("model.safetensors")).unwrap();
    let (header, bytes) = split_header(&whole);
    let folder = copy_of(&source);
    let path = folder.path().join("model.safetensors");
    let check = |content: &[u8], parts: &[&str]| {
        std::fs::write(&path, content).unwrap();
        let text = refusal(folder.path());
        assert_names(&text, &["model.safetensors"]);
        assert_names(&text, parts);
    };
    for len in [0, 1, 7] {
        check(&whole[..len], &["fewer than any", "fetch it again"]);
    }
    for len in [8, 9, header.len(), header.len() + 7] {
        check(&whole[..len], &["announces a header", "fetch it again"]);
    }
    for len in [header.len() + 8, header.len() + 1000, whole.len() - 1] {
        check(&whole[..len], &["beyond the end", "fetch it again"]);
    }
    check(&[&whole[..], &[0]].concat(), &["the end of the file"]);
    for len in [u64::MAX, 1 << 63, 1 << 40, whole.len() as u64] {
        check(&[&len.to_le_bytes(), &whole[8..]].concat(), &["announces a header", &len.to_string()]);
    }
    for text in ["", "[]", "{", "{\"a\": 1}", "7", "nul", "{\"a\":{\"dtype\":\"F16\"}}"] {
        check(&assemble(text, &bytes), &["header is not that of safetensors"]);
    }
    check(&assemble(&format!("{{\"a\":{}", "[".repeat(1 << 20)), &bytes), &["header is not that of safetensors"]);
    check(&assemble(&format!("{{\"a\":{}", "{\"a\":".repeat(1 << 20)), &bytes), &["header is not that"]);

    let mut json: Value = serde_json::from_str(&header).unwrap();
    let tensor = |shape: &str, offsets: &str, dtype: &str| {
        assemble(&format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}"), &[0; 64])
    };
    check(&tensor("[4,8]", "[0,64]", "F99"), &["`F99`", "`x`", "not supported"]);
    check(&tensor("[4,7]", "[0,64]", "F16"), &["`x`", "[4, 7]", "0..64", "448 bits"]);
    check(&tensor("[4,8]", "[0,64]", "F32"), &["`x`", "1024 bits"]);
    check(&tensor("[4,8]", "[64,0]", "F16"), &["`x`", "expected 0"]);
    check(&tensor("[4,8]", "[8,72]", "F16"), &["`x`", "beyond the end"]);
    check(&tensor("[4,7]", "[8,64]", "F16"), &["`x`", "begins at 8", "overlap or leave gaps"]);
    check(&tensor("[18446744073709551615,8]", "[0,64]", "F16"), &["`x`", "absurdly large"]);
    check(&tensor("[1e3,8]", "[0,64]", "F16"), &["header is not that"]);
    check(&tensor("[-4,8]", "[0,64]", "F16"), &["header is not that"]);
    check(&tensor("[1,1,1,1,1,1,1,4,8]", "[0,64]", "F16"), &["at most 8 sizes"]);
    check(&tensor("[4,8]", "[0,18446744073709551615]", "F16"), &["beyond the end"]);
    check(&tensor("[4,8]", "[0,18446744073709551616]", "F16"), &["header is not that"]);

    let entry = json["model.norm.weight"].take().to_string();
    let twice = format!("{{\"model.norm.weight\":{entry},{}", &header[1..]);
    check(&assemble(&twice, &bytes), &["`model.norm.weight` is given twice"]);
    let moved = header.replacen("\"data_offsets\":[0,", "\"data_offsets\":[2,", 1);
    check(&assemble(&moved, &bytes), &["overlap or leave gaps"]);
}

#[test]
fn an_index_that_lies_is_refused() {
    let source = data("fixtures/gqa-tied");
    let folder = tempfile::tempdir().unwrap();
    shard(&source, folder.path());
    let index = folder.path().join("model.safetensors.index.json");
    let good = read_json(&index);
    let check = |content: &str, parts: &[&str]| {
        std::fs::write(&index, content).unwrap();
        assert_names(&refusal(folder.path()), parts);
    };
    for text in ["", "[]", "{}", "{\"weight_map\": []}", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 1}}"] {
        check(text, &["model.safetensors.index.json"]);
    }
    let change = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut index = good.clone();
        change(index["weight_map"].as_object_mut().unwrap());
        index.to_string()
    };
    let name = "model.norm.weight";
    for unsafe_name in ["../../x", "/etc/passwd", "a/../b", "", ".", "..", "sub/model.safetensors"] {
        let text = change(&|map| _ = map.insert(name.to_owned(), json!(unsafe_name)));
        check(&text, &["index.json", &format!("`{unsafe_name}`"), "beside it"]);
    }
    let other = "model-00001-of-00003.safetensors";
    let text = change(&|map| _ = map.insert(name.to_owned(), json!(other)));
    check(&text, &["index.json", name, other, "where it is not"]);
    check(&change(&|map| _ = map.remove(name)), &["index.json", "does not name", name]);
    let absent = "model-00009-of-00003.safetensors";
    check(&change(&|map| _ = map.insert(name.to_owned(), json!(absent))), &[absent, "No such file", "index.json"]);
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    check(&good.to_string(), &["model-00002-of-00003.safetensors", "No such file", "fetch all"]);
}

#[test]
fn paths_that_are_no_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        std::fs::write(folder.path().join(name), "{}").unwrap();
        folder.path().join(name)
    };
    assert_names(&refusal(&folder.path().join("none")), &["none", "No such file", "GGUF", "config.json"]);
    assert_names(&refusal(folder.path()), &["holds no model", "GGUF", "config.json"]);
    file("config.json");
    assert_names(&refusal(folder.path()), &["holds no model", "safetensors"]);
    let pickled = file("pytorch_model.bin");
    for path in [&pickled, folder.path()] {
        assert_names(&refusal(path), &["pickled", "pytorch_model.bin", "safetensors"]);
    }
    assert_names(&refusal(&file("notes.txt")), &["notes.txt", "GGUF"]);
    let meta = tempfile::tempdir().unwrap();
    std::fs::write(meta.path().join("params.json"), "{}").unwrap();
    assert_names(&refusal(meta.path()), &["consolidated.00.pth"]);

    let weights = tempfile::tempdir().unwrap();
    std::fs::copy(checkpoints("f16").join("model.safetensors"), weights.path().join("a.safetensors")).unwrap();
    assert_names(&refusal(weights.path()), &["no `config.json`", "a.safetensors"]);
    std::fs::copy(checkpoints("f16").join("config.json"), weights.path().join("config.json")).unwrap();
    assert!(checkpoint::open(weights.path()).is_ok());
    std::fs::copy(checkpoints("f16").join("model.safetensors"), weights.path().join("b.safetensors")).unwrap();
    assert_names(&refusal(weights.path()), &["holds 2 files", "index"]);
    assert!(checkpoint::open(weights.path().join("b.safetensors")).is_ok());
    std::fs::create_dir(weights.path().join("c.safetensors")).unwrap();
    assert_names(&refusal(&weights.path().join("c.safetensors")), &["c.safetensors"]);
}

/// Damaged files are refused or run; nothing panics, and nothing is allocated on a header's word.
#[test]
fn random_damage_of_safetensors_never_panics() {
    let rounds = std::env::var("FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1000);
    let rng = &mut StdRng::seed_from_u64(5);
    let whole = std::fs::read(checkpoints("f16").join("model.safetensors")).unwrap();
    let (header, _) = split_header(&whole);
    let folder = copy_of(&checkpoints("f16"));
    let path = folder.path().join("model.safetensors");
    let mut opened = 0;
    for round in 0..rounds {
        let mut bytes = whole.clone();
        let mut log = String::new();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..8 + header.len().min(bytes.len() - 9));
            match rng.random_range(0..7) {
                0 => bytes[at] ^= 1 << rng.random_range(0..8),
                1 => bytes[at] = rng.random(),
                2 => bytes.insert(at, rng.random()),
                3 => _ = bytes.remove(at),
                4 => bytes.truncate(bytes.len() - rng.random_range(1..16)),
                // A digit becomes another: shapes and offsets.
                5 => {
                    let digits: Vec<usize> = (8..8 + header.len()).filter(|&i| bytes[i].is_ascii_digit()).collect();
                    bytes[digits[rng.random_range(0..digits.len())]] = b'0' + rng.random_range(0..10_u8);
                }
                _ => {
                    let other = rng.random_range(0..8 + header.len());
                    bytes.swap(at, other);
                }
            }
            write!(log, " {at}").unwrap();
        }
        std::fs::write(&path, &bytes).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            let model = checkpoint::open(folder.path())?.model(WeightDtype::Auto, &mut |_, _| {})?;
            let mut cache = model.new_cache(KvDtype::F16, Retention::Full).unwrap();
            model.prefill(&[1, 2, 3], &mut cache, &mut ())
        }));
        match result.unwrap_or_else(|_| panic!("round {round} panicked; damaged at{log}")) {
            Ok(_) => opened += 1,
            Err(error) => assert!(!error.to_string().contains('\n'), "round {round}: {error}"),
        }
    }
    // Some damage is harmless (to the numbers' names of no tensor), most is not: else this would test nothing.
    assert!(opened < rounds / 2, "{opened} of {rounds} opened");
}

/// Random f16 weights of about 100 MB.
fn write_large(folder: &Path) -> Checkpoint {
    let (hidden, mlp, layers, vocab) = (1024, 2816, 3, 16_384);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": vocab, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let matrix = |rows: usize, cols: usize| {
        Tensor::randn(0_f32, 0.02, (rows, cols), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()
    };
    let ones = || Tensor::ones(hidden, DType::F16, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), matrix(vocab, hidden)),
        ("model.norm.weight".to_owned(), ones()),
    ]);
    for layer in 0..layers {
        let mut add = |part: &str, tensor| tensors.insert(format!("model.layers.{layer}.{part}.weight"), tensor);
        for part in ["q", "k", "v", "o"] {
            add(&format!("self_attn.{part}_proj"), matrix(hidden, hidden));
        }
        add("mlp.gate_proj", matrix(mlp, hidden));
        add("mlp.up_proj", matrix(mlp, hidden));
        add("mlp.down_proj", matrix(hidden, mlp));
        add("input_layernorm", ones());
        add("post_attention_layernorm", ones());
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    checkpoint::open(folder).unwrap()
}

const CHILD_FOLDER: &str = "CHECKPOINT_TEST_FOLDER";
const CHILD_DTYPE: &str = "CHECKPOINT_TEST_DTYPE";

/// The process whose memory the next test looks at.
#[test]
#[ignore = "run by the test of memory, in a process of its own"]
fn memory_child() {
    let (Ok(folder), Ok(dtype)) = (std::env::var(CHILD_FOLDER), std::env::var(CHILD_DTYPE)) else { return };
    let dtypes = [WeightDtype::Auto, WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16];
    let dtype = dtypes.into_iter().find(|known| known.name() == dtype).unwrap();
    let before = process_memory().unwrap().peak;
    logits(&model(folder, dtype), &[1, 2, 3, 4], &[5]);
    println!("grown by {} bytes", process_memory().unwrap().peak - before);
}

/// In their own format, weights are never in memory but as the mapped file; converted, at most the file's pages and the
/// result are.
#[test]
fn loading_takes_little_more_memory_than_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let weights = write_large(folder.path()).tensors().bytes() as f64;
    for (dtype, factor) in [("auto", 1.2), ("bf16", 2.2)] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint::memory_child", "--ignored", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .env(CHILD_DTYPE, dtype)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let grown = text.split("grown by ").nth(1).and_then(|rest| rest.split(' ').next()).expect(&text);
        let grown: f64 = grown.parse().unwrap();
        assert!(grown > 0.9 * weights, "{dtype}: {grown} of {weights}: not all weights were read");
        assert!(grown < factor * weights, "{dtype}: {grown} of {weights}");
    }
}
