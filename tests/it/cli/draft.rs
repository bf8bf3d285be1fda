//! `--draft`: the same text, and what the figures and the report say of guesses.

use std::io::Write;
use std::process::Stdio;

use candle_core::quantized::gguf_file::Value;

use super::{Lab, succeeds};
use crate::support::scripted::{CONTROL, NORMAL, Scripted};

/// a b c d e, round and round.
fn lab() -> Lab {
    let lab = Lab::new();
    let letters = ["a", "b", "c", "d", "e"].map(|letter| (letter, NORMAL));
    let mut model = Scripted::new(&[&[("</s>", CONTROL)], &letters[..]].concat());
    model.says(&["a", "b", "c", "d", "e", "a"]).meta("llama.context_length", Value::U32(256));
    model.write(&lab.path("m.gguf"));
    lab
}

const RUN: [&str; 9] = ["generate", "--model", "m.gguf", "--prompt", "abcdeabcde", "-n", "100", "--report", "r.json"];

#[test]
fn a_text_is_the_same_with_guesses_which_are_counted() {
    let lab = lab();
    let run = |more: &[&str]| {
        let output = lab.run(&[&RUN[..], more].concat());
        let figures = String::from_utf8(output.stderr.clone()).unwrap();
        (succeeds(&output), figures, lab.json("r.json"))
    };
    let (text, figures, report) = run(&[]);
    assert_eq!(text, format!("{}\n", "abcde".repeat(20)));
    let [drafted, accepted] = ["drafted", "accepted"].map(|key| report["draft"][key].as_u64().unwrap());
    assert!(drafted >= accepted && accepted > 60, "{report}");
    assert!(figures.contains(&format!("guesses  {accepted} of {drafted} tokens came true")), "{figures}");
    assert_eq!((&report["draft"]["obstacle"], &report["generation"]["draft"]), (&().into(), &"auto".into()));

    lab.write("evict.json", r#"{"method": "streaming_llm", "kept_ratio": 0.9, "decode": "evict"}"#);
    for (more, obstacle) in [
        (&["--draft", "off"][..], "off"),
        (&["--backend", "candle"], "one token at a time"),
        (&["--config", "evict.json"], "evicting"),
    ] {
        let (same, figures, report) = run(more);
        assert_eq!(same, text, "{more:?}");
        assert!(!figures.contains("guesses"), "{more:?}: {figures}");
        assert!(report["draft"]["obstacle"].as_str().unwrap().contains(obstacle), "{more:?}: {report}");
        assert_eq!(report["draft"]["drafted"], 0);
    }
    lab.refuses(&[&RUN[..], &["--draft", "always"]].concat()).status(2).names("always");
}

#[test]
fn prompts_that_are_alone_and_conversations_guess_too() {
    let lab = lab();
    lab.write("p.txt", "abcdeabcde\nabcde\n");
    let prompts =
        ["generate", "--model", "m.gguf", "--prompts", "p.txt", "-n", "60", "--report", "r.json", "--batch", "1"];
    let run = |more: &[&str]| succeeds(&lab.run(&[&prompts[..], more].concat()));
    let text = run(&[]);
    assert!(lab.json("r.json")["draft"]["accepted"].as_u64().unwrap() > 40);
    assert_eq!(run(&["--draft", "off"]), text);
    assert_eq!(lab.json("r.json")["draft"]["obstacle"], "off");

    let chat = |more: &[&str]| {
        let args = [&["chat", "--model", "m.gguf", "-n", "60"], more].concat();
        let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"abcde\nabcde\n").unwrap();
        let output = child.wait_with_output().unwrap();
        (succeeds(&output), String::from_utf8(output.stderr).unwrap())
    };
    let (with, without) = (chat(&[]), chat(&["--draft", "off"]));
    assert_eq!(with.0, without.0);
    assert!(with.1.contains("guesses came true") && !without.1.contains("guesses"), "{}", with.1);
}
