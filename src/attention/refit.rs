//! Values fitted to what a prompt's queries read before keys went: the same rows, and less of an error.
//!
//! What a head keeps of a prompt answers a query with other weights than all of it did. The queries that will come are not
//! known, but those of the prompt are: some of them are asked once more from behind it (see [`super::replay`]), of all keys
//! while they are there. Once it is known which stay, their values are changed by as little as makes their answers to the
//! same queries close to those of all: a ridge regression. (Fitting what is kept to reference queries is the idea of
//! Attention Matching, arXiv 2602.16284, which fits keys and biases, too; queries and solver are this program's own.)
//!
//! Not for: choosing what stays ([`crate::compress`]), or storing it ([`crate::cache`]).

use rayon::prelude::*;

use super::prompt_rows::PromptKv;
use super::replay::CHUNK_ROWS;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::cholesky::Cholesky;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::numbers::all_finite;
use crate::stop;

/// Queries that a KV head is asked, at most, of all query heads of its group together.
const MAX_QUERIES: usize = 768;

/// What a change of the values costs, beside the squared errors of the answers: their mean squared weights, times this.
const RIDGE: f32 = 0.3;

/// A prompt in one layer, before anything of it goes.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The heads.
    pub layout: HeadLayout,
    /// `[prompt_len, num_heads, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// All keys and values of the prompt, behind those that were kept before it.
    pub kv: &'a PromptKv,
    /// Turns rotated vectors, `[rows, head_dim]`, by so many positions more.
    pub turn: &'a (dyn Fn(usize, &mut [f32]) + Sync),
}

impl std::fmt::Debug for Asked<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Asked").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// Queries of a layer, and what they read of all keys.
#[derive(Debug, Clone)]
pub struct Answers {
    scale: f32,
    head_dim: usize,
    heads: Vec<HeadAnswers>,
}

/// Those of one KV head.
#[derive(Debug, Clone)]
struct HeadAnswers {
    /// How many keys there were.
    num_keys: usize,
    /// `[queries, head_dim]`, turned to behind the prompt.
    queries: Vec<f32>,
    /// `[queries, head_dim]`
    answers: Vec<f32>,
}

impl Answers {
    /// Asks some of a prompt's queries once more from behind it.
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes do not fit; [`Error::Interrupted`] if a [stop] is requested.
    pub fn of(asked: Asked<'_>) -> Result<Self> {
        let Asked { layout, queries, kv, .. } = asked;
        layout.check()?;
        kv.keys.expect_layout("prompt keys", layout)?;
        expect_len("queries", queries, &[kv.keys.len(), layout.num_heads, layout.head_dim])?;
        let heads = (0..layout.num_kv_heads).into_par_iter().with_max_len(1);
        let heads = heads.map(|kv_head| HeadAnswers::of(asked, kv_head)).collect::<Result<_>>()?;
        Ok(Self { scale: layout.scale(), head_dim: layout.head_dim, heads })
    }

    /// The values with which the keys that stayed answer most like all keys did, `[rows, head_dim]`; `None` if all stayed,
    /// or none.
    ///
    /// * `kv_head`: whose
    /// * `keys`, `values`: `[rows, head_dim]` what stayed
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes do not fit, or there is no such head; [`Error::NotANumber`] if what comes out is none;
    /// [`Error::Interrupted`] if a [stop] is requested.
    pub fn fitted_values(&self, kv_head: usize, keys: &[f32], values: &[f32]) -> Result<Option<Vec<f32>>> {
        stop::check()?;
        let head = self.heads.get(kv_head).ok_or_else(|| Error::shape("KV heads", self.heads.len(), kv_head))?;
        let head_dim = self.head_dim;
        expect_len("kept values", values, &[keys.len() / head_dim, head_dim])?;
        if keys.is_empty() || keys.len() / head_dim >= head.num_keys {
            return Ok(None);
        }
        let weights = Weights::of(&head.queries, keys, head_dim, self.scale);
        let mut errors = head.answers.clone();
        errors.iter_mut().zip(weights.answers(values, head_dim)).for_each(|(error, answer)| *error -= answer);
        let fitted = weights.solve(&errors, head_dim).map(|mut change| {
            vector::add_assign(instruction_set(), &mut change, values);
            change
        });
        let none = || Error::not_a_number(format!("the fitted values of KV head {kv_head}"));
        fitted.filter(|fitted| all_finite(fitted)).map(Some).ok_or_else(none)
    }
}

