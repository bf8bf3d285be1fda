//! One-launch attention over ragged heads, against a plain softmax in f64.

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::ragged::{self, RaggedRows, Slot};
use adaptive_kvcache::kernels::element::Element;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rand::Rng;
use rand::seq::SliceRandom;

use crate::numbers::{dot, seeded, softmax, uniform};

/// Sums of f32 against sums of f64, of outputs below 1.
const TOLERANCE: f64 = 5e-6;

/// A layer: keys, values and queries, and who owns which rows.
struct Layer {
    layout: HeadLayout,
    slots: Vec<Slot>,
    /// `[2][rows, head_dim]`: keys and values; NaN in rows that no slot has.
    kept: [Vec<f32>; 2],
    /// `[2][num_kv_heads, tail_capacity, head_dim]`: NaN after `tail_len` rows of each.
    tail: [Vec<f32>; 2],
    tail_capacity: usize,
    tail_len: usize,
    /// `[num_heads, head_dim]`
    queries: Vec<f32>,
}

impl Layer {
    /// Random numbers that `T` can hold exactly; slots hold KV heads in random order, with padding rows around them.
    fn new<T: Element>(
        layout: HeadLayout,
        kept_lens: &[usize],
        tail_len: usize,
        tail_capacity: usize,
        seed: u64,
    ) -> Self {
        let mut rng = seeded(seed);
        let HeadLayout { num_heads, num_kv_heads, head_dim } = layout;
        let mut heads: Vec<usize> = (0..num_kv_heads).collect();
        heads.shuffle(&mut rng);
        let mut slots = Vec::new();
        let mut num_rows = 0;
        for (&len, kv_head) in kept_lens.iter().zip(heads) {
            num_rows += rng.random_range(0..3);
            slots.push(Slot { rows: num_rows..num_rows + len, kv_head });
            num_rows += len;
        }
        num_rows += 1;
        let mut fill = |rows: usize, used: &dyn Fn(usize) -> bool| -> Vec<f32> {
            let numbers = uniform(&mut rng, rows * head_dim, 1.0);
            let number = |(index, number): (usize, f32)| {
                if used(index / head_dim) { T::narrow(number).widen() } else { f32::NAN }
            };
            numbers.into_iter().enumerate().map(number).collect()
        };
        let is_kept = |row: usize| slots.iter().any(|slot| slot.rows.contains(&row));
        let in_tail = |row: usize| row % tail_capacity < tail_len;
        let kept = [fill(num_rows, &is_kept), fill(num_rows, &is_kept)];
        let tail = [fill(num_kv_heads * tail_capacity, &in_tail), fill(num_kv_heads * tail_capacity, &in_tail)];
        let queries = fill(num_heads, &|_| true).iter().map(|number| number * 4.0).collect();
        Self { layout, slots, kept, tail, tail_capacity, tail_len, queries }
    }

    /// Attention as it is defined, one query head after the other.
    fn expected(&self) -> Vec<f64> {
        let head_dim = self.layout.head_dim;
        let scale = (head_dim as f64).sqrt().recip();
        let mut out = Vec::new();
        for (head, query) in self.queries.chunks_exact(head_dim).enumerate() {
            let kv_head = head / self.layout.group_size();
            let place = self.slots.iter().position(|slot| slot.kv_head == kv_head).unwrap();
            let first = place * self.tail_capacity;
            let rows = |part: usize| -> Vec<&[f32]> {
                let kept =
                    self.slots[place].rows.clone().map(|row| &self.kept[part][row * head_dim..(row + 1) * head_dim]);
                let tail =
                    (first..first + self.tail_len).map(|row| &self.tail[part][row * head_dim..(row + 1) * head_dim]);
                kept.chain(tail).collect()
            };
            let scores: Vec<f64> = rows(0).iter().map(|key| scale * dot(query, key)).collect();
            let weights = softmax(&scores);
            let values = rows(1);
            let number =
                |index: usize| weights.iter().zip(&values).map(|(weight, row)| weight * f64::from(row[index])).sum();
            out.extend((0..head_dim).map(number).collect::<Vec<f64>>());
        }
        out
    }

    fn rows<T: Element + WithDType>(&self) -> RaggedRows {
        self.rows_on::<T>(&Device::Cpu)
    }

    fn rows_on<T: Element + WithDType>(&self, device: &Device) -> RaggedRows {
        let head_dim = self.layout.head_dim;
        let tensor = |numbers: &Vec<f32>| {
            let stored: Vec<T> = numbers.iter().map(|&number| T::narrow(number)).collect();
            let rows = stored.len() / head_dim;
            Tensor::from_vec(stored, (rows, head_dim), device).unwrap()
        };
        let kept = Some((tensor(&self.kept[0]), tensor(&self.kept[1])));
        RaggedRows::new(device, self.layout, T::DTYPE, kept, self.slots.clone()).unwrap()
    }

