//! The model against candle's own LLaMA, transformers' logits and a dense pass with masked columns.

use adaptive_kvcache::Error;
use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::fidelity::argmax;
use adaptive_kvcache::generate::{FinishReason, Generation, GenerationOptions};
use adaptive_kvcache::kernels::quant::Compute;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama;

use crate::support::fixture::{Decision, Fixture, check_transformers_case};
use crate::support::{adaptive, ids, json, max_difference};

const FIXTURES: [&str; 4] = ["mha", "gqa-tied", "head-dim", "llama3-rope"];

/// Between two orders of the same f32 additions.
const TOLERANCE: f32 = 1e-4;

fn prompts(fixture: &Fixture) -> Vec<Vec<u32>> {
    fixture.expected.as_array().unwrap().iter().map(|case| ids(&case["ids"])).collect()
}

#[test]
fn logits_and_greedy_tokens_equal_transformers() {
    for name in FIXTURES {
        let fixture = Fixture::read(name);
        for weights in [WeightDtype::F32, WeightDtype::Auto] {
            let loaded = fixture.load(GgmlDType::F32, weights);
            for case in fixture.expected.as_array().unwrap() {
                let prompt = ids(&case["ids"]);
                assert_eq!(loaded.tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), prompt, "{name}");
                check_transformers_case(name, &loaded.model, case);
            }
        }
    }
}

#[test]
fn full_cache_logits_equal_candles_llama() {
    // candle's LLaMA has no head dimension of its own.
    for name in ["mha", "gqa-tied", "llama3-rope"] {
        let fixture = Fixture::read(name);
        let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
        let rope = &fixture.config["rope_parameters"];
        let rope_scaling = (rope["rope_type"] == "llama3").then(|| serde_json::from_value(rope.clone()).unwrap());
        let config = llama::Config {
            hidden_size: fixture.size("hidden_size"),
            intermediate_size: fixture.size("intermediate_size"),
            vocab_size: fixture.size("vocab_size"),
            num_hidden_layers: fixture.size("num_hidden_layers"),
            num_attention_heads: fixture.size("num_attention_heads"),
            num_key_value_heads: fixture.size("num_key_value_heads"),
            use_flash_attn: false,
            rms_norm_eps: fixture.config["rms_norm_eps"].as_f64().unwrap(),
            rope_theta: rope["rope_theta"].as_f64().unwrap() as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling,
            max_position_embeddings: fixture.size("max_position_embeddings"),
            tie_word_embeddings: fixture.config["tie_word_embeddings"].as_bool().unwrap(),
        };
        let variables = VarBuilder::from_tensors(fixture.weights.clone(), DType::F32, &Device::Cpu);
        let reference = llama::Llama::load(variables, &config).unwrap();
        for prompt in prompts(&fixture) {
            let mut reference_cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
            let mut logits = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap().logits;
            let mut input = Tensor::new(&prompt[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            for step in 0..64 {
                let position = if step == 0 { 0 } else { prompt.len() + step - 1 };
                let expected = reference.forward(&input, position, &mut reference_cache).unwrap();
                let expected: Vec<f32> = expected.i(0).unwrap().to_vec1().unwrap();
                let difference = max_difference(&logits, &expected);
                assert!(difference < TOLERANCE, "{name}, step {step}: {difference}");
                let id = u32::try_from(argmax(&expected).unwrap()).unwrap();
                input = Tensor::new(&[[id]], &Device::Cpu).unwrap();
                logits = loaded.model.decode(id, &mut cache).unwrap();
            }
        }
    }
}

/// Prompt rows are exact; rows after it see what their head keeps of the prompt and every later token. The kept
/// positions are compared at each step: a single step could not see a wrong position.
#[test]
fn adaptive_decoding_equals_dense_attention_with_evicted_columns_masked() {
    const STEPS: usize = 64;
    // Dense weights decode through tensors, stored ones in steps of a team.
    for (name, weights) in FIXTURES.iter().flat_map(|name| [(name, WeightDtype::F32), (name, WeightDtype::Auto)]) {
        let fixture = Fixture::read(name);
        let loaded = fixture.load(GgmlDType::F32, weights);
        for config in [
            r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
            r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
            r#"{"criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0, "sink_tokens": 2}"#,
            r#"{"method": "adakv", "observation_window": 3}"#,
            r#"{"method": "expected_attention", "kept_ratio": 0.4, "sink_tokens": 2}"#,
        ] {
            let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
            let prompt = loaded.tokenizer.encode(text).unwrap();
            let mut cache = loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, config)).unwrap();
            let prefill = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
            let kept: Vec<Vec<Vec<u32>>> = prefill
                .layers
                .iter()
                .map(|layer| layer.heads.iter().map(|head| head.positions.clone()).collect())
                .collect();
            let bytes = cache.bytes();
            assert!(bytes.kept < bytes.raw, "{name}: nothing was evicted under {config}");

            // Any text will do: the same tokens go through both.
            let text: Vec<u32> = (0..STEPS as u32).map(|step| 17 + (step * 37) % 900).collect();
            let all: Vec<u32> = prompt.iter().chain(&text).copied().collect();
            let decision = Decision { segment: 0..prompt.len(), kept: kept.clone() };
            let expected = fixture.dense_logits(&all, &[decision]);
            let mut logits = prefill.logits;
            for step in 0..=STEPS {
                let row = prompt.len() + step - 1;
                let expected: Vec<f32> = expected.i(row).unwrap().to_vec1().unwrap();
                let difference = max_difference(&logits, &expected);
                assert!(difference < TOLERANCE, "{name}, step {step}, {config}: {difference}");
                for (ledger, kept) in cache.ledgers().iter().zip(&kept) {
                    for (held, kept) in ledger.positions().iter().zip(kept) {
                        let new = prompt.len() as u32..(prompt.len() + step) as u32;
                        let positions: Vec<u32> = kept.iter().copied().chain(new).collect();
                        assert_eq!(*held, positions, "{name}, step {step}");
                    }
                }
                if let Some(&id) = text.get(step) {
                    logits = loaded.model.decode(id, &mut cache).unwrap();
                }
            }
        }
    }
}

