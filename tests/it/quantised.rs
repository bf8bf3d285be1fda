//! Weights that are quantised while they are loaded: against the same blocks in a GGUF file, and against f32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::tensors::{MakeBytes, StoredDtype, StoredTensor, TensorData, Tensors};
use adaptive_kvcache::checkpoint::weights::{Assembly, Bias, Naming, OutputLayer, assemble};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, open};
use adaptive_kvcache::kernels::quant::{Compute, SharedBytes, WeightFormat};
use adaptive_kvcache::model::Llama;
use candle_core::quantized::gguf_file::{self, Value as GgufValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::numbers::{seeded, uniform};
use crate::support::fixture::Fixture;
use crate::support::{candle_on_cpu, data, max_difference};

/// Between two orders of the same f32 additions.
const SAME_WEIGHTS_TOLERANCE: f32 = 5e-5;

/// By how much logits of a model of two layers may differ from those of f32 weights, as a share: what rounding does to random
/// weights (about a 200th of themselves in `Q8_0`, a 12th in `Q4_0`, less in `Q4_K`), added up over seven products.
const MOST_ERROR: [(WeightDtype, f64); 3] =
    [(WeightDtype::Q8_0, 0.03), (WeightDtype::Q4_0, 0.35), (WeightDtype::Q4K, 0.3)];

fn exact() -> BackendKind {
    BackendKind::Kernels(Compute::Exact)
}

fn load(path: &Path, backend: &BackendKind, dtype: WeightDtype) -> Loaded {
    open(path).unwrap().load(backend, dtype, &mut |_, _| {}).unwrap()
}

/// Logits after a prompt and after two further tokens.
fn logits(loaded: &Loaded) -> Vec<f32> {
    logits_of(&loaded.model)
}

fn logits_of(model: &Llama) -> Vec<f32> {
    let prompt: Vec<u32> = (0..24).map(|i| (i * i + 3) % 1000).collect();
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let mut rows = model.prefill(&prompt, &mut cache, &mut ()).unwrap().logits;
    for id in [5, 900] {
        rows.extend(model.decode(id, &mut cache).unwrap());
    }
    rows
}

/// How far numbers are from others, as a share.
fn error(numbers: &[f32], exact: &[f32]) -> f64 {
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let difference = squares(&mut numbers.iter().zip(exact).map(|(a, b)| a - b));
    (difference / squares(&mut exact.iter().copied())).sqrt()
}

/// In numbers that f16 can hold.
fn rounded(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap()
}

/// A model of two layers with random weights that f16 can hold, whose rows are whole blocks of 256.
fn random(tied: bool) -> Fixture {
    let (hidden, mlp, vocab) = (256, 512, 1000);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": vocab,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    });
    let rng = RefCell::new(seeded(16));
    let matrix = |rows: usize, cols: usize| {
        // Sums of four are about normal.
        let parts = uniform(&mut rng.borrow_mut(), 4 * rows * cols, (0.75 / cols as f32).sqrt());
        let numbers = parts.as_chunks::<4>().0.iter().map(|parts| parts.iter().sum()).collect();
        rounded(&Tensor::from_vec::<_, f32>(numbers, (rows, cols), &Device::Cpu).unwrap())
    };
    let norm = || {
        let numbers = uniform(&mut rng.borrow_mut(), hidden, 0.5).iter().map(|number| 1.0 + number).collect();
        rounded(&Tensor::from_vec::<_, f32>(numbers, hidden, &Device::Cpu).unwrap())
    };
    let mut weights = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), matrix(vocab, hidden)),
        ("model.norm.weight".to_owned(), norm()),
    ]);
    if !tied {
        weights.insert("lm_head.weight".to_owned(), matrix(vocab, hidden));
    }
    for layer in 0..2 {
        let mut add = |part: &str, tensor| weights.insert(format!("model.layers.{layer}.{part}.weight"), tensor);
        for (part, rows, cols) in [
            ("self_attn.q_proj", 256, hidden),
            ("self_attn.k_proj", 128, hidden),
            ("self_attn.v_proj", 128, hidden),
            ("self_attn.o_proj", hidden, 256),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ] {
            add(part, matrix(rows, cols));
        }
        add("input_layernorm", norm());
        add("post_attention_layernorm", norm());
    }
    Fixture { config, weights, expected: Value::Null }
}

