//! What methods with a budget read of a prompt in one layer beyond sums over attention, computed once the prompt is through.
//!
//! Not for: numbers that are collected while it is processed (see [`super::keeper`]), or what methods make of them (see
//! [`crate::compress::budget::methods`]).

use crate::arch::Rope;
use crate::attention::HeadLayout;
use crate::attention::blocks::block_attention;
use crate::attention::last_rows::last_rows;
use crate::attention::outputs::{absolute_outputs, output_products};
use crate::attention::prompt_rows::{PromptKv, PromptRows};
use crate::attention::replay::WidenedRows;
use crate::compress::budget::methods::{Blocks, Outputs, QueryMoments};
use crate::compress::budget::select::HeadRows;
use crate::compress::{Needs, Segment};
use crate::error::Result;
use crate::kernels::vector::{self, instruction_set};

/// A prompt in one layer.
#[derive(Clone, Copy)]
pub(super) struct PromptFacts<'a> {
    pub layout: HeadLayout,
    pub rope: &'a Rope,
    /// What is decided about.
    pub segment: Segment<'a>,
    /// What is read.
    pub needs: Needs,
    /// Present if any of it is read.
    pub kv: Option<&'a PromptKv>,
    /// `[rows, num_heads, head_dim]` rotated queries of the prompt's last rows that were kept, or of all.
    pub queries: &'a [f32],
}

/// A head's last rows, as many as a segment has, `[segment_len, head_dim]`.
fn rows_of_segment(segment: Segment<'_>, rows: &PromptRows, kv_head: usize) -> Vec<f32> {
    let end = rows.past_len(kv_head) + rows.len();
    rows.rows(kv_head, end - segment.len()..end)
}

/// Keys and values of a segment that is shorter than the prompt, as if nothing else had been there.
///
/// # Errors
/// [`Error::Shape`](crate::error::Error::Shape) if sizes do not fit.
pub(super) fn kv_of_segment(layout: HeadLayout, segment: Segment<'_>, kv: &PromptKv) -> Result<PromptKv> {
    let of_segment = |rows: &PromptRows| {
        let heads = (0..layout.num_kv_heads).map(|kv_head| rows_of_segment(segment, rows, kv_head)).collect();
        PromptRows::whole(layout, heads, &vec![segment.recent; layout.num_kv_heads], segment.num_rows())
    };
    Ok(PromptKv { keys: of_segment(&kv.keys)?, values: of_segment(&kv.values)? })
}

