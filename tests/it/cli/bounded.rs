//! Inputs without end, and machines without room: a sentence, soon, whatever it is.

use std::path::PathBuf;
use std::process::Output;
#[cfg(target_os = "linux")]
use std::time::Duration;

#[cfg(target_os = "linux")]
use super::process::{computes_for, output_of, send};
use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, succeeds};

/// Seconds, far more than a refusal computes.
const SLOW: usize = 20;

/// A model of eight tokens, of which no text has fewer than a third of its bytes.
fn model(lab: &Lab, context: u32) -> PathBuf {
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(context));
    lab.write("tiny.gguf", file.bytes())
}

/// Runs the program with so many bytes of address space.
fn within(lab: &Lab, megabytes: usize, args: &[&str]) -> Output {
    let mut command = lab.limited(&[("-v", megabytes << 10), ("-t", SLOW)], args);
    command.env("MALLOC_ARENA_MAX", "2").output().unwrap()
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_by_its_bytes() {
    const BYTES: usize = 40 << 20;
    let lab = Lab::new();
    model(&lab, 64);
    lab.write("long.txt", "ab ".repeat(BYTES / 3));
    let refuses = |command: &str, args: &[&str]| {
        let args = [&[command, "--model", "tiny.gguf", "--threads", "2"], args].concat();
        let refusal = Refusal::of(&within(&lab, 1024, &args), &format!("{args:?}"));
        refusal.status(2).names("context of 64").is_short();
    };
    refuses("generate", &["--prompt-file", "long.txt"]);
    refuses("compare", &["--prompt-file", "long.txt"]);
    refuses("generate", &["--prompts", "long.txt"]);
    // What does not count, since no token spells it, is no reason to refuse a text.
    lab.write("silent.txt", ["ab", &"\u{1}".repeat(100_000)].concat());
    succeeds(&lab.run(&["generate", "--model", "tiny.gguf", "-n", "1", "--prompt-file", "silent.txt"]));
}

#[test]
fn of_a_long_text_to_measure_on_only_the_beginning_is_tokenised() {
    let lab = Lab::new();
    model(&lab, 512);
    lab.write("long.txt", "ab ab c ".repeat(5 << 20));
    let bench = [
        "bench",
        "--model",
        "tiny.gguf",
        "--threads",
        "2",
        "--prompt-file",
        "long.txt",
        "--contexts",
        "8",
        "-n",
        "2",
        "--runs",
        "1",
    ];
    let output = within(&lab, 2048, &bench);
    succeeds(&output);
    let eval = [
        "eval",
        "--model",
        "tiny.gguf",
        "--threads",
        "2",
        "--text",
        "long.txt",
        "--windows",
        "2",
        "--prompt-tokens",
        "16",
        "--score-tokens",
        "4",
        "--greedy-tokens",
        "4",
    ];
    succeeds(&within(&lab, 1024, &eval));
}

#[cfg(target_os = "linux")]
#[test]
fn what_has_no_end_is_refused() {
    let lab = Lab::new();
    model(&lab, 64);
    for option in ["--prompt-file", "--prompts", "--config", "--messages"] {
        let args = ["generate", "--model", "tiny.gguf", "--threads", "2", option, "/dev/zero"];
        let refusal = Refusal::of(&within(&lab, 1536, &args), &format!("{args:?}"));
        refusal.is_short();
    }
    for args in [["generate", "--model", "/dev/zero"], ["inspect", "--model", "/dev/zero"]] {
        Refusal::of(&within(&lab, 1024, &args), &format!("{args:?}")).status(1).names("/dev/zero").is_short();
    }
    let folder = lab.path("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"architectures": ["LlamaForCausalLM"]}"#).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.join("tokenizer.json")).unwrap();
    Refusal::of(&within(&lab, 1024, &["generate", "--model", "folder"]), "a folder of devices").status(1).is_short();
}

#[test]
fn counts_without_end_make_no_room_beforehand() {
    let lab = Lab::new();
    model(&lab, 64);
    let run = |args: &[&str]| within(&lab, 1024, &[args, &["--model", "tiny.gguf", "--threads", "2"]].concat());
    let max = u64::MAX.to_string();
    succeeds(&run(&[
        "generate",
        "--prompt",
        "ab",
        "-n",
        &max,
        "--prefill-chunk",
        &max,
        "--repeat-last-n",
        &max,
        "--top-k",
        &max,
    ]));
    lab.write("prompts.txt", "ab\nc\n");
    succeeds(&run(&["generate", "--prompts", "prompts.txt", "-n", "2", "--batch", &max]));
    for options in [
        &["eval", "--windows", &max][..],
        &["eval", "--prompt-tokens", &max],
        &["eval", "--score-tokens", &max],
        &["eval", "--greedy-tokens", &max],
        &["eval", "--offset-tokens", &max],
        &["eval", "--tasks", "passkey", "--contexts", &max],
        &["bench", "--contexts", "4294967295"],
        &["bench", "-n", "4294967295"],
        &["tune", "--max-kept", "0.5", "--windows", &max],
    ] {
        Refusal::of(&run(options), &format!("{options:?}")).status(2).is_short();
    }
}

/// Trials are made one after the other: asking for four billion takes no memory.
#[cfg(target_os = "linux")]
#[test]
fn any_number_of_trials_may_be_asked_for() {
    let lab = Lab::new();
    model(&lab, 4096);
    let args = [
        "eval",
        "--model",
        "tiny.gguf",
        "--threads",
        "2",
        "--windows",
        "0",
        "--tasks",
        "passkey",
        "--contexts",
        "512",
        "--trials",
        "4294967295",
    ];
    let child = lab.limited(&[("-v", 1 << 20)], &args).spawn().unwrap();
    computes_for(&child, Duration::from_secs(2));
    send(&child, "-INT");
    let output = output_of(child, "four billion trials");
    let stderr = String::from_utf8_lossy(&output.stderr);
    // It was under way when it was interrupted.
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(!stderr.contains("memory"), "{stderr}");
}

#[test]
fn an_absurd_number_of_threads_is_bounded() {
    let lab = Lab::new();
    model(&lab, 64);
    let args = ["generate", "--model", "tiny.gguf", "--prompt", "ab ab c", "-n", "4"];
    let few = succeeds(&lab.run(&[&args[..], &["--threads", "2"]].concat()));
    let output = lab.run(&[&args[..], &["--threads", "1000", "--report", "r.json"]].concat());
    assert_eq!(succeeds(&output), few);
    let threads = lab.json("r.json")["threads"].as_u64().unwrap();
    let note = "note: 1000 threads are of no use on ";
    assert_eq!(String::from_utf8_lossy(&output.stderr).contains(note), threads < 1000);
    for value in ["99999999", "18446744073709551616", "0", "many", ""] {
        let mut command = lab.limited(&[("-t", SLOW)], &args);
        assert_eq!(succeeds(&command.env("RAYON_NUM_THREADS", value).output().unwrap()), few, "{value}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_not_there_is_a_sentence() {
    let lab = Lab::new();
    model(&lab, 1 << 20);
    lab.write("prompt.txt", "ab ".repeat(400_000));
    let args = ["generate", "--model", "tiny.gguf", "--threads", "1", "-n", "1", "--prompt-file", "prompt.txt"];
    let refusal = Refusal::of(&within(&lab, 100, &args), "100 MB");
    refusal.status(1).names("memory").is_short();
}
