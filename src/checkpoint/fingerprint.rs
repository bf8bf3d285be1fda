//! What tells one model's weights from another's, without reading all of them.

use super::tensors::{TensorData, Tensors};
use crate::fingerprint::Fingerprint;

/// Bytes that are looked at in a tensor, at a time.
const SAMPLE: usize = 256;
/// How many times: at its beginning, at its end, and in between.
const SAMPLES: usize = 4;

/// The [`Fingerprint`] of all tensors in the order of their names. Of each: its name, format and sizes (as `[2, 3]`), with a
/// line feed behind each; then four runs of 256 bytes of what is stored, from byte `(length - 256) / 3 * i` on for `i` from
/// 0 to 3, of a shorter one all bytes four times. What is put together from several files has its number of bytes there, and
/// a line feed, instead.
///
/// So two models that were trained apart, if only by a step, differ, as do two that were quantised otherwise; one with a
/// number changed by hand may not.
pub fn weights(tensors: &Tensors) -> String {
    let mut fingerprint = Fingerprint::default();
    for (name, tensor) in tensors.iter() {
        fingerprint.add(format!("{name}\n{}\n{:?}\n", tensor.dtype, tensor.shape));
        let TensorData::Mapped { owner, range } = &tensor.data else {
            fingerprint.add(format!("{}\n", tensor.len()));
            continue;
        };
        let bytes = (**owner).as_ref().get(range.clone()).unwrap_or_default();
        let step = bytes.len().saturating_sub(SAMPLE) / (SAMPLES - 1);
        for first in (0..SAMPLES).map(|sample| sample * step) {
            fingerprint.add(&bytes[first..(first + SAMPLE).min(bytes.len())]);
        }
    }
    fingerprint.finish()
}
