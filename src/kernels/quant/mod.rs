//! Weight matrices as files store them, in GGUF block formats or plain floats: products with them without unpacking
//! them to memory first.
//!
//! Block layouts: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and ggml's `ggml-common.h`. A block holds
//! 32 numbers (`Q4_0` .. `Q8_1`, `IQ4_NL`, `MXFP4`) or 256 (`Q2_K` .. `Q8_K`, `IQ4_XS`) of one row.
//!
//! Few rows of activations (decoding, short prompts) run on the stored numbers (`dot.rs`). More rows
//! ([`WeightMatrix::matmul`], prefill) go through panels of weights: bytes, multiplied as whole numbers (`many.rs`), or, for
//! plain floats and where exact products are asked for, f32 (`floats.rs`).

#[cfg(target_arch = "x86_64")]
mod digits;
mod dot;
mod floats;
mod format;
mod inputs;
mod many;
mod rounded;
#[cfg(test)]
mod samples;
mod source;
mod widened;

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_1, BlockQ8K, GgmlType,
};
use half::{bf16, f16};
use rayon::prelude::*;

pub use dot::Activations;
use floats::{Buffers, PackedRows};
pub use format::WeightFormat;
pub use inputs::Inputs;
use many::{ManyFormat, PanelBuffers, RoundedRows};

use super::blocks::{self, Iq4Nl, Iq4Xs, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use super::gemm::{Matrix, MatrixMut};
use super::simd::InstructionSet;
use super::vector::{self, instruction_set};
use crate::error::{Error, Result};

/// How many f32 a dequantised panel may hold: it should stay in a core's cache while it is used.
const PANEL_NUMBERS: usize = 96 * 1024;

/// Rows of weights that the product's kernel takes in step.
const STRIP_ROWS: usize = 64;

/// Up to so many rows of activations go through block products, which unpack each block once for four of them.
const FEW_ROWS: usize = 16;

/// The same for plain floats, each row of which is widened for each row of activations. Of 1,536 columns in f16, on one thread
/// of a Sapphire Rapids, 18.4 against 16.8 thousand million products a second at 6 rows, and 20.2 against 22.3 at 8.
const FEW_FLOAT_ROWS: usize = 6;

/// Rows that one thread takes at a time in a matrix-vector product.
const ROWS_PER_TASK: usize = 32;

/// With what numbers matrices of blocks are multiplied.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Compute {
    /// f32 for every format, with weights widened as they are needed: the oracle of the other.
    Exact,
    /// Whole numbers: activations are rounded to 8 bits where a format gains by it, and in attention over a prompt, where the
    /// processor gains by it, to 16. Matrices of plain floats, and attention after them, are multiplied as with
    /// [`Exact`](Self::Exact).
    #[default]
    Fast,
}

impl Compute {
    /// As options and reports have it: `exact` or `fast`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// Bytes that somebody owns: a memory-mapped file, or memory.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A matrix `[rows, cols]` of weights, row after row, in a GGUF block format or in plain floats (blocks of one number).
#[derive(Clone)]
pub struct WeightMatrix {
    owner: SharedBytes,
    range: Range<usize>,
    dtype: WeightFormat,
    rows: usize,
    cols: usize,
}

impl std::fmt::Debug for WeightMatrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "WeightMatrix({:?} {} x {})", self.dtype, self.rows, self.cols)
    }
}

