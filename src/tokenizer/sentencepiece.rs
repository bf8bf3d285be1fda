//! `SentencePiece` model files (`tokenizer.model` of `LLaMA` 1 and 2), read into what a GGUF file would hold.
//!
//! Only the file's format: a protobuf message, of which the few fields that matter are read. Encoding is another file's
//! business (`spm.rs`). Source: `sentencepiece_model.proto` of the sentencepiece library (message `ModelProto`) and the
//! protobuf encoding guide.

use std::path::Path;

use super::vocab::GgufVocab;
use crate::error::{Error, Result};
use crate::side_files::read_bounded;

/// Fields of `ModelProto`.
const PIECES: u64 = 1;
const TRAINER_SPEC: u64 = 2;
const NORMALIZER_SPEC: u64 = 3;

/// Most bytes of a piece; real ones have a few dozen. Longer ones would make merging slow.
const MAX_PIECE_BYTES: usize = 4096;

/// Most pieces; the largest known vocabularies have 900 thousand.
const MAX_PIECES: usize = 1 << 20;

/// Reads a `SentencePiece` model file, as GGUF converters store it: pieces, scores, types, BOS, EOS and unknown by
/// their spelling, and whether text begins with a space.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::BadFile`] if it is not a `SentencePiece` model;
/// [`Error::Unsupported`] for anything but BPE with the identity normaliser.
#[doc(hidden)]
pub fn read_sentencepiece(path: &Path) -> Result<GgufVocab> {
    parse(&read_bounded(path)?, path)
}

/// Reads the bytes of a model file; `path` is for messages.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<GgufVocab> {
    let bad = |reason: String| Error::bad_file(path, format!("{reason}, so it is not a SentencePiece model"));
    let mut vocab = GgufVocab { path: path.to_owned(), model: "llama".into(), ..GgufVocab::default() };
    let mut trainer = Trainer::default();
    let mut normalizer = Normalizer::default();
    for field in Fields::new(bytes) {
        match field.map_err(bad)? {
            (PIECES, Value::Bytes(piece)) => {
                let id = vocab.tokens.len();
                if id == MAX_PIECES {
                    return Err(bad(format!("it holds more than {MAX_PIECES} pieces")));
                }
                let piece = Piece::parse(piece).map_err(|reason| bad(format!("piece {id}: {reason}")))?;
                vocab.tokens.push(piece.text);
                vocab.scores.push(piece.score);
                vocab.token_types.push(piece.kind);
            }
            (TRAINER_SPEC, Value::Bytes(spec)) => trainer.read(spec).map_err(bad)?,
            (NORMALIZER_SPEC, Value::Bytes(spec)) => normalizer.read(spec).map_err(bad)?,
            _ => {}
        }
    }
    if vocab.tokens.is_empty() {
        return Err(bad("it holds no pieces".into()));
    }
    let refuse = |what: String| Err(Error::unsupported(format!("{what} of `{}`", path.display())));
    match trainer.model_type {
        2 => {}
        1 => return refuse("the unigram SentencePiece model".into()),
        3 => return refuse("the word SentencePiece model".into()),
        4 => return refuse("the character SentencePiece model".into()),
        other => return refuse(format!("the SentencePiece model type {other}")),
    }
    if !normalizer.is_identity {
        return refuse(format!("the SentencePiece normaliser `{}`", normalizer.name));
    }
    for (wanted, what) in [
        (!normalizer.remove_extra_whitespaces, "SentencePiece's `remove_extra_whitespaces`"),
        (normalizer.escape_whitespaces, "SentencePiece without `escape_whitespaces`"),
        (!trainer.space_as_suffix, "SentencePiece's `treat_whitespace_as_suffix`"),
    ] {
        if !wanted {
            return refuse(what.into());
        }
    }
    let id_of = |text: &str| vocab.tokens.iter().position(|t| t == text).and_then(|id| u32::try_from(id).ok());
    (vocab.bos_id, vocab.eos_id) = (id_of(&trainer.bos), id_of(&trainer.eos));
    let unknown = vocab.token_types.iter().position(|&kind| kind == 2).and_then(|id| u32::try_from(id).ok());
    vocab.unk_id = unknown.or_else(|| id_of(&trainer.unk));
    vocab.add_space_prefix = Some(normalizer.add_dummy_prefix);
    Ok(vocab)
}

/// Message `SentencePiece`.
struct Piece {
    text: String,
    score: f32,
    kind: i32,
}