/// As above over quantised rows: a prompt's own rows see what it wrote exactly, all later ones see it as it is stored.
#[test]
fn quantised_caches_equal_dense_attention_over_dequantised_rows() {
    const STEPS: usize = 40;
    // Of most steps, and of those where a number lies halfway between two quants, and is rounded to one of them here and
    // to the other in the reference.
    const TOLERANCES: [(KvDtype, GgmlDType, f32, f32); 2] =
        [(KvDtype::Q8_0, GgmlDType::Q8_0, 1e-2, 2e-2), (KvDtype::Q4_0, GgmlDType::Q4_0, 2e-3, 0.2)];
    const TIES: usize = 6;
    // Its heads are whole blocks of 32.
    let fixture = Fixture::read("head-dim");
    let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
    let config = r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#;
    let prompt = loaded.tokenizer.encode("The Reform Club was founded in 1836, and its members: gentlemen.").unwrap();
    let text: Vec<u32> = (0..STEPS as u32).map(|step| 17 + (step * 37) % 900).collect();
    let all: Vec<u32> = prompt.iter().chain(&text).copied().collect();
    for (dtype, format, tolerance, tie_tolerance) in TOLERANCES {
        let mut cache = loaded.model.new_cache(dtype, adaptive(&loaded.tokenizer, config)).unwrap();
        let prefill = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        assert!(cache.bytes().kept < cache.bytes().raw, "nothing was evicted");
        assert_eq!(cache.bytes().raw, prompt.len() * 2 * 4 * dtype.token_bytes(32));
        let kept = prefill.layers.iter().map(|l| l.heads.iter().map(|head| head.positions.clone()).collect());
        let decision = Decision { segment: 0..prompt.len(), kept: kept.collect() };
        let exact = fixture.dense_logits(&all, std::slice::from_ref(&decision));
        let expected = fixture.dense_logits_over(&all, &[decision], prompt.len(), format);
        let (mut rounding_effect, mut ties) = (0.0_f32, 0);
        let mut logits = prefill.logits;
        for step in 0..=STEPS {
            let expected: Vec<f32> = expected.i(prompt.len() + step - 1).unwrap().to_vec1().unwrap();
            let difference = max_difference(&logits, &expected);
            let exact: Vec<f32> = exact.i(prompt.len() + step - 1).unwrap().to_vec1().unwrap();
            rounding_effect = rounding_effect.max(max_difference(&exact, &expected));
            ties += usize::from(difference > tolerance);
            assert!(difference < tie_tolerance && ties <= TIES, "{dtype:?}, step {step}: {difference}, {ties} ties");
            if let Some(&id) = text.get(step) {
                logits = loaded.model.decode(id, &mut cache).unwrap();
            }
        }
        assert!(rounding_effect > tie_tolerance, "{dtype:?}: a test that could not see rounding");
    }
}

