//! The vocabulary: what every token id means, checked once when a model is loaded.
//!
//! Knows spellings, kinds and raw bytes; how text becomes ids is not its business.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::spelling::{SPACE, byte_value, spelt_bytes, with_spaces};
use crate::error::{Error, Result};

/// A tokenizer as a GGUF file stores it (`tokenizer.ggml.*`), unchecked. The file's reader fills it in.
///
/// Source: the GGUF specification, section "Tokenizer".
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// The file, for messages.
    pub path: PathBuf,
    /// `model`: `"gpt2"` (byte-level BPE) or `"llama"` (`SentencePiece` BPE).
    pub model: String,
    /// `pre`: name of the pre-tokenizer, for `"gpt2"` only.
    pub pre: Option<String>,
    /// `tokens`: the spelling of every id; empty for one that no text spells.
    pub tokens: Vec<String>,
    /// What tokens print whose spelling is not UTF-8; in `tokens` they are empty.
    pub raw_tokens: HashMap<u32, Vec<u8>>,
    /// `scores`: one per token, higher is merged earlier; empty if the file has none.
    pub scores: Vec<f32>,
    /// `token_type`: one per token (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte); empty if the
    /// file has none.
    pub token_types: Vec<i32>,
    /// `merges`: two pieces with a space between, most important first; for `"gpt2"` only.
    pub merges: Vec<String>,
    /// `bos_token_id`: begins a text.
    pub bos_id: Option<u32>,
    /// `eos_token_id`: ends a text.
    pub eos_id: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot_id: Option<u32>,
    /// `eom_token_id`, `fim_pad_token_id`, `fim_rep_token_id` and `fim_sep_token_id`, those that there are: end a text, too.
    pub other_end_ids: Vec<u32>,
    /// `unknown_token_id`: stands for what cannot be spelt.
    pub unk_id: Option<u32>,
    /// `add_bos_token`: whether a prompt begins with `bos_id`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`: whether a text ends with `eos_id`. Not applied: a prompt is there to be continued.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`: whether text begins with a space that is not in it; for `"llama"` only.
    pub add_space_prefix: Option<bool>,
    /// `padding_token_id`, `seperator_token_id` (the format spells it so), `cls_token_id` and `mask_token_id`, by what chat
    /// templates call them (`pad_token`): nothing else asks for them, so ids out of range are left out.
    pub other_ids: Vec<(&'static str, u32)>,
    /// `tokenizer.chat_template`: a Jinja template.
    pub chat_template: Option<String>,
    /// What the file's reader found wrong and went on without, for [`Tokenizer::notes`](super::Tokenizer::notes).
    pub notes: Vec<String>,
    /// `tokenizer.chat_template.NAME`: further templates, by name; `tool_use` is for conversations with tools.
    pub named_templates: Vec<(String, String)>,
}

impl GgufVocab {
    /// What chat templates call the special tokens, and their spellings.
    pub(super) fn named_tokens(&self, vocab: &Vocab) -> Vec<(String, String)> {
        let known = [("bos_token", self.bos_id), ("eos_token", self.eos_id), ("unk_token", self.unk_id)];
        let known = known.into_iter().filter_map(|(name, id)| Some((name, id?)));
        let named = known.chain(self.other_ids.iter().copied());
        named.filter_map(|(name, id)| Some((name.to_owned(), vocab.text(id)?.to_owned()))).collect()
    }
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// Stands for what cannot be spelt.
    Unknown,
    /// Marks structure (begin of text, end of turn); never part of a text.
    Control,
    /// Text that is always one token.
    UserDefined,
    Unused,
    /// One byte.
    Byte,
}

impl Kind {
    /// The GGUF number of a kind, which is `SentencePiece`'s.
    fn from_number(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether a token of this kind and spelling carries structure.
    fn is_marker(self, text: &str) -> bool {
        match self {
            Self::Control | Self::Unknown => true,
            Self::UserDefined => looks_like_marker(text),
            Self::Normal | Self::Unused | Self::Byte => false,
        }
    }
}

/// A vocabulary in the making: what every file format is brought to. Ids that no token has hold an empty, unused one.
#[derive(Debug, Default)]
pub(super) struct Draft {
    path: PathBuf,
    tokens: Vec<String>,
    kinds: Vec<Kind>,
    /// Whether spellings are `SentencePiece`'s (U+2581 for a space), and not byte-level ones.
    sentence_piece: bool,
    /// What tokens print that don't print their spelling.
    printed: HashMap<u32, String>,
    /// What tokens print that have no spelling.
    raw: HashMap<u32, Vec<u8>>,
}

impl Draft {
    /// Begins a vocabulary without tokens; `path` is for messages.
    pub fn new(path: &Path, sentence_piece: bool) -> Self {
        Self { path: path.to_owned(), sentence_piece, ..Self::default() }
    }