impl WeightMatrix {
    /// A matrix over `owner[range]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `cols` is not a whole number of blocks, or `range` has not the size of the matrix or lies
    /// outside of the bytes; [`Error::Unsupported`] if the bytes are not aligned for their block type.
    pub fn new(owner: SharedBytes, range: Range<usize>, dtype: WeightFormat, rows: usize, cols: usize) -> Result<Self> {
        let block = dtype.block_size();
        if cols == 0 || !cols.is_multiple_of(block) {
            return Err(Error::shape("a weight matrix", format!("columns in multiples of {block}"), cols));
        }
        let expected = (cols / block).checked_mul(dtype.block_bytes()).and_then(|row| row.checked_mul(rows));
        let bytes = (*owner).as_ref().get(range.clone());
        match (expected, bytes) {
            (Some(expected), Some(bytes)) if expected == bytes.len() => {
                let align = Self::alignment(dtype);
                if !(bytes.as_ptr() as usize).is_multiple_of(align) {
                    return Err(Error::unsupported(format!("a {dtype} tensor that is not aligned to {align} bytes")));
                }
            }
            _ => return Err(Error::shape("a weight matrix's bytes", expected, range)),
        }
        Ok(Self { owner, range, dtype, rows, cols })
    }

    /// A multiple of this, in bytes, is where the bytes of a matrix must begin in memory: floats and the large blocks are
    /// read in place as their own type.
    #[must_use]
    pub fn alignment(dtype: WeightFormat) -> usize {
        if matches!(dtype, WeightFormat::F32 | WeightFormat::Q8K) { 4 } else { 2 }
    }

    /// Number of output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The block format.
    #[must_use]
    pub fn dtype(&self) -> WeightFormat {
        self.dtype
    }

