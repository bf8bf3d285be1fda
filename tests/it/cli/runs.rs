//! Runs that go well, and those that the user ends.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
#[cfg(target_os = "linux")]
use std::time::Duration;

use serde_json::Value;

#[cfg(target_os = "linux")]
use super::process::{computes_for, ends_soon_by, output_of, reads_input, send};
use super::{Lab, MODEL, NUM_KV_HEADS, NUM_LAYERS, VARIABLES, succeeds};

const CAPITAL: &str = "The capital of France is";
/// Bytes that one kept position takes in one KV head: key and value, 64 numbers each, f16.
const ENTRY_BYTES: u64 = 2 * 64 * 2;
const POLICIES: [&str; 5] = ["special", "punctuation", "frequency", "locality", "full"];

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, got {value}"))
}

fn whole(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("expected a whole number, got {value}"))
}

fn size(value: &Value) -> usize {
    usize::try_from(whole(value)).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("expected a list, got {value}"))
}

#[test]
fn a_raw_prompt_is_continued() {
    let lab = Lab::new();
    let text = lab.generate(&["--prompt", CAPITAL, "-n", "4"]);
    assert!(text.starts_with(" Paris"), "{text}");
    let output = lab.run(&["generate", "--model", MODEL, "--prompt", CAPITAL, "-n", "4"]);
    let figures = String::from_utf8(output.stderr).unwrap();
    for part in [
        "raw MB",
        "compressed MB",
        "saved %",
        "\n mean ",
        "prefill  5 tokens",
        "decode   3 tokens",
        "text     4 tokens",
        "KV cache",
    ] {
        assert!(figures.contains(part), "expected `{part}` in:\n{figures}");
    }
    let quiet = lab.run(&["generate", "--model", MODEL, "--prompt", CAPITAL, "-n", "4", "--quiet"]);
    assert_eq!((succeeds(&quiet), quiet.stderr.len()), (text, 0));
}

#[test]
fn a_chat_is_answered() {
    let lab = Lab::new();
    let args = ["--prompt", "What is the capital of France?", "-n", "24", "--compute", "exact", "--report", "r.json"];
    let text = lab.generate(&[&args[..], &["--chat"]].concat());
    assert!(text.contains("Paris") && !text.contains("<|im"), "{text}");
    let ids = lab.json("r.json")["prompt_tokens"].clone();
    assert_eq!(ids[0], 1, "the template begins with <|im_start|>");
    let mut by_variable = lab.command(&[&["generate", "--model", MODEL], &args[..]].concat());
    assert_eq!(succeeds(&by_variable.env("CHAT", "1").output().unwrap()), text);
    lab.generate(&[&args[..], &["--chat=0"]].concat());
    assert!(list(&lab.json("r.json")["prompt_tokens"]).len() < list(&ids).len());
}

