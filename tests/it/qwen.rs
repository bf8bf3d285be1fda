//! Qwen's chat templates and tokenizer, as its folders and GGUF files have them, against transformers.
//!
//! `tests/data/qwen` tells where the templates are from, and has the scripts that made what is expected.

use std::path::{Path, PathBuf};

use adaptive_kvcache::checkpoint;
use adaptive_kvcache::tokenizer::{ChatFormat, ChatInput, ChatMessage, ChatTemplate, ModelIds, Tokenizer};
use serde_json::{Map, Value, json};

use crate::support::{data, ids, json as read_json};

fn qwen(name: &str) -> PathBuf {
    data("qwen").join(name)
}

fn tiny() -> Tokenizer {
    let ids = ModelIds { bos_id: None, eos_ids: Vec::new(), num_embeddings: None };
    Tokenizer::from_folder(&qwen("tiny"), ids).unwrap()
}

/// With and without tools, system messages, turns, calls of tools and what they gave; and Qwen 3's thoughts, which are
/// left away of earlier turns, and may be forbidden.
#[test]
fn templates_give_what_transformers_makes_of_them() {
    let golden = read_json(qwen("templates.json"));
    let mut tokenizer = tiny();
    let mut thoughts = [0; 2];
    for case in golden["cases"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        tokenizer.set_chat_template(ChatTemplate::from_file(qwen(template)).unwrap());
        let input = ChatInput::from_value(case["input"].clone(), "case.json").unwrap();
        assert!(input.unread.is_empty(), "{:?}", input.unread);
        let (expected, rendered) = (case["text"].as_str().unwrap(), tokenizer.chat(&input.context).unwrap());
        assert_eq!(rendered.render(&input.messages).unwrap(), expected, "{template}: {}", case["input"]);
        thoughts[usize::from(expected.ends_with("<think>\n\n</think>\n\n"))] += 1;
    }
    assert!(thoughts.into_iter().all(|count| count > 10), "{thoughts:?}");
}

fn expect_ids(tokenizer: &Tokenizer, texts: &Value, expected: &Value) {
    for (text, expected) in texts.as_array().unwrap().iter().zip(expected.as_array().unwrap()) {
        let text = text.as_str().unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids(expected), "{text:?}");
    }
}

/// NFC, pieces of text, bytes, and tokens that are added, special or not.
#[test]
fn a_folders_tokenizer_gives_the_ids_of_the_tokenizers_library() {
    let (tokenizer, golden) = (tiny(), read_json(qwen("ids.json")));
    expect_ids(&tokenizer, &golden["texts"], &golden["tiny"]);
    assert_eq!(tokenizer.chat_format(), ChatFormat::Own);
    // A message's text is never a marker, a template's is.
    let ids = tokenizer.encode_chat(&[ChatMessage::new("user", "<|im_end|>")]).unwrap();
    let end = tokenizer.encode("<|im_end|>").unwrap();
    assert_eq!((end.len(), ids.iter().filter(|id| **id == end[0]).count()), (1, 1));
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")
}

/// `tokenizer.json` as Qwen has it, with the vocabulary of the GGUF file.
fn folder_of_the_vocabulary(checkpoint: &checkpoint::Checkpoint) -> tempfile::TempDir {
    let file = checkpoint.gguf().unwrap();
    let texts = |key: &str| -> Vec<String> {
        file.texts(key).unwrap().map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
    };
    let (tokens, merges) = (texts("tokenizer.ggml.tokens"), texts("tokenizer.ggml.merges"));
    let types = file.array("tokenizer.ggml.token_type", "numbers", |value| match value {
        checkpoint::gguf::Value::Signed(kind) => Some(*kind),
        _ => None,
    });
    let added: Vec<Value> = tokens
        .iter()
        .zip(types.unwrap())
        .enumerate()
        .filter(|(_, (_, kind))| [3, 4].contains(kind))
        .map(|(id, (text, kind))| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": kind == 3})
        })
        .collect();
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, text)| (text.clone(), id.into())).collect();
    // All but the vocabulary is the tiny one's, which is Qwen's.
    let mut written = read_json(qwen("tiny/tokenizer.json"));
    written["added_tokens"] = added.into();
    written["model"]["vocab"] = vocab.into();
    written["model"]["merges"] =
        merges.iter().map(|merge| merge.split(' ').collect::<Vec<_>>()).collect::<Vec<_>>().into();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), written.to_string()).unwrap();
    folder
}

/// The file's tokenizer and a folder's with the same vocabulary. As with llama.cpp, the file's does not normalise.
#[test]
#[ignore = "needs `scripts/get_model.sh qwen2.5-coder-0.5b`"]
fn the_real_vocabulary_gives_the_same_ids_from_a_file_and_from_a_folder() {
    let golden = read_json(qwen("ids.json"));
    let checkpoint = checkpoint::open(model()).unwrap();
    let of_file = checkpoint.tokenizer().unwrap();
    expect_ids(&of_file, &golden["texts"], &golden["gguf"]);
    let folder = folder_of_the_vocabulary(&checkpoint);
    let ids = ModelIds { bos_id: None, eos_ids: vec![151_645], num_embeddings: Some(151_936) };
    let of_folder = Tokenizer::from_folder(folder.path(), ids).unwrap();
    expect_ids(&of_folder, &golden["texts"], &golden["real"]);
}

/// The file's own template is the one that is tested above.
#[test]
#[ignore = "needs `scripts/get_model.sh qwen2.5-coder-0.5b`"]
fn the_real_file_has_the_template() {
    let checkpoint = checkpoint::open(model()).unwrap();
    let own = checkpoint.gguf().unwrap().string("tokenizer.chat_template").unwrap().unwrap();
    assert_eq!(own, std::fs::read_to_string(qwen("qwen2.5.jinja")).unwrap());
    let (tokenizer, messages) = (checkpoint.tokenizer().unwrap(), [ChatMessage::new("user", "Hi <|im_end|>")]);
    let ids = tokenizer.encode_chat(&messages).unwrap();
    let markers: Vec<u32> = ids.iter().copied().filter(|&id| id >= 151_643).collect();
    assert_eq!(markers, [151_644, 151_645, 151_644, 151_645, 151_644]);
}
