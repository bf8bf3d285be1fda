//! One layer's rows in memory, head by head, as the CPU kernels read them.

use rayon::prelude::*;

use super::head::HeadCache;
use crate::attention::HeadLayout;
use crate::attention::prompt_rows::{PromptKv, PromptRows};
use crate::attention::refit::Answers;
use crate::attention::window::PromptWindow;
use crate::cache::{CacheLayer, HeadStep, KvDtype, Ledger, Plan, Rows};
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;
use crate::records::{Sink, Source};
use crate::tokens::TokenClass;

/// Keys and values of one layer, each head's in buffers of its own length.
#[derive(Debug, Clone)]
pub struct KernelRows {
    layout: HeadLayout,
    dtype: KvDtype,
    heads: Vec<HeadCache>,
}

/// A layer's cache in memory.
pub type KernelLayer = CacheLayer<KernelRows>;

impl KernelRows {
    /// No rows.
    ///
    /// # Errors
    /// As [`HeadCache::new`].
    pub fn new(layout: HeadLayout, dtype: KvDtype) -> Result<Self> {
        let heads = vec![HeadCache::new(layout.head_dim, dtype)?; layout.num_kv_heads];
        Ok(Self { layout, dtype, heads })
    }

    /// The heads, by KV head.
    #[must_use]
    pub fn heads(&self) -> &[HeadCache] {
        &self.heads
    }

    /// The heads, to write to.
    pub(super) fn heads_mut(&mut self) -> &mut [HeadCache] {
        &mut self.heads
    }

    /// The rows of every head, for attention.
    #[must_use]
    pub fn for_attention(&self) -> Vec<HeadRows<'_>> {
        self.heads.iter().map(HeadCache::rows).collect()
    }

    /// Room for the keys and values of a prompt of `capacity` tokens, behind copies of what every head holds now.
    ///
    /// # Errors
    /// As [`PromptRows::after`].
    pub fn prompt(&self, capacity: usize) -> Result<PromptKv> {
        self.prompt_within(capacity, None)
    }

    /// As [`prompt`](Self::prompt), in a layer with a sliding window.
    ///
    /// # Errors
    /// As [`PromptRows::after_within`].
    pub fn prompt_within(&self, capacity: usize, window: Option<&PromptWindow>) -> Result<PromptKv> {
        let (keys, values) = PromptRows::after_within(self.layout, capacity, &self.for_attention(), window)?;
        Ok(PromptKv { keys, values })
    }
}

impl Rows for KernelRows {
    type Prompt = PromptKv;

    fn emptied(&self) -> Self {
        Self { heads: self.heads.iter().map(HeadCache::emptied).collect(), ..*self }
    }

    fn layout(&self) -> HeadLayout {
        self.layout
    }

    fn dtype(&self) -> KvDtype {
        self.dtype
    }

    fn held_bytes(&self, _: usize) -> usize {
        self.heads.iter().map(HeadCache::held_bytes).sum()
    }

    fn allocated(&self) -> usize {
        self.heads.iter().map(HeadCache::allocated_bytes).sum()
    }

    fn mapped(&self) -> usize {
        self.heads.iter().map(HeadCache::shared_bytes).sum()
    }

    fn prompt_lens(&self, prompt: &PromptKv) -> (usize, Vec<usize>) {
        (prompt.keys.len(), (0..self.heads.len()).map(|head| prompt.keys.past_len(head)).collect())
    }

    fn carry_out(&mut self, _: &Ledger, plan: &Plan, prompt: Option<&PromptKv>) -> Result<()> {
        // Checked before anything changes: a refused prompt leaves the rows as they were.
        match prompt {
            Some(PromptKv { keys, values }) if values.len() != keys.len() => {
                return Err(Error::shape("a prompt's values", keys.len(), values.len()));
            }
            None if plan.heads.iter().any(|head| !head.prompt.is_empty()) => {
                return Err(Error::shape("a prompt's rows", "some", "none"));
            }
            _ => {}
        }
        let (head_dim, centers_keys) = (self.layout.head_dim, self.dtype.has_key_blocks());
        let heads = self.heads.par_iter_mut().zip(&plan.heads).enumerate();
        heads.try_for_each(|(kv_head, (head, plan))| {
            let [mut key, mut value] = [(); 2].map(|()| vec![0.0; head_dim]);
            let past = head.len();
            head.keep_rows(&plan.stay);
            head.settle(plan.prompt.len());
            if let Some(PromptKv { keys, values }) = prompt {
                if head.is_empty() && centers_keys {
                    head.center_keys(&keys.mean(kv_head));
                }
                for row in &plan.prompt {
                    keys.copy_row(kv_head, past + row, &mut key);
                    values.copy_row(kv_head, past + row, &mut value);
                    head.push_settled(&key, &value)?;
                }
            }
            head.shrink_to_fit();
            Ok(())
        })
    }

    fn can_refit() -> bool {
        true
    }

    fn refit(&mut self, answers: &Answers) -> Result<()> {
        let heads = self.heads.par_iter_mut().with_max_len(1).enumerate();
        heads.try_for_each(|(kv_head, head)| {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            head.rows().widen_to(&mut keys, &mut values);
            match answers.fitted_values(kv_head, &keys, &values)? {
                Some(fitted) => head.replace_values(&fitted),
                None => Ok(()),
            }
        })
    }