#[test]
fn a_prompt_comes_from_everywhere() {
    let lab = Lab::new();
    let expected = lab.generate(&["--prompt", CAPITAL, "-n", "4"]);
    lab.write("prompt.txt", CAPITAL);
    assert_eq!(lab.generate(&["--prompt-file", "prompt.txt", "-n", "4"]), expected);

    let mut command = lab.command(&["generate", "--model", MODEL, "--prompt-file", "-", "-n", "4"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(CAPITAL.as_bytes()).unwrap();
    assert_eq!(succeeds(&child.wait_with_output().unwrap()), expected);

    let mut command = lab.command(&["generate"]);
    command.env("MODEL_PATH", MODEL).env("PROMPT", CAPITAL).env("MAX_NEW_TOKENS", "4");
    assert_eq!(succeeds(&command.output().unwrap()), expected);
}

#[test]
fn generation_ends_where_it_is_told_to() {
    let lab = Lab::new();
    let run = |args: &[&str]| {
        let text = lab.generate(&[&["--report", "r.json"], args].concat());
        let report = lab.json("r.json");
        assert_eq!(report["text"].as_str().unwrap().trim_end_matches('\n'), text.trim_end_matches('\n'));
        let reason = report["finish_reason"].as_str().unwrap().to_owned();
        (text, reason, list(&report["generated_tokens"]).len())
    };
    let capital = |args: &[&str]| run(&[&["--prompt", CAPITAL][..], args].concat());
    assert_eq!(capital(&["-n", "0"]), (String::new(), "length".into(), 0));
    assert_eq!(capital(&["-n", "1"]), (" Paris\n".into(), "length".into(), 1));
    assert_eq!(capital(&["-n", "9", "--stop", "."]), (" Paris\n".into(), "stop".into(), 2));
    // The stop text begins within a token and ends within another; the first to be met counts.
    assert_eq!(capital(&["-n", "9", "--stop", "zzz", "--stop", "ris.", "--stop", "\n"]).0, " Pa\n");
    // As a raw prompt, this question is followed by the end of the text.
    let question = ["--prompt", "What is the recipe of mayonnaise?", "-n", "5"];
    assert_eq!(run(&question), (String::new(), "eos".into(), 1));
    let (_, reason, tokens) = run(&[&question[..], &["--ignore-eos"]].concat());
    assert_eq!((reason.as_str(), tokens), ("length", 5));
}

#[test]
fn a_seed_makes_a_run_repeatable() {
    let lab = Lab::new();
    let sampled = |seed| {
        let args = ["--prompt", "Once upon a time", "-n", "16", "--ignore-eos", "--temperature", "0.8", "--seed", seed];
        lab.generate(&args)
    };
    let first = sampled("7");
    assert_eq!(sampled("7"), first);
    assert_ne!(sampled("8"), first);
}

/// Cuts a log record's time stamp off.
fn message(line: &str) -> Option<&str> {
    let (stamp, message) = line.split_once(" - INFO - ")?;
    let shape: String = stamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    (shape == "0000-00-00 00:00:00,000").then_some(message)
}

/// Takes a text apart: what stands between the fixed parts, which must all be there, in order, and nothing else.
fn parts<'t>(text: &'t str, fixed: &[&str]) -> Option<Vec<&'t str>> {
    let mut rest = text.strip_prefix(fixed[0])?;
    let mut found = Vec::new();
    for part in &fixed[1..] {
        let (before, after) = if part.is_empty() { (rest, "") } else { rest.split_once(part)? };
        found.push(before);
        rest = after;
    }
    rest.is_empty().then_some(found)
}

/// A number with three digits after the point, as `0.281`.
fn megabytes(text: &str) -> f64 {
    assert_eq!(text.split_once('.').map(|(_, digits)| digits.len()), Some(3), "{text}");
    text.parse().unwrap()
}

/// Checks every character of a log against the original's format; prompt length and kept positions of all heads.
#[expect(clippy::cast_precision_loss)]
fn parse_log(log: &str) -> Vec<(usize, Vec<usize>)> {
    let mut lines = log.lines();
    let mut layers = Vec::new();
    while lines.clone().next().is_some() {
        let layer = (layers.len() % NUM_LAYERS).to_string();
        let (mut kept, mut order, mut prompt_len) = (vec![usize::MAX; NUM_KV_HEADS], Vec::new(), 0);
        for _ in 0..NUM_KV_HEADS {
            let line = lines.next().unwrap();
            let found = message(line)
                .and_then(|text| parts(text, &["layer_id:", "(heads:", ")->[", "]-> kv cache len:", "->", ""]))
                .unwrap_or_else(|| panic!("not a head's line: {line}"));
            assert_eq!(found[0], layer);
            let head: usize = found[1].parse().unwrap();
            let names: Vec<&str> = found[2].split(", ").map(|name| parts(name, &["'", "'"]).unwrap()[0]).collect();
            let level = if names == ["full"] { 4 } else { names.len() - 1 };
            assert!(names == ["full"] || names == POLICIES[..names.len()], "{line}");
            order.push((level, head));
            prompt_len = found[3].parse().unwrap();
            kept[head] = found[4].parse().unwrap();
            assert!(kept[head] <= prompt_len, "{line}");
        }
        assert!(order.is_sorted(), "heads in the order of recovery: {order:?}");

        assert_eq!(lines.next().and_then(message).unwrap(), format!("layer_id:{layer} cache:"));
        let sizes = parts(lines.next().unwrap(), &["", " MB -> ", "MB"]).unwrap();
        assert_eq!(lines.next(), Some("saving:"));
        let saving = parts(lines.next().unwrap(), &["", "MB (", ")%"]).unwrap();
        let total: usize = kept.iter().sum();
        let mb = |entries: usize| format!("{:.3}", entries as f64 * ENTRY_BYTES as f64 / 1_048_576.0);
        let (all, percent) = (NUM_KV_HEADS * prompt_len, megabytes(saving[1]));
        assert_eq!((sizes[0], sizes[1], saving[0]), (&*mb(all), &*mb(total), &*mb(all - total)));
        assert!((percent - 100.0 * (all - total) as f64 / all as f64).abs() <= 0.000_500_1, "{percent}");
        layers.push((prompt_len, kept));
    }
    layers
}

