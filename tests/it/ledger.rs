//! The books of a layer's cache: whatever holds the rows ends up with the rows of the positions that are in the books.

#![allow(clippy::cast_possible_truncation)] // sizes of tests fit any type

use std::collections::BTreeSet;

use adaptive_kvcache::Result;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::cache::{AdaptiveKvCache, CacheLayer, HeadStep, KvDtype, Ledger, Plan, Retention, Rows};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::tokens::TokenClass;
use proptest::prelude::*;

const HEADS: usize = 3;
const LAYOUT: HeadLayout = HeadLayout { num_heads: 6, num_kv_heads: HEADS, head_dim: 2 };

/// The least that can hold rows: of each row, its position.
#[derive(Debug, Clone)]
struct PositionRows(Vec<Vec<u32>>);

/// A prompt of such rows.
#[derive(Debug)]
struct PositionPrompt {
    first: u32,
    len: usize,
    past_lens: Vec<usize>,
}

impl Rows for PositionRows {
    type Prompt = PositionPrompt;

    fn emptied(&self) -> Self {
        Self(vec![Vec::new(); HEADS])
    }

    fn layout(&self) -> HeadLayout {
        LAYOUT
    }

    fn dtype(&self) -> KvDtype {
        KvDtype::F16
    }

    fn allocated(&self) -> usize {
        self.0.iter().map(|head| 4 * head.capacity()).sum()
    }

    fn prompt_lens(&self, prompt: &PositionPrompt) -> (usize, Vec<usize>) {
        (prompt.len, prompt.past_lens.clone())
    }

    fn carry_out(&mut self, ledger: &Ledger, plan: &Plan, prompt: Option<&PositionPrompt>) -> Result<()> {
        assert_eq!(ledger.positions(), self.0, "books that are made up before the rows are there");
        for (head, plan) in self.0.iter_mut().zip(&plan.heads) {
            let mut rows: Vec<u32> = plan.stay.iter().map(|&row| head[row]).collect();
            rows.extend(plan.prompt.iter().map(|&row| prompt.unwrap().first + row as u32));
            *head = rows;
        }
        Ok(())
    }

    fn evict(&mut self, _: &Ledger, steps: &[HeadStep]) -> Result<()> {
        for (head, step) in self.0.iter_mut().zip(steps) {
            for &row in step.evicted() {
                head.swap_remove(row);
            }
        }
        Ok(())
    }
}

/// What may happen to a layer.
#[derive(Debug, Clone)]
enum Event {
    /// A prompt of so many tokens, of which each head keeps every so many-th of what is decided about; 0 for all of it,
    /// without a choice.
    Prompt(usize, [usize; HEADS]),
    /// So many tokens are decoded.
    Decode(usize),
    /// Less of the last prompt stays.
    Less([usize; HEADS]),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1..40_usize, prop::array::uniform3(0..5_usize)).prop_map(|(len, every)| Event::Prompt(len, every)),
        (0..20_usize).prop_map(Event::Decode),
        prop::array::uniform3(1..6_usize).prop_map(Event::Less),
    ]
}

fn choices(first: u32, end: u32, every: [usize; HEADS]) -> Vec<HeadChoice> {
    let choice = |(kv_head, every): (usize, usize)| HeadChoice {
        kv_head,
        level: kv_head,
        recovered: vec![0.5; kv_head],
        positions: (first..end).filter(|position| every > 0 && (*position as usize).is_multiple_of(every)).collect(),
    };
    every.into_iter().enumerate().map(choice).collect()
}

