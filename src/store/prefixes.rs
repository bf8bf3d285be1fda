//! The prefixes of one kind of cache: the longest that a prompt begins with, and new ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::PrefixStore;
use super::entries::{is_gone, name, touch};
use super::kind::kind;
use crate::backend::KernelRows;
use crate::cache::{AdaptiveKvCache, CacheLayer, KvDtype, Retention};
use crate::checkpoint::Loaded;
use crate::compress::AdaptiveConfig;
use crate::error::{Error, Result};
use crate::saved::SavedCache;
use crate::sizes::size;

/// A prefix is stored if it has this share of its tokens (1/8) more than what is held already: less is read again sooner than
/// all is written.
const NEW_SHARE: usize = 8;

/// What a listener is told.
#[derive(Debug)]
pub enum Told<'t> {
    /// A prompt was looked up.
    Found {
        /// Its first tokens, which were read before; 0 if none were.
        tokens: usize,
        /// Its tokens.
        of: usize,
    },
    /// An entry can't be used. One that is damaged was removed.
    Unusable(&'t Error),
    /// A cache could not be stored. Told once.
    NotStored(&'t Error),
}

/// The prefixes of a store for one model and one kind of cache.
pub struct Prefixes<'a> {
    store: PrefixStore,
    loaded: &'a Loaded,
    kv_dtype: KvDtype,
    /// `None` for a full cache.
    config: Option<Arc<AdaptiveConfig>>,
    kind: String,
    listener: Box<dyn Fn(Told<'_>) + Send + Sync + 'a>,
    /// Entries that were opened: the tokens that a name stands for never change.
    known: Mutex<BTreeMap<PathBuf, Arc<Held>>>,
    /// Entries that can't be used, and were told of.
    unusable: Mutex<BTreeSet<PathBuf>>,
    is_failure_told: AtomicBool,
}

impl fmt::Debug for Prefixes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefixes").field("store", &self.store).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// An entry, as far as its beginning tells.
struct Held {
    path: PathBuf,
    ids: Vec<u32>,
    /// The fewest tokens that it can go back to.
    fewest: usize,
}

impl Held {
    /// How many of the first tokens of `ids` it can give.
    fn tokens_of(&self, ids: &[u32]) -> usize {
        let common = self.ids.iter().zip(ids).take_while(|(held, id)| held == id).count();
        if common < self.fewest { 0 } else { common }
    }
}

impl<'a> Prefixes<'a> {
    pub(super) fn new(
        store: PrefixStore,
        loaded: &'a Loaded,
        kv_dtype: KvDtype,
        retention: &Retention,
    ) -> Result<Self> {
        if cfg!(target_endian = "big") {
            return Err(Error::unsupported("stored prefixes on a processor that is not little-endian"));
        }
        if !loaded.model.new_cache(kv_dtype, retention.clone())?.can_save() {
            return Err(Error::unsupported(format!("stored prefixes by the backend {}", loaded.model.backend()))
                .with_hint("use --backend kernels on the CPU"));
        }
        let config = match retention {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => Some(Arc::clone(config)),
        };
        Ok(Self {
            kind: kind(loaded, kv_dtype, retention)?,
            store,
            loaded,
            kv_dtype,
            config,
            listener: Box::new(|_| {}),
            known: Mutex::default(),
            unusable: Mutex::default(),
            is_failure_told: AtomicBool::new(false),
        })
    }

    /// Sets who is told of what is found, and of what goes wrong.
    #[must_use]
    pub fn with_listener(mut self, listener: impl Fn(Told<'_>) + Send + Sync + 'a) -> Self {
        self.listener = Box::new(listener);
        self
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &PrefixStore {
        &self.store
    }

    /// The cache of the longest prefix that was stored of a prompt: [`seen`](AdaptiveKvCache::seen) of its tokens need not be
    /// read. At least one is left, since the next token's logits come from the last. `None` if there is no prefix of
    /// [`MIN_TOKENS`](PrefixStore::MIN_TOKENS) at least.
    ///
    /// Whatever is wrong with the folder or with entries is told, and nothing of it is used.
    pub fn longest(&self, ids: &[u32]) -> Option<AdaptiveKvCache> {
        let wanted = &ids[..ids.len().saturating_sub(1)];
        let found = if wanted.len() < PrefixStore::MIN_TOKENS { None } else { self.longest_of(wanted) };
        let tokens = found.as_ref().map_or(0, AdaptiveKvCache::seen);
        (self.listener)(Told::Found { tokens, of: ids.len() });
        found
    }

    fn longest_of(&self, ids: &[u32]) -> Option<AdaptiveKvCache> {
        let mut candidates: Vec<(usize, Arc<Held>)> =
            self.held().into_iter().map(|held| (held.tokens_of(ids), held)).collect();
        candidates.retain(|&(tokens, _)| tokens >= PrefixStore::MIN_TOKENS);
        // Of those that give as much, the smallest.
        candidates.sort_by_key(|(tokens, held)| (std::cmp::Reverse(*tokens), held.ids.len()));
        candidates.iter().find_map(|(tokens, held)| {
            let path = &held.path;
            let cache = SavedCache::open(path).and_then(|saved| {
                self.expect_kind(&saved)?;
                saved.first(self.loaded, *tokens)
            });
            cache.inspect(|_| touch(path)).map_err(|error| self.refuse(path, &error)).ok()
        })
    }

    /// Stores a cache of this kind, unless it is short, or hardly more than what is held already. Entries that it begins with
    /// go if it can go back to them. Then those go that were not used for the longest time, as far as the limit asks.
    ///
    /// What goes wrong is told once, and leaves no part of a file.
    pub fn put(&self, cache: &AdaptiveKvCache) {
        if let Err(error) = self.try_put(cache)
            && !self.is_failure_told.swap(true, Ordering::Relaxed)
        {
            (self.listener)(Told::NotStored(&error));
        }
    }

    /// As [`put`](Self::put); whether it was stored.
    ///
    /// # Errors
    /// [`Error::Input`] for a cache of another kind, or one that is larger than the limit; [`Error::Io`] if it can't be
    /// written; others as [`Loaded::save_cache`].
    pub fn try_put(&self, cache: &AdaptiveKvCache) -> Result<bool> {
        let ids = cache.ids();
        // One that was broken off in the middle of a token is of no use, nor is one whose tokens have other positions than their
        // own.
        if ids.len() < PrefixStore::MIN_TOKENS || !cache.is_consistent() || cache.shifted() > 0 {
            return Ok(false);
        }
        self.expect_own(cache)?;
        let fewest = self.loaded.fewest_tokens(cache);
        let entries = self.held();
        let best = entries.iter().map(|held| (held.tokens_of(ids), held)).max_by_key(|(tokens, _)| *tokens);
        if let Some((tokens, held)) = best
            && ids.len() - tokens < PrefixStore::MIN_TOKENS.max(ids.len() / NEW_SHARE)
        {
            touch(&held.path);
            return Ok(false);
        }
        let needed = cache.bytes().kept as u64;
        self.expect_fit(needed)?;
        let is_superseded =
            |held: &Held| fewest <= held.ids.len() && held.ids.len() < ids.len() && ids.starts_with(&held.ids);
        let superseded: Vec<PathBuf> =
            entries.iter().filter(|held| is_superseded(held)).map(|held| held.path.clone()).collect();
        let replaced: u64 = superseded.iter().filter_map(|path| path.metadata().ok()).map(|file| file.len()).sum();
        self.store.trim(&[], (self.store.limit - needed).saturating_add(replaced))?;
        let path = self.store.folder.join(name(&self.kind, ids));
        self.loaded.save_cache(cache, &path)?;
        // A file is a little larger than its keys and values.
        let fits = path.metadata().map_or(Ok(()), |file| self.expect_fit(file.len()));
        if fits.is_err() {
            let _ = std::fs::remove_file(&path);
        }
        fits?;
        self.store.trim(&superseded, self.store.limit)?;
        Ok(true)
    }

    /// Refuses what is larger than all entries may be together.
    fn expect_fit(&self, bytes: u64) -> Result<()> {
        if bytes <= self.store.limit {
            return Ok(());
        }
        let [bytes, limit] = [bytes, self.store.limit].map(|bytes| size(usize::try_from(bytes).unwrap_or(usize::MAX)));
        Err(Error::input(format!("it takes {bytes}, more than the limit of {limit}")).with_hint("raise the limit"))
    }

    /// All entries of this kind that can be opened.
    fn held(&self) -> Vec<Arc<Held>> {
        let paths = self.store.entries_of(&self.kind).unwrap_or_else(|error| {
            self.refuse(&self.store.folder, &error);
            Vec::new()
        });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *known);
        let open = |path: PathBuf| {
            let saved = SavedCache::open(&path)?;
            Ok(Arc::new(Held { ids: saved.ids(), fewest: saved.fewest_tokens()?, path }))
        };
        for path in paths {
            match before.remove(&path).map_or_else(|| open(path.clone()), Ok) {
                Ok(held) => drop(known.insert(path, held)),
                Err(error) => self.refuse(&path, &error),
            }
        }
        known.values().cloned().collect()
    }

    /// Tells that something can't be used, and removes it if it is damaged. What another version has stored is left to that.
    fn refuse(&self, path: &Path, error: &Error) {
        if is_gone(error) || matches!(error, Error::Unsupported { .. }) {
            return;
        }
        if matches!(error, Error::BadFile { .. }) {
            let _ = std::fs::remove_file(path);
        }
        let mut unusable = self.unusable.lock().unwrap_or_else(PoisonError::into_inner);
        if unusable.insert(path.to_owned()) {
            (self.listener)(Told::Unusable(error));
        }
    }

    /// Refuses an entry that is not what its name says.
    fn expect_kind(&self, saved: &SavedCache) -> Result<()> {
        if saved.kv_dtype() == self.kv_dtype && saved.config()?.as_ref() == self.config.as_deref() {
            return Ok(());
        }
        Err(Error::bad_file(saved.path(), "it is a cache of another method, or of other numbers, than its name says"))
    }

    /// Refuses a cache that entries of this kind are not made of.
    fn expect_own(&self, cache: &AdaptiveKvCache) -> Result<()> {
        let config = match cache.retention() {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => Some(&**config),
        };
        let dtype = cache.layers::<KernelRows>()?.first().map(CacheLayer::dtype);
        if config == self.config.as_deref() && dtype.is_none_or(|dtype| dtype == self.kv_dtype) {
            return Ok(());
        }
        Err(Error::input("a cache of another method, or of other numbers, than the prefixes are of"))
    }
}
