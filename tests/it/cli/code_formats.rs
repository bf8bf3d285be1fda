//! Models in formats whose quants are codes, `IQ4_NL`, `IQ4_XS` and `MXFP4`: they write what their weights write as f32.

use std::process::Command;

use adaptive_kvcache::kernels::simd::InstructionSet;
use serde_json::Value;

use super::{Lab, succeeds};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make_shape.py");

/// A model of two layers in a format, as `m.gguf`.
fn lab(format: &str) -> Lab {
    let lab = Lab::new();
    let shape = "--layers 2 --heads 4 --kv-heads 2 --hidden 256 --mlp 512 --vocab 1000 --format";
    let mut script = Command::new("python3");
    script.arg(SCRIPT).arg(lab.path("m.gguf")).args(shape.split_whitespace()).arg(format);
    succeeds(&script.output().unwrap());
    lab
}

/// More tokens than are multiplied on the stored numbers.
const PROMPT: &str =
    "One morning in spring, when the river was high and the ferry could not cross, the old miller walked along";

/// The report of a run, and what stands on standard error.
fn generate(lab: &Lab, args: &[&str]) -> (Value, String) {
    let own = ["--model", "m.gguf", "--prompt", PROMPT, "-n", "16", "--use-adakv", "0", "--report", "r.json"];
    let output = lab.run(&[&["generate"], &own[..], args].concat());
    succeeds(&output);
    (lab.json("r.json"), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn models_write_what_their_weights_write_as_f32() {
    let logprob = |report: &Value| report["next_token_logprobs"][0][1].as_f64().unwrap();
    for (format, name, bytes) in [("iq4_nl", "IQ4_NL", 18), ("iq4_xs", "IQ4_XS", 17), ("mxfp4", "MXFP4", 17)] {
        let lab = lab(format);
        let (wide, _) = generate(&lab, &["--dtype", "f32"]);
        let (exact, _) = generate(&lab, &["--compute", "exact"]);
        assert_eq!(exact["generated_tokens"], wide["generated_tokens"], "{name}");
        assert!((logprob(&exact) - logprob(&wide)).abs() < 1e-4, "{name}: {} {}", logprob(&exact), logprob(&wide));

        // Activations are rounded to 8 bits.
        for set in InstructionSet::available() {
            let (fast, _) = generate(&lab, &["--isa", set.name()]);
            assert!(
                (logprob(&fast) - logprob(&wide)).abs() < 0.1,
                "{name} {set:?}: {} {}",
                logprob(&fast),
                logprob(&wide)
            );
        }

        let (candle, stderr) = generate(&lab, &["--backend", "candle"]);
        assert!(stderr.contains(&format!("note: matrices in {format} are held in f32")), "{stderr}");
        // It rounds what the output layer's blocks are multiplied with.
        assert!((logprob(&candle) - logprob(&wide)).abs() < 0.1, "{name}: {} {}", logprob(&candle), logprob(&wide));

        let shown = succeeds(&lab.run(&["inspect", "--model", "m.gguf"]));
        // The matrices of both layers, and the embedding but for MXFP4.
        let numbers = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512) + if format == "mxfp4" { 0 } else { 256_000 };
        let line = shown.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        assert!(line.contains(&format!("{:.1} MB", f64::from(numbers / 32 * bytes) / 1_048_576.0)), "{line}");
    }
}
