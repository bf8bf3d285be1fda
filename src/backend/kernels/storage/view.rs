//! Stored rows as attention reads them.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::{Columns, KeyBlocks, KeyFloats, ValueBlocks, ValueFloats};
use crate::kernels::attend::{BlockKeys, BlockValues, FloatKeys, FloatValues, Pair};

/// Keys or values, as attention reads them.
pub(in crate::backend::kernels) trait View {
    type Rows<'a>
    where
        Self: 'a;

    fn view(&self) -> Self::Rows<'_>;
}

impl<T: Pod> View for KeyFloats<T> {
    type Rows<'a> = FloatKeys<'a, T>;

    fn view(&self) -> FloatKeys<'_, T> {
        FloatKeys(self.tiles())
    }
}

impl<T: Pod> View for ValueFloats<T> {
    type Rows<'a> = FloatValues<'a, T>;

    fn view(&self) -> FloatValues<'_, T> {
        FloatValues(self.tiles())
    }
}

impl<Q: 'static> View for KeyBlocks<Q> {
    type Rows<'a> = BlockKeys<'a, Q>;

    fn view(&self) -> BlockKeys<'_, Q> {
        BlockKeys {
            quants: self.quants.tiles(),
            scales: self.scales.tiles(),
            center: &self.center,
            format: PhantomData,
        }
    }
}

impl<Q: 'static> View for ValueBlocks<Q> {
    type Rows<'a> = BlockValues<'a, Q>;

    fn view(&self) -> BlockValues<'_, Q> {
        BlockValues { quants: self.quants.tiles(), scales: self.scales.tiles(), format: PhantomData }
    }
}

impl<K: View, V: View> Columns<K, V> {
    pub(super) fn view(&self) -> Pair<K::Rows<'_>, V::Rows<'_>> {
        Pair { keys: self.keys.view(), values: self.values.view() }
    }
}
