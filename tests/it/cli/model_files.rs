//! Model files as people have them: what is wrong with them, and is only told; and those that would take all memory.
//!
//! Not for: files that are cut off or damaged (see `hostile`).

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::hostile::refused;
use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, Refusal, succeeds};

/// A list of texts, whatever their bytes.
fn texts(values: &[&[u8]]) -> Meta {
    let mut bytes = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    for value in values {
        bytes.extend((value.len() as u64).to_le_bytes());
        bytes.extend(*value);
    }
    Meta::Raw(9, bytes)
}

fn text(value: &[u8]) -> Meta {
    Meta::Raw(8, [&(value.len() as u64).to_le_bytes()[..], value].concat())
}

fn i32(value: i32) -> Meta {
    Meta::Raw(5, value.to_le_bytes().to_vec())
}

/// Runs `generate` on a model; the ids of the prompt, the text, and standard error.
fn generate(lab: &Lab, file: &TinyGguf, prompt: &str, more: &[&str]) -> (serde_json::Value, String, String) {
    let model = lab.write("tiny.gguf", file.bytes());
    let args =
        ["generate", "--model", model.to_str().unwrap(), "--prompt", prompt, "--ignore-eos", "--report", "r.json"];
    let output = lab.run(&[&args[..], &["-n", "8"], more].concat());
    let text = succeeds(&output);
    (lab.json("r.json")["prompt_tokens"].clone(), text, String::from_utf8(output.stderr).unwrap())
}

fn notes(stderr: &str) -> Vec<&str> {
    stderr.lines().filter(|line| line.starts_with("note: ")).collect()
}

#[test]
fn special_tokens_outside_the_vocabulary_are_left_out() {
    let lab = Lab::new();
    let (ids, expected, stderr) = generate(&lab, &TinyGguf::new(), "ab ab c", &[]);
    assert!(notes(&stderr).is_empty(), "{stderr}");
    for key in ["bos", "eos", "eot", "unknown"].map(|name| format!("tokenizer.ggml.{name}_token_id")) {
        for (value, shown) in [(Meta::U32(8), "8"), (Meta::U32(u32::MAX), "4294967295"), (i32(-1), "-1")] {
            let mut file = TinyGguf::new();
            file.set("tokenizer.ggml.add_bos_token", Meta::Raw(7, vec![0])).set(&key, value);
            let (got, text, stderr) = generate(&lab, &file, "ab ab c", &[]);
            assert_eq!((got, text), (ids.clone(), expected.clone()));
            let notes = notes(&stderr);
            assert!(notes.len() == 1 && notes[0].contains(&key) && notes[0].contains(shown), "{notes:?}");
        }
    }
    // A prompt cannot begin with a BOS that there is not.
    let mut file = TinyGguf::new();
    file.set("tokenizer.ggml.add_bos_token", Meta::Raw(7, vec![1])).set("tokenizer.ggml.bos_token_id", Meta::U32(99));
    assert_eq!(generate(&lab, &file, "ab ab c", &[]).0, ids);
    // Those of SentencePiece's kind have one by its spelling, as in llama.cpp.
    let mut file = TinyGguf::sentence_piece();
    let whole = generate(&lab, &file, "ab ab c", &[]).0;
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(99));
    assert_eq!(generate(&lab, &file, "ab ab c", &[]).0, whole);
}

