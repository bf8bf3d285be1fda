//! `tune`: what is chosen holds the limit, and the file that is written says the same to other commands.

use serde_json::{Value, json};

use super::tiny_gguf::TinyGguf;
use super::{Lab, MODEL, Refusal, succeeds};

const BASE: [&str; 7] = ["tune", "--model", "tiny.gguf", "--text", "text.txt", "--threads", "1"];
/// Windows of 20 + 8 tokens.
const WINDOWS: [&str; 6] = ["--prompt-tokens", "20", "--score-tokens", "8", "--windows", "2"];
/// Bytes of the tiny model's cache of a window's prompt, f16: one layer, 16 numbers of a key and 16 of a value.
const FULL_BYTES: u64 = 20 * 2 * 16 * 2;

/// A folder with the tiny model, whose context is 64 tokens and whose heads have 16 numbers, and a text of 80 tokens.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab.write("text.txt", "ab ac b a".repeat(16));
    lab.write("mass.json", r#"{"criterion": "mass", "t": 0.6, "frequency_ratio": 0.3, "locality_ratio": 0.3}"#);
    lab
}

fn tune(lab: &Lab, args: &[&str]) -> String {
    succeeds(&lab.run(&[&BASE[..], &WINDOWS, &["--kv-dtype", "f16"], args].concat()))
}

fn refuses(lab: &Lab, args: &[&str]) -> Refusal {
    lab.refuses(&[&BASE[..], &WINDOWS, args].concat())
}

/// What `eval` measures of a configuration file on the same windows.
fn evaluated(lab: &Lab, file: &str) -> Value {
    let args = ["--configs", file, "--greedy-tokens", "0", "--json", "e.json"];
    succeeds(&lab.run(&[&["eval"], &BASE[1..], &WINDOWS, &args].concat()));
    lab.json("e.json")[0].clone()
}

fn chosen(curve: &Value) -> &Value {
    let mut rows = curve["points"].as_array().unwrap().iter().filter(|row| row["chosen"] == true);
    let row = rows.next().unwrap_or_else(|| panic!("nothing chosen: {curve}"));
    assert!(rows.next().is_none() && row["within_limit"] == true, "{curve}");
    row
}

#[test]
fn the_file_that_is_written_measures_as_it_did_in_the_search() {
    let lab = lab();
    for (limit, configs) in [
        (["--max-kl", "0.0005"], "replay,mass.json"),
        (["--max-kl", "0.0005"], "mass.json"),
        (["--max-bytes", "800B"], "replay,mass.json"),
        (["--max-kept", "0.5"], "mass.json"),
        (["--max-kept", "0.5"], "replay"),
    ] {
        let files = ["--output", "c.json", "--json", "t.json", "--csv", "t.csv", "--plot", "t.png"];
        let table = tune(&lab, &[&limit[..], &["--configs", configs], &files].concat());
        let curve = lab.json("t.json");
        let row = chosen(&curve);
        let written = lab.json("c.json");
        assert_eq!(
            curve["chosen"],
            json!({
                "config": row["config"], "kv_dtype": "f16", "file": "c.json", "settings": written,
            })
        );
        if row["config"] == "replay" {
            assert_eq!((&written["method"], &written["kept_ratio"]), (&json!("replay"), &row["budget"]["kept_ratio"]));
        } else {
            assert_eq!((&written["method"], &written["criterion"]), (&json!("fastgen"), &json!("mass")));
            assert_eq!(written["recovery_threshold"], row["recovery_threshold"]);
        }
        let measured = evaluated(&lab, "c.json");
        for key in ["kept_ratio", "kv_bytes", "kl_mean", "kl_by_window", "kv_bytes_by_window", "kept_ratio_by_window"] {
            assert_eq!(measured[key], row[key], "{limit:?} {configs}: {key}");
        }
        let points = curve["points"].as_array().unwrap();
        match limit[0] {
            "--max-kl" => {
                assert!(row["kl_mean"].as_f64().unwrap() <= 0.0005, "{row}");
                let smaller = |point: &&Value| point["kv_bytes"].as_u64() < row["kv_bytes"].as_u64();
                assert!(points.iter().filter(smaller).all(|point| point["kl_mean"].as_f64().unwrap() > 0.0005));
            }
            "--max-bytes" => assert!(row["kv_bytes"].as_u64().unwrap() <= 800, "{row}"),
            _ => assert!(row["kept_ratio"].as_f64().unwrap() <= 0.5, "{row}"),
        }
        // Heading, points, a blank line, the choice, how to use it.
        assert_eq!(table.lines().count(), 1 + points.len() + 3, "{table}");
        assert!(table.ends_with("use it with: --config c.json --kv-dtype f16\n"), "{table}");
        assert_eq!(lab.read("t.csv").lines().count(), 1 + points.len());
        assert!(std::fs::metadata(lab.path("t.png")).unwrap().len() > 1000);
        // Other commands take the file, too.
        let prompt = ["--model", "tiny.gguf", "--prompt", "ab ac", "-n", "3", "--config", "c.json"];
        succeeds(&lab.run(&[&["generate"], &prompt[..]].concat()));
        succeeds(&lab.run(&[&["compare"], &prompt[..]].concat()));
    }
}

