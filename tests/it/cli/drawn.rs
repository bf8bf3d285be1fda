//! Texts drawn at random: each its own, and all repeatable by the seed that is told.

use std::io::Write;
use std::process::{Output, Stdio};

use super::{Lab, succeeds};
use crate::support::scripted::{CONTROL, NORMAL, Scripted};

/// Any token follows any with equal probability.
fn lab() -> Lab {
    let lab = Lab::new();
    let letters = ["q", "w", "e", "r", "t", "z", "u", "i", "o", "p"].map(|letter| (letter, NORMAL));
    Scripted::new(&[&[("</s>", CONTROL)], &letters[..]].concat()).write(&lab.path("m.gguf"));
    lab
}

const DRAW: [&str; 6] = ["--temperature", "1", "-n", "12", "--ignore-eos", "--model"];

fn run(lab: &Lab, args: &[&str]) -> Output {
    let output = lab.run(&[&["generate", "--report", "r.json"], &DRAW[..], &["m.gguf"], args].concat());
    succeeds(&output);
    output
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The seed that standard error tells, if it does.
fn told_seed(output: &Output) -> Option<String> {
    let told = String::from_utf8(output.stderr.clone()).unwrap();
    let line = told.lines().find_map(|line| line.strip_prefix("seed"))?;
    Some(line.trim_start_matches(':').trim().to_owned())
}

#[test]
fn a_seed_is_drawn_told_and_repeats_the_run() {
    let lab = lab();
    let (first, second) = (run(&lab, &["--prompt", "q"]), run(&lab, &["--prompt", "q"]));
    assert_ne!(text(&first), text(&second));
    let seed = told_seed(&second).unwrap();
    assert_ne!(told_seed(&first).unwrap(), seed);
    let report = lab.json("r.json");
    assert_eq!(report["generation"]["sampling"]["seed"].to_string(), seed);
    assert_eq!(text(&run(&lab, &["--prompt", "q", "--seed", &seed])), text(&second));
    // A line of a file of prompts alone is a prompt alone.
    lab.write("p.txt", "q\n");
    let line: serde_json::Value =
        serde_json::from_str(&text(&run(&lab, &["--prompts", "p.txt", "--seed", &seed]))).unwrap();
    assert_eq!(format!("{}\n", line["text"].as_str().unwrap()), text(&second));

    assert_eq!(told_seed(&run(&lab, &["--prompt", "q", "--quiet"])), None);
    let greedy = run(&lab, &["--prompt", "q", "--temperature", "0"]);
    assert_eq!(told_seed(&greedy), None, "nothing was drawn");
    assert_eq!(text(&greedy), text(&run(&lab, &["--prompt", "q", "--temperature", "0"])));
}

#[test]
fn equal_prompts_of_a_file_give_texts_of_their_own_however_many_go_at_a_time() {
    let lab = lab();
    lab.write("p.txt", "q\n".repeat(6));
    let texts = |args: &[&str]| -> Vec<(String, u64)> {
        let lines = text(&run(&lab, &[&["--prompts", "p.txt"], args].concat()));
        lines
            .lines()
            .map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                (line["text"].as_str().unwrap().to_owned(), line["seed"].as_u64().unwrap())
            })
            .collect()
    };
    let drawn = texts(&["--seed", "7"]);
    for batch in ["1", "2", "5"] {
        assert_eq!(texts(&["--seed", "7", "--batch", batch]), drawn);
    }
    let mut distinct: Vec<&str> = drawn.iter().map(|(text, _)| text.as_str()).collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 6);
    // Other seeds share none of the texts, nor any with their neighbours.
    for seed in ["6", "8"] {
        assert!(texts(&["--seed", seed]).iter().all(|text| !drawn.contains(text)));
    }
    // A line's own seed repeats it alone.
    let (expected, seed) = &drawn[4];
    assert_eq!(text(&run(&lab, &["--prompt", "q", "--seed", &seed.to_string()])), format!("{expected}\n"));
    assert_ne!(texts(&[]), texts(&[]));
    assert_eq!(lab.json("r.json")["texts"][3]["seed"].as_u64().map(|seed| seed < 1 << 53), Some(true));
}

#[test]
fn a_conversation_draws_on_and_on() {
    let lab = lab();
    let chat = |args: &[&str]| {
        let args = [&["chat"], &DRAW[..], &["m.gguf"], args].concat();
        let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"q\nq\n/reset\nq\n").unwrap();
        child.wait_with_output().unwrap()
    };
    let first = chat(&[]);
    let answers = succeeds(&first);
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 3);
    assert!(answers[0] != answers[1] && answers[0] != answers[2] && answers[1] != answers[2], "{answers:?}");
    let again = chat(&["--seed", &told_seed(&first).unwrap()]);
    assert_eq!(succeeds(&again).lines().collect::<Vec<_>>(), answers);
    assert_ne!(succeeds(&chat(&[])), succeeds(&again));
}
