//! Cutting a prompt at the added tokens of a `tokenizer.json`, as Hugging Face's `tokenizers` does it: the leftmost token
//! first, the longest of those, with the white space beside it that it asks for.
//!
//! GGUF files have other rules (see `special.rs`), since llama.cpp has.

use std::collections::HashMap;
use std::sync::LazyLock;

use tokenizers::normalizer::Range;
use tokenizers::utils::SysRegex;
use tokenizers::{NormalizedString, Token};

use super::settings::Flags;
use super::special::{Occurrence, Part, TokenSet};

/// Tokens that are looked for in the text as it is.
#[derive(Debug, Default)]
pub(super) struct AddedTokens {
    set: TokenSet,
    flags: HashMap<u32, Flags>,
}

impl AddedTokens {
    pub fn new<'a>(tokens: impl IntoIterator<Item = (u32, &'a str, Flags)>) -> Self {
        let mut flags = HashMap::new();
        let set = TokenSet::new(tokens.into_iter().map(|(id, text, flag)| {
            if flag != Flags::default() {
                flags.insert(id, flag);
            }
            (id, text)
        }));
        Self { set, flags }
    }

    /// Whether white space beside a token may be part of it.
    pub fn take_spaces(&self) -> bool {
        self.flags.values().any(|flags| flags.lstrip || flags.rstrip)
    }

    /// Cuts a text at its tokens.
    ///
    /// * `counts`: whether an occurrence is taken for the token; else its text is ordinary
    pub fn split<'t>(&self, text: &'t str, counts: impl Fn(&Occurrence) -> bool) -> Vec<Part<'t>> {
        let part =
            |(id, start, end): (Option<u32>, usize, usize)| id.map_or(Part::Text(&text[start..end]), Part::Token);
        self.places(text, counts).into_iter().map(part).collect()
    }

    /// Cuts a normalised text at its tokens, which need no model any more.
    ///
    /// # Errors
    /// None in practice: places are those of whole characters.
    pub fn cut(&self, text: &NormalizedString) -> tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
        let part = |(id, start, end): (Option<u32>, usize, usize)| {
            let part = text.slice(Range::Normalized(start..end)).ok_or("a token begins within a character")?;
            Ok((part, id.map(|id| vec![Token::new(id, text.get()[start..end].to_owned(), (0, end - start))])))
        };
        self.places(text.get(), |_| true).into_iter().map(part).collect()
    }

    /// Tokens and what lies between them, each with its start and end in bytes; none is empty.
    ///
    /// * `counts`: whether an occurrence is taken for the token; else its text is ordinary
    fn places(&self, text: &str, counts: impl Fn(&Occurrence) -> bool) -> Vec<(Option<u32>, usize, usize)> {
        let mut places = Vec::new();
        let (mut done, mut searched) = (0, 0);
        if self.set.is_empty() {
            searched = text.len();
        }
        while searched < text.len() {
            let Some(found) = self.set.at(text, searched).find(&counts) else {
                searched += 1;
                continue;
            };
            let (mut start, mut end) = (found.start, found.start + found.len);
            searched = end;
            let flags = self.flags.get(&found.id).copied().unwrap_or_default();
            let inside = || is_word(text[..start].chars().next_back()) || is_word(text[end..].chars().next());
            if flags.single_word && inside() {
                continue;
            }
            if flags.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if flags.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                places.push((None, done, start));
            }
            places.push((Some(found.id), start, end));
            done = end;
            searched = searched.max(end);
        }
        if done < text.len() {
            places.push((None, done, text.len()));
        }
        places
    }
}

/// Whether a character is part of a word, as the crate's regex engine sees it (marks are).
fn is_word(c: Option<char>) -> bool {
    static WORD: LazyLock<Option<SysRegex>> = LazyLock::new(|| SysRegex::new(r"\w").ok());
    let (Some(c), Some(word)) = (c, &*WORD) else { return false };
    word.find_iter(c.encode_utf8(&mut [0; 4])).next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftmost_then_longest() {
        let plain = Flags::default();
        let added = AddedTokens::new([(0, "<a>", plain), (1, "<a><b>", plain), (2, "b><c>", plain)]);
        let all = |_: &Occurrence| true;
        assert_eq!(added.split("x<a><b><c>", all), [Part::Text("x"), Part::Token(1), Part::Text("<c>")]);
        assert_eq!(added.split("é<a>", all), [Part::Text("é"), Part::Token(0)]);
        assert_eq!(AddedTokens::default().split("é", all), [Part::Text("é")]);
        let short = |o: &Occurrence| o.len == 3;
        assert_eq!(added.split("<a><b>x", short), [Part::Token(0), Part::Text("<b>x")], "a shorter one that counts");
        assert_eq!(added.split("<a><a>", |o| o.start > 0), [Part::Text("<a>"), Part::Token(0)]);
    }

    #[test]
    fn flags_take_white_space_and_leave_words() {
        let flags = |lstrip, rstrip, single_word| Flags { lstrip, rstrip, single_word };
        let added = AddedTokens::new([
            (0, "<l>", flags(true, false, false)),
            (1, "<r>", flags(false, true, false)),
            (2, "w", flags(false, false, true)),
        ]);
        assert_eq!(added.split("a \n<l> b", |_| true), [Part::Text("a"), Part::Token(0), Part::Text(" b")]);
        assert_eq!(added.split("a <r> \u{3000}b", |_| true), [Part::Text("a "), Part::Token(1), Part::Text("b")]);
        assert_eq!(added.split("<r> <l> ", |_| true), [Part::Token(1), Part::Token(0), Part::Text(" ")]);
        assert_eq!(
            added.split("w aw _w w!", |_| true),
            [Part::Token(2), Part::Text(" aw _w "), Part::Token(2), Part::Text("!")]
        );
    }
}
