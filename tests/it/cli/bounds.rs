//! A budget in bytes, and the end of the context, as options say.

use std::io::Write;
use std::process::{Output, Stdio};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, succeeds};

const TEMPLATE: &str = "{% for message in messages %}{{ 'a ' if message.role == 'user' else 'b ' }}{{ message.content }} \
                        {% endfor %}c";

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().set("tokenizer.chat_template", Meta::Text(TEMPLATE)).bytes());
    lab
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn chat(lab: &Lab, args: &[&str], lines: &str) -> Output {
    let args = [&["chat", "--model", "tiny.gguf", "--threads", "1", "-n", "9"][..], args].concat();
    let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
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
    let lab = lab();
    let lines = "ab ac b\n".repeat(12) + "/stats\n";
    let full = chat(&lab, &["--context", "60"], &lines);
    assert!(stderr(&full).contains("--context-overflow shift goes on"), "{}", stderr(&full));
    let output = chat(&lab, &["--context", "60", "--context-overflow", "shift", "--kv-budget", "2000B"], &lines);
    let text = stderr(&output);
    assert!(output.status.success() && !text.contains("error"), "{text}");
    assert!(text.lines().any(|line| line.ends_with("held/head")), "{text}");
    assert!(text.contains("positions taken)"), "{text}");
    let allocated = text.lines().find(|line| line.starts_with("cache: ")).unwrap();
    let allocated = allocated.split(" MB allocated").next().unwrap().rsplit(' ').next().unwrap();
    assert!(allocated.parse::<f64>().unwrap() <= 0.002, "{text}");
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
