//! One decoding step, one operation after the other: the forward pass of a token as it is to be read, the step of backends
//! that have no better one, and the oracle of those that do.

use super::{Backend, Weights};
use crate::cache::{AdaptiveKvCache, CacheLayer, HeadStep};
use crate::error::{Error, Result};
use crate::stop::Watch;

/// Is shown the attention's output of each layer, `[num_heads, head_dim]`, before the output projection.
pub(crate) type Observe<'a> = &'a mut dyn FnMut(&[f32]);

/// Gives a sequence one token, and computes the logits of the next, `[vocab_size]`. The token is not counted yet.
///
/// * `angles`: `[rope dim / 2]` cosines and sines of its position
/// * `cache`: of the model's shape and rows
///
/// # Errors
/// As [`Backend::decode`]; [`Error::Interrupted`] if a [stop](crate::stop) was requested some time ago.
pub(crate) fn decode<B: Backend>(
    backend: &B,
    weights: &Weights<B>,
    id: u32,
    angles: &[(f32, f32)],
    cache: &mut AdaptiveKvCache,
    mut observe: Option<Observe<'_>>,
) -> Result<Vec<f32>> {
    let (position, class) = (cache.seen(), cache.class(id));
    let mut embedded = Vec::new();
    weights.embed_tokens.look_up(&[id], &mut embedded)?;
    let mut hidden = backend.hidden(embedded)?;
    let rotations = backend.rotations(angles.to_vec())?;
    let stop = Watch::default();
    for (block, layer) in weights.blocks.iter().zip(cache.layers_mut::<B::Rows>()?) {
        if stop.is_over() {
            return Err(Error::Interrupted);
        }
        let projected = backend.project(block, &hidden, &rotations, 0, false)?;
        backend.append(layer, &projected, position, class)?;
        let attended = backend.attend_rows(layer.rows(), &projected)?;
        if let Some(observe) = observe.as_deref_mut() {
            observe(&backend.attended(&attended)?);
        }
        evict(backend, layer, &projected)?;
        hidden = backend.finish(block, &hidden, attended)?;
    }
    backend.logits(weights, &hidden)
}

/// Evicts what no longer belongs to what the heads of a layer keep.
fn evict<B: Backend>(backend: &B, layer: &mut CacheLayer<B::Rows>, projected: &B::Projected) -> Result<()> {
    let num_kv_heads = layer.ledger().layout().num_kv_heads;
    if !(0..num_kv_heads).any(|kv_head| layer.ledger().evicts(kv_head)) {
        return Ok(());
    }
    let mut steps = vec![HeadStep::default(); num_kv_heads];
    for (kv_head, step) in steps.iter_mut().enumerate() {
        if layer.ledger().reads_weights(kv_head) {
            step.weights = backend.row_weights(layer.rows(), projected, kv_head)?;
        }
        if layer.ledger().reads_queries(kv_head) {
            step.queries = backend.group_queries(projected, kv_head)?;
        }
        if layer.ledger().reads_keys(kv_head) {
            step.keys = backend.row_keys(layer.rows(), kv_head)?;
        }
        layer.ledger().decide(kv_head, step);
    }
    layer.evict(&mut steps)
}
