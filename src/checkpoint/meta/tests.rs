//! Meta's layout made in code: how tensors are put together, and what does not fit.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::pth::tests::{NamedTensor, checkpoint_of, checkpoint_of_halves};
use super::*;
use crate::backend::BackendKind;
use crate::cache::{KvDtype, Retention};
use crate::checkpoint::WeightDtype;
use crate::kernels::quant::Compute;

const HIDDEN: usize = 8;
const LLAMA3: &str = r#"{"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 6, "multiple_of": 4,
    "ffn_dim_multiplier": 1.2, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true}"#;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures").join(name)
}

fn open(folder: &Path) -> Vec<PthFile> {
    shard_files(folder).unwrap().iter().map(|path| PthFile::open(path).unwrap()).collect()
}

fn bytes(merged: &Merged) -> &[u8] {
    &(*merged.bytes).as_ref()[merged.range.clone()]
}

fn floats(merged: &Merged) -> Vec<f32> {
    bytes(merged).as_chunks::<4>().0.iter().map(|&number| f32::from_le_bytes(number)).collect()
}

/// One of two files of a model with one layer, as Llama 3 splits it. Numbers tell the file and the place.
#[expect(clippy::cast_precision_loss)]
fn half(shard: usize, change: impl FnOnce(&mut Vec<(String, Vec<usize>)>)) -> Vec<u8> {
    let layer = |name: &str, shape: &[usize]| (format!("layers.0.{name}.weight"), shape.to_vec());
    let mut shapes = vec![
        ("tok_embeddings.weight".to_owned(), vec![3, HIDDEN]),
        ("output.weight".to_owned(), vec![3, HIDDEN]),
        ("norm.weight".to_owned(), vec![HIDDEN]),
        layer("attention.wq", &[4, HIDDEN]),
        layer("attention.wk", &[4, HIDDEN]),
        layer("attention.wv", &[4, HIDDEN]),
        layer("attention.wo", &[HIDDEN, 4]),
        layer("feed_forward.w1", &[14, HIDDEN]),
        layer("feed_forward.w2", &[HIDDEN, 14]),
        layer("feed_forward.w3", &[14, HIDDEN]),
        layer("attention_norm", &[HIDDEN]),
        layer("ffn_norm", &[HIDDEN]),
    ];
    change(&mut shapes);
    let numbers = |len: usize| (0..len).map(|i| (1000 * shard + i) as f32).collect();
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let len = shape.iter().product();
        (name, shape, numbers(len))
    });
    checkpoint_of(&tensors.collect::<Vec<_>>())
}

fn folder(params: &str, shards: &[Vec<u8>]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(PARAMS), params).unwrap();
    for (number, bytes) in shards.iter().enumerate() {
        std::fs::write(folder.path().join(format!("consolidated.{number:02}.pth")), bytes).unwrap();
    }
    folder
}

fn config_of(params: &str) -> Result<LlamaConfig> {
    let folder = folder(params, &[half(0, |_| ()), half(1, |_| ())]);
    config(folder.path(), &open(folder.path()))
}

#[track_caller]
fn refused(params: &str, names: &[&str]) {
    let error = config_of(params).unwrap_err().to_string();
    assert!(error.contains(PARAMS) && names.iter().all(|name| error.contains(name)), "{error}");
}

#[test]
fn halves_are_the_whole() {
    let (one, two) = (open(&fixture("meta-1shard")), open(&fixture("meta-2shard")));
    assert_eq!((one.len(), two.len()), (1, 2));
    let sizes = config(&fixture("meta-1shard"), &one).unwrap();
    assert_eq!(sizes, config(&fixture("meta-2shard"), &two).unwrap());
    assert_eq!((sizes.vocab_size, sizes.intermediate_size, sizes.context_length), (1000, 172, 4096));
    assert_eq!(sizes.heads, HeadLayout { num_heads: 4, num_kv_heads: 4, head_dim: 16 });
    assert_eq!((sizes.rope.theta, sizes.rope.dim), (10_000.0, 16));
    for (name, entry) in one[0].tensors() {
        let (whole, merged) = (merge(name, &one, 64).unwrap(), merge(name, &two, 64).unwrap());
        assert_eq!((whole.dtype, &whole.shape), (entry.dtype, &entry.shape), "{name}");
        assert_eq!((merged.dtype, &merged.shape), (entry.dtype, &entry.shape), "{name}");
        assert!(bytes(&whole) == bytes(&merged), "{name}");
        assert_eq!(whole.range, entry.range, "{name} is not copied");
        assert_eq!(bytes(&merged).as_ptr().align_offset(2), 0, "{name}");
        // The pages that were given back are still there.
        assert!(bytes(&merged) == bytes(&merge(name, &two, 64).unwrap()), "{name}");
    }
}

