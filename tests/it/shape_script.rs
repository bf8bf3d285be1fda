//! `scripts/make_shape.py`, with small sizes: what it writes loads in both layouts, its blocks hold the same weights in
//! every format, and each tensor has the type that `llama-quantize` would give to it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Format, Loaded, WeightDtype, load, open};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make_shape.py");
const SMALL: &str = "--layers 2 --heads 2 --hidden 64 --mlp 96 --vocab 1000";

fn write(path: &Path, args: &str) -> std::process::Output {
    Command::new("python3").arg(SCRIPT).arg(path).args(args.split_whitespace()).output().unwrap()
}

fn written(path: &Path, args: &str) {
    let output = write(path, args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn logits(loaded: &Loaded) -> Vec<f32> {
    let ids = loaded.tokenizer.encode("The Reform Club was founded in 1836.!").unwrap();
    assert_eq!(ids.len(), 18, "the original's published run had 18 tokens");
    let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
    loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap().logits
}

fn norm(values: impl Iterator<Item = f32>) -> f32 {
    values.map(|value| value * value).sum::<f32>().sqrt()
}

#[test]
fn both_layouts_load_and_compute() {
    let folder = tempfile::tempdir().unwrap();
    // The tied embedding outweighs the matrices in q4_0.
    for (name, layout, dtype) in [("a.gguf", Format::Gguf, "q8_0"), ("b", Format::Safetensors, "f16")] {
        let path = folder.path().join(name);
        written(&path, &format!("{SMALL} --kv-heads 1 --vocab 1234 --tied --layout {}", layout.name()));
        let loaded = load(&path, WeightDtype::Auto).unwrap();
        assert_eq!(loaded.format, layout);
        assert_eq!(loaded.dtype, dtype);
        let config = loaded.model.config();
        assert_eq!((config.num_layers, config.heads.num_heads, config.heads.num_kv_heads), (2, 2, 1));
        assert!(open(&path).unwrap().is_tied());
        let logits = logits(&loaded);
        assert_eq!((logits.len(), loaded.tokenizer.vocab_size()), (1234, 1234));
        let size = norm(logits.iter().copied()) / norm(logits.iter().map(|_| 1.0));
        assert!((0.5..8.0).contains(&size), "logits are meant to have a size of about 2, not {size}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing half-written stays");
}

/// The same seed gives the same weights, which the formats round. The bounds are twice what they were seen to cost, but
/// far below what any wrong bit, scale or order of a block would.
#[test]
fn all_formats_hold_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let read = |format: &str| {
        let path = folder.path().join(format);
        written(&path, &format!("--layers 2 --heads 4 --hidden 256 --mlp 256 --vocab 1000 --format {format}"));
        logits(&load(&path, WeightDtype::F32).unwrap())
    };
    let exact = read("f32");
    for (format, bound) in [
        ("bf16", 0.03),
        ("q4_0", 0.4),
        ("q4_1", 0.4),
        ("q5_0", 0.2),
        ("q5_1", 0.2),
        ("q8_0", 0.05),
        ("q2_k", 0.9),
        ("q3_k_m", 0.5),
        ("q4_k_m", 0.3),
        ("q5_k_m", 0.2),
        ("q6_k", 0.1),
        ("iq4_nl", 0.4),
        ("iq4_xs", 0.4),
        ("mxfp4", 0.6),
    ] {
        let rounded = read(format);
        let error = norm(rounded.iter().zip(&exact).map(|(a, b)| a - b)) / norm(exact.iter().copied());
        assert!(error > 0.0 && error < bound, "{format}: logits are off by {error}");
    }
}

/// Layers whose matrix of that name has that type.
fn layers_with(path: &Path, name: &str, dtype: &str) -> BTreeSet<usize> {
    let checkpoint = open(path).unwrap();
    let tensors = checkpoint.gguf().unwrap().tensors();
    let of = |layer: usize| format!("{:?}", tensors[&format!("blk.{layer}.{name}.weight")].dtype);
    (0..checkpoint.config().num_layers).filter(|layer| of(*layer) == dtype).collect()
}

fn type_of(path: &Path, name: &str) -> Option<String> {
    let checkpoint = open(path).unwrap();
    checkpoint.gguf().unwrap().tensors().get(name).map(|entry| format!("{:?}", entry.dtype))
}

#[test]
fn mixes_of_k_quants_are_those_of_llama_quantize() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let sizes = "--layers 16 --heads 4 --kv-heads 1 --hidden 256 --mlp 256 --vocab 1000";
    let write = |args: &str| {
        std::fs::remove_file(&path).ok();
        written(&path, &format!("{sizes} {args}"));
    };
    // The first and the last eighth, and every third layer between them.
    let more_bits = BTreeSet::from([0, 1, 4, 7, 10, 13, 14, 15]);
    for (format, base) in [("q4_k_m", "Q4K"), ("q5_k_m", "Q5K")] {
        write(&format!("--format {format}"));
        for name in ["attn_v", "ffn_down"] {
            assert_eq!(layers_with(&path, name, "Q6K"), more_bits, "{format} {name}");
            assert_eq!(layers_with(&path, name, base).len(), 8);
        }
        for name in ["attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"] {
            assert_eq!(layers_with(&path, name, base).len(), 16, "{format} {name}");
        }
        assert_eq!(type_of(&path, "token_embd.weight").as_deref(), Some(base));
        assert_eq!(type_of(&path, "output.weight").as_deref(), Some("Q6K"));
        assert_eq!(type_of(&path, "blk.3.attn_norm.weight").as_deref(), Some("F32"));
    }
    // A tied embedding is an output matrix, too.
    write("--format q4_k_m --tied");
    assert_eq!(type_of(&path, "token_embd.weight").as_deref(), Some("Q6K"));
    assert_eq!(type_of(&path, "output.weight"), None);
    write("--format q4_k_s");
    assert_eq!(layers_with(&path, "attn_v", "Q5K"), BTreeSet::from([0, 1, 2, 3]));
    assert_eq!(layers_with(&path, "ffn_down", "Q5K"), BTreeSet::from([0, 1]));
    write("--format q3_k_m");
    assert_eq!(layers_with(&path, "attn_v", "Q5K"), BTreeSet::from([0, 1]));
    assert_eq!(layers_with(&path, "ffn_down", "Q5K"), BTreeSet::from([0]));
    assert_eq!(layers_with(&path, "attn_output", "Q4K").len(), 16);
    // Rows that are no multiple of 256, as SmolLM2's.
    write("--format q4_k_m --hidden 192 --head-dim 48");
    assert_eq!(layers_with(&path, "ffn_up", "Q5_0").len(), 16);
    assert_eq!(layers_with(&path, "attn_v", "Q8_0"), more_bits);
    assert_eq!(layers_with(&path, "ffn_down", "Q6K"), more_bits, "the MLP has 256");
}

#[test]
fn sizes_that_do_not_fit_and_existing_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    for (args, part) in [
        ("--hidden 65", "--hidden 65"),
        ("--mlp 97", "multiples of 32"),
        ("--layers 0", "at least 1"),
        ("--kv-heads 3", "--kv-heads 3"),
        ("--head-dim 7", "head size 7"),
        ("--vocab 999", "1000 tokens already"),
        ("--layout safetensors --format q4_0", "f16, bf16 and f32"),
        ("--shape 3b", "invalid choice"),
    ] {
        let output = write(&path, &format!("{SMALL} {args}"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(part), "{args:?}: {text}");
        assert!(!text.contains("Traceback") && !path.exists());
    }
    std::fs::write(&path, "mine").unwrap();
    assert!(!write(&path, SMALL).status.success());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}
