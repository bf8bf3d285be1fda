//! Sequences go on while a prompt is read, and a prompt that does not fit yet is held: neither changes a text.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::Retention;
use adaptive_kvcache::checkpoint::Loaded;
use adaptive_kvcache::generate::{BatchLimits, BatchSummary, FinishReason, FinishedText};
use adaptive_kvcache::model::{PrefillObserver, PrefillOptions};
use proptest::prelude::*;

use crate::batch::{alone, batch, fixture, prompts, token_bytes};
use crate::support::adaptive;
use crate::support::clock::Looks;
use crate::support::scripted::{CONTROL, NORMAL, Scripted};

/// Keeps little of a text, and all of its special tokens.
const SPARING: &str = r#"{"criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0}"#;
const SEARCH: &str =
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#;
const EVICTING: &str = r#"{"method": "h2o", "kept_ratio": 0.5, "decode": "evict"}"#;

fn rows(chunk: usize) -> PrefillOptions {
    PrefillOptions { chunk: chunk.try_into().unwrap() }
}

/// What is told of a batch, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// A prompt went through a layer in part.
    Progress(usize),
    /// A prompt went through all layers.
    Read(usize),
    /// The caller was asked before a prompt or step.
    Asked,
    /// A text ended.
    Ended(usize),
}

/// Notes how a prompt is read.
struct Watch<'a>(&'a RefCell<Vec<Event>>, usize);

impl PrefillObserver for Watch<'_> {
    fn progress(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.0.borrow_mut().push(if done == total { Event::Read(self.1) } else { Event::Progress(self.1) });
        ControlFlow::Continue(())
    }
}

/// Runs the prompts, each chunk of which is 4 rows; what happened, and the texts in their prompts' order.
fn watched(
    loaded: &Loaded,
    retention: Retention,
    prompts: Vec<Vec<u32>>,
    limits: BatchLimits,
) -> Result<(Vec<Event>, BatchSummary, Vec<FinishedText>), Error> {
    let events = RefCell::new(Vec::new());
    let mut texts = Vec::new();
    let mut batch =
        batch(loaded, retention, prompts, limits)?.with_prefill_options(rows(4)).with_clock(Box::new(Looks::of(1)));
    let summary = batch.run(
        |index| Watch(&events, index),
        || {
            events.borrow_mut().push(Event::Asked);
            ControlFlow::Continue(())
        },
        |text| {
            events.borrow_mut().push(Event::Ended(text.index));
            texts.push(text);
        },
    )?;
    texts.sort_by_key(|text| text.index);
    Ok((events.into_inner(), summary, texts))
}

/// A prompt of the context's length but for what is generated.
fn long_prompt(loaded: &Loaded) -> Vec<u32> {
    let ids = prompts(loaded).swap_remove(0);
    ids.iter().copied().cycle().take(loaded.model.config().context_length - 16).collect()
}

#[test]
fn sequences_go_on_while_a_long_prompt_is_read() {
    let loaded = fixture();
    let prompts = vec![prompts(&loaded).swap_remove(0), long_prompt(&loaded)];
    let expected = alone(&loaded, &Retention::Full, &prompts, rows(4));
    let limits = BatchLimits { sequences: 2, kv_bytes: None };
    let (events, summary, texts) = watched(&loaded, Retention::Full, prompts, limits).unwrap();
    let got: Vec<_> = texts.into_iter().map(|text| (text.ids, text.text, text.kv.kept)).collect();
    assert_eq!(got, expected);
    // Told of at once, long before the prompt was read.
    let place = |event: Event| events.iter().position(|&other| other == event).unwrap();
    assert!(place(Event::Ended(0)) < place(Event::Read(1)), "{events:?}");
    // By this clock a step takes a look's time: the first comes at once, the others when four looks were taken since, of
    // which three are the prompt's.
    let meanwhile: Vec<_> = events[place(Event::Progress(1))..=place(Event::Ended(0))].to_vec();
    let between: Vec<_> = meanwhile.split(|&event| event == Event::Asked).map(<[Event]>::len).collect();
    assert_eq!(between, [1, 3, 3, 3, 3, 3, 3, 3, 1], "{meanwhile:?}");
    // The last of nine tokens ends the text; the first comes from the prompt.
    assert_eq!(summary.decoded_tokens, 2 * (9 - 1));
}

