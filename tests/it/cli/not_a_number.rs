//! Models whose weights hold, or overflow to, what is not a number: no command takes it for a result.

use std::io::Write;
use std::process::{Output, Stdio};

use candle_core::quantized::gguf_file::Value;

use super::{Lab, Refusal, succeeds};
use crate::support::scripted::{CONTROL, NORMAL, Scripted};

/// `q` leads to `w`, `e`, and `z` for ever.
fn model() -> Scripted {
    let mut model = Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("w", NORMAL), ("e", NORMAL), ("z", NORMAL)]);
    model.says(&["q", "w", "e", "z", "z"]).meta("llama.context_length", Value::U32(256));
    model
}

fn lab(model: &Scripted) -> Lab {
    let lab = Lab::new();
    model.write(&lab.path("m.gguf"));
    lab
}

/// The sentence of a run that failed with status 1 after it had written `text`.
#[track_caller]
fn fails_after(output: &Output, text: &str) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), text, "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: not a number: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(stderr.lines().any(|line| line.starts_with("hint: ") && line.contains("--dtype f32")), "{stderr}");
    errors[0].to_owned()
}

#[test]
fn a_text_ends_at_the_first_scores_that_are_no_numbers() {
    for number in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let lab = lab(model().spoil("e", number));
        for sampling in [&[][..], &["--temperature", "0.7"], &["--temperature", "0.7", "--top-k", "2", "--stop", "wez"]]
        {
            let args = ["generate", "--model", "m.gguf", "--prompt", "q", "--backend"];
            for backend in ["kernels", "candle"] {
                let output = lab.run(&[&args[..], &[backend], sampling].concat());
                let error = fails_after(&output, "we\n");
                // q, w and e are read.
                let place = ["scores for the token at position 3", "the vector of token 3, which is at position 2"];
                assert!(place.iter().any(|place| error.contains(place)), "{number} {sampling:?}: {error}");
            }
        }
    }
}

#[test]
fn a_prompt_that_gives_no_numbers_is_an_error_that_says_which_layer_and_position() {
    let lab = lab(model().spoil("e", f32::NAN));
    for (command, place) in [
        (&["generate", "--prompt", "qqe"][..], ""),
        (&["generate", "--prompt", "qqe", "--use-adakv", "0"], ""),
        (&["generate", "--prompt", "qqe", "--temperature", "2"], ""),
        (&["compare", "--prompt", "qqe"], "(full cache)"),
    ] {
        let refusal = lab.refuses(&[&[command[0], "--model", "m.gguf"], &command[1..]].concat());
        refusal.status(1).names("the vector of token 3, which is at position 2").names(place).hints("--dtype f32");
    }
    let candle = ["--backend", "candle"];
    let generate = ["generate", "--model", "m.gguf", "--prompt", "qqe"];
    lab.refuses(&[&generate[..], &candle].concat()).status(1).names("token 3, which is at position 2");

    for (weight, number) in [("blk.0.attn_v.weight", f32::NAN), ("blk.0.ffn_gate.weight", f32::INFINITY)] {
        let lab = self::lab(model().second_layer().spoil_weight(weight, "e", number));
        lab.refuses(&generate).status(1).names("the output of layer 0 at ").names("3 positions");
        // Of the last layer, only the last row is computed.
        let lab = self::lab(model().spoil_weight(weight, "e", number));
        lab.refuses(&generate).status(1).names("the output of layer 0 at position 2");
        // On a device, nothing is looked at but the scores.
        lab.refuses(&[&generate[..], &candle].concat()).status(1).names("scores for the token at position 3");
    }
}

