//! What the tables and pictures of `eval`, `tune` and `bench` call things, and what they tell of eviction while decoding.

use serde_json::{Value, json};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, succeeds};

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    lab.write("text.txt", "ab ac b a".repeat(16));
    std::fs::create_dir(lab.path("configs")).unwrap();
    lab.write("configs/evict.json", r#"{"method": "h2o", "decode": "evict"}"#);
    lab.write("configs/h2o.json", r#"{"method": "h2o"}"#);
    lab
}

/// Windows of 20 + 8 tokens.
const EVAL: [&str; 13] = [
    "eval",
    "--model",
    "tiny.gguf",
    "--text",
    "text.txt",
    "--prompt-tokens",
    "20",
    "--score-tokens",
    "8",
    "--greedy-tokens",
    "5",
    "--threads",
    "1",
];
const BOTH: [&str; 2] = ["--configs", "configs/evict.json,configs/h2o.json"];

#[test]
fn the_table_tells_what_decoding_evicts() {
    let lab = lab();
    lab.write("p.txt", "ab ac b a ab ac b a\n");
    let prompts = ["--prompts", "p.txt", "--answer-tokens", "5", "--json", "e.json"];
    let table = succeeds(&lab.run(&[&EVAL[..], &BOTH, &prompts].concat()));
    let rows = lab.json("e.json");
    let number = |index: usize, key: &str| rows[index][key].as_f64().unwrap();
    // Both keep 10 of 20 rows of one head, 64 bytes each; seven tokens are read behind them.
    for index in [0, 1] {
        assert_eq!((number(index, "kept_ratio"), number(index, "kv_bytes")), (0.5, 640.0));
    }
    assert_eq!((number(0, "evicted_rows"), number(0, "end_kv_bytes")), (7.0, 640.0));
    assert!((number(0, "end_kept_ratio") - 10.0 / 27.0).abs() < 1e-12);
    assert_eq!((&rows[1]["evicted_rows"], number(1, "end_kv_bytes")), (&json!(null), 17.0 * 64.0));
    assert!((number(1, "end_kept_ratio") - 17.0 / 27.0).abs() < 1e-12);
    let ends = |line: &str, parts: [&str; 2]| {
        let cells: Vec<_> = line.split_whitespace().rev().take(2).collect();
        assert_eq!([cells[1], cells[0]], parts, "{table}");
    };
    let lines: Vec<_> = table.lines().collect();
    ends(lines[0], ["%", "evicted"]);
    ends(lines[1], ["37.0", "7.0"]);
    ends(lines[2], ["63.0", "-"]);
    // Of answers, too; the last token is never read.
    let answered = rows[2]["answer_tokens"].as_u64().unwrap();
    assert_eq!(rows[2]["evicted_rows"].as_f64().unwrap().round(), (answered - 1) as f64, "{}", rows[2]);
    assert!(table.contains("rows a head evicted while answering"), "{table}");
    assert_eq!(rows[3]["evicted_rows"], json!(null));

    // Where nothing goes on evicting, there is nothing to tell.
    let table = succeeds(&lab.run(&[&EVAL[..], &["--configs", "configs/h2o.json,full"]].concat()));
    assert!(!table.contains("evicted") && !table.contains("end %"), "{table}");
}

#[test]
fn tables_have_names_and_files_have_what_was_written() {
    let lab = lab();
    let files = ["--json", "e.json", "--csv", "e.csv", "--plot", "e.png"];
    let table = succeeds(&lab.run(&[&EVAL[..], &BOTH, &files].concat()));
    assert!(table.lines().nth(1).unwrap().starts_with("evict "), "{table}");
    assert!(table.lines().nth(2).unwrap().starts_with("h2o "), "{table}");
    assert!(!table.contains("configs/"), "{table}");
    assert_eq!(lab.json("e.json")[0]["config"], "configs/evict.json");
    assert!(lab.read("e.csv").contains("\nconfigs/evict.json,"), "{}", lab.read("e.csv"));
    // Two of one name are told apart.
    std::fs::create_dir(lab.path("other")).unwrap();
    lab.write("other/h2o.json", r#"{"method": "h2o", "kept_ratio": 0.25}"#);
    let table = succeeds(&lab.run(&[&EVAL[..], &["--configs", "configs/h2o.json,other/h2o.json"]].concat()));
    assert!(table.lines().nth(2).unwrap().starts_with("other/h2o.json "), "{table}");

    let tune = ["tune", "--model", "tiny.gguf", "--text", "text.txt", "--prompt-tokens", "20", "--score-tokens", "8"];
    let more = ["--configs", "configs/h2o.json", "--max-kept", "0.5", "--json", "t.json", "--kv-dtype", "f16"];
    let table = succeeds(&lab.run(&[&tune[..], &more].concat()));
    assert!(table.contains("\nh2o ") && table.contains("chosen: h2o,") && !table.contains("configs/h2o"), "{table}");
    assert!(lab.read("t.json").contains("configs/h2o.json"));

    let bench = ["bench", "--model", "tiny.gguf", "--settings", "full,configs/h2o.json", "--contexts", "8", "-n", "2"];
    let table = succeeds(&lab.run(&[&bench[..], &["--runs", "1", "--json", "b.json"]].concat()));
    assert!(table.contains("  h2o   ") && !table.contains("configs/"), "{table}");
    assert!(lab.read("b.json").contains("\"configs/h2o.json\""));
}

#[test]
fn small_budgets_are_told_apart() {
    let lab = lab();
    let budgets = ["--configs", "configs/h2o.json", "--kv-budget", "600B,0.7KB,1.25MB", "--json", "e.json"];
    let table = succeeds(&lab.run(&[&EVAL[..], &budgets].concat()));
    for (index, cell) in ["600B", "716B", "1.25MB"].into_iter().enumerate() {
        assert_eq!(table.lines().nth(index + 1).unwrap().split_whitespace().nth(1), Some(cell), "{table}");
    }
    // Nor are they one setting where answers are added up.
    lab.write("p.txt", "ab ac b a ab ac b a\nb a b\n");
    let answers = ["--windows", "0", "--prompts", "p.txt", "--answer-tokens", "2"];
    let table = succeeds(&lab.run(&[&EVAL[..], &budgets, &answers].concat()));
    let summary: Vec<_> = table.lines().rev().take(3).collect();
    assert!(summary[2].contains(" 600B ") && summary[1].contains(" 716B "), "{table}");
    assert!(!table.contains(" 0.0MB"), "{table}");

    let tune = ["tune", "--model", "tiny.gguf", "--text", "text.txt", "--prompt-tokens", "20", "--score-tokens", "8"];
    let output = lab.run(&[&tune[..], &["--configs", "full", "--kv-dtype", "f16", "--max-bytes", "100B"]].concat());
    let refusal = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{refusal}");
    assert!(refusal.contains("within 100 bytes") && refusal.contains(" bytes, KL"), "{refusal}");
    let inspect = succeeds(&lab.run(&["inspect", "--model", "tiny.gguf"]));
    assert!(!inspect.contains(" 0.0"), "{inspect}");
}

/// A line for each hundred tokens of what the full cache writes, below all others.
#[test]
fn the_table_tells_how_caches_hold_out_while_a_text_is_written() {
    let lab = lab();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(400));
    lab.write("tiny.gguf", file.bytes());
    lab.write("other.txt", "ba c ab ".repeat(16));
    let configs = ["--configs", "full,configs/evict.json,configs/h2o.json", "--text", "other.txt"];
    let table = |more: &[&str]| {
        let writing = ["--writing-tokens", "250", "--json", "e.json", "--csv", "e.csv"];
        let table = succeeds(&lab.run(&[&EVAL[..], &configs, &writing, more].concat()));
        (table, lab.json("e.json"))
    };
    let (text, rows) = table(&[]);
    let part = |row: usize, part: usize, key: &str| rows[row]["writing"][part][key].as_f64().unwrap();
    // Three configurations on each text, and on both.
    for row in 0..9 {
        assert_eq!([0, 1, 2].map(|index| part(row, index, "tokens")), [100.0, 200.0, 250.0]);
        for (index, tokens) in [100.0, 200.0, 250.0].into_iter().enumerate() {
            let positions = [20.0 + tokens, 10.0, 10.0 + tokens][row % 3];
            assert_eq!(part(row, index, "kv_bytes"), positions * 64.0, "{row}, {index}");
            assert!((part(row, index, "kept_ratio") - positions / (20.0 + tokens)).abs() < 1e-12, "{row}, {index}");
        }
        let by_part = |key: &str| [0, 1, 2].map(|index| part(row, index, key));
        let mean = |[a, b, c]: [f64; 3]| a.mul_add(0.4, b * 0.4) + c * 0.2;
        assert!((mean(by_part("kl_mean")) - rows[row]["writing_kl_mean"].as_f64().unwrap()).abs() < 1e-12);
        let top1 = rows[row]["writing_top1_agreement"].as_f64().unwrap();
        assert!((mean(by_part("top1_agreement")) - top1).abs() < 1e-12);
        assert_eq!(rows[row]["writing_kl_mean"] == 0.0, row % 3 == 0, "{}", rows[row]);
    }
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let heading = lines.iter().position(|line| line.contains(&"written")).unwrap();
    assert!(lines[heading - 1].is_empty(), "{text}");
    assert_eq!(lines.len(), heading + 1 + 9 * 4, "{text}");
    let of_evict: Vec<_> = lines[heading + 5..heading + 9].iter().map(|line| line[1..].to_vec()).collect();
    for (line, (written, kept)) in
        of_evict.iter().zip([("1-100", "8.3"), ("101-200", "4.5"), ("201-250", "3.7"), ("all", "3.7")])
    {
        assert_eq!((line[0], line[3], line[6], line.len()), ("evict", written, kept, 8), "{text}");
    }
    assert!(lab.read("e.csv").lines().next().unwrap().ends_with(",writing_kl_mean,writing_top1_agreement,writing"));

    // The same seed writes the same; another seed, and the most probable tokens, something else.
    let kl = |rows: &Value| rows[1]["writing_kl_mean"].clone();
    assert_eq!(kl(&table(&[]).1), kl(&rows));
    let others = [table(&["--seed", "1"]).1, table(&["--writing-temperature", "0"]).1];
    assert!(others.iter().all(|other| kl(other) != kl(&rows)));
}
