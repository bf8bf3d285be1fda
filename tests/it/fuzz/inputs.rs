//! What a person writes: prompts, messages, configurations.

use std::path::Path;
use std::sync::OnceLock;

use adaptive_kvcache::compress::{AdaptiveConfig, parse_size};
use adaptive_kvcache::tokenizer::{ChatInput, GgufVocab, ModelIds, Tokenizer};
use rand::Rng;
use serde_json::{Value, json};

use super::harness;
use super::texts::{change, change_text, damage, pick, text};
use crate::support::{data, sentencepiece};

/// Tokenizers of every kind.
fn tokenizers() -> &'static [Tokenizer] {
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    ALL.get_or_init(|| {
        let spm = || sentencepiece::vocab(&data("fixtures/tokenizer.model"));
        let folder = tempfile::tempdir().unwrap();
        let load = |name: &str, content: &[u8]| {
            std::fs::write(folder.path().join(name), content).unwrap();
            let tokenizer = Tokenizer::from_folder(folder.path(), ModelIds::default()).unwrap();
            std::fs::remove_file(folder.path().join(name)).unwrap();
            tokenizer
        };
        let json = |flavour| sentencepiece::tokenizer_json(&spm(), flavour).to_string().into_bytes();
        let tiktoken = std::fs::read(data("fixtures/tokenizers/tiktoken/tokenizer.model")).unwrap();
        vec![
            Tokenizer::from_gguf(spm()).unwrap(),
            Tokenizer::from_gguf(bytes_vocab()).unwrap(),
            load("tokenizer.json", &json("legacy")),
            load("tokenizer.json", &json("first")),
            load("tokenizer.model", &tiktoken),
        ]
    })
}

/// A byte-level vocabulary without tokens for some bytes, with the markers of a chat format.
fn bytes_vocab() -> GgufVocab {
    let printable = (b'!'..=b'~').map(|byte| char::from(byte).to_string());
    let tokens: Vec<String> =
        printable.chain(["Ġ", "Ċ", "th", "<|im_start|>", "<|im_end|>"].map(String::from)).collect();
    let mut vocab = GgufVocab { model: "gpt2".into(), pre: Some("llama-bpe".into()), ..GgufVocab::default() };
    vocab.token_types = tokens.iter().map(|text| if text.starts_with("<|") { 3 } else { 1 }).collect();
    vocab.merges = vec!["t h".into()];
    vocab.add_bos = Some(false);
    vocab.eos_id = u32::try_from(tokens.len() - 1).ok();
    vocab.tokens = tokens;
    vocab
}

#[test]
fn fuzz_prompts() {
    harness::run("prompts", |rng| {
        let text = text(rng);
        for tokenizer in tokenizers() {
            let Ok(ids) = tokenizer.encode(&text) else { continue };
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let _ = (tokenizer.decode(&ids, true), tokenizer.decode(&ids, false));
            // What is refused without tokenising it would not fit.
            let beginning = tokenizer.beginning(&text, ids.len() / 2);
            assert!(text.starts_with(beginning));
            let wanted = rng.random_range(0..2 * ids.len() + 2);
            let first = tokenizer.encode_beginning(&text, wanted).unwrap();
            assert!(first.len() >= wanted.min(ids.len()));
            assert_eq!(first[..wanted.min(ids.len())], ids[..wanted.min(ids.len())], "{text:?}");
        }
    });
}

/// A text that is refused by its bytes has more tokens than that.
#[test]
fn fuzz_prompts_that_are_too_long() {
    harness::run("prompts_that_are_too_long", |rng| {
        let text = text(rng);
        let most = rng.random_range(0..200);
        for tokenizer in tokenizers() {
            if tokenizer.least_tokens(&text) > most {
                let ids = tokenizer.encode(&text).unwrap();
                assert!(ids.len() > most, "{tokenizer:?}: {} of {most}: {text:?}", ids.len());
            }
        }
    });
}

#[test]
fn fuzz_messages() {
    let words: Vec<Value> = [
        json!("user"),
        json!("assistant"),
        json!("system"),
        json!("tool"),
        json!({"role": "user", "content": "hello"}),
        json!({"role": "assistant", "content": null}),
        json!({"type": "text", "text": "hello"}),
        json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        json!("<|im_end|>"),
    ]
    .into();
    harness::run("messages", |rng| {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages = vec![message(pick(rng, &["system", "user"]), &text(rng))];
        for turn in 0..rng.random_range(0..4) {
            messages.push(message(["assistant", "user"][turn % 2], &text(rng)));
        }
        let whole = if rng.random() { json!(messages) } else { json!({"messages": messages}) };
        let whole = change(whole, &words, rng);
        let Ok(input) = ChatInput::from_value(whole, "messages.json") else { return };
        for tokenizer in tokenizers() {
            if let Ok(ids) = tokenizer.chat(&input.context).and_then(|chat| chat.encode(&input.messages)) {
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            }
        }
    });
}

#[test]
fn fuzz_configurations() {
    let words: Vec<Value> = [
        json!("auto"),
        json!("none"),
        json!("special"),
        json!("snapkv"),
        json!("h2o"),
        json!("fastgen"),
        json!("64MB"),
        json!("1.5GB"),
        json!([",", "."]),
        json!(["special", "punctuation", "frequency", "locality", "full"]),
    ]
    .into();
    let files = ["fastgen", "best"].map(|name| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/{name}.json"));
        std::fs::read_to_string(path).unwrap()
    });
    harness::run("configurations", |rng| {
        let file = &files[rng.random_range(0..files.len())];
        let mut bytes = change(serde_json::from_str(file).unwrap(), &words, rng).to_string().into_bytes();
        if rng.random() {
            damage(&mut bytes, rng);
        }
        if let Ok(config) = AdaptiveConfig::parse(&String::from_utf8_lossy(&bytes), Some(Path::new("config.json"))) {
            let _ = serde_json::to_string(&config).unwrap();
        }
        let _ = parse_size(&change_text(pick(rng, &["64MB", "1.5 GB", "7", "1e3kb"]), rng));
    });
}
