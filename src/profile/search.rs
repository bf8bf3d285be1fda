//! The greedy search: unions of policies in a fixed order, the first that recovers the head is taken (paper, eq. 2).
//!
//! What is decided about is a [`Segment`]: a prompt, or what came since an earlier decision. Keys that were settled then
//! stay, and count as kept in every level's value.

use std::sync::Arc;

use super::budgeted::Budgeted;
use super::eviction::Eviction;
use super::stats::{HeadStats, LayerStats, MassRequest, StatsRequest, group_column_sums, split_settled};
use crate::config::{AdaptiveConfig, Criterion, GroupReduction};
use crate::error::{Error, Result};
use crate::numbers::at_least_zero;
use crate::policy::HeadFacts;
use crate::tokens::TokenClass;

/// The tokens that a search decides about.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Position of the first token.
    pub first_position: usize,
    /// `[segment_len]` what each token is.
    pub classes: &'a [TokenClass],
    /// How many of the tokens were appended by decoding before the prompt came; the others are the prompt, whose query
    /// rows are profiled.
    pub recent: usize,
}

impl<'a> Segment<'a> {
    /// A prompt that begins a sequence.
    #[must_use]
    pub fn prompt(classes: &'a [TokenClass]) -> Self {
        Self { first_position: 0, classes, recent: 0 }
    }

    /// Tokens of the segment.
    #[must_use]
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether there is nothing to decide about.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Query rows: tokens of the prompt.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.classes.len().saturating_sub(self.recent)
    }

    /// All positions, ascending.
    fn all_positions(&self) -> Vec<u32> {
        let first = u32::try_from(self.first_position).unwrap_or(u32::MAX);
        (first..).take(self.len()).collect()
    }

    fn facts<'s>(&'s self, positions: &'s [u32], column_sums: &'s [f32]) -> HeadFacts<'s> {
        let Self { first_position, classes, .. } = *self;
        HeadFacts { first_position, segment_len: classes.len(), positions, classes, column_sums }
    }

    /// Absolute positions of the true entries, ascending.
    fn positions(&self, mask: &[bool]) -> Vec<u32> {
        let first = u32::try_from(self.first_position).unwrap_or(u32::MAX);
        (first..).zip(mask).filter(|(_, keep)| **keep).map(|(position, _)| position).collect()
    }
}

/// What one KV head keeps of a segment, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadChoice {
    /// Index of the KV head in its layer.
    pub kv_head: usize,
    /// Index of the chosen level in the search order; 0 if a method with a budget chose.
    pub level: usize,
    /// Recovered mass (`mass`) or largest difference (`max_abs`) of each level tried, up to the chosen one; empty if
    /// there was no search.
    pub recovered: Vec<f64>,
    /// Kept positions of the segment, ascending.
    pub positions: Vec<u32>,
}

/// Chooses for every KV head the smallest union of policies that recovers it; or, if the configuration names a method
/// with a budget, hands out [what chooses instead](Self::budgeted).
#[derive(Debug, Clone)]
pub struct Profiler {
    config: Arc<AdaptiveConfig>,
}

/// `[levels][segment_len]` keep masks of one KV head, the last one all true.
type LevelMasks = Vec<Vec<bool>>;

impl Profiler {
    /// A search as `config` says.
    #[must_use]
    pub fn new(config: Arc<AdaptiveConfig>) -> Self {
        Self { config }
    }

    /// The configuration of the search.
    #[must_use]
    pub fn config(&self) -> &AdaptiveConfig {
        &self.config
    }

    /// What chooses if the configuration names a method with a budget: then the search is not asked. `None` if it names
    /// none.
    #[must_use]
    pub fn budgeted(&self) -> Option<Budgeted> {
        Budgeted::new(&self.config)
    }

    /// What goes on evicting while tokens are generated; `None` if every new token is kept.
    #[must_use]
    pub fn eviction(&self) -> Option<Eviction> {
        Eviction::new(&self.config)
    }

    /// Whether [`choose`](Self::choose) may ask for a second pass over the prompt's rows.
    #[must_use]
    pub fn may_need_second_pass(&self) -> bool {
        self.config.criterion == Criterion::MaxAbs
            && self.first_attention_level() + 1 < self.config.policies.num_levels()
    }

    /// What has to be collected while a prompt is processed.
    #[must_use]
    pub fn request(&self, segment: Segment<'_>) -> StatsRequest {
        let recent = segment.recent;
        let settings = self.config.policy_settings();
        let policies = self.config.policies.policies();
        let column_sums = policies.iter().any(|policy| policy.needs_column_sums());
        match self.config.criterion {
            Criterion::Mass => {
                let window = policies.iter().filter_map(|policy| policy.window(segment.len(), &settings)).max();
                let first_row = segment.num_rows() - self.config.profile_rows.count(segment.num_rows());
                StatsRequest {
                    column_sums,
                    mass: Some(MassRequest { first_row, window }),
                    masks: Vec::new(),
                    recent,
                    log_sums: false,
                }
            }
            Criterion::MaxAbs => {
                let levels = self.levels(&segment.facts(&segment.all_positions(), &[]));
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
            .map(|group| self.levels(&segment.facts(&positions, &group_column_sums(group, segment.len()))))
            .collect();

        let values: Vec<Vec<f64>> = match self.config.criterion {
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
        match self.config.criterion {
            Criterion::Mass => value >= self.config.recovery_threshold,
            Criterion::MaxAbs => value < 1.0 - self.config.recovery_threshold,
        }
    }

    /// Index of the first level whose keep-set depends on attention; at most that of the last level, which never does.
    fn first_attention_level(&self) -> usize {
        let policies = self.config.policies.policies();
        policies.iter().position(|policy| policy.needs_column_sums()).unwrap_or(policies.len() - 1)
    }

    fn levels(&self, facts: &HeadFacts<'_>) -> LevelMasks {
        let settings = self.config.policy_settings();
        let mut keep = vec![false; facts.classes.len()];
        let masks = self.config.policies.policies().iter().map(|policy| {
            policy.mark(facts, &settings, &mut keep);
            keep.clone()
        });
        masks.collect()
    }

    /// Recovered mass of each level up to the first that recovers the head.
    ///
    /// A policy with a sliding window counts by what its window holds at each row, the others by their columns.
    fn recovered_masses(&self, group: &[HeadStats], levels: &LevelMasks, segment: Segment<'_>) -> Vec<f64> {
        let settings = self.config.policy_settings();
        let policies = self.config.policies.policies();
        let column_sums = group_column_sums(group, segment.len());
        let positions = segment.all_positions();
        let facts = segment.facts(&positions, &column_sums);
        #[expect(clippy::cast_precision_loss)]
        let rows = self.config.profile_rows.count(segment.num_rows()) as f64;

        let mut values = Vec::new();
        let mut fixed = vec![false; segment.len()];
        let mut has_window = false;
        for (level, policy) in policies.iter().enumerate() {
            if level + 1 == levels.len() {
                values.push(1.0);
                break;
            }
            if policy.window(segment.len(), &settings).is_some() {
                has_window = true;
            } else {
                policy.mark(&facts, &settings, &mut fixed);
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
            let value = match self.config.gqa {
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
        let last_level = self.config.policies.num_levels() - 1;
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

fn as_numbers(mask: &[bool]) -> Vec<f32> {
    mask.iter().map(|&keep| f32::from(u8::from(keep))).collect()
}