impl HeadAnswers {
    fn of(asked: Asked<'_>, kv_head: usize) -> Result<Self> {
        stop::check()?;
        let Asked { layout: HeadLayout { num_heads, head_dim, .. }, queries: all, kv, turn, .. } = asked;
        let (group_size, prompt_len) = (asked.layout.group_size(), kv.keys.len());
        let num_rows = (MAX_QUERIES / group_size).clamp(1, prompt_len.max(1));
        let rows: Vec<usize> = (0..num_rows).map(|index| (2 * index + 1) * prompt_len / (2 * num_rows)).collect();
        let mut queries = Vec::with_capacity(num_rows * group_size * head_dim);
        for chunk in rows.chunk_by(|a, b| a / CHUNK_ROWS == b / CHUNK_ROWS) {
            let first = queries.len();
            for row in chunk {
                let start = (row * num_heads + kv_head * group_size) * head_dim;
                queries.extend_from_slice(&all[start..start + group_size * head_dim]);
            }
            // As in the replay, a chunk comes right behind the prompt.
            turn(prompt_len - chunk[0] / CHUNK_ROWS * CHUNK_ROWS, &mut queries[first..]);
        }
        let num_keys = kv.keys.past_len(kv_head) + prompt_len;
        let keys = kv.keys.rows(kv_head, 0..num_keys);
        let weights = Weights::of(&queries, &keys, head_dim, asked.layout.scale());
        let answers = weights.answers(&kv.values.rows(kv_head, 0..num_keys), head_dim);
        Ok(Self { num_keys, queries, answers })
    }
}

/// What some queries give to some keys: each row adds up to 1.
struct Weights {
    /// `[rows, cols]`
    numbers: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl Weights {
    /// * `queries`, `keys`: `[.., head_dim]`
    fn of(queries: &[f32], keys: &[f32], head_dim: usize, scale: f32) -> Self {
        let (rows, cols) = (queries.len() / head_dim, keys.len() / head_dim);
        let mut numbers = vec![0.0; rows * cols];
        MatrixMut::new(&mut numbers, rows, cols, cols).set_product(
            Matrix::new(queries, rows, head_dim, head_dim),
            Matrix::new(keys, cols, head_dim, head_dim).transposed(),
            scale,
        );
        let set = instruction_set();
        for row in numbers.chunks_exact_mut(cols.max(1)) {
            vector::softmax(set, row);
        }
        Self { numbers, rows, cols }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.numbers, self.rows, self.cols, self.cols)
    }

    /// What is read of values `[cols, width]`: `[rows, width]`.
    fn answers(&self, values: &[f32], width: usize) -> Vec<f32> {
        let mut answers = vec![0.0; self.rows * width];
        let values = Matrix::new(values, self.cols, width, width);
        MatrixMut::new(&mut answers, self.rows, width, width).set_product(self.matrix(), values, 1.0);
        answers
    }

    /// The same the other way round, from `[rows, width]` to `[cols, width]`.
    fn transposed_answers(&self, numbers: &[f32], width: usize) -> Vec<f32> {
        let mut answers = vec![0.0; self.cols * width];
        let numbers = Matrix::new(numbers, self.rows, width, width);
        MatrixMut::new(&mut answers, self.cols, width, width).set_product(self.matrix().transposed(), numbers, 1.0);
        answers
    }

    /// What, `[cols, width]`, is read as `wanted`, `[rows, width]`, as nearly as its own size allows: the least squared
    /// error plus [`RIDGE`] times its squares; `None` if there is no such thing. Of the two systems that give it, `(A^T A + r)
    /// x = A^T wanted`, and `(A A^T + r) y = wanted` with `x = A^T y`, the smaller one is solved.
    fn solve(&self, wanted: &[f32], width: usize) -> Option<Vec<f32>> {
        let by_cols = self.cols < self.rows;
        let (size, right) =
            if by_cols { (self.cols, self.transposed_answers(wanted, width)) } else { (self.rows, wanted.to_vec()) };
        let mut matrix = vec![0.0; size * size];
        let (left, other) = (self.matrix(), self.matrix().transposed());
        let (left, other) = if by_cols { (other, left) } else { (left, other) };
        MatrixMut::new(&mut matrix, size, size, size).set_product(left, other, 1.0);
        let squares = vector::dot(instruction_set(), &self.numbers, &self.numbers);
        #[expect(clippy::cast_precision_loss)] // a number of queries
        let ridge = RIDGE * squares / self.rows.max(1) as f32;
        (0..size).for_each(|index| matrix[index * size + index] += ridge);
        let factor = Cholesky::of(matrix, size)?;
        let mut columns = exchanged(&right, width);
        columns.chunks_exact_mut(size.max(1)).for_each(|column| factor.solve(column));
        let solved = exchanged(&columns, size);
        Some(if by_cols { solved } else { self.transposed_answers(&solved, width) })
    }
}

