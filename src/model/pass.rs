//! A layer's work on a prompt, wherever it is done: one interface to the CPU kernels' and to candle operations'.
//!
//! Not for: the work itself (see [`super::layer_pass`] and [`super::device`]).

use super::block::Block;
use super::device::{DevicePass, RotationTensors};
use super::layer_pass::{Choice, LayerPass};
use super::rope::Rope;
use crate::attention::map::MapAccumulator;
use crate::cache::{AdaptiveKvCache, LayerSummary};
use crate::error::Result;
use crate::ops::Ops;
use crate::profile::HeadChoice;

/// A layer's work on a prompt, wherever it is done.
pub(super) enum Pass<'a> {
    Host(LayerPass<'a>),
    Device(DevicePass<'a>),
}

impl Pass<'_> {
    /// Rows of the prompt that went through the layer.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(pass) => pass.len(),
            Self::Device(pass) => pass.len(),
        }
    }

    pub fn choose(&mut self, block: &Block, rope: &Rope) -> Result<Choice> {
        match self {
            Self::Host(pass) => pass.choose(block, rope),
            Self::Device(pass) => pass.choose(block, rope),
        }
    }

    /// Stores what was chosen in a layer of the cache.
    pub fn store(
        &self,
        cache: &mut AdaptiveKvCache,
        layer: usize,
        choices: Option<Vec<HeadChoice>>,
    ) -> Result<LayerSummary> {
        match self {
            Self::Host(pass) => {
                let (keys, values) = pass.rows();
                cache.layer_mut(layer)?.store_prompt(keys, values, choices)
            }
            Self::Device(pass) => pass.store(cache.device_layer_mut(layer)?, choices),
        }
    }

    pub fn into_maps(self) -> Option<MapAccumulator> {
        match self {
            Self::Host(pass) => pass.into_maps(),
            Self::Device(pass) => pass.into_maps(),
        }
    }
}

/// Rotations of a prompt's positions, wherever they are applied.
pub(super) enum Angles {
    /// `[prompt_len, rope dim / 2]`
    Host(Vec<(f32, f32)>),
    Device(Ops, RotationTensors),
}

impl Angles {
    pub fn new(angles: Vec<(f32, f32)>, half: usize, ops: Option<&Ops>) -> Result<Self> {
        Ok(match ops {
            Some(ops) => Self::Device(ops.clone(), RotationTensors::new(ops, &angles, half)?),
            None => Self::Host(angles),
        })
    }
}
