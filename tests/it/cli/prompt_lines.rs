//! Lines of --prompts: keys, forms, and what is said about them.

use serde_json::{Value, json};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, succeeds};

const TEMPLATE: &str = "{% for message in messages %}{{ message.content }} {% endfor %}";

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().set("tokenizer.chat_template", Meta::Text(TEMPLATE)).bytes());
    lab
}

/// The answers to the lines of a file.
fn answers(lab: &Lab, lines: &str, more: &[&str]) -> Vec<Value> {
    lab.write("p.jsonl", lines);
    let args = ["generate", "--model", "tiny.gguf", "--prompts", "p.jsonl", "-n", "6", "--ignore-eos"];
    let text = succeeds(&lab.run(&[&args[..], more].concat()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn refuses(lab: &Lab, lines: &str) -> Refusal {
    lab.write("p.jsonl", lines);
    lab.refuses(&["generate", "--model", "tiny.gguf", "--prompts", "p.jsonl"])
}

#[test]
fn keys_of_a_line_are_obeyed_for_that_line_alone() {
    let lab = lab();
    let lines = [
        json!({"prompt": "ab ac", "custom_id": "first", "model": "ignored"}),
        json!({"prompt": "ab ac", "max_tokens": 3}),
        json!({"prompt": "ab ac", "temperature": 1.5, "top_p": 0.9, "seed": 7}),
        json!({"prompt": "ab ac", "temperature": 1.5, "seed": 7, "max_completion_tokens": 4, "n": 1}),
        json!({"custom_id": "request-5", "method": "POST", "url": "/v1/completions",
               "body": {"prompt": "ab ac", "max_tokens": 0}}),
    ];
    let text = lines.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let answers = answers(&lab, &text, &["--report", "r.json"]);
    let len = |index: usize| answers[index]["generated_tokens"].as_array().unwrap().len();
    assert_eq!([len(0), len(1), len(2), len(3), len(4)], [6, 3, 6, 4, 0]);
    assert_eq!(
        answers[1]["generated_tokens"].as_array().unwrap()[..],
        answers[0]["generated_tokens"].as_array().unwrap()[..3]
    );
    assert_eq!((&answers[0]["custom_id"], &answers[4]["custom_id"]), (&json!("first"), &json!("request-5")));
    assert!(answers[1].get("custom_id").is_none());
    assert_eq!((&answers[2]["seed"], answers[0].get("seed")), (&json!(7), None));
    assert_eq!(lab.json("r.json")["texts"][4]["custom_id"], "request-5");
    // As a run of its own with the same options.
    let single =
        ["generate", "--model", "tiny.gguf", "--prompt", "ab ac", "-n", "6", "--ignore-eos", "--report", "s.json"];
    succeeds(&lab.run(&[&single[..], &["--temperature", "1.5", "--top-p", "0.9", "--seed", "7"]].concat()));
    assert_eq!(answers[2]["generated_tokens"], lab.json("s.json")["generated_tokens"]);

    // Of lines without a seed, each draws its own, another one in every run.
    let seeds = || {
        let line = json!({"prompt": "ab ac", "temperature": 1.5});
        let answers = self::answers(&lab, &format!("{line}\n{line}\n"), &[]);
        [answers[0]["seed"].as_u64().unwrap(), answers[1]["seed"].as_u64().unwrap()]
    };
    let (once, again) = (seeds(), seeds());
    assert!(once[0] != once[1] && once[0] != again[0] && once[1] != again[1], "{once:?} {again:?}");

    // A stop text of the line takes the place of the option's, and is not printed.
    let whole = answers[0]["text"].as_str().unwrap();
    let stop: String = whole.chars().skip(2).take(2).collect();
    let lines = format!("{}\n{}\n", json!({"prompt": "ab ac", "stop": stop}), json!({"prompt": "ab ac", "stop": []}));
    let stopped = self::answers(&lab, &lines, &["--stop", &whole[..1]]);
    assert_eq!(stopped[0]["finish_reason"], "stop");
    assert_eq!(stopped[0]["text"].as_str().unwrap(), &whole[..whole.find(&stop).unwrap()]);
    assert_eq!((&stopped[1]["text"], &stopped[1]["finish_reason"]), (&json!(whole), &answers[0]["finish_reason"]));
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_prompt_and_a_list_of_messages_is_a_conversation() {
    let lab = lab();
    let list = r#"[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]"#;
    let plain = answers(&lab, &format!("ab ac\n{{\"messages\": {list}}}\nb\n"), &[]);
    let marked = answers(&lab, &format!("\u{feff}ab ac\r\n\u{feff}{list}\r\n\u{feff}\r\n\u{feff}b"), &[]);
    let what = |answer: &Value| [answer["prompt_tokens"].clone(), answer["generated_tokens"].clone()];
    assert_eq!(plain.iter().map(what).collect::<Vec<_>>(), marked.iter().map(what).collect::<Vec<_>>());
    assert_eq!(marked[2]["line"], 4);
    refuses(&lab, "\u{feff}\n").status(1).names("no prompts");
    for (line, part) in [("[]", "empty"), ("[1, 2]", "message 0"), ("[\"ab\"]", "message 0"), ("[[]]", "message 0")] {
        refuses(&lab, &format!("ab\n{line}\n")).status(1).names("`p.jsonl:2`").names(part).is_short();
    }
}

#[test]
fn what_cannot_be_obeyed_names_key_line_and_file() {
    let lab = lab();
    for (line, key) in [
        (r#"{"prompt": "a", "logit_bias": {}}"#, "`logit_bias`"),
        (r#"{"prompt": "a", "presence_penalty": 0}"#, "`presence_penalty`"),
        (r#"{"prompt": "a", "n": 3}"#, "`n`"),
        (r#"{"prompt": "a", "max_tokens": "3"}"#, "`max_tokens`"),
        (r#"{"prompt": "a", "top_p": -0.1}"#, "`top_p`"),
        (r#"{"prompt": "a", "seed": 1, "seed": 2}"#, "`seed` is given twice"),
        (r#"{"prompt": "a", "custom_id": {}}"#, "`custom_id`"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "echo": true}"#, "`echo`"),
    ] {
        // Found before a model is looked for.
        lab.write("p.jsonl", format!("fine\n\n{line}\n"));
        let args = ["generate", "--model", "none.gguf", "--prompts", "p.jsonl"];
        lab.refuses(&args).status(1).names("`p.jsonl:3`").names(key).is_short();
    }
    lab.write("p.jsonl", "[{\"role\": \"system\", \"content\": \"a\"}, {\"role\": \"user\", \"content\": \"b\"}]\n");
    let args = ["generate", "--model", "tiny.gguf", "--prompts", "p.jsonl", "--system", "c"];
    lab.refuses(&args).status(1).names("`p.jsonl:1`").names("--system");
}

#[test]
fn eval_refuses_keys_that_it_cannot_obey() {
    let lab = lab();
    let args = ["eval", "--model", "tiny.gguf", "--windows", "0", "--prompts", "p.jsonl", "--answer-tokens", "2"];
    for (key, value) in
        [("max_tokens", json!(3)), ("stop", json!("a")), ("temperature", json!(0.5)), ("seed", json!(1))]
    {
        lab.write("p.jsonl", format!("ab\n{}\n", json!({"prompt": "ab", (key): value})));
        lab.refuses(&args).status(1).names("`p.jsonl:2`").names(format!("`{key}`")).hints("leave it out");
    }
    lab.write("p.jsonl", "{\"prompt\": \"ab\", \"custom_id\": \"x\", \"model\": \"y\"}\n");
    succeeds(&lab.run(&args));
}

/// What is kept of all prompts, and what was there at a time, are two things.
#[test]
fn the_summary_says_what_was_kept_at_a_time_and_of_all_prompts() {
    let lab = lab();
    lab.write("p.jsonl", "ab ac b a ab ac b a\n".repeat(6));
    let args =
        ["generate", "--model", "tiny.gguf", "--prompts", "p.jsonl", "-n", "2", "--batch", "1", "--use-adakv", "0"];
    let output = lab.run(&[&args[..], &["--report", "r.json", "--kv-budget", "2KB"]].concat());
    succeeds(&output);
    let figures = String::from_utf8(output.stderr).unwrap();
    let report = lab.json("r.json");
    let most = report["most_kv_bytes"].as_u64().unwrap();
    let kept: u64 =
        report["texts"].as_array().unwrap().iter().map(|text| text["kv"]["kept_bytes"].as_u64().unwrap()).sum();
    assert!(kept > 4 * most, "{kept} {most}");
    assert!(
        figures.contains(&format!("KV cache {most} bytes at most at a time, of 2048 bytes allowed\n")),
        "{figures}"
    );
    assert!(figures.contains("% saved), all 6 added up"), "{figures}");
    // What is too small for MB is given in bytes.
    let output = lab.run(&[&args[..], &["--kv-budget", "100B"]].concat());
    Refusal::of(&output, "too small").status(2).names("more than the budget of 100 bytes").names(" bytes of KV cache");
}