#[test]
fn spellings_are_bytes() {
    let lab = Lab::new();
    let (plain, ..) = generate(&lab, &TinyGguf::new(), "ab c", &[]);
    let tokens: [&[u8]; 8] =
        [b"<|endoftext|>\0", b"a", b"b\0", b"\xe9\xff", b"ab", "\u{120}".as_bytes(), b"", "\u{120}ab".as_bytes()];
    let mut file = TinyGguf::new();
    file.set("tokenizer.ggml.tokens", texts(&tokens))
        .set("tokenizer.ggml.merges", texts(&[b"a b", "\u{120} ab\0".as_bytes(), b"\xe9 a"]))
        .set("general.architecture", text(b"llama\0"))
        .set("tokenizer.ggml.model", text(b"gpt2\0\0"))
        .set("general.name", text(b"caf\xe9"));
    let (ids, _, stderr) = generate(&lab, &file, "ab ab", &[]);
    assert_eq!(ids, serde_json::json!([4, 7]), "as in the file whose texts are all well: {plain}");
    let notes = notes(&stderr);
    assert_eq!(notes.len(), 2, "{stderr}");
    assert!(notes[0].contains("token 3") && notes[0].contains("not UTF-8"), "{notes:?}");
    assert!(notes[1].contains("1 merges"), "{notes:?}");
    // What such a token prints, and that no text is one: not even the character that stands for what is not UTF-8.
    let model = lab.write("bytes.gguf", file.bytes());
    let loaded = adaptive_kvcache::checkpoint::open(&model).unwrap().tokenizer().unwrap();
    assert_eq!((loaded.id_bytes(3), loaded.id_bytes(6), loaded.id_bytes(2)), (&b"\xe9\xff"[..], &b""[..], &b"b"[..]));
    assert!(!loaded.encode("\u{fffd}a\u{fffd}").unwrap().contains(&3));
    assert_eq!((loaded.vocab_size(), loaded.token_id("b"), loaded.token_id("")), (8, Some(2), None));
    assert!(succeeds(&lab.run(&["inspect", "--model", model.to_str().unwrap()])).contains("caf\u{fffd}"));

    // Of SentencePiece's kind: two that are empty, one of bytes behind a space, and a NUL that makes a difference.
    let mut file = TinyGguf::sentence_piece();
    let tokens: [&[u8]; 8] = [b"<unk>", b"<s>", b"</s>", "\u{2581}".as_bytes(), b"a", b"a\0", b"", b"\xe2\x96\x81\xe9"];
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    let model = lab.write("pieces.gguf", file.bytes());
    let loaded = adaptive_kvcache::checkpoint::open(&model).unwrap().tokenizer().unwrap();
    assert_eq!((loaded.id_bytes(5), loaded.id_bytes(7)), (&b"a\0"[..], &b" \xe9"[..]));
    assert_eq!(loaded.encode("a").unwrap(), [1, 3, 4]);
}

#[test]
fn what_a_vocabulary_leaves_open_is_told() {
    let lab = Lab::new();
    let mut file = TinyGguf::new();
    file.remove("tokenizer.ggml.pre");
    for pre in [None, Some(Meta::Text(""))] {
        if let Some(pre) = pre {
            file.set("tokenizer.ggml.pre", pre);
        }
        let model = lab.write("tiny.gguf", file.bytes());
        let path = model.to_str().unwrap();
        for args in [
            &["generate", "--model", path, "--prompt", "ab", "-n", "1"][..],
            &["compare", "--model", path, "--prompt", "ab", "-n", "1"],
            &["inspect", "--model", path],
        ] {
            let output = lab.run(args);
            succeeds(&output);
            let stderr = String::from_utf8(output.stderr).unwrap();
            let notes = notes(&stderr);
            assert!(notes.len() == 1 && notes[0].contains("tokenizer.ggml.pre"), "{args:?}: {stderr}");
            assert!(
                notes[0].contains("GENERATION QUALITY WILL BE DEGRADED") && notes[0].contains("convert"),
                "{notes:?}"
            );
        }
    }
    // Without scores llama.cpp joins from left to right: of `ab` in `aab`, `aa` comes first if it is a piece.
    let mut file = TinyGguf::sentence_piece();
    let tokens: [&[u8]; 8] = [b"<unk>", b"<s>", b"</s>", "\u{2581}".as_bytes(), b"a", b"b", b"ab", b"aa"];
    file.set("tokenizer.ggml.tokens", texts(&tokens)).remove("tokenizer.ggml.scores");
    let (ids, _, stderr) = generate(&lab, &file, "aab", &[]);
    assert_eq!(ids, serde_json::json!([1, 3, 7, 5]));
    assert!(notes(&stderr).iter().any(|note| note.contains("tokenizer.ggml.scores")), "{stderr}");
    // Whole numbers are scores as well, and more than there are tokens do no harm.
    let scores: Vec<i32> = vec![0, 0, 0, -5, -4, -3, -1, -2, 7, 7];
    file.set("tokenizer.ggml.scores", Meta::I32s(scores));
    assert_eq!(generate(&lab, &file, "aab", &[]).0, serde_json::json!([1, 3, 4, 6]));
    file.set("tokenizer.ggml.scores", Meta::F32s(vec![0.0; 7]));
    refused(&lab, &lab.write("short.gguf", file.bytes())).names("tokenizer.ggml.scores").names("expected 8, got 7");
}

#[test]
fn aliases_of_known_rules_are_known() {
    let lab = Lab::new();
    for pre in
        ["mellum", "megrez", "kormo", "pixtral", "midm-2.0", "exaone4", "minerva-7b", "deepseek-llm", "deepseek-coder"]
    {
        let mut file = TinyGguf::new();
        file.set("tokenizer.ggml.pre", Meta::Text(pre)).set("tokenizer.ggml.add_bos_token", Meta::Raw(7, vec![0]));
        let (ids, _, stderr) = generate(&lab, &file, "ab ab", &[]);
        assert_eq!(ids, serde_json::json!([4, 7]), "{pre}");
        assert!(notes(&stderr).is_empty(), "{pre}: {stderr}");
    }
}

