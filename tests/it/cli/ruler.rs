//! `eval --tasks ruler`: rows, lengths, seeds; and real answers.

use serde_json::Value;

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, MODEL, Refusal, succeeds};

/// Keys of every row, in this order.
const KEYS: [&str; 19] = [
    "task",
    "config",
    "context",
    "score",
    "score_full",
    "difference",
    "difference_95",
    "full_fails",
    "samples",
    "num_tasks",
    "kv_dtype",
    "budget",
    "kept_ratio",
    "kv_bytes",
    "score_by_sample",
    "score_full_by_sample",
    "expected",
    "answers",
    "answers_full",
];
/// With the tokens of an answer.
const TASKS: [(&str, u64); 11] = [
    ("niah_single_1", 128),
    ("niah_single_2", 128),
    ("niah_single_3", 128),
    ("niah_multikey_1", 128),
    ("niah_multikey_2", 128),
    ("niah_multikey_3", 128),
    ("niah_multivalue", 128),
    ("niah_multiquery", 128),
    ("vt", 30),
    ("cwe", 120),
    ("fwe", 50),
];
/// Bytes of one position's keys and values in the tiny model, f16: one layer, 16 numbers each.
const POSITION_BYTES: u64 = 64;

/// The tiny model with a longer context. It answers nothing that is right.
fn lab() -> Lab {
    let lab = Lab::new();
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(4096));
    lab.write("tiny.gguf", file.bytes());
    lab.write("prose.txt", "A man came by. He slept! Was it late? So it was, and dark. ".repeat(3));
    lab
}

const BASE: [&str; 11] =
    ["eval", "--model", "tiny.gguf", "--text", "prose.txt", "--threads", "1", "--windows", "0", "--json", "e.json"];

fn run(lab: &Lab, args: &[&str]) -> (String, Vec<Value>) {
    let table = succeeds(&lab.run(&[&BASE[..], args].concat()));
    (table, lab.json("e.json").as_array().unwrap().clone())
}

fn refuses(lab: &Lab, args: &[&str]) -> Refusal {
    lab.refuses(&[&BASE[..], args].concat())
}

#[test]
fn all_tasks_have_rows_and_fill_the_length() {
    let lab = lab();
    let length = 4000;
    let args =
        ["--tasks", "ruler", "--contexts", "4000", "--trials", "2", "--configs", "full,replay", "--kept-ratio", "0.5"];
    let (table, rows) = run(&lab, &[&args[..], &["--csv", "e.csv"]].concat());
    let names: Vec<_> = rows.iter().map(|row| row["task"].as_str().unwrap()).collect();
    assert_eq!(names, TASKS.iter().flat_map(|(task, _)| [*task, *task]).collect::<Vec<_>>());
    for (row, (task, answer_tokens)) in rows.iter().zip(TASKS.iter().flat_map(|task| [task, task])) {
        assert_eq!(row.as_object().unwrap().keys().collect::<Vec<_>>(), KEYS);
        assert_eq!((&row["context"], &row["samples"], &row["num_tasks"]), (&length.into(), &2.into(), &1.into()));
        let expected = match *task {
            "niah_multivalue" | "niah_multiquery" => 4,
            "vt" => 5,
            "cwe" => 10,
            "fwe" => 3,
            _ => 1,
        };
        for key in ["expected", "answers", "answers_full", "score_by_sample"] {
            assert_eq!(row[key].as_array().unwrap().len(), 2, "{task} {key}");
        }
        assert!(row["expected"].as_array().unwrap().iter().all(|all| all.as_array().unwrap().len() == expected));
        assert_eq!((&row["full_fails"], &row["score_full"]), (&true.into(), &0.0.into()), "{row}");
        if row["config"] == "full" {
            assert_eq!(
                (&row["difference"], &row["difference_95"], &row["answers"]),
                (&0.0.into(), &0.0.into(), &row["answers_full"])
            );
            // The question is short, and so is what would have been one piece too many, but for lists of words.
            let (tokens, most) = (row["kv_bytes"].as_u64().unwrap() / POSITION_BYTES, length - answer_tokens);
            assert!(tokens < most && tokens + 900 > most, "{task}: {tokens} of {most}");
        } else {
            assert!((row["kept_ratio"].as_f64().unwrap() - 0.5).abs() < 0.01, "{row}");
        }
    }
    assert_eq!(table.lines().count(), 23, "{table}");
    assert!(table.lines().skip(1).all(|line| line.ends_with("the full cache fails")), "{table}");
    assert_eq!(lab.read("e.csv").lines().next().unwrap(), KEYS.join(","));
}