#[test]
fn a_budget_in_bytes_of_a_file_gives_way_to_a_share_and_the_rest_stays() {
    let lab = lab();
    lab.write("window.json", r#"{"method": "streaming_llm", "kv_budget": "1MB", "sink_tokens": 2, "decode": "evict"}"#);
    tune(&lab, &["--max-kept", "0.5", "--configs", "window.json"]);
    // Without a name, the file is called so.
    let written = lab.json("tuned.json");
    let expected = json!({
        "method": "streaming_llm", "kept_ratio": 0.5, "budget_over": "own", "sink_tokens": 2, "decode": "evict",
        "refit": false
    });
    assert_eq!(written, expected);
}

#[test]
fn everything_is_kept_where_the_limit_allows_it() {
    let lab = lab();
    let limit = format!("{FULL_BYTES}B");
    for config in ["full", "replay", "mass.json"] {
        tune(&lab, &["--max-bytes", &limit, "--configs", config, "--output", "c.json", "--json", "t.json"]);
        let curve = lab.json("t.json");
        assert_eq!(curve["points"].as_array().unwrap().len(), 1);
        let row = evaluated(&lab, "c.json");
        assert_eq!((&row["kept_ratio"], &row["kl_mean"]), (&json!(1.0), &json!(0.0)), "{config}");
    }
}

#[test]
fn the_worst_window_may_need_more() {
    let lab = lab();
    let bytes = |more: &[&str]| {
        let files = ["--max-kl", "0.0003", "--configs", "replay", "--output", "c.json", "--json", "t.json"];
        tune(&lab, &[&files[..], more].concat());
        let curve = lab.json("t.json");
        let row = chosen(&curve).clone();
        let worst = row["kl_by_window"].as_array().unwrap().iter().map(|kl| kl.as_f64().unwrap()).fold(0.0, f64::max);
        (row["kv_bytes"].as_u64().unwrap(), worst, curve["worst_window"].clone())
    };
    let (mean, worst) = (bytes(&[]), bytes(&["--worst"]));
    assert!(worst.1 <= 0.0003 && mean.0 <= worst.0, "{mean:?} {worst:?}");
    assert_eq!((mean.2, worst.2), (json!(false), json!(true)));
}

#[test]
fn a_file_that_nobody_named_is_not_replaced() {
    let lab = lab();
    lab.write("tuned.json", "mine");
    let limit = ["--max-kept", "0.5", "--configs", "replay"];
    refuses(&lab, &limit).status(2).names("`tuned.json`").hints("--output").is_short();
    assert_eq!(lab.read("tuned.json"), "mine");
    tune(&lab, &[&limit[..], &["-o", "tuned.json"]].concat());
    assert_eq!(lab.json("tuned.json")["method"], "replay");
    refuses(&lab, &[&limit[..], &["--output", "text.txt/a"]].concat()).status(1).names("`text.txt`");
}

/// At least one position of each head is kept; `q8_0` is not for heads of 16 numbers.
#[test]
fn what_cannot_be_had_is_said_with_what_is_closest() {
    let lab = lab();
    let impossible = ["--max-bytes", "10B", "--configs", "replay", "--kv-dtype", "f16", "--json", "t.json"];
    let output = lab.run(&[&BASE[..], &WINDOWS, &impossible].concat());
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8(output.stderr).unwrap();
    for part in
        ["nothing that was tried is within", "the closest is replay", "kept_ratio 0", "5.0 % kept", "--max-bytes"]
    {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    assert!(!lab.path("tuned.json").exists());
    // What was tried is there all the same.
    let curve = lab.json("t.json");
    assert!(curve["chosen"].is_null() && curve["points"].as_array().unwrap().len() > 5, "{curve}");

    let none = refuses(&lab, &[]);
    assert!(none.status(2).rest.contains("--max-kl"), "{}", none.rest);
    refuses(&lab, &["--max-kl", "0.1", "--max-bytes", "1MB"]).status(2).names("--max-bytes");
    for (option, value) in [
        ("--max-kl", "0"),
        ("--max-kl", "-1"),
        ("--max-kl", "nan"),
        ("--max-kl", "inf"),
        ("--max-kl", "x"),
        ("--max-kept", "0"),
        ("--max-kept", "1.1"),
        ("--max-bytes", "0"),
        ("--max-bytes", "3 apples"),
    ] {
        refuses(&lab, &[option, value]).status(2).names(option).names(value);
    }
    let limit = ["--max-kl", "0.1"];
    let with = |more: &[&str]| refuses(&lab, &[&limit[..], more].concat());
    with(&[]).status(1).names("q8_0").is_short();
    with(&["--kv-dtype", "f16", "--windows", "0"]).status(2).is_short();
    with(&["--kv-dtype", "f16", "--windows", "9"]).status(2).names("9 x (20 + 8)").hints("--windows").is_short();
    with(&["--configs", "none.json"]).status(1).names("`none.json`").hints("`replay`").is_short();
    with(&["--text", "none.txt"]).status(1).names("`none.txt`").is_short();
    for option in ["--json", "--csv", "--plot"] {
        with(&[option, "text.txt/a"]).status(1).names("`text.txt`").is_short();
    }
}

/// Heads of 64 numbers, which `q8_0` has blocks for: half the bytes, for hardly any divergence.
#[test]
fn smaller_numbers_are_chosen_where_they_cost_less_than_eviction() {
    let lab = Lab::new();
    let windows = ["--prompt-tokens", "96", "--score-tokens", "8", "--configs", "replay"];
    let limit = ["--max-bytes", "1.2MB", "--json", "t.json", "-o", "c.json"];
    let table = succeeds(&lab.run(&[&["tune", "--model", MODEL], &windows[..], &limit].concat()));
    let curve = lab.json("t.json");
    let row = chosen(&curve);
    assert_eq!((&row["kv_dtype"], &row["kept_ratio"]), (&json!("q8_0"), &json!(1.0)), "{table}");
    assert!(table.ends_with("use it with: --config c.json --kv-dtype q8_0\n"), "{table}");
    let points = curve["points"].as_array().unwrap();
    assert!(points.iter().any(|point| point["kv_dtype"] == "f16" && point["within_limit"] == true), "{curve}");
}

/// The tiny model has one KV head: what that costs alone is what the whole cache costs at the profile's budget, and a
/// factor of its own relative to itself changes nothing.
#[test]
fn a_profile_holds_what_each_head_costs_alone() {
    let lab = lab();
    lab.write("whole.json", r#"{"method": "replay", "kept_ratio": 0.0625}"#);
    let expected = evaluated(&lab, "whole.json");
    lab.write("p.json", "what an earlier run left");
    let profile = |args: &[&str]| succeeds(&lab.run(&[&BASE[..], &WINDOWS, &["--profile", "p.json"], args].concat()));
    let said = profile(&[]);
    assert!(said.contains("p.json") && said.contains("head_profile") && said.contains("layer 0, KV head 0"), "{said}");
    let written = lab.json("p.json");
    let sizes = ["num_layers", "num_kv_heads", "head_dim", "windows", "prompt_tokens", "score_tokens"];
    assert_eq!(sizes.map(|key| written[key].as_u64().unwrap()), [1, 1, 16, 2, 20, 8]);
    assert_eq!((&written["method"], written["heads"].as_array().unwrap().len()), (&json!("replay"), 1));
    let head = &written["heads"][0];
    assert_eq!((&head["layer"], &head["kv_head"]), (&json!(0), &json!(0)));
    // One of 20 positions.
    for (own, whole) in [("kl", "kl_mean"), ("kept_ratio", "kept_ratio")] {
        let (own, whole) = (head[own].as_f64().unwrap(), expected[whole].as_f64().unwrap());
        assert!(own > 0.0 && (own - whole).abs() < 1e-12, "{own} {whole}");
    }
    assert!(head["lost_score"].as_f64().unwrap() > 0.0, "{head}");

    std::fs::create_dir(lab.path("configs")).unwrap();
    lab.write("configs/prior.json", r#"{"method": "replay", "kept_ratio": 0.0625, "head_profile": "../p.json"}"#);
    assert_eq!(evaluated(&lab, "configs/prior.json")["kl_by_window"], expected["kl_by_window"]);
    // What the search writes names the profile wherever it lies.
    tune(&lab, &["--max-kept", "0.5", "--configs", "configs/prior.json", "--output", "c.json"]);
    assert!(lab.json("c.json")["head_profile"].as_str().unwrap().ends_with("p.json"));
    assert_eq!(lab.json("c.json")["head_profile_weight"], 0.5);
    evaluated(&lab, "c.json");
}

#[test]
fn profiles_that_do_not_fit_are_refused() {
    let lab = lab();
    succeeds(&lab.run(&[&BASE[..], &WINDOWS, &["--profile", "p.json"]].concat()));
    let uses = |config: &str| {
        lab.write("c.json", config);
        refuses(&lab, &["--max-kept", "0.5", "--configs", "c.json"])
    };
    let text = lab.read("p.json").replace("\"num_layers\": 1", "\"num_layers\": 2");
    lab.write("two.json", text);
    uses(r#"{"method": "replay", "head_profile": "two.json"}"#)
        .status(2)
        .names("two.json")
        .names("1 heads")
        .hints("tune");
    let mut other = lab.json("p.json");
    other["head_dim"] = json!(8);
    lab.write("other.json", other.to_string());
    let refusal = uses(r#"{"method": "replay", "head_profile": "other.json"}"#);
    refusal.status(2).names("other.json").names("of 8 numbers").names("of 16 numbers").hints("--profile");
    uses(r#"{"method": "replay", "head_profile": "none.json"}"#).status(2).names("`head_profile`").names("none.json");
    uses(r#"{"method": "replay", "head_profile": 7}"#).status(2).names("`head_profile`").names("`7`");
    uses(r#"{"method": "laprox", "head_profile": "p.json"}"#).status(2).names("`replay`").hints("--profile");
    let heads = r#"{"method": "replay", "head_profile": "p.json", "budget_over": "head"}"#;
    uses(heads).status(2).names("`head_profile`").hints("\"pool\"");
    uses(r#"{"method": "replay", "head_profile_weight": 0.5}"#).status(2).names("`head_profile_weight`");
    uses(r#"{"method": "replay", "head_profile": "p.json", "head_profile_weight": 2}"#).status(2).names("0..=1");

    let profile = |args: &[&str]| refuses(&lab, &[&["--profile", "q.json"], args].concat());
    profile(&["--configs", "replay,fastgen"]).status(2).names("names 2").is_short();
    profile(&["--configs", "fastgen"]).status(2).names("`fastgen`").hints("`replay`").is_short();
    lab.write("norm.json", r#"{"method": "key_norm"}"#);
    profile(&["--configs", "norm.json"]).status(2).names("`key_norm`").names("below 0").hints("`replay`").is_short();
    profile(&["--max-kl", "0.1"]).status(2).names("--profile");
    profile(&["--output", "o.json"]).status(2).names("--output");
    profile(&["--profile", "text.txt"]).status(2).names("text.txt");
    assert!(!lab.path("q.json").exists());
}