/// A folder in Hugging Face's layout.
fn folder_of(fixture: &Fixture, dtype: DType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights = fixture.weights.iter().map(|(name, weight)| (name.clone(), weight.to_dtype(dtype).unwrap()));
    let weights: HashMap<String, Tensor> = weights.collect();
    candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), fixture.config.to_string()).unwrap();
    std::fs::copy(data("fixtures/tokenizer.model"), folder.path().join("tokenizer.model")).unwrap();
    folder
}

/// A GGUF file in floats, and beside it one whose layers' matrices are in `blocks` and whose output layer is in `output`, as
/// candle rounds them; the embedding stays.
fn quantised_gguf(fixture: &Fixture, folder: &Path, blocks: GgmlDType, output: GgmlDType) -> [std::path::PathBuf; 2] {
    let paths = ["floats.gguf", "blocks.gguf"].map(|name| folder.join(name));
    fixture.write_gguf(&paths[0], GgmlDType::F16);
    let mut file = std::fs::File::open(&paths[0]).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let rounded = |dtype| QTensor::quantize(&tensor.dequantize(&Device::Cpu).unwrap(), dtype).unwrap();
        match name.as_str() {
            "output.weight" => tensors.push((name.clone(), rounded(output))),
            "token_embd.weight" => {
                if !content.tensor_infos.contains_key("output.weight") {
                    tensors.push(("output.weight".to_owned(), rounded(output)));
                }
                tensors.push((name.clone(), tensor));
            }
            _ if tensor.shape().rank() == 2 => tensors.push((name.clone(), rounded(blocks))),
            _ => tensors.push((name.clone(), tensor)),
        }
    }
    let metadata: Vec<(&str, &GgufValue)> = content.metadata.iter().map(|(key, value)| (&**key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(&paths[1]).unwrap(), &metadata, &tensors).unwrap();
    paths
}

/// Makes the output layer one that `Q6_K` holds as it is, whatever search finds its scales: candle's is another than ggml's,
/// which is ours (`src/kernels/rounding/q6_k.rs` has its test).
fn with_an_output_that_q6_k_holds(mut fixture: Fixture, tied: bool) -> Fixture {
    let name = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let shape = fixture.weights[name].dims2().unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let quants = (0..shape.0 * shape.1).map(|at| if at % 16 == 0 { -32 } else { rng.random_range(-31..=31) });
    let numbers: Vec<f32> = quants.map(|quant: i8| f32::from(quant) / 512.0).collect();
    fixture.weights.insert(name.to_owned(), Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap());
    fixture
}

#[test]
fn blocks_are_those_of_a_quantised_file() {
    for tied in [false, true] {
        let fixture = with_an_output_that_q6_k_holds(random(tied), tied);
        let folder = tempfile::tempdir().unwrap();
        for (dtype, blocks, output) in [
            (WeightDtype::Q8_0, GgmlDType::Q8_0, GgmlDType::Q8_0),
            (WeightDtype::Q4_0, GgmlDType::Q4_0, GgmlDType::Q6K),
        ] {
            let [floats, blocks] = quantised_gguf(&fixture, folder.path(), blocks, output);
            let expected = logits(&load(&blocks, &exact(), WeightDtype::Auto));
            // Every folder's numbers are the same, whatever they are stored in.
            for stored in [DType::F16, DType::F32] {
                let folder = folder_of(&fixture, stored);
                let loaded = load(folder.path(), &exact(), dtype);
                let difference = max_difference(&logits(&loaded), &expected);
                assert!(difference < SAME_WEIGHTS_TOLERANCE, "{dtype:?} of {stored:?}, tied {tied}: {difference}");
                assert_eq!((&*loaded.dtype, loaded.notes().count()), (dtype.name(), 0));
                let block_bytes = if dtype == WeightDtype::Q8_0 { 34.0 } else { 18.0 };
                let output_bytes = if dtype == WeightDtype::Q8_0 { 34.0 } else { 26.25 };
                let bytes = 2.0 * 589_824.0 / 32.0 * block_bytes + 256_000.0 / 32.0 * output_bytes;
                let norms = loaded.decode_bytes as f64 - bytes;
                assert!((0.0..8192.0).contains(&norms), "{} bytes are read, not {bytes}", loaded.decode_bytes);
            }
            let difference = max_difference(&logits(&load(&floats, &exact(), dtype)), &expected);
            assert!(difference < SAME_WEIGHTS_TOLERANCE, "{dtype:?} of GGUF, tied {tied}: {difference}");
        }
    }
}