    /// The rows in use, as a view of the whole buffer; `None` if there are none.
    fn tail<T: Element + WithDType>(&self) -> Option<[Tensor; 2]> {
        let HeadLayout { num_kv_heads, head_dim, .. } = self.layout;
        let tensor = |numbers: &Vec<f32>| {
            let stored: Vec<T> = numbers.iter().map(|&number| T::narrow(number)).collect();
            let buffer = Tensor::from_vec(stored, (num_kv_heads, self.tail_capacity, head_dim), &Device::Cpu).unwrap();
            buffer.narrow(1, 0, self.tail_len).unwrap()
        };
        (self.tail_len > 0).then(|| self.tail.each_ref().map(tensor))
    }

    fn queries(&self) -> Tensor {
        let HeadLayout { num_heads, head_dim, .. } = self.layout;
        Tensor::from_slice(&self.queries, (num_heads, head_dim), &Device::Cpu).unwrap()
    }

    fn check<T: Element + WithDType>(&self) {
        let tail = self.tail::<T>();
        let tail = tail.as_ref().map(|[keys, values]| (keys, values));
        let out = self.rows::<T>().attend(&self.queries(), tail).unwrap();
        assert_eq!(out.dims(), self.queries().dims());
        for (index, (got, expected)) in numbers(&out).iter().zip(self.expected()).enumerate() {
            assert!((f64::from(*got) - expected).abs() < TOLERANCE, "{index}: {got}, expected {expected}");
        }
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn layout(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadLayout {
    HeadLayout { num_heads, num_kv_heads, head_dim }
}

#[test]
fn ragged_attention_is_the_softmax_over_each_heads_own_rows() {
    for (seed, (num_heads, num_kv_heads, head_dim)) in
        [(4, 4, 64), (9, 3, 64), (8, 2, 128), (16, 1, 32), (6, 2, 80), (5, 5, 6), (2, 1, 256)].into_iter().enumerate()
    {
        // Odd lengths, a head without kept rows, one that takes several ranges.
        let kept_lens: Vec<usize> = [0, 1, 37, 1203, 513].into_iter().cycle().take(num_kv_heads).collect();
        for (tail_len, tail_capacity) in [(1, 1), (7, 16)] {
            let layout = layout(num_heads, num_kv_heads, head_dim);
            Layer::new::<f32>(layout, &kept_lens, tail_len, tail_capacity, seed as u64).check::<f32>();
            Layer::new::<f16>(layout, &kept_lens, tail_len, tail_capacity, seed as u64).check::<f16>();
            Layer::new::<bf16>(layout, &kept_lens, tail_len, tail_capacity, seed as u64).check::<bf16>();
        }
    }
}

#[test]
fn either_part_may_be_empty() {
    let layout = layout(6, 3, 64);
    Layer::new::<f16>(layout, &[5, 1, 90], 0, 4, 1).check::<f16>();
    Layer::new::<f16>(layout, &[0, 0, 0], 3, 4, 2).check::<f16>();
    // Nothing was kept at all, and there is no tensor for it.
    let layer = Layer::new::<f32>(layout, &[0, 0, 0], 3, 4, 3);
    let slots = layer.slots.iter().map(|slot| Slot { rows: 0..0, kv_head: slot.kv_head }).collect();
    let rows = RaggedRows::new(&Device::Cpu, layout, DType::F32, None, slots).unwrap();
    let [keys, values] = layer.tail::<f32>().unwrap();
    let out = rows.attend(&layer.queries(), Some((&keys, &values))).unwrap();
    assert_eq!(numbers(&out), numbers(&layer.rows::<f32>().attend(&layer.queries(), Some((&keys, &values))).unwrap()));
    // No rows of any kind have no softmax.
    assert!(rows.attend(&layer.queries(), None).is_err());
}

#[test]
fn queries_keep_their_shape_and_dtype_and_each_call_is_one_launch() {
    let layer = Layer::new::<f16>(layout(6, 2, 64), &[20, 31], 2, 2, 4);
    let rows = layer.rows::<f16>();
    let [keys, values] = layer.tail::<f16>().unwrap();
    let tail = Some((&keys, &values));
    let plain = rows.attend(&layer.queries(), tail).unwrap();
    let grouped = rows.attend(&layer.queries().reshape((2, 3, 64)).unwrap(), tail).unwrap();
    assert_eq!(grouped.dims(), [2, 3, 64]);
    assert_eq!(numbers(&grouped), numbers(&plain));
    for dtype in [DType::F16, DType::BF16] {
        let out = rows.attend(&layer.queries().to_dtype(dtype).unwrap(), tail).unwrap();
        assert_eq!(out.dtype(), dtype);
        for (got, expected) in numbers(&out).iter().zip(numbers(&plain)) {
            assert!((got - expected).abs() < 0.02, "{got}, expected {expected}");
        }
    }
    assert_eq!(rows.launches(), 4);
    assert!(rows.attend(&layer.queries(), Some((&keys, &keys.narrow(1, 0, 1).unwrap()))).is_err());
    assert_eq!(rows.launches(), 4);
    assert!(ragged::supports(&Device::Cpu));
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what() {
    let device = &Device::Cpu;
    let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype, device).unwrap();
    let kept = || Some((zeros(&[8, 64], DType::F16), zeros(&[8, 64], DType::F16)));
    let slot = |rows: std::ops::Range<usize>, kv_head: usize| Slot { rows, kv_head };
    let slots = || vec![slot(0..3, 1), slot(3..8, 0)];
    let right = layout(4, 2, 64);
    let new = |layout, dtype, kept, slots| {
        RaggedRows::new(device, layout, dtype, kept, slots).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(new(right, DType::F16, kept(), slots()), Ok(()));
    let wrong: [(Result<(), String>, &str); 9] = [
        (new(right, DType::F32, kept(), slots()), "expected F32, got F16"),
        (new(right, DType::F64, kept(), slots()), "`f64` is not supported"),
        (new(layout(4, 2, 32), DType::F16, kept(), slots()), "expected [8, 32], got [8, 64]"),
        (new(layout(4, 2, 320), DType::F16, None, slots()), "a head dimension of 320 (the most is 256)"),
        (new(layout(40, 2, 64), DType::F16, kept(), slots()), "20 query heads (the most is 16)"),
        (new(layout(3, 2, 64), DType::F16, kept(), slots()), "query heads that KV heads divide"),
        (new(right, DType::F16, kept(), vec![slot(0..3, 1), slot(3..9, 0)]), "expected 0..8, got 3..9"),
        (new(right, DType::F16, kept(), vec![slot(0..3, 1), slot(3..8, 1)]), "each of 0..2 once"),
        (new(right, DType::F16, kept(), vec![slot(0..3, 1)]), "expected 2, got 1"),
    ];
    for (result, expected) in wrong {
        let error = result.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    let rows = RaggedRows::new(device, right, DType::F16, kept(), slots()).unwrap();
    let tail = zeros(&[2, 5, 64], DType::F16);
    let attend = |queries: &Tensor, tail: Option<(&Tensor, &Tensor)>| {
        rows.attend(queries, tail).map(drop).map_err(|error| error.to_string())
    };
    let queries = zeros(&[4, 64], DType::F32);
    assert_eq!(attend(&queries, Some((&tail, &tail))), Ok(()));
    let swapped = zeros(&[5, 2, 64], DType::F16).transpose(0, 1).unwrap();
    let wrong = [
        (attend(&zeros(&[4, 32], DType::F32), None), "expected [4, 64], got [4, 32]"),
        (attend(&zeros(&[4, 64], DType::U32), None), "`u32` is not supported"),
        (attend(&queries, Some((&tail, &zeros(&[2, 4, 64], DType::F16)))), "expected [2, 5, 64], got [2, 4, 64]"),
        (attend(&queries, Some((&tail, &zeros(&[2, 5, 64], DType::F32)))), "expected F16, got F32"),
        (attend(&queries, Some((&swapped, &swapped))), "the first rows of a contiguous buffer"),
    ];
    for (result, expected) in wrong {
        let error = result.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// What a GPU computes, on a machine that has one: `cargo test --features cuda --test it ragged -- --include-ignored`.
#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_gpu_computes_what_the_cpu_does() {
    fn check<T: Element + WithDType>(layer: &Layer, gpu: &Device) {
        let tail = layer.tail::<T>();
        let on_gpu = tail.as_ref().map(|tail| {
            tail.each_ref().map(|rows| {
                // The whole buffer moves, so that the GPU gets a view as well.
                let buffer = rows.to_device(gpu).unwrap();
                let room = buffer.zeros_like().unwrap();
                Tensor::cat(&[buffer, room], 1).unwrap().narrow(1, 0, layer.tail_len).unwrap()
            })
        });
        let rows = layer.rows_on::<T>(gpu);
        let queries = layer.queries().to_device(gpu).unwrap();
        // Twice: the second launch finds what the first one has left in the counters.
        for _ in 0..2 {
            let out = rows.attend(&queries, on_gpu.as_ref().map(|[keys, values]| (keys, values))).unwrap();
            for (index, (got, expected)) in numbers(&out).iter().zip(layer.expected()).enumerate() {
                assert!((f64::from(*got) - expected).abs() < 4.0 * TOLERANCE, "{index}: {got}, expected {expected}");
            }
        }
    }
    let gpu = Device::new_cuda(0).expect("an NVIDIA GPU");
    let mut seed = 0;
    for head_dim in [64, 80, 128, 256] {
        for group_size in [1, 3, 8, 16] {
            for kept_lens in [[0, 1, 37, 513], [20_011, 90, 8000, 3]] {
                for (tail_len, tail_capacity) in [(1, 1), (200, 256)] {
                    seed += 1;
                    let layout = layout(4 * group_size, 4, head_dim);
                    check::<f32>(&Layer::new::<f32>(layout, &kept_lens, tail_len, tail_capacity, seed), &gpu);
                    check::<f16>(&Layer::new::<f16>(layout, &kept_lens, tail_len, tail_capacity, seed), &gpu);
                    check::<bf16>(&Layer::new::<bf16>(layout, &kept_lens, tail_len, tail_capacity, seed), &gpu);
                }
            }
        }
    }
}
