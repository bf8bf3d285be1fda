//! `kvzip`, `kvzip_plus` and `rkv` as their user meets them: in every command that a configuration can be named in.

use std::io::Write;
use std::process::Stdio;

use super::tiny_gguf::TinyGguf;
use super::{Lab, succeeds};

const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";

/// A model that knows its template and every byte, and files of the three methods.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("m.gguf", TinyGguf::chat(TEMPLATE, &["<s>", "<end>", "<|user|>", "<|assistant|>"]).bytes());
    lab.write("text.txt", "Phileas Fogg was a member of the Reform Club, and that was all. ".repeat(8));
    for method in ["kvzip", "kvzip_plus"] {
        lab.write(
            &format!("{method}.json"),
            format!(r#"{{"method": "{method}", "kept_ratio": 0.5, "repeat_chunk": 60}}"#),
        );
    }
    lab.write("rkv.json", r#"{"method": "rkv", "decode": "evict", "kept_ratio": 0.5, "evict_every": 4}"#);
    lab
}

#[test]
fn generate_keeps_its_share_and_reports_it() {
    let lab = lab();
    for method in ["kvzip", "kvzip_plus", "rkv"] {
        let config = format!("{method}.json");
        let args =
            ["generate", "--model", "m.gguf", "--prompt", "The Reform Club was there.", "-n", "12", "--ignore-eos"];
        let report = ["--config", &config, "--report", "r.json", "--report-positions"];
        succeeds(&lab.run(&[&args[..], &report].concat()));
        let report = lab.json("r.json");
        let head = &report["layers"][0]["heads"][0];
        let prompt = report["prompt_tokens"].as_array().unwrap().len();
        assert_eq!(head["positions"].as_array().unwrap().len(), prompt / 2, "{method}: {head}");
        assert_eq!(report["config"]["method"], method, "{report}");
    }
}

#[test]
fn chat_repeats_each_turn_with_the_answer_before_it() {
    let lab = lab();
    for method in ["kvzip", "kvzip_plus", "rkv"] {
        let config = format!("{method}.json");
        let args = ["chat", "--model", "m.gguf", "--config", &config, "-n", "9", "--ignore-eos"];
        let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        let lines = "Where did he dine?\nAnd when did he go home?\n/stats\n";
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        succeeds(&output);
        let rows: Vec<Vec<&str>> = told
            .lines()
            .skip_while(|line| !line.starts_with("turn"))
            .skip(1)
            .take(2)
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows.len(), 2, "{told}");
        for row in rows {
            let number = |column: usize| row[column].parse::<f64>().unwrap();
            // turn, prompt, answer, profiled, kept for each head
            assert!((number(4) - (number(3) / 2.0).floor()).abs() < 0.6, "{method}: {told}");
        }
    }
}

#[test]
fn eval_measures_them_beside_the_full_cache() {
    let lab = lab();
    let args = ["eval", "--model", "m.gguf", "--text", "text.txt", "--prompt-tokens", "150", "--score-tokens", "12"];
    let configs =
        ["--configs", "full,kvzip.json,kvzip_plus.json,rkv.json", "--kept-ratio", "0.25,1", "--json", "e.json"];
    succeeds(&lab.run(&[&args[..], &configs].concat()));
    let rows = lab.json("e.json");
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 7);
    for row in &rows[1..] {
        let budget = row["budget"]["kept_ratio"].as_f64().unwrap();
        assert!((row["kept_ratio"].as_f64().unwrap() - budget).abs() < 0.01, "{row}");
        let kl = row["kl_mean"].as_f64().unwrap();
        assert!(kl.is_finite() && (budget < 1.0 || kl < 1e-3 || row["config"] == "rkv.json"), "{row}");
    }
}

/// A template that can't be used.
#[test]
fn without_words_it_is_refused_with_a_remedy() {
    let lab = lab();
    let template = "{{ raise_exception('it speaks to nobody') }}";
    lab.write("mute.gguf", TinyGguf::chat(template, &["<s>", "<end>"]).bytes());
    let args = ["generate", "--model", "mute.gguf", "--prompt", "The Reform Club", "-n", "1", "--config"];
    let refusal = lab.refuses(&[&args[..], &["kvzip.json"]].concat());
    refusal.status(2).names("the method `kvzip` asks the model to repeat the prompt, and can't");
    refusal.names("it speaks to nobody").hints("`instruction`");
    lab.write("bare.json", r#"{"method": "kvzip", "instruction": false}"#);
    succeeds(&lab.run(&[&args[..], &["bare.json"]].concat()));
}