impl PromptFacts<'_> {
    /// A head's rows of the segment, `[segment_len, head_dim]`.
    fn segment_rows(&self, rows: &PromptRows, kv_head: usize) -> Vec<f32> {
        rows_of_segment(self.segment, rows, kv_head)
    }

    /// `[num_kv_heads]` of `[segment_len, head_dim]` values; none if they are not there.
    pub fn values(&self) -> Vec<Vec<f32>> {
        let heads =
            |kv: &PromptKv| (0..self.layout.num_kv_heads).map(|head| self.segment_rows(&kv.values, head)).collect();
        self.kv.map_or_else(Vec::new, heads)
    }

    /// `[num_kv_heads]` of `[rows, head_dim]` values of what was decided about before the segment; none if they are not there.
    pub fn past_values(&self) -> Vec<Vec<f32>> {
        let recent = self.segment.recent;
        let head = |kv: &PromptKv, kv_head: usize| {
            kv.values.rows(kv_head, 0..kv.values.past_len(kv_head).saturating_sub(recent))
        };
        let heads = |kv: &PromptKv| (0..self.layout.num_kv_heads).map(|kv_head| head(kv, kv_head)).collect();
        self.kv.map_or_else(Vec::new, heads)
    }

    /// Keys before they were rotated, `[segment_len, head_dim]`. Those of a sequence whose rotations grow with its length
    /// are turned back as if all of it had been rotated at once.
    fn unrotated_keys(&self, kv: &PromptKv, kv_head: usize) -> Vec<f32> {
        let mut keys = self.segment_rows(&kv.keys, kv_head);
        self.rope.unrotate(&mut keys, self.layout.head_dim, self.segment.first_position);
        keys
    }

    /// What is read of one KV head.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) if sizes do not fit.
    pub fn head_rows(&self, kv_head: usize) -> Result<HeadRows> {
        let Some(kv) = self.kv else { return Ok(HeadRows::default()) };
        let mut rows = HeadRows::default();
        if self.needs.keys_and_values {
            rows.keys = self.segment_rows(&kv.keys, kv_head);
            rows.values = self.segment_rows(&kv.values, kv_head);
        }
        if self.needs.unrotated_keys {
            rows.unrotated_keys = self.unrotated_keys(kv, kv_head);
        }
        if self.needs.last_rows > 0 {
            let wanted = self.needs.last_rows * self.layout.query_width();
            let queries = &self.queries[self.queries.len().saturating_sub(wanted)..];
            let last = last_rows(self.layout, kv_head, queries, kv, self.segment.len())?;
            (rows.last_weights, rows.last_outputs) = (last.weights, last.outputs);
        }
        Ok(rows)
    }

    /// What [`Needs::outputs`] asks for.
    ///
    /// * `weights`: of the output projection, made only if they are read
    ///
    /// # Errors
    /// Of `weights`, and [`Error::Shape`](crate::error::Error::Shape) if sizes do not fit.
    pub fn outputs<'w>(
        &self,
        hidden_size: usize,
        weights: impl FnOnce() -> Result<Box<WidenedRows<'w>>>,
    ) -> Result<Vec<Vec<f32>>> {
        let make = match self.needs.outputs {
            Outputs::None => return Ok(Vec::new()),
            Outputs::Absolute => absolute_outputs,
            Outputs::Products => output_products,
        };
        make(self.layout, hidden_size, &*weights()?, &self.values())
    }

    /// What [`Needs::block_attention`] asks for.
    ///
    /// # Errors
    /// As [`block_attention`].
    pub fn block_attention(&self) -> Result<Vec<Vec<f32>>> {
        let (Some(kv), Some(Blocks { skip_first, skip_last, len })) = (self.kv, self.needs.block_attention) else {
            return Ok(Vec::new());
        };
        let count = self.segment.len();
        let first = skip_first.saturating_sub(self.segment.first_position).min(count);
        let inner = first..count.saturating_sub(skip_last).max(first);
        block_attention(self.layout, self.queries, &kv.keys, count, (inner, len))
    }

    /// What [`Needs::mean_distances`] asks for.
    ///
    /// * `queries`: `[num_heads]` moments of the prompt's queries before they were rotated
    pub fn mean_scores(&self, queries: &[QueryMoments]) -> Vec<Vec<f32>> {
        let (distances, head_dim) = (self.needs.mean_distances, self.layout.head_dim);
        let (Some(kv), true) = (self.kv, distances > 0) else { return Vec::new() };
        let angles = self.rope.angles(0, distances);
        let mean_key = |kv_head: usize| {
            let keys = self.unrotated_keys(kv, kv_head);
            let prompt = self.segment.recent * head_dim;
            let mut sums = vec![0.0f64; head_dim];
            for key in keys[prompt..].chunks_exact(head_dim) {
                sums.iter_mut().zip(key).for_each(|(sum, &number)| *sum += f64::from(number));
            }
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
            let mean: Vec<f32> =
                sums.into_iter().map(|sum| (sum / self.segment.num_rows().max(1) as f64) as f32).collect();
            let mut at_all = mean.repeat(distances);
            self.rope.rotate(&mut at_all, head_dim, head_dim, &angles);
            at_all
        };
        let keys: Vec<Vec<f32>> = (0..self.layout.num_kv_heads).map(mean_key).collect();
        let last = angles.len() / distances * (distances - 1);
        let scores = |(head, query): (usize, &QueryMoments)| -> Vec<f32> {
            let mut query = query.mean.clone();
            self.rope.rotate(&mut query, head_dim, head_dim, &angles[last..]);
            let keys = keys[head / self.layout.group_size()].chunks_exact(head_dim);
            keys.map(|key| vector::dot(instruction_set(), key, &query) * self.layout.scale()).collect()
        };
        queries.iter().enumerate().map(scores).collect()
    }
}
