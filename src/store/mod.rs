//! A prefix store: a folder of saved caches, in which prompts find what was read of their first tokens before.
//!
//! ```no_run
//! use adaptive_kvcache::prelude::*;
//! use adaptive_kvcache::store::PrefixStore;
//!
//! # fn main() -> Result<()> {
//! let loaded = load("model.gguf", WeightDtype::Auto)?;
//! let store = PrefixStore::open("prefixes", PrefixStore::DEFAULT_LIMIT)?;
//! let prefixes = store.prefixes(&loaded, KvDtype::F16, &Retention::Full)?;
//! let ids = loaded.tokenizer.encode(&std::fs::read_to_string("book.txt").expect("a book"))?;
//! let found = prefixes.longest(&ids);
//! let mut cache = match found {
//!     Some(cache) => cache,
//!     None => loaded.full_cache(KvDtype::F16)?,
//! };
//! let logits = loaded.model.prefill(&ids[cache.seen()..], &mut cache, &mut ())?.logits;
//! prefixes.put(&cache);
//! # let _ = logits;
//! # Ok(())
//! # }
//! ```
//!
//! An entry is a [saved cache](crate::saved). Its name tells the kind of cache (model, vocabulary, numbers, method) and the tokens
//! that were read, so that the same prefix is one file, whoever stores it. What can be had of an entry is what can be had
//! exactly, see [`SavedCache::fewest_tokens`](crate::saved::SavedCache::fewest_tokens): of a full cache any of its first
//! tokens, so that an entry takes the place of those that it begins with; of a compressed one all, or all up to some token
//! behind its last prompt.
//!
//! Several processes may use one folder. A file appears when it is complete, and a cache that was taken from one stays whole
//! when the file is removed (on Unix). Those that were not used for the longest time go when all together are larger than
//! the limit; other files in the folder are nobody's business here.
//!
//! Not for: what is saved, and how (see [`crate::saved`]).

mod entries;
mod kind;
mod prefixes;

use std::path::{Path, PathBuf};

use crate::cache::{KvDtype, Retention};
use crate::checkpoint::Loaded;
use crate::error::{Error, Result};
use crate::files;

pub use prefixes::{Prefixes, Told};

/// A folder of prefixes.
#[derive(Debug, Clone)]
pub struct PrefixStore {
    folder: PathBuf,
    /// Bytes that its entries may come to.
    limit: u64,
}

impl PrefixStore {
    /// Bytes that entries may come to if nobody says: 2 GB.
    pub const DEFAULT_LIMIT: usize = 2 << 30;

    /// Fewer tokens than these are read sooner than they are found.
    pub const MIN_TOKENS: usize = 64;

    /// Opens a folder, which is made if it is missing, and clears away what killed runs have left there.
    ///
    /// * `limit`: bytes that all entries together may come to
    ///
    /// # Errors
    /// [`Error::Input`] if the path is empty; [`Error::Io`] if no file can be made in it.
    pub fn open(folder: impl AsRef<Path>, limit: usize) -> Result<Self> {
        let folder = folder.as_ref();
        if folder.as_os_str().is_empty() {
            return Err(Error::input("the name of the folder for prefixes is empty").with_hint("name a folder"));
        }
        files::check_folder(folder)?;
        Ok(Self { folder: folder.to_owned(), limit: limit as u64 })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of all entries, whatever model they are of.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder can't be read.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.entries()?.iter().map(|entry| entry.bytes).sum())
    }

    /// The prefixes of one kind of cache.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model's backend [saves no caches](Loaded::save_cache), or the processor is not little-endian.
    pub fn prefixes<'a>(&self, loaded: &'a Loaded, kv_dtype: KvDtype, retention: &Retention) -> Result<Prefixes<'a>> {
        Prefixes::new(self.clone(), loaded, kv_dtype, retention)
    }
}
