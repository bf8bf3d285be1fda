//! Runs the source of the CUDA kernels on the host, compiled by the system's C compiler, and compares it with the CPU.
//!
//! Buffers have guard zones, and rows that no head keeps are NaN. Every read and write is checked against the rows that
//! the launch may use, and threads and blocks take turns in several orders, which must not change a bit of the result. Not
//! for: showing that a GPU's compiler or memory behaves as the emulation does.

use std::ffi::{CString, c_char, c_uint, c_void};
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::ragged::launch::{Arguments, Buffers, Format, Plan, THREADS, Work};
use adaptive_kvcache::attention::ragged::{RaggedRows, Slot};
use adaptive_kvcache::kernels::element::Element;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Numbers of a guard zone, before and after each buffer; a multiple of 16 bytes.
const GUARD: usize = 64;

/// Largest difference between the kernel and the CPU, of outputs below 1: sums of f32 in another order.
const TOLERANCE: f32 = 2e-5;

/// Bytes that the kernel may read and, if `writable`, write.
#[repr(C)]
struct Region {
    first: usize,
    end: usize,
    writable: i32,
}

type Emulate = unsafe extern "C" fn(
    name: *const c_char,
    arguments: *const Arguments,
    grid_x: c_uint,
    grid_y: c_uint,
    block_step: c_uint,
    thread_step: c_uint,
    regions: *const Region,
    num_regions: usize,
    error: *mut c_char,
    error_bytes: usize,
);

/// The kernels, compiled for the host.
struct Emulation {
    run: Emulate,
}

