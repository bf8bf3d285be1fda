//! `bench`: rows and their file, and what is refused.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use adaptive_kvcache::Result;
use adaptive_kvcache::bench::{Observer, Plan, Row, Setting, Subject, run};
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{WeightDtype, load};
use adaptive_kvcache::clock::Clock;
use adaptive_kvcache::model::PrefillOptions;
use serde_json::Value;

#[cfg(target_os = "linux")]
use super::process::{computes_for, output_of, send};
use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, succeeds};

/// Keys of every row, in this order; decoding has more of them.
const KEYS: [&str; 14] = [
    "work",
    "past",
    "context",
    "threads",
    "setting",
    "kv_dtype",
    "tokens_per_s",
    "median_ms",
    "min_ms",
    "max_ms",
    "runs",
    "kept_ratio",
    "kv_bytes",
    "peak_rss_bytes",
];
const DECODE_KEYS: [&str; 4] = ["bytes_per_token", "read_gb_per_s", "loop_gb_per_s", "bandwidth_share"];

/// Bytes of one position's keys and values in the tiny model, f16: one layer, 16 numbers each.
const POSITION_BYTES: u64 = 2 * 16 * 2;

/// A folder with the tiny model, whose context is 64 tokens, and a text of four tokens.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab.write("text.txt", "ab ab c");
    lab.write("mass.json", r#"{"criterion": "mass", "t": 0.6, "frequency_ratio": 0.3, "locality_ratio": 0.3}"#);
    lab
}

const BASE: [&str; 9] = ["bench", "--model", "tiny.gguf", "--prompt-file", "text.txt", "--runs", "2", "--threads", "1"];

fn bench(lab: &Lab, args: &[&str]) -> String {
    succeeds(&lab.run(&[&BASE[..], args].concat()))
}

fn refuses(lab: &Lab, args: &[&str]) -> Refusal {
    lab.refuses(&[&BASE[..], args].concat())
}

/// What is timed comes behind an earlier turn, which counts among what is kept.
#[test]
fn prompts_follow_on_an_earlier_turn() {
    let lab = lab();
    let lists = ["--settings", "full,mass.json", "--contexts", "3", "--prefill", "9", "--kv-dtype", "f16,f32"];
    bench(&lab, &[&lists[..], &["--past", "40", "-n", "2", "--json", "b.json"]].concat());
    let json = lab.json("b.json");
    let rows = json.as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!(row["past"], 40);
        let len = 40 + row["context"].as_u64().unwrap();
        if row["setting"] == "full" && row["kv_dtype"] == "f16" {
            assert_eq!(row["kv_bytes"], len * POSITION_BYTES, "{row}");
        }
        assert!((row["setting"] == "full") == (row["kept_ratio"] == 1.0), "{row}");
    }
    let past = |past: &'static str| ["--past", past, "--prefill", "9"];
    refuses(&lab, &past("56")).names("56 tokens of an earlier turn, 9 tokens").names("64").hints("shorten");
    bench(&lab, &past("55"));
}

