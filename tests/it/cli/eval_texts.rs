//! `eval` on several texts, and its needle map.

use serde_json::Value;

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, succeeds};

const BASE: [&str; 11] = [
    "eval",
    "--model",
    "tiny.gguf",
    "--threads",
    "1",
    "--prompt-tokens",
    "20",
    "--score-tokens",
    "8",
    "--configs",
    "full,replay,h2o.json",
];

fn lab() -> Lab {
    let lab = Lab::new();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(1000));
    lab.write("tiny.gguf", file.bytes());
    lab.write("one.txt", "ab ac b a".repeat(16));
    std::fs::create_dir(lab.path("more")).unwrap();
    lab.write("more/two.txt", "c b ab a c".repeat(16));
    lab.write("h2o.json", r#"{"method": "h2o"}"#);
    lab
}

fn run(lab: &Lab, args: &[&str]) -> (String, Vec<Value>) {
    let table = succeeds(&lab.run(&[&BASE[..], &["--json", "e.json"], args].concat()));
    (table, lab.json("e.json").as_array().unwrap().clone())
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn several_texts_have_rows_each_and_rows_together() {
    let lab = lab();
    let budgets = ["--windows", "2", "--kept-ratio", "0.5,0.25"];
    let (_, one) = run(&lab, &[&budgets[..], &["--text", "one.txt"]].concat());
    let (_, two) = run(&lab, &[&budgets[..], &["--text", "more/two.txt"]].concat());
    let (table, both) = run(&lab, &[&budgets[..], &["--text", "one.txt,more/two.txt", "--plot", "e.png"]].concat());
    assert_eq!((one.len(), both.len()), (5, 15));
    // What is measured on a text does not depend on the other.
    assert_eq!((&both[..5], &both[5..10]), (&one[..], &two[..]));
    assert_eq!((&one[0]["text"], &two[0]["text"]), (&"one.txt".into(), &"more/two.txt".into()));
    for (index, all) in both[10..].iter().enumerate() {
        assert_eq!((&all["text"], &all["windows"]), (&"all texts".into(), &4.into()));
        assert_eq!((&all["config"], &all["budget"]), (&one[index]["config"], &one[index]["budget"]));
        let kl = numbers(&all["kl_by_window"]);
        assert_eq!(kl, [numbers(&one[index]["kl_by_window"]), numbers(&two[index]["kl_by_window"])].concat());
        let worst = kl.iter().copied().fold(0.0, f64::max);
        assert_eq!(all["kl_worst"].as_f64(), Some(worst));
        assert!((kl.iter().sum::<f64>() / 4.0 - all["kl_mean"].as_f64().unwrap()).abs() < 1e-12);
        assert!(index == 0 || worst > all["kl_mean"].as_f64().unwrap(), "{all}");
    }
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("text       config") && lines[0].contains("worst"), "{table}");
    for (line, name) in [(1, "one "), (6, "two "), (11, "all texts  full")] {
        assert!(lines[line].starts_with(name), "{table}");
    }
    assert_eq!(lines.len(), 16, "{table}");
    assert!(std::fs::metadata(lab.path("e.png")).unwrap().len() > 1000);
}

/// A text that is too short is named; nothing is measured before.
#[test]
fn each_text_must_be_long_enough() {
    let lab = lab();
    lab.write("short.txt", "ab ab c");
    let args = [&BASE[..], &["--text", "one.txt,short.txt", "--json", "e.json"]].concat();
    lab.refuses(&args).status(2).names("`short.txt`").names("4 tokens").is_short();
    let args = [&BASE[..], &["--text", "one.txt,none.txt"]].concat();
    lab.refuses(&args).status(1).names("`none.txt`").is_short();
}

#[test]
fn a_map_has_a_cell_for_each_length_and_depth() {
    let lab = lab();
    let args = ["--text", "one.txt", "--windows", "0", "--tasks", "passkey,reworded", "--contexts", "600,700"];
    let more = ["--depths", "0.1,0.9", "--trials", "1", "--map", "m.png", "--kept-ratio", "0.5"];
    let (table, rows) = run(&lab, &[&args[..], &more].concat());
    assert_eq!(rows.len(), 2 * 2 * 2 * 3);
    assert!(std::fs::metadata(lab.path("m.png")).unwrap().len() > 1000);
    assert!(table.contains("\nreworded: replay, 50%, f16, 1 text each\n"), "{table}");
    let map = table.split("passkey: full").nth(1).unwrap();
    let lines: Vec<Vec<&str>> = map.lines().skip(1).take(3).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][lines[0].len() - 2..], ["600", "700"], "{table}");
    assert_eq!((lines[1][0], lines[2][0]), ("0.1", "0.9"), "{table}");
    let args = ["--text", "one.txt", "--map", "m.png"];
    lab.refuses(&[&BASE[..], &args].concat()).status(2).names("--map").hints("--tasks");
}