    fn head_bytes(&self) -> usize {
        self.dtype.head_bytes(self.layout.head_dim)
    }

    fn spare(&self) -> usize {
        self.heads.iter().map(HeadCache::spare).min().unwrap_or(usize::MAX)
    }

    fn growth_bytes(&self) -> usize {
        self.heads.iter().map(HeadCache::growth_bytes).sum()
    }

    fn make_room(&mut self, rows: usize) {
        for head in &mut self.heads {
            head.shrink_to_fit();
            head.reserve_exact(rows);
        }
    }

    fn turn_keys(&mut self, turn: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        let heads = self.heads.par_iter_mut().with_max_len(1).enumerate();
        heads.for_each(|(kv_head, head)| {
            let mut keys = head.keys();
            turn(kv_head, &mut keys);
            head.replace_keys(&keys);
        });
        Ok(())
    }

    fn can_save() -> bool {
        true
    }

    fn save(&self, sink: &mut Sink<'_>) {
        self.heads.iter().for_each(|head| head.save(sink));
    }

    fn load(&mut self, lens: &[usize], source: &mut Source) -> Result<()> {
        self.heads.iter_mut().zip(lens).try_for_each(|(head, &rows)| head.load(rows, source))
    }

    fn evict(&mut self, _: &Ledger, steps: &[HeadStep]) -> Result<()> {
        for (head, step) in self.heads.iter_mut().zip(steps) {
            for &row in step.evicted() {
                head.swap_remove(row);
            }
            if !step.evicted().is_empty() {
                head.trim();
            }
        }
        Ok(())
    }
}

impl CacheLayer<KernelRows> {
    /// Keeps one new token in every head.
    ///
    /// * `keys`, `values`: `[num_kv_heads, head_dim]`, keys rotated
    /// * `position`: the number of tokens seen before it
    /// * `class`: may tell how long it stays
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes or the position do not fit.
    pub fn append(&mut self, keys: &[f32], values: &[f32], position: usize, class: TokenClass) -> Result<()> {
        let (ledger, rows) = self.parts_mut();
        let width = rows.layout.kv_width();
        if keys.len() != width || values.len() != width {
            return Err(Error::shape("a token's keys and values", width, (keys.len(), values.len())));
        }
        ledger.check_next(position)?;
        let head_dim = rows.layout.head_dim;
        let token = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (head, (key, value)) in rows.heads.iter_mut().zip(token) {
            if ledger.holds_budget() {
                head.reserve_exact(1);
            }
            head.push(key, value)?;
        }
        ledger.advance(class);
        Ok(())
    }

    /// Takes down that every head got rows for some tokens that follow, or, if they did not come through, lets those
    /// rows go that a head may have got.
    ///
    /// * `classes`: of the tokens; none if they did not
    pub(super) fn settle_run(&mut self, classes: &[TokenClass]) {
        let (ledger, rows) = self.parts_mut();
        for &class in classes {
            ledger.advance(class);
        }
        for (kv_head, head) in rows.heads.iter_mut().enumerate() {
            head.truncate(ledger.len(kv_head));
        }
    }

    /// Forgets the newest tokens, as if they had never come.
    ///
    /// # Errors
    /// As [`Ledger::take_back`].
    pub fn take_back(&mut self, count: usize) -> Result<()> {
        self.parts_mut().0.take_back(count)?;
        self.settle_run(&[]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that is given up leaves rows in some heads, and some of its tokens in others.
    #[test]
    fn rows_that_the_books_do_not_know_go_without_a_trace() {
        let layout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
        for dtype in KvDtype::ALL {
            for len in [0, 1, 14, 15, 16, 17, 33] {
                let rows = KernelRows::new(layout, dtype).unwrap();
                let cache = &mut crate::cache::AdaptiveKvCache::new(1, &rows, crate::cache::Retention::Full);
                let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
                let row = |position: usize| {
                    #[expect(clippy::cast_precision_loss)]
                    let number = |index: usize| ((index * 7 + position * 13) % 29) as f32 - 11.0;
                    (0..layout.kv_width()).map(number).collect::<Vec<f32>>()
                };
                for position in 0..len {
                    layer.append(&row(position), &row(position + 5), position, TokenClass::default()).unwrap();
                }
                let before = layer.rows().heads().to_vec();
                for (heads, count) in [(0..2, 5), (1..2, 3), (0..1, 20)] {
                    for head in &mut layer.parts_mut().1.heads[heads] {
                        for position in 0..count {
                            head.push(&row(position)[..32], &row(position)[32..]).unwrap();
                        }
                    }
                    layer.settle_run(&[]);
                    assert!(layer.rows().heads() == before, "{dtype:?}, {count} after {len}");
                    assert_eq!(layer.ledger().seen(), len);
                }
                let classes = [TokenClass::default(); 3];
                for head in &mut layer.parts_mut().1.heads {
                    (len..len + 3).for_each(|position| head.push(&row(position)[..32], &row(position)[32..]).unwrap());
                }
                layer.settle_run(&classes);
                assert_eq!((layer.ledger().seen(), layer.ledger().lens()), (len + 3, vec![len + 3; 2]));
                layer.take_back(3).unwrap();
                assert!(layer.rows().heads() == before && layer.ledger().seen() == len);
            }
        }
    }
}
