//! The library as a program uses it: through the prelude, and as the examples do.

use adaptive_kvcache::compress::TokenIds;
use adaptive_kvcache::compress::budget::methods::ALWAYS;
use adaptive_kvcache::prelude::*;

use crate::support::{data, smollm2};

#[path = "../../examples/compressed_prompt.rs"]
#[allow(dead_code, reason = "what prints is not called")]
mod compressed_prompt;
#[path = "../../examples/many_questions.rs"]
#[allow(dead_code, reason = "what prints is not called")]
mod many_questions;
#[path = "../../examples/own_method.rs"]
#[allow(dead_code, reason = "what prints is not called")]
mod own_method;

fn novel(chars: usize) -> String {
    std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap().chars().take(chars).collect()
}

#[test]
fn classes_of_tokens_are_the_configurations_or_else_the_tokenizers() {
    let tokenizer = &smollm2().tokenizer;
    let (comma, word) = (tokenizer.encode_plain(",").unwrap()[0], tokenizer.encode_plain("club").unwrap()[0]);
    let end = tokenizer.eos_ids()[0];
    let classes = |config: &AdaptiveConfig| {
        let classifier = tokenizer.classifier(config);
        [comma, word, end].map(|id| (classifier.classify(id).special, classifier.classify(id).punctuation))
    };
    let auto = FastGen::default();
    assert_eq!(classes(&AdaptiveConfig::default()), [(false, true), (false, false), (true, false)]);
    let no_comma = FastGen { punctuation_list: vec![".".to_owned()], ..auto.clone() };
    assert_eq!(classes(&no_comma.into()), [(false, false), (false, false), (true, false)]);
    let listed = FastGen {
        special_token_ids: TokenIds::List(vec![word]),
        punctuation_token_ids: TokenIds::List(vec![word, end]),
        ..auto
    };
    assert_eq!(classes(&listed.into()), [(false, false), (true, true), (false, true)]);
}

#[test]
fn a_cache_is_of_the_kind_that_was_asked_for() {
    let loaded = smollm2();
    let ids = loaded.tokenizer.encode(&novel(2000)).unwrap();
    let kept_ratio = |mut cache: AdaptiveKvCache| {
        loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap();
        cache.kept_ratio()
    };
    assert_eq!(kept_ratio(loaded.full_cache(KvDtype::F16).unwrap()), 1.0);
    let config = AdaptiveConfig::parse(r#"{"method": "replay", "kept_ratio": 0.5}"#, None).unwrap();
    let half = kept_ratio(loaded.cache(KvDtype::F16, &config).unwrap());
    assert!((0.49..=0.5).contains(&half), "{half}");
}

#[test]
fn the_example_of_a_compressed_prompt_keeps_what_it_says() {
    let text = novel(2000);
    let (whole, all) = compressed_prompt::go_on(smollm2(), &text, 1.0).unwrap();
    let (_, quarter) = compressed_prompt::go_on(smollm2(), &text, 0.25).unwrap();
    assert_eq!(all.kept, all.raw);
    // What is written is kept whole.
    assert!(quarter.raw == all.raw && (0.25..0.4).contains(&(quarter.kept as f64 / quarter.raw as f64)));
    let ids = smollm2().tokenizer.encode(&text).unwrap();
    let mut cache = smollm2().full_cache(KvDtype::F16).unwrap();
    let logits = smollm2().model.prefill(&ids, &mut cache, &mut ()).unwrap().logits;
    let options = GenerationOptions { max_new_tokens: 48, ..GenerationOptions::default() };
    let Loaded { model, tokenizer, .. } = smollm2();
    let plain: String =
        Generation::new(model, tokenizer, &mut cache, &ids, logits, options).map(|step| step.unwrap().text).collect();
    assert_eq!(whole, plain);
}

#[test]
fn the_example_of_many_questions_answers_each_as_if_it_were_the_only_one() {
    let text = "The Harbour Line is a small railway. It was opened in 1931. Its director is Clara Hoste.";
    let text = many_questions::CompressedText::read(smollm2(), text, 0.8).unwrap();
    let seen = text.cache.seen();
    let opened = text.ask("When was the railway opened?").unwrap();
    let director = text.ask("Who is the director of the railway?").unwrap();
    assert!(opened.contains("1931") && director.contains("Clara Hoste"), "{opened}\n{director}");
    assert_eq!(text.ask("When was the railway opened?").unwrap(), opened);
    assert_eq!(text.cache.seen(), seen);
}

#[test]
fn the_example_of_a_method_of_ones_own_chooses_what_is_kept() {
    let method = own_method::ValueWeighted { sink_tokens: 1 };
    assert!(method_by_name(method.name()).is_none(), "it is to be one from outside");
    let facts = MethodFacts {
        len: 4,
        num_rows: 4,
        budget: 2,
        head_dim: 2,
        attention: &[0.5, 0.5, 0.4, 0.1],
        values: &[1.0, 0.0, 3.0, 4.0, 0.0, 0.5, 0.0, 10.0],
        ..MethodFacts::default()
    };
    assert_eq!(method.scores(&facts), [ALWAYS, 2.5, 0.2, 1.0]);

    let loaded = smollm2();
    let ids = loaded.tokenizer.encode(&novel(2000)).unwrap();
    let methods = [METHODS, &[&method]].concat();
    let text = r#"{"method": "value_weighted", "kept_ratio": 0.25, "sink_tokens": 3}"#;
    let config = AdaptiveConfig::parse_with(text, None, &methods).unwrap();
    assert!(AdaptiveConfig::parse(text, None).is_err());
    let misspelt = AdaptiveConfig::parse_with(&text.replace("sink_tokens", "sink_token"), None, &methods).unwrap_err();
    assert_eq!(misspelt.hint(), Some("did you mean `sink_tokens`?"));
    let mut cache = loaded.cache(KvDtype::F16, &config).unwrap();
    let prefill = loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap();
    let kept = ids.len() / 4;
    assert!(prefill.layers.iter().flat_map(|layer| &layer.heads).all(|head| head.positions.len() == kept));
    assert!(prefill.layers.iter().flat_map(|layer| &layer.heads).all(|head| head.positions[..3] == [0, 1, 2]));
}
