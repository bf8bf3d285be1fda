//! Where activations come from that are rounded.

use std::ops::Range;

use crate::kernels::simd::InstructionSet;
use crate::kernels::vector;

/// Rows of activations, which are there or are computed a part at a time.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Rows(&'a [f32]),
    /// `up * silu(gate)`, see [`Inputs::gated`](super::Inputs::gated).
    Gated {
        gate: &'a [f32],
        up: &'a [f32],
    },
}

impl<'a> Source<'a> {
    /// Numbers in all.
    pub fn len(self) -> usize {
        match self {
            Self::Rows(x) | Self::Gated { up: x, .. } => x.len(),
        }
    }

    /// Some of them, in a buffer if they have to be computed.
    pub fn part<'b>(self, set: InstructionSet, range: Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::Rows(x) => &x[range],
            Self::Gated { gate, up } => {
                up[range.clone()].clone_into(buffer);
                vector::silu_mul(set, &gate[range], buffer);
                buffer
            }
        }
    }
}
