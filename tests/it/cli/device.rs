//! `--backend candle`: every command by candle operations, on the CPU, as by its kernels.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use super::tiny_gguf::TinyGguf;
use super::{Lab, MODEL, succeeds};

/// A folder with the tiny model, whose context is 64 tokens.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab.write("mass.json", r#"{"criterion": "mass", "t": 0.6, "frequency_ratio": 0.3, "locality_ratio": 0.3}"#);
    lab.write("evict.json", r#"{"decode": "evict"}"#);
    lab
}

const PROMPT: [&str; 6] = ["--model", "tiny.gguf", "--prompt", "ab ac b a ab c ab", "--config", "mass.json"];

/// Runs with the kernels and with candle operations.
fn both(lab: &Lab, args: &[&str]) -> [String; 2] {
    ["kernels", "candle"].map(|backend| succeeds(&lab.run(&[args, &["--backend", backend]].concat())))
}

#[test]
fn texts_reports_and_pictures_are_those_of_the_kernels() {
    let lab = lab();
    let generate =
        [&["generate"], &PROMPT[..], &["-n", "12", "--ignore-eos", "--report", "r.json", "--report-positions"]];
    let mut reports = Vec::new();
    for backend in ["auto", "candle"] {
        succeeds(&lab.run(&[&generate.concat()[..], &["--backend", backend, "--save-image"]].concat()));
        reports.push(lab.json("r.json"));
        assert!(std::fs::read_dir(lab.path("images")).unwrap().count() > 1);
        std::fs::remove_dir_all(lab.path("images")).unwrap();
    }
    let [kernels, candle] = &reports[..] else { unreachable!() };
    assert_eq!((&kernels["attention"], &candle["attention"]), (&"cpu".into(), &"candle".into()));
    assert_eq!((&kernels["decoding"], &candle["decoding"]), (&"team".into(), &"groups".into()));
    assert_eq!((&kernels["compute"], &candle["compute"]), (&"fast".into(), &Value::Null));
    for key in ["device", "text", "generated_tokens", "finish_reason", "config"] {
        assert_eq!(kernels[key], candle[key], "{key}");
    }
    for (kernels, candle) in kernels["layers"].as_array().unwrap().iter().zip(candle["layers"].as_array().unwrap()) {
        let heads = |layer: &Value| layer["heads"].as_array().unwrap().clone();
        for (kernels, candle) in heads(kernels).iter().zip(&heads(candle)) {
            for key in ["kv_head", "level", "policies", "prompt_len", "kept", "positions"] {
                assert_eq!(kernels[key], candle[key], "{key}");
            }
        }
        assert_eq!((&kernels["raw_bytes"], &kernels["kept_bytes"]), (&candle["raw_bytes"], &candle["kept_bytes"]));
    }
    assert!(candle["kv"]["kept_bytes"].as_u64() < candle["kv"]["raw_bytes"].as_u64(), "nothing was evicted");
    assert!(candle["memory"]["device_total_bytes"].is_null(), "the CPU is no device of its own");
}

#[test]
fn many_prompts_and_measurements_run_on_candle_operations() {
    let lab = lab();
    lab.write("prompts.txt", "ab ac b\nc ab\nb b a ab\n");
    let batch = ["generate", "--model", "tiny.gguf", "--prompts", "prompts.txt", "--batch", "2", "-n", "5", "--config"];
    let [kernels, candle] = both(&lab, &[&batch[..], &["mass.json", "--quiet"]].concat());
    assert_eq!(kernels.lines().count(), 3);
    assert_eq!(kernels, candle);

    for table in both(&lab, &[&["compare"], &PROMPT[..], &["-n", "4"]].concat()) {
        assert!(table.contains("KV cache kept, MB") && table.contains("top-1 agreement"), "{table}");
    }
    lab.write("text.txt", "ab ac b a".repeat(16));
    let eval =
        ["eval", "--model", "tiny.gguf", "--text", "text.txt", "--configs", "mass.json", "--prompt-tokens", "20"];
    let more = ["--score-tokens", "8", "--greedy-tokens", "5", "--layer-error", "--json", "e.json"];
    let mut rows = Vec::new();
    for backend in ["kernels", "candle"] {
        succeeds(&lab.run(&[&eval[..], &more, &["--backend", backend]].concat()));
        rows.push(lab.json("e.json")[0].clone());
    }
    for key in ["kept_ratio", "kv_bytes", "top1_agreement"] {
        assert_eq!(rows[0][key], rows[1][key], "{key}");
    }
    let [kernels, candle] = [&rows[0], &rows[1]].map(|row| row["kl_mean"].as_f64().unwrap());
    assert!((kernels - candle).abs() < 1e-3 * kernels.max(1e-3), "{kernels}, {candle}");

    let bench = ["bench", "--model", "tiny.gguf", "--contexts", "8", "--prefill", "8", "--runs", "1", "--settings"];
    succeeds(&lab.run(&[&bench[..], &["full,mass.json", "--backend", "candle", "--json", "b.json"]].concat()));
    let rows = lab.json("b.json");
    assert_eq!(rows.as_array().unwrap().len(), 4);
    assert!(rows.as_array().unwrap().iter().all(|row| row["tokens_per_s"].as_f64().unwrap() > 0.0));
}

