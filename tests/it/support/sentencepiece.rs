//! Reads a SentencePiece `tokenizer.model` (protobuf) into what a GGUF file would hold.

use std::path::Path;

use adaptive_kvcache::tokenizer::GgufVocab;

/// Reads a protobuf varint and cuts it off.
fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7F) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

/// Cuts a protobuf message into (field number, content): bytes of strings and messages, of numbers their little-endian
/// bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let content = match key & 7 {
            0 => varint(&mut bytes).to_le_bytes().to_vec(),
            wire => {
                let len = match wire {
                    1 => 8,
                    2 => usize::try_from(varint(&mut bytes)).unwrap(),
                    5 => 4,
                    other => panic!("wire type {other}"),
                };
                let (head, tail) = bytes.split_at(len);
                bytes = tail;
                head.to_vec()
            }
        };
        fields.push((key >> 3, content));
    }
    fields
}

/// A `SentencePiece` model file as the GGUF converter would store it.
pub fn vocab(path: &Path) -> GgufVocab {
    let mut vocab = GgufVocab {
        path: path.to_owned(),
        model: "llama".into(),
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        ..GgufVocab::default()
    };
    for (_, piece) in fields(&std::fs::read(path).unwrap()).into_iter().filter(|(number, _)| *number == 1) {
        let (mut text, mut score, mut kind) = (String::new(), 0.0, 1);
        for (number, content) in fields(&piece) {
            match number {
                1 => text = String::from_utf8(content).unwrap(),
                2 => score = f32::from_le_bytes(content.try_into().unwrap()),
                3 => kind = i32::from(content[0]),
                _ => {}
            }
        }
        vocab.tokens.push(text);
        vocab.scores.push(score);
        vocab.token_types.push(kind);
    }
    vocab
}
