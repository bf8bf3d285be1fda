//! `eval`: rows and their files, and what is refused.

use std::io::{BufRead, BufReader};

use serde_json::{Value, json};

#[cfg(target_os = "linux")]
use super::process::{send, until};
use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, MODEL, Refusal, succeeds};

/// Keys of every fidelity row, in this order.
const FIDELITY_KEYS: [&str; 31] = [
    "config",
    "kept_ratio",
    "kv_bytes",
    "kl_mean",
    "kl_median",
    "kl_p99",
    "top1_agreement",
    "perplexity",
    "perplexity_full",
    "kv_dtype",
    "full_kv_dtype",
    "budget",
    "windows",
    "prompt_tokens",
    "kl_std_error",
    "kl_by_window",
    "kept_ratio_by_window",
    "kv_bytes_by_window",
    "perplexity_by_position",
    "perplexity_full_by_position",
    "equal_tokens",
    "greedy_tokens",
    "attention_error_by_layer",
    "end_kept_ratio",
    "end_kv_bytes",
    "evicted_rows",
    "kl_worst",
    "text",
    "writing_kl_mean",
    "writing_top1_agreement",
    "writing",
];
const TASK_KEYS: [&str; 11] = [
    "task",
    "config",
    "context",
    "depth",
    "accuracy",
    "accuracy_full",
    "trials",
    "kv_dtype",
    "budget",
    "kept_ratio",
    "kv_bytes",
];

/// Bytes of one position's keys and values in the tiny model, f16: one layer, 16 numbers each.
const POSITION_BYTES: f64 = 2.0 * 16.0 * 2.0;

/// A folder with the tiny model, whose context is 64 tokens, and a text of 80 tokens.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab.write("text.txt", "ab ac b a".repeat(16));
    lab.write("mass.json", r#"{"criterion": "mass", "t": 0.6, "frequency_ratio": 0.3, "locality_ratio": 0.3}"#);
    lab
}

const BASE: [&str; 7] = ["eval", "--model", "tiny.gguf", "--text", "text.txt", "--threads", "1"];
/// Windows of 20 + 8 tokens.
const SMALL: [&str; 6] = ["--prompt-tokens", "20", "--score-tokens", "8", "--greedy-tokens", "5"];

fn eval(lab: &Lab, args: &[&str]) -> String {
    succeeds(&lab.run(&[&BASE[..], &SMALL, args].concat()))
}

fn refuses(lab: &Lab, args: &[&str]) -> Refusal {
    lab.refuses(&[&BASE[..], &SMALL, args].concat())
}