    /// Size in bytes, scales included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_size() * self.dtype.block_bytes()
    }

    /// The stored bytes, row after row.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// # Panics
    /// If there are no such rows.
    fn row_data(&self, rows: Range<usize>) -> &[u8] {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let row_bytes = self.row_bytes();
        &self.data()[rows.start * row_bytes..rows.end * row_bytes]
    }

    /// Writes rows `rows` as f32 to `out`, `[rows.len(), cols]`.
    ///
    /// # Panics
    /// If `rows` is out of range or `out` has another size.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let data = self.row_data(rows.clone());
        assert_eq!(out.len(), rows.len() * self.cols, "size of the dequantised rows");
        dequantize(self.dtype, data, out);
    }

    /// Products of some rows with activations that were [prepared](Activations::prepare) for this matrix's format, on the
    /// calling thread.
    ///
    /// * `out`: `[x.count(), rows.len()]`
    ///
    /// # Panics
    /// If there are no such rows, a size does not fit, or the activations are prepared for another format.
    pub fn dot_rows(&self, rows: Range<usize>, x: &Activations, out: &mut [f32]) {
        let data = self.row_data(rows.clone());
        assert!(
            x.cols() == self.cols && x.count().checked_mul(rows.len()) == Some(out.len()),
            "sizes of products with rows: {} rows of {} activations, {} weights, {} results",
            x.count(),
            x.cols(),
            self.cols,
            out.len()
        );
        x.dot_rows(self.dtype, data, self.row_bytes(), out);
    }

    /// `out = W x`, over threads.
    ///
    /// * `x`: `[cols]`
    /// * `out`: `[rows]`
    ///
    /// # Panics
    /// If a size does not fit.
    pub fn matvec(&self, compute: Compute, x: &[f32], out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (self.cols, self.rows), "sizes of a matrix-vector product");
        let mut activations = Activations::default();
        activations.prepare(instruction_set(), compute, self.dtype, x, self.cols);
        out.par_chunks_mut(ROWS_PER_TASK).enumerate().for_each(|(task, out)| {
            let first = task * ROWS_PER_TASK;
            self.dot_rows(first..first + out.len(), &activations, out);
        });
    }

    /// Up to how many rows of activations products on the stored numbers are faster than through panels.
    #[must_use]
    pub fn few_rows(&self) -> usize {
        match self.dtype.block_size() {
            1 => FEW_FLOAT_ROWS,
            blocks::BLOCK => FEW_ROWS,
            _ => 1,
        }
    }

    /// `out = X W^T`, over threads.
    ///
    /// * `out`: `[x.count(), rows]`; of several rows some numbers may be missing if a [stop](crate::stop) is requested
    ///   meanwhile
    ///
    /// # Panics
    /// If a size does not fit.
    pub fn matmul(&self, x: &Inputs<'_>, out: &mut [f32]) {
        assert!(
            x.cols() == self.cols && x.count().checked_mul(self.rows) == Some(out.len()),
            "sizes of a matrix product: {x:?}, {self:?}, {} results",
            out.len()
        );
        // Loops over bytes, without instructions for them, are slower than products of f32.
        let (set, is_fast) = (instruction_set(), x.compute() == Compute::Fast);
        let many = ManyFormat::new(set, self.dtype).filter(|_| is_fast && set > InstructionSet::PORTABLE);
        match (x.count(), many) {
            (0, _) => {}
            (1, _) => self.matvec(x.compute(), x.numbers(), out),
            (count, _) if count <= self.few_rows() => self.matmul_few(x, out),
            (_, Some(format)) => self.matmul_many(format, &x.rounded(format), out),
            (_, None) if set > InstructionSet::PORTABLE => self.matmul_floats(x.packed(set), out),
            (count, None) => self.matmul_panels(x.numbers(), count, out),
        }
    }

    fn matmul_many(&self, format: ManyFormat, x: &RoundedRows, out: &mut [f32]) {
        let (panel_rows, row_bytes) = (x.panel_rows(self.rows, rayon::current_num_threads()), self.row_bytes());
        let views = MatrixMut::new(out, x.count(), self.rows, self.rows).split_columns(panel_rows);
        let panels = self.data().par_chunks(panel_rows * row_bytes).zip(views);
        panels.for_each(|(data, mut view)| {
            if !crate::stop::is_requested() {
                let rows = Rows { data, row_bytes, count: data.len() / row_bytes };
                PanelBuffers::with(|buffers| format.multiply(x, rows, buffers, &mut view));
            }
        });
    }

    fn matmul_few(&self, x: &Inputs<'_>, out: &mut [f32]) {
        let mut activations = Activations::default();
        activations.prepare(instruction_set(), x.compute(), self.dtype, x.numbers(), self.cols);
        let tasks: Vec<Range<usize>> =
            (0..self.rows).step_by(ROWS_PER_TASK).map(|first| first..(first + ROWS_PER_TASK).min(self.rows)).collect();
        let products = |rows: &Range<usize>| {
            let mut out = vec![0.0; activations.count() * rows.len()];
            self.dot_rows(rows.clone(), &activations, &mut out);
            out
        };
        let parts: Vec<Vec<f32>> = tasks.par_iter().map(products).collect();
        for (rows, part) in tasks.into_iter().zip(parts) {
            for (out, part) in out.chunks_exact_mut(self.rows).zip(part.chunks_exact(rows.len())) {
                out[rows.clone()].copy_from_slice(part);
            }
        }
    }

    /// By the `gemm` crate, which chooses its instructions by itself.
    fn matmul_panels(&self, x: &[f32], seq_len: usize, out: &mut [f32]) {
        let most = PANEL_NUMBERS / self.cols;
        // Whole strips of the product's own kernel leave no narrow rest.
        let panel_rows = if most > STRIP_ROWS { most - most % STRIP_ROWS } else { most.max(8) };
        let x = Matrix::new(x, seq_len, self.cols, self.cols);
        let views = MatrixMut::new(out, seq_len, self.rows, self.rows).split_columns(panel_rows);
        views.into_par_iter().enumerate().for_each_init(Vec::new, |panel: &mut Vec<f32>, (index, mut view)| {
            if crate::stop::is_requested() {
                return;
            }
            let rows = index * panel_rows..((index + 1) * panel_rows).min(self.rows);
            panel.resize(rows.len() * self.cols, 0.0);
            self.dequantize_rows(rows.clone(), panel);
            view.set_product(x, Matrix::new(panel, rows.len(), self.cols, self.cols).transposed(), 1.0);
        });
    }

    fn matmul_floats(&self, x: &PackedRows, out: &mut [f32]) {
        let panel_rows = PackedRows::panel_rows(self.rows, rayon::current_num_threads());
        let views = MatrixMut::new(out, x.count(), self.rows, self.rows).split_columns(panel_rows);
        let (block, block_bytes) = (self.dtype.block_size(), self.dtype.block_bytes());
        let panels = self.data().par_chunks(panel_rows * self.row_bytes()).zip(views);
        panels.for_each_init(Buffers::default, |buffers, (data, mut view)| {
            if crate::stop::is_requested() {
                return;
            }
            let widen = |row: usize, columns: Range<usize>, out: &mut [f32]| {
                let row = &data[row * self.row_bytes()..];
                let blocks = columns.start / block..columns.end / block;
                dequantize(self.dtype, &row[blocks.start * block_bytes..blocks.end * block_bytes], out);
            };
            x.multiply(data.len() / self.row_bytes(), widen, buffers, &mut view);
        });
    }
}