#[test]
fn a_context_beyond_the_files_is_noted() {
    let lab = Lab::new();
    let model = lab.write("tiny.gguf", TinyGguf::new().bytes());
    let path = model.to_str().unwrap();
    let long = "ab ".repeat(80);
    let run =
        |more: &[&str]| lab.run(&[&["generate", "--model", path, "--prompt", &long, "-n", "4"][..], more].concat());
    assert_eq!(run(&[]).status.code(), Some(2));
    let output = run(&["--context", "200", "--ignore-eos"]);
    succeeds(&output);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(notes(&stderr).iter().any(|note| note.contains("200") && note.contains("64")), "{stderr}");
    lab.refuses(&["generate", "--model", path, "--prompt", "ab ab ab", "--context", "2"]).status(2).names("2");
    lab.refuses(&["generate", "--model", path, "--context", "2000000000"]).status(2).names("2000000000");
    let shown = succeeds(&lab.run(&["inspect", "--model", path, "--context", "1000000"]));
    assert!(shown.contains("1000000"), "{shown}");
    for args in [
        vec!["bench", "--model", path, "--context", "100", "--contexts", "80", "-n", "1", "--runs", "1"],
        vec![
            "eval",
            "--model",
            path,
            "--context",
            "100",
            "--prompt-tokens",
            "60",
            "--score-tokens",
            "8",
            "--greedy-tokens",
            "4",
        ],
    ] {
        succeeds(&lab.run(&args));
    }
}

/// Claims `entries` metadata entries in a file that has room for them, and holds nothing but zeros.
fn sparse(lab: &Lab, header: &[u8], len: u64) -> std::path::PathBuf {
    let path = lab.write("sparse.gguf", header);
    File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
    path
}

/// As [`refused`], with enough address space to map a large file, and less than a reservation by its counts takes.
fn refused_large(lab: &Lab, model: &Path) -> Refusal {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 6291456 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
    command.args(["inspect", "--model"]).arg(model);
    lab.prepare(&mut command);
    let refusal = Refusal::of(&command.output().unwrap(), &model.display().to_string());
    refusal.status(1).names(model).is_short();
    refusal
}

#[test]
fn counts_reserve_nothing() {
    let lab = Lab::new();
    let count = |tensors: u64, entries: u64| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    };
    refused_large(&lab, &sparse(&lab, &count(0, 330_000_000), 4_300_000_000))
        .names("330000000")
        .hints("fetch it again");
    refused_large(&lab, &sparse(&lab, &count(170_000_000, 0), 4_300_000_000)).names("170000000");
    // Lists of many texts, or of many lists, that are all empty.
    let list = |key: &str, kind: u32, len: u64| {
        let mut file = TinyGguf::new();
        let header = [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
        file.metadata = vec![(key.to_owned(), Meta::Raw(9, header))];
        file.header()
    };
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "general.tags"] {
        refused(&lab, &sparse(&lab, &list(key, 8, 30_000_000), 300_000_000)).names("30000000");
    }
    refused(&lab, &sparse(&lab, &list("general.tags", 9, 30_000_000), 400_000_000)).names("30000000");
    // As many as are read, and no vocabulary.
    refused(&lab, &sparse(&lab, &list("general.tags", 8, 2_000_000), 300_000_000));
    // A list of numbers that is not believed to be about the tokens.
    let mut file = TinyGguf::new();
    file.set("tokenizer.ggml.scores", Meta::F32s(vec![0.0; 3_000_000]));
    refused(&lab, &lab.write("scores.gguf", file.bytes())).names("tokenizer.ggml.scores").names("3000000");
    let mut file = TinyGguf::new();
    file.set("tokenizer.ggml.tokens", Meta::Texts(vec!["a"; 1_100_000]));
    refused(&lab, &lab.write("tokens.gguf", file.bytes())).names("1100000");
}

#[test]
fn block_formats_are_called_by_their_names() {
    let lab = Lab::new();
    for (number, name) in
        [(21, "IQ3_S"), (16, "IQ2_XXS"), (35, "TQ2_0"), (40, "NVFP4"), (31, "Q4_0_4_4"), (99, "number 99")]
    {
        let mut file = TinyGguf::new();
        file.tensor("blk.0.attn_q.weight").format = number;
        refused(&lab, &lab.write("blocks.gguf", file.bytes())).names(name).names("attn_q").hints("Q4_K_M");
    }
}