/// By a clock that goes on with every look, what is looked at tells what is counted.
#[test]
fn time_of_steps_is_not_time_of_reading() {
    let loaded = fixture();
    let limits = |sequences| BatchLimits { sequences, kv_bytes: None };
    let prompts = vec![prompts(&loaded).swap_remove(0), long_prompt(&loaded)];
    let (_, apart, _) = watched(&loaded, Retention::Full, prompts.clone(), limits(1)).unwrap();
    let (events, together, _) = watched(&loaded, Retention::Full, prompts, limits(2)).unwrap();
    let millis = |time: Duration| time.as_millis();
    // A step takes from one look to the next; prompts that are read without others take as long, and no looks between.
    assert_eq!((millis(apart.prefill_time), millis(apart.decode_time)), (2, 16));
    assert_eq!(millis(together.decode_time), together.decoded_tokens as u128);
    // Beside its two ends, a look for each time that it was asked whose turn it is: once in each chunk as long as the other
    // text is under way, and one of each step, which begins and ends within the step's.
    let asked = events.iter().take_while(|&&event| event != Event::Ended(0));
    let asked = asked.filter(|&&event| event == Event::Progress(1)).count();
    assert_eq!(millis(together.prefill_time), 2 + asked as u128);
}

#[test]
fn a_prompt_that_does_not_fit_is_read_once_and_held_until_it_does() {
    let loaded = fixture();
    let special = loaded.tokenizer.special_ids()[0];
    let sparing = adaptive(&loaded.tokenizer, SPARING);
    // After a prompt of which hardly anything is kept comes one that is kept as a whole, and one more like the first.
    let text = prompts(&loaded).swap_remove(0);
    let prompts = vec![text.clone(), vec![special; 24], text];
    let expected = alone(&loaded, &sparing, &prompts, rows(4));
    let tokens = prompts.iter().map(Vec::len).sum::<usize>();
    let (kept, whole) = (expected[0].2, expected[1].2);
    // Their positions take room, too.
    let [kept, whole] = [kept, whole].map(|bytes| bytes * token_bytes(&loaded) / (whole / 24));
    assert_eq!(whole, 24 * token_bytes(&loaded));
    let generated = (9 - 1) * token_bytes(&loaded);
    // Either fits alone; together they are too much, though nobody would expect it.
    let budget = whole + generated + kept + generated - 1;
    let limits = BatchLimits { sequences: 3, kv_bytes: Some(budget) };
    let (events, summary, texts) = watched(&loaded, sparing.clone(), prompts.clone(), limits).unwrap();
    let got: Vec<_> = texts.into_iter().map(|text| (text.ids, text.text, text.kv.kept)).collect();
    assert_eq!(got, expected);
    assert_eq!((summary.finished, summary.prompt_tokens), (3, tokens));
    let place = |event: Event| events.iter().position(|&other| other == event).unwrap();
    // Read while the first was under way, and gone on with when that had ended; the third was read after it had joined.
    assert!(place(Event::Read(1)) < place(Event::Ended(0)), "{events:?}");
    assert!(place(Event::Ended(0)) < place(Event::Progress(2)), "{events:?}");
    assert!(summary.most_sequences < 3);
    // What is held counts: it was there beside the first from the beginning.
    assert!(summary.most_kv_bytes >= whole + kept, "{summary:?}");
    // No more than that one prompt is beyond the budget.
    assert!(summary.most_kv_bytes <= budget + whole);

    // One that can never fit does not keep the first from its end.
    let limits = BatchLimits { sequences: 3, kv_bytes: Some(whole + generated - 1) };
    let mut texts = Vec::new();
    let mut batch = batch(&loaded, sparing, prompts, limits).unwrap();
    let error = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text)).unwrap_err();
    assert!(error.to_string().starts_with("prompt 2 and the text to generate need"), "{error}");
    assert_eq!(texts.len(), 1);
    assert_eq!((&texts[0].ids, texts[0].index), (&expected[0].0, 0));
    assert_ne!(texts[0].finish_reason, FinishReason::Interrupted);
}

/// `q` leads to `w` and `e`, whose vector is spoilt.
fn spoilt() -> Loaded {
    let mut model = Scripted::new(&[("</s>", CONTROL), ("q", NORMAL), ("w", NORMAL), ("e", NORMAL), ("z", NORMAL)]);
    model.says(&["q", "w", "e", "z", "z"]).spoil("e", f32::NAN);
    model.load()
}

