//! From text to the words whose pieces a model merges: the normaliser and the pre-tokenizer of a `tokenizer.json`, and the
//! rules for words of GGUF files, by the `tokenizers` crate.
//!
//! The crate takes a regular expression that gives up for one that found nothing more, and lets a text grow without bound;
//! so whatever searches is run here, step by step: a search that fails is an error, and so is a text that grows too much.
//! Steps and their meaning are those of the `tokenizers` library.
//!
//! Not for: models, or tokens that are found before anything else (see `added.rs`).

use std::sync::LazyLock;

use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::pattern::Pattern;
use tokenizers::pre_tokenizers::byte_level::ByteLevel as BytesPre;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{
    Model, NormalizedString, Normalizer as _, NormalizerWrapper, OffsetReferential, OffsetType, Offsets,
    PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper, SplitDelimiterBehavior,
};

use super::added::AddedTokens;
use crate::error::{Error, Result};
use crate::guard;

/// GPT-2's words.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Most steps of a normaliser, or of a pre-tokenizer; real ones have up to five.
const MAX_STEPS: usize = 64;

/// Longest regular expression, in bytes; the longest known ones have some 500.
const MAX_PATTERN: usize = 16 << 10;

/// Longest text that a normaliser puts in, in bytes.
const MAX_CONTENT: usize = 4096;

/// A text may become so many times as long, and [`GROWTH_ROOM`]. Of one character Unicode's normal forms make up to 18,
/// and in bytes 11 times as many.
const GROWTH: usize = 32;

/// See [`GROWTH`].
const GROWTH_ROOM: usize = 64 << 10;

/// What is done to a text before it is cut into words, in order.
#[derive(Debug, Default)]
pub(super) struct Normalizer(Vec<NormalizeStep>);

#[derive(Debug)]
enum NormalizeStep {
    Replace {
        pattern: Regex,
        content: String,
        /// Length of what it finds, if that is a text.
        finds: Option<usize>,
    },
    Other(NormalizerWrapper),
}

/// How a text is cut into words, in order.
#[derive(Debug, Default)]
pub(super) struct Words(Vec<WordStep>);

#[derive(Debug)]
pub(super) enum WordStep {
    /// At the places of a pattern, or at those between them.
    Split {
        pattern: Regex,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    /// Words are spelt byte by byte.
    Bytes {
        /// Whether a space is put before a word that does not begin with one.
        prefix: bool,
        /// Whether they are split as GPT-2's are, first.
        split: bool,
    },
    Other(PreTokenizerWrapper),
}

impl Normalizer {
    /// Reads the `normalizer` of a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(value: &Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Replace {
            pattern: ReplacePattern,
            content: String,
        }
        let read = |step: &Value| {
            let step: NormalizeStep = if step["type"] == "Replace" {
                let Replace { pattern, content } = parse(step)?;
                let (pattern, finds) = match pattern {
                    ReplacePattern::String(text) => (regex(&fancy_regex::escape(&text))?, Some(text.len())),
                    ReplacePattern::Regex(pattern) => (regex(&pattern)?, None),
                };
                if pattern.is_match("").unwrap_or(true) {
                    return Err(format!("it replaces `{}`, which is found where nothing is", short(pattern.as_str())));
                }
                check_content(&content)?;
                NormalizeStep::Replace { pattern, content, finds }
            } else {
                check_content(step["prepend"].as_str().unwrap_or_default())?;
                NormalizeStep::Other(parse(step)?)
            };
            Ok(step)
        };
        steps(value, "normalizers", "normaliser")?.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// How many bytes of a text become one, at most; `None` if there is no end to it.
    fn shrinks(&self) -> Option<usize> {
        self.0.iter().try_fold(1_usize, |factor, step| factor.checked_mul(step.shrinks()?))
    }

    /// Normalises a text.
    ///
    /// # Errors
    /// If a pattern gives up on it, or it grows too much.
    pub fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        let most = most_bytes(text.get());
        for step in &self.0 {
            match step {
                NormalizeStep::Replace { pattern, content, .. } => {
                    text.replace(Search { pattern, invert: false, grows: Some((content.len(), most)) }, content)?;
                }
                NormalizeStep::Other(step) => {
                    step.normalize(text)?;
                    check_growth(text.get().len(), most)?;
                }
            }
        }
        Ok(())
    }
}

impl NormalizeStep {
    fn shrinks(&self) -> Option<usize> {
        match self {
            Self::Replace { content, finds, .. } if !content.is_empty() => finds.map(|len| len.div_ceil(content.len())),
            Self::Other(NormalizerWrapper::Prepend(_) | NormalizerWrapper::ByteLevel(_)) => Some(1),
            Self::Other(NormalizerWrapper::Lowercase(_)) => Some(3),
            // A character of four bytes may be a letter in a style, and four of these one composed character.
            Self::Other(
                NormalizerWrapper::NFC(_)
                | NormalizerWrapper::NFD(_)
                | NormalizerWrapper::NFKC(_)
                | NormalizerWrapper::NFKD(_),
            ) => Some(16),
            _ => None,
        }
    }
}

