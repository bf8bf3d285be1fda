//! Whether a file is the one that the hub means: its length, and the sum of its content.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Longest file whose content is compared with the hub's sum at each start: a fraction of a second.
const MAX_HASHED_BYTES: u64 = 256 << 20;

/// What the hub says of a file.
#[derive(Debug)]
pub(super) struct Metadata {
    pub etag: String,
    pub size: u64,
}

/// Whether a file is there, and is what the hub says of it.
///
/// # Errors
/// As [`damage`].
pub(super) fn is_whole(path: &Path, metadata: &Metadata) -> Result<bool> {
    Ok(path.is_file() && damage(path, metadata)?.is_none())
}

/// How a file that is there differs from what the hub says of it. The content of small ones is looked at, too.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub(super) fn damage(path: &Path, metadata: &Metadata) -> Result<Option<String>> {
    let failed = |source| Error::io("read", path, source);
    let length = path.metadata().map_err(failed)?.len();
    if length != metadata.size {
        return Ok(Some(format!("it has {length} of {} bytes", metadata.size)));
    }
    if length > MAX_HASHED_BYTES {
        return Ok(None);
    }
    let digest = match Digests::of(&metadata.etag, length) {
        Some(mut digest) => {
            let mut file = File::open(path).map_err(failed)?;
            std::io::copy(&mut file, &mut digest).map_err(failed)?;
            digest.finish()
        }
        None => return Ok(None),
    };
    Ok((!digest.eq_ignore_ascii_case(&metadata.etag)).then(|| "its content is not what the hub gives".to_owned()))
}

/// The sum that an etag is of a file's content: SHA-256 of large files, git's SHA-1 of others.
pub(super) enum Digests {
    Sha256(Sha256),
    Git(Sha1),
}

impl Digests {
    /// `None` if the etag is none of the two.
    pub fn of(etag: &str, length: u64) -> Option<Self> {
        let is_hex = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        match etag.len() {
            64 if is_hex => Some(Self::Sha256(Sha256::new())),
            40 if is_hex => Some(Self::Git(Sha1::new_with_prefix(format!("blob {length}\0")))),
            _ => None,
        }
    }

    pub fn finish(self) -> String {
        match self {
            Self::Sha256(digest) => format!("{:x}", digest.finalize()),
            Self::Git(digest) => format!("{:x}", digest.finalize()),
        }
    }
}

impl Write for Digests {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Sha256(digest) => digest.update(bytes),
            Self::Git(digest) => digest.update(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, "hello\n").unwrap();
        // As `git hash-object` and `sha256sum` say.
        for etag in [
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
            "any-other",
        ] {
            let metadata = |size| Metadata { etag: etag.to_owned(), size };
            assert_eq!(damage(&path, &metadata(6)).unwrap(), None, "{etag}");
            assert!(damage(&path, &metadata(7)).unwrap().unwrap().contains("6 of 7 bytes"));
        }
        std::fs::write(&path, "hellO\n").unwrap();
        let etag = "ce013625030ba8dba906f756967f9e9ca394464a".to_owned();
        assert!(damage(&path, &Metadata { etag, size: 6 }).unwrap().is_some());
    }
}
