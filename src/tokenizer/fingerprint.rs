//! What tells one vocabulary from another.

use super::Tokenizer;
use crate::fingerprint::Fingerprint;

impl Tokenizer {
    /// Tells this vocabulary from others, see [`Fingerprint`]: of each token, in the order of ids, the length of its
    /// [bytes](Self::id_bytes) in 32 bits, little-endian, the bytes, and 1 if it is [special](Self::is_special), else 0.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "ids and lengths have at most 32 bits")]
    pub fn fingerprint(&self) -> String {
        let mut fingerprint = Fingerprint::default();
        for id in 0..self.vocab_size() as u32 {
            let bytes = self.id_bytes(id);
            fingerprint.add((bytes.len() as u32).to_le_bytes());
            fingerprint.add(bytes);
            fingerprint.add([u8::from(self.is_special(id))]);
        }
        fingerprint.finish()
    }
}
