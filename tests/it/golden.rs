//! SmolLM2 against an independent forward pass: token ids, log-probabilities, greedy tokens, and every head's choice.
//!
//! `tests/data/smollm2_profile.json` was made with the weights widened to f32.

use std::process::Command;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, open};
use adaptive_kvcache::fidelity::top_logprobs;
use adaptive_kvcache::generate::{Generation, GenerationOptions};
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::kernels::vector::instruction_set;
use serde_json::Value;

use crate::support::{adaptive, candle_on_cpu, data, ids, json, smollm2_f32, smollm2_path};

/// Between two f32 forward passes over 24 or 30 layers.
const LOGPROB_TOLERANCE: f64 = 0.02;

/// A head whose value is this close to the threshold may be decided either way.
const THRESHOLD_MARGIN: f64 = 1e-3;

fn golden() -> Value {
    json(data("smollm2_profile.json"))
}

#[test]
fn ids_logprobs_and_greedy_tokens_are_equal() {
    assert_texts(smollm2_f32());
}

/// Each set in a process of its own, since a process computes with one.
#[test]
fn texts_and_choices_are_equal_on_every_instruction_set() {
    const NAME: &str = "golden::texts_and_choices_are_equal_on_every_instruction_set";
    const VARIABLE: &str = "GOLDEN_INSTRUCTIONS";
    if let Ok(set) = std::env::var(VARIABLE) {
        set.parse::<InstructionSet>().unwrap().use_everywhere().unwrap();
        assert_eq!(instruction_set().name(), set);
        assert_texts(smollm2_f32());
        assert_choices(smollm2_f32());
        return println!("checked on {set}");
    }
    let sets = InstructionSet::available();
    for set in &sets {
        let test = std::env::current_exe().unwrap();
        let output =
            Command::new(test).args(["--exact", NAME, "--nocapture"]).env(VARIABLE, set.name()).output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success() && out.contains(&format!("checked on {}", set.name())),
            "{set:?}: {out}{error}"
        );
    }
    assert_eq!(sets[0].name(), "portable");
}

#[test]
fn ids_logprobs_and_greedy_tokens_of_candle_operations_are_equal() {
    assert_texts(&smollm2_on_candle());
}

fn smollm2_on_candle() -> Loaded {
    open(smollm2_path()).unwrap().load(&candle_on_cpu(), WeightDtype::F32, &mut |_, _| {}).unwrap()
}

/// Compares a text's ids, the ten most probable tokens that follow, and what is generated greedily; what it says.
#[track_caller]
pub fn expect_case(loaded: &Loaded, case: &Value) -> String {
    let name = &case["text"];
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let prompt = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
    assert_eq!(prompt, ids(&case["ids"]), "{name}");
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let prefill = model.prefill(&prompt, &mut cache, &mut ()).unwrap();
    let expected = case["top10_logprobs"].as_array().unwrap();
    for ((id, logprob), expected) in top_logprobs(&prefill.logits, 10).into_iter().zip(expected) {
        assert_eq!(u64::from(id), expected[0].as_u64().unwrap(), "{name}");
        let difference = (f64::from(logprob) - expected[1].as_f64().unwrap()).abs();
        assert!(difference < LOGPROB_TOLERANCE, "{name}, token {id}: {difference}");
    }
    let options = GenerationOptions { max_new_tokens: 24, ignore_eos: true, ..GenerationOptions::default() };
    let mut generation = Generation::new(model, tokenizer, &mut cache, &prompt, prefill.logits, options);
    let text = generation.by_ref().map(|step| step.unwrap().text).collect();
    assert_eq!(generation.ids(), ids(&case["greedy24"]), "{name}");
    text
}

fn assert_texts(loaded: &Loaded) {
    for case in golden()["cases"].as_array().unwrap() {
        assert_eq!(expect_case(loaded, case), case["greedy_text"].as_str().unwrap(), "{}", case["name"]);
    }
}

#[test]
fn every_heads_level_and_kept_count_are_equal() {
    assert_choices(smollm2_f32());
}

#[test]
fn every_heads_level_and_kept_count_of_candle_operations_are_equal() {
    assert_choices(&smollm2_on_candle());
}

fn assert_choices(loaded: &Loaded) {
    let (mut compared, mut near) = (0, 0);
    for case in golden()["cases"].as_array().unwrap() {
        let prompt = ids(&case["ids"]);
        for (setting, profile) in case["profiles"].as_object().unwrap() {
            let mut config = profile["config"].clone();
            let threshold = config["recovery_threshold"].as_f64().unwrap();
            let max_abs = config["criterion"] == "max_abs";
            let mut cache =
                loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, &config.take().to_string())).unwrap();
            let prefill = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
            for expected in profile["heads"].as_array().unwrap() {
                let index = |key: &str| usize::try_from(expected[key].as_u64().unwrap()).unwrap();
                let head = &prefill.layers[index("layer")].heads[index("kv_head")];
                let place = format!("{}, {setting}, layer {}, head {}", case["name"], index("layer"), head.kv_head);
                let values: Vec<f64> =
                    expected["values"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
                let limit = if max_abs { 1.0 - threshold } else { threshold };
                if values.iter().any(|value| (value - limit).abs() < THRESHOLD_MARGIN) {
                    near += 1;
                    continue;
                }
                compared += 1;
                assert_eq!(head.level, Some(index("level")), "{place}: {:?} for {values:?}", head.recovered);
                assert_eq!(head.positions.len(), index("kept"), "{place}");
                for (value, expected) in head.recovered.iter().zip(&values) {
                    assert!((value - expected).abs() < THRESHOLD_MARGIN, "{place}: {value} for {expected}");
                }
                if let Some(positions) = expected.get("positions") {
                    assert_eq!(head.positions, ids(positions), "{place}");
                }
            }
        }
    }
    assert!(compared > 900, "{compared} heads compared, {near} left out"); // 3 prompts x 4 settings x 90 heads
}
