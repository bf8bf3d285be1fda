//! How a vocabulary spells bytes: GPT-2's alphabet, in which every byte is a character; `SentencePiece`'s space and its
//! byte tokens.
//!
//! What a token is for: `vocab.rs`.

use std::collections::HashMap;
use std::sync::LazyLock;

/// What stands for a space inside a piece: U+2581.
pub(super) const SPACE: &str = "\u{2581}";

/// The character that spells a byte in a byte-level vocabulary: itself if it is visible Latin-1, else U+0100 onwards.
fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if visible(byte) {
        return char::from(byte);
    }
    let hidden_before = (0..byte).filter(|&b| !visible(b)).count();
    u32::try_from(0x100 + hidden_before).ok().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte-level spelling of bytes.
pub(super) fn spelling(bytes: &[u8]) -> String {
    static CHAR_OF: LazyLock<[char; 256]> = LazyLock::new(|| {
        let mut chars = ['\0'; 256];
        for byte in 0..=u8::MAX {
            chars[usize::from(byte)] = byte_char(byte);
        }
        chars
    });
    bytes.iter().map(|&byte| CHAR_OF[usize::from(byte)]).collect()
}

/// The bytes that a byte-level spelling stands for. Characters outside the alphabet stand for themselves.
pub(super) fn spelt_bytes(text: &str) -> impl Iterator<Item = u8> {
    static BYTE_OF: LazyLock<HashMap<char, u8>> = LazyLock::new(|| (0..=u8::MAX).map(|b| (byte_char(b), b)).collect());
    text.chars().flat_map(|c| {
        let mut utf8 = [0; 4];
        let len = match BYTE_OF.get(&c) {
            Some(&byte) => {
                utf8[0] = byte;
                1
            }
            None => c.encode_utf8(&mut utf8).len(),
        };
        utf8.into_iter().take(len)
    })
}

/// Bytes in which U+2581 is a space.
pub(super) fn with_spaces(mut raw: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((&first, rest)) = raw.split_first() {
        let space = raw.strip_prefix(SPACE.as_bytes());
        bytes.push(if space.is_some() { b' ' } else { first });
        raw = space.unwrap_or(rest);
    }
    bytes
}

/// The value of a byte token's spelling, `<0x00>` to `<0xFF>`.
pub(super) fn byte_value(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let valid = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    valid.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let chars: HashSet<char> = (0..=u8::MAX).map(byte_char).collect();
        assert_eq!(chars.len(), 256);
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(b'a'), byte_char(0xAD)), ('Ġ', 'Ċ', 'a', 'Ń'));
        assert_eq!(spelt_bytes("Ġæ日").collect::<Vec<_>>(), [b' ', 0xE6, 0xE6, 0x97, 0xA5]);
    }
}
