//! One prompt into several empty caches, each of which keeps of it what it would have kept alone.
//!
//! Projections and the rest of a layer do not depend on what is kept, so they are computed once; attention is computed once
//! for all caches of which the same is collected, such as those of one method under several budgets. A second pass is
//! read once for all caches that ask for the same. Not for: further
//! prompts of a conversation, whose attention depends on what was kept before.

use super::Model;
use super::keeper::{Brief, Keeper, LayerWatch};
use super::observer::PrefillObserver;
use super::options::PrefillOptions;
use super::repeat::RepeatPlan;
use crate::backend::{Backend, Block};
use crate::cache::AdaptiveKvCache;
use crate::error::{Error, Result};
use crate::memory;
use crate::numbers::check_logits;

/// What a prompt left behind that was read into several caches.
#[derive(Debug, Clone, PartialEq)]
pub struct ForkedPrefill {
    /// `[vocab_size]` logits of the next token, the same for all.
    pub logits: Vec<f32>,
    /// How many times attention was computed.
    pub attentions: usize,
}

/// Caches of which the same is collected in a layer.
struct Group<'b, B: Backend> {
    watch: LayerWatch<'b>,
    prompt: B::Prompt,
    /// Indices of the caches.
    forks: Vec<usize>,
}

/// What is decided about each of the caches.
struct Forks<'b> {
    briefs: &'b [Brief],
    keepers: Vec<Keeper<'b>>,
    /// What each cache's method has read a second time, if anything.
    repeats: Vec<Option<RepeatPlan>>,
}

impl Forks<'_> {
    /// What is read a second time, each once.
    fn distinct_repeats(&self) -> impl Iterator<Item = &RepeatPlan> {
        let plans = self.repeats.iter().enumerate();
        plans.filter_map(|(index, plan)| plan.as_ref().filter(|_| !self.repeats[..index].contains(plan)))
    }
}

/// How many rows have gone through a layer.
struct Done<'a> {
    rows: usize,
    total: usize,
    observer: &'a mut dyn PrefillObserver,
}