/// Several turns: each prompt sees what every head kept of the turns before, all that was decoded since, and itself; then
/// heads are profiled again. Positions are compared after every turn, logits after every token.
#[test]
fn turns_on_a_compressed_cache_equal_dense_attention_with_evicted_columns_masked() {
    const DECODED: usize = 7;
    // Dense weights decode through tensors, stored ones in steps of a team.
    for (name, weights) in FIXTURES.iter().flat_map(|name| [(name, WeightDtype::F32), (name, WeightDtype::Auto)]) {
        let fixture = Fixture::read(name);
        let loaded = fixture.load(GgmlDType::F32, weights);
        for config in [
            r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
            r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
            r#"{"criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0, "sink_tokens": 2}"#,
            r#"{"method": "adakv", "observation_window": 3}"#,
            r#"{"method": "expected_attention", "kept_ratio": 0.4, "sink_tokens": 2}"#,
        ] {
            let texts =
                ["The Reform Club was founded in 1836, and its members dined there.", "When?", "And why; who knows!"];
            let mut cache = loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, config)).unwrap();
            let mut all: Vec<u32> = Vec::new();
            let mut decisions: Vec<Decision> = Vec::new();
            let mut outputs: Vec<(usize, Vec<f32>)> = Vec::new(); // row, its logits
            for text in texts {
                let prompt = loaded.tokenizer.encode(text).unwrap();
                let first = decisions.last().map_or(0, |decision| decision.segment.end);
                all.extend(&prompt);
                let prefill = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
                let kept = prefill.layers.iter().map(|l| l.heads.iter().map(|head| head.positions.clone()).collect());
                decisions.push(Decision { segment: first..all.len(), kept: kept.collect() });
                for (index, ledger) in cache.ledgers().iter().enumerate() {
                    for (kv_head, held) in ledger.positions().iter().enumerate() {
                        let kept: Vec<u32> = decisions.iter().flat_map(|d| d.kept[index][kv_head].clone()).collect();
                        assert_eq!(*held, kept, "{name}, {config}");
                    }
                }
                outputs.push((all.len() - 1, prefill.logits));
                for step in 0..DECODED {
                    let id = 17 + (all.len() + step * 37) as u32 % 900;
                    all.push(id);
                    outputs.push((all.len() - 1, loaded.model.decode(id, &mut cache).unwrap()));
                }
            }
            let evicted =
                |decision: &Decision| decision.kept.iter().flatten().any(|k| k.len() < decision.segment.len());
            assert!(decisions.iter().all(evicted), "{name}: a turn without eviction under {config}");
            let expected = fixture.dense_logits(&all, &decisions);
            for (row, logits) in outputs {
                let expected: Vec<f32> = expected.i(row).unwrap().to_vec1().unwrap();
                let difference = max_difference(&logits, &expected);
                assert!(difference < TOLERANCE, "{name}, row {row}, {config}: {difference}");
            }
        }
    }
}

