//! Normalisers and pre-tokenizers that give up, fail, or make too much of a text.

use adaptive_kvcache::error::Error;
use adaptive_kvcache::tokenizer::{ModelIds, Tokenizer};
use serde_json::{Value, json};

use crate::fuzz::tokenizers::byte_level;

/// Loads the tokenizer with these steps.
fn load(normalizers: Vec<Value>, pre_tokenizers: Vec<Value>) -> Result<Tokenizer, Error> {
    let normalizer = json!({"type": "Sequence", "normalizers": Value::Array(normalizers)});
    load_file(&byte_level(260, &normalizer, pre_tokenizers))
}

fn load_file(file: &Value) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    Tokenizer::from_folder(folder.path(), ModelIds::default())
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn replace(pattern: &Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

#[track_caller]
fn refused_on(tokenizer: &Tokenizer, text: &str, part: &str) {
    match tokenizer.encode(text) {
        Err(Error::Input { reason, .. }) => assert!(reason.contains(part), "expected `{part}` in: {reason}"),
        other => panic!("expected a refusal that names `{part}`, got {other:?}"),
    }
}

#[track_caller]
fn refused_at_loading(loaded: Result<Tokenizer, Error>, part: &str) {
    match loaded {
        Err(error @ Error::BadFile { .. }) => {
            let sentence = error.to_string();
            assert!(sentence.contains(part) && sentence.contains("tokenizer.json"), "expected `{part}` in: {sentence}");
        }
        other => panic!("expected a refusal that names `{part}`, got {other:?}"),
    }
}

/// Ways for a search to take steps without end: `x` repeated in more than one way, then something that is not there.
const GIVES_UP: &str = r"(?:x|xx)+(?!q)z";

#[test]
fn a_pattern_that_gives_up_is_an_error_wherever_it_stands() {
    let text = format!("ab {} ab", "x".repeat(60));
    let in_words = load(Vec::new(), vec![split(GIVES_UP)]).unwrap();
    let inverted = json!({"type": "Split", "pattern": {"Regex": GIVES_UP}, "behavior": "Removed", "invert": true});
    let in_words_inverted = load(Vec::new(), vec![inverted]).unwrap();
    let normalizing = load(vec![replace(&json!({"Regex": GIVES_UP}), "ab")], Vec::new()).unwrap();
    for tokenizer in [&in_words, &in_words_inverted, &normalizing] {
        refused_on(tokenizer, &text, "gives up");
        refused_on(tokenizer, &text, "(?:x|xx)+");
    }
    assert_eq!(in_words.encode("ab ab").unwrap(), load(Vec::new(), Vec::new()).unwrap().encode("ab ab").unwrap());
}

/// GPT-2's own pattern looks behind white space, step by step.
#[test]
fn so_is_the_pattern_that_is_built_in() {
    let spaces = " ".repeat(1_200_000);
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    refused_on(&load(Vec::new(), vec![bytes]).unwrap(), &spaces, "gives up");
}

#[test]
fn a_pattern_that_is_found_where_nothing_is_replaces_nothing() {
    for pattern in [json!({"String": ""}), json!({"Regex": "x*"}), json!({"Regex": "(?=)"}), json!({"Regex": "|a"})] {
        refused_at_loading(load(vec![replace(&pattern, "y")], Vec::new()), "found where nothing is");
    }
    // Where words are split there is a use for it: between all characters.
    let single = json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": false});
    let tokenizer = load(Vec::new(), vec![single]).unwrap();
    assert_eq!(tokenizer.encode("ab").unwrap().len(), 2, "not merged across words");
}

#[test]
fn a_text_must_not_grow_without_bound() {
    let eight = |from: &str, to: &str| replace(&json!({"String": from}), &to.repeat(8));
    let text = "a".repeat(20_000);
    refused_on(&load(vec![eight("a", "b"), eight("b", "a")], Vec::new()).unwrap(), &text, "longer than");
    let nine: Vec<Value> = (0..9).map(|step| if step % 2 == 0 { eight("a", "b") } else { eight("b", "a") }).collect();
    refused_on(&load(nine, Vec::new()).unwrap(), "aa", "longer than");
    // Bytes of two bytes each, again and again.
    let spelt: Vec<Value> = (0..40).map(|_| json!({"type": "ByteLevel"})).collect();
    refused_on(&load(spelt, Vec::new()).unwrap(), &"é".repeat(2000), "longer than");
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
    refused_on(&load(Vec::new(), vec![bytes; 40]).unwrap(), &"é".repeat(2000), "longer than");
    // What Unicode makes of a character is fine: one of three bytes becomes 18 characters.
    let tokenizer = load(vec![json!({"type": "NFKD"})], Vec::new()).unwrap();
    assert!(tokenizer.encode(&"\u{fdfa}".repeat(30_000)).unwrap().len() > 500_000);

    refused_at_loading(load(vec![json!({"type": "Prepend", "prepend": "a".repeat(5000)})], Vec::new()), "5000 bytes");
    refused_at_loading(load(vec![eight("a", &"b".repeat(1000))], Vec::new()), "8000 bytes");
    refused_at_loading(load(vec![json!({"type": "NFC"}); 65], Vec::new()), "65 steps");
    refused_at_loading(load(Vec::new(), vec![split(&"a|".repeat(10_000))]), "20000 bytes");
}

#[test]
fn what_the_crate_panics_on_is_an_error() {
    let tokenizer = load(Vec::new(), vec![json!({"type": "FixedLength", "length": 0})]).unwrap();
    refused_on(&tokenizer, "ab ab", "the tokenizer fails on it");
}

#[test]
fn steps_in_steps_are_taken_in_order_and_refused_if_deep() {
    let nested = |depth: usize| {
        let step = replace(&json!({"String": "x"}), "ab");
        (0..depth).fold(step, |inner, _| json!({"type": "Sequence", "normalizers": [inner]}))
    };
    let tokenizer = load(vec![nested(20)], Vec::new()).unwrap();
    assert_eq!(tokenizer.encode("x").unwrap(), tokenizer.encode("ab").unwrap());
    refused_at_loading(load(vec![nested(100)], Vec::new()), "recursion limit");
}

/// Tokens that are looked for in the normalised text, as the crate finds them.
#[test]
fn added_tokens_are_found_in_the_normalised_text() {
    let mut file = byte_level(260, &json!({"type": "Lowercase"}), Vec::new());
    let added = json!({"id": 260, "content": "ZEBRA", "single_word": true, "lstrip": true, "rstrip": false,
        "normalized": true, "special": false});
    file["added_tokens"].as_array_mut().unwrap().push(added);
    let tokenizer = load_file(&file).unwrap();
    let plain = load(vec![json!({"type": "Lowercase"})], Vec::new()).unwrap();
    let with =
        |before: &str, behind: &str| [plain.encode(before).unwrap(), vec![260], plain.encode(behind).unwrap()].concat();
    assert_eq!(tokenizer.encode("A zEbra B").unwrap(), with("a", " b"));
    assert_eq!(tokenizer.encode("zebras").unwrap(), plain.encode("zebras").unwrap());
}

/// Old files do not say what their model is; it must not be taken for one of words because something in it is wrong.
#[test]
fn a_model_without_a_type_is_bpe_or_refused() {
    let mut file = byte_level(260, &Value::Null, Vec::new());
    file["model"].as_object_mut().unwrap().remove("type");
    assert_eq!(load_file(&file).unwrap().encode("ab").unwrap(), [2]);
    file["model"]["end_of_word_suffix"] = json!(-7);
    refused_at_loading(load_file(&file), "cannot be built");
}
