//! Conversations of several turns on the real model.

use std::ops::ControlFlow;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::generate::{Conversation, FinishReason, GenerationOptions, SamplingOptions};
use adaptive_kvcache::model::PrefillObserver;
use adaptive_kvcache::tokenizer::ChatMessage;

use crate::support::scripted::{CONTROL, NORMAL, Scripted};
use crate::support::{adaptive, data, smollm2};

fn new(retention: Retention) -> Conversation<'static> {
    let loaded = smollm2();
    Conversation::new(&loaded.model, &loaded.tokenizer, KvDtype::F16, retention, Vec::new()).unwrap()
}

fn options(max_new_tokens: usize) -> GenerationOptions {
    GenerationOptions { max_new_tokens, ..GenerationOptions::default() }
}

/// Asks; what was answered.
fn ask(conversation: &mut Conversation<'_>, question: &str, max_new_tokens: usize) -> String {
    let mut shown = String::new();
    let mut show = |text: &str| {
        shown += text;
        ControlFlow::Continue(())
    };
    conversation.ask(question, &options(max_new_tokens), &mut (), &mut show).unwrap();
    assert_eq!(conversation.messages().last(), Some(&ChatMessage::new("assistant", &*shown)));
    shown
}

/// A fact is stated once in a long first turn; another question comes; then the fact is asked for. Of the default
/// configuration, which evicts little: what it loses of a short text would be lost at the first turn already.
#[test]
fn a_fact_of_the_first_turn_is_known_in_the_third_as_with_the_full_cache() {
    let novel = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    let novel: String = novel.chars().take(1000).map(|c| if c == '\n' { ' ' } else { c }).collect();
    let facts = [
        ("The password of the old castle is Mandarin.", "What is the password of the old castle?", "Mandarin"),
        ("The train to Brighton leaves at nine o'clock.", "When does the train to Brighton leave?", "nine o'clock"),
        ("My sister Clara lives in Lisbon.", "In which city does my sister Clara live?", "Lisbon"),
    ];
    let mut known = 0;
    for (fact, question, answer) in facts {
        let knows = |retention: Retention| {
            let mut conversation = new(retention);
            ask(&mut conversation, &format!("{fact} {novel} What is the capital of France?"), 24);
            ask(&mut conversation, "What is the capital of Italy?", 24);
            let answered = ask(&mut conversation, question, 24);
            (answered.contains(answer), answered, conversation.cache().bytes().saved_ratio())
        };
        let (full, ..) = knows(Retention::Full);
        let (compressed, answered, saved) = knows(adaptive(&smollm2().tokenizer, "{}"));
        assert!(saved > 0.03, "nothing worth mentioning was evicted: {saved}");
        assert!(compressed || !full, "the full cache knew it; compressed: {answered}");
        known += usize::from(full);
    }
    assert!(known >= 2, "the full cache itself knew only {known} of the facts: the test says nothing");
}

/// Nothing is read twice, and the ids are the template's: with a full cache, the answer is that of one long prompt.
#[test]
fn turns_read_what_the_template_makes_of_the_whole() {
    let loaded = smollm2();
    let mut conversation = new(Retention::Full);
    ask(&mut conversation, "Name a fruit.", 40);
    ask(&mut conversation, "And a vegetable.", 40);
    let finished = conversation.turns().iter().all(|turn| turn.finish_reason == FinishReason::Eos && !turn.reread);
    assert!(finished, "{:?}", conversation.messages());
    let seen = conversation.cache().seen();
    let answer = ask(&mut conversation, "Which one is bigger?", 12);
    let messages = &conversation.messages()[..5];
    let ids = loaded.tokenizer.encode_chat(messages).unwrap();
    assert_eq!(seen + conversation.turns()[2].prompt_tokens, ids.len(), "{:?}", loaded.tokenizer.render_chat(messages));

    let mut anew =
        Conversation::new(&loaded.model, &loaded.tokenizer, KvDtype::F16, Retention::Full, messages[..4].to_vec())
            .unwrap();
    assert_eq!(ask(&mut anew, "Which one is bigger?", 12), answer);
}

/// An answer that breaks off in the middle is gone on from: its last token, drawn and not read, comes first.
#[test]
fn an_answer_that_was_cut_off_is_part_of_the_conversation() {
    let loaded = smollm2();
    let mut conversation = new(Retention::Full);
    ask(&mut conversation, "Tell me a story of a dog.", 5);
    assert_eq!(conversation.turns()[0].finish_reason, FinishReason::Length);
    ask(&mut conversation, "Go on.", 5);
    let read = conversation.cache().seen() - 4; // of the second answer, the last token is not read
    let mut expected = loaded.tokenizer.encode_chat(&conversation.messages()[..1]).unwrap();
    expected.extend(loaded.tokenizer.encode(&conversation.messages()[1].text()).unwrap());
    expected.extend(
        loaded.tokenizer.encode("<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n").unwrap(),
    );
    assert_eq!(read, expected.len());
    let stopped = conversation.ask("More.", &options(50), &mut (), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.finish_reason, stopped.answer_tokens), (FinishReason::Interrupted, 1));
}