impl Words {
    pub fn new(steps: Vec<WordStep>) -> Self {
        Self(steps)
    }

    /// Reads the `pre_tokenizer` of a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(value: &Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Split {
            pattern: SplitPattern,
            behavior: SplitDelimiterBehavior,
            invert: bool,
        }
        let read = |step: &Value| {
            Ok(match step["type"].as_str() {
                Some("Split") => {
                    let Split { pattern, behavior, invert } = parse(step)?;
                    let pattern = match pattern {
                        SplitPattern::String(text) => regex(&fancy_regex::escape(&text))?,
                        SplitPattern::Regex(pattern) => regex(&pattern)?,
                    };
                    WordStep::Split { pattern, behavior, invert }
                }
                Some("ByteLevel") => {
                    let BytesPre { add_prefix_space, use_regex, .. } = parse(step)?;
                    WordStep::Bytes { prefix: add_prefix_space, split: use_regex }
                }
                _ => WordStep::Other(parse(step)?),
            })
        };
        steps(value, "pretokenizers", "pre-tokenizer")?.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Cuts a text into words, in byte-level spelling if the last step says so.
    ///
    /// # Errors
    /// If a pattern gives up on it, or it grows too much.
    pub fn split(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        let bytes = |text: &PreTokenizedString| -> usize {
            text.get_splits(OffsetReferential::Normalized, OffsetType::Byte).iter().map(|(word, ..)| word.len()).sum()
        };
        // Two steps make it five times as long each, at most: a prefix for every byte.
        let can_grow = self.0.iter().filter(|step| !matches!(step, WordStep::Split { .. })).count() > 2;
        let most = can_grow.then(|| bytes(text).saturating_mul(GROWTH).saturating_add(GROWTH_ROOM));
        for step in &self.0 {
            step.run(text)?;
            if let Some(most) = most {
                check_growth(bytes(text), most)?;
            }
        }
        Ok(())
    }
}

impl WordStep {
    /// Whether all of a text is in some word.
    fn keeps_all(&self) -> bool {
        match self {
            Self::Split { behavior, .. } => *behavior != SplitDelimiterBehavior::Removed,
            Self::Other(PreTokenizerWrapper::Punctuation(step)) => step.behavior != SplitDelimiterBehavior::Removed,
            Self::Other(
                PreTokenizerWrapper::Metaspace(_)
                | PreTokenizerWrapper::Digits(_)
                | PreTokenizerWrapper::UnicodeScripts(_)
                | PreTokenizerWrapper::FixedLength(_),
            )
            | Self::Bytes { .. } => true,
            Self::Other(_) => false,
        }
    }

    /// Every match of a pattern is a word, and so is what lies between two of them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is no pattern.
    pub fn isolated(pattern: &str) -> Result<Self> {
        let pattern = regex(pattern).map_err(Error::unsupported)?;
        Ok(Self::Split { pattern, behavior: SplitDelimiterBehavior::Isolated, invert: false })
    }

    fn run(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        static WORDS: LazyLock<Result<Regex, String>> = LazyLock::new(|| regex(GPT2));
        match self {
            &Self::Split { ref pattern, behavior, invert } => {
                text.split(|_, part| part.split(Search { pattern, invert, grows: None }, behavior))
            }
            &Self::Bytes { prefix, split } => {
                text.split(|_, mut part| {
                    if prefix && !part.get().starts_with(' ') {
                        part.prepend(" ");
                    }
                    if !split {
                        return Ok(vec![part]);
                    }
                    let pattern = WORDS.as_ref().map_err(Clone::clone)?;
                    part.split(Search { pattern, invert: false, grows: None }, SplitDelimiterBehavior::Isolated)
                })?;
                BytesPre::new(false, false, false).pre_tokenize(text)
            }
            Self::Other(step) => step.pre_tokenize(text),
        }
    }
}

/// What turns text into ids: a normaliser, tokens that are found in what it leaves, words, and a model.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    pub normalizer: Normalizer,
    pub words: Words,
}

impl Pipeline {
    /// How many bytes of a text become one that a model gets, at most; `None` if there is no end to it.
    pub fn shrinks(&self) -> Option<usize> {
        self.normalizer.shrinks().filter(|_| self.words.0.iter().all(WordStep::keeps_all))
    }

