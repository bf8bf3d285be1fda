//! The formats that weights are stored in: ggml's names, numbers and sizes.
//!
//! Source: `enum ggml_type` of <https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h> and the blocks of
//! `ggml-common.h`. Not for: what the bytes of a block mean (see [`super::WeightMatrix::dequantize_rows`]).

use candle_core::quantized::GgmlDType;

/// A format of weights: plain floats, which are blocks of one number, or blocks of quants that share scales. As text it is
/// ggml's name, as `Q4_K`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

impl WeightFormat {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q8_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Q8K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
    ];

    /// Number in files, name, numbers in a block and bytes of a block.
    fn facts(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::BF16 => (30, "BF16", 1, 2),
            Self::Q4_0 => (2, "Q4_0", 32, 18),
            Self::Q4_1 => (3, "Q4_1", 32, 20),
            Self::Q5_0 => (6, "Q5_0", 32, 22),
            Self::Q5_1 => (7, "Q5_1", 32, 24),
            Self::Q8_0 => (8, "Q8_0", 32, 34),
            Self::Q8_1 => (9, "Q8_1", 32, 36),
            Self::Q2K => (10, "Q2_K", 256, 84),
            Self::Q3K => (11, "Q3_K", 256, 110),
            Self::Q4K => (12, "Q4_K", 256, 144),
            Self::Q5K => (13, "Q5_K", 256, 176),
            Self::Q6K => (14, "Q6_K", 256, 210),
            Self::Q8K => (15, "Q8_K", 256, 292),
            Self::Iq4Nl => (20, "IQ4_NL", 32, 18),
            Self::Iq4Xs => (23, "IQ4_XS", 256, 136),
            Self::Mxfp4 => (39, "MXFP4", 32, 17),
        }
    }

    /// ggml's number, which GGUF files have.
    #[must_use]
    pub fn number(self) -> u32 {
        self.facts().0
    }

    /// The format with a number; `None` if there is none that is computed with.
    #[must_use]
    pub fn of_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.number() == number)
    }

    /// ggml's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.facts().1
    }

    /// Numbers in a block.
    #[must_use]
    pub fn block_size(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        self.facts().3
    }

    /// Whether it is plain floats.
    #[must_use]
    pub fn is_float(self) -> bool {
        self.block_size() == 1
    }

    /// Whether it is blocks of quants that candle knows.
    #[must_use]
    pub fn is_candle_blocks(self) -> bool {
        !self.is_float() && self.candle().is_some()
    }

    /// candle's type of the same bytes; `None` where candle has none.
    #[must_use]
    pub fn candle(self) -> Option<GgmlDType> {
        Some(match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::BF16 => GgmlDType::BF16,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q8_1 => GgmlDType::Q8_1,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
            Self::Q8K => GgmlDType::Q8K,
            Self::Iq4Nl | Self::Iq4Xs | Self::Mxfp4 => return None,
        })
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

impl From<GgmlDType> for WeightFormat {
    fn from(dtype: GgmlDType) -> Self {
        match dtype {
            GgmlDType::F32 => Self::F32,
            GgmlDType::F16 => Self::F16,
            GgmlDType::BF16 => Self::BF16,
            GgmlDType::Q4_0 => Self::Q4_0,
            GgmlDType::Q4_1 => Self::Q4_1,
            GgmlDType::Q5_0 => Self::Q5_0,
            GgmlDType::Q5_1 => Self::Q5_1,
            GgmlDType::Q8_0 => Self::Q8_0,
            GgmlDType::Q8_1 => Self::Q8_1,
            GgmlDType::Q2K => Self::Q2K,
            GgmlDType::Q3K => Self::Q3K,
            GgmlDType::Q4K => Self::Q4K,
            GgmlDType::Q5K => Self::Q5K,
            GgmlDType::Q6K => Self::Q6K,
            GgmlDType::Q8K => Self::Q8K,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_names_and_sizes_are_those_of_candle_where_it_has_the_format() {
        for format in WeightFormat::ALL {
            assert_eq!(WeightFormat::of_number(format.number()), Some(format));
            let Some(candle) = format.candle() else { continue };
            assert_eq!(WeightFormat::from(candle), format);
            assert_eq!(
                (format.block_size(), format.block_bytes()),
                (candle.block_size(), candle.type_size()),
                "{format}"
            );
            assert_eq!(format!("{candle:?}"), format.name().replace("_K", "K"));
        }
        assert_eq!(WeightFormat::of_number(4), None);
    }
}