#[test]
fn every_format_is_close_to_f32() {
    let fixture = random(false);
    let folder = folder_of(&fixture, DType::F16);
    let gguf = folder.path().join("floats.gguf");
    fixture.write_gguf(&gguf, GgmlDType::F32);
    let wide = logits(&load(folder.path(), &exact(), WeightDtype::F32));
    let mut errors = Vec::new();
    for (dtype, most) in MOST_ERROR {
        let quantised = logits(&load(folder.path(), &exact(), dtype));
        let share = error(&quantised, &wide);
        assert!(share > 0.0 && share < most, "{dtype:?}: {share}");
        errors.push(share);
        let of_gguf = logits(&load(&gguf, &exact(), dtype));
        let difference = max_difference(&of_gguf, &quantised);
        assert!(difference < SAME_WEIGHTS_TOLERANCE, "{dtype:?}: {difference} between a folder and GGUF");
        for backend in [BackendKind::default(), candle_on_cpu()] {
            let share = error(&logits(&load(folder.path(), &backend, dtype)), &quantised);
            // Inputs are rounded to 8 bits, with a scale for up to 256 of them.
            assert!(share < 0.1, "{dtype:?}, {backend:?}: {share}");
        }
    }
    assert!(errors[0] < 0.2 * errors[2] && errors[2] < errors[1], "{errors:?}");
    // Other numbers than f16's.
    let bf16 = folder_of(&fixture, DType::BF16);
    let wide = logits(&load(bf16.path(), &exact(), WeightDtype::F32));
    let share = error(&logits(&load(bf16.path(), &exact(), WeightDtype::Q8_0)), &wide);
    assert!(share > 0.0 && share < MOST_ERROR[0].1, "bf16: {share}");
}

/// As the parts of several `.pth` files.
#[test]
fn tensors_that_are_put_together_are_quantised() {
    let fixture = random(false);
    let folder = folder_of(&fixture, DType::F16);
    let checkpoint = open(folder.path()).unwrap();
    let mut tensors = Tensors::new("made");
    for (name, weight) in &fixture.weights {
        let numbers: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
        let bytes: Vec<u8> = numbers.iter().flat_map(|&number| half::f16::from_f32(number).to_le_bytes()).collect();
        let len = bytes.len();
        let bytes: SharedBytes = Arc::new(bytes);
        let make: MakeBytes = Arc::new(move || Ok((Arc::clone(&bytes), 0..len)));
        let dtype = StoredDtype::Usable(WeightFormat::F16);
        let (path, shape) = (Path::new("made").into(), weight.dims().to_vec());
        tensors.insert(name, StoredTensor { path, dtype, shape, data: TensorData::Made { len, make } }).unwrap();
    }
    let assembly = Assembly {
        naming: Naming::HuggingFace,
        attention_bias: Bias::Never,
        attention_output_bias: Bias::Never,
        mlp_bias: Bias::Never,
        output: OutputLayer::Own,
    };
    for (dtype, _) in MOST_ERROR {
        let config = checkpoint.config().clone();
        let model = assemble(&exact(), &tensors, assembly, config, dtype, &mut |_, _| {}).unwrap();
        let difference = max_difference(&logits_of(&model), &logits(&load(folder.path(), &exact(), dtype)));
        assert!(difference < SAME_WEIGHTS_TOLERANCE, "{dtype:?}: {difference}");
    }
}

