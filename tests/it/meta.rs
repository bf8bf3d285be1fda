//! Meta's layout, whole: `params.json`, `consolidated.*.pth` and `tokenizer.model`, against transformers' logits; the same
//! weights in every layout.

use std::fmt::Write;
use std::path::Path;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{self, Format, Loaded, WeightDtype, load};
use adaptive_kvcache::generate::{Generation, GenerationOptions};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tempfile::TempDir;

use crate::support::fixture::Fixture;
use crate::support::{data, ids, json as read_json, max_difference};

const FIXTURES: [&str; 2] = ["meta-1shard", "meta-2shard"];

/// The files' weights are bf16; what that rounding does to logits of this size, with room to spare.
const TOLERANCE: f32 = 2e-3;

/// Between two orders of the same f32 additions.
const SAME_WEIGHTS_TOLERANCE: f32 = 5e-5;

/// A folder with a fixture's files and the fixtures' tokenizer.
fn folder(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(data("fixtures").join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    add_tokenizer(folder.path());
    folder
}

fn add_tokenizer(folder: &Path) {
    std::fs::copy(data("fixtures/tokenizer.model"), folder.join("tokenizer.model")).unwrap();
}

fn load_f32(path: &Path) -> Loaded {
    load(path, WeightDtype::F32).unwrap()
}

fn logits(loaded: &Loaded, ids: &[u32]) -> Vec<f32> {
    let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    loaded.model.prefill(ids, &mut cache, &mut ()).unwrap().logits
}

/// Greedy text of 24 tokens.
fn text(loaded: &Loaded, prompt: &str) -> String {
    let ids = loaded.tokenizer.encode(prompt).unwrap();
    let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let logits = loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap().logits;
    let options = GenerationOptions { max_new_tokens: 24, ignore_eos: true, ..GenerationOptions::default() };
    let generation = Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, &ids, logits, options);
    generation.fold(String::new(), |text, step| text + &step.unwrap().text)
}

#[test]
fn logits_equal_transformers_for_one_file_and_for_two() {
    for name in FIXTURES {
        let folder = folder(name);
        for dtype in [WeightDtype::F32, WeightDtype::Auto] {
            let loaded = load(folder.path(), dtype).unwrap();
            assert_eq!(loaded.format, Format::Meta);
            for case in read_json(folder.path().join("expected.json")).as_array().unwrap() {
                let prompt = ids(&case["ids"]);
                assert_eq!(loaded.tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), prompt, "{name}");
                let expected = case["last_logits"].as_array().unwrap();
                let expected: Vec<f32> = expected.iter().map(|x| x.as_f64().unwrap() as f32).collect();
                let difference = max_difference(&logits(&loaded, &prompt), &expected);
                assert!(difference < TOLERANCE, "{name}, {dtype:?}: {difference}");
            }
        }
    }
}

/// Writes a Meta checkpoint's weights in Hugging Face's layout: names, and rows of queries and keys from neighbours to
/// halves.
fn write_hugging_face(meta: &Path, to: &Path) {
    let checkpoint = checkpoint::open(meta).unwrap();
    let config = checkpoint.config();
    let names = [
        ("attention.wq", "self_attn.q_proj"),
        ("attention.wk", "self_attn.k_proj"),
        ("attention.wv", "self_attn.v_proj"),
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("tok_embeddings", "embed_tokens"),
    ];
    let mut tensors = std::collections::HashMap::new();
    for (name, stored) in checkpoint.tensors().iter().filter(|(name, _)| *name != "rope.freqs") {
        let (owner, range) = stored.aligned(2).unwrap();
        let dtype = match stored.dtype.to_string().as_str() {
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            _ => DType::F32,
        };
        let bytes = &(*owner).as_ref()[range];
        let mut tensor = Tensor::from_raw_buffer(bytes, dtype, &stored.shape, &Device::Cpu).unwrap();
        if name.ends_with("wq.weight") || name.ends_with("wk.weight") {
            let (rows, cols) = tensor.dims2().unwrap();
            let pairs = tensor.reshape((rows / config.heads.head_dim, config.heads.head_dim / 2, 2, cols)).unwrap();
            tensor = pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap();
        }
        let renamed = names.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
        let renamed = if renamed == "output.weight" { "lm_head.weight".to_owned() } else { format!("model.{renamed}") };
        tensors.insert(renamed, tensor);
    }
    candle_core::safetensors::save(&tensors, to.join("model.safetensors")).unwrap();
    let json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.heads.num_heads,
        "num_key_value_heads": config.heads.num_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "head_dim": config.heads.head_dim,
        "tie_word_embeddings": false,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    });
    std::fs::write(to.join("config.json"), json.to_string()).unwrap();
    add_tokenizer(to);
}