impl Emulation {
    /// Compiles with `$CC`, or `cc`, and loads the result, which stays loaded.
    ///
    /// * `options`: of the compiler, besides the usual ones
    fn new(options: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (own, kernels) = (root.join("tests/it/emulation"), root.join("src/attention/ragged/kernels"));
        let folder = tempfile::tempdir().expect("temporary folder");
        let library = folder.path().join("emulation.so");
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let output = Command::new(&compiler)
            .args(["-std=gnu11", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"])
            .args(["-Wall", "-Wextra", "-Werror", "-Wno-sign-compare"])
            // Its check of `longjmp` knows of one stack only.
            .args(["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0", "-o"])
            .args([&library, &own.join("run.c")])
            .args([Path::new("-I"), own.as_path(), Path::new("-I"), kernels.as_path()])
            .args(options)
            .arg("-lm")
            .output()
            .unwrap_or_else(|error| panic!("failed to run the C compiler `{compiler}`: {error}"));
        assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
        let path = CString::new(library.to_str().expect("path in UTF-8")).expect("no NUL");
        // SAFETY: the library was just made of a source that runs nothing when it is loaded.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "failed to load `{}`", library.display());
        // SAFETY: it stays loaded, and the name ends in NUL.
        let function = unsafe { libc::dlsym(handle, c"emulate".as_ptr()) };
        assert!(!function.is_null(), "no `emulate` in `{}`", library.display());
        // SAFETY: the function has the type that the source gives it.
        let run = unsafe { std::mem::transmute::<*mut c_void, Emulate>(function) };
        Self { run }
    }
}

/// Numbers between guard zones.
struct Guarded<T> {
    numbers: Vec<T>,
    /// Where the buffer begins: aligned to 16 bytes, or off by one number.
    start: usize,
    len: usize,
    guard: T,
}

impl<T: Copy + PartialEq> Guarded<T> {
    fn new(content: &[T], guard: T, misaligned: bool) -> Self {
        let len = content.len();
        let mut numbers = vec![guard; len + 3 * GUARD];
        let aligned = numbers.as_ptr().align_offset(16);
        let start = GUARD + aligned + usize::from(misaligned);
        numbers[start..start + len].copy_from_slice(content);
        Self { numbers, start, len, guard }
    }

    fn address(&self) -> usize {
        self.numbers[self.start..].as_ptr() as usize
    }

    fn region(&self, numbers: Range<usize>, writable: bool) -> Region {
        assert!(numbers.end <= self.len);
        let at = |number: usize| self.address() + number * size_of::<T>();
        Region { first: at(numbers.start), end: at(numbers.end), writable: i32::from(writable) }
    }

    fn content(&self) -> &[T] {
        &self.numbers[self.start..self.start + self.len]
    }
}

impl Guarded<u32> {
    fn assert_intact(&self, what: &str) {
        let (before, after) = (&self.numbers[..self.start], &self.numbers[self.start + self.len..]);
        assert!(before.iter().chain(after).all(|&number| number == self.guard), "guard zone of {what}");
    }
}

/// A layer with random contents.
struct Case {
    layout: HeadLayout,
    /// Rows of each slot.
    kept_lens: Vec<usize>,
    tail_len: usize,
    tail_capacity: usize,
    wanted_blocks: usize,
    misaligned: bool,
    seed: u64,
}

impl Case {
    /// Runs the kernel in several orders, and the CPU, on the same numbers; returns the number of ranges of the longest head.
    fn check<T: Element + WithDType, Q: Element + WithDType + PartialEq>(&self, emulation: &Emulation) -> usize {
        let HeadLayout { num_heads, num_kv_heads, head_dim } = self.layout;
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect() };

        // Padding before, between and after the spans.
        let mut slots = Vec::new();
        let mut num_rows = 2;
        for &len in &self.kept_lens {
            slots.push(Slot { rows: num_rows..num_rows + len, kv_head: 0 });
            num_rows += len + 3;
        }
        let mut order: Vec<usize> = (0..num_kv_heads).collect();
        order.shuffle(&mut StdRng::seed_from_u64(self.seed + 1));
        for (slot, kv_head) in slots.iter_mut().zip(order) {
            slot.kv_head = kv_head;
        }
        let nan = T::narrow(f32::NAN);
        let mut fill = |len: usize, used: &dyn Fn(usize) -> bool| -> Vec<T> {
            let numbers = draw(len * head_dim);
            let number = |(index, number): (usize, f32)| {
                if used(index / head_dim) { T::narrow(number) } else { nan }
            };
            numbers.into_iter().enumerate().map(number).collect()
        };
        let is_kept = |row: usize| slots.iter().any(|slot| slot.rows.contains(&row));
        let in_tail = |row: usize| row % self.tail_capacity.max(1) < self.tail_len;
        let kept = [fill(num_rows, &is_kept), fill(num_rows, &is_kept)];
        let tail_rows = num_kv_heads * self.tail_capacity;
        let tail = [fill(tail_rows, &in_tail), fill(tail_rows, &in_tail)];
        let queries: Vec<Q> = draw(num_heads * head_dim).iter().map(|&number| Q::narrow(4.0 * number)).collect();

        let expected = self.on_cpu(&slots, &kept, &tail, &queries);
        let work = Work {
            num_kv_heads,
            group_size: self.layout.group_size(),
            head_dim,
            total_rows: self.kept_lens.iter().sum::<usize>() + num_kv_heads * self.tail_len,
            longest: self.kept_lens.iter().max().unwrap() + self.tail_len,
            tail_capacity: self.tail_capacity,
            tail_len: self.tail_len,
            format: Format::of(T::DTYPE).unwrap(),
            query_format: Format::of(Q::DTYPE).unwrap(),
        };
        let plan = Plan::new(&work, self.wanted_blocks);
        let orders = [(1, 1), (usize::MAX, THREADS as usize - 1), (7, 37)];
        let outputs = orders.map(|(block_step, thread_step)| {
            let orders = (block_step, thread_step);
            let Case { misaligned, .. } = *self;
            let launch = Launch { work, plan: &plan, slots: &slots, orders, misaligned, hidden_rows: 0 };
            launch.run(emulation, &kept, &tail, &queries).unwrap_or_else(|error| panic!("{error}: {plan:?} {work:?}"))
        });
        for (index, expected) in expected.iter().enumerate() {
            let got = outputs[0][index].widen();
            // A number of 16 bits may be rounded the other way.
            let rounding = match Q::DTYPE {
                DType::F32 => 0.0,
                DType::F16 => expected.abs() / 1024.0,
                _ => expected.abs() / 128.0,
            };
            let difference = (got - expected).abs();
            assert!(difference <= TOLERANCE + rounding, "{index}: {got}, expected {expected} ({plan:?})");
        }
        assert!(outputs.iter().all(|output| *output == outputs[0]), "the order of threads or blocks matters");
        plan.max_ranges
    }

    fn on_cpu<T: WithDType, Q: WithDType + Element>(
        &self,
        slots: &[Slot],
        kept: &[Vec<T>; 2],
        tail: &[Vec<T>; 2],
        queries: &[Q],
    ) -> Vec<f32> {
        let HeadLayout { num_heads, num_kv_heads, head_dim } = self.layout;
        let device = &Device::Cpu;
        let [keys, values] =
            kept.each_ref().map(|rows| Tensor::from_slice(rows, (rows.len() / head_dim, head_dim), device).unwrap());
        let rows = RaggedRows::new(device, self.layout, T::DTYPE, Some((keys, values)), slots.to_vec()).unwrap();
        let tail = tail.each_ref().map(|rows| {
            let rows = Tensor::from_slice(rows, (num_kv_heads, self.tail_capacity, head_dim), device).unwrap();
            rows.narrow(1, 0, self.tail_len).unwrap()
        });
        let tail = (self.tail_len > 0).then_some((&tail[0], &tail[1]));
        let queries = Tensor::from_slice(queries, (num_heads, head_dim), device).unwrap();
        let out = rows.attend(&queries, tail).unwrap();
        out.flatten_all().unwrap().to_vec1::<Q>().unwrap().into_iter().map(Element::widen).collect()
    }
}

struct Launch<'a> {
    work: Work,
    plan: &'a Plan,
    slots: &'a [Slot],
    /// From a block, and from a thread, to the one that takes the next turn.
    orders: (usize, usize),
    misaligned: bool,
    /// Rows at the end of each slot's kept ones that must not be read after all.
    hidden_rows: usize,
}

