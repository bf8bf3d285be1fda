//! How text is cut into words before its bytes are merged: which rule goes with which name in a GGUF file.
//!
//! Names are llama.cpp's (`tokenizer.ggml.pre`), with its choice of rule for each; rules are written as in the models' own
//! `tokenizer.json`, of which llama.cpp's are adaptations. Where both differ in what they cut (`DeepSeek`'s digits), GGUF files
//! go by llama.cpp.
//!
//! Not for: merging (`byte_level.rs`).

use tokenizers::pre_tokenizers::digits::Digits;

use super::pipeline::{GPT2, WordStep, Words};
use crate::error::Result;

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pre {
    /// llama.cpp's rule for files that name none.
    Default,
    Gpt2,
    /// GPT-2's words, and every digit for itself.
    Digits,
    Llama3,
    Qwen2,
    Tekken,
    DeepSeekLlm,
    DeepSeekCoder,
    DeepSeekV3,
    Falcon,
    Gpt4o,
    SeedCoder,
    Viking,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    pub pre: Pre,
    /// Whether a whole word that is a token is taken without merging.
    pub whole_words: bool,
    /// Whether a prompt begins with BOS if the file does not say.
    pub bos_by_default: bool,
}

/// Names with the same rule and the same two flags of [`Named`], in its order.
#[rustfmt::skip]
const PRE_TOKENIZERS: &[(&[&str], Pre, bool, bool)] = &[
    (&["default"], Pre::Default, false, false),
    (&[
        "gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de",
        "jina-v2-code", "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo",
        "jais", "trillion", "granite-docling",
    ], Pre::Gpt2, false, false),
    (&[
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    ], Pre::Digits, false, false),
    (&[
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano",
    ], Pre::Llama3, true, true),
    (&["glm4", "glm5"], Pre::Llama3, true, false),
    (&["dbrx", "smaug-bpe", "chatglm-bpe"], Pre::Llama3, false, false),
    (&[
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open",
        "grok-2",
    ], Pre::Qwen2, false, false),
    (&["tekken"], Pre::Tekken, true, true),
    (&["deepseek-llm"], Pre::DeepSeekLlm, false, false),
    (&["deepseek-coder"], Pre::DeepSeekCoder, false, false),
    (&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], Pre::DeepSeekV3, false, false),
    (&["falcon"], Pre::Falcon, false, false),
    (&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], Pre::Gpt4o, false, false),
    (&["seed-coder"], Pre::SeedCoder, false, false),
    (&["viking"], Pre::Viking, false, false),
];

const PUNCTUATION: &str = r"[\p{P}$+<=>^~|]+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
/// `DeepSeek`'s first models: letters of alphabets with two cases, punctuation of three writings, and East Asian ones.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-",
    r"\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}",
    r"\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}",
    r"\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-",
    r"\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}",
    r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}",
    r"\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-",
    r"\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}",
    r"\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}",
    r"\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}",
    r"-\x{1E943}]+",
);
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";
const DEEPSEEK_EAST_ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const DEEPSEEK_V3_EAST_ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const VIKING: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";

/// What a name stands for, if it is known.
pub(super) fn named(name: &str) -> Option<Named> {
    let known = PRE_TOKENIZERS.iter().find(|(names, ..)| names.contains(&name));
    known.map(|&(_, pre, whole_words, bos_by_default)| Named { pre, whole_words, bos_by_default })
}

/// All names.
pub(super) fn names() -> Vec<&'static str> {
    PRE_TOKENIZERS.iter().flat_map(|(names, ..)| *names).copied().collect()
}