#[test]
fn a_seed_makes_the_texts_and_nothing_else_does() {
    let lab = lab();
    let args = ["--trials", "2", "--configs", "full", "--tasks"];
    let rows = |tasks: &str, more: &[&str]| run(&lab, &[&args[..], &[tasks, "--contexts", "3k"], more].concat()).1;
    let both = rows("vt,niah_multikey_3", &[]);
    assert_eq!(both[1], rows("niah_multikey_3", &["--seed", "0"])[0]);
    assert_eq!(both[0]["context"], 3072);
    let other = rows("niah_multikey_3", &["--seed", "1"]);
    assert_ne!(both[1]["expected"], other[0]["expected"]);
    let expected = both[1]["expected"].as_array().unwrap();
    assert_ne!(expected[0], expected[1]);
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let lab = lab();
    refuses(&lab, &["--tasks", "niah"]).status(2).names("`niah`").hints("`niah_single_1`").hints("`ruler`").is_short();
    refuses(&lab, &["--tasks", "vt", "--contexts", "8k"]).status(2).names("8192").hints("--contexts").is_short();
    refuses(&lab, &["--tasks", "vt", "--contexts", "8x"]).status(2).names("--contexts");
    refuses(&lab, &["--tasks", "vt", "--contexts", "0"]).status(2).names("--contexts");
    refuses(&lab, &["--tasks", "vt", "--contexts", "200"]).status(2).names("200").names("`vt`").hints("--contexts");
    lab.write("prose.txt", " \n");
    refuses(&lab, &["--tasks", "niah_single_2"]).status(2).names("empty").hints("--text");
}

/// SmolLM2 finds a number in a short text, and loses it where the text is not kept.
#[test]
fn a_real_model_answers_from_what_is_kept() {
    let lab = Lab::new();
    lab.write("few.json", r#"{"method": "streaming_llm", "kept_ratio": 0.05}"#);
    let args =
        ["eval", "--model", MODEL, "--windows", "0", "--tasks", "niah_single_1,niah_multikey_1", "--contexts", "700"];
    let more = ["--trials", "3", "--configs", "full,replay,few.json", "--json", "e.json", "--plot", "e.png"];
    let table = succeeds(&lab.run(&[&args[..], &more].concat()));
    let json = lab.json("e.json");
    let rows = json.as_array().unwrap();
    let score = |index: usize| rows[index]["score"].as_f64().unwrap();
    assert!(score(0) >= 0.6, "{table}\n{}", rows[0]);
    assert!(score(2) < 0.5, "{table}\n{}", rows[2]);
    let mean: Vec<f64> = rows[2]["score_by_sample"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    assert!((mean.iter().sum::<f64>() / 3.0 - score(2)).abs() < 1e-12);
    assert!(std::fs::metadata(lab.path("e.png")).unwrap().len() > 1000);
    // An answer that holds what is asked for says no more.
    let answers = rows[0]["answers"].as_array().unwrap();
    for (answer, expected) in answers.iter().zip(rows[0]["expected"].as_array().unwrap()) {
        let (answer, expected) = (answer.as_str().unwrap(), expected[0].as_str().unwrap());
        assert!(!answer.contains(expected) || answer.ends_with(expected), "{answer}");
    }
}