#[test]
fn llama_3_splits_embeddings_by_rows() {
    let folder = folder(LLAMA3, &[half(0, |_| ()), half(1, |_| ())]);
    let shards = open(folder.path());
    let embeddings = merge("tok_embeddings.weight", &shards, HIDDEN).unwrap();
    assert_eq!(embeddings.shape, [6, HIDDEN]);
    assert_eq!(floats(&embeddings)[22..26], [22.0, 23.0, 1000.0, 1001.0]);
    let output = merge("layers.0.attention.wo.weight", &shards, HIDDEN).unwrap();
    assert_eq!(output.shape, [HIDDEN, HIDDEN]);
    assert_eq!(floats(&output)[..10], [0.0, 1.0, 2.0, 3.0, 1000.0, 1001.0, 1002.0, 1003.0, 4.0, 5.0]);
    // These tests' archives do not align anything: what is taken from one file may have to be copied.
    let norm = merge("norm.weight", &shards, HIDDEN).unwrap();
    assert_eq!(bytes(&norm).as_ptr().align_offset(4), 0);
    assert_eq!(floats(&norm)[..2], [0.0, 1.0]);

    let sizes = config(folder.path(), &shards).unwrap();
    assert_eq!((sizes.vocab_size, sizes.intermediate_size, sizes.context_length), (6, 28, 131_072));
    let scaling = Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    assert_eq!(sizes.rope.frequency_divisors, scaling.divisors(500_000.0, 4));
}

