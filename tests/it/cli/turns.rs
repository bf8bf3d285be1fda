//! Where texts and answers end: tokens that end them whatever their type, stop texts that name tokens, the context.

use std::io::Write;
use std::process::{Output, Stdio};

use candle_core::quantized::gguf_file::Value;

use super::{Lab, succeeds};
use crate::support::scripted::{CONTROL, NORMAL, Scripted, USER_DEFINED};

/// `q` leads to `w`, `e`, an end of turn, and `z` for ever.
fn ending_with(end: &'static str, kind: i32) -> Scripted {
    let mut model =
        Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("w", NORMAL), ("e", NORMAL), (end, kind), ("z", NORMAL)]);
    model.says(&["q", "w", "e", end, "z", "z"]);
    model
}

fn lab(model: &Scripted) -> Lab {
    let lab = Lab::new();
    model.write(&lab.path("m.gguf"));
    lab
}

fn generate(lab: &Lab, args: &[&str]) -> Output {
    lab.run(&[&["generate", "--model", "m.gguf", "--prompt", "q", "-n", "8", "--report", "r.json"][..], args].concat())
}

fn chat(lab: &Lab, args: &[&str], lines: &[&str]) -> Output {
    let args = [&["chat", "--model", "m.gguf"][..], args].concat();
    let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all((lines.join("\n") + "\n").as_bytes());
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn an_end_of_turn_ends_and_is_no_text_whatever_its_type() {
    for (end, kind) in [
        ("<|eom_id|>", USER_DEFINED),
        ("<|im_end|>", NORMAL),
        ("[EOT]", USER_DEFINED),
        ("<end_of_utterance>", NORMAL),
        ("<turn|>", CONTROL),
    ] {
        let lab = lab(&ending_with(end, kind));
        for stop in [&[][..], &["--stop", "wez"], &["--stop", "ez", "--stop", "q"]] {
            let output = generate(&lab, stop);
            assert_eq!(succeeds(&output), "we\n", "{end} {stop:?}");
            assert_eq!(lab.json("r.json")["finish_reason"], "eos", "{end} {stop:?}");
            let told = stderr(&output);
            assert_eq!(
                told.contains(&format!("note: `m.gguf` types token 4 `{end}` as text")),
                kind != CONTROL,
                "{told}"
            );
        }
        assert_eq!(succeeds(&generate(&lab, &["--ignore-eos"])), "wezzzzz\n", "{end}");
    }
}

#[test]
fn an_end_that_only_the_file_names_is_no_text_either() {
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.eos_token_id"] {
        let mut model = ending_with("[/X]", NORMAL);
        let lab = lab(model.meta(key, Value::U32(4)));
        assert_eq!(succeeds(&generate(&lab, &["--stop", "wez"])), "we\n", "{key}");
    }
    assert!(succeeds(&generate(&lab(&ending_with("[/X]", NORMAL)), &[])).starts_with("we[/X]z"));
}

#[test]
fn an_end_is_not_part_of_the_history() {
    for (end, kind) in [("<|eot_id|>", USER_DEFINED), ("[/X]", NORMAL)] {
        let mut model = ending_with(end, kind);
        let lab = lab(model.meta("tokenizer.ggml.eot_token_id", Value::U32(4)));
        let output = chat(&lab, &["--stop", "wez"], &["q", "zq", "/save talk.json"]);
        assert_eq!(succeeds(&output), "we\nwe\n", "{}", stderr(&output));
        let contents: Vec<String> =
            lab.json("talk.json")["messages"].as_array().unwrap().iter().map(|m| m["content"].to_string()).collect();
        assert_eq!(contents, [r#""q""#, r#""we""#, r#""zq""#, r#""we""#]);
    }
}

#[test]
fn a_stop_text_may_name_a_token_that_prints_nothing() {
    let mut model =
        Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("w", NORMAL), ("<|user|>", CONTROL), ("z", NORMAL)]);
    let lab = lab(model.says(&["q", "w", "<|user|>", "z", "z"]));
    for (stop, text, reason) in [
        ("<|user|>", "w\n", "stop"),
        ("w<|user|>", "", "stop"),
        ("<|user|>zz", "w\n", "stop"),
        ("wz", "", "stop"),
        ("user", "wzzzzzz\n", "length"),
        ("<|user", "wzzzzzz\n", "length"),
        ("<|user|>w", "wzzzzzz\n", "length"),
    ] {
        assert_eq!(succeeds(&generate(&lab, &["--stop", stop])), text, "{stop}");
        assert_eq!(lab.json("r.json")["finish_reason"], reason, "{stop}");
        lab.write("p.jsonl", "q\n");
        let batch = ["generate", "--model", "m.gguf", "--prompts", "p.jsonl", "-n", "8", "--stop", stop];
        let line: serde_json::Value = serde_json::from_str(&succeeds(&lab.run(&batch))).unwrap();
        assert_eq!((&line["text"], &line["finish_reason"]), (&text.trim_end().into(), &reason.into()), "{stop}");
    }
    let output = chat(&lab, &["--stop", "<|user|>"], &["q", "q"]);
    assert_eq!(succeeds(&output), "w\nw\n");
}

