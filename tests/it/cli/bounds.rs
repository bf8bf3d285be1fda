//! A budget in bytes, and the end of the context, as options say.

use std::process::Output;

use super::tiny_gguf::TinyGguf;
use super::{Lab, succeeds};

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_text_ends_with_the_context_or_goes_on() {
    let lab = lab();
    let run = |overflow: &[&str]| {
        let args =
            ["generate", "--model", "tiny.gguf", "--threads", "1", "--prompt", "ab ac", "-n", "90", "--ignore-eos"];
        let output = lab.run(&[&args[..], &["--context", "40"], overflow].concat());
        succeeds(&output);
        stderr(&output)
    };
    assert!(run(&[]).contains("cut where the model's context of 40 tokens ends"), "{}", run(&[]));
    let shifted = run(&["--context-overflow", "shift"]);
    assert!(shifted.contains("90 tokens, cut at --max-new-tokens"), "{shifted}");
    let bounded = run(&["--context-overflow", "shift", "--kv-budget", "1200B", "--protect", "3"]);
    assert!(bounded.contains("90 tokens, cut at --max-new-tokens"), "{bounded}");
    lab.refuses(&["generate", "--model", "tiny.gguf", "--context-overflow", "wrap"]).status(2).names("wrap");
}

#[test]
fn what_fits_is_told() {
    let lab = lab();
    let shown = succeeds(&lab.run(&["inspect", "--model", "tiny.gguf", "--kv-budget", "7000B"]));
    // A row takes 64 bytes in f16, and 6 for its position and its score.
    let line = shown.lines().find(|line| line.contains("kept by a head on average")).unwrap();
    assert!(line.starts_with("7000 bytes for all:") && line.split_whitespace().any(|word| word == "100"), "{shown}");
    assert!(shown.contains("1/2 kept") && shown.contains("the layer that is being read"), "{shown}");
}
