//! ggml's block formats: the names of all, also of those that are not computed with.
//!
//! Source: `enum ggml_type` of <https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h>; numbers that were
//! given up keep their last name.

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

/// A format for people: as `IQ4_XS (number 23)`.
pub(super) fn shown(number: u32) -> String {
    let name = usize::try_from(number).ok().and_then(|number| NAMES.get(number));
    name.map_or_else(|| format!("number {number}"), |name| format!("{name} (number {number})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quant::WeightFormat;

    #[test]
    fn names_stand_at_their_numbers() {
        for (number, name) in [(0, "F32"), (14, "Q6_K"), (23, "IQ4_XS"), (30, "BF16"), (35, "TQ2_0"), (39, "MXFP4")] {
            assert_eq!(shown(number), format!("{name} (number {number})"));
        }
        assert_eq!(shown(99), "number 99");
        for (number, name) in (0..).zip(NAMES) {
            assert!(WeightFormat::of_number(number).is_none_or(|format| format.name() == name), "{number}");
        }
    }
}
