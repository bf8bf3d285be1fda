//! Blocks, and a layer's work on a prompt, made of candle operations on any device.
//!
//! The residual stream, norms and rotations are f32; products with weights are in the numbers of the weights. What is
//! profiled is brought to the host once for each layer; methods that read queries, keys or values get copies of them there.
//!
//! Not for: the CPU's own kernels (see [`super::block`] and [`super::layer_pass`]).

use candle_core::Tensor;

use super::block::Block;
use super::config::RopeLayout;
use super::layer_pass::{Choice, Profile};
use super::linear::Linear;
use super::rope::Rope;
use crate::attention::HeadLayout;
use crate::attention::device::{self, DeviceStats, PromptBlock, PromptTensors};
use crate::attention::map::MapAccumulator;
use crate::cache::{DeviceLayer, LayerSummary};
use crate::error::Result;
use crate::ops::Ops;
use crate::profile::{HeadChoice, LayerPlace, Profiler, Segment};

/// Cosines and sines of some positions.
#[derive(Debug, Clone)]
pub(super) struct RotationTensors {
    /// `[seq_len, rope dim / 2]`
    cos: Tensor,
    sin: Tensor,
}

impl RotationTensors {
    /// * `angles`: `[seq_len, half]`, from [`Rope::angles`]
    pub fn new(ops: &Ops, angles: &[(f32, f32)], half: usize) -> Result<Self> {
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().copied().unzip();
        let shape = (angles.len() / half.max(1), half);
        Ok(Self { cos: ops.upload(&cos, shape)?, sin: ops.upload(&sin, shape)? })
    }

    /// Some of the positions.
    pub fn rows(&self, first: usize, count: usize) -> Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, first, count)?, sin: self.sin.narrow(0, first, count)? })
    }
}

/// What a block needs to know of the model and of the tokens that it is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceContext<'a> {
    pub ops: &'a Ops,
    pub layout: HeadLayout,
    pub rms_norm_eps: f64,
    pub rope_layout: RopeLayout,
    /// Leading numbers of a head that are rotated.
    pub rope_dim: usize,
    /// Of the tokens that are given.
    pub rotations: &'a RotationTensors,
}

/// Queries, keys and values of some tokens, queries and keys rotated.
#[derive(Debug)]
pub(super) struct ProjectedTensors {
    /// `[num_heads, seq_len, head_dim]`
    pub queries: Tensor,
    /// `[num_kv_heads, seq_len, head_dim]`
    pub keys: Tensor,
    /// `[num_kv_heads, seq_len, head_dim]`
    pub values: Tensor,
    /// `[seq_len, num_heads * head_dim]` queries before the rotation.
    pub unrotated_queries: Tensor,
}

impl DeviceContext<'_> {
    /// Puts heads before tokens: `[seq_len, heads * head_dim]` becomes `[heads, seq_len, head_dim]`.
    fn by_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (seq_len, width) = x.dims2()?;
        let head_dim = self.layout.head_dim;
        let x = x.reshape((seq_len, width / head_dim, head_dim))?.transpose(0, 1)?;
        self.ops.contiguous(&x)
    }

    /// Rotates `[heads, seq_len, head_dim]`.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let head_dim = self.layout.head_dim;
        if self.rope_dim == 0 {
            return Ok(x.clone());
        }
        let rotated = self.ops.contiguous(&x.narrow(2, 0, self.rope_dim)?)?.unsqueeze(0)?;
        let RotationTensors { cos, sin } = self.rotations;
        let rotated = match self.rope_layout {
            RopeLayout::Halves => candle_nn::rotary_emb::rope(&rotated, cos, sin),
            RopeLayout::Interleaved => candle_nn::rotary_emb::rope_i(&rotated, cos, sin),
        };
        let rotated = self.ops.counted(rotated)?.squeeze(0)?;
        if self.rope_dim == head_dim {
            return Ok(rotated);
        }
        let rest = self.ops.contiguous(&x.narrow(2, self.rope_dim, head_dim - self.rope_dim)?)?;
        self.ops.cat(&[rotated, rest], 2)
    }
}

impl Block {
    /// Projects hidden states to queries, keys and values, and rotates them.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`, f32
    pub(super) fn project_on(&self, hidden: &Tensor, context: DeviceContext<'_>) -> Result<ProjectedTensors> {
        let ops = context.ops;
        let normed = ops.rms_norm(hidden, &self.input_layernorm, context.rms_norm_eps)?;
        let [unrotated_queries, keys, values] =
            Linear::forward_on(ops, &normed, [&self.q_proj, &self.k_proj, &self.v_proj])?;
        Ok(ProjectedTensors {
            queries: context.rotate(&context.by_heads(&unrotated_queries)?)?,
            keys: context.rotate(&context.by_heads(&keys)?)?,
            values: context.by_heads(&values)?,
            unrotated_queries,
        })
    }