fn decode(layer: &mut CacheLayer<PositionRows>) {
    let position = layer.ledger().seen();
    let (ledger, rows) = layer.parts_mut();
    ledger.check_next(position).unwrap();
    rows.0.iter_mut().for_each(|head| head.push(position as u32));
    ledger.advance(TokenClass::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// After prompts, tokens and second thoughts, each head holds the positions that plain sets say, in order, and the rows
    /// are those of the books; what an earlier prompt has decided is never undone.
    #[test]
    fn rows_follow_the_books(events in prop::collection::vec(any_event(), 1..12)) {
        let mut cache = AdaptiveKvCache::new(1, &PositionRows(Vec::new()), Retention::Full);
        let layer = &mut cache.layers_mut::<PositionRows>().unwrap()[0];
        let mut held: [BTreeSet<u32>; HEADS] = Default::default();
        // Where the last decision began, and up to where it reaches.
        let (mut first, mut settled, mut seen) = (0, 0, 0_u32);
        for event in events {
            match event {
                Event::Decode(count) => {
                    for _ in 0..count {
                        decode(layer);
                        for head in &mut held {
                            head.insert(seen);
                        }
                        seen += 1;
                    }
                }
                Event::Prompt(len, every) => {
                    let prompt = PositionPrompt { first: seen, len, past_lens: layer.ledger().lens() };
                    (first, seen) = (settled, seen + len as u32);
                    let chosen = every.iter().any(|&every| every > 0).then(|| choices(first, seen, every));
                    for (kv_head, head) in held.iter_mut().enumerate() {
                        head.extend(prompt.first..seen);
                        if let Some(chosen) = &chosen {
                            head.retain(|position| *position < first || chosen[kv_head].positions.contains(position));
                        }
                    }
                    let summary = layer.store_prompt(&prompt, chosen.clone()).unwrap();
                    prop_assert_eq!(summary.prompt_len, (seen - first) as usize);
                    prop_assert_eq!(&summary.bytes, &layer.bytes());
                    for (head, held) in summary.heads.iter().zip(&held) {
                        prop_assert_eq!(head.level.is_some(), chosen.is_some());
                        prop_assert!(held.range(first..).eq(&head.positions));
                    }
                    settled = seen;
                }
                Event::Less(every) => {
                    let chosen = choices(first, seen, every);
                    for (head, chosen) in held.iter_mut().zip(&chosen) {
                        head.retain(|position| *position < first || chosen.positions.contains(position));
                    }
                    layer.keep_of_prompt(first as usize, chosen).unwrap();
                    settled = seen;
                }
            }
            let held: Vec<Vec<u32>> = held.iter().map(|head| head.iter().copied().collect()).collect();
            prop_assert_eq!(&layer.positions()[..], &held[..]);
            prop_assert_eq!(&layer.rows().0, &held);
            prop_assert_eq!(layer.ledger().seen(), seen as usize);
            let rows: usize = held.iter().map(Vec::len).sum();
            let token = 2 * 2 * LAYOUT.head_dim;
            prop_assert_eq!((layer.bytes().kept, layer.bytes().raw), (rows * token, seen as usize * HEADS * token));
        }
    }

    /// What does not fit is refused, and neither books nor rows change.
    #[test]
    fn what_does_not_fit_changes_nothing(len in 1..20_usize, fault in 0..6_usize) {
        let mut cache = AdaptiveKvCache::new(1, &PositionRows(Vec::new()), Retention::Full);
        let layer = &mut cache.layers_mut::<PositionRows>().unwrap()[0];
        let prompt = PositionPrompt { first: 0, len: 4, past_lens: vec![0; HEADS] };
        layer.store_prompt(&prompt, Some(choices(0, 4, [1, 2, 3]))).unwrap();
        let before = layer.positions().to_vec();
        let end = (4 + len) as u32;
        let mut chosen = choices(4, end, [1; HEADS]);
        let mut prompt = PositionPrompt { first: 4, len, past_lens: layer.ledger().lens() };
        match fault {
            0 => drop(chosen.pop()),
            1 => chosen[1].positions.push(end),
            2 => chosen[1].positions.insert(0, 3),
            3 => chosen[2].positions.push(4),
            4 => chosen.swap(0, 1),
            _ => prompt.past_lens[0] += 1,
        }
        prop_assert!(layer.store_prompt(&prompt, Some(chosen)).is_err());
        prop_assert!(layer.ledger().check_next(3).is_err() && layer.ledger().check_next(5).is_err());
        prop_assert_eq!(&layer.positions()[..], &before[..]);
        prop_assert_eq!(&layer.rows().0, &before);
    }
}
