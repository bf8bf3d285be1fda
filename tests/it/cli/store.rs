//! `--cache-dir`: what a run has read is found by the next.

use std::process::{Command, Output};

use super::chat::chat;
use super::mishaps::tiny;
use super::{Lab, MODEL, succeeds};

const TEXT: &str = "The library of the Reform Club was founded by Passepartout in 1836. Its keeper is called Aouda, and its \
                    cat is called Fix. The club opens at nine, and closes at midnight, but on Sundays. Its members are \
                    gentlemen, who read the Times there every day, and dine at noon on fish, rhubarb and Cheshire cheese.\n";
const QUESTION: &str = "Question: What is the name of the cat? Answer: The cat is called";

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Tokens that were found and that the prompt has, of each line that tells.
fn found(output: &Output) -> Vec<(usize, usize)> {
    let told = stderr(output);
    let numbers = |line: &str| {
        let mut words = line.strip_prefix("note: prefix store: ")?.split(' ');
        let tokens = words.next()?.parse().ok()?;
        assert_eq!(words.next(), Some("of"), "{line}");
        Some((tokens, words.next()?.parse().ok()?))
    };
    told.lines().filter_map(numbers).collect()
}

/// Names of what is in the store.
fn entries(lab: &Lab) -> Vec<String> {
    let Ok(folder) = std::fs::read_dir(lab.path("store")) else { return Vec::new() };
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "prefix-store.lock").collect()
}

fn generate(lab: &Lab, args: &[&str]) -> Output {
    lab.run(&[&["generate", "--model", MODEL, "--compute", "exact", "-n", "12"][..], args].concat())
}

#[test]
fn a_prompt_goes_on_from_what_another_run_has_read() {
    let lab = Lab::new();
    let prompt = format!("{TEXT}{QUESTION}");
    let keeper = format!("{TEXT}Question: Who is the keeper? Answer: The keeper is called");
    for config in [&["--use-adakv", "0"][..], &["--use-adakv", "0", "--kv-dtype", "q8_0"]] {
        let run = |prompt: &str, more: &[&str]| generate(&lab, &[&["--prompt", prompt][..], config, more].concat());
        let stored = ["--cache-dir", "store", "--report", "r.json"];
        let without = succeeds(&run(&prompt, &[]));
        let first = run(&prompt, &stored);
        assert_eq!(succeeds(&first), without);
        let [(0, all)] = found(&first)[..] else { panic!("{}", stderr(&first)) };
        // All but the last token, whose logits are asked for.
        let again = run(&prompt, &stored);
        assert_eq!(succeeds(&again), without);
        assert_eq!(found(&again), [(all - 1, all)]);
        assert!(stderr(&again).contains("prefill  1 tokens"), "{}", stderr(&again));
        assert_eq!(lab.json("r.json")["prompt_tokens"].as_array().unwrap().len(), all);
        // Another question about the same text.
        let other = run(&keeper, &stored);
        assert_eq!(succeeds(&other), succeeds(&run(&keeper, &[])));
        let [(tokens, of)] = found(&other)[..] else { panic!("{}", stderr(&other)) };
        assert!(tokens >= 64 && tokens + 20 > of && tokens < of, "{tokens} of {of}");
        // Hardly anything of it is new.
        let here = entries(&lab).len();
        assert_eq!(here, if config.len() == 2 { 1 } else { 2 }, "{:?}", entries(&lab));
    }
}

