//! Options that would do nothing, options that contradict each other, and variables that stand for options.

use std::process::Output;

use serde_json::Value;

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, VARIABLES, succeeds};

/// Says who speaks, so that a turn can be seen in the prompt.
const TEMPLATE: &str = "{% for message in messages %}{{ 'a ' if message.role == 'user' else 'b ' }}{{ message.content }} \
                        {% endfor %}c";

/// A folder with a tiny model that knows a chat format, and configurations.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().set("tokenizer.chat_template", Meta::Text(TEMPLATE)).bytes());
    lab.write("h2o.json", r#"{"method": "h2o"}"#);
    lab.write("evict.json", r#"{"method": "h2o", "kept_ratio": 0.5, "decode": "evict"}"#);
    lab.write("fastgen.json", r#"{"criterion": "mass", "t": 0.6}"#);
    lab.write("messages.json", r#"[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]"#);
    lab.write("p.txt", "ab ac\nb a b\n");
    lab
}

/// A run with variables set.
fn with(lab: &Lab, variables: &[(&str, &str)], args: &[&str]) -> Output {
    lab.command(args).envs(variables.iter().copied()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const GENERATE: [&str; 7] = ["generate", "--model", "tiny.gguf", "-n", "2", "--threads", "1"];

/// The report of a run on the tiny model.
fn report(lab: &Lab, variables: &[(&str, &str)], args: &[&str]) -> Value {
    succeeds(&with(lab, variables, &[&GENERATE[..], &["--report", "r.json"], args].concat()));
    lab.json("r.json")
}

fn prompt_tokens(report: &Value) -> Vec<u64> {
    report["prompt_tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn options_that_would_do_nothing_are_refused_by_name() {
    let lab = lab();
    let generate = |args: &[&str], option: &str, other: &str| {
        let refusal = lab.refuses(&[&GENERATE[..], args].concat());
        refusal.status(2).names(option).is_short();
        assert!(refusal.sentence.contains(other) || refusal.rest.contains(other), "{}", refusal.sentence);
    };
    generate(&["--batch", "16"], "--batch", "--prompts");
    generate(&["--kept-ratio", "0.5", "--use-adakv", "0"], "--kept-ratio", "--use-adakv 0");
    generate(&["--kv-budget", "1MB", "--use-adakv", "0"], "--kv-budget", "--use-adakv 0");
    generate(&["--kv-budget", "1MB", "--kept-ratio", "0.5"], "--kv-budget", "--kept-ratio");
    generate(&["--prompts", "p.txt", "--kept-ratio", "0.5", "--use-adakv", "0"], "--kept-ratio", "--use-adakv 0");
    generate(&["--image-dir", "pictures"], "--image-dir", "--save-image");
    generate(&["--image-dir", "pictures", "--save-image", "0"], "--image-dir", "--save-image");
    generate(&["--prompt", "a", "--prompt-file", "p.txt"], "--prompt-file", "--prompt ");
    generate(&["--chat", "0", "--system", "a"], "--chat 0", "--system");
    generate(&["--chat", "false", "--messages", "messages.json"], "--chat 0", "--messages");
    lab.write("own.jinja", TEMPLATE);
    generate(&["--chat=0", "--chat-template", "own.jinja"], "--chat 0", "--chat-template");
    generate(&["--save-image", "--prompts", "p.txt"], "--prompts", "--save-image");
    // A budget in bytes is no search's business; `fastgen` is named.
    generate(&["--kv-budget", "1MB", "--config", "fastgen.json"], "--kv-budget", "fastgen");

    let refuses = |args: &[&str], option: &str| {
        let refusal = lab.refuses(&[args, &["--model", "tiny.gguf"]].concat());
        refusal.status(2).names(option).names("no effect").is_short();
    };
    refuses(&["chat", "--kv-budget", "1MB", "--use-adakv", "0"], "--kv-budget");
    refuses(&["chat", "--kept-ratio", "0.1", "--use-adakv", "false"], "--kept-ratio");
    refuses(&["bench", "--prefill", "8", "--new-tokens", "16"], "--new-tokens");
    refuses(&["eval", "--contexts", "512,1024,2048"], "--contexts");
    refuses(&["eval", "--depths", "0.5"], "--depths");
    refuses(&["eval", "--trials", "5"], "--trials");
    refuses(&["eval", "--seed", "0"], "--seed");
    refuses(&["eval", "--answer-tokens", "64"], "--answer-tokens");
    refuses(&["eval", "--chat"], "--chat");
    // As wrong as ever, and said of the option.
    lab.refuses(&[&GENERATE[..], &["--stop", ""]].concat()).status(2).names("--stop");
}

/// Scripts set these for all runs, or change one option between two runs.
#[test]
fn options_that_do_no_harm_are_allowed() {
    let lab = lab();
    for args in [
        &["--prompt", "ab", "--use-adakv", "0", "--config", "h2o.json"][..],
        &["--prompt", "ab", "--top-k", "5", "--seed", "3", "--repeat-last-n", "7"],
        &["--chat", "--messages", "messages.json"],
        &["--prompts", "p.txt", "--batch", "16", "--kv-budget", "1MB", "--use-adakv", "0"],
    ] {
        succeeds(&lab.run(&[&GENERATE[..], args].concat()));
    }
    let full = report(&lab, &[("USE_ADAKV", "0"), ("CONFIG", "h2o.json"), ("IMAGE_DIR", "x")], &["--prompt", "ab"]);
    assert_eq!((&full["adaptive"], &full["config"]), (&Value::Bool(false), &Value::Null));
    assert!(!lab.path("x").exists());
}

#[test]
fn a_budget_bounds_the_bytes_of_one_prompt() {
    let lab = lab();
    let prompt = "ab ac b a ".repeat(5);
    let full = report(&lab, &[], &["--prompt", &prompt, "--use-adakv", "0"]);
    let raw = full["kv"]["kept_bytes"].as_u64().unwrap();
    for (budget, config) in [("1KB", Some("h2o.json")), ("640B", Some("h2o.json")), ("1KB", None)] {
        let mut args = [&GENERATE[..], &["--prompt", &prompt, "--kv-budget", budget, "--report", "r.json"]].concat();
        args.extend(config.iter().flat_map(|config| ["--config", config]));
        let output = lab.run(&args);
        succeeds(&output);
        let report = lab.json("r.json");
        let kept = report["kv"]["kept_bytes"].as_u64().unwrap();
        let bytes = if budget == "1KB" { 1024 } else { 640 };
        // A row takes 64 bytes, and 6 for its position and its score. There is room for the token that is read back.
        let (rows, row) = (kept / 64, 64 + 6);
        assert!((rows + 1) * row <= bytes && (rows + 2) * row > bytes && bytes < raw, "{kept} of {bytes}, {raw}");
        assert_eq!(report["config"]["kv_budget"], format!("{bytes}B"));
        // Without a configuration, one that can hold a budget is taken, and this is said.
        let (method, is_noted) = if config.is_none() { ("replay", true) } else { ("h2o", false) };
        assert_eq!(report["config"]["method"], method);
        assert_eq!(stderr(&output).contains("note: --kv-budget is held by the method `replay`"), is_noted);
    }
    let share = report(&lab, &[], &["--prompt", &prompt, "--kept-ratio", "0.25"]);
    assert_eq!((&share["config"]["method"], &share["config"]["kept_ratio"]), (&"replay".into(), &0.25.into()));
    // What cannot be held is not held in silence.
    let tiny = [&GENERATE[..], &["--prompt", &prompt, "--kv-budget", "10B"]].concat();
    let output = lab.run(&tiny);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("the budget of 10 bytes has no room for another token"), "{}", stderr(&output));
    let output = lab.run(&[&tiny[..], &["-n", "1"]].concat());
    succeeds(&output);
    assert!(
        stderr(&output).contains("note: 64 bytes are kept, more than the budget of 10 bytes"),
        "{}",
        stderr(&output)
    );
    // A configuration that is typed is not left aside.
    let refusal = lab.refuses(&[&GENERATE[..], &["--kv-budget", "1MB", "--config", "fastgen.json"]].concat());
    refusal.status(2).names("`fastgen.json`").hints("configs/best.json");
    let output = lab.run(&["compare", "--model", "tiny.gguf", "--prompt", &prompt, "-n", "2", "--kv-budget", "1KB"]);
    succeeds(&output);
    assert!(stderr(&output).contains("`replay`"));
}

#[test]
fn a_prompt_beside_messages_is_the_users_next_turn() {
    let lab = lab();
    let messages = ["--messages", "messages.json"];
    let alone = prompt_tokens(&report(&lab, &[], &messages));
    lab.write("next.txt", "ac");
    let typed = prompt_tokens(&report(&lab, &[], &[&messages[..], &["--prompt", "ac"]].concat()));
    let file = prompt_tokens(&report(&lab, &[], &[&messages[..], &["--prompt-file", "next.txt"]].concat()));
    lab.write(
        "longer.json",
        r#"[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}, {"role": "user", "content": "ac"}]"#,
    );
    let longer = prompt_tokens(&report(&lab, &[], &["--messages", "longer.json"]));
    assert_eq!((&typed, &file), (&longer, &longer));
    assert!(longer.len() > alone.len());
    // What the environment says is no turn of this conversation.
    assert_eq!(prompt_tokens(&report(&lab, &[("PROMPT", "ac")], &messages)), alone);
}

#[test]
fn variables_lose_against_options_that_they_conflict_with() {
    let lab = lab();
    let run = |variables: &[(&str, &str)], args: &[&str]| with(&lab, variables, &[&GENERATE[..], args].concat());
    let many = succeeds(&lab.run(&[&GENERATE[..], &["--prompts", "p.txt"]].concat()));
    for variables in [("PROMPT", "ab"), ("SAVE_IMAGE", "1"), ("IMAGE_DIR", "pictures")] {
        assert_eq!(succeeds(&run(&[variables], &["--prompts", "p.txt"])), many, "{variables:?}");
    }
    assert!(!lab.path("images").exists() && !lab.path("pictures").exists());
    lab.write("prompt.txt", "ab ab");
    let tokens = |variables: &[(&str, &str)], args: &[&str]| prompt_tokens(&report(&lab, variables, args));
    for args in [&["--prompt-file", "prompt.txt"][..], &["--prompt", "ab ab"], &["--prompt", "ab", "--system", "c"]] {
        assert_eq!(tokens(&[("PROMPT", "c")], args), tokens(&[], args), "{args:?}");
        assert_eq!(tokens(&[("CHAT", "0")], args), tokens(&[], args), "{args:?}");
    }
    let go_on = ["--messages", "messages.json", "--continue"];
    assert_eq!(tokens(&[("CHAT", "0")], &go_on), tokens(&[], &go_on));
    assert_eq!(tokens(&[("CHAT", "1")], &["--prompt", "ab", "--chat", "0"]), tokens(&[], &["--prompt", "ab"]));
    let generated = |variables: &[(&str, &str)]| {
        report(&lab, variables, &["--prompt", "ab", "--ignore-eos"])["generated_tokens"].as_array().unwrap().len()
    };
    assert_eq!(generated(&[("MAX_NEW_TOKENS", "5")]), 2, "-n 2 is typed");
    // A bad one is of no interest where it does not count.
    assert_eq!(generated(&[("MAX_NEW_TOKENS", "many"), ("MODEL_PATH", "none.gguf")]), 2);
    let config = report(&lab, &[("CONFIG", "none.json")], &["--prompt", "ab", "--config", "h2o.json"]);
    assert_eq!(config["config"]["method"], "h2o");
}

#[test]
fn a_variable_for_the_full_cache_loses_against_a_budget_and_not_against_a_configuration() {
    let lab = lab();
    let full = ("USE_ADAKV", "0");
    let args = [&GENERATE[..], &["--prompt", "ab ac b a", "--config", "h2o.json"]].concat();
    let adaptive = |variables: &[(&str, &str)], more: &[&str]| {
        let output = with(&lab, variables, &[&args[..], &["--report", "r.json"], more].concat());
        succeeds(&output);
        (lab.json("r.json")["adaptive"] == true, stderr(&output).contains("note: "))
    };
    assert_eq!(adaptive(&[full], &[]), (false, false));
    assert_eq!(adaptive(&[full], &["--kept-ratio", "0.5"]), (true, true));
    assert_eq!(adaptive(&[("USE_ADAKV", "no")], &["--kv-budget", "1KB"]), (true, true));
    assert_eq!(adaptive(&[("USE_ADAKV", "1")], &["--kept-ratio", "0.5"]), (true, false));
    // Of many prompts, it is what all caches may come to, full ones too.
    let output = with(&lab, &[full], &[&GENERATE[..], &["--prompts", "p.txt", "--kv-budget", "1MB"]].concat());
    succeeds(&output);
    assert!(!stderr(&output).contains("note: "), "{}", stderr(&output));
    // `eval` has no such variable.
    let eval = ["eval", "--model", "tiny.gguf", "--configs", "h2o.json", "--kept-ratio", "0.5", "--windows", "0"];
    let output = with(&lab, &[full], &[&eval[..], &["--prompts", "p.txt", "--answer-tokens", "2"]].concat());
    succeeds(&output);
    assert!(!stderr(&output).contains("note: "), "{}", stderr(&output));

    let output = with(&lab, &[("CONFIG", "fastgen.json")], &[&GENERATE[..], &["--kv-budget", "1KB"]].concat());
    succeeds(&output);
    assert!(stderr(&output).contains("note: the configuration of the variable CONFIG has no budget"));
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let lab = lab();
    let run = |variables: &[(&str, &str)]| {
        let args = ["generate", "--model", "tiny.gguf", "--report", "r.json"];
        succeeds(&with(&lab, variables, &args));
        let mut report = lab.json("r.json");
        for key in ["timings", "memory"] {
            report[key].take();
        }
        report
    };
    let unset = run(&[]);
    for name in VARIABLES {
        assert_eq!(run(&[(name, "")]), unset, "{name}");
    }
    assert!(!lab.path("images").exists());
    let output = with(&lab, &[("MODEL_PATH", "")], &["inspect"]);
    Refusal::of(&output, "no model").status(2).names("required");
}

#[test]
fn what_a_variables_value_breaks_is_said_of_the_variable() {
    let lab = lab();
    for (name, value) in
        [("USE_ADAKV", "maybe"), ("MAX_NEW_TOKENS", "many"), ("SAVE_IMAGE", "2.5"), ("CHAT", "perhaps")]
    {
        let args = ["generate", "--model", "tiny.gguf"];
        let refusal = Refusal::of(&with(&lab, &[(name, value)], &args), name);
        refusal.status(2).names(format!("'{name}'")).names(value);
        assert!(!refusal.sentence.contains("--"), "{}", refusal.sentence);
        // The same value, typed, is the option's.
        let option = format!("--{}", name.to_lowercase().replace('_', "-"));
        let refusal = lab.refuses(&[&args[..], &[&format!("{option}={value}")]].concat());
        refusal.status(2).names(&option).names(value);
    }
    let refuses = |name: &str, value: &str, args: &[&str]| Refusal::of(&with(&lab, &[(name, value)], args), name);
    refuses("MODEL_PATH", "none.gguf", &["generate"]).names("`none.gguf`").hints("MODEL_PATH");
    refuses("MODEL_PATH", "p.txt", &["inspect"]).names("`p.txt`").hints("MODEL_PATH");
    refuses("CONFIG", "none.json", &GENERATE).names("`none.json`").hints("CONFIG");
    refuses("CONFIG", "messages.json", &["compare", "--model", "tiny.gguf"]).names("`messages.json`").hints("CONFIG");
    refuses("PROMPT", &"ab ".repeat(100), &GENERATE).status(2).names("context").hints("PROMPT");
    lab.write("file", "");
    refuses("IMAGE_DIR", "file", &[&GENERATE[..], &["--save-image"]].concat()).names("`file`").hints("IMAGE_DIR");
    // Typed, it is not the variable's fault.
    let output = with(&lab, &[("CONFIG", "h2o.json")], &[&GENERATE[..], &["--config", "none.json"]].concat());
    let refusal = Refusal::of(&output, "typed");
    assert!(!refusal.rest.contains("CONFIG"), "{}", refusal.rest);
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let bytes = std::ffi::OsStr::from_bytes(&[b'a', 0xff]);
        let output = lab.command(&GENERATE).env("PROMPT", bytes).output().unwrap();
        Refusal::of(&output, "not UTF-8").status(2).names("PROMPT").names("UTF-8");
    }
}

#[test]
fn two_outputs_that_are_one_file_are_refused() {
    let lab = lab();
    let refuses = |args: &[&str], options: [&str; 2]| {
        lab.refuses(args).status(2).names(options[0]).names(options[1]).hints("file of its own").is_short();
    };
    let generate = |args: &[&str], options: [&str; 2]| refuses(&[&GENERATE[..], args].concat(), options);
    generate(&["--report", "x", "--log-file", "x"], ["--report", "--log-file"]);
    generate(&["--report", "logs/../logs/test.log"], ["--report", "--log-file"]);
    generate(&["--prompts", "p.txt", "--report", "./x", "--log-file", "x"], ["--report", "--log-file"]);
    generate(&["--save-image", "--image-dir", "d", "--report", "d/policies.png"], ["--report", "--image-dir"]);
    generate(&["--save-image", "--log-file", "images/layer0_attention.png"], ["--log-file", "--image-dir"]);
    let eval = ["eval", "--model", "tiny.gguf"];
    refuses(&[&eval[..], &["--json", "x", "--csv", "x"]].concat(), ["--json", "--csv"]);
    refuses(&[&eval[..], &["--plot", "a/../x", "--csv", "x"]].concat(), ["--plot", "--csv"]);
    refuses(&["bench", "--model", "tiny.gguf", "--json", "x", "--plot", "./x"], ["--json", "--plot"]);
    let tune = ["tune", "--model", "tiny.gguf", "--max-kl", "0.1"];
    refuses(&[&tune[..], &["-o", "x", "--json", "x"]].concat(), ["--output", "--json"]);
    refuses(&[&tune[..], &["--csv", "tuned.json"]].concat(), ["--output", "--csv"]);
    #[cfg(unix)]
    {
        lab.write("there.json", "old");
        std::fs::hard_link(lab.path("there.json"), lab.path("hard.json")).unwrap();
        std::os::unix::fs::symlink("new.json", lab.path("link.json")).unwrap();
        refuses(&[&eval[..], &["--json", "there.json", "--csv", "hard.json"]].concat(), ["--json", "--csv"]);
        refuses(&[&eval[..], &["--json", "new.json", "--csv", "link.json"]].concat(), ["--json", "--csv"]);
        assert_eq!(lab.read("there.json"), "old");
        // A report takes the place of its file, and text that is sent there would be lost.
        let out = std::fs::File::create(lab.path("out.txt")).unwrap();
        let output = lab.command(&[&GENERATE[..], &["--report", "out.txt"]].concat()).stdout(out).output().unwrap();
        Refusal::of(&output, "standard output").status(2).names("--report").names("standard output");
        succeeds(&lab.run(&[&GENERATE[..], &["--report", "/dev/null", "--log-file", "/dev/null"]].concat()));
    }
    assert!(!lab.path("x").exists() && !lab.path("d").exists());
}

#[test]
fn the_run_script_leaves_the_rest_to_variables() {
    let script =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/run_adaptive_kvcache.sh")).unwrap();
    // An option that the script adds is one that the user did not type.
    for option in ["--config", "--image-dir", "--prompt", "--use-adakv", "--save-image", "--max-new-tokens", "--chat"] {
        let typed = script.lines().any(|line| !line.starts_with('#') && line.contains(&format!("{option} ")));
        assert!(!typed, "{option}");
    }
}