/// Rows of a matrix, as they are stored.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    row_bytes: usize,
    count: usize,
}

impl<'a> Rows<'a> {
    fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        self.data.chunks_exact(self.row_bytes)
    }
}

/// What stored bytes may be read as.
///
/// # Safety
/// Every pattern of bits is a value of the type, which has neither padding nor anything that changes behind `&`.
unsafe trait Stored: Sized {}

macro_rules! stored {
    ($($of:ty),+) => {
        // SAFETY: numbers, and ggml's `repr(C)` structures of numbers that lie close together (candle checks their sizes).
        $(unsafe impl Stored for $of {})+
    };
}
stored!(f32, f16, bf16, BlockQ8_1, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K);

/// Reads a slice of bytes as blocks of one type.
///
/// # Panics
/// If it is not aligned for them, or not whole blocks.
fn blocks_of<T: Stored>(data: &[u8]) -> &[T] {
    // SAFETY: every pattern of bits is a block.
    let (before, blocks, after) = unsafe { data.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "block data was checked for its alignment and size");
    blocks
}

fn dequantize(dtype: WeightFormat, data: &[u8], out: &mut [f32]) {
    let set = instruction_set();
    match dtype {
        WeightFormat::F32 => out.copy_from_slice(blocks_of(data)),
        WeightFormat::F16 => vector::widen::<f16>(set, blocks_of(data), out),
        WeightFormat::BF16 => vector::widen::<bf16>(set, blocks_of(data), out),
        WeightFormat::Q4_0 => blocks::dequantize::<Q4_0>(set, data, out),
        WeightFormat::Q4_1 => blocks::dequantize::<Q4_1>(set, data, out),
        WeightFormat::Q5_0 => blocks::dequantize::<Q5_0>(set, data, out),
        WeightFormat::Q5_1 => blocks::dequantize::<Q5_1>(set, data, out),
        WeightFormat::Q8_0 => blocks::dequantize::<Q8_0>(set, data, out),
        WeightFormat::Iq4Nl => blocks::dequantize::<Iq4Nl>(set, data, out),
        WeightFormat::Iq4Xs => blocks::dequantize::<Iq4Xs>(set, data, out),
        WeightFormat::Mxfp4 => blocks::dequantize::<Mxfp4>(set, data, out),
        WeightFormat::Q8_1 => BlockQ8_1::to_float(blocks_of(data), out),
        WeightFormat::Q2K => BlockQ2K::to_float(blocks_of(data), out),
        WeightFormat::Q3K => BlockQ3K::to_float(blocks_of(data), out),
        WeightFormat::Q4K => BlockQ4K::to_float(blocks_of(data), out),
        WeightFormat::Q5K => BlockQ5K::to_float(blocks_of(data), out),
        WeightFormat::Q6K => BlockQ6K::to_float(blocks_of(data), out),
        WeightFormat::Q8K => BlockQ8K::to_float(blocks_of(data), out),
    }
}