impl Done<'_> {
    /// # Errors
    /// [`Error::Interrupted`] if the observer ends the prompt.
    fn add(&mut self, rows: usize) -> Result<()> {
        self.rows += rows;
        if self.observer.progress(self.rows, self.total).is_break() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

impl<B: Backend> Model<B> {
    /// See [`Llama::prefill_forks`](super::Llama::prefill_forks).
    ///
    /// * `ids`: at least one, and within the context
    /// * `caches`: at least one, empty
    pub fn prefill_forks(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill> {
        let briefs: Vec<Brief> = caches.iter().map(|cache| Brief::new(cache, ids, None)).collect();
        let repeats = caches.iter().map(|cache| RepeatPlan::new(cache, ids, self.has_window()));
        let repeats = repeats.collect::<Result<Vec<_>>>()?;
        let forks = Forks { briefs: &briefs, keepers: briefs.iter().map(Keeper::new).collect(), repeats };
        let prefill = self.fork_layers(ids, caches, forks, options, observer);
        self.backend.release();
        memory::release_unused();
        prefill
    }

    fn fork_layers(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        mut forks: Forks<'_>,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill> {
        let backend = &self.backend;
        let chunk_rows = options.rows(ids.len());
        let mut hidden = self.embed(ids, 0, chunk_rows)?;
        let rotations = backend.rotations(self.rope.angles(0, ids.len()))?;
        let total =
            (ids.len() + forks.distinct_repeats().map(RepeatPlan::num_rows).sum::<usize>()) * self.config.num_layers;
        let mut done = Done { rows: 0, total, observer };
        let last_layer = self.config.num_layers.saturating_sub(1);
        let mut attentions = 0;
        for (index, block) in self.weights.blocks.iter().enumerate() {
            let mut groups = self.groups(index, caches, forks.briefs)?;
            attentions = groups.len();
            for (chunk, rows) in hidden.iter_mut().enumerate() {
                let first_row = chunk * chunk_rows;
                let attended = self.attend_all(block, rows, &rotations, first_row, &mut groups)?;
                // Of what the last layer puts out, only the last row is asked for.
                if index < last_layer {
                    *rows = backend.finish(block, rows, attended)?;
                } else if first_row + chunk_rows >= ids.len() {
                    let (row, attended) = backend.last_row(rows, attended)?;
                    *rows = backend.finish(block, &row, attended)?;
                }
                done.add(chunk_rows.min(ids.len() - first_row))?;
            }
            let mut place = (0, ids.len());
            if index == last_layer {
                hidden.drain(..hidden.len() - 1);
                place = (ids.len() - 1, 1);
            }
            self.check_layer(&hidden, index, place, chunk_rows)?;
            self.keep_all(index, groups, caches, &mut forks)?;
        }
        self.repeat_for_all(caches, &mut forks, options, &mut done)?;
        for (keeper, cache) in forks.keepers.into_iter().zip(&mut *caches) {
            keeper.finish::<B>(cache, &mut ())?;
            cache.settle(ids.len());
        }
        let last = hidden.pop().ok_or_else(|| Error::input("the prompt is empty"))?;
        drop(hidden);
        let logits = backend.logits(&self.weights, &last)?;
        check_logits(&logits, ids.len())?;
        Ok(ForkedPrefill { logits, attentions })
    }

    /// Reads the prompt a second time for the caches whose methods ask for it, which hold all of it until then.
    fn repeat_for_all(
        &self,
        caches: &mut [AdaptiveKvCache],
        forks: &mut Forks<'_>,
        options: PrefillOptions,
        done: &mut Done<'_>,
    ) -> Result<()> {
        let same =
            |a: usize, b: usize, repeats: &[Option<RepeatPlan>]| repeats[a].is_some() && repeats[a] == repeats[b];
        for first in 0..caches.len() {
            let members: Vec<usize> = (0..caches.len()).filter(|&fork| same(fork, first, &forks.repeats)).collect();
            let Some(plan) = forks.repeats[first].as_ref().filter(|_| members[0] == first) else { continue };
            let segment = forks.briefs[first].segment(None);
            let seen = self.repeat(plan, &caches[first], segment, options, &mut |rows| done.add(rows))?;
            for fork in members {
                forks.keepers[fork].repeated(self, seen.clone(), &mut caches[fork], &mut ())?;
            }
        }
        Ok(())
    }

    /// Puts together the caches of which the same is collected.
    fn groups<'b>(&self, index: usize, caches: &[AdaptiveKvCache], briefs: &'b [Brief]) -> Result<Vec<Group<'b, B>>> {
        let mut groups: Vec<Group<'b, B>> = Vec::new();
        for (fork, (brief, cache)) in briefs.iter().zip(caches).enumerate() {
            let layer = &cache.layers::<B::Rows>()?[index];
            let watch = brief.layer(self, layer);
            if let Some(group) = groups.iter_mut().find(|group| group.watch.collects_as(&watch)) {
                group.forks.push(fork);
            } else {
                let prompt = self.backend.prompt(layer.rows(), watch.request())?;
                groups.push(Group { watch, prompt, forks: vec![fork] });
            }
        }
        Ok(groups)
    }

    /// Lets a chunk attend, once for each group; the result is the same, and the first group's is returned.
    fn attend_all(
        &self,
        block: &Block<B>,
        rows: &B::Hidden,
        rotations: &B::Rotations,
        first_row: usize,
        groups: &mut [Group<'_, B>],
    ) -> Result<B::Attended> {
        let backend = &self.backend;
        let unrotated = groups.iter().any(|group| group.watch.wanted().unrotated);
        let projected = backend.project(block, rows, rotations, first_row, unrotated)?;
        let mut first = None;
        for Group { watch, prompt, .. } in groups {
            let (stats, maps) = watch.collectors();
            let attended = backend.attend(prompt, &projected, first_row, stats, maps)?;
            watch.look(backend, &projected, rows)?;
            first.get_or_insert(attended);
        }
        first.ok_or_else(|| Error::shape("caches of a prompt", "at least 1", 0))
    }

    /// Lets every cache keep its part of a layer.
    fn keep_all(
        &self,
        index: usize,
        groups: Vec<Group<'_, B>>,
        caches: &mut [AdaptiveKvCache],
        forks: &mut Forks<'_>,
    ) -> Result<()> {
        for Group { watch, prompt, forks: members } in groups {
            for fork in members {
                let own = forks.briefs[fork].layer(self, &caches[fork].layers::<B::Rows>()?[index]);
                let own = own.with_collected(&watch);
                forks.keepers[fork].layer_done(self, index, own, &prompt, &mut caches[fork], &mut ())?;
            }
        }
        Ok(())
    }
}
