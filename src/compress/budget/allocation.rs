//! How a budget is shared out over layers and heads, given the scores of a [`Method`](super::methods::Method).

use std::cmp::Ordering;

use crate::compress::ratio_count;

/// The share of the average budget that every head of a layer gets in any case where the heads compete (Feng et al., arXiv
/// 2407.11550).
pub const SAFEGUARD: f64 = 0.2;

/// A way to share out a budget: the average number of positions of a head, times the heads of all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allocation {
    /// Every head of every layer gets the average, rounded down.
    Uniform,
    /// Budgets fall linearly from the first layer to the last (`PyramidKV`, as kvpress computes it), each rounded to
    /// the nearest; heads of a layer get the same.
    Pyramid {
        /// The last layer gets the average divided by this, unless the first then has more than there is to choose from.
        beta: f64,
        /// What is always kept. If the last layer would get less, every layer gets the average, rounded down.
        window: usize,
    },
    /// Every layer gets the same; of that, every head gets its best positions up to this share of the average, and the
    /// rest goes to the best scores of all heads together (`Ada-KV`, as kvpress computes it).
    Adaptive {
        /// In 0..=1.
        safeguard: f64,
    },
    /// One list of the scores of all heads of all layers decides, which is known when the last layer has been processed
    /// (see [`Pool`](super::pool::Pool)).
    Pooled,
}

impl Allocation {
    /// Whether positions of one head compete with those of another.
    #[must_use]
    pub fn lets_heads_compete(self) -> bool {
        matches!(self, Self::Adaptive { .. } | Self::Pooled)
    }

    /// The average budget of a head in a layer; at least 1 unless `average` is less, at most `len`.
    ///
    /// * `average`: over all layers; in `0..=len`
    /// * `len`: positions to choose from
    /// * `layer`: below `num_layers`
    #[must_use]
    pub fn layer_budget(self, average: f64, len: usize, layer: usize, num_layers: usize) -> usize {
        match self {
            Self::Uniform | Self::Adaptive { .. } | Self::Pooled => rounded_down(average, len),
            Self::Pyramid { beta, window } => pyramid(average, len, layer, num_layers, beta, window),
        }
    }

    /// What every head of a layer keeps, were it the only layer: indices into its scores, ascending.
    ///
    /// * `scores`: `[heads]` of `[len]`
    /// * `budget`: from [`layer_budget`](Self::layer_budget)
    #[must_use]
    pub fn select(self, scores: &[Vec<f32>], budget: usize) -> Vec<Vec<usize>> {
        match self {
            Self::Uniform | Self::Pyramid { .. } => scores.iter().map(|scores| top_positions(scores, budget)).collect(),
            Self::Adaptive { safeguard } => adaptive(scores, budget, ratio_count(safeguard, budget)),
            Self::Pooled => adaptive(scores, budget, 0),
        }
    }
}

/// The order of two scores: that of their numbers, so that zeros of both signs are equal; one that is no number has a
/// place, too, as in [`f32::total_cmp`].
pub(crate) fn by_score(a: f32, b: f32) -> Ordering {
    // Adding 0.0 turns -0.0 into 0.0.
    (a + 0.0).total_cmp(&(b + 0.0))
}