    /// Checks the lists of a GGUF vocabulary and takes its tokens (they are moved out of `gguf`).
    ///
    /// Without `token_type`, the ids for BOS, EOS, EOT and unknown name the special tokens, and `<0xNN>` is a byte.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the lists differ in length, an id is out of range, or a kind is not one.
    pub fn from_gguf(gguf: &mut GgufVocab) -> Result<Self> {
        let path = std::mem::take(&mut gguf.path);
        let tokens = std::mem::take(&mut gguf.tokens);
        let bad = |reason: String| Err(Error::bad_file(&path, reason));
        let len = tokens.len();
        if len == 0 {
            return bad("its vocabulary is empty".into());
        }
        for (name, got) in [("scores", gguf.scores.len()), ("token_type", gguf.token_types.len())] {
            if got != 0 && got != len {
                return bad(format!(
                    "`tokenizer.ggml.{name}` must have one entry per token: expected {len}, got {got}"
                ));
            }
        }
        for (name, id) in [("bos", gguf.bos_id), ("eos", gguf.eos_id), ("eot", gguf.eot_id), ("unknown", gguf.unk_id)] {
            if let Some(id) = id.filter(|&id| id as usize >= len) {
                return bad(format!("`tokenizer.ggml.{name}_token_id` is {id}, but there are only {len} tokens"));
            }
        }
        let sentence_piece = gguf.model == "llama";
        let kinds = if gguf.token_types.is_empty() {
            guess_kinds(gguf, &tokens, sentence_piece)
        } else {
            let mut kinds = Vec::with_capacity(len);
            for (id, &number) in gguf.token_types.iter().enumerate() {
                let Some(kind) = Kind::from_number(number) else {
                    return bad(format!("the type of token {id} is {number}, expected a number from 1 to 6"));
                };
                kinds.push(kind);
            }
            kinds
        };
        let raw = std::mem::take(&mut gguf.raw_tokens);
        Ok(Self { path, tokens, kinds, sentence_piece, printed: HashMap::new(), raw })
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Appends a token.
    pub fn push(&mut self, text: String, kind: Kind) {
        self.tokens.push(text);
        self.kinds.push(kind);
    }

    /// The spelling of an id; `None` behind the end and for an id that no token has.
    pub fn text(&self, id: u32) -> Option<&str> {
        let at = id as usize;
        let text = self.tokens.get(at)?;
        let vacant = text.is_empty() && self.kinds.get(at) == Some(&Kind::Unused);
        (!vacant).then_some(text)
    }

    /// The token of a spelling, found by looking at all of them.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.tokens.iter().position(|t| t == text).and_then(|id| u32::try_from(id).ok())
    }

    /// The tokens that have one of these spellings, found by looking at all of them once.
    pub fn find(&self, texts: &HashSet<&str>) -> Vec<(u32, String)> {
        let mut found: HashMap<&str, u32> = HashMap::new();
        for (id, text) in (0u32..).zip(&self.tokens).filter(|(_, text)| texts.contains(text.as_str())) {
            found.entry(text).or_insert(id);
        }
        found.into_iter().map(|(text, id)| (id, text.to_owned())).collect()
    }

    /// The kind of an id.
    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }

    /// All tokens, by id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &str)> {
        (0u32..).zip(&self.tokens).map(|(id, text)| (id, text.as_str()))
    }

    /// Changes the kind of an id, if there is one.
    pub fn set_kind(&mut self, id: u32, kind: Kind) {
        if let Some(slot) = self.kinds.get_mut(id as usize) {
            *slot = kind;
        }
    }

    /// Whether spellings are `SentencePiece`'s.
    pub fn is_sentence_piece(&self) -> bool {
        self.sentence_piece
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As [`Vocab::is_marker`].
    pub fn is_marker(&self, id: u32) -> bool {
        self.kind(id).zip(self.text(id)).is_some_and(|(kind, text)| kind.is_marker(text))
    }

    /// Says that a token prints something else than its spelling.
    pub fn prints(&mut self, id: u32, text: String) {
        self.printed.insert(id, text);
    }

    /// Says what an id stands for, whatever it did before; ids between the end and `id` stay vacant.
    ///
    /// # Errors
    /// [`Error::BadFile`] if `id` is so far behind the end that it cannot be meant.
    pub fn set(&mut self, id: u32, text: &str, kind: Kind) -> Result<()> {
        let (at, len) = (id as usize, self.len());
        if at > 2 * len + MAX_GAP || at >= MAX_IDS {
            let reason = format!("token `{text}` has the id {id}, far behind the {len} others");
            return Err(Error::bad_file(&self.path, reason));
        }
        if at >= len {
            self.tokens.resize(at + 1, String::new());
            self.kinds.resize(at + 1, Kind::Unused);
        }
        text.clone_into(&mut self.tokens[at]);
        self.kinds[at] = kind;
        Ok(())
    }
}