#[test]
fn what_a_step_fails_with_while_a_prompt_is_read_is_the_steps_failure() {
    let loaded = spoilt();
    let encode = |text: &str| loaded.tokenizer.encode(text).unwrap();
    let prompts = vec![encode("q"), encode(&"z".repeat(40))];
    let limits = BatchLimits { sequences: 2, kv_bytes: None };
    let (reads, mut texts) = (Cell::new(0), Vec::new());
    let mut batch = batch(&loaded, Retention::Full, prompts, limits)
        .unwrap()
        .with_prefill_options(rows(2))
        .with_clock(Box::new(Looks::of(0)));
    let observe = |_| {
        reads.set(reads.get() + 1);
    };
    let options = batch.run(observe, || ControlFlow::Continue(()), |text| texts.push(text));
    let error = options.unwrap_err();
    assert!(matches!(error, Error::NotANumber { .. }), "{error}");
    // It is about the text that was under way, not about the prompt that was read.
    assert!(error.to_string().contains("prompt 1") && !error.to_string().contains("prompt 2"), "{error}");
    assert_eq!(reads.get(), 2);
    assert_eq!((texts.len(), texts[0].index, texts[0].finish_reason), (1, 0, FinishReason::Interrupted));
}

/// Who says stop within a prompt's reading ends all that is under way, with what it has.
#[test]
fn a_batch_can_be_stopped_between_the_steps_of_others() {
    let loaded = fixture();
    let prompts = vec![prompts(&loaded).swap_remove(0), long_prompt(&loaded)];
    let limits = BatchLimits { sequences: 2, kv_bytes: None };
    let expected = alone(&loaded, &Retention::Full, &prompts, rows(4)).swap_remove(0).0;
    let mut batch = batch(&loaded, Retention::Full, prompts, limits)
        .unwrap()
        .with_prefill_options(rows(4))
        .with_clock(Box::new(Looks::of(1)));
    let asked = Arc::new(AtomicU64::new(0));
    let mut texts = Vec::new();
    // Two prompts and four steps.
    let go_on = || {
        if asked.fetch_add(1, Ordering::Relaxed) < 6 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let summary = batch.run(|_| (), go_on, |text| texts.push(text)).unwrap();
    assert_eq!((texts.len(), texts[0].index, texts[0].finish_reason), (1, 0, FinishReason::Interrupted));
    assert_eq!(texts[0].ids, expected[..5]);
    // The second prompt was not read to its end.
    assert_eq!((summary.finished, summary.decoded_tokens), (0, 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_limit_and_no_turn_changes_a_text(
        method in 0_usize..4,
        sequences in 1_usize..5,
        budget in proptest::option::of(60_usize..160),
        chunk in 1_usize..40,
        tick in 0_u64..3,
        order in Just([0_usize, 1, 2, 3, 4, 5, 6]).prop_shuffle(),
    ) {
        let loaded = fixture();
        let retention = match method {
            0 => Retention::Full,
            1 => adaptive(&loaded.tokenizer, SPARING),
            2 => adaptive(&loaded.tokenizer, SEARCH),
            _ => adaptive(&loaded.tokenizer, EVICTING),
        };
        let mut prompts = prompts(&loaded);
        prompts[3] = vec![loaded.tokenizer.special_ids()[0]; 30];
        let prompts: Vec<_> = order.iter().map(|&index| prompts[index].clone()).collect();
        let options = rows(chunk);
        let expected = alone(&loaded, &retention, &prompts, options);
        let limits = BatchLimits { sequences, kv_bytes: budget.map(|tokens| tokens * token_bytes(&loaded)) };
        let mut texts = Vec::new();
        let batch = batch(&loaded, retention, prompts.clone(), limits).unwrap().with_clock(Box::new(Looks::of(tick)));
        let mut batch = batch.with_prefill_options(options);
        let summary = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text)).unwrap();
        texts.sort_by_key(|text| text.index);
        // Positions, and what is noted of rows while they go on evicting.
        let longest: usize = expected.iter().map(|(.., kept)| *kept).max().unwrap();
        let longest = longest + longest / 2;
        let got: Vec<_> = texts.into_iter().map(|text| (text.ids, text.text, text.kv.kept)).collect();
        prop_assert_eq!(got, expected);
        prop_assert_eq!(summary.prompt_tokens, prompts.iter().map(Vec::len).sum::<usize>());
        prop_assert!(summary.most_sequences <= sequences);
        prop_assert!(limits.kv_bytes.is_none_or(|budget| summary.most_kv_bytes <= budget + longest));
    }
}
