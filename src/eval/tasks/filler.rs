//! Prose to hide facts in, cut at sentences to a number of tokens.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// A piece without an end is cut after so many words.
const MAX_WORDS: usize = 40;

/// A text's sentences, in order.
#[derive(Debug)]
pub(super) struct Filler {
    /// With their length in tokens, a space before them included.
    sentences: Vec<(String, usize)>,
}

impl Filler {
    /// # Errors
    /// [`Error::Input`] if the text has no word.
    pub(super) fn new(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        let mut sentences = Vec::new();
        for sentence in sentences_of(text, MAX_WORDS) {
            let tokens = tokenizer.encode_plain(&format!(" {sentence}"))?.len();
            sentences.push((sentence, tokens.max(1)));
        }
        if sentences.is_empty() {
            return Err(
                Error::input("the text to hide facts in is empty").with_hint("give a file with prose as --text")
            );
        }
        Ok(Self { sentences })
    }

    /// Whole sentences that follow one another, of `tokens` tokens at most; behind the last the text begins anew.
    ///
    /// * `start`: picks the first sentence
    pub(super) fn take(&self, start: usize, tokens: usize) -> Vec<&str> {
        let mut left = tokens;
        let sentences = self.sentences.iter().cycle().skip(start % self.sentences.len());
        let fitting = sentences.map_while(|(sentence, tokens)| {
            left = left.checked_sub(*tokens)?;
            Some(sentence.as_str())
        });
        fitting.collect()
    }
}

/// Cuts a text at the ends of its sentences. White space becomes single spaces; blank lines end sentences, too.
///
/// * `max_words`: after so many a piece without an end is cut
pub(in crate::eval) fn sentences_of(text: &str, max_words: usize) -> Vec<String> {
    let mut sentences = Vec::new();
    for paragraph in text.replace('\r', "").split("\n\n") {
        let mut words: Vec<&str> = Vec::new();
        for word in paragraph.split_whitespace() {
            words.push(word);
            let is_title = matches!(word, "Mr." | "Mrs." | "Dr." | "No." | "St.");
            let ends = word.trim_end_matches(['"', '\'', ')']).ends_with(['.', '!', '?']) && !is_title;
            if ends || words.len() == max_words {
                sentences.push(words.join(" "));
                words.clear();
            }
        }
        if !words.is_empty() {
            sentences.push(words.join(" "));
        }
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_they_do() {
        let text = "Chapter I\n\nMr. Fogg lived\nat No. 7.  \"He did?\"  He\r\n\r\n  did";
        assert_eq!(
            sentences_of(text, MAX_WORDS),
            ["Chapter I", "Mr. Fogg lived at No. 7.", "\"He did?\"", "He", "did"]
        );
        assert_eq!(sentences_of(&"word ".repeat(MAX_WORDS + 1), MAX_WORDS).len(), 2);
        assert!(sentences_of(" \n\n ", MAX_WORDS).is_empty());
    }

    #[test]
    fn no_more_is_taken_than_fits() {
        let sentences = [("a", 3), ("b", 4), ("c", 5)].map(|(text, tokens)| (text.to_owned(), tokens)).to_vec();
        let filler = Filler { sentences };
        assert_eq!(filler.take(0, 7), ["a", "b"]);
        assert_eq!(filler.take(5, 19), ["c", "a", "b", "c"]);
        assert!(filler.take(0, 2).is_empty());
    }
}