    /// Whether texts are spelt byte by byte.
    pub fn spells_bytes(&self) -> bool {
        let normalizes = |step: &NormalizeStep| matches!(step, NormalizeStep::Other(NormalizerWrapper::ByteLevel(_)));
        let splits = |step: &WordStep| matches!(step, WordStep::Bytes { .. });
        self.normalizer.0.iter().any(normalizes) || self.words.0.iter().any(splits)
    }

    /// Appends the ids of a text to `ids`.
    ///
    /// * `added`: tokens that are looked for in the normalised text
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be tokenised.
    pub fn encode(&self, model: &impl Model, added: &AddedTokens, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let encode = || {
            let mut text = NormalizedString::from(text);
            self.normalizer.normalize(&mut text)?;
            let mut words = PreTokenizedString::from(text);
            words.split(|_, text| added.cut(&text))?;
            self.words.split(&mut words)?;
            model.tokenize_in_pretokenized(&mut words, None)?;
            Ok(words)
        };
        let words = guarded(encode)?;
        for (.., tokens) in words.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }
}

/// Runs what tokenises a text in the `tokenizers` crate.
///
/// # Errors
/// [`Error::Input`] if it fails, or panics.
pub(super) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let cannot = |reason: &dyn std::fmt::Display| Error::input(format!("the text cannot be tokenised: {reason}"));
    match guard::catch(work) {
        Ok(result) => result.map_err(|error| cannot(&error)),
        Err(panic) => Err(cannot(&format_args!("the tokenizer fails on it: {panic}"))),
    }
}

/// A search whose failure is one.
#[derive(Debug)]
struct Search<'r> {
    pattern: &'r Regex,
    /// Whether what lies between the matches is meant.
    invert: bool,
    /// If matches are replaced: the length of what replaces each, and the longest result.
    grows: Option<(usize, usize)>,
}

impl Pattern for Search<'_> {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let mut found = Vec::new();
        let (mut done, mut len) = (0, inside.len());
        for place in self.pattern.find_iter(inside) {
            let place =
                place.map_err(|error| format!("the pattern `{}` gives up: {error}", short(self.pattern.as_str())))?;
            let (start, end) = (place.start(), place.end());
            if let Some((content, most)) = self.grows {
                len = (len + content).saturating_sub(end - start);
                check_growth(len, most)?;
            }
            if done != start {
                found.push(((done, start), self.invert));
            }
            found.push(((start, end), !self.invert));
            done = end;
        }
        if done != inside.len() {
            found.push(((done, inside.len()), self.invert));
        }
        Ok(found)
    }
}

/// The steps of a part of a file, those of sequences in it one by one.
fn steps<'v>(value: &'v Value, list: &str, what: &str) -> Result<Vec<&'v Value>, String> {
    fn collect<'v>(value: &'v Value, list: &str, found: &mut Vec<&'v Value>) -> Result<(), String> {
        if value.is_null() {
            return Ok(());
        }
        if value["type"] != "Sequence" {
            found.push(value);
            return Ok(());
        }
        let parts = value[list].as_array().ok_or_else(|| format!("a `Sequence` without a list of `{list}`"))?;
        parts.iter().try_for_each(|part| collect(part, list, found))
    }
    let mut found = Vec::new();
    collect(value, list, &mut found)?;
    if found.len() > MAX_STEPS {
        return Err(format!("its {what} has {} steps, expected at most {MAX_STEPS}", found.len()));
    }
    Ok(found)
}

fn parse<T: for<'de> Deserialize<'de>>(value: &Value) -> Result<T, String> {
    guard::catch(|| T::deserialize(value).map_err(|error| error.to_string())).flatten()
}

fn regex(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > MAX_PATTERN {
        return Err(format!("a pattern of {} bytes, expected at most {MAX_PATTERN}", pattern.len()));
    }
    let failed = |error: &dyn std::fmt::Display| format!("the pattern `{}`: {error}", short(pattern));
    guard::catch(|| Regex::new(pattern)).map_err(|panic| failed(&panic))?.map_err(|error| failed(&error))
}

fn check_content(content: &str) -> Result<(), String> {
    if content.len() <= MAX_CONTENT {
        return Ok(());
    }
    Err(format!("its normaliser puts in a text of {} bytes, expected at most {MAX_CONTENT}", content.len()))
}

/// The longest that a text may become.
fn most_bytes(text: &str) -> usize {
    text.len().saturating_mul(GROWTH).saturating_add(GROWTH_ROOM)
}

fn check_growth(len: usize, most: usize) -> tokenizers::Result<()> {
    if len <= most {
        return Ok(());
    }
    Err(format!("its tokenizer makes it longer than {most} bytes, over {GROWTH} times as long").into())
}

/// A pattern for a message.
fn short(pattern: &str) -> String {
    const CHARS: usize = 60;
    let mut short: String = pattern.chars().take(CHARS).collect();
    if short.len() < pattern.len() {
        short.push('…');
    }
    short
}
