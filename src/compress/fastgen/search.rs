//! The greedy search: unions of policies in a fixed order, the first that recovers the head is taken (paper, eq. 2).
//!
//! What is decided about is a [`Segment`]: a prompt, or what came since an earlier decision. Keys that were settled then
//! stay, and count as kept in every level's value.

use super::policies::HeadFacts;
use super::{Criterion, FastGen, GroupReduction};
use crate::compress::segment::{HeadChoice, Segment};
use crate::compress::stats::{HeadStats, LayerStats, MassRequest, StatsRequest, group_column_sums, split_settled};
use crate::error::{Error, Result};
use crate::numbers::at_least_zero;

/// `[levels][segment_len]` keep masks of one KV head, the last one all true.
type LevelMasks = Vec<Vec<bool>>;

impl FastGen {
    /// Whether [`choose`](Self::choose) may ask for a second pass over the prompt's rows.
    #[must_use]
    pub fn may_need_second_pass(&self) -> bool {
        self.criterion == Criterion::MaxAbs && self.first_attention_level() + 1 < self.policies.num_levels()
    }

    /// What has to be collected while a prompt is processed.
    #[must_use]
    pub fn request(&self, segment: Segment<'_>) -> StatsRequest {
        let recent = segment.recent;
        let policies = self.policies.policies();
        let column_sums = policies.iter().any(|policy| policy.needs_column_sums());
        match self.criterion {
            Criterion::Mass => {
                let window = policies.iter().filter_map(|policy| policy.window(segment.len(), self)).max();
                let first_row = segment.num_rows() - self.profile_rows.count(segment.num_rows());
                StatsRequest {
                    column_sums,
                    mass: Some(MassRequest { first_row, window }),
                    masks: Vec::new(),
                    recent,
                    log_sums: false,
                }
            }
            Criterion::MaxAbs => {
                let levels = self.levels(&facts(segment, &segment.all_positions(), &[]));
                let masks = levels[..self.first_attention_level()].iter().map(|mask| as_numbers(mask)).collect();
                StatsRequest { column_sums, mass: None, masks, recent, log_sums: false }
            }
        }
    }

