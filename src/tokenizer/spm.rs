//! `SentencePiece`'s BPE: the pieces with the best scores are merged first, the leftmost of equals. Also tiktoken's, whose
//! pieces have ranks instead, lower ones first.
//!
//! Same ids as `SentencePiece` for models with the identity normaliser (that of `LLaMA` 1 and 2), in O(n log n). Only
//! encoding: a piece's bytes are the vocabulary's business. Control tokens never come out of here; the caller finds
//! them in the text first. Source: Kudo and Richardson 2018, arXiv 1808.06226, and the sentencepiece library.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::bound::Losses;
use super::special::TokenSet;
use super::spelling::SPACE;
use super::vocab::{Kind, Vocab};
use crate::error::{Error, Result};

/// End of the linked list of symbols.
const NONE: usize = usize::MAX;

/// A `SentencePiece` model, ready to encode.
#[derive(Debug)]
pub(super) struct SentencePiece {
    pieces: HashMap<Box<str>, Piece>,
    /// Pieces that are cut out of the text before anything is merged.
    user_defined: TokenSet,
    /// Length of the longest piece in bytes.
    longest: usize,
    fallback: Fallback,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    id: u32,
    score: f32,
    /// May be an intermediate result of merging, and is split again if it is the last one.
    unused: bool,
}

/// What a character becomes that no piece holds.
#[derive(Debug)]
enum Fallback {
    /// One token per byte of the character.
    Bytes(Box<[u32; 256]>),
    /// One token per run of such characters.
    Unknown(u32),
}

/// A piece in the making: `len` bytes from `start`, in a doubly linked list. Merged-away symbols have `len` 0.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
    /// A user-defined piece: never merged.
    frozen: bool,
}

/// Two neighbours that would make a piece of `len` bytes.
#[derive(Debug)]
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left)).then(self.len.cmp(&other.len))
    }
}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}

impl SentencePiece {
    /// Takes the pieces of a vocabulary; `scores` holds one number per token (higher is merged earlier), `unk_id` the
    /// token for what no piece holds, used only by models without byte tokens.
    ///
    /// # Errors
    /// [`Error::BadFile`] if there are no scores, one is not a number, or a character could be left without a token.
    pub fn new(vocab: &Vocab, scores: &[f32], unk_id: Option<u32>) -> Result<Self> {
        if scores.is_empty() {
            return Err(Error::bad_file(vocab.path(), "its `llama` tokenizer has no scores"));
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(Error::bad_file(vocab.path(), format!("the score of token {id} is not a number")));
        }
        let mut pieces = HashMap::new();
        let mut user_defined = Vec::new();
        let mut bytes: [Option<u32>; 256] = [None; 256];
        for ((id, text, kind), &score) in vocab.iter().zip(scores) {
            match kind {
                _ if text.is_empty() => continue,
                Kind::Control | Kind::Unknown => continue,
                Kind::Byte => {
                    if let [byte] = *vocab.bytes(id) {
                        bytes[usize::from(byte)].get_or_insert(id);
                    }
                    continue;
                }
                // Found in the text by the caller, where it may be.
                Kind::UserDefined if vocab.is_marker(id) => continue,
                Kind::UserDefined => user_defined.push((id, escape(text))),
                Kind::Normal | Kind::Unused => {}
            }
            // Adding 0.0 turns -0.0 into 0.0, so that `total_cmp` calls them equal.
            let piece = Piece { id, score: score + 0.0, unused: kind == Kind::Unused };
            pieces.insert(escape(text).into_boxed_str(), piece);
        }
        let fallback = if bytes.iter().all(Option::is_some) {
            Fallback::Bytes(Box::new(bytes.map(Option::unwrap_or_default)))
        } else if let Some(missing) =
            bytes.iter().position(Option::is_none).filter(|_| bytes.iter().any(Option::is_some))
        {
            return Err(Error::bad_file(
                vocab.path(),
                format!("its tokenizer has no token for the byte 0x{missing:02X}"),
            ));
        } else if let Some(id) = unk_id {
            Fallback::Unknown(id)
        } else {
            return Err(Error::bad_file(vocab.path(), "its tokenizer has neither byte tokens nor an unknown token"));
        };
        Ok(Self {
            longest: pieces.keys().map(|p| p.len()).max().unwrap_or(0),
            user_defined: TokenSet::new(user_defined.iter().map(|(id, text)| (*id, text.as_str()))),
            pieces,
            fallback,
        })
    }