fn keys(row: &Value) -> Vec<&String> {
    row.as_object().unwrap().keys().collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn every_configuration_has_a_row_and_the_full_cache_loses_nothing() {
    let lab = lab();
    lab.write("e.json", "what an earlier run left");
    let lists = ["--configs", "full,mass.json", "--kv-dtype", "f16,f32", "--windows", "2", "--layer-error"];
    let files = ["--json", "e.json", "--csv", "e.csv", "--plot", "e.png"];
    let table = eval(&lab, &[&lists[..], &files].concat());
    let json = lab.json("e.json");
    let rows = json.as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| (row["config"].as_str(), row["kv_dtype"].as_str())).collect();
    let expected = [("full", "f16"), ("mass.json", "f16"), ("full", "f32"), ("mass.json", "f32")];
    assert_eq!(names, expected.map(|(config, kv_dtype)| (Some(config), Some(kv_dtype))));

    for row in rows {
        assert_eq!(keys(row), FIDELITY_KEYS);
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
        assert_eq!((number("windows"), number("prompt_tokens"), number("greedy_tokens")), (2.0, 20.0, 5.0));
        let scale = if row["kv_dtype"] == "f16" { 1.0 } else { 2.0 };
        let full = 20.0 * POSITION_BYTES * scale;
        assert!((number("kv_bytes") / full - number("kept_ratio")).abs() < 1e-3, "{row}");
        assert!((0.0..=1.0).contains(&number("top1_agreement")) && number("equal_tokens") >= 1.0, "{row}");
        assert!(number("kl_median") <= number("kl_p99"), "{row}");
        let kl = numbers(&row["kl_by_window"]);
        assert!((f64::midpoint(kl[0], kl[1]) - number("kl_mean")).abs() < 1e-12, "{row}");
        assert!(((kl[0] - kl[1]).abs() / 2.0 - number("kl_std_error")).abs() < 1e-12, "{row}");
        assert_eq!((row["perplexity_by_position"].as_array().unwrap().len(), &row["budget"]), (1, &Value::Null));
        assert!((numbers(&row["perplexity_by_position"])[0] - number("perplexity")).abs() < 1e-9, "{row}");
        assert!((numbers(&row["perplexity_full_by_position"])[0] - number("perplexity_full")).abs() < 1e-9, "{row}");
        assert_eq!(numbers(&row["attention_error_by_layer"]).len(), 1);
    }
    let full = &rows[0];
    for key in ["kl_mean", "kl_median", "kl_p99", "kl_std_error"] {
        assert_eq!(full[key], 0.0, "{key}");
    }
    assert_eq!(
        (&full["top1_agreement"], &full["equal_tokens"], &full["kept_ratio"]),
        (&1.0.into(), &5.0.into(), &1.0.into())
    );
    assert_eq!((&full["perplexity"], &full["attention_error_by_layer"][0]), (&full["perplexity_full"], &0.0.into()));
    let adaptive = &rows[1];
    for key in ["kl_mean", "kl_p99"] {
        assert!(adaptive[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(adaptive["kept_ratio"].as_f64().unwrap() < 1.0);
    assert!(adaptive["attention_error_by_layer"][0].as_f64().unwrap() > 0.0);

    assert_eq!(table.lines().count(), 5, "{table}");
    let csv = lab.read("e.csv");
    assert_eq!(csv.lines().next().unwrap(), FIDELITY_KEYS.join(","));
    assert_eq!(csv.lines().count(), 5);
    assert!(csv.lines().nth(1).unwrap().starts_with("full,1.0,1280,0.0,"), "{csv}");
    assert!(std::fs::metadata(lab.path("e.png")).unwrap().len() > 1000);
    let left: Vec<_> = std::fs::read_dir(lab.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 6, "{left:?}");
}

#[test]
fn windows_follow_one_another() {
    let lab = lab();
    let by_window = |args: &[&str]| {
        let args = [args, &["--configs", "mass.json", "--json", "e.json", "--greedy-tokens", "0"]].concat();
        eval(&lab, &args);
        let row = lab.json("e.json")[0].clone();
        assert_eq!((&row["equal_tokens"], &row["attention_error_by_layer"]), (&Value::Null, &Value::Null));
        numbers(&row["kl_by_window"])
    };
    let both = by_window(&["--windows", "2", "--offset-tokens", "3"]);
    assert_eq!(both, [by_window(&["--offset-tokens", "3"]), by_window(&["--offset-tokens", "31"])].concat());
}

#[test]
fn the_default_configurations_are_built_in() {
    let lab = lab();
    let table = eval(&lab, &["--score-tokens", "2"]);
    let names: Vec<_> = table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["full", "fastgen"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let lab = lab();
    refuses(&lab, &["--configs", "full,none.json"]).status(1).names("`none.json`").hints("fastgen").is_short();
    lab.write("bad.json", r#"{"t": 2}"#);
    refuses(&lab, &["--configs", "bad.json"]).status(2).names("`bad.json`").names("`t`");
    lab.write("short.txt", "ab ab c");
    refuses(&lab, &["--text", "short.txt"]).status(2).names("4 tokens").names("20 + 8").names("28").hints("--text");
    refuses(&lab, &["--windows", "9"]).status(2).names("9 x (20 + 8)").names("252").hints("--windows").is_short();
    refuses(&lab, &["--offset-tokens", "900"]).status(2).names("900").names("928");
    refuses(&lab, &["--prompt-tokens", "60"]).status(2).names("60").names("64").hints("--prompt-tokens").is_short();
    refuses(&lab, &["--writing-tokens", "50"])
        .status(2)
        .names("20 tokens and 50 more")
        .hints("--writing-tokens")
        .is_short();
    refuses(&lab, &["--score-tokens", "1"]).status(2).names("20 + 1").hints("2").is_short();
    refuses(&lab, &["--windows", "0"]).status(2).hints("--tasks").is_short();
    refuses(&lab, &["--tasks", "passkey,pass"]).status(2).names("`pass`").hints("`multi-turn`").is_short();
    refuses(&lab, &["--tasks", "passkey"]).status(2).names("64").hints("--contexts").is_short();
    let many = ["--tasks", "multi-question", "--depths", "0.1,0.2,0.3,0.4,0.5,0.6,0.7"];
    refuses(&lab, &many).status(2).names("7 depths").hints("--depths").is_short();
    for budget in [["--kept-ratio", "0.5"], ["--kv-budget", "64MB"]] {
        refuses(&lab, &[&["--configs", "full,fastgen"], &budget[..]].concat()).status(2).names("budget").is_short();
    }
    for (option, value) in [
        ("--kept-ratio", "-0.1"),
        ("--kept-ratio", "1.1"),
        ("--kept-ratio", "x"),
        ("--kv-budget", "64XB"),
        ("--prompt-tokens", "0"),
        ("--windows", "-1"),
        ("--depths", "0.5,1.5"),
        ("--contexts", "0"),
        ("--trials", "0"),
        ("--writing-tokens", "x"),
        ("--writing-temperature", "-1"),
        ("--kv-dtype", "f16,f7"),
    ] {
        refuses(&lab, &[option, value]).status(2).names(option);
    }
    refuses(&lab, &["--text", "none.txt"]).status(1).names("`none.txt`").is_short();
    lab.write("empty.txt", "");
    refuses(&lab, &["--text", "empty.txt"]).status(2).names("0 tokens").hints("--text").is_short();
    for option in ["--json", "--csv", "--plot"] {
        refuses(&lab, &[option, "text.txt/a"]).status(1).names("`text.txt`").is_short();
    }
}

/// A search keeps what it needs, whatever the budget: it is measured once.
#[test]
fn configurations_with_a_budget_are_measured_under_each() {
    let lab = lab();
    lab.write("replay.json", r#"{"method": "replay"}"#);
    lab.write("window.json", r#"{"method": "streaming_llm"}"#);
    let budgets = ["--kept-ratio", "0.5,0.25", "--kv-budget", "350B", "--json", "e.json"];
    eval(&lab, &[&["--configs", "replay.json,mass.json,window.json"], &budgets[..]].concat());
    let rows = lab.json("e.json");
    let rows: Vec<_> = rows.as_array().unwrap().iter().map(|row| (&row["config"], &row["budget"], row)).collect();
    let budgets = [json!({"kept_ratio": 0.5}), json!({"kept_ratio": 0.25}), json!({"bytes": 350})];
    assert_eq!(rows.len(), 7);
    for (index, positions) in [10.0, 5.0, 5.0].into_iter().enumerate() {
        for (config, row) in [("replay.json", &rows[index]), ("window.json", &rows[4 + index])] {
            assert_eq!((row.0, row.1), (&json!(config), &budgets[index]));
            assert_eq!(row.2["kv_bytes"].as_f64(), Some(positions * POSITION_BYTES), "{}", row.2);
        }
    }
    assert_eq!((rows[3].0, rows[3].1), (&json!("mass.json"), &Value::Null));
}

/// As if their files said so, whatever those say.
#[test]
fn budgets_are_shared_out_in_every_way_that_is_asked_for() {
    let lab = lab();
    // The tiny model has one head, which competes with none.
    let eval = |lab: &Lab, args: &[&str]| {
        let sizes = ["--prompt-tokens", "64", "--score-tokens", "4", "--windows", "1", "--greedy-tokens", "0"];
        succeeds(&lab.run(&[&["eval", "--model", MODEL], &sizes[..], args].concat()))
    };
    lab.write("snapkv.json", r#"{"method": "snapkv", "observation_window": 8, "budget_over": "layer"}"#);
    lab.write("head.json", r#"{"method": "snapkv", "observation_window": 8, "budget_over": "head"}"#);
    lab.write("pool.json", r#"{"method": "snapkv", "observation_window": 8, "budget_over": "pool"}"#);
    let overs = ["--configs", "snapkv.json,mass.json", "--budget-over", "head,pool,head", "--plot", "e.png"];
    let table = eval(&lab, &[&overs[..], &["--kept-ratio", "0.25", "--json", "e.json"]].concat());
    assert!(table.contains(" 25% head ") && table.contains(" 25% pool "), "{table}");
    let rows = lab.json("e.json");
    eval(&lab, &["--configs", "head.json,pool.json,mass.json", "--kept-ratio", "0.25", "--json", "files.json"]);
    let files = lab.json("files.json");
    assert_eq!(rows.as_array().unwrap().len(), 3, "{rows}");
    for (index, over) in [json!("head"), json!("pool")].iter().enumerate() {
        let (row, file) = (&rows[index], &files[index]);
        assert_eq!((&row["config"], &row["kl_by_window"]), (&json!("snapkv.json"), &file["kl_by_window"]));
        assert_eq!(row["budget"], json!({"kept_ratio": 0.25, "budget_over": over}));
        assert_eq!(file["budget"], json!({"kept_ratio": 0.25}));
    }
    assert_ne!(rows[0]["kl_mean"], rows[1]["kl_mean"]);
    assert_eq!((&rows[2]["config"], &rows[2]["budget"]), (&json!("mass.json"), &Value::Null));
    // The file's own budget is told with it.
    eval(&lab, &["--configs", "snapkv.json", "--budget-over", "pool", "--json", "e.json"]);
    assert_eq!(lab.json("e.json")[0]["budget"], json!({"kept_ratio": 0.5, "budget_over": "pool"}));

    lab.write("duo.json", r#"{"method": "duo_attention"}"#);
    let refused = ["--configs", "duo.json", "--budget-over", "head"];
    refuses(&lab, &refused).status(2).names("`duo_attention`").names("`budget_over`").is_short();
    refuses(&lab, &["--configs", "mass.json", "--budget-over", "head"]).status(2).hints("--budget-over").is_short();
    refuses(&lab, &["--budget-over", "model"]).status(2).names("--budget-over");
}

/// The tiny model knows no messages, and its tokens no digits: nothing is found, and nothing fails.
#[test]
fn a_model_without_a_chat_template_is_asked_in_plain_text() {
    let lab = lab();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(1000));
    lab.write("tiny.gguf", file.bytes());
    let tasks = ["--windows", "0", "--contexts", "600", "--trials", "1", "--configs", "mass.json", "--json", "e.json"];
    eval(&lab, &[&tasks[..], &["--tasks", "passkey"]].concat());
    assert_eq!(lab.json("e.json").as_array().unwrap().len(), 3);
    refuses(&lab, &[&tasks[..], &["--tasks", "multi-turn"]].concat()).status(2).names("`multi-turn`").hints("--tasks");
    let small = [&tasks[..], &["--tasks", "passkey", "--contexts", "5"]].concat();
    let output = lab.run(&[&BASE[..], &small].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("a context of 5 tokens has no room"));
}

/// Short texts, which the full cache knows by heart.
#[test]
fn facts_are_found_and_rows_are_the_same_every_time() {
    let lab = Lab::new();
    let args = ["--windows", "1", "--prompt-tokens", "64", "--score-tokens", "8", "--greedy-tokens", "0"];
    let texts = ["--contexts", "256", "--depths", "0.2,0.8", "--trials", "1", "--configs", "full,fastgen"];
    let run = |tasks: &str, json: &str| {
        let files = ["--tasks", tasks, "--json", json, "--csv", "e.csv", "--plot", "e.png"];
        succeeds(&lab.run(&[&["eval", "--model", MODEL], &args[..], &texts, &files].concat()));
        lab.json(json)
    };
    let again = run("passkey", "again.json");
    let json = run("passkey,multi-question,multi-turn", "e.json");
    let rows = json.as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| {
            format!("{} {} {}", row["task"].as_str().unwrap_or("-"), row["depth"], row["config"].as_str().unwrap())
        })
        .collect();
    let mut expected = vec!["- null full".to_owned(), "- null fastgen".to_owned()];
    for task in ["passkey", "multi-question", "multi-turn"] {
        for depth in [0.2, 0.8] {
            expected.extend(["full", "fastgen"].map(|config| format!("{task} {depth} {config}")));
        }
    }
    assert_eq!(names, expected);
    for row in &rows[2..] {
        assert_eq!(keys(row), TASK_KEYS);
        assert_eq!((&row["context"], &row["trials"], &row["budget"]), (&256.into(), &1.into(), &Value::Null));
        if row["config"] == "full" {
            assert_eq!((&row["accuracy"], &row["kept_ratio"]), (&row["accuracy_full"], &1.0.into()));
        } else {
            assert!(row["kept_ratio"].as_f64().unwrap() < 1.0, "{row}");
        }
        assert!(row["task"] != "passkey" || row["accuracy_full"] == 1.0, "{row}");
    }
    let columns: Vec<&str> =
        [&FIDELITY_KEYS[..], &["task", "context", "depth", "accuracy", "accuracy_full", "trials"]].concat();
    assert_eq!(lab.read("e.csv").lines().next().unwrap(), columns.join(","));
    assert!(std::fs::metadata(lab.path("e.png")).unwrap().len() > 1000);
    assert_eq!(rows[..6], again.as_array().unwrap()[..]);
}

const ANSWER_KEYS: [&str; 18] = [
    "prompt_idx",
    "prompt",
    "prompt_tokens",
    "config",
    "kv_dtype",
    "budget",
    "kept_ratio",
    "saved_ratio",
    "raw_bytes",
    "kv_bytes",
    "saved_bytes",
    "equal_tokens",
    "full_tokens",
    "answer_tokens",
    "finish_reason",
    "answer",
    "end_kv_bytes",
    "evicted_rows",
];

/// Each cache answers as `generate` does with the same configuration, and keeps as much.
#[test]
fn prompts_are_answered_side_by_side_as_generate_answers_them() {
    let lab = Lab::new();
    let original = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/original_0.4.json");
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/config.json");
    lab.write("p.txt", "Why does the sea look blue from far away? It looks blue\n\n\"One, two,\\nthree,\"\n");
    let configs = format!("{config},full,{original}");
    let files = ["--json", "e.json", "--csv", "e.csv", "--plot", "e.png"];
    let ask = ["--windows", "0", "--prompts", "p.txt", "--answer-tokens", "8", "--configs", &configs];
    let text = succeeds(&lab.run(&[&["eval", "--model", MODEL], &ask[..], &files].concat()));
    let json = lab.json("e.json");
    let rows = json.as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for (row, (prompt_idx, setting)) in
        rows.iter().zip([(0, config), (0, "full"), (0, original), (1, config), (1, "full"), (1, original)])
    {
        assert_eq!(keys(row), ANSWER_KEYS);
        assert_eq!((&row["prompt_idx"], &row["config"]), (&json!(prompt_idx), &json!(setting)));
        let prompt = row["prompt"].as_str().unwrap();
        let adaptive = if setting == "full" { ["--use-adakv", "0"] } else { ["--config", setting] };
        lab.generate(&[&["--prompt", prompt, "-n", "8", "--report", "r.json"], &adaptive[..]].concat());
        let alone = lab.json("r.json");
        assert_eq!((&row["answer"], &row["finish_reason"]), (&alone["text"], &alone["finish_reason"]));
        assert_eq!(row["prompt_tokens"], alone["prompt_tokens"].as_array().unwrap().len());
        assert_eq!(row["answer_tokens"], alone["generated_tokens"].as_array().unwrap().len());
        let kv = &alone["kv"];
        assert_eq!((&row["raw_bytes"], &row["kv_bytes"]), (&kv["raw_bytes"], &kv["kept_bytes"]));
        assert_eq!(row["saved_ratio"], kv["saved_ratio"]);
        let saved = kv["raw_bytes"].as_u64().unwrap() - kv["kept_bytes"].as_u64().unwrap();
        assert_eq!((&row["saved_bytes"], saved > 0), (&json!(saved), setting != "full"), "{row}");
        let full = &rows[prompt_idx * 3 + 1];
        assert_eq!(row["full_tokens"], full["answer_tokens"]);
        let is_same = row["answer"] == full["answer"];
        assert_eq!(row["equal_tokens"] == row["full_tokens"], is_same, "{row}");
        assert!(text.contains(row["answer"].as_str().unwrap().trim().lines().next().unwrap()), "{text}");
    }
    assert!(text.starts_with("prompt 1, 13 tokens: Why does the sea"), "{text}");
    assert!(text.contains("\n\nprompt 2, ") && text.contains("One, two,\\nthree,\n"), "{text}");
    let summary: Vec<_> = text.lines().rev().take(3).collect();
    assert!(summary[0].starts_with("original_0.4 ") && summary[2].starts_with("config "), "{text}");
    let mean = |setting: &str| {
        let saved = rows.iter().filter(|row| row["config"] == setting).map(|row| row["saved_ratio"].as_f64().unwrap());
        format!("{:.2}", 50.0 * saved.sum::<f64>())
    };
    assert_eq!(summary[0].split_whitespace().nth(6), Some(mean(original).as_str()), "{text}");
    assert_eq!(lab.read("e.csv").lines().next().unwrap(), ANSWER_KEYS.join(","));
    assert!(std::fs::metadata(lab.path("e.png")).unwrap().len() > 1000);

    // In the model's chat template, the prompt is longer.
    succeeds(&lab.run(&[&["eval", "--model", MODEL], &ask[..], &["--chat", "--json", "c.json"]].concat()));
    assert!(lab.json("c.json")[0]["prompt_tokens"].as_u64() > rows[0]["prompt_tokens"].as_u64());
}

#[test]
fn prompts_that_cannot_be_answered_are_refused() {
    let lab = lab();
    lab.write("p.txt", "ab\n{\"prompt\": 3}\n");
    let with = |more: &[&str]| refuses(&lab, &[&["--windows", "0", "--prompts", "p.txt"], more].concat());
    with(&[]).status(1).names("p.txt:2").hints("`messages`");
    lab.write("p.txt", "ab\nab ac b a\n");
    with(&["--chat"]).status(2).names("chat template").is_short();
    with(&["--answer-tokens", "60"]).status(2).names("p.txt:2").names("60").names("64").hints("--answer-tokens");
    with(&["--answer-tokens", "0"]).status(2).names("--answer-tokens");
    lab.write("p.txt", "\"\"\n");
    with(&[]).status(2).names("p.txt:1").names("empty").is_short();
    refuses(&lab, &["--prompts", "none.txt"]).status(1).names("`none.txt`").is_short();
    assert!(refuses(&lab, &["--chat"]).status(2).rest.contains("--prompts"));
}

/// More windows than anybody waits for.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_leaves_the_rows_that_are_there() {
    let lab = lab();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(100_000));
    lab.write("tiny.gguf", file.bytes());
    lab.write("long.txt", "ab ac b a".repeat(400_000));
    let base = BASE.map(|arg| if arg == "text.txt" { "long.txt" } else { arg });
    let windows = ["--windows", "60000", "--json", "e.json"];
    let mut child = lab.command(&[&base[..], &SMALL, &windows].concat()).spawn().unwrap();
    let has_rows = || {
        let text = std::fs::read_to_string(lab.path("e.json")).unwrap_or_default();
        serde_json::from_str::<Value>(&text).is_ok_and(|rows| rows.as_array().is_some_and(|rows| rows.len() == 2))
    };
    until("both rows are there", || {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        has_rows()
    });
    send(&child, "-INT");
    let table: Vec<String> = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let json = lab.json("e.json");
    assert!((1..60_000).contains(&json[0]["windows"].as_u64().unwrap()), "{json}");
    assert_eq!(table.len(), 3, "{table:?}");
}