/// Ids that may be vacant in a row, beyond as many as there are tokens.
const MAX_GAP: usize = 1 << 16;
/// Ids in all; the largest known vocabularies have 900 thousand. A few tokens far behind each other must not reach further.
const MAX_IDS: usize = 1 << 21;

/// Spellings, kinds and bytes of all tokens.
#[derive(Debug)]
pub(super) struct Vocab {
    path: PathBuf,
    tokens: Vec<String>,
    kinds: Vec<Kind>,
    ids: HashMap<String, u32>,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where the bytes of a token end.
    ends: Vec<usize>,
    sentence_piece: bool,
}

impl Vocab {
    /// Takes the tokens of a draft.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it is empty, a spelling occurs twice, or a byte token is not one.
    pub fn new(draft: Draft) -> Result<Self> {
        let Draft { path, tokens, kinds, sentence_piece, printed, raw } = draft;
        let bad = |reason: String| Err(Error::bad_file(&path, reason));
        let len = tokens.len();
        if len == 0 {
            return bad("its vocabulary is empty".into());
        }
        if u32::try_from(len).is_err() {
            return bad(format!("its vocabulary has {len} tokens, more than ids can name"));
        }
        let mut ids = HashMap::with_capacity(len);
        for (id, text) in (0u32..).zip(&tokens) {
            // Vacant, or without a spelling: no text is found to be it.
            if text.is_empty() {
                continue;
            }
            match ids.entry(text.clone()) {
                Entry::Vacant(entry) => _ = entry.insert(id),
                Entry::Occupied(entry) => return bad(format!("tokens {} and {id} are both `{text}`", entry.get())),
            }
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(len));
        for ((id, text), kind) in (0u32..).zip(&tokens).zip(&kinds) {
            let text = printed.get(&id).unwrap_or(text);
            match (kind, byte_value(text)) {
                _ if text.is_empty() => match raw.get(&id) {
                    Some(raw) if sentence_piece => bytes.extend(with_spaces(raw)),
                    Some(raw) => bytes.extend(raw),
                    None => {}
                },
                (Kind::Byte, Some(byte)) => bytes.push(byte),
                (Kind::Byte, None) => return bad(format!("the byte token `{text}` is not of the form `<0x0A>`")),
                (Kind::Control | Kind::Unknown, _) => bytes.extend_from_slice(text.as_bytes()),
                _ if sentence_piece => bytes.extend_from_slice(text.replace(SPACE, " ").as_bytes()),
                (Kind::UserDefined, _) => bytes.extend_from_slice(text.as_bytes()),
                _ => bytes.extend(spelt_bytes(text)),
            }
            ends.push(bytes.len());
        }
        Ok(Self { path, tokens, kinds, ids, bytes, ends, sentence_piece })
    }

    /// Whether spellings are `SentencePiece`'s.
    pub fn is_sentence_piece(&self) -> bool {
        self.sentence_piece
    }

    /// The file the vocabulary is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// All tokens, by id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &str, Kind)> {
        (0u32..).zip(&self.tokens).zip(&self.kinds).map(|((id, text), &kind)| (id, text.as_str(), kind))
    }

    /// The vocabulary's spelling of a token.
    pub fn text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    /// The kind of a token.
    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }

    /// The token of a spelling.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// The raw bytes of a token; none for an id that does not exist.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |&end| end);
        self.ends.get(id).and_then(|&end| self.bytes.get(start..end)).unwrap_or_default()
    }

    /// Whether a token carries structure instead of text, so that a message must not be able to spell it: control and
    /// unknown tokens, and those user-defined ones that look like chat markers (`<|im_start|>`), as older conversions
    /// have them.
    pub fn is_marker(&self, id: u32) -> bool {
        self.kind(id).zip(self.text(id)).is_some_and(|(kind, text)| kind.is_marker(text))
    }
}

