//! `cache`, `--cache` and `--save-cache`: a text is read once, and asked about by other runs.

use std::process::Output;

use super::chat::chat;
use super::{Lab, MODEL, succeeds};

const TEXT: &str = "The library of the Reform Club was founded by Passepartout in 1836. Its keeper is called Aouda, and its \
                    cat is called Fix. The club opens at nine, and closes at midnight, but on Sundays.\n";
const QUESTION: &str = "Question: What is the name of the cat? Answer: The cat is called";

fn create(lab: &Lab, args: &[&str]) -> Output {
    lab.run(&[&["cache", "create", "--model", MODEL, "-o", "a.kv"][..], args].concat())
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What is answered from the file is what is answered when all is read at once, token by token.
#[test]
fn a_saved_text_is_asked_about() {
    let lab = Lab::new();
    lab.write("book.txt", TEXT);
    lab.write("best.json", r#"{"method": "replay", "kept_ratio": 0.9}"#);
    let whole = format!("{TEXT}{QUESTION}");
    for (numbers, config) in [("f16", &["--use-adakv", "0"][..]), ("q8_0", &["--config", "best.json"])] {
        let made = create(&lab, &[&["--text", "book.txt", "--kv-dtype", numbers][..], config].concat());
        succeeds(&made);
        assert!(stderr(&made).contains("tokens are in `a.kv`"), "{}", stderr(&made));
        let ask = || lab.generate(&["--cache", "a.kv", "--prompt", QUESTION, "-n", "12", "--compute", "exact"]);
        let answer = ask();
        assert_eq!(answer, ask());
        if numbers == "f16" {
            let at_once = ["--use-adakv", "0", "--prompt", &whole, "-n", "12", "--compute", "exact"];
            assert_eq!(answer, lab.generate(&at_once));
        }
    }
    // A prompt that begins with the text is read from its end on.
    lab.generate(&["--cache", "a.kv", "--prompt", &whole, "-n", "3", "--report", "r.json"]);
    let behind = lab.json("r.json")["prompt_tokens"].as_array().unwrap().len();
    assert!(behind < 30, "{behind}");
    lab.generate_refuses(&["--cache", "a.kv", "--prompt", TEXT]).status(2).names("nothing follows");
}

#[test]
fn many_prompts_ask_about_one_text() {
    let lab = Lab::new();
    lab.write("book.txt", TEXT);
    lab.write("prompts.txt", format!("{QUESTION}\n\"\\nThe keeper is called\"\n{QUESTION}\n"));
    succeeds(&create(&lab, &["--text", "book.txt", "--use-adakv", "0"]));
    let args = ["--cache", "a.kv", "--prompts", "prompts.txt", "--batch", "2", "-n", "3", "--report", "r.json"];
    let answers = lab.generate(&args);
    let alone = lab.generate(&["--cache", "a.kv", "--prompt", QUESTION, "-n", "3"]);
    let texts: Vec<serde_json::Value> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(texts.len(), 3);
    for line in [0, 2] {
        assert_eq!(texts[line]["text"].as_str().unwrap().trim_end(), alone.trim_end());
    }
    assert!(texts[1]["text"].as_str().unwrap().contains('A'), "{answers}");
    // What the text itself takes counts for none of them.
    assert!(lab.json("r.json")["most_kv_bytes"].as_u64().unwrap() < 2 * 40 * 46_080, "{answers}");
}

#[test]
fn a_conversation_goes_on_in_another_run() {
    let lab = Lab::new();
    let chat = |args: &[&str], lines: &[&str]| chat(&lab, &[&["-n", "16"][..], args].concat(), lines);
    let first = "My cat is called Fix. What is my cat called?";
    let second = "And what is the capital of France?";
    let together = succeeds(&chat(&["--use-adakv", "0"], &[first, second]));
    let saved = chat(&["--use-adakv", "0", "--save-cache", "c.kv"], &[first, "/save d.kv", "/stats"]);
    let one = succeeds(&saved);
    let other = succeeds(&chat(&["--cache", "c.kv"], &[second]));
    assert_eq!(together, one.clone() + &other);
    // The same from within a chat, and with `generate`.
    let loaded = chat(&["--use-adakv", "0"], &["Hello!", "/load d.kv", second]);
    assert!(succeeds(&loaded).ends_with(&other), "{}", stderr(&loaded));
    assert!(stderr(&loaded).contains("2 messages"), "{}", stderr(&loaded));
    let args = ["--cache", "c.kv", "--prompt", second, "-n", "16", "--compute", "exact", "--save-cache", "e.kv"];
    assert_eq!(lab.generate(&args), other);
    // Four messages are in what that left, and it can be gone on with.
    let info = succeeds(&lab.run(&["cache", "info", "e.kv"]));
    assert!(info.contains("4 messages"), "{info}");
    assert!(succeeds(&chat(&["--cache", "e.kv"], &[first])).contains("Fix"));

    // An answer that was gone on with is one message.
    lab.write(
        "begun.json",
        r#"[{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "One, two"}]"#,
    );
    lab.generate(&["--messages", "begun.json", "--continue", "-n", "6", "--save-cache", "g.kv"]);
    assert!(succeeds(&lab.run(&["cache", "info", "g.kv"])).contains("2 messages"));
    succeeds(&chat(&["--cache", "g.kv"], &["Thank you!"]));

    let none = chat(&["--save-cache", "f.kv", "--system", "You are brief."], &[]);
    assert!(stderr(&none).contains("ask something first") && !lab.path("f.kv").exists(), "{}", stderr(&none));
}

#[test]
fn a_text_becomes_a_conversation() {
    let lab = Lab::new();
    lab.write("book.txt", TEXT);
    let exactly = ["--use-adakv", "0", "--compute", "exact"];
    succeeds(&create(&lab, &[&["--text", "book.txt", "--chat"][..], &exactly].concat()));
    let question = ["--prompt", "What is the cat called?", "-n", "24", "--compute", "exact"];
    let whole = lab.generate(&[&["--system", TEXT, "--use-adakv", "0"][..], &question].concat());
    assert_eq!(lab.generate(&[&["--cache", "a.kv"][..], &question].concat()), whole);
    // The opening is not read again after it was forgotten what came behind it.
    let again = chat(&lab, &["--cache", "a.kv"], &["Hello!", "/reset", "Hello!"]);
    let read: Vec<String> =
        stderr(&again).lines().filter(|line| line.contains("tokens/s")).map(str::to_owned).collect();
    let tokens = |line: &String| line[1..].split(' ').next().unwrap().parse::<usize>().unwrap();
    assert!(read.len() == 2 && tokens(&read[0]) == tokens(&read[1]) && tokens(&read[0]) < 30, "{read:?}");
    lab.write("m.json", format!(r#"[{{"role": "system", "content": {TEXT:?}}}]"#));
    succeeds(&create(&lab, &[&["--messages", "m.json"][..], &exactly].concat()));
    assert_eq!(lab.generate(&[&["--cache", "a.kv"][..], &question].concat()), whole);
}

#[test]
fn files_are_shown_checked_and_listed() {
    let lab = Lab::new();
    lab.write("one.txt", "The Reform Club ");
    lab.write("two.txt", "was founded in 1836.");
    succeeds(&create(&lab, &["--text", "one.txt", "two.txt", "--kept-ratio", "0.5", "--kv-dtype", "q8_0"]));
    let info = succeeds(&lab.run(&["cache", "info", "a.kv", "--text", "--model", MODEL]));
    for part in
        ["a.kv", "llama, 30 layers of 3 KV heads of 64", "replay, 50%", "q8_0", "The Reform Club was founded in 1836."]
    {
        assert!(info.contains(part), "{part}: {info}");
    }
    assert!(succeeds(&lab.run(&["cache", "check", "a.kv"])).contains("a.kv: whole"));
    let list = succeeds(&lab.run(&["cache", "list", "."]));
    assert_eq!(list.lines().count(), 2, "{list}");

    let mut bytes = std::fs::read(lab.path("a.kv")).unwrap();
    bytes[100_000] ^= 4;
    lab.write("b.kv", &bytes);
    let both = lab.run(&["cache", "check", "b.kv", "a.kv"]);
    assert_eq!(both.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&both.stdout).contains("a.kv: whole"), "{both:?}");
    lab.generate_refuses(&["--cache", "b.kv", "--prompt", "x"]).status(1).names("b.kv").hints("save the cache again");
    assert!(succeeds(&lab.run(&["cache", "list"])).contains("b.kv"));
    lab.refuses(&["cache", "info", "one.txt"]).status(1).names("one.txt");
    lab.refuses(&["cache", "list", "missing"]).status(1).names("missing");
}

#[test]
fn what_contradicts_the_file_is_refused() {
    let lab = Lab::new();
    lab.write("book.txt", TEXT);
    lab.write("best.json", r#"{"method": "replay", "kept_ratio": 0.5}"#);
    lab.write("other.json", r#"{"method": "snapkv", "kept_ratio": 0.5}"#);
    succeeds(&create(&lab, &["--text", "book.txt", "--config", "best.json"]));
    let refused = |args: &[&str]| lab.generate_refuses(&[&["--cache", "a.kv", "--prompt", "x"][..], args].concat());
    refused(&["--config", "other.json"]).status(2).names("--config").names("a.kv");
    refused(&["--kept-ratio", "0.25"]).status(2).names("a.kv");
    refused(&["--kv-dtype", "q8_0"]).status(2).names("--kv-dtype");
    refused(&["--use-adakv", "0"]).status(2).names("--use-adakv");
    refused(&["--save-image"]).status(2).names("--cache");
    refused(&["--save-cache", "/dev/null"]).status(2).names("/dev/null");
    refused(&["--save-cache", "a.kv"]).status(2).names("a.kv");
    refused(&["--system", "You are brief."]).status(2).names("no conversation").hints("--chat");
    refused(&["--backend", "candle"]).status(1).names("backend");
    // The same is no other, and variables are for other runs.
    let same = ["--cache", "a.kv", "--prompt", "x", "-n", "1", "--config", "best.json", "--kv-dtype", "f16"];
    lab.generate(&same);
    let variables = lab
        .command(&["generate", "--model", MODEL, "--cache", "a.kv", "--prompt", "x", "-n", "1"])
        .env("CONFIG", "other.json")
        .env("USE_ADAKV", "0")
        .output()
        .unwrap();
    succeeds(&variables);
    lab.refuses(&["chat", "--model", MODEL, "--cache", "a.kv"]).status(2).names("no conversation");
    lab.refuses(&["cache", "create", "--model", MODEL, "-o", "b.kv"]).status(2);
    lab.write("empty.txt", "");
    lab.refuses(&["cache", "create", "--model", MODEL, "--text", "empty.txt", "-o", "b.kv"]).status(2).names("empty");
}

#[test]
fn a_saved_cache_is_compared_with_a_full_one() {
    let lab = Lab::new();
    lab.write("book.txt", TEXT);
    succeeds(&create(&lab, &["--text", "book.txt", "--kept-ratio", "0.9"]));
    let args = ["compare", "--model", MODEL, "--cache", "a.kv", "--prompt", QUESTION, "-n", "8"];
    let told = succeeds(&lab.run(&args));
    let kl = told.split("mean KL ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
    assert!(kl.parse::<f64>().unwrap() < 0.1, "{told}");
}