#[test]
fn widths_of_metas_models() {
    for (dim, multiple_of, multiplier, width) in [
        (4096, 256, "null", 11_008),
        (5120, 256, "null", 13_824),
        (8192, 256, "null", 22_016),
        (8192, 4096, "1.3", 28_672),
        (4096, 1024, "1.3", 14_336),
        (16_384, 4096, "1.2", 53_248),
        (2048, 256, "1.5", 8192),
        (3072, 256, "1.0", 8192),
    ] {
        let text = format!(r#"{{"multiple_of": {multiple_of}, "ffn_dim_multiplier": {multiplier}}}"#);
        let json = serde_json::from_str(&text).unwrap();
        let params = Object::new(&json, Path::new(PARAMS)).unwrap();
        assert_eq!(intermediate_size(&params, dim).unwrap(), width);
    }
}

#[test]
fn context_lengths() {
    let with = |add: &str| {
        let plain = LLAMA3.replace(r#", "use_scaled_rope": true"#, "").replace("500000.0", "10000");
        config_of(&plain.replace('}', &format!("{add}}}"))).unwrap().context_length
    };
    assert_eq!(with(""), 4096);
    assert_eq!(with(r#", "norm_eps": 1e-06"#), 2048);
    assert_eq!(with(r#", "rope_theta": 1000000.0"#), 16_384);
    assert_eq!(with(r#", "max_seq_len": 512"#), 512);
}

#[test]
fn params_that_do_not_fit_are_refused() {
    let change = |from: &str, to: &str| {
        assert!(LLAMA3.contains(from));
        LLAMA3.replace(from, to)
    };
    refused("[]", &["JSON"]);
    refused("", &["JSON"]);
    refused("{}", &["`dim`", "got nothing"]);
    refused(&change("\"dim\"", "\"moe\": {}, \"dim\""), &["`moe`"]);
    refused(&change("\"dim\"", "\"vision_chunk_size\": 448, \"dim\""), &["`vision_chunk_size`"]);
    refused(&change("\"dim\": 8", "\"dim\": -8"), &["`dim`", "-8"]);
    refused(&change("\"dim\": 8", "\"dim\": 1e300"), &["`dim`"]);
    refused(&change("\"dim\": 8", "\"dim\": 0"), &["`dim`", "0"]);
    refused(&change("\"n_layers\": 1", "\"n_layers\": 1000000"), &["`n_layers`", "1000000"]);
    refused(&change("\"n_heads\": 2", "\"n_heads\": 4"), &["`n_kv_heads`", "wk"]);
    refused(&change("\"n_heads\": 2", "\"n_heads\": 9"), &["`n_kv_heads`"]);
    refused(&change("\"n_heads\": 2", "\"n_heads\": 8"), &["`n_heads`", "head dimension"]);
    refused(&change("\"n_kv_heads\": 2", "\"n_kv_heads\": 0"), &["`n_kv_heads`"]);
    refused(&change("\"n_kv_heads\": 2", "\"n_kv_heads\": 1"), &["`n_kv_heads`", "wk"]);
    refused(&change("\"vocab_size\": 6", "\"vocab_size\": 7"), &["`vocab_size`", "6 rows"]);
    refused(&change("\"multiple_of\": 4", "\"multiple_of\": 0"), &["`multiple_of`"]);
    refused(&change("\"multiple_of\": 4", "\"multiple_of\": 32"), &["`multiple_of`", "32", "28 rows"]);
    refused(&change("1.2", "1e300"), &["`ffn_dim_multiplier`"]);
    refused(&change("1.2", "-1"), &["`ffn_dim_multiplier`"]);
    refused(&change("1e-05", "\"small\""), &["`norm_eps`", "small"]);
    refused(&change("500000.0", "0"), &["`rope_theta`"]);
    refused(&change("true", "\"yes\""), &["`use_scaled_rope`"]);
}

#[test]
fn files_that_do_not_fit_together_are_refused() {
    let error = |shards: &[Vec<u8>]| {
        let folder = folder(LLAMA3, shards);
        config(folder.path(), &open(folder.path())).unwrap_err().to_string()
    };
    let good = || half(0, |_| ());
    assert!(error(&[good()]).contains("2 files"));
    let three = error(&[good(), half(1, |_| ()), half(2, |_| ())]);
    assert!(three.contains("in 2 files, and beside it are 3"), "{three}");
    let missing = error(&[good(), half(1, |shapes| shapes.retain(|(name, _)| !name.contains("w1")))]);
    assert!(missing.contains("consolidated.01.pth") && missing.contains("w1"), "{missing}");
    let extra = error(&[good(), half(1, |shapes| shapes.push(("extra".to_owned(), vec![1])))]);
    assert!(extra.contains("consolidated.01.pth") && extra.contains("`extra`"), "{extra}");
    let other = error(&[good(), half(1, |shapes| shapes[3].1 = vec![2, HIDDEN])]);
    assert!(other.contains("[2, 8]") && other.contains("[4, 8]"), "{other}");
    let embeddings = error(&[3, 3].map(|columns| half(0, |shapes| shapes[0].1 = vec![3, columns])));
    assert!(embeddings.contains("tok_embeddings"), "{embeddings}");
    let flat = error(&[0, 1].map(|shard| half(shard, |shapes| shapes[3].1 = vec![32])));
    assert!(flat.contains("2 dimensions"), "{flat}");
}

#[test]
fn a_missing_file_is_named() {
    let folder = folder(LLAMA3, &[Vec::new(), Vec::new(), Vec::new()]);
    std::fs::write(folder.path().join("consolidated.1.pth"), "").unwrap();
    assert_eq!(shard_files(folder.path()).unwrap().len(), 3);
    std::fs::remove_file(folder.path().join("consolidated.01.pth")).unwrap();
    let error = shard_files(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`consolidated.01.pth` is missing"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(shard_files(empty.path()).unwrap_err().hint().is_some());
    shard_files(&empty.path().join("none")).unwrap_err();
}

/// The first LLaMA's files have the rotary frequencies in each layer, whole in each file.
#[test]
fn buffers_of_llama_1_do_no_harm() {
    let buffer = |shapes: &mut Vec<(String, Vec<usize>)>| {
        shapes.push(("layers.0.attention.inner_attention.rope.freqs".to_owned(), vec![2]));
        shapes.push(("rope.freqs".to_owned(), vec![2]));
    };
    let folder = folder(LLAMA3, &[half(0, buffer), half(1, buffer)]);
    let checkpoint = crate::checkpoint::open(folder.path()).unwrap();
    let model = checkpoint.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap();
    assert_eq!(model.config().num_layers, 1);
}

/// A model whose rows are whole blocks of 32, as Llama 2 has it.
const BLOCKS: &str =
    r#"{"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 96, "multiple_of": 32, "norm_eps": 1e-05}"#;

/// Its weights, random.
fn weights_in_blocks() -> Vec<NamedTensor> {
    let mut rng = StdRng::seed_from_u64(5);
    let mut shapes = vec![
        ("tok_embeddings.weight".to_owned(), vec![96, 64]),
        ("output.weight".to_owned(), vec![96, 64]),
        ("norm.weight".to_owned(), vec![64]),
    ];
    for layer in 0..2 {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("layers.{layer}.{name}.weight"), shape.to_vec()));
        for name in ["wq", "wk", "wv", "wo"] {
            add(&format!("attention.{name}"), &[64, 64]);
        }
        add("feed_forward.w1", &[192, 64]);
        add("feed_forward.w2", &[64, 192]);
        add("feed_forward.w3", &[192, 64]);
        for name in ["attention_norm", "ffn_norm"] {
            add(name, &[64]);
        }
    }
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let range = if shape.len() == 1 { 0.5..1.5 } else { -0.2..0.2 };
        let numbers = (0..shape.iter().product()).map(|_| rng.random_range(range.clone())).collect();
        (name, shape, numbers)
    });
    tensors.collect()
}

/// The half of every tensor that one of two files has.
fn half_of(shard: usize, tensors: &[NamedTensor]) -> Vec<NamedTensor> {
    let halves = tensors.iter().map(|(name, shape, numbers)| {
        let by_columns = ["wo", "w2", "tok_embeddings"].iter().any(|part| name.contains(part));
        let (shape, half) = match shape[..] {
            [rows, cols] if by_columns => {
                let columns = numbers.chunks(cols).flat_map(|row| &row[shard * cols / 2..(shard + 1) * cols / 2]);
                (vec![rows, cols / 2], columns.copied().collect())
            }
            [rows, cols] => (vec![rows / 2, cols], numbers.chunks(rows / 2 * cols).nth(shard).unwrap().to_vec()),
            _ => (shape.clone(), numbers.clone()),
        };
        (name.clone(), shape, half)
    });
    halves.collect()
}

#[test]
fn folders_are_quantised_while_they_are_loaded() {
    let tensors = weights_in_blocks();
    let whole = folder(BLOCKS, &[checkpoint_of_halves(&tensors)]);
    let halves = folder(BLOCKS, &[0, 1].map(|shard| checkpoint_of_halves(&half_of(shard, &tensors))));
    let logits = |folder: &tempfile::TempDir, dtype| {
        let checkpoint = crate::checkpoint::open(folder.path()).unwrap();
        let model = checkpoint.model(&BackendKind::Kernels(Compute::Exact), dtype, &mut |_, _| {}).unwrap();
        let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
        model.prefill(&[3, 14, 15, 92, 65, 35], &mut cache, &mut ()).unwrap().logits
    };
    let wide = logits(&whole, WeightDtype::F32);
    let size = wide.iter().map(|x| x * x).sum::<f32>().sqrt();
    let mut shares = Vec::new();
    for dtype in [WeightDtype::Q8_0, WeightDtype::Q4_0] {
        let quantised = logits(&whole, dtype);
        assert_eq!(quantised, logits(&halves, dtype), "{dtype:?}");
        let difference = wide.iter().zip(&quantised).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        shares.push(difference / size);
    }
    // What rounding to a 254th and a 15th of a block's range does, added up over two layers.
    assert!(0.0 < shares[0] && shares[0] < 0.03 && shares[0] < 0.2 * shares[1] && shares[1] < 0.35, "{shares:?}");
}