    /// Chooses what each KV head of a layer keeps.
    ///
    /// * `stats`: collected as [`request`](Self::request) says, over the whole prompt; query heads `g * group_size ..`
    ///   share KV head `g`, and so have seen the same keys
    /// * `second_pass`: largest differences of further masks, which depend on attention and so are known only now:
    ///   given pairs of a KV head and its `[levels][segment_len]` masks, returns `[levels]` for each pair, the largest
    ///   over the head's query heads; called at most once, and never for the criterion `mass`
    ///
    /// # Errors
    /// [`Error::Shape`] if the query heads cannot be shared out; [`Error::NotANumber`] if statistics are no numbers;
    /// whatever `second_pass` returns.
    pub fn choose(
        &self,
        segment: Segment<'_>,
        num_kv_heads: usize,
        stats: &LayerStats,
        second_pass: impl FnOnce(&[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Vec<HeadChoice>> {
        if num_kv_heads == 0 || stats.heads.is_empty() || !stats.heads.len().is_multiple_of(num_kv_heads) {
            return Err(Error::shape(
                "profiling",
                format!("a multiple of {num_kv_heads} query heads"),
                stats.heads.len(),
            ));
        }
        stats.check()?;
        let groups: Vec<&[HeadStats]> = stats.heads.chunks(stats.heads.len() / num_kv_heads).collect();
        let positions = segment.all_positions();
        let levels: Vec<LevelMasks> = groups
            .iter()
            .map(|group| self.levels(&facts(segment, &positions, &group_column_sums(group, segment.len()))))
            .collect();

        let values: Vec<Vec<f64>> = match self.criterion {
            Criterion::Mass => groups
                .iter()
                .zip(&levels)
                .map(|(group, levels)| self.recovered_masses(group, levels, segment))
                .collect(),
            Criterion::MaxAbs => self.largest_differences(&groups, &levels, second_pass)?,
        };
        let choices = levels.into_iter().zip(values).enumerate().map(|(kv_head, (levels, recovered))| {
            let level = recovered.len() - 1;
            HeadChoice { kv_head, level, recovered, positions: segment.positions(&levels[level]) }
        });
        Ok(choices.collect())
    }

    /// Whether a level's value means that the head is recovered.
    fn recovers(&self, value: f64) -> bool {
        match self.criterion {
            Criterion::Mass => value >= self.recovery_threshold,
            Criterion::MaxAbs => value < 1.0 - self.recovery_threshold,
        }
    }

    /// Index of the first level whose keep-set depends on attention; at most that of the last level, which never does.
    fn first_attention_level(&self) -> usize {
        let policies = self.policies.policies();
        policies.iter().position(|policy| policy.needs_column_sums()).unwrap_or(policies.len() - 1)
    }

    fn levels(&self, facts: &HeadFacts<'_>) -> LevelMasks {
        let mut keep = vec![false; facts.classes.len()];
        let masks = self.policies.policies().iter().map(|policy| {
            policy.mark(facts, self, &mut keep);
            keep.clone()
        });
        masks.collect()
    }

    /// Recovered mass of each level up to the first that recovers the head.
    ///
    /// A policy with a sliding window counts by what its window holds at each row, the others by their columns.
    fn recovered_masses(&self, group: &[HeadStats], levels: &LevelMasks, segment: Segment<'_>) -> Vec<f64> {
        let policies = self.policies.policies();
        let column_sums = group_column_sums(group, segment.len());
        let positions = segment.all_positions();
        let facts = facts(segment, &positions, &column_sums);
        #[expect(clippy::cast_precision_loss)]
        let rows = self.profile_rows.count(segment.num_rows()) as f64;

        let mut values = Vec::new();
        let mut fixed = vec![false; segment.len()];
        let mut has_window = false;
        for (level, policy) in policies.iter().enumerate() {
            if level + 1 == levels.len() {
                values.push(1.0);
                break;
            }
            if policy.window(segment.len(), self).is_some() {
                has_window = true;
            } else {
                policy.mark(&facts, self, &mut fixed);
            }
            let masses = group.iter().map(|head| {
                let (settled, columns) = split_settled(head.profiled(), segment.len());
                let outside = if has_window { split_settled(&head.window_sums, segment.len()).1 } else { &[] };
                let settled: f64 = settled.iter().map(|&sum| f64::from(sum)).sum();
                let kept: f64 =
                    fixed.iter().zip(columns).filter(|(keep, _)| **keep).map(|(_, &sum)| f64::from(sum)).sum();
                let windowed: f64 =
                    fixed.iter().zip(outside).filter(|(keep, _)| !**keep).map(|(_, &sum)| f64::from(sum)).sum();
                at_least_zero((settled + kept + windowed) / rows)
            });
            #[expect(clippy::cast_precision_loss)]
            let value = match self.gqa {
                GroupReduction::Min => masses.fold(f64::INFINITY, f64::min),
                GroupReduction::Mean => masses.sum::<f64>() / group.len() as f64,
            };
            values.push(value);
            if self.recovers(value) {
                break;
            }
        }
        values
    }

    /// Largest difference of each level up to the first that recovers the head, for every KV head.
    fn largest_differences(
        &self,
        groups: &[&[HeadStats]],
        levels: &[LevelMasks],
        second_pass: impl FnOnce(&[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Vec<Vec<f64>>> {
        let first_pass_levels = self.first_attention_level();
        let last_level = self.policies.num_levels() - 1;
        let mut values: Vec<Vec<f64>> = groups
            .iter()
            .map(|group| {
                let worst = (0..first_pass_levels)
                    .map(|level| f64::from(group.iter().map(|head| head.differences[level]).fold(0.0, f32::max)));
                self.until_recovered(worst).collect()
            })
            .collect();
        let open = |values: &[f64]| !values.last().is_some_and(|&value| self.recovers(value));
        let pending: Vec<(usize, Vec<Vec<f32>>)> = (0..groups.len())
            .filter(|&head| first_pass_levels < last_level && open(&values[head]))
            .map(|head| {
                (head, levels[head][first_pass_levels..last_level].iter().map(|mask| as_numbers(mask)).collect())
            })
            .collect();
        if !pending.is_empty() {
            for ((head, _), differences) in pending.iter().zip(second_pass(&pending)?) {
                values[*head].extend(self.until_recovered(differences.into_iter().map(f64::from)));
            }
        }
        for values in &mut values {
            if open(values) {
                values.push(0.0); // everything is kept: no difference
            }
        }
        Ok(values)
    }

    /// The values up to the first that recovers, that one included.
    fn until_recovered(&self, values: impl Iterator<Item = f64>) -> impl Iterator<Item = f64> {
        let mut done = false;
        values.take_while(move |&value| {
            let take = !done;
            done |= self.recovers(value);
            take
        })
    }
}

fn facts<'a>(segment: Segment<'a>, positions: &'a [u32], column_sums: &'a [f32]) -> HeadFacts<'a> {
    let Segment { first_position, classes, .. } = segment;
    HeadFacts { first_position, segment_len: classes.len(), positions, classes, column_sums }
}

fn as_numbers(mask: &[bool]) -> Vec<f32> {
    mask.iter().map(|&keep| f32::from(u8::from(keep))).collect()
}