/// Kinds for a file that does not give them.
fn guess_kinds(gguf: &GgufVocab, tokens: &[String], sentence_piece: bool) -> Vec<Kind> {
    let byte = |text: &String| sentence_piece && byte_value(text).is_some();
    let mut kinds: Vec<_> = tokens.iter().map(|text| if byte(text) { Kind::Byte } else { Kind::Normal }).collect();
    let special = [
        (gguf.unk_id, Kind::Unknown),
        (gguf.bos_id, Kind::Control),
        (gguf.eos_id, Kind::Control),
        (gguf.eot_id, Kind::Control),
    ];
    for (id, kind) in special {
        if let Some(slot) = id.and_then(|id| kinds.get_mut(id as usize)) {
            *slot = kind;
        }
    }
    kinds
}

/// Whether a spelling is one that chat templates use for structure.
fn looks_like_marker(text: &str) -> bool {
    let framed = |open, close| text.starts_with(open) && text.ends_with(close);
    framed("<|", "|>") || framed("<\u{FF5C}", "\u{FF5C}>") || matches!(text, "<start_of_turn>" | "<end_of_turn>")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gguf(tokens: &[&str], types: &[i32]) -> GgufVocab {
        GgufVocab {
            path: "x.gguf".into(),
            model: "llama".into(),
            tokens: tokens.iter().map(ToString::to_string).collect(),
            token_types: types.to_vec(),
            ..GgufVocab::default()
        }
    }

    fn reason(mut gguf: GgufVocab) -> String {
        match Draft::from_gguf(&mut gguf).and_then(Vocab::new) {
            Err(Error::BadFile { path, reason, .. }) => {
                assert_eq!(path, Path::new("x.gguf"));
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bytes_are_what_a_token_prints() {
        let mut gguf = gguf(&["<unk>", "<s>", "<0x0A>", "\u{2581}the", "", "\u{2581}\u{2581}"], &[2, 3, 6, 1, 5, 4]);
        let vocab = Vocab::new(Draft::from_gguf(&mut gguf).unwrap()).unwrap();
        let bytes: Vec<&[u8]> = (0..7).map(|id| vocab.bytes(id)).collect();
        assert_eq!(bytes, [&b"<unk>"[..], b"<s>", b"\n", b" the", b"", b"  ", b""]);
        assert_eq!(vocab.bytes(u32::MAX), b"");
        assert_eq!((vocab.id("<s>"), vocab.id("s")), (Some(1), None));
    }

    #[test]
    fn bad_lists_are_refused_with_what_is_wrong() {
        assert_eq!(reason(gguf(&[], &[])), "its vocabulary is empty");
        assert!(reason(gguf(&["a", "b"], &[1])).contains("expected 2, got 1"));
        assert!(reason(gguf(&["a", "b", "a"], &[])).contains("tokens 0 and 2 are both `a`"));
        assert!(reason(gguf(&["a"], &[7])).contains("is 7"));
        assert!(reason(gguf(&["a"], &[6])).contains("byte token `a`"));
        assert!(reason(GgufVocab { bos_id: Some(1), ..gguf(&["a"], &[]) }).contains("bos_token_id` is 1"));
        assert!(reason(GgufVocab { scores: vec![0.0; 2], ..gguf(&["a"], &[]) }).contains("scores"));
    }

    /// Ids that double each time would soon take all memory.
    #[test]
    fn ids_far_behind_each_other_are_refused() {
        let mut draft = Draft::new(Path::new("x"), false);
        let mut id = 0;
        let error = loop {
            match draft.set(id, "a", Kind::Normal) {
                Ok(()) => id = 2 * id + 1000,
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("far behind") && draft.len() <= MAX_IDS, "{error}");
    }

    #[test]
    fn kinds_are_guessed_only_if_the_file_has_none() {
        let mut gguf = GgufVocab { bos_id: Some(0), unk_id: Some(1), ..gguf(&["<s>", "?", "<0x41>", "<0xag>"], &[]) };
        let vocab = Vocab::new(Draft::from_gguf(&mut gguf).unwrap()).unwrap();
        assert_eq!(vocab.kinds, [Kind::Control, Kind::Unknown, Kind::Byte, Kind::Normal]);
    }

    #[test]
    fn user_defined_chat_markers_count_as_structure() {
        let mut gguf = gguf(&["<|im_start|>", "<table>", "<end_of_turn>"], &[4, 4, 4]);
        let vocab = Vocab::new(Draft::from_gguf(&mut gguf).unwrap()).unwrap();
        assert_eq!([0, 1, 2, 3].map(|id| vocab.is_marker(id)), [true, false, true, false]);
    }
}
