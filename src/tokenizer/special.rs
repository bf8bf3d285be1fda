//! Finding whole tokens in raw text: special tokens in a prompt, user-defined pieces in a sentence.
//!
//! Knows nothing of how the text between them becomes tokens.

use std::collections::HashMap;

/// One stretch of a text: a token found in it, or the ordinary text between two of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// A token, spelt out in the text.
    Token(u32),
    /// Text without such a token; never empty.
    Text(&'t str),
}

/// A token's place in a text, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Occurrence {
    pub start: usize,
    pub len: usize,
    pub id: u32,
}

/// A set of token spellings, searched by first byte and length, so that its size hardly matters.
#[derive(Debug, Default)]
pub(super) struct TokenSet {
    ids: HashMap<Box<str>, u32>,
    /// Lengths in bytes, longest first, of the spellings that start with a byte.
    lengths: HashMap<u8, Vec<usize>>,
}

impl TokenSet {
    /// Collects spellings; empty ones are left out, since they would be found everywhere.
    pub fn new<'a>(tokens: impl IntoIterator<Item = (u32, &'a str)>) -> Self {
        let mut set = Self::default();
        for (id, text) in tokens {
            let Some(&first) = text.as_bytes().first() else { continue };
            set.ids.insert(text.into(), id);
            set.lengths.entry(first).or_default().push(text.len());
        }
        for lengths in set.lengths.values_mut() {
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
        }
        set
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens that start at byte `start` of `text`, longest first.
    pub fn at<'s>(&'s self, text: &'s str, start: usize) -> impl Iterator<Item = Occurrence> + 's {
        let lengths = text.as_bytes().get(start).and_then(|first| self.lengths.get(first));
        lengths.into_iter().flatten().filter_map(move |&len| {
            let id = *self.ids.get(text.get(start..start + len)?)?;
            Some(Occurrence { start, len, id })
        })
    }

    /// All occurrences in `text`, overlapping ones included, by start and then by length (longest first).
    pub fn occurrences<'s>(&'s self, text: &'s str) -> impl Iterator<Item = Occurrence> + 's {
        let starts = if self.is_empty() { 0..0 } else { 0..text.len() };
        starts.flat_map(move |start| self.at(text, start))
    }

    /// Cuts a text at its tokens. Longer tokens are found first, in the whole text, then shorter ones in what is left:
    /// llama.cpp's order. Tokens of one length: the lower id first, as if the vocabulary had been searched in order.
    ///
    /// * `counts`: whether an occurrence is taken for the token; else its text is ordinary
    pub fn split<'t>(&self, text: &'t str, counts: impl Fn(&Occurrence) -> bool) -> Vec<Part<'t>> {
        let mut found: Vec<Occurrence> = self.occurrences(text).filter(counts).collect();
        found.sort_by(|a, b| b.len.cmp(&a.len).then(a.id.cmp(&b.id)).then(a.start.cmp(&b.start)));
        let mut taken = vec![false; if found.is_empty() { 0 } else { text.len() }];
        // What was taken before is at least as long, so it cannot lie strictly inside: looking at both ends is enough.
        found.retain(|o| {
            let end = o.start + o.len;
            let free = !taken[o.start] && !taken[end - 1];
            if free {
                taken[o.start..end].fill(true);
            }
            free
        });
        found.sort_by_key(|o| o.start);

        let mut parts = Vec::with_capacity(2 * found.len() + 1);
        let mut done = 0;
        for o in found {
            if done < o.start {
                parts.push(Part::Text(&text[done..o.start]));
            }
            parts.push(Part::Token(o.id));
            done = o.start + o.len;
        }
        if done < text.len() {
            parts.push(Part::Text(&text[done..]));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> TokenSet {
        TokenSet::new([(0, "<s>"), (1, "<s><s>x"), (2, "s"), (3, ""), (4, "é"), (5, "ab"), (6, "bc")])
    }

    fn split<'t>(set: &TokenSet, text: &'t str) -> Vec<Part<'t>> {
        set.split(text, |_| true)
    }

    #[test]
    fn what_does_not_count_leaves_room_for_shorter_tokens() {
        let parts = set().split("<s><s>x<s>", |o| o.len > 1 && o.start != 0);
        assert_eq!(parts, [Part::Text("<s>"), Part::Token(0), Part::Text("x"), Part::Token(0)]);
    }

    #[test]
    fn text_without_tokens_is_one_part() {
        assert_eq!(split(&set(), "hello"), [Part::Text("hello")]);
        assert_eq!(split(&set(), ""), []);
        assert_eq!(split(&TokenSet::default(), "<s>"), [Part::Text("<s>")]);
    }

    #[test]
    fn longest_token_wins_anywhere_in_the_text() {
        let parts = split(&set(), "a<s><s><s>xé!");
        assert_eq!(parts, [Part::Text("a"), Part::Token(0), Part::Token(1), Part::Token(4), Part::Text("!")]);
    }

    #[test]
    fn tokens_of_one_length_go_by_id() {
        assert_eq!(split(&set(), "abc"), [Part::Token(5), Part::Text("c")]);
        assert_eq!(split(&set(), "bcab"), [Part::Token(6), Part::Token(5)]);
    }

    #[test]
    fn characters_are_never_cut() {
        let two = TokenSet::new([(0, "日本"), (1, "本")]);
        assert_eq!(split(&two, "x本日本語"), [Part::Text("x"), Part::Token(1), Part::Token(0), Part::Text("語")]);
    }

    #[test]
    fn parts_spell_the_text() {
        let set = set();
        let text = "<s>abc<s><s>xss é <s".repeat(20);
        let spelt: String = split(&set, &text)
            .into_iter()
            .map(|p| match p {
                Part::Text(t) => t,
                Part::Token(id) => set.ids.iter().find(|(_, i)| **i == id).map(|(t, _)| t.as_ref()).unwrap(),
            })
            .collect();
        assert_eq!(spelt, text);
    }
}