/// A full cache does not care how a text is cut into prompts.
#[test]
fn turns_on_a_full_cache_equal_one_prompt() {
    let fixture = Fixture::read("gqa-tied");
    let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
    let ids = &prompts(&fixture)[0];
    let mut whole = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let expected = loaded.model.prefill(ids, &mut whole, &mut ()).unwrap().logits;
    let (mut cache, mut logits) = (loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap(), Vec::new());
    for part in ids.chunks(ids.len() / 3) {
        logits = loaded.model.prefill(part, &mut cache, &mut ()).unwrap().logits;
    }
    assert!(max_difference(&logits, &expected) < TOLERANCE);
    assert_eq!(cache.bytes().kept, whole.bytes().kept);
    assert!(cache.ledgers().iter().flat_map(|ledger| ledger.lens()).all(|len| len == ids.len()));
}

/// Quantised weights on their blocks give what the same weights widened to f32 give.
#[test]
fn every_block_format_computes_what_its_widened_weights_compute() {
    // Its rows are whole blocks of 32; blocks of 256 are tested as matrices, in `kernels`.
    let fixture = Fixture::read("gqa-tied");
    let prompt = &prompts(&fixture)[0];
    for dtype in [
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
    ] {
        check_formats(&fixture, prompt, dtype);
    }
}

fn check_formats(fixture: &Fixture, prompt: &[u32], dtype: GgmlDType) {
    let run = |weights| {
        let loaded = fixture.load_for(&BackendKind::Kernels(Compute::Exact), dtype, weights);
        let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
        let mut rows = vec![loaded.model.prefill(prompt, &mut cache, &mut ()).unwrap().logits];
        rows.extend((20..30).map(|id| loaded.model.decode(id, &mut cache).unwrap()));
        rows.concat()
    };
    let difference = max_difference(&run(WeightDtype::Auto), &run(WeightDtype::F32));
    assert!(difference < TOLERANCE, "{dtype:?}: {difference}");
}