#[test]
fn every_case_has_a_row() {
    let lab = lab();
    lab.write("b.json", "what an earlier run left");
    let lists = ["--settings", "full,mass.json", "--contexts", "3,20", "--prefill", "20,9", "--kv-dtype", "f16,f32"];
    let files = ["-n", "2", "--threads", "1,2", "--json", "b.json", "--plot", "b.png"];
    let table = bench(&lab, &[&lists[..], &files].concat());
    let json = lab.json("b.json");
    let rows = json.as_array().unwrap();

    let cases: Vec<String> = rows
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap();
            format!("{} {} {} {} {}", row["threads"], row["context"], text("work"), text("kv_dtype"), text("setting"))
        })
        .collect();
    let mut expected = Vec::new();
    for threads in [1, 2] {
        for (context, work) in [(3, "decode"), (9, "prefill"), (20, "prefill"), (20, "decode")] {
            for kv_dtype in ["f16", "f32"] {
                for setting in ["full", "mass.json"] {
                    expected.push(format!("{threads} {context} {work} {kv_dtype} {setting}"));
                }
            }
        }
    }
    assert_eq!(cases, expected);

    for row in rows {
        let is_decode = row["work"] == "decode";
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        let expected = if is_decode { [&KEYS[..], &DECODE_KEYS].concat() } else { KEYS.to_vec() };
        assert_eq!(keys, expected);
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
        assert_eq!(number("runs"), 2.0);
        assert!(0.0 < number("min_ms") && number("min_ms") <= number("median_ms"), "{row}");
        assert!(number("median_ms") <= number("max_ms") && number("peak_rss_bytes") > 0.0, "{row}");
        let tokens = if is_decode { 1.0 } else { number("context") };
        assert!((number("tokens_per_s") * number("median_ms") / (1e3 * tokens) - 1.0).abs() < 1e-9, "{row}");
        let scale = if row["kv_dtype"] == "f16" { 1.0 } else { 2.0 };
        let full = number("context") * POSITION_BYTES as f64 * scale;
        assert!((number("kv_bytes") / full - number("kept_ratio")).abs() < 1e-9, "{row}");
        let is_compressed = row["setting"] != "full" && row["context"] == 20; // shorter ones have no budget
        assert!(
            (row["setting"] != "full" || number("kept_ratio") == 1.0) && (!is_compressed || number("kept_ratio") < 1.0)
        );
        if is_decode {
            let share = number("read_gb_per_s") / number("loop_gb_per_s");
            assert!((share / number("bandwidth_share") - 1.0).abs() < 1e-9, "{row}");
            let weights = TinyGguf::new().bytes().len() as f64;
            let bytes = number("bytes_per_token") - number("kv_bytes");
            assert!(0.5 * weights < bytes && bytes < 1.1 * weights, "{weights} {row}");
        }
    }
    assert_eq!(table.lines().filter(|line| line.starts_with("decode") || line.starts_with("prefill")).count(), 32);
    assert_eq!(table.matches("a plain loop reads").count(), 2);
    assert!(lab.path("b.png").is_file());
    let left: Vec<_> = std::fs::read_dir(lab.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn only_what_is_asked_for_is_measured() {
    let lab = lab();
    let works = |args: &[&str]| -> Vec<Value> {
        bench(&lab, &[args, &["--json", "b.json", "--warmup", "0"]].concat());
        lab.json("b.json").as_array().unwrap().iter().map(|row| row["work"].clone()).collect()
    };
    assert_eq!(works(&["--contexts", "5"]), ["decode"]);
    assert_eq!(works(&["--prefill", "64"]), ["prefill"]);
    assert_eq!(works(&["--prefill", "5,5,5", "--threads", "1,1"]), ["prefill"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let lab = lab();
    refuses(&lab, &["--settings", "full,none.json"]).status(1).names("`none.json`").hints("full").is_short();
    lab.write("bad.json", r#"{"t": 2}"#);
    refuses(&lab, &["--settings", "bad.json"]).status(2).names("`bad.json`").names("`t`");
    refuses(&lab, &["--contexts", "60", "-n", "5"]).status(2).names("60").names("64").hints("--contexts").is_short();
    refuses(&lab, &["--prefill", "3,65"]).status(2).names("65").names("64").hints("--prefill").is_short();
    for (option, value) in [
        ("--runs", "0"),
        ("--new-tokens", "0"),
        ("--contexts", "0"),
        ("--prefill", "1,x"),
        ("--threads", "1,0"),
        ("--kv-dtype", "f16,f7"),
        ("--warmup", "-1"),
    ] {
        refuses(&lab, &[option, value]).status(2).names(option);
    }
    refuses(&lab, &["--prompt-file", "none.txt"]).status(1).names("`none.txt`").is_short();
    lab.write("empty.txt", "");
    refuses(&lab, &["--contexts", "3", "--prompt-file", "empty.txt"]).status(2).hints("--prompt-file").is_short();
    for option in ["--json", "--plot"] {
        refuses(&lab, &["--contexts", "3", option, "."]).status(1).names("`.`").is_short();
        refuses(&lab, &["--contexts", "3", option, "text.txt/a"]).status(1).names("`text.txt`").is_short();
    }
}

/// A model that decodes slowly enough for Ctrl-C to come in between.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_leaves_the_rows_that_are_complete() {
    let lab = lab();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(100_000));
    lab.write("tiny.gguf", file.bytes());
    let args = ["--contexts", "3", "-n", "20", "--runs", "1000000", "--json", "b.json", "--threads", "1,2"];
    let mut child = lab.command(&[&BASE[..], &args].concat()).spawn().unwrap();
    // Kept until the end: a closed pipe would end the program on its own.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("work")), "no table begins");
    computes_for(&child, Duration::from_secs(2)); // many runs
    send(&child, "-INT");
    let output = output_of(child, "bench");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let json = lab.json("b.json");
    assert_eq!((json.as_array().unwrap().len(), &json[0]["threads"]), (1, &Value::from(1)));
    assert!((1..1_000_000).contains(&json[0]["runs"].as_u64().unwrap()), "{json}");
}

/// A clock on which everything takes two milliseconds.
#[derive(Debug, Default)]
struct Steps(AtomicU64);

impl Clock for Steps {
    fn now(&self) -> Duration {
        Duration::from_millis(2 * self.0.fetch_add(1, Ordering::Relaxed))
    }
}

#[derive(Default)]
struct Recorder {
    /// Every run, as people are told of it.
    runs: Vec<String>,
    rows: Vec<Row>,
}

impl Observer for Recorder {
    fn starts(&mut self, what: &str) {
        self.runs.push(what.to_owned());
    }

    fn row(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        Ok(())
    }
}

#[test]
fn settings_take_turns_and_a_prompt_is_processed_no_more_than_needed() {
    let lab = lab();
    let loaded = load(lab.path("tiny.gguf"), WeightDtype::Auto).unwrap();
    let setting = |name: &str| Setting { name: name.to_owned(), retention: Retention::Full };
    let plan = Plan {
        threads: vec![1],
        settings: vec![setting("A"), setting("B")],
        kv_dtypes: vec![KvDtype::F16],
        past: 0,
        contexts: vec![6, 4],
        prefill: vec![4],
        new_tokens: 3,
        runs: 2,
        warmup: 1,
    };
    let subject = Subject {
        model: &loaded.model,
        prompt: &[1, 2, 3, 4, 1, 2],
        decode_bytes: 6_000,
        prefill_options: PrefillOptions::default(),
    };
    let mut recorder = Recorder::default();
    run(subject, &plan, &Steps::default(), &mut recorder).unwrap();

    let runs: Vec<_> = recorder.runs.iter().map(|what| what.replace(", 1 threads", "").replace(", f16", "")).collect();
    let both = |what: &str, run: &str| ["A", "B"].map(|setting| format!("{what} tokens, {setting}: {run}"));
    let rounds = |what: &str| ["warm-up", "run 1 of 2", "run 2 of 2"].map(|run| both(what, run)).concat();
    let expected =
        [rounds("prefill, 4"), rounds("decode, 4"), both("prefill, 6", "run 1 of 1").to_vec(), rounds("decode, 6")];
    assert_eq!(runs[1..], expected.concat());

    assert_eq!(recorder.rows.len(), 6);
    for row in &recorder.rows {
        let tokens = row.reading.map_or(row.context, |_| 1);
        assert_eq!((row.times.median_ms, row.tokens_per_s), (2.0, tokens as f64 * 500.0));
    }
    // After one, two and three new tokens on top of four.
    let reading = recorder.rows[2].reading.unwrap();
    assert_eq!(reading.bytes_per_token as u64, 6_000 + 6 * POSITION_BYTES);
    assert!((reading.read_gb_per_s * 2e6 / reading.bytes_per_token as f64 - 1.0).abs() < 1e-9);
}