#[test]
fn a_compressed_prompt_is_gone_on_with_where_it_ended() {
    let lab = Lab::new();
    lab.write("best.json", r#"{"method": "replay", "kept_ratio": 0.8}"#);
    let stored = ["--config", "best.json", "--cache-dir", "store"];
    let run = |prompt: &str| generate(&lab, &[&["--prompt", prompt][..], &stored].concat());
    let [(0, text)] = found(&run(TEXT))[..] else { panic!("something is found in an empty store") };
    // What goes on from a saved cache goes on from the store.
    let asked = run(&format!("{TEXT}{QUESTION}"));
    let [(tokens, of)] = found(&asked)[..] else { panic!("{}", stderr(&asked)) };
    assert!(tokens == text && of > text, "{tokens} of {of}, after {text}");
    lab.write("book.txt", TEXT);
    let made = ["cache", "create", "--model", MODEL, "--compute", "exact", "--text", "book.txt", "-o", "a.kv"];
    succeeds(&lab.run(&[&made[..], &["--config", "best.json"]].concat()));
    assert_eq!(succeeds(&asked), succeeds(&generate(&lab, &["--cache", "a.kv", "--prompt", QUESTION])));
    // Another method and the full cache find nothing.
    for other in [&["--use-adakv", "0"][..], &["--kept-ratio", "0.5"]] {
        let output = generate(&lab, &[&["--prompt", TEXT, "--cache-dir", "store"][..], other].concat());
        succeeds(&output);
        assert_eq!(found(&output), [(0, text)], "{other:?}");
    }
}

#[test]
fn many_prompts_share_what_they_begin_with() {
    let lab = Lab::new();
    let lines = [QUESTION, "Question: Who is the keeper? Answer:", "Question: When does it open? Answer:"];
    let lines: Vec<String> =
        lines.iter().map(|line| serde_json::to_string(&format!("{TEXT}{line}")).unwrap()).collect();
    lab.write("prompts.txt", lines.join("\n"));
    let args = ["--prompts", "prompts.txt", "--use-adakv", "0", "--kv-dtype", "f32", "-n", "6"];
    let without = succeeds(&generate(&lab, &args));
    let stored = generate(&lab, &[&args[..], &["--cache-dir", "store"]].concat());
    let texts = |output: &str| -> Vec<serde_json::Value> {
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].clone();
        output.lines().map(line).collect()
    };
    assert_eq!(texts(&succeeds(&stored)), texts(&without));
    let [(tokens, of)] = found(&stored)[..] else { panic!("{}", stderr(&stored)) };
    assert!(tokens * 2 > of && tokens < of, "{tokens} of {of}");
    // One prompt alone finds what they have left.
    let one = generate(&lab, &["--prompt", TEXT, "--use-adakv", "0", "--kv-dtype", "f32", "--cache-dir", "store"]);
    assert!(matches!(found(&one)[..], [(tokens, of)] if tokens + 1 == of), "{}", stderr(&one));
}

#[test]
fn a_conversation_is_found_by_the_next_run() {
    let lab = Lab::new();
    let chat =
        |args: &[&str], lines: &[&str]| chat(&lab, &[&["--use-adakv", "0", "-n", "16"][..], args].concat(), lines);
    let stored = ["--system", TEXT, "--cache-dir", "store"];
    let lines = ["What is the cat called?", "/save talk.json", "And the keeper?", "/reset", "What is the cat called?"];
    let one = chat(&stored, &lines);
    assert_eq!(succeeds(&one), succeeds(&chat(&stored[..2], &lines)));
    // Nothing at first; after it was forgotten, all but the last token.
    let [(0, all), again] = found(&one)[..] else { panic!("{}", stderr(&one)) };
    assert_eq!(again, (all - 1, all));
    let next = chat(&["--messages", "talk.json", "--cache-dir", "store"], &["And the keeper?"]);
    succeeds(&next);
    assert!(matches!(found(&next)[..], [(tokens, of)] if tokens + 25 > of), "{}", stderr(&next));
    // A conversation that is loaded stays out of it.
    let here = entries(&lab);
    let loaded = chat(&["--save-cache", "c.kv"], &["Hello!"]);
    succeeds(&loaded);
    let lines = ["/load c.kv", "What is the capital of France?", "/reset", TEXT.trim()];
    let loaded = chat(&["--cache-dir", "store"], &lines);
    succeeds(&loaded);
    assert_eq!((found(&loaded), entries(&lab)), (Vec::new(), here));
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_is_kept_unasked() {
    let lab = Lab::new();
    let model = tiny(&lab);
    lab.write("file", "x");
    lab.write("a.kv", "x");
    let base = ["generate", "--model", &model, "--prompt", "ab", "-n", "1"];
    let refused = |args: &[&str]| lab.refuses(&[&base[..], args].concat());
    refused(&["--cache-dir", "file"]).status(1).names("file").hints("folder");
    refused(&["--cache-dir", ""]).status(2);
    refused(&["--cache-dir-limit", "1GB"]).status(2).names("--cache-dir-limit").hints("--cache-dir");
    lab.refuses(&["chat", "--model", &model, "--cache-dir-limit", "1GB"]).status(2).hints("--cache-dir");
    refused(&["--cache-dir", "store", "--cache-dir-limit", "many"]).status(2).names("many");
    refused(&["--cache-dir", "store", "--cache", "a.kv"]).status(2).names("--cache");
    // By a variable, which gives way to what is typed.
    let with = |variable: (&str, &str), args: &[&str]| {
        lab.command(&[&base[..], args].concat()).env(variable.0, variable.1).output().unwrap()
    };
    let output = with(("KV_CACHE_DIR", "file"), &[]);
    assert!(stderr(&output).contains("comes from the variable KV_CACHE_DIR"), "{}", stderr(&output));
    let output = with(("KV_CACHE_DIR", "file"), &["--cache", "a.kv"]);
    assert!(stderr(&output).contains("a.kv") && !stderr(&output).contains("file`"), "{}", stderr(&output));
    let output = with(("KV_CACHE_DIR_LIMIT", "many"), &[]);
    assert!(stderr(&output).contains("'KV_CACHE_DIR_LIMIT'"), "{}", stderr(&output));
    assert!(!lab.path("store").exists());
    succeeds(&with(("KV_CACHE_DIR", "store"), &[]));
    succeeds(&with(("KV_CACHE_DIR_LIMIT", "1GB"), &[]));
    assert!(lab.path("store").is_dir() && entries(&lab).is_empty(), "a short prompt is not worth it");
    let output = lab.run(&base);
    succeeds(&output);
    assert!(!stderr(&output).contains("prefix store"), "{}", stderr(&output));
    let candle = lab.run(&[&base[..], &["--backend", "candle", "--cache-dir", "store"]].concat());
    succeeds(&candle);
    assert!(stderr(&candle).contains("prefix store: it is not used"), "{}", stderr(&candle));
}

/// A prompt of the tiny model that is worth storing.
fn long_prompt() -> String {
    "ab a b c ab ".repeat(30)
}

#[test]
fn pictures_are_drawn_of_the_whole_prompt() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let prompt = long_prompt();
    let base = ["generate", "--model", &model, "--prompt", &prompt, "-n", "2", "--cache-dir", "store"];
    for _ in 0..2 {
        let output = lab.run(&[&base[..], &["--save-image"]].concat());
        succeeds(&output);
        assert!(found(&output).is_empty(), "{}", stderr(&output));
    }
    assert!(lab.path("images/layer0_attention.png").exists());
    assert_eq!(entries(&lab).len(), 1);
}