/// As `llama-quantize` does: `Q5_0` for `Q4_K`, and `Q8_0` for `Q6_K`. A note says so.
#[test]
fn rows_that_are_no_whole_large_blocks_are_in_others() {
    let mut fixture = Fixture::read("head-dim");
    fixture.weights.values_mut().for_each(|weight| *weight = rounded(weight));
    let source = folder_of(&fixture, DType::F16);
    let loaded = load(source.path(), &exact(), WeightDtype::Q4K);
    let notes: Vec<&str> = loaded.notes().collect();
    let expected = "matrices of 64 or 128 columns, no multiple of 256, are quantised to q5_0 instead of q4_k";
    assert!(notes.contains(&expected), "{notes:?}");
    let folder = tempfile::tempdir().unwrap();
    let [_, blocks] = quantised_gguf(&fixture, folder.path(), GgmlDType::Q5_0, GgmlDType::Q8_0);
    let expected = logits(&load(&blocks, &exact(), WeightDtype::Auto));
    let difference = max_difference(&logits(&loaded), &expected);
    assert!(difference < SAME_WEIGHTS_TOLERANCE, "{difference}");
    for dtype in [WeightDtype::Q8_0, WeightDtype::Q4_0] {
        assert!(load(source.path(), &exact(), dtype).notes().all(|note| !note.contains("columns")));
    }
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let refusal = |path: &Path, dtype| {
        let error = open(path).unwrap().model(&BackendKind::default(), dtype, &mut |_, _| {}).unwrap_err();
        (error.to_string(), error.hint().unwrap_or_default().to_owned())
    };
    let expect = |(text, hint): (String, String), parts: &[&str], hint_part: &str| {
        assert!(parts.iter().all(|part| text.contains(part)) && !text.contains('\n'), "{text}");
        assert!(hint.contains(hint_part), "{hint}");
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks.gguf");
    // Blocks are not rounded once more, but those that are asked for already are fine.
    Fixture::read("gqa-tied").write_gguf(&path, GgmlDType::Q4_1);
    let parts = ["quantising tensor `token_embd.weight`", "blocks.gguf", "from q4_1, which is quantised already"];
    expect(refusal(&path, WeightDtype::Q4_0), &parts, "--dtype auto");
    Fixture::read("gqa-tied").write_gguf(&path, GgmlDType::Q8_0);
    let run = |dtype| logits(&load(&path, &exact(), dtype));
    assert_eq!(run(WeightDtype::Q8_0), run(WeightDtype::Auto));

    let mha = folder_of(&Fixture::read("mha"), DType::F32);
    // Parts of several files are read, too.
    let meta = data("fixtures/meta-2shard");
    let parts = ["tensor `layers.0.feed_forward.w2.weight`", "consolidated.00.pth", "172 columns"];
    expect(refusal(&meta, WeightDtype::Q4_0), &parts, "--dtype auto");
    for dtype in [WeightDtype::Q8_0, WeightDtype::Q4_0, WeightDtype::Q4K] {
        let parts = ["layers.0.mlp.down_proj.weight`", "whose 172 columns are no multiple of 32", "model.safetensors"];
        expect(refusal(mha.path(), dtype), &parts, "--dtype auto, f16 or bf16");
    }

    let mut fixture = random(true);
    for number in [1e9_f32, f32::NAN] {
        let name = "model.layers.1.mlp.up_proj.weight";
        let spoilt = Tensor::full(number, (1, 256), &Device::Cpu).unwrap();
        let rest = Tensor::ones((511, 256), DType::F32, &Device::Cpu).unwrap();
        fixture.weights.insert(name.to_owned(), Tensor::cat(&[&rest, &spoilt], 0).unwrap());
        let folder = folder_of(&fixture, DType::F32);
        for dtype in [WeightDtype::Q8_0, WeightDtype::Q4_0, WeightDtype::Q4K] {
            expect(refusal(folder.path(), dtype), &[name, "too large", dtype.name()], "--dtype auto, bf16 or f32");
        }
    }
}