#[test]
fn the_log_is_the_originals() {
    let lab = Lab::new();
    let prompt = "The quick brown fox jumps over the lazy dog. What, then, does the dog do? It sleeps!";
    let run = |adaptive: &str| {
        let mut command = lab.command(&["generate", "--model", MODEL, "--prompt", prompt, "-n", "1", "--report", "r"]);
        succeeds(&command.env("USE_ADAKV", adaptive).output().unwrap());
        lab.json("r")
    };
    let full = run("0");
    assert_eq!(lab.read("logs/test.log"), "");
    assert_eq!((&full["adaptive"], &full["config"]), (&Value::Bool(false), &Value::Null));
    assert_eq!(full["kv"]["raw_bytes"], full["kv"]["kept_bytes"]);

    let report = run("1");
    let log = parse_log(&lab.read("logs/test.log"));
    assert_eq!(log.len(), NUM_LAYERS);
    for ((prompt_len, kept), layer) in log.iter().zip(list(&report["layers"])) {
        assert_eq!(*prompt_len, list(&report["prompt_tokens"]).len());
        let reported: Vec<_> = list(&layer["heads"]).iter().map(|head| size(&head["kept"])).collect();
        assert_eq!(*kept, reported);
    }
    run("1");
    let twice = parse_log(&lab.read("logs/test.log"));
    assert_eq!((&twice[..NUM_LAYERS], &twice[NUM_LAYERS..]), (&log[..], &log[..]), "the log is appended to");
}

#[test]
fn the_report_is_whole_and_consistent() {
    let lab = Lab::new();
    lab.generate(&["--prompt", CAPITAL, "-n", "3", "--report", "new/r.json", "--report-positions", "--threads", "2"]);
    let report = lab.json("new/r.json");
    let files = std::fs::read_dir(lab.path("new")).unwrap().count();
    assert_eq!(files, 1, "temporary files are cleared away");

    let has = |value: &Value, keys: &str| {
        for key in keys.split_whitespace() {
            assert!(!value[key].is_null(), "`{key}` is missing in {value}");
        }
    };
    has(
        &report,
        "version model device attention threads threads_from prefill_chunk kv_dtype adaptive config prompt_tokens next_token_logprobs",
    );
    has(&report, "generated_tokens text finish_reason layers kv timings memory");
    let keys = "path format architecture num_layers num_heads num_kv_heads head_dim weights_bytes dtype";
    has(&report["model"], keys);
    let keys = "criterion recovery_threshold frequency_ratio locality_ratio policies gqa profile_rows sink_tokens decode \
                special_token_ids punctuation_list punctuation_token_ids";
    has(&report["config"], keys);
    has(&report["timings"], "load_ms prefill_ms profile_ms decode_ms prefill_tokens_per_s decode_tokens_per_s");
    for (_, value) in report["timings"].as_object().unwrap() {
        assert!(number(value) > 0.0);
    }
    assert!(whole(&report["memory"]["peak_rss_bytes"]) > 1 << 20);
    assert_eq!((&report["model"]["path"], &report["model"]["num_heads"]), (&MODEL.into(), &9.into()));
    assert_eq!((whole(&report["threads"]), &report["kv_dtype"], &report["device"]), (2, &"f16".into(), &"cpu".into()));

    let logprobs: Vec<_> = list(&report["next_token_logprobs"]).iter().map(|pair| number(&pair[1])).collect();
    assert!(logprobs.len() == 10 && logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] < 0.0);
    assert!(logprobs.iter().map(|p| p.exp()).sum::<f64>() <= 1.0 + 1e-6);
    assert_eq!(report["next_token_logprobs"][0][0], report["generated_tokens"][0]);
    assert_eq!(list(&report["generated_tokens"]).len(), 3);

    let prompt_len = list(&report["prompt_tokens"]).len() as u64;
    let saved = |sizes: &Value| 1.0 - number(&sizes["kept_bytes"]) / number(&sizes["raw_bytes"]);
    let (layers, kv) = (list(&report["layers"]), &report["kv"]);
    assert_eq!(layers.len(), NUM_LAYERS);
    for (idx, layer) in layers.iter().enumerate() {
        assert_eq!(whole(&layer["layer"]), idx as u64);
        let heads = list(&layer["heads"]);
        assert_eq!(heads.len(), NUM_KV_HEADS);
        for (idx, head) in heads.iter().enumerate() {
            let level = size(&head["level"]);
            let names = if level == 4 { &POLICIES[4..] } else { &POLICIES[..=level] };
            assert_eq!(head["policies"], serde_json::json!(names));
            assert_eq!((whole(&head["kv_head"]), whole(&head["prompt_len"])), (idx as u64, prompt_len));
            let recovered: Vec<_> = list(&head["recovered"]).iter().map(number).collect();
            assert_eq!(recovered.len(), level + 1);
            // The original's criterion: the largest difference must be below 1 - T.
            assert!(recovered[..level].iter().all(|&value| value >= 0.05) && recovered[level] < 0.05);
            let positions: Vec<_> = list(&head["positions"]).iter().map(whole).collect();
            assert!(positions.is_sorted_by(|a, b| a < b) && positions.iter().all(|&at| at < prompt_len));
            assert_eq!(positions.len() as u64, whole(&head["kept"]));
        }
        let kept: u64 = heads.iter().map(|head| whole(&head["kept"])).sum();
        assert_eq!(whole(&layer["kept_bytes"]), kept * ENTRY_BYTES);
        assert_eq!(whole(&layer["raw_bytes"]), NUM_KV_HEADS as u64 * prompt_len * ENTRY_BYTES);
        assert!((saved(layer) - number(&layer["saved_ratio"])).abs() < 1e-9);
    }
    for key in ["raw_bytes", "kept_bytes", "allocated_bytes"] {
        assert_eq!(whole(&kv[key]), layers.iter().map(|layer| whole(&layer[key])).sum::<u64>(), "{key}");
    }
    assert!((saved(kv) - number(&kv["saved_ratio"])).abs() < 1e-9 && saved(kv) > 0.0);
    let (kept, allocated) = (number(&kv["kept_bytes"]), number(&kv["allocated_bytes"]));
    assert!((kept..=1.05 * kept).contains(&allocated), "{allocated} bytes for {kept}");
}