impl Launch<'_> {
    /// Returns the output, or what the emulation has to say against the launch.
    fn run<T: Element + PartialEq, Q: Element + PartialEq>(
        &self,
        emulation: &Emulation,
        kept: &[Vec<T>; 2],
        tail: &[Vec<T>; 2],
        queries: &[Q],
    ) -> Result<Vec<Q>, String> {
        const ERROR_BYTES: usize = 256;
        const CANARY: u32 = 0x7fc0_dead; // NaN as f32
        let Work { num_kv_heads, head_dim, tail_capacity, tail_len, .. } = self.work;
        let nan = T::narrow(f32::NAN);
        let slots: Vec<u32> = self
            .slots
            .iter()
            .flat_map(|slot| [slot.rows.start, slot.rows.len(), slot.kv_head].map(|number| number as u32))
            .collect();
        let queries = Guarded::new(queries, Q::narrow(f32::NAN), false);
        let [kept_keys, kept_values] = kept.each_ref().map(|rows| Guarded::new(rows, nan, self.misaligned));
        let [tail_keys, tail_values] = tail.each_ref().map(|rows| Guarded::new(rows, nan, self.misaligned));
        let slots = Guarded::new(&slots, u32::MAX, false);
        // As u32, so that guard zones compare; an output of 16 bits takes half of it.
        let words = (queries.len * size_of::<Q>()).div_ceil(4);
        let out = Guarded::new(&vec![CANARY; words], CANARY, false);
        let partial_sums = Guarded::new(&vec![CANARY; self.plan.partial_sums], CANARY, false);
        let partial_stats = Guarded::new(&vec![CANARY; self.plan.partial_stats], CANARY, false);
        let counters = Guarded::new(&vec![0; num_kv_heads], CANARY, false);

        let mut regions = vec![
            queries.region(0..queries.len, false),
            slots.region(0..slots.len, false),
            out.region(0..out.len, true),
            partial_sums.region(0..partial_sums.len, true),
            partial_stats.region(0..partial_stats.len, true),
            counters.region(0..counters.len, true),
        ];
        for (place, slot) in self.slots.iter().enumerate() {
            let kept = slot.rows.start * head_dim..(slot.rows.end - self.hidden_rows) * head_dim;
            let first = place * tail_capacity;
            let tail = first * head_dim..(first + tail_len) * head_dim;
            regions.extend([kept_keys.region(kept.clone(), false), kept_values.region(kept, false)]);
            regions.extend([tail_keys.region(tail.clone(), false), tail_values.region(tail, false)]);
        }
        let buffers = Buffers {
            queries: queries.address() as u64,
            kept_keys: kept_keys.address() as u64,
            kept_values: kept_values.address() as u64,
            slots: slots.address() as u64,
            tail_keys: tail_keys.address() as u64,
            tail_values: tail_values.address() as u64,
            out: out.address() as u64,
            partial_sums: partial_sums.address() as u64,
            partial_stats: partial_stats.address() as u64,
            counters: counters.address() as u64,
        };
        let arguments = Arguments::new(&self.work, self.plan, buffers).unwrap();
        let (grid_x, grid_y) = self.plan.grid(&self.work).unwrap();
        let blocks = (grid_x * grid_y) as usize;
        // The nearest step below that reaches every block.
        let step = (1..=self.orders.0.min(blocks - 1).max(1)).rev().find(|&step| gcd(step, blocks) == 1).unwrap();
        let name = CString::new(self.plan.kernel.as_str()).unwrap();
        let mut error = [0u8; ERROR_BYTES];
        // SAFETY: buffers are as large as the arguments say, accesses outside of them are refused, and `error` ends in NUL.
        unsafe {
            (emulation.run)(
                name.as_ptr(),
                &raw const arguments,
                grid_x,
                grid_y,
                step as c_uint,
                self.orders.1 as c_uint,
                regions.as_ptr(),
                regions.len(),
                error.as_mut_ptr().cast(),
                ERROR_BYTES,
            );
        }
        let error = String::from_utf8_lossy(error.split(|&byte| byte == 0).next().unwrap()).into_owned();
        if !error.is_empty() {
            return Err(error);
        }
        out.assert_intact("the output");
        partial_sums.assert_intact("partial sums");
        partial_stats.assert_intact("partial maxima");
        counters.assert_intact("counters");
        assert!(counters.content().iter().all(|&count| count == 0), "counters are zero for the next launch");
        // SAFETY: the buffer is as large as the output, and every pattern of bits is a number.
        Ok(unsafe { std::slice::from_raw_parts(out.address() as *const Q, queries.len) }.to_vec())
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// As [`Case::check`], for formats that are chosen when the test runs.
fn check(case: &Case, emulation: &Emulation, formats: (Format, Format)) -> usize {
    match formats {
        (Format::F32, Format::F32) => case.check::<f32, f32>(emulation),
        (Format::F32, Format::F16) => case.check::<f32, f16>(emulation),
        (Format::F32, Format::BF16) => case.check::<f32, bf16>(emulation),
        (Format::F16, Format::F32) => case.check::<f16, f32>(emulation),
        (Format::F16, Format::F16) => case.check::<f16, f16>(emulation),
        (Format::F16, Format::BF16) => case.check::<f16, bf16>(emulation),
        (Format::BF16, Format::F32) => case.check::<bf16, f32>(emulation),
        (Format::BF16, Format::F16) => case.check::<bf16, f16>(emulation),
        (Format::BF16, Format::BF16) => case.check::<bf16, bf16>(emulation),
    }
}

const FORMATS: [Format; 3] = [Format::F32, Format::F16, Format::BF16];

#[test]
fn every_kernel_computes_what_the_cpu_does() {
    let emulation = Emulation::new(&[]);
    let mut seed = 0;
    let (mut single, mut split) = (0, 0);
    for head_dim in [64, 128, 256] {
        for group_size in [1, 2, 4, 8, 16] {
            for format in FORMATS {
                seed += 1;
                let layout = HeadLayout { num_heads: 2 * group_size, num_kv_heads: 2, head_dim };
                let case = Case {
                    layout,
                    kept_lens: vec![37, 95],
                    tail_len: 5,
                    tail_capacity: 8,
                    wanted_blocks: if seed % 2 == 0 { 1 } else { 100 },
                    misaligned: false,
                    seed,
                };
                let ranges = check(&case, &emulation, (format, FORMATS[seed as usize / 3 % 3]));
                if ranges == 1 { single += 1 } else { split += 1 }
            }
        }
    }
    assert!(single > 10 && split > 10, "{single} launches of one range a head, {split} of more");
}

#[test]
fn ragged_shapes_of_any_size_compute_what_the_cpu_does() {
    let emulation = Emulation::new(&[]);
    let mut rng = StdRng::seed_from_u64(1);
    for seed in 0..40 {
        let num_kv_heads = rng.random_range(1..=5);
        let group_size = rng.random_range(1..=7);
        let head_dim = [2, 6, 16, 40, 64, 72, 80, 96, 100, 128, 130, 192][rng.random_range(0..12)];
        let tail_capacity = rng.random_range(1..=70);
        // At times one of the two parts is empty.
        let tail_len = if seed % 5 == 0 { 0 } else { rng.random_range(1..=tail_capacity) };
        let least = usize::from(tail_len == 0);
        let most = if seed % 4 == 1 { least } else { 150 };
        let kept_lens = (0..num_kv_heads).map(|_| rng.random_range(least..=most)).collect();
        let layout = HeadLayout { num_heads: num_kv_heads * group_size, num_kv_heads, head_dim };
        let case = Case {
            layout,
            kept_lens,
            tail_len,
            tail_capacity,
            wanted_blocks: rng.random_range(1..200),
            misaligned: rng.random_bool(0.3),
            seed: 1000 + seed,
        };
        let formats = (FORMATS[rng.random_range(0..3)], FORMATS[rng.random_range(0..3)]);
        check(&case, &emulation, formats);
    }
}

#[test]
fn a_head_of_the_most_ranges_is_merged() {
    let emulation = Emulation::new(&[]);
    let case = Case {
        layout: HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim: 8 },
        kept_lens: vec![64 * 64 - 10],
        tail_len: 11, // one row more than 64 ranges of 64 rows
        tail_capacity: 11,
        wanted_blocks: 10_000,
        misaligned: false,
        seed: 7,
    };
    assert_eq!(check(&case, &emulation, (Format::F32, Format::F32)), 33);
    let case = Case { tail_len: 10, ..case };
    assert_eq!(check(&case, &emulation, (Format::F32, Format::F32)), 64);
}