    /// Takes the ordinary tokens of a byte-level vocabulary that has a token for every byte; the lower id is merged first.
    pub fn by_rank(vocab: &Vocab) -> Self {
        let normal = vocab.iter().filter(|(.., kind)| *kind == Kind::Normal);
        #[expect(clippy::cast_precision_loss, reason = "ranks are below 2^24")]
        let piece = |id: u32| Piece { id, score: -(id as f32), unused: false };
        let pieces: HashMap<Box<str>, Piece> = normal.map(|(id, text, _)| (text.into(), piece(id))).collect();
        Self {
            longest: pieces.keys().map(|p| p.len()).max().unwrap_or(0),
            user_defined: TokenSet::default(),
            pieces,
            // Never needed, since every byte has a token.
            fallback: Fallback::Unknown(0),
        }
    }

    /// What may become of a text's bytes.
    pub fn losses(&self) -> Losses {
        Losses { unknown: matches!(self.fallback, Fallback::Unknown(_)), ..Losses::NONE }
    }

    /// The token that a text is as a whole.
    pub fn whole(&self, text: &str) -> Option<u32> {
        self.pieces.get(text).map(|piece| piece.id)
    }

    /// Appends the ids of `text` to `ids`; `prefix` puts a space before it. Empty text has no ids.
    pub fn encode(&self, text: &str, prefix: bool, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let escaped = escape(text);
        let text = if prefix { [SPACE, &escaped].concat() } else { escaped };
        let mut symbols = self.symbols(&text);
        let split = self.merge(&text, &mut symbols);

        let mut after_unknown = false;
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let mut todo = vec![&text[symbol.start..symbol.start + symbol.len]];
            while let Some(piece) = todo.pop() {
                match (self.pieces.get(piece), split.get(piece)) {
                    (Some(Piece { unused: true, .. }), Some(&at)) => {
                        let (left, right) = piece.split_at(at);
                        todo.extend([right, left]);
                    }
                    (Some(found), _) => {
                        ids.push(found.id);
                        after_unknown = false;
                    }
                    (None, _) => match &self.fallback {
                        Fallback::Bytes(of) => ids.extend(piece.bytes().map(|b| of[usize::from(b)])),
                        Fallback::Unknown(id) => {
                            if !after_unknown {
                                ids.push(*id);
                            }
                            after_unknown = true;
                        }
                    },
                }
            }
        }
    }

    /// Cuts the text into user-defined pieces and characters.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(c) = text[start..].chars().next() {
            let piece = self.user_defined.at(text, start).next();
            let len = piece.map_or(c.len_utf8(), |o| o.len);
            let prev = symbols.len().checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { start, len, prev, next: symbols.len() + 1, frozen: piece.is_some() });
            start += len;
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        symbols
    }

    /// Merges neighbours until no two of them make a piece. Returns where the unused pieces on the way were joined.
    fn merge<'t>(&self, text: &'t str, symbols: &mut [Symbol]) -> HashMap<&'t str, usize> {
        let mut heap = BinaryHeap::new();
        let mut split = HashMap::new();
        let mut consider = |symbols: &[Symbol], left: usize, right: usize, heap: &mut BinaryHeap<Candidate>| {
            let (Some(a), Some(b)) = (symbols.get(left), symbols.get(right)) else { return };
            let len = a.len + b.len;
            if a.frozen || b.frozen || len > self.longest {
                return;
            }
            let joined = &text[a.start..a.start + len];
            if let Some(piece) = self.pieces.get(joined) {
                if piece.unused {
                    split.insert(joined, a.len);
                }
                heap.push(Candidate { score: piece.score, left, right, len });
            }
        };
        for right in 1..symbols.len() {
            consider(symbols, right - 1, right, &mut heap);
        }
        while let Some(best) = heap.pop() {
            let (left, right) = (symbols[best.left], symbols[best.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != best.len {
                continue; // one of the two has been merged with another since
            }
            symbols[best.left].len = best.len;
            symbols[best.left].next = right.next;
            symbols[best.right].len = 0;
            if let Some(next) = symbols.get_mut(right.next) {
                next.prev = best.left;
            }
            consider(symbols, left.prev, best.left, &mut heap);
            consider(symbols, best.left, right.next, &mut heap);
        }
        split
    }
}