/// What of a stop text was read is not part of the messages, so the next turn reads these anew.
#[test]
fn after_a_stop_text_the_cache_holds_what_the_messages_say() {
    let loaded = smollm2();
    let mut conversation = new(Retention::Full);
    let stop = GenerationOptions { stop: vec![" France is".to_owned()], ..options(20) };
    let mut ignore = |_: &str| ControlFlow::Continue(());
    let turn = conversation.ask("What is the capital of France?", &stop, &mut (), &mut ignore).unwrap();
    assert_eq!(turn.finish_reason, FinishReason::Stop, "the answer was expected to hold the stop text");
    ask(&mut conversation, "And of Italy?", 5);
    let turn = &conversation.turns()[1];
    let whole = loaded.tokenizer.encode_chat(&conversation.messages()[..3]).unwrap();
    assert!(turn.reread && turn.prompt_tokens == whole.len(), "{turn:?}");
}

/// An observer that fails with what looks like a refused question, after a layer has stored it.
struct Refuse;

impl PrefillObserver for Refuse {
    fn layer_done(
        &mut self,
        _summary: &adaptive_kvcache::cache::LayerSummary,
        _maps: Option<&adaptive_kvcache::attention::map::MapAccumulator>,
    ) -> adaptive_kvcache::Result<()> {
        Err(Error::input("no more"))
    }
}

#[test]
fn a_cache_that_is_filled_halfway_is_not_gone_on_with() {
    let mut conversation = new(Retention::Full);
    ask(&mut conversation, "Name a fruit.", 5);
    let mut ignore = |_: &str| ControlFlow::Continue(());
    conversation.ask("And a vegetable.", &options(5), &mut Refuse, &mut ignore).unwrap_err();
    ask(&mut conversation, "And a vegetable.", 5);
    assert!(conversation.turns()[1].reread);
    assert!(conversation.cache().is_consistent());
}

struct Break;

impl PrefillObserver for Break {
    fn progress(&mut self, done: usize, _total: usize) -> ControlFlow<()> {
        if done > 100 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_turn_that_fails_is_as_if_it_had_not_been() {
    let mut conversation = new(adaptive(&smollm2().tokenizer, "{}"));
    let first = ask(&mut conversation, "Name a fruit.", 20);
    let before = conversation.messages().to_vec();
    let mut ignore = |_: &str| ControlFlow::Continue(());

    let too_long = "word ".repeat(9000);
    let error = conversation.ask(&too_long, &options(5), &mut (), &mut ignore).unwrap_err();
    assert!(matches!(error, Error::Input { .. }), "{error}");
    assert_eq!(conversation.messages(), before);
    assert!(conversation.cache().seen() > 0, "the cache is still good");

    let error = conversation.ask("Another, please.", &options(5), &mut Break, &mut ignore).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert_eq!(conversation.messages(), before);
    ask(&mut conversation, "And a vegetable.", 20);
    assert!(conversation.turns()[1].reread, "half of the question was in the cache");
    assert_eq!(conversation.turns().len(), 2);

    conversation.reset();
    assert_eq!((conversation.messages().len(), conversation.turns().len(), conversation.cache().seen()), (0, 0, 0));
    assert_eq!(ask(&mut conversation, "Name a fruit.", 20), first);
}

/// `q` leads to `w` a little more than to `e`; `w` leads to `r`, so that it is neither the last token of the answer nor
/// part of the next question.
#[test]
fn the_repeat_penalty_looks_at_earlier_turns() {
    let letters = ["q", "w", "e", "r"].map(|letter| (letter, NORMAL));
    let mut model = Scripted::new(&[&[("</s>", CONTROL)], &letters[..]].concat());
    model.says(&["q", "w", "r"]).leads("q", "e", 3.9).leads("e", "r", 4.0);
    let loaded = model.load();
    let mut conversation =
        Conversation::new(&loaded.model, &loaded.tokenizer, KvDtype::F32, Retention::Full, Vec::new()).unwrap();
    let mut answer = |repeat_last_n: usize| {
        let sampling = SamplingOptions { repeat_penalty: 3.0, repeat_last_n, ..SamplingOptions::default() };
        let options = GenerationOptions { sampling, ..options(2) };
        let mut text = String::new();
        let mut show = |part: &str| {
            text += part;
            ControlFlow::Continue(())
        };
        conversation.ask("q", &options, &mut (), &mut show).unwrap();
        text
    };
    assert_eq!(answer(64), "wr");
    assert_eq!(answer(64), "er", "`w` was there a turn ago");
    // q, w, r, q, e, r, q: the latest three of them are looked at.
    assert_eq!(answer(3), "wr");
    conversation.reset();
    let mut show = |_: &str| ControlFlow::Continue(());
    let sampling = SamplingOptions { repeat_penalty: 3.0, ..SamplingOptions::default() };
    let options = GenerationOptions { sampling, ..options(2) };
    conversation.ask("q", &options, &mut (), &mut show).unwrap();
    assert_eq!(conversation.messages().last().unwrap().text(), "wr", "what was forgotten is not looked at");
}