#[test]
fn a_text_cut_by_the_context_says_so_and_counts_what_was_timed() {
    let mut model = Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("z", NORMAL)]);
    let lab = lab(model.says(&["q", "z", "z"]).meta("llama.context_length", Value::U32(16)));
    let output = generate(&lab, &["-n", "100"]);
    assert_eq!(succeeds(&output), format!("{}\n", "z".repeat(16)));
    assert_eq!(lab.json("r.json")["finish_reason"], "context");
    let told = stderr(&output);
    assert!(told.contains("decode   15 tokens in"), "the first came from the prompt: {told}");
    assert!(told.contains("16 tokens, cut where the model's context of 16 tokens ends"), "{told}");
    let told = stderr(&generate(&lab, &["-n", "3"]));
    assert!(told.contains("decode   2 tokens in") && told.contains("3 tokens, cut at --max-new-tokens"), "{told}");

    lab.write("p.txt", "q\nqqqq\n");
    let output = lab.run(&["generate", "--model", "m.gguf", "--prompts", "p.txt", "-n", "13"]);
    let reasons: Vec<String> = succeeds(&output)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["finish_reason"].to_string())
        .collect();
    assert_eq!(reasons, [r#""length""#, r#""length""#]);
    let output = lab.run(&["generate", "--model", "m.gguf", "--prompts", "p.txt", "-n", "14"]);
    let told = stderr(&output);
    assert!(succeeds(&output).lines().last().unwrap().contains(r#""finish_reason":"context""#));
    assert!(told.contains("2 texts, at most 2 at a time, 1 cut where the model's context ends"), "{told}");
}

#[test]
fn a_full_conversation_says_so_and_goes_on_after_a_reset() {
    let mut model = Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("z", NORMAL)]);
    let lab = lab(model.says(&["q", "z", "z"]).meta("llama.context_length", Value::U32(16)));
    let output = chat(&lab, &["-n", "9"], &["qqqq", "qqqqq", "/reset", "qqq"]);
    let told = stderr(&output);
    assert_eq!(succeeds(&output), "zzzzzzzzz\nzzzzzzzzz\n", "{told}");
    // Four of the question, eight of the answer; its last comes with the next question.
    assert!(told.contains("the conversation is full: 12 of 16 tokens are taken, and this turn needs 6"), "{told}");
    assert!(told.contains("hint: /reset") && !told.contains("shorten the prompt"), "{told}");
    assert!(!told.contains("cut off: the conversation is full"), "{told}");

    // A shorter question still fits; its answer does not.
    let output = chat(&lab, &["-n", "9"], &["qqqq", "qqqqq", "q"]);
    assert_eq!(succeeds(&output), "zzzzzzzzz\nzzz\n");
    assert!(stderr(&output).contains("[2 + 3 tokens, cut off: the conversation is full (16 of 16 tokens), /reset"));

    let output = chat(&lab, &[], &["q", "q", "/reset", "q"]);
    let told = stderr(&output);
    assert_eq!(succeeds(&output), format!("{0}\n{0}\n", "z".repeat(16)), "{told}");
    assert_eq!(told.matches("cut off: the conversation is full (16 of 16 tokens), /reset makes room").count(), 2);
    assert!(told.contains("error: the conversation is full: 16 of 16 tokens are taken"), "{told}");

    // A question that never fits is not helped by a reset.
    let told = stderr(&chat(&lab, &[], &[&"q".repeat(17)]));
    assert!(told.contains("the question takes 17 tokens, more than the model's context of 16"), "{told}");
    assert!(told.contains("hint: shorten it"), "{told}");
}

/// A model that was tuned for conversations may find nothing to add to a raw text.
#[test]
fn a_raw_text_that_ends_at_once_is_told_of() {
    const NOTE: &str = "note: the model ended the text at once; it has a chat template";
    let mut model = Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("w", NORMAL)]);
    model.says(&["q", "</s>"]);
    let lab = lab(&model);
    let told = |args: &[&str]| stderr(&generate(&lab, args)).contains(NOTE);
    assert!(told(&[]) && !told(&["--chat"]) && !told(&["--ignore-eos"]));
}
