//! `compactor`: keys unlike the others, and what queries around them look at (Chari and Van Durme, arXiv 2507.08143; as
//! kvpress's `CompactorPress` computes it, which is its authors' own).

use serde::{Deserialize, Serialize};

use super::key_norm::norm;
use super::random::{mix, unit};
use super::{ALWAYS, Blocks, LayerBudget, Method, MethodFacts, Needs, one_head};
use crate::compress::budget::leverage::leverage;
use crate::compress::values;
use crate::kernels::gemm::{Matrix, MatrixMut};

/// Positions within which queries see all keys.
const BLOCK: usize = 256;

/// Numbers that a key is reduced to, by a random projection, before its leverage is computed.
const SKETCH: usize = 48;

/// What is added to the diagonal of the sketched keys' products.
const RIDGE: f64 = 1e-2;

/// Deviations below this count as this.
const MIN_DEVIATION: f64 = 1e-6;

/// Keeps the first `sink_tokens` and the last `recent_tokens` positions, and of the others those of the largest sum of two
/// scores, each measured in standard deviations of the layer: the leverage of the key before its rotation (how much of its
/// direction it accounts for alone, among the keys around their mean), times the share of the prompt that is not kept; and
/// what it receives from the queries of its block of 256 positions, those before it included, times the length of the value,
/// the mean over neighbours.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compactor {
    /// How many leading positions of the sequence are always kept; default 8.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
    /// How many of the last positions are always kept; default 4.
    #[serde(deserialize_with = "values::whole")]
    pub recent_tokens: usize,
}

impl Compactor {
    /// What its authors have.
    pub const DEFAULT: Self = Self { sink_tokens: 8, recent_tokens: 4 };

    /// How many positions are kept at the segment's beginning and end.
    fn ends(&self, facts: &MethodFacts<'_>) -> (usize, usize) {
        let sinks = facts.num_sinks(self.sink_tokens);
        (sinks, self.recent_tokens.min(facts.len - sinks))
    }
}

impl Default for Compactor {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for Compactor {
    fn name(&self) -> &'static str {
        "compactor"
    }

    fn summary(&self) -> &'static str {
        "keys unlike the others, and what queries around them, before and behind, look at"
    }

    fn needs(&self) -> Needs {
        let blocks = Blocks { skip_first: self.sink_tokens, skip_last: self.recent_tokens, len: BLOCK };
        Needs { keys_and_values: true, unrotated_keys: true, block_attention: Some(blocks), ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        one_head(self, facts)
    }

    /// Leverage and attention, with [`ALWAYS`] where a position is kept in any case.
    fn measures(&self, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
        let (sinks, recent) = self.ends(facts);
        let inner = sinks..facts.len - recent;
        let keys = &facts.unrotated_keys[inner.start * facts.head_dim..inner.end * facts.head_dim];
        let leverages = leverage(&sketched(keys, facts.head_dim, facts.head_idx), SKETCH, None, RIDGE);
        let values = facts.values.chunks_exact(facts.head_dim).zip(facts.block_attention);
        let weighted: Vec<f32> = values.map(|(value, attention)| norm(value) * attention).collect();
        let weighted = &weighted[inner];
        let pooled = (0..weighted.len())
            .map(|index| weighted[index.saturating_sub(1)..(index + 2).min(weighted.len())].iter().sum::<f32>() / 3.0);
        let with_ends = |inner: Vec<f32>| [vec![ALWAYS; sinks], inner, vec![ALWAYS; recent]].concat();
        vec![with_ends(leverages), with_ends(pooled.collect())]
    }

    fn layer_scores(&self, budget: &LayerBudget, measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        let standardise = [0, 1].map(|measure| {
            let numbers = || {
                let all = measures.iter().filter_map(move |head| head.get(measure)).flatten();
                all.copied().filter(|&number| number != ALWAYS).map(f64::from)
            };
            #[expect(clippy::cast_precision_loss)]
            let count = numbers().count() as f64;
            let mean = numbers().sum::<f64>() / count.max(1.0);
            let squares: f64 = numbers().map(|number| (number - mean).powi(2)).sum();
            let deviation = (squares / (count - 1.0).max(1.0)).sqrt().max(MIN_DEVIATION);
            move |number: f32| (f64::from(number) - mean) / deviation
        });
        let [leverage, attention] = standardise;
        let blend = 1.0 - budget.kept_ratio;
        #[expect(clippy::cast_possible_truncation)] // rounded
        let score = |(&by_leverage, &by_attention): (&f32, &f32)| {
            if by_leverage == ALWAYS {
                ALWAYS
            } else {
                (blend * leverage(by_leverage) + attention(by_attention)) as f32
            }
        };
        let heads = measures.iter().map(|head| match &head[..] {
            [leverages, attention] => leverages.iter().zip(attention).map(score).collect(),
            _ => Vec::new(),
        });
        heads.collect()
    }
}