#[test]
fn measurements_refuse_them_on_either_side_and_say_in_which_cache() {
    let lab = lab(model().spoil("e", f32::NAN));
    lab.write("good.txt", "qwzq".repeat(12));
    lab.write("bad.txt", "qwzq".repeat(2) + "zze" + &"q".repeat(40));
    let windows = ["--prompt-tokens", "8", "--score-tokens", "6"];
    let eval = |text: &str, more: &[&str]| {
        lab.run(&[&["eval", "--model", "m.gguf", "--text", text, "--configs", "full"], &windows[..], more].concat())
    };
    // Its own text does not come to `e` within a token.
    let table = succeeds(&eval("good.txt", &["--greedy-tokens", "0"]));
    assert!(table.contains("0.00000") && !table.contains("-0.0") && !table.to_lowercase().contains("nan"), "{table}");
    for more in [&["--greedy-tokens", "0"][..], &["--greedy-tokens", "0", "--layer-error"], &[]] {
        let refusal = Refusal::of(&eval("bad.txt", more), "eval");
        refusal.status(1).names("position").names("window 1 of 1, full cache");
    }
    let refused = Refusal::of(&eval("bad.txt", &["--greedy-tokens", "0", "--layer-error"]), "eval");
    refused.names("layer 0 at position 10");
    // What is generated comes to `e`.
    Refusal::of(&eval("good.txt", &["--greedy-tokens", "8"]), "eval").status(1).names("full cache");

    let tune = [
        "tune",
        "--model",
        "m.gguf",
        "--text",
        "bad.txt",
        "--max-kl",
        "0.1",
        "--kv-dtype",
        "f16",
        "--output",
        "best.json",
    ];
    let refusal = lab.refuses(&[&tune[..], &windows].concat());
    refusal.status(1).names("window 1 of 1, full cache");
    assert!(!lab.path("best.json").exists());

    let bench = ["bench", "--model", "m.gguf", "--prompt-file", "bad.txt", "--contexts", "12", "--runs", "1"];
    let output = lab.run(&bench);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("not a number: the vector of token 3, which is at position 10 (prefill, 12 tokens"),
        "{told}"
    );

    lab.write("prompts.txt", "z\nq\n");
    let answers = [
        "eval",
        "--model",
        "m.gguf",
        "--windows",
        "0",
        "--prompts",
        "prompts.txt",
        "--configs",
        "full",
        "--answer-tokens",
        "8",
    ];
    let output = lab.run(&answers);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("position 3 (prompt 2 of 2, full cache)"), "{told}");
}

/// Keys that half precision cannot hold: exact while the prompt is read, no numbers when the cache is.
#[test]
fn a_cache_that_overflows_is_told_from_one_that_does_not() {
    let lab = lab(model().spoil_weight("blk.0.attn_k.weight", "w", 1e6));
    lab.write("text.txt", "qwzq".repeat(12));
    let args = ["eval", "--model", "m.gguf", "--text", "text.txt", "--configs", "full", "--full-kv-dtype", "f32"];
    let args = [&args[..], &["--prompt-tokens", "8", "--score-tokens", "6", "--kv-dtype"]].concat();
    succeeds(&lab.run(&[&args[..], &["f32"]].concat()));
    let refusal = lab.refuses(&[&args[..], &["f16"]].concat());
    refusal.status(1).names("window 1 of 1, full, f16").hints("--kv-dtype f32");
    let compare = ["compare", "--model", "m.gguf", "--prompt", "qwz", "--full-kv-dtype", "f32", "--kv-dtype"];
    succeeds(&lab.run(&[&compare[..], &["f32"]].concat()));
    lab.refuses(&[&compare[..], &["f16"]].concat()).status(1).names("adaptive cache");
}

#[test]
fn a_batch_and_a_conversation_give_what_came_before() {
    let lab = lab(model().spoil("e", f32::NAN));
    lab.write("p.txt", "z\nq\nz\n");
    let output = lab.run(&["generate", "--model", "m.gguf", "--prompts", "p.txt", "-n", "9", "--batch", "3"]);
    assert_eq!(output.status.code(), Some(1));
    let texts: Vec<serde_json::Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let texts: Vec<(&str, &str)> =
        texts.iter().map(|t| (t["text"].as_str().unwrap(), t["finish_reason"].as_str().unwrap())).collect();
    assert_eq!(texts[1], ("we", "interrupted"));
    assert!(texts.len() == 3 && texts[0].0.starts_with("zz"), "{texts:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("position 3 (prompt `p.txt:2`)"), "{told}");

    let mut child = lab.command(&["chat", "--model", "m.gguf", "--stop", "wez"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"q\nz\n").unwrap();
    let error = fails_after(&child.wait_with_output().unwrap(), "we");
    assert!(error.contains("position 3"), "{error}");
}