/// Heads that go on evicting do so with candle operations, too; the option has its former name and value still.
#[test]
fn eviction_while_decoding_is_that_of_the_kernels() {
    let lab = lab();
    let generate =
        [&["generate"], &PROMPT[..4], &["-n", "8", "--config", "evict.json", "--quiet", "--report", "r.json"]];
    let runs = [["--backend", "kernels"], ["--attention", "cpu"], ["--backend", "candle"], ["--attention", "candle"]];
    let runs = runs.map(|backend| {
        let text = succeeds(&lab.run(&[&generate.concat()[..], &backend].concat()));
        (text, lab.json("r.json")["kv"].clone())
    });
    assert!(runs.iter().all(|(text, _)| *text == runs[0].0), "{runs:?}");
    for key in ["kept_bytes", "raw_bytes"] {
        assert!(runs.iter().all(|(_, kv)| kv[key] == runs[0].1[key]), "{runs:?}");
    }
}

/// In f32, where both compute the same numbers up to the order of additions.
#[test]
fn a_conversation_is_that_of_the_kernels() {
    let lab = Lab::new();
    let answers = ["kernels", "candle"].map(|backend| {
        let args = ["chat", "--model", MODEL, "-n", "8", "--dtype", "f32", "--backend", backend];
        let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"What is the capital of France?\nAnd of Italy?\n").unwrap();
        drop(stdin);
        succeeds(&child.wait_with_output().unwrap())
    });
    assert!(answers[0].contains("Paris"), "{}", answers[0]);
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn what_candle_operations_do_not_do_is_refused_with_a_way_out() {
    let lab = lab();
    let run = |more: &[&str]| lab.refuses(&[&["generate"], &PROMPT[..4], &["--backend", "candle"], more].concat());
    run(&["--kv-dtype", "q8_0"]).status(1).names("q8_0").hints("--kv-dtype f16").is_short();
    let tiny = ["bench", "--model", "tiny.gguf", "--backend", "candle", "--kv-dtype", "f16,q4_0"];
    lab.refuses(&tiny).status(1).names("q4_0").hints("--kv-dtype f16").is_short();
    lab.refuses(&["generate", "--model", "tiny.gguf", "--backend", "gpu"]).status(2).names("gpu");
}

/// Exact products are those of the weights as f32; candle operations have no choice.
#[test]
fn products_are_as_asked_for() {
    // More tokens than are multiplied on the stored numbers.
    let prompt = "One morning in spring, when the river was high and the ferry could not cross, the old miller walked along \
                  the bank and counted the boats that";
    let lab = Lab::new();
    let generate = |args: &[&str]| {
        let own = ["--prompt", prompt, "-n", "12", "--use-adakv", "0", "--report", "r.json"];
        lab.generate(&[&own[..], args].concat());
        lab.json("r.json")
    };
    let [exact, fast, wide] = [&["--compute", "exact"][..], &["--compute", "fast"], &["--dtype", "f32"]].map(generate);
    assert_eq!((&exact["compute"], &fast["compute"]), (&"exact".into(), &"fast".into()));
    let logprob = |report: &Value| report["next_token_logprobs"][0][1].as_f64().unwrap();
    assert_eq!(exact["generated_tokens"], wide["generated_tokens"]);
    assert!((logprob(&exact) - logprob(&wide)).abs() < 1e-4, "{} {}", logprob(&exact), logprob(&wide));
    assert!((logprob(&fast) - logprob(&wide)).abs() > 1e-4, "{} {}", logprob(&fast), logprob(&wide));
    let refused = lab.generate_refuses(&["--prompt", "a", "--backend", "candle", "--compute", "exact"]);
    refused.status(1).names("--compute").hints("--backend kernels");
}