impl Piece {
    fn parse(message: &[u8]) -> Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: 1 };
        for field in Fields::new(message) {
            match field? {
                (1, Value::Bytes(text)) if text.len() > MAX_PIECE_BYTES => {
                    return Err(format!("it has {} bytes, expected at most {MAX_PIECE_BYTES}", text.len()));
                }
                (1, Value::Bytes(text)) => piece.text = utf8(text)?,
                (2, Value::Four(score)) => piece.score = f32::from_le_bytes(score),
                (3, Value::Number(kind)) => {
                    piece.kind = i32::try_from(kind).map_err(|_| format!("its type is {kind}"))?;
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// Message `TrainerSpec`, with the defaults of its definition.
struct Trainer {
    model_type: u64,
    space_as_suffix: bool,
    unk: String,
    bos: String,
    eos: String,
}

impl Default for Trainer {
    fn default() -> Self {
        Self { model_type: 1, space_as_suffix: false, unk: "<unk>".into(), bos: "<s>".into(), eos: "</s>".into() }
    }
}

impl Trainer {
    fn read(&mut self, message: &[u8]) -> Result<(), String> {
        for field in Fields::new(message) {
            match field? {
                (3, Value::Number(kind)) => self.model_type = kind,
                (24, Value::Number(flag)) => self.space_as_suffix = flag != 0,
                (45, Value::Bytes(text)) => self.unk = utf8(text)?,
                (46, Value::Bytes(text)) => self.bos = utf8(text)?,
                (47, Value::Bytes(text)) => self.eos = utf8(text)?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Message `NormalizerSpec`, with the defaults of its definition.
#[expect(clippy::struct_excessive_bools, reason = "the message's flags")]
struct Normalizer {
    name: String,
    /// Whether there is no table of replacements.
    is_identity: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Normalizer {
    fn default() -> Self {
        Self {
            name: String::new(),
            is_identity: true,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl Normalizer {
    fn read(&mut self, message: &[u8]) -> Result<(), String> {
        for field in Fields::new(message) {
            match field? {
                (1, Value::Bytes(text)) => self.name = utf8(text)?,
                (2, Value::Bytes(table)) => self.is_identity = table.is_empty(),
                (3, Value::Number(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Value::Number(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Value::Number(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    std::str::from_utf8(bytes).map(ToOwned::to_owned).map_err(|_| "a string is not UTF-8".into())
}

/// Content of a protobuf field.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Value<'b> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    /// A string or a message.
    Bytes(&'b [u8]),
}

/// Walks over the fields of a protobuf message; borrows everything, allocates nothing, and ends after an error.
struct Fields<'b> {
    rest: &'b [u8],
}

impl<'b> Fields<'b> {
    fn new(message: &'b [u8]) -> Self {
        Self { rest: message }
    }

    fn take(&mut self, len: u64) -> Result<&'b [u8], String> {
        let left = self.rest.len();
        let taken = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = taken.ok_or_else(|| format!("a field has {len} bytes, but only {left} are left"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let Some((&byte, rest)) = self.rest.split_first() else { return Err("it ends within a number".into()) };
            self.rest = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number has more than ten bytes".into())
    }

    fn field(&mut self) -> Result<(u64, Value<'b>), String> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Eight)?,
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Four(self.take(4)?.try_into().unwrap_or_default()),
            wire => return Err(format!("a field has the wire type {wire}")),
        };
        Ok((key >> 3, value))
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = Result<(u64, Value<'b>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 0x80 {
            bytes.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        bytes.push(value.to_le_bytes()[0]);
        bytes
    }

    fn number(field: u64, value: u64) -> Vec<u8> {
        [varint(field << 3), varint(value)].concat()
    }

    fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
        [varint(field << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
    }

    /// Two pieces, a trainer's and a normaliser's settings.
    fn model(trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
        let unknown = [bytes(1, b"<unk>"), number(3, 2)].concat();
        let piece = [bytes(1, b"a"), [vec![0x15], 1.5f32.to_le_bytes().to_vec()].concat()].concat();
        [bytes(1, &unknown), bytes(1, &piece), bytes(2, trainer), bytes(3, normalizer)].concat()
    }

    fn read(bytes: &[u8]) -> Result<GgufVocab> {
        parse(bytes, Path::new("x.model"))
    }

    #[test]
    fn pieces_and_settings_are_read() {
        let trainer = [number(3, 2), bytes(47, b"a")].concat();
        let vocab = read(&model(&trainer, &[number(4, 0), number(3, 0)].concat())).unwrap();
        assert_eq!(vocab.tokens, ["<unk>", "a"]);
        assert_eq!((vocab.scores.as_slice(), vocab.token_types.as_slice()), (&[0.0, 1.5][..], &[2, 1][..]));
        assert_eq!((vocab.bos_id, vocab.eos_id, vocab.unk_id), (None, Some(1), Some(0)));
        assert_eq!(vocab.add_space_prefix, Some(false));
    }

    #[test]
    fn other_kinds_of_models_are_refused_by_name() {
        let plain = number(4, 0);
        let bpe = number(3, 2);
        let cases = [
            (Vec::new(), plain.clone(), "unigram"),
            (number(3, 3), plain.clone(), "word"),
            (number(3, 4), plain.clone(), "character"),
            (number(3, 9), plain.clone(), "type 9"),
            (bpe.clone(), [plain.clone(), bytes(1, b"nfkc"), bytes(2, b"x")].concat(), "`nfkc`"),
            (bpe.clone(), Vec::new(), "remove_extra_whitespaces"),
            (bpe.clone(), [plain.clone(), number(5, 0)].concat(), "escape_whitespaces"),
            ([bpe, number(24, 1)].concat(), plain, "suffix"),
        ];
        for (trainer, normalizer, word) in cases {
            match read(&model(&trainer, &normalizer)) {
                Err(error @ Error::Unsupported { .. }) => {
                    assert!(error.to_string().contains(word) && error.to_string().contains("x.model"), "{error}");
                }
                other => panic!("{word}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_not_protobuf_is_refused_with_the_reason() {
        let huge = [varint(1 << 3 | 2), varint(u64::MAX)].concat();
        let cases: [(&[u8], &str); 8] = [
            (b"", "no pieces"),
            (&huge, "18446744073709551615 bytes"),
            (&[0x0A, 0x05, 0x0A], "only 1 are left"),
            (&[0x80], "ends within a number"),
            (&[0xFF; 11], "more than ten bytes"),
            (&[0x0B], "wire type 3"),
            (&bytes(1, &bytes(1, &[0xFF])), "piece 0: a string is not UTF-8"),
            (&bytes(1, &bytes(1, &[b'a'; 5000])), "5000 bytes"),
        ];
        for (content, word) in cases {
            let error = read(content).unwrap_err();
            assert!(matches!(&error, Error::BadFile { reason, .. } if reason.contains(word)), "{word}: {error}");
        }
    }
}
