//! How buffers of rows grow and shrink: with little slack, and rarely.

/// A full buffer grows by this share of its rows (1/16).
const GROWTH_SHIFT: u32 = 4;

/// And by at least so many rows.
const MIN_GROWTH: usize = 16;

/// By how many rows a full buffer of `len` rows grows.
#[must_use]
pub fn growth(len: usize) -> usize {
    (len >> GROWTH_SHIFT).max(MIN_GROWTH)
}

/// Makes room for one more, if there is none.
///
/// * `by_one`: for one more and no others, where each that comes is followed by one that goes
pub(super) fn grow<T>(notes: &mut Vec<T>, by_one: bool) {
    if notes.len() == notes.capacity() {
        notes.reserve_exact(if by_one { 1 } else { growth(notes.len()) });
    }
}

/// Gives back what is allocated if it is much more than what comes next needs.
pub(super) fn trim<T>(notes: &mut Vec<T>) {
    if notes.capacity() - notes.len() > 2 * growth(notes.len()) {
        notes.shrink_to_fit();
    }
}