/// Keys around their mean, projected to [`SKETCH`] normally distributed directions: `[n, SKETCH]`.
///
/// * `keys`: `[n, dim]`
fn sketched(keys: &[f32], dim: usize, head_idx: usize) -> Vec<f32> {
    let len = keys.len() / dim;
    let mut sums = vec![0.0f64; dim];
    for key in keys.chunks_exact(dim) {
        sums.iter_mut().zip(key).for_each(|(sum, &number)| *sum += f64::from(number));
    }
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    let mean: Vec<f32> = sums.into_iter().map(|sum| (sum / len.max(1) as f64) as f32).collect();
    let centred: Vec<f32> =
        keys.chunks_exact(dim).flat_map(|key| key.iter().zip(&mean).map(|(number, mean)| number - mean)).collect();
    let sketch = sketch(dim, head_idx);
    let mut out = vec![0.0; len * SKETCH];
    let (centred, sketch) = (Matrix::new(&centred, len, dim, dim), Matrix::new(&sketch, dim, SKETCH, SKETCH));
    MatrixMut::new(&mut out, len, SKETCH, SKETCH).set_product(centred, sketch, 1.0);
    out
}

/// `[dim, SKETCH]` independent normally distributed numbers of variance `1 / SKETCH`, other ones for each head of the model
/// and the same in every run (the method of Box and Muller).
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
fn sketch(dim: usize, head_idx: usize) -> Vec<f32> {
    let stream = mix(head_idx as u64);
    let uniform = |index: usize| f64::from(unit(mix(stream.wrapping_add(index as u64))));
    let normal = |index: usize| {
        let radius = (-2.0 * (1.0 - uniform(2 * index)).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * uniform(2 * index + 1)).cos() / (SKETCH as f64).sqrt()
    };
    (0..dim * SKETCH).map(|index| normal(index) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    #[test]
    fn sketches_are_normal_and_differ_from_head_to_head() {
        let numbers = sketch(128, 3);
        let count = f32::from(128u16) * 48.0;
        let mean = numbers.iter().sum::<f32>() / count;
        let variance = numbers.iter().map(|number| number * number).sum::<f32>() / count;
        assert!(mean.abs() < 0.01 && (variance * 48.0 - 1.0).abs() < 0.05, "{mean}, {variance}");
        assert!(numbers.iter().filter(|number| number.abs() * 48f32.sqrt() > 1.96).count() > 200);
        assert_ne!(sketch(2, 0), sketch(2, 1));
        assert_eq!(sketch(2, 0), sketch(2, 0));
    }

    #[test]
    fn a_key_of_its_own_direction_and_one_that_is_looked_at_are_kept() {
        // Twenty positions; keys along one line but for position 12, and attention equal but around position 5.
        let mut keys: Vec<f32> = (0..20).flat_map(|index| [f32::from(u8::try_from(index % 4).unwrap()), 0.0]).collect();
        keys[25] = 2.0;
        let mut attention = [1.0; 20];
        attention[5] = 4.0;
        let values = [1.0; 40];
        let facts = MethodFacts {
            unrotated_keys: &keys,
            block_attention: &attention,
            values: &values,
            head_dim: 2,
            ..facts(20, 8)
        };
        let method = Compactor { sink_tokens: 2, recent_tokens: 1 };
        let scores = method.scores(&facts);
        assert_eq!((scores[0], scores[1], scores[19]), (ALWAYS, ALWAYS, ALWAYS));
        let mut order: Vec<usize> = (2..19).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        assert!(order[..4].contains(&12) && [4, 5, 6].iter().all(|near| order[..4].contains(near)), "{scores:?}");
    }

    #[test]
    fn measures_are_standardised_over_the_layer() {
        let inner = |numbers: &[f32]| [&[ALWAYS][..], numbers].concat();
        let measures = vec![vec![inner(&[1.0, 3.0]), inner(&[0.0, 0.0])], vec![inner(&[5.0, 7.0]), inner(&[6.0, 2.0])]];
        let budget = LayerBudget { positions: 1, kept_ratio: 0.25, allocation: Compactor::DEFAULT.allocation() };
        let scores = Compactor::DEFAULT.layer_scores(&budget, measures);
        // Means 4 and 2, variances (9 + 1 + 1 + 9) / 3 and (4 + 4 + 16 + 0) / 3.
        let (first, second) = ((20f32 / 3.0).sqrt(), 8f32.sqrt());
        let expected = [[-3.0, -1.0], [1.0, 3.0]].map(|head| head.map(|number: f32| 0.75 * number / first));
        let attention = [[-2.0, -2.0], [4.0, 0.0]].map(|head| head.map(|number: f32| number / second));
        for head in 0..2 {
            assert_eq!(scores[head][0], ALWAYS);
            for index in 0..2 {
                let expected = expected[head][index] + attention[head][index];
                assert!((scores[head][index + 1] - expected).abs() < 1e-6, "{scores:?}");
            }
        }
    }

    #[test]
    fn a_segment_of_ends_only_is_no_trouble() {
        let facts =
            MethodFacts { unrotated_keys: &[1.0; 5], block_attention: &[0.0; 5], values: &[1.0; 5], ..facts(5, 2) };
        assert_eq!(Compactor::DEFAULT.scores(&facts), [ALWAYS; 5]);
    }
}