#[test]
fn the_same_weights_give_the_same_text_in_every_layout() {
    let meta = [folder(FIXTURES[0]), folder(FIXTURES[1])];
    let hugging_face = tempfile::tempdir().unwrap();
    write_hugging_face(meta[0].path(), hugging_face.path());
    let gguf = tempfile::tempdir().unwrap();
    let gguf_path = gguf.path().join("model.gguf");
    Fixture::read_folder(hugging_face.path()).write_gguf(&gguf_path, GgmlDType::F32);

    let all = [meta[0].path(), meta[1].path(), hugging_face.path(), &gguf_path].map(load_f32);
    assert_eq!(
        all.each_ref().map(|loaded| loaded.format),
        [Format::Meta, Format::Meta, Format::Safetensors, Format::Gguf]
    );
    for prompt in ["The Reform Club was founded in 1836.", "Phileas Fogg", "é\n  ."] {
        let ids = all[0].tokenizer.encode(prompt).unwrap();
        let (expected, expected_text) = (logits(&all[0], &ids), text(&all[0], prompt));
        for loaded in &all[1..] {
            assert_eq!(loaded.tokenizer.encode(prompt).unwrap(), ids);
            let difference = max_difference(&logits(loaded, &ids), &expected);
            assert!(difference < SAME_WEIGHTS_TOLERANCE, "{:?}: {difference}", loaded.format);
            assert_eq!(text(loaded, prompt), expected_text, "{:?}", loaded.format);
        }
    }
}

/// Old downloads of Llama 2 name a `<pad>` behind the last token that the model can tell apart.
#[test]
fn tokens_that_were_added_behind_the_embeddings_are_left_out() {
    let folder = folder("meta-1shard");
    std::fs::write(folder.path().join("added_tokens.json"), r#"{"<pad>": 1000}"#).unwrap();
    let loaded = load_f32(folder.path());
    assert_eq!((loaded.tokenizer.vocab_size(), loaded.tokenizer.token_id("<pad>")), (1000, None));
}

#[test]
fn a_folder_that_is_not_whole_is_refused() {
    let refusal = |change: &dyn Fn(&Path)| {
        let folder = folder("meta-2shard");
        change(folder.path());
        let error = load(folder.path(), WeightDtype::Auto).unwrap_err();
        let mut text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        let _ = write!(text, " {}", error.hint().unwrap_or_default());
        text
    };
    let remove = |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    let write =
        |name: &'static str, text: &'static str| move |folder: &Path| std::fs::write(folder.join(name), text).unwrap();
    assert!(refusal(&remove("consolidated.00.pth")).contains("consolidated.00.pth"));
    assert!(refusal(&remove("tokenizer.model")).contains("tokenizer.model"));
    assert!(refusal(&write("params.json", "{")).contains("params.json"));
    assert!(refusal(&write("params.json", r#"{"dim": 64, "moe": {}}"#)).contains("moe"));
    assert!(refusal(&write("consolidated.01.pth", "PK")).contains("consolidated.01.pth"));
    assert!(refusal(&write("tokenizer.model", "not a tokenizer")).contains("tokenizer.model"));
    // The second of two files alone has half of every matrix.
    let half = |folder: &Path| std::fs::remove_file(folder.join("consolidated.01.pth")).unwrap();
    let text = refusal(&half);
    assert!(text.contains("2 files") && text.contains("consolidated.01.pth") && text.contains("missing"), "{text}");
}

/// Meta's own downloads have one tokenizer for the folders of all sizes.
#[test]
fn the_tokenizer_may_be_in_the_folder_above() {
    let above = tempfile::tempdir().unwrap();
    let inner = above.path().join("llama-2-7b");
    std::fs::rename(folder("meta-2shard").keep(), &inner).unwrap();
    let expected = text(&load_f32(&inner), "The Reform Club");
    std::fs::rename(inner.join("tokenizer.model"), above.path().join("tokenizer.model")).unwrap();
    for path in [inner.clone(), inner.join("consolidated.00.pth"), inner.join("../llama-2-7b/.")] {
        assert_eq!(text(&load_f32(&path), "The Reform Club"), expected, "{}", path.display());
    }
    std::fs::remove_file(above.path().join("tokenizer.model")).unwrap();
    let error = load(&inner, WeightDtype::Auto).unwrap_err().to_string();
    assert!(error.contains("llama-2-7b") && error.contains("tokenizer.model"), "{error}");
}
