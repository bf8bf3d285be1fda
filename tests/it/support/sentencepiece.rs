//! Reads a SentencePiece `tokenizer.model` into what a GGUF file would hold.

use std::path::Path;

use adaptive_kvcache::tokenizer::{GgufVocab, read_sentencepiece};

/// A `SentencePiece` model file as the GGUF converter would store it.
pub fn vocab(path: &Path) -> GgufVocab {
    read_sentencepiece(path).unwrap()
}
