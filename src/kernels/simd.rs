//! Instruction sets, and the one place where a kernel is compiled for each and run on the best.
//!
//! A kernel is written once, as an `#[inline(always)]` body over `L: Lanes`: an instruction set, and sixteen numbers in its
//! registers. Many bodies are plain loops over small arrays that the compiler turns into vector code; others use the
//! `Lanes` themselves. `dispatch` runs such a body as `Work`, and `multiversion!` makes a function of it. Lanes for
//! x86-64 cannot be named outside of this folder, so that no code gets at them which was not compiled for, and does not run
//! on, their instruction set. `Portable` needs nothing but the target's baseline: it is the fallback, and the oracle of the
//! others.
//!
//! Integer sums are exact, so they are equal on all sets; sums of floats differ by whether products are rounded before they
//! are added.

mod lanes;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::str::FromStr;
use std::sync::OnceLock;

use crate::error::{Error, Result};
pub(crate) use lanes::{Factors, LANES, LARGEST_FACTOR, Lanes, ROUND};

/// A set of instructions that this processor has: nothing but detection makes one, so that safe code cannot run what the
/// processor does not know. Sets compare from least to best.
#[derive(Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct InstructionSet(Level);

/// Instruction sets that kernels are compiled for, from least to best. Knowing a level's name gives no right to use it:
/// that takes an [`InstructionSet`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// What every processor of this architecture has.
    #[default]
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The above and AVX-VNNI, without AVX-512: sums of products of bytes.
    AvxVnni,
    /// AVX2, FMA and F16C, and AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The above and AVX-512 VBMI and VNNI: bytes in any order, and sums of products of bytes.
    Avx512Vnni,
}

impl Level {
    /// From least to best.
    const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni];

    /// What users call it.
    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "vnni",
        }
    }

    /// Whether this processor has it.
    #[cfg(target_arch = "x86_64")]
    fn is_here(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        match self {
            Self::Portable => true,
            Self::Avx2 => has!("avx2") && has!("fma") && has!("f16c"),
            Self::AvxVnni => Self::Avx2.is_here() && has!("avxvnni"),
            Self::Avx512 => {
                let foundation = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
                Self::Avx2.is_here() && foundation
            }
            Self::Avx512Vnni => Self::Avx512.is_here() && has!("avx512vbmi") && has!("avx512vnni"),
        }
    }

    /// Whether this processor has it.
    #[cfg(not(target_arch = "x86_64"))]
    fn is_here(self) -> bool {
        self == Self::Portable
    }
}

/// What all kernels of this program run on, once somebody has asked.
static IN_USE: OnceLock<InstructionSet> = OnceLock::new();

/// The instruction set that this program computes with: the best of this processor, or the one that
/// [`InstructionSet::use_everywhere`] has chosen.
#[must_use]
pub fn instruction_set() -> InstructionSet {
    *IN_USE.get_or_init(InstructionSet::detect)
}

impl std::fmt::Debug for InstructionSet {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(formatter)
    }
}

impl InstructionSet {
    /// What every processor of this architecture has; the default.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// The best set that this processor has.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or_default()
    }

    /// The sets that this processor has, [`PORTABLE`](Self::PORTABLE) first and the best last: tests run every kernel on each.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Level::ALL.into_iter().filter(|level| level.is_here()).map(Self).collect()
    }

    /// Makes it the one that [`instruction_set`] returns: for tests and measurements of a lesser set than the processor's
    /// best. Products of dense matrices (the `gemm` crate) and of some formats of 256 numbers (candle) still choose by
    /// themselves.
    ///
    /// # Errors
    /// [`Error::Input`] if something was computed with another set before.
    pub fn use_everywhere(self) -> Result<()> {
        let in_use = *IN_USE.get_or_init(|| self);
        if in_use == self {
            return Ok(());
        }
        Err(Error::input(format!("instructions `{}` after `{}` were used", self.name(), in_use.name())))
    }

    /// What [`FromStr`] reads: `portable`, `avx2`, `avxvnni`, `avx512` or `vnni`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Whether [`Work::QUANTS`] runs with [`Lanes::WIDE`].
    pub(crate) fn is_wide(self) -> bool {
        self.0 == Level::Avx512Vnni
    }

    /// That the processor sums products of bytes, if the set has it.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn vnni(self) -> Option<Vnni> {
        (self.0 == Level::Avx512Vnni).then_some(Vnni(()))
    }
}

/// Reads the name of a set that this processor has.
impl FromStr for InstructionSet {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let available = Self::available();
        if let Some(&set) = available.iter().find(|set| set.name() == name) {
            return Ok(set);
        }
        let names = |levels: &[&'static str]| levels.join(", ");
        Err(if Level::ALL.iter().any(|level| level.name() == name) {
            let has: Vec<_> = available.iter().map(|set| set.name()).collect();
            Error::input(format!("this processor has no instructions `{name}` (it has {})", names(&has)))
        } else {
            let all = Level::ALL.map(Level::name);
            Error::input(format!("expected one of {}", names(&all)))
        })
    }
}