#[test]
fn prompts_that_cannot_be_used_are_refused() {
    let loaded = Fixture::read("mha").load(GgmlDType::F32, WeightDtype::Auto);
    let prefill = |ids: &[u32]| {
        let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
        loaded.model.prefill(ids, &mut cache, &mut ()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(prefill(&[]).contains("the prompt is empty"));
    assert!(prefill(&[5; 513]).contains("513 tokens are more than the model's context of 512"));
    assert!(prefill(&[1000]).contains("token id `1000` is outside of the vocabulary of 1000"));
}

#[test]
fn the_fixtures_are_what_the_tests_say() {
    // Group sizes 1 and more, a tied and an untied output, a head dimension that is not hidden / heads.
    let sizes = |name: &str| {
        let config = json(crate::support::data("fixtures").join(name).join("config.json"));
        (config["num_attention_heads"].as_u64().unwrap(), config["num_key_value_heads"].as_u64().unwrap())
    };
    assert_eq!(FIXTURES.map(sizes), [(4, 4), (8, 2), (4, 4), (4, 2)]);
}

#[test]
fn generation_goes_on_until_the_context_is_full() {
    let loaded = Fixture::read("mha").load(GgmlDType::F32, WeightDtype::Auto);
    let context = loaded.model.config().context_length;
    let prompt = vec![5; context - 2];
    let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
    let logits = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap().logits;
    let options = GenerationOptions { max_new_tokens: 10, ignore_eos: true, ..GenerationOptions::default() };
    let mut generation = Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, &prompt, logits, options);
    assert!(generation.by_ref().all(|step| step.is_ok()));
    // One from the prompt's scores, and one from each of the two positions that are left.
    assert_eq!((generation.ids().len(), generation.finish_reason()), (3, FinishReason::Context));
    drop(generation);
    assert_eq!(cache.seen(), context);
    assert!(loaded.model.decode(5, &mut cache).is_err());
    let again = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap_err();
    assert!(again.to_string().contains("1022 tokens are more than the model's context of 512"), "{again}");
}

/// Caches of prompts of several lengths, full and adaptive.
fn batch_caches(loaded: &Loaded, dtype: KvDtype) -> Vec<AdaptiveKvCache> {
    let config = r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#;
    let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
    let prompt = loaded.tokenizer.encode(text).unwrap();
    (0..5)
        .map(|index| {
            let retention = if index % 2 == 0 { adaptive(&loaded.tokenizer, config) } else { Retention::Full };
            let mut cache = loaded.model.new_cache(dtype, retention).unwrap();
            loaded.model.prefill(&prompt[..prompt.len() - 3 * index], &mut cache, &mut ()).unwrap();
            cache
        })
        .collect()
}

/// One sequence at a time through tensors is the oracle of steps over a batch.
#[test]
fn steps_of_a_batch_equal_single_ones_and_the_plain_path() {
    // Only this fixture's rows are whole blocks.
    for (name, dtype) in [
        ("mha", GgmlDType::F32),
        ("head-dim", GgmlDType::F32),
        ("llama3-rope", GgmlDType::F16),
        ("gqa-tied", GgmlDType::BF16),
        ("gqa-tied", GgmlDType::Q8_0),
        ("gqa-tied", GgmlDType::Q4_1),
        ("gqa-tied", GgmlDType::Q4_0),
        ("gqa-tied", GgmlDType::Q5_0),
        ("gqa-tied", GgmlDType::Q5_1),
    ] {
        let loaded = Fixture::read(name).load(dtype, WeightDtype::Auto);
        let model = &loaded.model;
        let mut plain = batch_caches(&loaded, KvDtype::F32);
        let mut single = plain.clone();
        let mut together = plain.clone();
        let mut logits = Vec::new();
        for step in 0..12u32 {
            let ids: Vec<u32> = (0..5).map(|index| 17 + (step * 37 + index * 101) % 900).collect();
            let mut caches: Vec<&mut AdaptiveKvCache> = together.iter_mut().collect();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + step as usize % 3).build().unwrap();
            pool.install(|| model.decode_batch(&ids, &mut caches, &mut logits)).unwrap();
            for (index, logits) in logits.chunks_exact(logits.len() / 5).enumerate() {
                let own = model.decode(ids[index], &mut single[index]).unwrap();
                assert!(own == logits, "{name}, {dtype:?}: a batch changes a sequence's result");
                let plain = model.decode_plain(ids[index], &mut plain[index]).unwrap();
                let difference = max_difference(logits, &plain);
                assert!(difference < TOLERANCE, "{name}, {dtype:?}, step {step}: {difference}");
            }
        }
        for ((a, b), c) in plain.iter().zip(&single).zip(&together) {
            assert_eq!((a.seen(), a.bytes().kept), (b.seen(), b.bytes().kept));
            assert_eq!((a.seen(), a.bytes().kept), (c.seen(), c.bytes().kept));
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_leaves_its_caches_as_they_were() {
    let fixture = Fixture::read("mha");
    let loaded = fixture.load(GgmlDType::F32, WeightDtype::Auto);
    let other = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let mut caches = batch_caches(&loaded, KvDtype::F32);
    let seen: Vec<usize> = caches.iter().map(AdaptiveKvCache::seen).collect();
    let mut logits = Vec::new();
    let mut foreign = other.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    {
        let [first, second, ..] = &mut caches[..] else { unreachable!() };
        let model = &loaded.model;
        assert!(matches!(model.decode_batch(&[3], &mut [first, second], &mut logits), Err(Error::Shape { .. })));
        let unknown = fixture.size("vocab_size") as u32;
        let error = model.decode_batch(&[3, unknown], &mut [first, second], &mut logits).unwrap_err();
        assert!(error.to_string().contains(&format!("token id `{unknown}`")), "{error}");
        assert!(matches!(
            model.decode_batch(&[3, 4], &mut [first, &mut foreign], &mut logits),
            Err(Error::Shape { .. })
        ));
        model.decode_batch(&[], &mut [], &mut logits).unwrap();
        assert!(logits.is_empty());
    }
    assert_eq!(caches.iter().map(AdaptiveKvCache::seen).collect::<Vec<_>>(), seen);
    assert!(caches.iter().all(AdaptiveKvCache::is_consistent));
}