/// Writes spaces the way pieces spell them.
fn escape(text: &str) -> String {
    text.replace(' ', SPACE)
}

#[cfg(test)]
mod tests {
    use super::super::vocab::{Draft, GgufVocab};
    use super::*;

    /// Pieces with their scores and kinds; `bytes` adds the 256 byte tokens behind them.
    fn model(pieces: &[(&str, f32, i32)], bytes: bool) -> SentencePiece {
        let mut gguf = GgufVocab { model: "llama".into(), unk_id: Some(0), ..GgufVocab::default() };
        let mut pieces: Vec<_> = pieces.iter().map(|&(t, s, k)| (t.to_owned(), s, k)).collect();
        if bytes {
            pieces.extend((0..256).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
        }
        for (text, score, kind) in pieces {
            gguf.tokens.push(text);
            gguf.scores.push(score);
            gguf.token_types.push(kind);
        }
        let scores = gguf.scores.clone();
        let draft = Draft::from_gguf(&mut gguf).unwrap();
        SentencePiece::new(&Vocab::new(draft).unwrap(), &scores, Some(0)).unwrap()
    }

    fn ids(model: &SentencePiece, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        model.encode(text, false, &mut ids);
        ids
    }

    const UNK: (&str, f32, i32) = ("<unk>", 0.0, 2);

    #[test]
    fn best_score_first_and_leftmost_of_equals() {
        let model = model(&[UNK, ("a", -9.0, 1), ("b", -9.0, 1), ("aa", -2.0, 1), ("ab", -1.0, 1)], false);
        assert_eq!(ids(&model, "aab"), [1, 4], "the better pair is further right");
        assert_eq!(ids(&model, "aaa"), [3, 1], "equal pairs go from the left");
        assert!(ids(&model, "").is_empty());
    }

    #[test]
    fn unknown_characters_become_bytes_or_one_unknown_token() {
        let pieces = [UNK, ("a", -1.0, 1)];
        assert_eq!(ids(&model(&pieces, false), "é!a?"), [0, 1, 0]);
        assert_eq!(ids(&model(&pieces, true), "éa"), [2 + 0xC3, 2 + 0xA9, 1]);
    }

    #[test]
    fn user_defined_pieces_are_never_merged() {
        let model =
            model(&[UNK, ("a", -1.0, 1), ("xy", 0.0, 4), ("xyz", 0.0, 4), ("axy", 0.0, 1), ("  ", 0.0, 4)], true);
        assert_eq!(ids(&model, "axya"), [1, 2, 1]);
        assert_eq!(ids(&model, "xyz"), [3], "the longest is taken");
        assert_eq!(ids(&model, "a  a"), [1, 5, 1], "spaces are escaped in pieces, too");
    }

    #[test]
    fn unused_pieces_are_split_where_they_were_joined() {
        let model =
            model(&[UNK, ("a", -9.0, 1), ("b", -9.0, 1), ("c", -9.0, 1), ("ab", -1.0, 5), ("abc", -2.0, 1)], false);
        assert_eq!(ids(&model, "ab"), [1, 2]);
        assert_eq!(ids(&model, "abc"), [5], "they still lead to longer pieces");
    }

    #[test]
    fn control_tokens_are_not_spelt_by_text() {
        let model = model(&[UNK, ("<", -1.0, 1), ("s", -1.0, 1), ("<s", -1.0, 3), ("\u{2581}", -1.0, 1)], true);
        assert_eq!(ids(&model, "<s"), [1, 2]);
        let mut prefixed = Vec::new();
        model.encode("s", true, &mut prefixed);
        assert_eq!(prefixed, [4, 2]);
    }
}
