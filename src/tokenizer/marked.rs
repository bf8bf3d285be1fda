//! A rendered prompt, and which of its characters are the template's own: only those may spell special tokens.
//!
//! One thing is let through: templates that write `<|` and `|>` around a role build their markers of it.

use std::ops::Range;

use super::special::TokenSet;
use crate::jinja::{Origin, Rendered};

/// A text in which the input's characters are marked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Marked {
    text: String,
    /// Where the input's characters are: byte ranges in order, with the template's text between any two.
    inputs: Vec<Range<usize>>,
    /// Who speaks in the conversation.
    roles: Vec<String>,
}

impl Marked {
    /// * `roles`: who speaks in the conversation
    pub fn new(rendered: &Rendered, roles: Vec<String>) -> Self {
        let mut marked = Self { roles, ..Self::default() };
        for (text, origin) in rendered.pieces() {
            marked.push(text, origin == Origin::Input);
        }
        marked
    }

    fn push(&mut self, text: &str, is_input: bool) {
        let start = self.text.len();
        self.text.push_str(text);
        if !is_input || text.is_empty() {
            return;
        }
        match self.inputs.last_mut() {
            Some(last) if last.end == start => last.end = self.text.len(),
            _ => self.inputs.push(start..self.text.len()),
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn into_text(self) -> String {
        self.text
    }

    /// Whether a range may be a special token: all of it is the template's, or all but a role in its middle.
    pub fn may_be_token(&self, range: &Range<usize>) -> bool {
        let inputs = self.inputs[self.first_after(range.start)..].iter();
        inputs.take_while(|input| input.start < range.end).all(|input| {
            let is_inside = range.start < input.start && input.end < range.end;
            is_inside && self.roles.iter().any(|role| *role == self.text[input.clone()])
        })
    }

    /// Whether all of a range is the input's.
    pub fn is_input(&self, range: &Range<usize>) -> bool {
        range.is_empty()
            || (self.inputs[self.first_after(range.start)..].first())
                .is_some_and(|input| input.start <= range.start && range.end <= input.end)
    }

    /// The first of the input's ranges that ends behind `at`.
    fn first_after(&self, at: usize) -> usize {
        self.inputs.partition_point(|input| input.end <= at)
    }

    /// Whether both begin with the same `len` bytes, in which the same spellings may be special tokens.
    ///
    /// * `markers`: the special tokens
    pub fn same_start(&self, other: &Self, len: usize, markers: &TokenSet) -> bool {
        let (Some(mine), Some(others)) = (self.text.get(..len), other.text.get(..len)) else { return false };
        let ranges = || markers.occurrences(mine).map(|o| o.start..o.start + o.len);
        mine == others && ranges().all(|range| self.may_be_token(&range) == other.may_be_token(&range))
    }

    /// A part of it; of a range that is not there, nothing.
    pub fn cut(&self, range: Range<usize>) -> Self {
        let text = self.text.get(range.clone()).unwrap_or_default().to_owned();
        let inputs = self.inputs[self.first_after(range.start)..].iter();
        let inputs = inputs
            .map(|input| input.start.max(range.start)..input.end.min(range.end))
            .take_while(|input| !input.is_empty())
            .map(|input| input.start - range.start..input.end - range.start)
            .collect();
        Self { text, inputs, roles: self.roles.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(parts: &[(&str, bool)]) -> Marked {
        let mut marked = Marked::default();
        for (text, is_input) in parts {
            marked.push(text, *is_input);
        }
        marked
    }

    #[test]
    fn every_byte_has_its_origin_whole_and_cut() {
        let parts = [("ab", false), ("é", true), ("", false), ("x", true), ("cd", false), ("y", true), ("", true)];
        let whole = marked(&parts);
        assert_eq!((whole.text(), &whole.inputs), ("abéxcdy", &vec![2..5, 7..8]));
        let is_input = [false, false, true, true, true, false, false, true];
        for from in 0..is_input.len() {
            for to in from + 1..=is_input.len() {
                let of = &is_input[from..to];
                assert_eq!(whole.may_be_token(&(from..to)), of.iter().all(|input| !input), "{from}..{to}");
                assert_eq!(whole.is_input(&(from..to)), of.iter().all(|input| *input), "{from}..{to}");
                if whole.text.get(from..to).is_some() {
                    let part = whole.cut(from..to);
                    let origins: Vec<bool> = (0..to - from).map(|at| part.is_input(&(at..at + 1))).collect();
                    assert_eq!(origins, of, "{from}..{to}");
                }
            }
        }
        assert!(whole.is_input(&(0..0)));
        let markers = TokenSet::new([(0, "éx"), (1, "b")]);
        assert!(whole.same_start(&marked(&[("ab", false), ("éxQ", true)]), 5, &markers));
        assert!(
            whole.same_start(&marked(&[("a", true), ("b", false), ("éx", true)]), 5, &markers),
            "no marker's origin"
        );
        assert!(!whole.same_start(&marked(&[("abéx", false)]), 5, &markers), "a marker of another origin");
        assert!(!whole.same_start(&marked(&[("ab", false)]), 5, &markers));
        assert_eq!(whole.cut(8..8), Marked::default());
    }

    #[test]
    fn a_token_may_hold_a_role_whole_and_inside() {
        let marked = |parts| Marked { roles: vec!["user".to_owned()], ..marked(parts) };
        let built = marked(&[("<|", false), ("user", true), ("|>", false)]);
        assert!(built.may_be_token(&(0..8)));
        assert!(!built.may_be_token(&(2..8)) && !built.may_be_token(&(0..6)) && !built.may_be_token(&(0..5)));
        assert!(!marked(&[("<|", false), ("users", true), ("|>", false)]).may_be_token(&(0..9)), "another text");
        assert!(!marked(&[("<|", false), ("user|", true), (">", false)]).may_be_token(&(0..8)), "more than a role");
        assert!(!marked(&[("<|us", false), ("er", true), ("|>", false)]).may_be_token(&(0..8)), "less than a role");
    }
}
