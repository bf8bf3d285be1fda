//! Tokens that end a text, known by their spelling, and what a GGUF file says wrong about them.
//!
//! Files are converted in many ways, and many forget an end of turn, or give it the type of a word; then a model would
//! talk on after its answer. So well-known spellings count whatever the file says. Source: llama.cpp
//! (`src/llama-vocab.cpp`, end-of-generation tokens), its exceptions included.

use std::collections::BTreeSet;

use super::vocab::{Draft, Kind};

/// Spellings that end a text. `<|end_of_turn|>` is not llama.cpp's: `OpenChat`'s converted files lack an end of turn.
#[rustfmt::skip]
const ENDS: [&str; 23] = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\u{FF5C}end\u{2581}of\u{2581}sentence\u{FF5C}>", "[e~[", "<|end_of_turn|>",
];

/// Spellings of filling text in between, by role; of each role the first that there is counts. The last three roles
/// (padding, repository, file) end a text, too.
#[rustfmt::skip]
const FILLS: [&[&str]; 6] = [
    &["<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\u{FF5C}fim\u{2581}begin\u{FF5C}>", "<PRE>", "\u{2581}<PRE>",
      "<|code_prefix|>", "<|prefix|>"],
    &["<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\u{FF5C}fim\u{2581}hole\u{FF5C}>", "<SUF>", "\u{2581}<SUF>",
      "<|code_suffix|>", "<|suffix|>"],
    &["<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\u{FF5C}fim\u{2581}end\u{FF5C}>", "<MID>", "\u{2581}<MID>",
      "<|code_middle|>", "<|middle|>"],
    &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    &["<|file_sep|>"],
];

/// The first of [`FILLS`] whose tokens end a text.
const FIRST_FILL_THAT_ENDS: usize = 3;

/// Tokens of a vocabulary with well-known spellings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// Those that end a text, in llama.cpp's sense, without its exceptions.
    ends: Vec<(u32, &'static str)>,
    /// Those of filling that end nothing.
    fills: Vec<(u32, &'static str)>,
}

impl Known {
    /// Looks for the spellings.
    ///
    /// * `tokens`: ids and spellings of those that may count
    pub fn find<'a>(tokens: impl Iterator<Item = (u32, &'a str)>) -> Self {
        let mut known = Self::default();
        // Of each role: the place of the spelling in its list, the token and the spelling.
        let mut fills: [Option<(usize, u32, &'static str)>; FILLS.len()] = [None; FILLS.len()];
        for (id, text) in tokens.filter(|(_, text)| text.starts_with(['<', '[', '_', '\u{2581}'])) {
            if let Some(text) = ENDS.into_iter().find(|end| *end == text) {
                known.ends.push((id, text));
                continue;
            }
            for (spellings, found) in FILLS.iter().zip(&mut fills) {
                if let Some(place) = spellings.iter().position(|fill| *fill == text)
                    && found.is_none_or(|(before, ..)| place < before)
                {
                    *found = Some((place, id, spellings[place]));
                }
            }
        }
        for (role, (_, id, text)) in fills.into_iter().enumerate().filter_map(|(role, found)| Some((role, found?))) {
            let list = if role >= FIRST_FILL_THAT_ENDS { &mut known.ends } else { &mut known.fills };
            list.push((id, text));
        }
        known
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ends.iter().find(|(_, end)| *end == text).map(|(id, _)| *id)
    }

    /// An end that is none beside certain others: `<|end|>` where `<|return|>` or `<|flush|>` ends a text and
    /// `<|call|>` or `<|calls|>` is there (it ends one of several parts), `</s>` beside `<|tool_response>`.
    fn exceptions(&self) -> impl Iterator<Item = (u32, Kind)> {
        let calls = self.id("<|call|>").or(self.id("<|calls|>")).is_some();
        let parts = calls && self.id("<|return|>").or(self.id("<|flush|>")).is_some();
        let end = self.id("<|end|>").filter(|_| parts).map(|id| (id, Kind::UserDefined));
        let eos = self.id("</s>").filter(|_| self.id("<|tool_response>").is_some()).map(|id| (id, Kind::Normal));
        end.into_iter().chain(eos)
    }

    /// The tokens that end a text, ascending.
    ///
    /// * `named`: those that the files name as ends
    pub fn ends(&self, named: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut ends: BTreeSet<u32> = named.into_iter().chain(self.ends.iter().map(|(id, _)| *id)).collect();
        for (id, _) in self.exceptions() {
            ends.remove(&id);
        }
        ends.into_iter().collect()
    }

    /// Gives the tokens of a GGUF vocabulary the types that their spellings ask for, as llama.cpp does; what was changed,
    /// as a note.
    pub fn correct(&self, draft: &mut Draft) -> Option<String> {
        let mut changed = Vec::new();
        for &(id, text) in self.ends.iter().chain(&self.fills) {
            if draft.kind(id) != Some(Kind::Control) {
                draft.set_kind(id, Kind::Control);
                changed.push(format!("{id} `{text}`"));
            }
        }
        for (id, kind) in self.exceptions() {
            draft.set_kind(id, kind);
        }
        if changed.is_empty() {
            return None;
        }
        let tokens = if changed.len() == 1 { "token" } else { "tokens" };
        Some(format!(
            "`{}` types {tokens} {} as text; by the spelling this marks structure, so it is taken as control and not printed",
            draft.path().display(),
            changed.join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn draft(tokens: &[(&str, Kind)]) -> Draft {
        let mut draft = Draft::new(Path::new("x.gguf"), false);
        for (text, kind) in tokens {
            draft.push((*text).to_owned(), *kind);
        }
        draft
    }

    fn known(tokens: &[&str]) -> Known {
        Known::find((0..).zip(tokens.iter().copied()))
    }

    #[test]
    fn ends_are_known_by_their_spelling_and_by_what_the_file_names() {
        assert_eq!(known(&["a", "<|eom_id|>", "[EOT]", "<eos>"]).ends([0]), [0, 1, 2, 3]);
        // Of filling, the last three roles end a text, and of each the first spelling that there is.
        assert_eq!(
            known(&["[PAD]", "<|file_sep|>", "<|fim_pad|>", "<|fim_prefix|>", "<reponame>"]).ends([]),
            [1, 2, 4]
        );
    }

    #[test]
    fn some_ends_are_none_beside_others() {
        assert_eq!(known(&["<|end|>", "<|return|>"]).ends([]), [0, 1]);
        assert_eq!(known(&["<|end|>", "<|return|>", "<|call|>"]).ends([0]), [1, 2]);
        assert_eq!(known(&["<|end|>", "<|flush|>", "<|calls|>"]).ends([]), [1, 2]);
        assert_eq!(known(&["</s>", "<|tool_response>"]).ends([0]), [1]);
        let mut draft =
            draft(&[("<|end|>", Kind::Control), ("<|return|>", Kind::Control), ("<|call|>", Kind::Control)]);
        assert_eq!(known(&["<|end|>", "<|return|>", "<|call|>"]).correct(&mut draft), None);
        assert_eq!(draft.kind(0), Some(Kind::UserDefined));
    }

    #[test]
    fn types_that_contradict_the_spelling_are_corrected_and_told() {
        let tokens =
            [("a", Kind::Normal), ("<|im_end|>", Kind::UserDefined), ("<EOT>", Kind::Normal), ("</s>", Kind::Control)];
        let mut draft = draft(&tokens);
        let note = known(&tokens.map(|(text, _)| text)).correct(&mut draft).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|id| draft.kind(id).unwrap()),
            [Kind::Normal, Kind::Control, Kind::Control, Kind::Control]
        );
        assert!(note.contains("tokens 1 `<|im_end|>`, 2 `<EOT>`"), "{note}");
    }
}
