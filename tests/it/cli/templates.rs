//! Chat templates and messages as a user meets them: what the prompt's tokens spell, from which file, and what is said of
//! what cannot be used.
//!
//! Expected texts are what Jinja 2 renders, set up as transformers does it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, succeeds};

const MARKERS: [&str; 4] = ["<s>", "</s>", "<|turn|>", "<|end|>"];
const CHAT: &str = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|turn|>assistant:{% endif %}";

/// A folder with a model of this template.
fn lab(template: &str) -> Lab {
    let lab = Lab::new();
    lab.write("m.gguf", TinyGguf::chat(template, &MARKERS).bytes());
    lab
}

/// What the tokens of a prompt spell; special ones in brackets.
fn spelt(ids: &Value) -> String {
    let mut bytes = Vec::new();
    for id in ids.as_array().unwrap() {
        let id = usize::try_from(id.as_u64().unwrap()).unwrap();
        match u8::try_from(id) {
            Ok(byte) => bytes.push(byte),
            Err(_) => match MARKERS.get(id - 256) {
                Some(marker) => bytes.extend(format!("[{marker}]").bytes()),
                None => bytes.push(b' '),
            },
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// The prompt that `generate` makes of these options.
fn prompt(lab: &Lab, args: &[&str]) -> String {
    let args = [&["generate", "--model", "m.gguf", "-n", "1", "--report", "r.json"][..], args].concat();
    succeeds(&lab.run(&args));
    spelt(&lab.json("r.json")["prompt_tokens"])
}

/// Runs `generate` with options that must be refused.
fn refuses(lab: &Lab, args: &[&str]) -> Refusal {
    lab.refuses(&[&["generate", "--model", "m.gguf", "-n", "1"][..], args].concat())
}

#[test]
fn messages_tools_and_variables_are_the_templates() {
    let template = "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}\
        {% for m in messages %}<|turn|>{{ m.role }}{% if m.tool_calls %}{% for c in m.tool_calls %} {{ c.function.name }}\
        ({{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}){% endfor %}\
        {% else %} {{ m.name or '' }}:{{ m.content }}{% endif %}<|end|>{% endfor %}{{ 'T' if thinking }}";
    let lab = lab(template);
    let call = |arguments: Value| json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}]);
    let file = json!({
        "model": "any",
        "messages": [
            {"role": "user", "content": "2 < 3 & <|end|>"},
            {"role": "assistant", "content": null, "tool_calls": call(json!({"z": 1, "a": "é<s>"}))},
            {"role": "assistant", "tool_calls": call(json!("{\"z\":1}"))},
            {"role": "tool", "name": "f", "tool_call_id": "0", "content": "[5]"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "chat_template_kwargs": {"thinking": true},
    });
    lab.write("m.json", file.to_string());
    let expected = "[<s>]{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"type\": \"object\"}}}\n\
        [<|turn|>]user :2 < 3 & <|end|>[<|end|>]\
        [<|turn|>]assistant f({\"z\": 1, \"a\": \"é<s>\"})[<|end|>]\
        [<|turn|>]assistant f({\"z\":1})[<|end|>]\
        [<|turn|>]tool f:[5][<|end|>]T";
    assert_eq!(prompt(&lab, &["--messages", "m.json"]), expected);
    // The same on a line of a file of prompts.
    lab.write("p.jsonl", file.to_string() + "\n");
    let args = ["generate", "--model", "m.gguf", "-n", "1", "--prompts", "p.jsonl", "--report", "b.json"];
    succeeds(&lab.run(&args));
    let count = lab.json("r.json")["prompt_tokens"].as_array().unwrap().len();
    assert_eq!(lab.json("b.json")["texts"][0]["prompt_tokens"], count);
}

#[test]
fn a_template_of_ones_own_takes_the_models_place() {
    let lab = lab("{{ raise_exception('not this one') }}");
    lab.write("t.jinja", format!("\u{feff}{CHAT}"));
    lab.write("m.json", r#"[{"role": "user", "content": "Hi"}]"#);
    let expected = "[<|turn|>]user: Hi[<|end|>]\n[<|turn|>]assistant:";
    let own = ["--chat-template", "t.jinja"];
    assert_eq!(prompt(&lab, &[&own[..], &["--messages", "m.json"]].concat()), expected);
    assert_eq!(prompt(&lab, &[&own[..], &["--prompt", "Hi"]].concat()), expected, "it asks for a chat by itself");
    refuses(&lab, &["--messages", "m.json"]).status(2).names("m.gguf").names("line 1").names("not this one").is_short();

    lab.write("p.txt", "Hi\n");
    for command in ["generate", "eval"] {
        let args = [command, "--model", "m.gguf", "--prompts", "p.txt", "--chat-template", "t.jinja"];
        let more: &[&str] = if command == "eval" { &["--windows", "0", "--configs", "full"] } else { &["-n", "1"] };
        succeeds(&lab.run(&[&args[..], more].concat()));
    }
    succeeds(&lab.run(&[
        "compare",
        "--model",
        "m.gguf",
        "-n",
        "2",
        "--messages",
        "m.json",
        "--chat-template",
        "t.jinja",
    ]));
    let eval = ["eval", "--model", "m.gguf", "--chat-template", "t.jinja", "--configs", "full"];
    lab.refuses(&eval).status(2).names("--chat-template").is_short();

    for (text, line) in [("\n\n{% if %}", "line 3"), ("{{ 1 +", "line 1"), ("\n{% include 'x' %}", "line 2")] {
        lab.write("bad.jinja", text);
        refuses(&lab, &["--chat-template", "bad.jinja"]).status(1).names("`bad.jinja`").names(line).is_short();
    }
    lab.write("bad.jinja", b"\xFF\xFE");
    refuses(&lab, &["--chat-template", "bad.jinja"]).names("`bad.jinja`").is_short();
    refuses(&lab, &["--chat-template", "none.jinja"]).names("`none.jinja`").is_short();
}

#[test]
fn hostile_templates_end_in_a_sentence_at_once() {
    let lab = lab(CHAT);
    // Long is not hostile.
    lab.write("t.jinja", format!("{{{{ 1{} }}}}", "+1".repeat(200_000)));
    assert_eq!(prompt(&lab, &["--chat-template", "t.jinja", "--prompt", "x"]), "200001");
    for template in [
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x * 9 %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(10000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ] {
        lab.write("t.jinja", template);
        // It may compute for so many seconds; one is enough for a build that is optimised.
        let mut command = lab.limited(
            &[("-t", 15)],
            &["generate", "--model", "m.gguf", "-n", "1", "--chat-template", "t.jinja", "--prompt", "x"],
        );
        Refusal::of(&command.output().unwrap(), template).status(1).names("`t.jinja`").is_short();
    }
}

#[test]
fn a_conversation_goes_on_within_its_last_answer() {
    let lab = lab(CHAT);
    let expected = "[<|turn|>]user: Hi[<|end|>]\n[<|turn|>]assistant: It is <|end|> ";
    let talk =
        r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is <|end|> "}]}"#;
    lab.write("m.json", talk);
    assert_eq!(prompt(&lab, &["--messages", "m.json", "--continue"]), expected);
    let count = lab.json("r.json")["prompt_tokens"].as_array().unwrap().len();
    let ended = format!("{expected}[<|end|>]\n[<|turn|>]assistant:");
    assert_eq!(prompt(&lab, &["--messages", "m.json"]), ended);
    lab.write("p.jsonl", format!("{talk}\n"));
    let args = ["generate", "--model", "m.gguf", "-n", "1", "--prompts", "p.jsonl", "--continue", "--report", "b.json"];
    succeeds(&lab.run(&args));
    assert_eq!(lab.json("b.json")["texts"][0]["prompt_tokens"], count);

    lab.write("u.json", r#"[{"role": "user", "content": "Hi"}]"#);
    refuses(&lab, &["--messages", "u.json", "--continue"]).status(2).names("`user`").hints("assistant");
    refuses(&lab, &["--prompt", "Hi", "--continue"]).status(2).names("--continue").hints("--messages");
}

#[test]
fn templates_have_names_in_a_gguf_file() {
    let lab = Lab::new();
    let mut file = TinyGguf::chat("plain", &MARKERS);
    file.set("tokenizer.chat_template.tool_use", Meta::Text("with {{ tools[0].name }}"));
    lab.write("m.gguf", file.bytes());
    lab.write("m.json", r#"[{"role": "user", "content": "Hi"}]"#);
    lab.write("t.json", r#"{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}"#);
    assert_eq!(prompt(&lab, &["--messages", "m.json"]), "plain");
    assert_eq!(prompt(&lab, &["--messages", "t.json"]), "with f");
}

#[test]
fn byte_order_marks_are_dropped() {
    let lab = lab(&format!("\u{feff}{CHAT}"));
    let bom = |text: &str| format!("\u{feff}{text}");
    lab.write("p.txt", bom("Hi\n"));
    assert_eq!(prompt(&lab, &["--prompt-file", "p.txt"]), "Hi\n", "and the last newline stays");
    assert_eq!(prompt(&lab, &["--prompt", &bom("Hi")]), "Hi");
    lab.write("m.json", bom(r#"[{"role": "user", "content": "Hi"}]"#));
    assert_eq!(prompt(&lab, &["--messages", "m.json"]), "[<|turn|>]user: Hi[<|end|>]\n[<|turn|>]assistant:");
    lab.write("c.json", bom(r#"{"recovery_threshold": 0.9}"#));
    assert_eq!(prompt(&lab, &["--config", "c.json", "--prompt", "Hi"]), "Hi");
    lab.write("p.jsonl", bom("{\"prompt\": \"Hi\"}\n"));
    succeeds(&lab.run(&["generate", "--model", "m.gguf", "-n", "1", "--prompts", "p.jsonl", "--report", "b.json"]));
    assert_eq!(lab.json("b.json")["texts"][0]["prompt_tokens"], 2);
}

/// Runs `generate` with a text on standard input; the report's prompt.
fn piped(lab: &Lab, args: &[&str], input: &str) -> Value {
    let args = [&["generate", "--model", "m.gguf", "-n", "1", "--report", "r.json"][..], args].concat();
    let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    succeeds(&child.wait_with_output().unwrap());
    lab.json("r.json")
}

#[test]
fn standard_input_is_one_of_the_inputs() {
    let lab = lab(CHAT);
    let talk = "\u{feff}[{\"role\": \"user\", \"content\": \"Hi\"}]";
    let expected = "[<|turn|>]user: Hi[<|end|>]\n[<|turn|>]assistant:";
    assert_eq!(spelt(&piped(&lab, &["--messages", "-"], talk)["prompt_tokens"]), expected);
    let texts = piped(&lab, &["--prompts", "-"], "\u{feff}Hi\n\"You\"\n");
    assert_eq!(texts["texts"].as_array().unwrap().len(), 2);
    assert_eq!((&texts["texts"][0]["prompt_tokens"], &texts["texts"][1]["prompt_tokens"]), (&json!(2), &json!(3)));
    refuses(&lab, &["--messages", "-", "--prompt-file", "-"]).status(2).names("standard input").is_short();
    lab.refuses(&["chat", "--model", "m.gguf", "--messages", "-"]).status(2).names("--messages").is_short();
}

#[test]
fn a_saved_conversation_is_read_back() {
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|turn|>{{ m | tojson }}{% endfor %}\
                    {{ style }}";
    let lab = lab(template);
    let file = json!({
        "messages": [
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ],
        "tools": [{"name": "f"}],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"style": "brief"},
    });
    lab.write("m.json", file.to_string());
    let args = ["chat", "--model", "m.gguf", "-n", "2", "--messages", "m.json"];
    let mut child = lab.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"/save before.json\nAnd?\n/save after.json\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(lab.json("before.json"), file);
    let after = lab.json("after.json");
    assert_eq!((&after["tools"], &after["messages"][1]), (&file["tools"], &file["messages"][1]));
    assert_eq!(after["messages"].as_array().unwrap().len(), 5);
    assert_eq!(prompt(&lab, &["--messages", "before.json"]), prompt(&lab, &["--messages", "m.json"]));
}

#[test]
fn what_messages_hold_twice_or_in_vain_is_said() {
    let lab = lab(CHAT);
    for (text, key) in [
        (r#"[{"role": "user", "content": "a", "role": "system"}]"#, "`role`"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "tools": [], "messages": []}"#, "`messages`"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"x": 1, "x": 2}}]}"#, "`x`"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": 1}}"#, "`tools`"),
        (r#"[{"role": "user", "content": [{"type": "video", "video": "x"}]}]"#, "`video`"),
        (r#"[{"role": "assistant"}]"#, "`content`"),
    ] {
        lab.write("m.json", text);
        refuses(&lab, &["--messages", "m.json"]).names("`m.json`").names(key).is_short();
    }
    lab.write(
        "m.json",
        r#"{"messages": [{"role": "user", "content": "a"}], "model": "x", "top_k": 5, "stream": true}"#,
    );
    let output = lab.run(&["generate", "--model", "m.gguf", "-n", "1", "--messages", "m.json"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    succeeds(&output);
    assert!(stderr.contains("note: `m.json`: not used: `top_k`\n"), "{stderr}");
}

#[test]
fn a_long_conversation_is_rendered_in_bounds() {
    let lab = lab(CHAT);
    let turns: Vec<_> = (0..60)
        .map(|turn| json!({"role": if turn % 2 == 0 { "user" } else { "assistant" }, "content": "word ".repeat(40)}))
        .collect();
    lab.write("m.json", json!(turns).to_string());
    let mut expected = String::new();
    for turn in &turns {
        let _ = writeln!(expected, "[<|turn|>]{}: {}[<|end|>]", turn["role"].as_str().unwrap(), "word ".repeat(40));
    }
    assert_eq!(prompt(&lab, &["--messages", "m.json"]), expected + "[<|turn|>]assistant:");
}

/// `auto` is what the run script says: a template is used if the model brings one, and a note tells of it.
#[test]
fn a_prompt_is_wrapped_where_the_model_has_a_template() {
    const NOTE: &str = "note: the prompt is wrapped in the model's chat template";
    let lab = lab(CHAT);
    lab.write("plain.gguf", TinyGguf::new().bytes());
    let run = |model: &str, variable: Option<&str>, args: &[&str]| {
        let args =
            [&["generate", "--model", model, "--prompt", "ab", "-n", "1", "--report", "r.json"][..], args].concat();
        let mut command = lab.command(&args);
        if let Some(value) = variable {
            command.env("CHAT", value);
        }
        let output = command.output().unwrap();
        succeeds(&output);
        let told = String::from_utf8(output.stderr).unwrap();
        (lab.json("r.json")["prompt_tokens"].clone(), told.contains(NOTE))
    };
    let (wrapped, told) = run("m.gguf", None, &["--chat"]);
    assert_eq!((spelt(&wrapped).as_str(), told), ("[<|turn|>]user: ab[<|end|>]\n[<|turn|>]assistant:", false));
    let (raw, told) = run("m.gguf", None, &[]);
    assert_eq!((spelt(&raw).as_str(), told), ("ab", false));
    for (variable, args) in [(Some("auto"), &[][..]), (None, &["--chat", "auto"]), (Some("0"), &["--chat=AUTO"])] {
        assert_eq!(run("m.gguf", variable, args), (wrapped.clone(), true), "{variable:?} {args:?}");
    }
    for (variable, args) in [(Some("0"), &[][..]), (Some("auto"), &["--chat", "0"])] {
        assert_eq!(run("m.gguf", variable, args), (raw.clone(), false), "{variable:?} {args:?}");
    }
    let (plain, _) = run("plain.gguf", None, &[]);
    assert_eq!(run("plain.gguf", Some("auto"), &[]), (plain, false));
    // Many prompts, too.
    lab.write("p.txt", "ab\n");
    let many = |value: &str| {
        succeeds(&lab.run(&["generate", "--model", "m.gguf", "--prompts", "p.txt", "-n", "1", "--chat", value]))
    };
    assert_eq!(many("auto"), many("1"));
    assert_ne!(many("auto"), many("0"));
}
