//! The prefix store as commands use it.

use std::path::Path;

use adaptive_kvcache::cache::{AdaptiveKvCache, Retention};
use adaptive_kvcache::store::{PrefixStore, Prefixes, Told};
use adaptive_kvcache::{Error, Result};

use super::args::StoreArgs;
use super::interrupt::while_waiting;
use super::session::Session;
use super::terminal::note;

/// What every line about the store begins with.
const STORE: &str = "prefix store";

/// The store, if one is asked for.
///
/// # Errors
/// As [`PrefixStore::open`].
pub fn open(args: &StoreArgs) -> Result<Option<PrefixStore>> {
    args.cache_dir.as_ref().map(|folder| PrefixStore::open(folder, args.cache_dir_limit)).transpose()
}

/// The prefixes of a run's caches, which tell of each prompt how much of it was read before; `None`, which is told, where there
/// can be none.
///
/// # Errors
/// As [`PrefixStore::prefixes`].
pub fn of<'s>(
    session: &'s Session,
    store: Option<&PrefixStore>,
    retention: &Retention,
) -> Result<Option<Prefixes<'s>>> {
    let folder = store.map(|store| store.folder().to_owned()).unwrap_or_default();
    counting(session, store, retention, move |tokens, of| tell_found(&folder, "prompt", tokens, of))
}

/// As [`of`], for somebody who counts what is found.
///
/// * `found`: is told of each prompt how many of its tokens were read before, and how many it has
///
/// # Errors
/// As [`PrefixStore::prefixes`].
pub fn counting<'s>(
    session: &'s Session,
    store: Option<&PrefixStore>,
    retention: &Retention,
    found: impl Fn(usize, usize) + Send + Sync + 's,
) -> Result<Option<Prefixes<'s>>> {
    let Some(store) = store else { return Ok(None) };
    match store.prefixes(&session.loaded, session.kv_dtype, retention) {
        Ok(prefixes) => Ok(Some(prefixes.with_listener(move |told| match told {
            Told::Found { tokens, of } => found(tokens, of),
            Told::Unusable(error) => note(format_args!("{STORE}: {error}")),
            Told::NotStored(error) => note(format_args!("{STORE}: what was read is not kept: {error}")),
        }))),
        Err(error @ Error::Unsupported { .. }) => {
            note(format_args!("{STORE}: it is not used: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Tells how much was read before.
///
/// * `what`: of the prompt, or of the prompts
pub fn tell_found(folder: &Path, what: &str, tokens: usize, of: usize) {
    note(format_args!("{STORE}: {tokens} of {of} tokens of the {what} were read before (`{}`)", folder.display()));
}

/// The cache that a prompt begins with, and how many of its tokens that holds.
///
/// * `empty`: if there is no prefix
pub fn begin(prefixes: Option<&Prefixes<'_>>, empty: AdaptiveKvCache, ids: &[u32]) -> (AdaptiveKvCache, usize) {
    match while_waiting(|| prefixes.and_then(|prefixes| prefixes.longest(ids))) {
        Some(cache) => {
            let known = cache.seen();
            (cache.with_bounds(empty.bounds()), known)
        }
        None => (empty, 0),
    }
}

/// Stores a cache.
///
/// * `is_due`: whether it is time
pub fn keep(prefixes: Option<&Prefixes<'_>>, cache: &AdaptiveKvCache, is_due: bool) {
    if let Some(prefixes) = prefixes.filter(|_| is_due) {
        prefixes.put(cache);
    }
}

/// Stores a cache while something else is waited for.
///
/// * `cache`: `None` if there is nothing new
pub fn while_storing<T>(
    prefixes: Option<&Prefixes<'_>>,
    cache: Option<&AdaptiveKvCache>,
    wait: impl FnOnce() -> T,
) -> T {
    let (Some(prefixes), Some(cache)) = (prefixes, cache) else { return wait() };
    std::thread::scope(|scope| {
        scope.spawn(|| prefixes.put(cache));
        wait()
    })
}
