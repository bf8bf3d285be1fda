//! How few tokens a text can have, found out without tokenising it: what can never fit is refused before it costs
//! gigabytes, and of a long text of which the beginning is wanted no more is tokenised than that takes.
//!
//! A token stands for so many bytes at most. Some stand for no end of text: a run of unknown characters is one token,
//! white space beside an added token is part of it, bytes that a vocabulary cannot spell are left out, and a normaliser may
//! drop what it likes. Such bytes do not count; where that cannot be told byte by byte, tokens are taken to be very long,
//! and a mebibyte is for nothing.

use super::spelling::spelling;
use super::vocab::{Kind, Vocab};

/// How much longer than its spelling a token's text is taken to be where it can be of any length, and the text is longer
/// than [`FREE`].
const ANY_LENGTH: usize = 64;

/// Bytes of a text that cost little to tokenise: where tokens are of any length, so many count for nothing.
const FREE: usize = 1 << 20;

/// Tokens that are made beyond those that are wanted: what is cut off behind them must not change the last of these.
const MARGIN: usize = 1024;

/// What is known of a tokenizer's tokens.
#[derive(Debug)]
pub(super) struct Bound {
    /// Most bytes that a token stands for, of those that count.
    longest: usize,
    /// Which bytes count.
    counts: [bool; 256],
    /// Whether white space counts.
    spaces_count: bool,
    /// How many of those that count are left out.
    free: usize,
}

/// What a kind of tokenizer may do to a text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Losses {
    /// A text's bytes for each that is left of them; `None` if a text may shrink to anything.
    pub shrinks: Option<usize>,
    /// Whether white space may vanish.
    pub spaces: bool,
    /// Whether there are characters that no token spells, of which a run becomes one token, or nothing. Bytes that a
    /// byte-level vocabulary lacks are known without it.
    pub unknown: bool,
}

impl Losses {
    /// Every byte is in some token.
    pub const NONE: Self = Self { shrinks: Some(1), spaces: false, unknown: false };
}

impl Bound {
    pub fn new(vocab: &Vocab, losses: Losses) -> Self {
        let longest = vocab.iter().map(|(id, text, kind)| {
            let spelt = if vocab.is_sentence_piece() || kind != Kind::Normal { text.len() } else { 0 };
            spelt.max(vocab.bytes(id).len())
        });
        let longest = longest.max().unwrap_or(0).max(1);
        let mut counts = [true; 256];
        let mut any_length = losses.unknown || losses.shrinks.is_none();
        if !vocab.is_sentence_piece() {
            for byte in 0..=u8::MAX {
                counts[usize::from(byte)] = vocab.id(&spelling(&[byte])).is_some();
            }
            // What is left out after it was changed cannot be told from the bytes before.
            any_length |= losses.shrinks != Some(1) && counts.contains(&false);
        }
        let factor = losses.shrinks.unwrap_or(1) * if any_length { ANY_LENGTH } else { 1 };
        let counts = if any_length { [true; 256] } else { counts };
        Self {
            longest: longest.saturating_mul(factor),
            counts,
            spaces_count: !losses.spaces || any_length,
            free: if any_length { FREE } else { 0 },
        }
    }

    /// A text has at least so many tokens; one that is long and all but made of what no token spells may have fewer.
    pub fn least_tokens(&self, text: &str) -> usize {
        let counted = text.chars().map(|c| self.counted(c)).sum::<usize>();
        counted.saturating_sub(self.free).div_ceil(self.longest)
    }

    /// As much of a text as certainly has `tokens` tokens, and some more; the whole text if it has not so many.
    pub fn beginning<'t>(&self, text: &'t str, tokens: usize) -> &'t str {
        let wanted = tokens.saturating_add(MARGIN).saturating_mul(self.longest).saturating_add(self.free);
        if text.len() <= wanted {
            return text;
        }
        let mut counted = 0;
        for (at, c) in text.char_indices() {
            if counted >= wanted {
                return &text[..at];
            }
            counted += self.counted(c);
        }
        text
    }

    /// How many of a character's bytes count.
    fn counted(&self, c: char) -> usize {
        if !self.spaces_count && c.is_whitespace() {
            return 0;
        }
        let mut utf8 = [0; 4];
        c.encode_utf8(&mut utf8).bytes().filter(|&byte| self.counts[usize::from(byte)]).count()
    }
}
