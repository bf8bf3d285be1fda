//! The caches that one prompt is read into: what is computed for each of them, and what once for several.
//!
//! Projections and the rest of a layer do not depend on what is kept, so they are computed once; attention is computed once
//! for all caches of which the same is collected, such as those of one method under several budgets. A second pass is read
//! once for all caches that ask for the same.
//!
//! Not for: the order of things in a forward pass (see [`super::prefill`]), or what a cache keeps (see [`super::keeper`]).

use std::time::Duration;

use super::Model;
use super::keeper::{Brief, Keeper, LayerWatch};
use super::observer::PrefillObserver;
use super::options::PrefillOptions;
use super::repeat::RepeatPlan;
use crate::backend::{Backend, Block};
use crate::cache::{AdaptiveKvCache, LayerSummary};
use crate::error::{Error, Result};

/// Caches of which the same is collected in a layer.
pub(super) struct Group<'b, B: Backend> {
    watch: LayerWatch<'b>,
    prompt: B::Prompt,
    /// Indices of the caches, at least one.
    forks: Vec<usize>,
}

/// What is decided about each of the caches.
pub(super) struct Forks<'b> {
    briefs: &'b [Brief],
    keepers: Vec<Keeper<'b>>,
    /// What each cache's method has read a second time, if anything.
    repeats: Vec<Option<RepeatPlan>>,
}

impl<'b> Forks<'b> {
    /// * `briefs`: one for each cache
    /// * `has_window`: whether a layer of the model has a sliding window
    ///
    /// # Errors
    /// As [`RepeatPlan::new`].
    pub fn new(briefs: &'b [Brief], caches: &[AdaptiveKvCache], ids: &[u32], has_window: bool) -> Result<Self> {
        let repeats = caches.iter().map(|cache| RepeatPlan::new(cache, ids, has_window)).collect::<Result<_>>()?;
        Ok(Self { briefs, keepers: briefs.iter().map(Keeper::new).collect(), repeats })
    }

    /// Rows that are read a second time, those of several caches once.
    pub fn repeated_rows(&self) -> usize {
        let plans = self.repeats.iter().enumerate();
        let distinct =
            plans.filter_map(|(index, plan)| plan.as_ref().filter(|_| !self.repeats[..index].contains(plan)));
        distinct.map(RepeatPlan::num_rows).sum()
    }

    /// Ends the prompt: what the layers of each cache keep, and the time that choosing and storing took.
    pub fn finish<B: Backend>(
        self,
        caches: &mut [AdaptiveKvCache],
        observer: &mut dyn PrefillObserver,
    ) -> Result<Vec<(Vec<LayerSummary>, Duration)>> {
        self.keepers.into_iter().zip(caches).map(|(keeper, cache)| keeper.finish::<B>(cache, observer)).collect()
    }
}

/// How many rows have gone through a layer, and who is told.
pub(super) struct Done<'a> {
    rows: usize,
    total: usize,
    pub observer: &'a mut dyn PrefillObserver,
}

impl<'a> Done<'a> {
    pub fn new(total: usize, observer: &'a mut dyn PrefillObserver) -> Self {
        Self { rows: 0, total, observer }
    }

    /// # Errors
    /// [`Error::Interrupted`] if the observer ends the prompt.
    pub fn add(&mut self, rows: usize) -> Result<()> {
        self.rows += rows;
        if self.observer.progress(self.rows, self.total).is_break() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

impl<B: Backend> Model<B> {
    /// Reads the prompt a second time for the caches whose methods ask for it, which hold all of it until then.
    pub(super) fn repeat_for_all(
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
            let mut seen = self.repeat(plan, &caches[first], segment, options, &mut |rows| done.add(rows))?;
            for &fork in &members {
                let is_last = Some(&fork) == members.last();
                let seen = if is_last { std::mem::take(&mut seen) } else { seen.clone() };
                forks.keepers[fork].repeated(self, seen, &mut caches[fork], done.observer)?;
            }
        }
        Ok(())
    }

    /// Puts together the caches of which the same is collected.
    pub(super) fn groups<'b>(
        &self,
        index: usize,
        caches: &[AdaptiveKvCache],
        forks: &Forks<'b>,
    ) -> Result<Vec<Group<'b, B>>> {
        let mut groups: Vec<Group<'b, B>> = Vec::new();
        for (fork, (brief, cache)) in forks.briefs.iter().zip(caches).enumerate() {
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
    pub(super) fn attend_all(
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
    pub(super) fn keep_all(
        &self,
        index: usize,
        groups: Vec<Group<'_, B>>,
        caches: &mut [AdaptiveKvCache],
        forks: &mut Forks<'_>,
        observer: &mut dyn PrefillObserver,
    ) -> Result<()> {
        for Group { watch, prompt, forks: members } in groups {
            for &fork in &members[1..] {
                let own = forks.briefs[fork].layer(self, &caches[fork].layers::<B::Rows>()?[index]);
                let own = own.with_collected(&watch);
                forks.keepers[fork].layer_done(self, index, own, &prompt, &mut caches[fork], observer)?;
            }
            // It began with the first one's own.
            forks.keepers[members[0]].layer_done(self, index, watch, &prompt, &mut caches[members[0]], observer)?;
        }
        Ok(())
    }
}
