//! `chat`, with its lines on standard input, and messages from files.

use std::io::Write;
use std::process::{Output, Stdio};

use super::{Lab, MODEL, succeeds};

/// Runs `chat` on the default model and types `lines`. Products are exact: with others, the capital of France is a near
/// miss.
pub fn chat(lab: &Lab, args: &[&str], lines: &[&str]) -> Output {
    let args = [&["chat", "--model", MODEL, "-n", "12", "--compute", "exact"][..], args].concat();
    let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A refused run does not read.
    let _ = stdin.write_all((lines.join("\n") + "\n").as_bytes());
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn every_turn_is_answered_counted_and_logged() {
    let lab = Lab::new();
    let lines =
        ["What is the capital of France?", "What is the capital \\", "of Italy?", "", "/stats", "/save talk.json"];
    let output = chat(&lab, &["--config", &fastgen()], &lines);
    let text = succeeds(&output);
    assert!(text.contains("Paris") && text.contains("Rome"), "{text}");
    assert_eq!(text.lines().count(), 2, "answers and nothing else: {text}");

    let told = stderr(&output);
    let table: Vec<Vec<&str>> = told
        .lines()
        .skip_while(|line| !line.starts_with("turn"))
        .skip(1)
        .take_while(|line| !line.starts_with("cache"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(table.len(), 2, "{told}");
    let number = |row: usize, column: usize| table[row][column].parse::<f64>().unwrap();
    for row in 0..2 {
        // turn, prompt, answer, profiled, kept for each head, percent
        assert_eq!(number(row, 0), row as f64 + 1.0);
        let (profiled, kept) = (number(row, 3), number(row, 4));
        assert!(kept > 0.0 && kept < profiled, "{told}");
        assert!((number(row, 5) - 100.0 * kept / profiled).abs() < 0.2, "{told}");
    }
    // The end of an answer is not read: the next turn's template has it.
    assert_eq!(number(1, 3), number(0, 2) - 1.0 + number(1, 1), "{told}");

    let log = lab.read("logs/test.log");
    assert_eq!(log.lines().filter(|line| line.contains("layer_id:29(heads:")).count(), 2 * 3);
    let turns: Vec<&str> = log.lines().filter_map(|line| line.split_once(" - INFO - turn ")).map(|(_, l)| l).collect();
    assert_eq!(turns.len(), 2);
    assert!(turns[1].starts_with(&format!("2: {} tokens profiled", table[1][3])), "{turns:?}");

    let messages = &lab.json("talk.json")["messages"];
    assert_eq!(messages.as_array().unwrap().len(), 4);
    assert_eq!(messages[2]["content"], "What is the capital \nof Italy?");
    assert!(messages[3]["content"].as_str().unwrap().contains("Rome"));

    // Goes on where it ended, and so does `generate`.
    let text = succeeds(&chat(&lab, &["--messages", "talk.json"], &["And of Germany?"]));
    assert!(text.contains("Berlin"), "{text}");
}

fn fastgen() -> String {
    format!("{}/configs/fastgen.json", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn reset_forgets_and_mistakes_are_told() {
    let lab = Lab::new();
    let lines =
        ["My name is Anna.", "/reset", "/stats", "/save", "/save none/talk.json", "/rest", "/help", "/exit", "Hello"];
    let output = chat(&lab, &["--use-adakv", "0"], &lines);
    let text = succeeds(&output);
    assert_eq!(text.lines().count(), 1, "nothing is answered after /exit: {text}");
    let told = stderr(&output);
    for part in [
        "cache: 0 tokens seen",
        "error: no file was named",
        "error: failed to write `none/talk.json`",
        "unknown command `/rest`",
        "/save FILE",
    ] {
        assert!(told.contains(part), "expected `{part}` in: {told}");
    }
}

#[test]
fn messages_and_a_system_message_are_taken_from_the_command_line() {
    let lab = Lab::new();
    let run = |args: &[&str]| {
        let args = [&["generate", "--model", MODEL, "-n", "1", "--report", "r.json"][..], args].concat();
        succeeds(&lab.run(&args));
        lab.json("r.json")["prompt_tokens"].clone()
    };
    lab.write("m.json", r#"[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]"#);
    lab.write("u.json", r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}"#);
    let from_file = run(&["--messages", "m.json"]);
    assert_eq!(run(&["--system", "Be brief.", "--prompt", "Hi"]), from_file);
    assert_eq!(run(&["--system", "Be brief.", "--messages", "u.json"]), from_file);
    assert_ne!(run(&["--chat", "--prompt", "Hi"]), from_file);

    lab.generate_refuses(&["--messages", "none.json"]).names("`none.json`").is_short();
    lab.generate_refuses(&["--system", "x", "--messages", "m.json"]).status(2).names("system").is_short();
    for (name, text) in [("empty.json", "[]"), ("bad.json", "{"), ("role.json", r#"[{"content": "x"}]"#)] {
        lab.write(name, text);
        lab.generate_refuses(&["--messages", name]).names(format!("`{name}`")).is_short();
    }
    lab.write("image.json", r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]"#);
    lab.generate_refuses(&["--messages", "image.json"]).names("`image.json`").names("image_url").is_short();
}