/// A full disk costs the run nothing but a line, and leaves nothing.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_line() {
    let lab = Lab::new();
    let (model, prompt) = (tiny(&lab), long_prompt());
    let base =
        ["generate", "--model", &model, "--prompt", &prompt, "-n", "5", "--log-file", "/dev/null", "--ignore-eos"];
    let without = succeeds(&lab.run(&base));
    for config in [&["--use-adakv", "0"][..], &["--kept-ratio", "0.5"]] {
        let mut command = Command::new("sh");
        let script = "trap '' 25; ulimit -f 0; exec \"$@\"";
        command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
        command.args(base).args(config).args(["--cache-dir", "store"]);
        lab.prepare(&mut command);
        let output = command.output().unwrap();
        let text = succeeds(&output);
        assert!(config[0] != "--use-adakv" || text == without, "{text}");
        let told: Vec<_> =
            stderr(&output).lines().filter(|line| line.contains("is not kept")).map(str::to_owned).collect();
        assert!(told.len() == 1 && told[0].contains("File too large"), "{}", stderr(&output));
        assert_eq!(entries(&lab), Vec::<String>::new());
    }
}

#[test]
fn what_is_damaged_is_one_line_and_the_text_is_that_of_a_fresh_cache() {
    let lab = Lab::new();
    let (model, prompt) = (tiny(&lab), long_prompt());
    let base = ["generate", "--model", &model, "--prompt", &prompt, "-n", "5", "--ignore-eos", "--use-adakv", "0"];
    let base = [&base[..], &["--cache-dir", "store"]].concat();
    let first = succeeds(&lab.run(&base));
    let name = format!("store/{}", entries(&lab)[0]);
    let mut bytes = std::fs::read(lab.path(&name)).unwrap();
    bytes[200] ^= 8;
    lab.write(&name, &bytes);
    let again = lab.run(&base);
    assert_eq!(succeeds(&again), first);
    let told: Vec<_> = stderr(&again).lines().filter(|line| line.contains("prefix store")).map(str::to_owned).collect();
    assert!(told.len() == 2 && told[0].contains("is not usable") && told[1].contains(": 0 of "), "{told:?}");
    // It is whole again.
    assert_eq!(entries(&lab).len(), 1);
    succeeds(&lab.run(&["cache", "check", &name]));
}