/// The checks themselves: an emulation that let a wrong kernel pass would be worth nothing.
#[test]
fn wrong_accesses_and_missing_barriers_are_caught() {
    let work = Work {
        num_kv_heads: 1,
        group_size: 2,
        head_dim: 64,
        total_rows: 20,
        longest: 20,
        tail_capacity: 0,
        tail_len: 0,
        format: Format::F32,
        query_format: Format::F32,
    };
    let plan = Plan::new(&work, 1);
    let slots = [Slot { rows: 0..20, kv_head: 0 }];
    let mut rng = StdRng::seed_from_u64(1);
    let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0f32..1.0)).collect() };
    let (rows, queries) = ([draw(20 * 64), draw(20 * 64)], draw(2 * 64));
    let run = |emulation: &Emulation, thread_step: usize, hidden_rows: usize| {
        let orders = (1, thread_step);
        let launch = Launch { work, plan: &plan, slots: &slots, orders, misaligned: false, hidden_rows };
        launch.run(emulation, &rows, &[vec![], vec![]], &queries)
    };
    let emulation = Emulation::new(&[]);
    let right = run(&emulation, 1, 0).unwrap();
    let error = run(&emulation, 1, 1).unwrap_err();
    assert!(error.contains("read outside the regions"), "{error}");

    let without = Emulation::new(&["-DWITHOUT_BARRIERS"]);
    let wrong = [1, 127, 37].map(|thread_step| run(&without, thread_step, 0).unwrap());
    assert!(wrong.iter().all(|wrong| *wrong != right), "without barriers the result is wrong in every order");
}