/// Says that the processor has AVX-512 VNNI and all below: what functions may ask for that are compiled for it alone.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Vnni(());

/// What is run on one of the instruction sets.
pub(crate) trait Work {
    /// What comes of it.
    type Output;

    /// Whether it multiplies quants, so that AVX-512 is of use only together with VNNI.
    const QUANTS: bool = false;

    /// The body; `#[inline(always)]`, as all that it calls with `L`.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs work that was compiled for a set of instructions.
#[inline(always)]
pub(crate) fn dispatch<W: Work>(set: InstructionSet, work: W) -> W::Output {
    // A function of its own, as the others are: large bodies are compiled better than in the middle of their callers.
    fn portable<W: Work>(work: W) -> W::Output {
        work.run::<portable::Portable>()
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<W: Work>(work: W) -> W::Output {
            work.run::<x86::Avx2<false>>()
        }
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn avx_vnni<W: Work>(work: W) -> W::Output {
            work.run::<x86::Avx2<true>>()
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<W: Work>(work: W) -> W::Output {
            work.run::<x86::Avx512<false>>()
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
        fn vnni<W: Work>(work: W) -> W::Output {
            work.run::<x86::Avx512<true>>()
        }
        match set.0 {
            // SAFETY: the processor has the set, see `InstructionSet`.
            Level::Avx512Vnni if W::QUANTS => return unsafe { vnni(work) },
            // SAFETY: as above.
            Level::Avx512 | Level::Avx512Vnni if !W::QUANTS => return unsafe { avx512(work) },
            // SAFETY: as above.
            Level::AvxVnni if W::QUANTS => return unsafe { avx_vnni(work) },
            // SAFETY: as above.
            Level::Avx2 | Level::AvxVnni | Level::Avx512 | Level::Avx512Vnni => return unsafe { avx2(work) },
            Level::Portable => {}
        }
    }
    let _ = set;
    portable(work)
}

/// Defines `pub fn name(set, args..) -> ret`, which runs `body::<L, ..>(args..)` as [`Work`]; with `, quants` behind the
/// body's name as work that multiplies quants.
macro_rules! multiversion {
    (@output) => { () };
    (@output $ret:ty) => { $ret };
    (@quants) => { false };
    (@quants quants) => { true };
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident $(, $quants:ident)?;
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? (
            set: $crate::kernels::simd::InstructionSet, $($arg: $ty),*
        ) $(-> $ret)? {
            struct Call<A, G>(A, std::marker::PhantomData<G>);
            impl $(<$generic: $bound>)? $crate::kernels::simd::Work for Call<($($ty,)*), ($($generic,)?)> {
                type Output = $crate::kernels::simd::multiversion!(@output $($ret)?);

                const QUANTS: bool = $crate::kernels::simd::multiversion!(@quants $($quants)?);

                #[inline(always)]
                fn run<L: $crate::kernels::simd::Lanes>(self) -> Self::Output {
                    let ($($arg,)*) = self.0;
                    $body::<L $(, $generic)?>($($arg),*)
                }
            }
            $crate::kernels::simd::dispatch(set, Call(($($arg,)*), std::marker::PhantomData::<($($generic,)?)>))
        }
    };
}
pub(crate) use multiversion;

/// An array of an expression's value for each element of an array of two or four. No closure: the compiler leaves those of
/// `array::map` out of line at times, where they lack the instruction set of their surroundings, and each intrinsic in
/// them becomes a call.
#[cfg(target_arch = "x86_64")]
macro_rules! each {
    ([$($element:expr),+], |$name:ident| $value:expr) => {
        [$({ let $name = $element; $value }),+]
    };
    (2 of $array:expr, |$name:ident| $value:expr) => {{
        let [a, b] = $array;
        $crate::kernels::simd::each!([a, b], |$name| $value)
    }};
    (4 of $array:expr, |$name:ident| $value:expr) => {{
        let [a, b, c, d] = $array;
        $crate::kernels::simd::each!([a, b, c, d], |$name| $value)
    }};
}
#[cfg(target_arch = "x86_64")]
pub(crate) use each;

/// `a * b + c`, fused where the instruction set has it.
#[inline(always)]
pub(crate) fn fma<L: Lanes>(a: f32, b: f32, c: f32) -> f32 {
    if L::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Starts to fetch a cache line, if there is any, into the first level of caches or, if not `NEAR`, the second.
#[inline(always)]
pub(crate) fn fetch<const NEAR: bool>(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if NEAR {
            // SAFETY: every processor of this architecture has it, and it reads nothing that a program could notice.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
        } else {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
        }
    }
    let _ = place;
}
