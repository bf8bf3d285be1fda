//! ggml's block formats: their numbers in a file, their names, and which of them are computed with.
//!
//! Source: `enum ggml_type` of <https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h>; numbers that were
//! given up keep their last name.

use candle_core::quantized::GgmlDType;

/// The names of all formats, by number.
const NAMES: [&str; 43] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
    "NVFP4",
    "Q1_0",
    "Q2_0",
];

/// A format that is computed with.
pub(super) fn computed(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// A format for people: as `IQ4_XS (number 23)`.
pub(super) fn shown(number: u32) -> String {
    let name = usize::try_from(number).ok().and_then(|number| NAMES.get(number));
    name.map_or_else(|| format!("number {number}"), |name| format!("{name} (number {number})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_at_their_numbers() {
        for (number, name) in [(0, "F32"), (14, "Q6_K"), (23, "IQ4_XS"), (30, "BF16"), (35, "TQ2_0"), (39, "MXFP4")] {
            assert_eq!(shown(number), format!("{name} (number {number})"));
        }
        assert_eq!(shown(99), "number 99");
        for (number, name) in (0..).zip(NAMES) {
            let Some(dtype) = computed(number) else { continue };
            assert_eq!(format!("{dtype:?}"), name.replace("_K", "K"));
        }
    }
}
