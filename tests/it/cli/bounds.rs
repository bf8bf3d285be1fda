//! A budget in bytes, and the end of the context, as options say.

use std::process::Output;

use super::chat::chat;
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
fn a_chat_stays_within_its_budget_beyond_the_context_and_tells_what_it_holds() {
    let lab = Lab::new();
    let questions = ["France", "Italy", "Spain", "Germany", "Portugal", "Austria", "Greece", "Poland"]
        .map(|country| format!("What is the capital of {country}?"));
    let mut lines: Vec<&str> = questions.iter().map(String::as_str).collect();
    lines.push("/stats");
    let full = stderr(&chat(&lab, &["--context", "150", "--use-adakv", "0"], &lines));
    assert!(full.contains("the conversation is full"), "{full}");
    assert!(full.contains("--context-overflow shift goes on"), "{full}");

    let options = ["--context", "150", "--context-overflow", "shift", "--kv-budget", "2MB"];
    let output = chat(&lab, &options, &lines);
    let text = succeeds(&output);
    assert!(text.contains("Paris") && text.lines().count() == 8, "{text}");
    let told = stderr(&output);
    let table: Vec<Vec<&str>> = told
        .lines()
        .skip_while(|line| !line.ends_with("held/head"))
        .skip(1)
        .take_while(|line| !line.starts_with("cache"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(table.len(), 8, "{told}");
    // Of turns before what is kept has moved, it is not known any more whose rows are whose.
    assert_eq!(table[0][6], "-", "{told}");
    assert!(table[7][6].parse::<f64>().unwrap() > 10.0, "{told}");
    let cache = told.lines().find(|line| line.starts_with("cache: ")).unwrap();
    assert!(cache.contains(" positions taken), "), "{cache}");
    let allocated = cache.split(" MB allocated").next().unwrap().rsplit(' ').next().unwrap();
    assert!((1.7..=2.0).contains(&allocated.parse::<f64>().unwrap()), "{cache}");
    assert!(lab.read("logs/test.log").contains("held of turns 1 to 2, by a head on average: "));
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
