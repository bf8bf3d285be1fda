//! Whether the output layer is the embedding, where a configuration says so and the weights may say otherwise.
//!
//! As transformers 5 decides it (`PreTrainedModel.tie_weights`): the two are one if they are equal or only one of them is
//! there, whichever that is. Not for: formats without such a setting, where an output layer of its own counts if it is there.

use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use super::weights::{Naming, OutputLayer, Role, stored_matrix};
use crate::error::Result;
use crate::mapped;

/// Numbers that are compared at a time.
const COMPARED: usize = 1 << 16;

/// Decides about a checkpoint whose configuration ties the two. If only the output layer is there, its tensor gets the
/// embedding's name.
///
/// Gives where the output layer comes from, and what a user should know if that is not what the configuration says.
///
/// # Errors
/// As [`stored_matrix`].
pub(super) fn resolve(tensors: &mut Tensors, naming: Naming) -> Result<(OutputLayer, Option<String>)> {
    let [embedding, output] = [Role::EmbedTokens, Role::LmHead].map(|role| format!("{}.weight", naming.name(role)));
    match (tensors.get(&embedding), tensors.get(&output)) {
        (Some(a), Some(b)) => {
            let is_equal = is_equal(&embedding, a, &output, b)?;
            // What was read to compare them may never be needed.
            for tensor in [a, b] {
                if let TensorData::Mapped { owner, range } = &tensor.data {
                    mapped::release((**owner).as_ref().get(range.clone()).unwrap_or_default());
                }
            }
            if is_equal {
                return Ok((OutputLayer::Tied, None));
            }
            let note = format!(
                "the configuration of `{}` ties the output layer to the embedding, but its weights have another one, `{output}`, \
                 which is used",
                tensors.path().display()
            );
            Ok((OutputLayer::Own, Some(note)))
        }
        (None, Some(_)) => {
            tensors.rename(&output, &embedding);
            Ok((OutputLayer::Tied, None))
        }
        // If there is neither, that is said when the embedding is looked for.
        (_, None) => Ok((OutputLayer::Tied, None)),
    }
}

/// Whether two tensors hold the same numbers.
fn is_equal(a_name: &str, a: &StoredTensor, b_name: &str, b: &StoredTensor) -> Result<bool> {
    let &[rows, cols] = &a.shape[..] else { return Ok(false) };
    let is_usable = |tensor: &StoredTensor| matches!(tensor.dtype, StoredDtype::Usable(_));
    if a.shape != b.shape || !is_usable(a) || !is_usable(b) {
        return Ok(false);
    }
    if a.dtype == b.dtype {
        let ((a, a_range), (b, b_range)) = (a.aligned(1)?, b.aligned(1)?);
        if (*a).as_ref()[a_range] == (*b).as_ref()[b_range] {
            return Ok(true);
        }
    }
    // Other bytes may be equal numbers: two zeros, or numbers in two formats.
    let (a, b) = (stored_matrix(a_name, a, rows, cols)?, stored_matrix(b_name, b, rows, cols)?);
    let step = (COMPARED / cols).max(1);
    let mut numbers = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(step) {
        let some = first..rows.min(first + step);
        numbers.0.resize(some.len() * cols, 0.0);
        numbers.1.resize(some.len() * cols, 0.0);
        a.dequantize_rows(some.clone(), &mut numbers.0);
        b.dequantize_rows(some, &mut numbers.1);
        if numbers.0 != numbers.1 {
            return Ok(false);
        }
    }
    Ok(true)
}