/// Indices of the `count` largest scores, ascending; of equal scores the lower index.
#[must_use]
pub fn top_positions(scores: &[f32], count: usize) -> Vec<usize> {
    let count = count.min(scores.len());
    if count == 0 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // The index breaks ties, which makes this a total order: the selected set does not depend on the algorithm.
    order.select_nth_unstable_by(count - 1, |&a, &b| by_score(scores[b], scores[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// A number of positions as [`ratio_count`] rounds it, so that 0.3 of 10 is 3.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // counts of tokens
fn rounded_down(average: f64, len: usize) -> usize {
    ((average + 1e-9).floor() as usize).min(len)
}

/// Budgets of a pyramid, as kvpress rounds them. Where roundings add up to more than the whole, the first layers, which
/// have most, get one less.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // counts of tokens
fn pyramid(mean: f64, len: usize, layer: usize, num_layers: usize, beta: f64, window: usize) -> usize {
    let largest = len.saturating_sub(window) as f64;
    let (mut last, mut first) = (mean / beta, 2.0 * mean - mean / beta);
    if first >= largest {
        (last, first) = (2.0 * mean - largest, largest);
    }
    if num_layers < 2 || !(first >= last && last >= window as f64) {
        return rounded_down(mean, len);
    }
    let step = (first - last) / (num_layers - 1) as f64;
    let rounded = |layer: usize| (first - layer as f64 * step).round_ties_even() as usize;
    let whole = rounded_down(mean * num_layers as f64, len * num_layers);
    let excess = (0..num_layers).map(rounded).sum::<usize>().saturating_sub(whole);
    (rounded(layer) - usize::from(layer < excess)).min(len)
}

/// * `safe`: what every head gets of its own best
fn adaptive(scores: &[Vec<f32>], budget: usize, safe: usize) -> Vec<Vec<usize>> {
    let mut kept: Vec<Vec<usize>> = scores.iter().map(|scores| top_positions(scores, safe)).collect();
    // All heads' other positions, by index and then by head, which is the order among equal scores.
    let len = scores.iter().map(Vec::len).max().unwrap_or(0);
    let rest: Vec<(usize, usize)> = (0..len)
        .flat_map(|index| (0..scores.len()).map(move |head| (index, head)))
        .filter(|&(index, head)| index < scores[head].len() && kept[head].binary_search(&index).is_err())
        .collect();
    let pooled: Vec<f32> = rest.iter().map(|&(index, head)| scores[head][index]).collect();
    let room = (budget * scores.len()).saturating_sub(kept.iter().map(Vec::len).sum());
    for place in top_positions(&pooled, room) {
        let (index, head) = rest[place];
        kept[head].push(index);
    }
    for kept in &mut kept {
        kept.sort_unstable();
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const PYRAMID: Allocation = Allocation::Pyramid { beta: 20.0, window: 4 };

    fn pyramid_budgets(average: f64, len: usize, num_layers: usize) -> Vec<usize> {
        (0..num_layers).map(|layer| PYRAMID.layer_budget(average, len, layer, num_layers)).collect()
    }

    #[test]
    fn of_equal_scores_the_lower_position_is_kept() {
        assert_eq!(top_positions(&[1.0, 3.0, 1.0, 3.0, 1.0, f32::INFINITY], 4), [0, 1, 3, 5]);
        assert_eq!(top_positions(&[0.5, 0.5], 5), [0, 1]);
        assert_eq!(top_positions(&[-0.0, 0.0, -1.0], 1), [0]);
        assert!(top_positions(&[], 3).is_empty());
    }

    #[test]
    fn pyramids_are_those_of_the_formula() {
        // mean 100: last 5, first 195; step 190 / 4.
        assert_eq!(pyramid_budgets(100.0, 1000, 5), [195, 148, 100, 52, 5]);
        // 195 is more than the 106 there are beside the window: first 106, last 94.
        assert_eq!(pyramid_budgets(100.0, 110, 5), [106, 103, 100, 97, 94]);
        // The last layer would get 2, less than the window.
        assert_eq!(pyramid_budgets(40.7, 1000, 5), [40; 5]);
        assert_eq!(pyramid_budgets(100.0, 1000, 1), [100]);
        assert_eq!(pyramid_budgets(0.0, 0, 3), [0; 3]);
        // Half a position makes the window fit: last 4.5 (to even), first 104.
        assert_eq!(pyramid_budgets(54.25, 108, 2), [104, 4]);
    }

    #[test]
    fn a_pyramid_is_never_larger_than_its_average_and_hardly_smaller() {
        for num_layers in 1..40 {
            for average in [1u16, 7, 80, 81, 150, 250, 333, 499, 500] {
                let budgets = pyramid_budgets(f64::from(average), 500, num_layers);
                let (total, whole) = (budgets.iter().sum::<usize>(), usize::from(average) * num_layers);
                assert!(total <= whole && total + 2 >= whole, "{average}, {num_layers}: {total} of {whole}");
                assert!(budgets[0] + 1 >= budgets[num_layers - 1], "{budgets:?}");
            }
        }
    }

    #[test]
    fn heads_share_a_layers_budget_and_keep_their_safeguard() {
        let scores = [vec![9.0, 8.0, 7.0, 6.0, 5.0, 4.0], vec![1.0, 3.0, 2.0, 0.0, 0.0, 0.0]];
        let select = |safeguard| Allocation::Adaptive { safeguard }.select(&scores, 3);
        assert_eq!(select(0.0), [vec![0, 1, 2, 3, 4, 5], vec![]]);
        assert_eq!(select(0.4), [vec![0, 1, 2, 3, 4], vec![1]]);
        assert_eq!(select(1.0), [vec![0, 1, 2], vec![0, 1, 2]]);
    }

    #[test]
    fn of_equal_scores_of_several_heads_the_lower_position_and_then_the_lower_head_is_kept() {
        let scores = [vec![1.0; 4], vec![1.0; 4]];
        let adaptive = Allocation::Adaptive { safeguard: 0.0 };
        assert_eq!(adaptive.select(&scores, 1), [[0], [0]]);
        let three = [vec![1.0; 4], vec![1.0; 4], vec![1.0, 0.0, 0.0, 0.0]];
        assert_eq!(adaptive.select(&three, 1), [vec![0], vec![0], vec![0]]);
        assert_eq!(adaptive.select(&three[1..], 2), [vec![0, 1, 2], vec![0]]);
    }
}
