//! Qwen2.5-Coder-0.5B-Instruct, the second real model, against transformers: `scripts/check_models.sh` fetches it and runs
//! these.
//!
//! `tests/data/qwen2_5_coder.json` was made with the weights widened to f32, by the script beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::checkpoint::{WeightDtype, open};
use adaptive_kvcache::kernels::quant::Compute;

use crate::golden::expect_case;
use crate::support::{candle_on_cpu, data, json};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")
}

fn expect_golden(backend: &BackendKind, dtype: WeightDtype) {
    let loaded = open(path()).unwrap().load(backend, dtype, &mut |_, _| {}).unwrap();
    for case in json(data("qwen2_5_coder.json"))["cases"].as_array().unwrap() {
        expect_case(&loaded, case);
    }
}

#[test]
#[ignore = "needs `scripts/get_model.sh qwen2.5-coder-0.5b`"]
fn ids_logprobs_and_greedy_tokens_of_the_second_model_are_equal() {
    expect_golden(&BackendKind::Kernels(Compute::Exact), WeightDtype::Auto);
    expect_golden(&candle_on_cpu(), WeightDtype::F32);
}

/// As a user meets it: the file's own chat template, and its end of turn.
#[test]
#[ignore = "needs `scripts/get_model.sh qwen2.5-coder-0.5b`"]
fn the_second_model_answers_as_its_template_asks() {
    let run = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache"))
            .args(["generate", "--model"])
            .arg(path())
            .args(["--system", "You answer in one word.", "--prompt", "What is the capital of France?", "-n", "16"])
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for more in [&["--use-adakv", "0"][..], &[], &["--backend", "candle"]] {
        let answer = run(more);
        assert!(answer.contains("Paris") && answer.len() < 40, "{more:?}: {answer}");
    }
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    run(&["--report", report.to_str().unwrap()]);
    assert_eq!(json(&report)["model"]["architecture"], "qwen2");
}
