//! Fingerprints: what tells one model from another in a file that is of one of them.

use std::fmt::Write;

use sha2::{Digest, Sha256};

/// Bytes of a fingerprint.
const BYTES: usize = 16;

/// A fingerprint in the making: the first 128 bits, in hexadecimal, of the SHA-256 of what is added.
#[derive(Debug, Default)]
pub struct Fingerprint(Sha256);

impl Fingerprint {
    /// Adds bytes behind those before; where one addition ends and the next begins does not count.
    pub fn add(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes);
    }

    /// The fingerprint, 32 digits.
    #[must_use]
    pub fn finish(self) -> String {
        self.0.finalize().iter().take(BYTES).fold(String::with_capacity(2 * BYTES), |mut digits, byte| {
            let _ = write!(digits, "{byte:02x}");
            digits
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_beginning_of_the_sum() {
        // SHA-256 of "abc", FIPS 180-4.
        let mut fingerprint = Fingerprint::default();
        fingerprint.add("a");
        fingerprint.add("bc");
        assert_eq!(fingerprint.finish(), "ba7816bf8f01cfea414140de5dae2223");
    }
}