    /// Adds the attention's result and the MLP's to the residual stream.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`, as [`project_on`](Self::project_on) got it
    /// * `attended`: `[seq_len, num_heads * head_dim]`, f32
    ///
    /// Returns `[seq_len, hidden_size]`.
    pub(super) fn finish_on(&self, hidden: &Tensor, attended: &Tensor, context: DeviceContext<'_>) -> Result<Tensor> {
        let ops = context.ops;
        let [attended] = Linear::forward_on(ops, attended, [&self.o_proj])?;
        let residual = ops.add(hidden, &attended)?;
        let normed = ops.rms_norm(&residual, &self.post_attention_layernorm, context.rms_norm_eps)?;
        let [gate, up] = Linear::forward_on(ops, &normed, [&self.gate_proj, &self.up_proj])?;
        let [down] = Linear::forward_on(ops, &ops.silu_mul(&gate, &up)?, [&self.down_proj])?;
        ops.add(&residual, &down)
    }
}

/// One layer's work on a prompt, as [`LayerPass`](super::layer_pass::LayerPass) does it on the host.
pub(super) struct DevicePass<'a> {
    ops: &'a Ops,
    layout: HeadLayout,
    prompt: PromptTensors,
    profile: Option<(Profile<'a>, DeviceStats)>,
    /// Queries of the whole prompt, kept only if they may be asked again.
    queries: Option<Vec<PromptBlock>>,
    maps: Option<MapAccumulator>,
}

impl<'a> DevicePass<'a> {
    pub fn new(
        ops: &'a Ops,
        layout: HeadLayout,
        cache: &DeviceLayer,
        profile: Option<(&'a Profiler, Segment<'a>)>,
        place: LayerPlace,
        prompt_len: usize,
        map_side: Option<usize>,
    ) -> Result<Self> {
        let prompt = cache.prompt_tensors(prompt_len)?;
        let num_keys = |head: usize| prompt.past_lens()[head / layout.group_size()] + prompt_len;
        let profile = profile.map(|profile| Profile::new(layout, profile, place, (0..layout.num_heads).map(num_keys)));
        let second_pass = profile.as_ref().is_some_and(Profile::may_need_second_pass);
        let profile = match profile {
            Some(profile) => {
                let stats = DeviceStats::new(ops, &profile.stats.request, &prompt)?;
                Some((profile, stats))
            }
            None => None,
        };
        let maps = map_side.map(|side| MapAccumulator::new(layout.num_heads, prompt_len, side));
        Ok(Self { ops, layout, prompt, profile, queries: second_pass.then(Vec::new), maps })
    }

    /// Runs one chunk of rows `[seq_len, hidden_size]` through the layer.
    pub fn chunk(
        &mut self,
        block: &Block,
        hidden: &Tensor,
        first_row: usize,
        context: DeviceContext<'_>,
    ) -> Result<Tensor> {
        let projected = block.project_on(hidden, context)?;
        self.prompt.push(self.ops, &projected.keys, &projected.values)?;
        if let Some((profile, _)) = &mut self.profile {
            let (wants_queries, replay) = (profile.wants_unrotated_queries(), profile.wants_replay());
            if wants_queries || replay {
                let download = |wanted: bool, x: &Tensor| if wanted { self.ops.download(x) } else { Ok(Vec::new()) };
                let queries = projected.queries.transpose(0, 1)?; // [seq_len, num_heads, head_dim]
                profile.add_rows(
                    &download(replay, &queries)?,
                    &download(wants_queries, &projected.unrotated_queries)?,
                    &download(replay, hidden)?,
                    hidden.dim(1)?,
                )?;
            }
        }
        let rows = PromptBlock { queries: projected.queries, first_row };
        let attended = device::prefill(
            self.ops,
            self.layout,
            &rows,
            &self.prompt,
            self.profile.as_mut().map(|(_, stats)| stats),
            self.maps.as_mut().map(MapAccumulator::heads_mut),
        )?;
        if let Some(queries) = &mut self.queries {
            queries.push(rows);
        }
        block.finish_on(hidden, &attended, context)
    }

    /// Rows of the prompt that went through the layer.
    pub fn len(&self) -> usize {
        self.prompt.len()
    }

    /// The prompt's attention maps, if there are any.
    pub fn into_maps(self) -> Option<MapAccumulator> {
        self.maps
    }

    /// What each head keeps, or what decides about it.
    pub fn choose(&mut self, block: &Block, rope: &Rope) -> Result<Choice> {
        let Some((profile, stats)) = &mut self.profile else { return Ok(Choice::Everything) };
        stats.finish(self.ops, &self.prompt, &mut profile.stats)?;
        let rows = profile.reads_rows().then(|| self.prompt.to_host(self.ops)).transpose()?;
        let queries = self.queries.as_deref().unwrap_or_default();
        let rows = rows.as_ref().map(|(keys, values)| (keys, values));
        profile.choose(self.layout, block, rope, rows, |pending| {
            device::largest_differences(self.ops, self.layout, queries, &self.prompt, pending)
        })
    }

    /// Stores what was chosen.
    pub fn store(&self, cache: &mut DeviceLayer, choices: Option<Vec<HeadChoice>>) -> Result<LayerSummary> {
        cache.store_prompt(&self.prompt, choices)
    }
}