#[test]
fn a_configuration_comes_from_a_variable() {
    let lab = Lab::new();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/fastgen.json");
    let mut command = lab.command(&["generate", "--model", MODEL, "-n", "1", "--report", "r.json"]);
    succeeds(&command.env("CONFIG", config).output().unwrap());
    let used = &lab.json("r.json")["config"];
    assert_eq!((&used["criterion"], number(&used["frequency_ratio"])), (&"mass".into(), 0.3));
}

#[test]
fn a_method_keeps_its_share_and_is_named_in_log_and_report() {
    let lab = Lab::new();
    lab.write("c.json", r#"{"method": "snapkv", "kept_ratio": 0.9, "observation_window": 2}"#);
    let args = ["--prompt", CAPITAL, "-n", "1", "--config", "c.json", "--kept-ratio", "0.5", "--report", "r.json"];
    lab.generate(&args);
    let report = lab.json("r.json");
    let expected = serde_json::json!({
        "method": "snapkv", "kept_ratio": 0.5, "observation_window": 2, "pool_kernel": 5, "decode": "append",
        "budget_over": "own", "refit": false
    });
    assert_eq!(report["config"], expected);
    let prompt_len = list(&report["prompt_tokens"]).len();
    for head in list(&report["layers"]).iter().flat_map(|layer| list(&layer["heads"])) {
        assert_eq!((&head["level"], &head["policies"]), (&0.into(), &serde_json::json!(["snapkv"])));
        assert_eq!((size(&head["kept"]), list(&head["recovered"]).len()), (prompt_len / 2, 0));
    }
    let line = format!("layer_id:29(heads:2)->['snapkv']-> kv cache len:{prompt_len}->{}", prompt_len / 2);
    assert!(lab.read("logs/test.log").contains(&line), "{line}");
}

#[test]
fn pictures_are_written() {
    let lab = Lab::new();
    let mut command = lab.command(&["generate", "--model", MODEL, "--prompt", CAPITAL, "-n", "1"]);
    succeeds(&command.env("SAVE_IMAGE", "1").output().unwrap());
    let mut expected: Vec<_> = (0..NUM_LAYERS).map(|layer| format!("layer{layer}_attention.png")).collect();
    expected.extend(["kv_memory.png".to_owned(), "policies.png".to_owned()]);
    for name in &expected {
        let bytes = std::fs::read(lab.path("images").join(name)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.ends_with(b"IEND\xaeB`\x82"), "{name}");
        let side = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        assert!(side(16) >= 200 && side(20) >= 100, "{name}: {} x {}", side(16), side(20));
    }
    assert_eq!(std::fs::read_dir(lab.path("images")).unwrap().count(), expected.len(), "and nothing else");
}

#[test]
fn compare_shows_both_answers_and_all_figures() {
    let lab = Lab::new();
    let args = ["--prompt", CAPITAL, "-n", "6"];
    let text = succeeds(&lab.run(&[&["compare", "--model", MODEL], &args[..]].concat()));
    for (name, adaptive) in [("full cache", "0"), ("adaptive cache", "1")] {
        let answer = lab.generate(&[&args[..], &["--use-adakv", adaptive]].concat());
        assert!(text.contains(&format!("--- {name} ---\n{}\n", answer.trim_end())), "{answer:?} in:\n{text}");
    }
    let figures = |name: &str| -> Vec<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.split_whitespace().map(|figure| figure.parse().unwrap()).collect()
    };
    let kept = figures("KV cache kept, MB");
    assert!(kept[0] == 0.11 && kept[1] < kept[0] && kept[2] < 1.0, "{kept:?}");
    for name in ["KV cache allocated, MB", "prefill, tokens/s", "decode, tokens/s"] {
        let found = figures(name);
        assert!(found.len() == 3 && found.iter().all(|&figure| figure > 0.0), "{name}: {found:?}");
    }
    // So short a prompt may fit into memory that the process has already.
    assert!(text.contains("process grew by, MB"), "{text}");
    for part in ["equal tokens before the first difference: ", " of 6 (", "mean KL ", " nats, top-1 agreement "] {
        assert!(text.contains(part), "expected `{part}` in:\n{text}");
    }
}

