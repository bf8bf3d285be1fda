//! Tokens back to text, one at a time and never half a character.
//!
//! A character may be spread over several tokens; its bytes wait here until it is complete. Also what
//! [`Tokenizer::decode`] is made of, so that streamed and whole text are always the same.

use super::Tokenizer;
use super::vocab::Kind;

/// Turns token ids into text as they are generated. Made by [`Tokenizer::stream`].
#[derive(Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    skip_special: bool,
    /// Whether the next token is the first of a text, so that its leading space is not part of the text.
    strip_space: bool,
}

impl<'t> StreamDecoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special: bool, begins_text: bool) -> Self {
        Self { tokenizer, pending: Vec::new(), skip_special, strip_space: begins_text && tokenizer.strips_space }
    }

    /// Takes the next token and returns the characters that it completes, often none. Bytes that can't be part of a
    /// character become U+FFFD. Special tokens print nothing, and neither do ids that don't exist.
    pub fn push(&mut self, id: u32) -> String {
        let kind = self.tokenizer.vocab.kind(id);
        let special = matches!(kind, Some(Kind::Control | Kind::Unknown) | None);
        if special && self.skip_special {
            return String::new();
        }
        let mut bytes = self.tokenizer.id_bytes(id);
        if !bytes.is_empty() && std::mem::take(&mut self.strip_space) && !special && kind != Some(Kind::Byte) {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// Ends the text: what is left of an incomplete character becomes U+FFFD.
    #[must_use]
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    /// Takes everything from the pending bytes but the start of a character at their end.
    fn take_complete(&mut self) -> String {
        let mut text = String::with_capacity(self.pending.len());
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let bad = chunk.invalid();
            done += chunk.valid().len() + bad.len();
            let may_go_on = std::str::from_utf8(bad).is_err_and(|error| error.error_len().is_none());
            if may_go_on && done == self.pending.len() {
                done -= bad.len();
            } else if !bad.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..done);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::GgufVocab;
    use super::*;

    fn tokenizer() -> Tokenizer {
        let mut gguf = GgufVocab { model: "llama".into(), ..GgufVocab::default() };
        let pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("\u{2581}a", 1)].map(|(t, k)| (t.to_owned(), k));
        for (text, kind) in pieces.into_iter().chain((0..256).map(|b| (format!("<0x{b:02X}>"), 6))) {
            gguf.tokens.push(text);
            gguf.token_types.push(kind);
            gguf.scores.push(0.0);
        }
        Tokenizer::from_gguf(gguf).unwrap()
    }

    /// The ids of bytes in the vocabulary above.
    fn bytes(bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&b| 4 + u32::from(b)).collect()
    }

    #[test]
    fn characters_come_out_whole() {
        let tokenizer = tokenizer();
        let mut stream = tokenizer.stream(false);
        let pushed: Vec<_> = bytes("é🙂!".as_bytes()).into_iter().map(|id| stream.push(id)).collect();
        assert_eq!(pushed, ["", "é", "", "", "", "🙂", "!"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn wrong_bytes_are_replaced_at_once_and_unfinished_ones_at_the_end() {
        let tokenizer = tokenizer();
        let mut stream = tokenizer.stream(false);
        let pushed: String =
            bytes(&[0xFF, b'a', 0xE2, b'b', 0xE2, 0x96]).into_iter().map(|id| stream.push(id)).collect();
        assert_eq!(pushed, "\u{FFFD}a\u{FFFD}b");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn only_the_beginning_of_a_text_loses_its_space() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.decode(&[1, 3, 3, 2, 3], true), "a a a");
        assert_eq!(tokenizer.decode(&[1, 3], false), "<s> a");
        assert_eq!(tokenizer.stream(true).push(3), "a");
        assert_eq!(tokenizer.stream(false).push(3), " a");
    }

    #[test]
    fn special_and_unknown_ids_print_nothing() {
        let tokenizer = tokenizer();
        let mut stream = tokenizer.stream(true);
        assert_eq!([0, 1, 2, 260, u32::MAX].map(|id| stream.push(id)), ["", "", "", "", ""]);
        assert_eq!(stream.push(3), "a", "nothing was printed yet");
    }
}
