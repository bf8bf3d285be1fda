//! A SentencePiece `tokenizer.model` as other files would hold it: GGUF, Hugging Face's `tokenizer.json`.

use std::collections::HashMap;
use std::path::Path;

use adaptive_kvcache::tokenizer::{GgufVocab, read_sentencepiece};
use serde_json::{Map, Value, json};

/// A `SentencePiece` model file as the GGUF converter would store it.
pub fn vocab(path: &Path) -> GgufVocab {
    read_sentencepiece(path).unwrap()
}

/// The `tokenizer.json` that transformers makes of it: all pairs of pieces that make a piece, by score. `flavour` is
/// `legacy` (a normaliser prepends the space) or the prepend scheme of a `Metaspace` pre-tokenizer.
pub fn tokenizer_json(vocab: &GgufVocab, flavour: &str) -> Value {
    let ids: HashMap<&str, usize> = vocab.tokens.iter().enumerate().map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, piece) in vocab.tokens.iter().enumerate().filter(|(id, _)| vocab.token_types[*id] == 1) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                merges.push((vocab.scores[id], id, *a, *b, json!([left, right])));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2, x.3).cmp(&(y.1, y.2, y.3))));
    let merges: Vec<Value> = merges.into_iter().map(|(.., pair)| pair).collect();
    let tokens: Map<String, Value> = vocab.tokens.iter().enumerate().map(|(id, t)| (t.clone(), id.into())).collect();
    let added = |id: usize, content: &str, special: bool, normalized: bool| {
        json!({"id": id, "content": content, "special": special, "normalized": normalized,
               "lstrip": content == "zebra", "rstrip": content == "<|im_end|>", "single_word": content == "zebra"})
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": flavour, "split": false});
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let legacy = flavour == "legacy";
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [
            added(0, "<unk>", true, false), added(1, "<s>", true, false), added(2, "</s>", true, false),
            added(1000, "<|im_start|>", true, false), added(1001, "<|im_end|>", true, false),
            added(1002, "<tool>", false, true), added(1003, "zebra", false, false)],
        "normalizer": if legacy { normalizer } else { Value::Null },
        "pre_tokenizer": if legacy { Value::Null } else { metaspace },
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": tokens, "merges": merges},
    })
}