/// The full cache may have numbers of its own: what a quantised cache costs is then seen apart from what eviction does.
#[test]
fn compare_sets_a_quantised_cache_against_the_full_one() {
    let lab = Lab::new();
    lab.write("keep-all.json", r#"{"criterion": "mass", "policies": ["full"]}"#);
    let args = ["compare", "--model", MODEL, "--prompt", CAPITAL, "-n", "6", "--config", "keep-all.json"];
    let compare_with = |options: &[&str]| {
        let text = succeeds(&lab.run(&[&args[..], options, &["--full-kv-dtype", "f16"]].concat()));
        let kept = text.lines().find_map(|line| line.strip_prefix("KV cache kept, MB")).unwrap();
        let kl = text.split("mean KL ").nth(1).unwrap().split(' ').next().unwrap().parse::<f64>().unwrap();
        (kept.split_whitespace().last().unwrap().parse::<f64>().unwrap(), kl)
    };
    let compare = |kv_dtype: &str| compare_with(&["--kv-dtype", kv_dtype]);
    assert_eq!(compare("f16"), (1.0, 0.0));
    let (kept, kl) = compare("q8_0");
    assert!(kept == 0.531 && kl > 0.0 && kl < 0.01, "{kept}, {kl}");
    let (kept, kl_of_4_bits) = compare("q4_0");
    assert!(kept == 0.281 && kl_of_4_bits > kl, "{kept}, {kl_of_4_bits}");
    // Keys and values in numbers of their own, which have one name together.
    let (kept, kl_of_both) = compare("q8_0/q4_0");
    assert!(kept == 0.406 && kl_of_both > kl && kl_of_both < kl_of_4_bits, "{kept}, {kl_of_both}");
    assert_eq!(compare_with(&["--kv-dtype", "q8_0", "--v-dtype", "q4_0"]), (kept, kl_of_both));
    assert_eq!(compare_with(&["--k-dtype", "q8_0", "--v-dtype", "q4_0"]), (kept, kl_of_both));
    assert_eq!(compare_with(&["--kv-dtype", "q4_0", "--k-dtype", "f16"]).0, 0.641);
    let refusal = lab.refuses(&[&args[..], &["--kv-dtype", "q4_0", "--v-dtype", "f16"]].concat());
    refusal.status(1).names("keys in q4_0 and values in f16").hints("q8_0/q4_0").is_short();
}

#[test]
fn inspect_shows_what_is_known_of_the_model() {
    let text = succeeds(&Lab::new().run(&["inspect", "--model", MODEL]));
    for (name, value) in [
        ("architecture", "llama"),
        ("parameters", "134515008 (134.5 M)"),
        ("layers", "30"),
        ("hidden size", "576"),
        ("MLP size", "1536"),
        ("query heads", "9"),
        ("KV heads", "3 (3 query heads each)"),
        ("head dimension", "64"),
        ("context", "8192"),
        ("output layer", "tied to the embedding"),
        ("  a token", "23040      46080      12240       9360       6480 bytes"),
        ("  8192 tokens", "180.0      360.0       95.6       73.1       50.6 MB"),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        assert_eq!(line.map(str::trim), Some(value), "{name} in:\n{text}");
    }
}

#[test]
fn help_names_the_variables() {
    let lab = Lab::new();
    let help = succeeds(&lab.run(&["generate", "--help"])).split_whitespace().collect::<Vec<_>>().join(" ");
    for name in VARIABLES.into_iter().filter(|&name| name != "RUST_LOG") {
        assert!(help.contains(&format!("[env: {name}")), "{name} in:\n{help}");
    }
    let help = succeeds(&lab.run(&["--help"]));
    assert!(help.contains("RUST_LOG="), "{help}");
    for name in POLICIES {
        assert!(help.contains(name), "{name} in:\n{help}");
    }
}

#[test]
fn a_broken_pipe_is_success() {
    let lab = Lab::new();
    let long = ["--prompt", CAPITAL, "-n", "4000", "--ignore-eos", "--report", "r.json"];
    let mut child = lab.command(&[&["generate", "--model", MODEL], &long[..]].concat()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap(); // and closes it
    succeeds(&child.wait_with_output().unwrap());
    assert!(list(&lab.json("r.json")["generated_tokens"]).len() < 4000);
    for command in ["inspect", "compare"] {
        let mut child = lab.command(&[command, "--model", MODEL]).env("MAX_NEW_TOKENS", "1").spawn().unwrap();
        drop(child.stdout.take());
        succeeds(&child.wait_with_output().unwrap());
    }
}

#[cfg(unix)]
fn interrupt(id: u32) {
    assert!(Command::new("kill").args(["-INT", &id.to_string()]).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_generation_in_order() {
    let lab = Lab::new();
    let long = ["--prompt", CAPITAL, "-n", "4000", "--ignore-eos", "--report", "r.json", "--log-file", "l"];
    let mut child = lab.command(&[&["generate", "--model", MODEL], &long[..]].concat()).spawn().unwrap();
    let mut start = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
    interrupt(child.id());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("error:") && stderr.contains("KV cache"), "{stderr}");
    let report = lab.json("r.json");
    assert_eq!(report["finish_reason"], "interrupted");
    let text = [&start[..], &output.stdout].concat();
    assert_eq!(report["text"].as_str().unwrap().trim_end(), String::from_utf8(text).unwrap().trim_end());
    assert_eq!(parse_log(&lab.read("l")).len(), NUM_LAYERS);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_a_long_prefill_soon() {
    let lab = Lab::new();
    lab.write("long.txt", " word".repeat(8000));
    for command in ["generate", "compare"] {
        let child = lab.command(&[command, "--model", MODEL, "--prompt-file", "long.txt"]).spawn().unwrap();
        computes_for(&child, Duration::from_secs(2)); // loaded, and far from the prompt's end
        let output = ends_soon_by(child, "-INT", command);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{command}: {stderr}");
        assert!(!stderr.contains("panicked") && output.stdout.is_empty(), "{command}: {stderr}");
    }
}

/// Waiting for a prompt is ended by the first Ctrl-C too.
#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_the_wait_for_a_prompt() {
    let lab = Lab::new();
    let mut command = lab.command(&["generate", "--model", MODEL, "--prompt-file", "-"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    // Open as long as it waits.
    let _input = child.stdin.take();
    reads_input(&child);
    send(&child, "-INT");
    assert_eq!(output_of(child, "waiting for a prompt").status.code(), Some(130));
}
