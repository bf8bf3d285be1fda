//! Tokenizer files: `tokenizer.json` with steps of all kinds in any order, and the binary ones with wrong bytes.

use adaptive_kvcache::error::Error;
use adaptive_kvcache::tokenizer::{ModelIds, Tokenizer};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::harness;
use super::texts::{change, damage, text};
use crate::support::{data, sentencepiece};

/// Parts of a `tokenizer.json`: all kinds of steps, with patterns that are slow, empty or wrong among them.
pub fn words() -> Vec<Value> {
    let patterns = [
        json!({"String": " "}),
        json!({"String": ""}),
        json!({"String": "ab"}),
        json!({"Regex": r"\s+(?!\S)|\s+"}),
        json!({"Regex": r"(?:a|aa)+(?!b)c|hello"}),
        json!({"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"}),
        json!({"Regex": r"(?=(\d{3})+(?!\d))"}),
        json!({"Regex": "x*"}),
        json!({"Regex": r"(a*)*\1$"}),
        json!({"Regex": "(((a{9}){9}){9}){9}"}),
        json!({"Regex": r"(?:(?=a)a){3000}"}),
        json!({"Regex": "("}),
    ];
    let mut words = Vec::new();
    for pattern in patterns {
        words.push(json!({"type": "Replace", "pattern": pattern, "content": "▁▁▁▁▁▁▁▁"}));
        for behavior in ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"] {
            words.push(
                json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": words.len() % 2 == 0}),
            );
        }
        words.push(pattern);
    }
    words.extend(
        ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"]
            .map(|kind| json!({"type": kind})),
    );
    words.extend(
        ["Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts"].map(|kind| json!({"type": kind})),
    );
    words.extend([
        json!({"type": "Prepend", "prepend": "▁"}),
        json!({"type": "Strip", "strip_left": true, "strip_right": true}),
        json!({"type": "Digits", "individual_digits": true}),
        json!({"type": "Punctuation", "behavior": "Contiguous"}),
        json!({"type": "FixedLength", "length": 0}),
        json!({"type": "FixedLength", "length": 1}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
        json!({"id": 7, "content": "ab", "special": false, "normalized": true, "lstrip": true, "rstrip": true, "single_word": true}),
        json!({"id": 3, "content": "▁", "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false}),
        json!([]),
        json!("<unk>"),
        json!("▁"),
        json!(["a", "b"]),
        json!("a b"),
    ]);
    words
}

/// A byte-level `tokenizer.json` of `vocab_size` tokens, with the steps given.
pub fn byte_level(vocab_size: usize, normalizers: &Value, pre_tokenizers: Vec<Value>) -> Value {
    // The byte-level alphabet: visible Latin-1 stands for itself, the other bytes follow from U+0100 on.
    let visible = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut hidden = 0x100..;
    let mut alphabet: Vec<String> = (0..256)
        .map(|byte| if visible(byte) { byte } else { hidden.next().unwrap() })
        .map(|code| char::from_u32(code).unwrap().to_string())
        .collect();
    alphabet.rotate_left(32); // the visible ones first, for small vocabularies
    let tokens = ["<s>", "</s>", "ab", "Ġa"].map(String::from).into_iter().chain(alphabet);
    let vocab: serde_json::Map<_, _> = tokens.take(vocab_size).zip(0..).map(|(text, id)| (text, json!(id))).collect();
    let mut pre_tokenizers = pre_tokenizers;
    pre_tokenizers
        .push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": normalizers,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]]},
    })
}

/// Uses a tokenizer that was loaded.
pub fn use_it(tokenizer: &Tokenizer, rng: &mut StdRng) {
    for text in ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ab hello", &text(rng)] {
        match tokenizer.encode(text) {
            Ok(ids) => {
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
                assert!(tokenizer.least_tokens(text) <= ids.len(), "{text:?}: {}", ids.len());
                let _ = tokenizer.decode(&ids, true);
            }
            Err(error) => assert!(matches!(error, Error::Input { .. }), "{error}"),
        }
    }
}

#[test]
fn fuzz_tokenizer_json() {
    let words = words();
    let spm = sentencepiece::vocab(&data("fixtures/tokenizer.model"));
    let files = [
        byte_level(260, &json!({"type": "Sequence", "normalizers": []}), vec![words[1].clone()]),
        byte_level(200, &Value::Null, Vec::new()),
        sentencepiece::tokenizer_json(&spm, "legacy"),
        sentencepiece::tokenizer_json(&spm, "first"),
    ];
    let folder = tempfile::tempdir().unwrap();
    harness::run("tokenizer_json", |rng| {
        let mut file = files[rng.random_range(0..files.len())].clone();
        // Mostly the small parts: the vocabulary has thousands of places.
        for part in ["normalizer", "pre_tokenizer", "added_tokens", "decoder", "post_processor", "model"] {
            if rng.random_bool(if part == "model" { 0.1 } else { 0.4 }) {
                file[part] = change(file[part].take(), &words, rng);
            }
        }
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_folder(folder.path(), ModelIds::default()) {
            use_it(&tokenizer, rng);
        }
    });
}

#[test]
fn fuzz_tokenizer_files() {
    let legacy = sentencepiece::tokenizer_json(&sentencepiece::vocab(&data("fixtures/tokenizer.model")), "legacy");
    let files = [
        ("tokenizer.model", std::fs::read(data("fixtures/tokenizer.model")).unwrap()),
        ("tokenizer.model", std::fs::read(data("fixtures/tokenizers/tiktoken/tokenizer.model")).unwrap()),
        ("tokenizer.json", legacy.to_string().into_bytes()),
    ];
    let settings = json!({
        "add_bos_token": true, "legacy": false, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_end|>"], "chat_template": [{"name": "default", "template": "yes"}],
        "added_tokens_decoder": {"1000": {"content": "<|im_start|>", "special": true}},
    });
    let words = words();
    harness::run("tokenizer_files", |rng| {
        let folder = tempfile::tempdir().unwrap();
        let (name, original) = &files[rng.random_range(0..files.len())];
        let mut bytes = original.clone();
        damage(&mut bytes, rng);
        std::fs::write(folder.path().join(name), bytes).unwrap();
        if rng.random() {
            let settings = change(settings.clone(), &words, rng).to_string();
            std::fs::write(folder.path().join("tokenizer_config.json"), settings).unwrap();
        }
        if let Ok(tokenizer) = Tokenizer::from_folder(folder.path(), ModelIds::default()) {
            use_it(&tokenizer, rng);
        }
    });
}
