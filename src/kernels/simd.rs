//! Choice of the instruction set at run time.
//!
//! A kernel is written once, as an `#[inline(always)]` body over a const generic `SIMD: bool`, in plain loops over
//! small arrays that the compiler turns into vector code. `multiversion!` compiles the body for each instruction set
//! and calls the best one that this processor has. With `SIMD = false` the body must use nothing that needs more than
//! the target's baseline: it is the portable fallback, and the oracle of the others.

use std::str::FromStr;
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// A set of instructions that this processor has: nothing but detection makes one, so that safe code cannot run what the
/// processor does not know. Sets compare from least to best.
#[derive(Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct InstructionSet(Level);

/// Instruction sets that kernels are compiled for, from least to best. Knowing a level's name gives no right to use it:
/// that takes an [`InstructionSet`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// What every processor of this architecture has.
    #[default]
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The above and AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The above and AVX-512 VBMI and VNNI: bytes in any order, and sums of products of bytes.
    Avx512Vnni,
}

impl Level {
    /// From least to best.
    const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni];

    /// What users call it.
    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "vnni",
        }
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
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    let bytes = has!("avx512vbmi") && has!("avx512vnni");
                    return Self(if bytes { Level::Avx512Vnni } else { Level::Avx512 });
                }
                return Self(Level::Avx2);
            }
        }
        Self::PORTABLE
    }

    /// The sets that this processor has, [`PORTABLE`](Self::PORTABLE) first: tests run every kernel on each.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let best = Self::detect();
        Level::ALL.into_iter().map(Self).filter(|&set| set <= best).collect()
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

    /// What [`FromStr`] reads: `portable`, `avx2`, `avx512` or `vnni`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Which of the sets it is.
    #[inline(always)]
    pub(crate) fn level(self) -> Level {
        self.0
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

/// Defines `pub fn name(set, args..) -> ret`, which runs `body::<SIMD, ..>(args..)` compiled for `set`.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;
    ) => {
        $(#[$meta])*
        // Every argument of the slow path is used, whatever the architecture.
        $vis fn $name $(<$generic: $bound>)? (
            set: $crate::kernels::simd::InstructionSet, $($arg: $ty),*
        ) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<true $(, $generic)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<$generic: $bound>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<true $(, $generic)?>($($arg),*)
                }
                match set.level() {
                    $crate::kernels::simd::Level::Avx512 | $crate::kernels::simd::Level::Avx512Vnni => {
                        // SAFETY: the processor has the set, see `InstructionSet`.
                        return unsafe { avx512 $(::<$generic>)? ($($arg),*) };
                    }
                    $crate::kernels::simd::Level::Avx2 => {
                        // SAFETY: as above.
                        return unsafe { avx2 $(::<$generic>)? ($($arg),*) };
                    }
                    $crate::kernels::simd::Level::Portable => {}
                }
            }
            let _ = set;
            $body::<false $(, $generic)?>($($arg),*)
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
pub(crate) fn fma<const SIMD: bool>(a: f32, b: f32, c: f32) -> f32 {
    if SIMD { a.mul_add(b, c) } else { a * b + c }
}
