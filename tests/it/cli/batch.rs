//! `generate --prompts`.

use serde_json::Value;

use super::{Lab, MODEL, succeeds};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn prompts_of_every_form_are_answered_in_order_as_alone() {
    let lab = Lab::new();
    lab.write(
        "prompts.txt",
        "The capital of France is\n\n\"The capital of\\tItaly is\"\n{\"prompt\": \"One, two, three,\"}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]}\n\"Quoted\" he said\n",
    );
    let exact = ["--compute", "exact"];
    let args = [&["--prompts", "prompts.txt", "-n", "6", "--batch", "3", "--report", "r.json"], &exact[..]].concat();
    let output = lab.run(&[&["generate", "--model", MODEL], &args[..]].concat());
    let answers = lines(&succeeds(&output));
    let figures = String::from_utf8(output.stderr).unwrap();
    for part in ["5 texts, at most ", "tokens/s together", "KV cache"] {
        assert!(figures.contains(part), "expected `{part}` in:\n{figures}");
    }
    assert_eq!(answers.iter().map(|answer| answer["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(answers.iter().map(|answer| answer["line"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3, 4, 5, 6]);
    for (index, prompt) in
        ["The capital of France is", "The capital of\tItaly is", "One, two, three,"].iter().enumerate()
    {
        lab.generate(&[&["--prompt", prompt, "-n", "6", "--report", "single.json"], &exact[..]].concat());
        let single = lab.json("single.json");
        for key in ["text", "generated_tokens", "finish_reason", "kv"] {
            assert_eq!(answers[index][key], single[key], "{prompt}: {key}");
        }
        assert_eq!(answers[index]["prompt_tokens"], single["prompt_tokens"].as_array().unwrap().len());
    }
    assert!(answers[3]["text"].as_str().unwrap().contains("capital"), "{}", answers[3]);
    let report = lab.json("r.json");
    assert_eq!(report["texts"].as_array().unwrap().len(), 5);
    assert_eq!(report["batch"], 3);
    // How many there were depends on time: short texts can end while the third prompt is read.
    let most = report["most_sequences"].as_u64().unwrap();
    assert!((1..=3).contains(&most) && figures.contains(&format!("at most {most} at a time")), "{most}:\n{figures}");
    // The log has every prompt's choices.
    assert_eq!(lab.read("logs/test.log").matches("layer_id:29 cache:").count(), 5 + 3);
}

#[test]
fn what_cannot_be_used_is_named_with_its_line() {
    let lab = Lab::new();
    let refuses = |content: &str, more: &[&str]| {
        lab.write("p.txt", content);
        lab.generate_refuses(&[&["--prompts", "p.txt"], more].concat())
    };
    refuses("\n \n", &[]).status(1).names("p.txt").hints("one prompt a line");
    refuses("fine\n{\"prompt\": 3}\n", &[]).status(1).names("p.txt:2").hints("`prompt` or `messages`");
    refuses("{\"prompt\"\n", &[]).status(1).names("p.txt:1");
    refuses("{\"messages\": []}\n", &[]).status(1).names("p.txt:1");
    lab.generate_refuses(&["--prompts", "none.txt"]).status(1).names("none.txt");
    refuses("fine\n", &["--batch", "0"]).status(2);
    refuses("fine\n", &["--kv-budget", "3 apples"]).status(2).names("3 apples");
    refuses("fine\n", &["--kv-budget", "1KB"]).status(2).names("p.txt:1").hints("keep less");
    refuses("fine\n\nfine\n", &["--kv-budget", "1KB", "--use-adakv", "0"])
        .status(2)
        .names("p.txt:1")
        .hints("keep less");
    let long = format!("fine\n\n{}\n", "word ".repeat(9000));
    refuses(&long, &[]).status(2).names("p.txt:3").names("context").hints("shorten");
}