/// Rows and columns exchanged.
///
/// * `width`: of a row
fn exchanged(numbers: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| numbers.iter().skip(column).step_by(width.max(1)).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::prompt_rows::PromptRows;
    use super::*;

    const LAYOUT: HeadLayout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };

    /// Numbers that look random, in -1..1.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(u16::try_from(state >> 16).unwrap()) / 32768.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Softmax attention of one query in f64.
    fn plain(query: &[f32], keys: &[f32], values: &[f32], scale: f32) -> Vec<f64> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let scores: Vec<f64> = keys.chunks(8).map(|key| (dot(query, key) * f64::from(scale)).exp()).collect();
        let sum: f64 = scores.iter().sum();
        let of = |column: usize| {
            values.chunks(8).zip(&scores).map(|(value, score)| f64::from(value[column]) * score / sum).sum()
        };
        (0..8).map(of).collect()
    }

    fn answers(prompt_len: usize) -> (Answers, Vec<Vec<f32>>, Vec<Vec<f32>>) {
        let rows = |seed: u32| (0..2_u32).map(|head| numbers(prompt_len * 8, seed + head)).collect::<Vec<_>>();
        let (keys, values) = (rows(1), rows(11));
        let whole = |heads: &[Vec<f32>]| PromptRows::whole(LAYOUT, heads.to_vec(), &[0; 2], prompt_len).unwrap();
        let kv = PromptKv { keys: whole(&keys), values: whole(&values) };
        let queries: Vec<f32> = numbers(prompt_len * 32, 21).iter().map(|number| 3.0 * number).collect();
        let asked = Asked { layout: LAYOUT, queries: &queries, kv: &kv, turn: &|_, _| {} };
        (Answers::of(asked).unwrap(), keys, values)
    }

    /// The stored answers, and how far those of some rows are from them: the sum of squares.
    fn error(answers: &Answers, head: usize, keys: &[f32], values: &[f32]) -> f64 {
        let HeadAnswers { queries, answers: expected, .. } = &answers.heads[head];
        let of = |(query, expected): (&[f32], &[f32])| {
            let got = plain(query, keys, values, answers.scale);
            got.iter().zip(expected).map(|(got, expected)| (got - f64::from(*expected)).powi(2)).sum::<f64>()
        };
        queries.chunks(8).zip(expected.chunks(8)).map(of).sum()
    }

    #[test]
    fn answers_are_those_of_all_keys() {
        let (answers, keys, values) = answers(300);
        for head in 0..2 {
            assert_eq!(answers.heads[head].queries.len(), 600 * 8, "every row, of two query heads");
            assert!(error(&answers, head, &keys[head], &values[head]) < 1e-8);
        }
    }

    #[test]
    fn of_a_long_prompt_some_rows_are_asked() {
        let (answers, ..) = answers(1000);
        assert_eq!(answers.heads[0].queries.len(), MAX_QUERIES * 8);
    }

    #[test]
    fn fitted_values_answer_better_and_where_nothing_went_nothing_changes() {
        let (answers, keys, values) = answers(300);
        for head in 0..2 {
            let kept = |rows: &[f32]| -> Vec<f32> { rows.chunks(8).step_by(3).flatten().copied().collect() };
            let (keys, values) = (&keys[head], &values[head]);
            assert_eq!(answers.fitted_values(head, keys, values).unwrap(), None);
            let (kept_keys, kept_values) = (kept(keys), kept(values));
            let fitted = answers.fitted_values(head, &kept_keys, &kept_values).unwrap().unwrap();
            let (before, after) =
                (error(&answers, head, &kept_keys, &kept_values), error(&answers, head, &kept_keys, &fitted));
            assert!(after < 0.7 * before, "{after} {before}");
        }
        assert!(answers.fitted_values(2, &keys[0], &values[0]).is_err());
        assert!(answers.fitted_values(0, &keys[0][..16], &values[0][..8]).is_err());
    }

    /// The gradient of what is minimised is zero: `A^T (A x - wanted) + r x`. With more queries than keys, and with fewer.
    #[test]
    fn the_solver_finds_the_minimum() {
        for cols in [12, 90] {
            let weights = Weights::of(&numbers(40 * 8, 5), &numbers(cols * 8, 6), 8, 1.0);
            let wanted = numbers(40 * 8, 7);
            let solved = weights.solve(&wanted, 8).unwrap();
            let ridge = RIDGE * weights.numbers.iter().map(|weight| weight * weight).sum::<f32>() / 40.0;
            let mut errors = weights.answers(&solved, 8);
            errors.iter_mut().zip(&wanted).for_each(|(error, wanted)| *error -= wanted);
            let gradient = weights.transposed_answers(&errors, 8);
            let start = weights.transposed_answers(&wanted, 8);
            assert!(solved.iter().any(|number| number.abs() > 0.01));
            for ((gradient, solved), start) in gradient.iter().zip(&solved).zip(&start) {
                assert!((gradient + ridge * solved).abs() < 1e-3 * start.abs().max(0.1), "{gradient} {solved}");
            }
        }
    }
}
