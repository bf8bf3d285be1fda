//! Reading texts that a person names, from files, pipes and devices: never more than a bound, since some have no end,
//! and without the byte-order mark that some editors put at the start.
//!
//! Not for: model files, which are mapped (see [`crate::checkpoint`]).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::json::without_bom;

/// Most bytes of a text: some 60 million tokens, beyond the context of any model.
pub const MAX_TEXT: u64 = 256 << 20;

/// Reads a text of at most `most` bytes.
///
/// * `action`: a verb phrase for messages, as `"read prompt"`
///
/// # Errors
/// [`Error::Io`] if it cannot be read or is not UTF-8; [`Error::BadFile`] if it is longer.
pub fn text(path: &Path, action: &'static str, most: u64) -> Result<String> {
    let file = File::open(path).map_err(|source| Error::io(action, path, source))?;
    text_of(file, path, action, most)
}

/// As [`text`], from what was opened already; `path` is for messages.
///
/// # Errors
/// As [`text`].
pub fn text_of(reader: impl Read, path: &Path, action: &'static str, most: u64) -> Result<String> {
    let mut bytes = Vec::new();
    // The length that the system reports is not relied upon: pipes and devices have none.
    reader.take(most + 1).read_to_end(&mut bytes).map_err(|source| Error::io(action, path, source))?;
    if bytes.len() as u64 > most {
        return Err(Error::bad_file(path, format!("it has more than {most} bytes, too much for such a text")));
    }
    utf8(bytes).map_err(|source| Error::io(action, path, source))
}

/// Reads the first `most` bytes of a text, or all of it; a character that is cut off at the end is left out.
///
/// # Errors
/// [`Error::Io`] if it cannot be read or is not UTF-8.
pub fn beginning(path: &Path, action: &'static str, most: u64) -> Result<String> {
    /// A character has at most so many bytes.
    const LONGEST: usize = 4;
    let failed = |source| Error::io(action, path, source);
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 == most
        && let Err(error) = std::str::from_utf8(&bytes)
        && error.error_len().is_none()
        && bytes.len() - error.valid_up_to() < LONGEST
    {
        bytes.truncate(error.valid_up_to());
    }
    utf8(bytes).map_err(failed)
}

/// The text of bytes, without a byte-order mark at its start.
fn utf8(bytes: Vec<u8>) -> io::Result<String> {
    // In the words of the standard library.
    let no_text = |_| io::Error::new(io::ErrorKind::InvalidData, "stream did not contain valid UTF-8");
    let mut text = String::from_utf8(bytes).map_err(no_text)?;
    let mark = text.len() - without_bom(&text).len();
    text.drain(..mark);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_than_the_bound() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "aé🙂").unwrap();
        assert_eq!(text(&path, "read", 7).unwrap(), "aé🙂");
        let error = text(&path, "read", 6).unwrap_err().to_string();
        assert!(error.contains("a.txt") && error.contains("more than 6 bytes"), "{error}");
        for (most, expected) in [(0, ""), (1, "a"), (2, "a"), (3, "aé"), (6, "aé"), (7, "aé🙂"), (9, "aé🙂")] {
            assert_eq!(beginning(&path, "read", most).unwrap(), expected);
        }
        assert_eq!(beginning(Path::new("/dev/zero"), "read", 5).unwrap(), "\0\0\0\0\0");
        assert!(matches!(text(Path::new("/dev/zero"), "read", 5), Err(Error::BadFile { .. })));
        assert!(matches!(text(folder.path(), "read", 5), Err(Error::Io { .. })));
        std::fs::write(&path, b"a\xff\xe2\x82").unwrap();
        assert!(matches!(beginning(&path, "read", 4), Err(Error::Io { .. })));
        std::fs::write(&path, b"ab\xe2\x82").unwrap();
        assert!(matches!(beginning(&path, "read", 5), Err(Error::Io { .. })), "the file ends in half a character");
    }
}