impl Pre {
    /// The steps of a rule.
    ///
    /// # Errors
    /// None in practice: rules are constants.
    pub fn words(self) -> Result<Words> {
        let split = WordStep::isolated;
        let splits = |regexes: &[&str]| regexes.iter().map(|regex| split(regex)).collect::<Result<Vec<_>>>();
        let mut steps = match self {
            Self::Default => splits(&[PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])?,
            Self::Gpt2 => splits(&[GPT2])?,
            Self::Digits => vec![WordStep::Other(Digits::new(true).into()), split(GPT2)?],
            Self::Llama3 => splits(&[LLAMA3])?,
            Self::Qwen2 => splits(&[QWEN2])?,
            Self::Tekken => splits(&[TEKKEN])?,
            Self::DeepSeekLlm => {
                splits(&[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_EAST_ASIAN, r"\p{N}+"])?
            }
            Self::DeepSeekCoder => splits(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_EAST_ASIAN, r"\p{N}"])?,
            Self::DeepSeekV3 => splits(&[r"\p{N}{1,3}", DEEPSEEK_V3_EAST_ASIAN, DEEPSEEK_V3])?,
            Self::Falcon => splits(&[r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"])?,
            Self::Gpt4o => splits(&[GPT4O])?,
            Self::SeedCoder => splits(&[SEED_CODER])?,
            Self::Viking => splits(&[VIKING, r"\p{N}"])?,
        };
        steps.push(WordStep::Bytes { prefix: false, split: false });
        Ok(Words::new(steps))
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString};

    use super::super::spelling::spelt_bytes;
    use super::*;

    /// The words that a rule makes of a text, with the bytes decoded.
    fn words(pre: Pre, text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        pre.words().unwrap().split(&mut split).unwrap();
        let parts = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        parts.into_iter().map(|(word, ..)| String::from_utf8(spelt_bytes(word).collect()).unwrap()).collect()
    }

    #[test]
    fn every_rule_cuts_as_its_models_do() {
        let text = "I'm 1234 été!!  x\n\n y";
        let gpt2 = ["I", "'m", " 1234", " été", "!!", " ", " x", "\n\n", " y"];
        assert_eq!(words(Pre::Gpt2, text), gpt2);
        let digits = ["I", "'m", " ", "1", "2", "3", "4", " été", "!!", " ", " x", "\n\n", " y"];
        assert_eq!(words(Pre::Digits, text), digits);
        let llama3 = ["I", "'m", " ", "123", "4", " été", "!!", " ", " x", "\n\n", " y"];
        assert_eq!(words(Pre::Llama3, text), llama3);
        let qwen2 = ["I", "'m", " ", "1", "2", "3", "4", " été", "!!", " ", " x", "\n\n", " y"];
        assert_eq!(words(Pre::Qwen2, text), qwen2);
        assert_eq!(words(Pre::Tekken, "camelCase I'm"), ["camel", "Case", " I", "'m"]);
        assert_eq!(words(Pre::Default, "a(b) 12345+"), ["a", "(", "b", ")", " ", "123", "45", "+"]);
    }

    #[test]
    fn deepseeks_rules_cut_as_llama_cpp_does() {
        let text = "I'm 1234 \u{e9}t\u{e9}!!  \u{6771}\u{4eac}x\n\n y  ";
        // Its rule for punctuation goes from `:` to `~`, which has the letters of ASCII in it.
        let e = "\u{e9}";
        let llm = [
            "I",
            "'",
            "m",
            " ",
            "1234",
            " \u{e9}",
            "t",
            e,
            "!!",
            "  ",
            "\u{6771}\u{4eac}",
            "x",
            "\n",
            "\n",
            " y",
            "  ",
        ];
        assert_eq!(words(Pre::DeepSeekLlm, text), llm);
        let coder = [
            "I",
            "'",
            "m",
            " ",
            "1",
            "2",
            "3",
            "4",
            " \u{e9}t\u{e9}",
            "!!",
            " ",
            " ",
            "\u{6771}\u{4eac}",
            "x",
            "\n",
            "\n",
            " y",
            "  ",
        ];
        assert_eq!(words(Pre::DeepSeekCoder, text), coder);
        assert_eq!(words(Pre::DeepSeekV3, "ab 12345!!\n"), ["ab", " ", "123", "45", "!!\n"]);
        assert_eq!(words(Pre::Gpt4o, "camelCase's 1234"), ["camel", "Case's", " ", "123", "4"]);
        assert_eq!(words(Pre::SeedCoder, "a!!\n 12"), ["a", "!!", "\n", " ", "1", "2"]);
        assert_eq!(words(Pre::Falcon, "a`b 1234"), ["a", "`", "b", " ", "123", "4"]);
        assert_eq!(words(Pre::Viking, "a12, b"), ["a", "1", "2", ",", " b"]);
    }

    /// Names, and what llama.cpp's `llama_vocab::impl::load` has for them: the rule, `ignore_merges`, `add_bos`.
    #[test]
    fn names_stand_for_the_rules_of_llama_cpp() {
        for (name, pre, whole_words, bos) in [
            ("pixtral", Pre::Llama3, true, true),
            ("midm-2.0", Pre::Llama3, true, true),
            ("glm4", Pre::Llama3, true, false),
            ("smaug-bpe", Pre::Llama3, false, false),
            ("mellum", Pre::Gpt2, false, false),
            ("trillion", Pre::Gpt2, false, false),
            ("mellum2", Pre::Digits, false, false),
            ("megrez", Pre::Qwen2, false, false),
            ("kormo", Pre::Qwen2, false, false),
            ("stablelm2", Pre::Qwen2, false, false),
            ("tekken", Pre::Tekken, true, true),
            ("hunyuan-dense", Pre::DeepSeekV3, false, false),
        ] {
            let named = named(name).unwrap();
            assert_eq!((named.pre, named.whole_words, named.bos_by_default), (pre, whole_words, bos), "{name}");
        }
        assert!(named("bert-bge").is_none() && named("").is_none());
        let mut names = names();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count, "a name stands for one rule");
    }
}
