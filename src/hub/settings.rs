//! Where a hub and its cache are, and what is told of the work.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct HubSettings {
    /// The folder that holds `models--owner--name`.
    pub cache: PathBuf,
    /// The hub's address, as `https://huggingface.co`.
    pub endpoint: String,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<String>,
    /// Take what is in the cache, and ask nobody.
    pub offline: bool,
    /// The proxy for all requests.
    pub proxy: Option<ureq::Proxy>,
}

impl fmt::Debug for HubSettings {
    /// Without the token and the proxy, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, endpoint, token, offline, proxy } = self;
        f.debug_struct("HubSettings")
            .field("cache", cache)
            .field("endpoint", endpoint)
            .field("token", &token.as_ref().map(|_| "..."))
            .field("offline", offline)
            .field("proxy", &proxy.as_ref().map(|_| "..."))
            .finish()
    }
}

/// What [`fetch`](super::fetch()) is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// It waits for an answer about a model or a file.
    Asking { what: &'a str },
    /// `done` of `size` bytes of a file are there.
    File { name: &'a str, done: u64, size: u64 },
    /// A file in the cache is not what the hub says of it, and is fetched anew.
    Damaged { name: &'a str, reason: &'a str },
    /// The hub is not to be asked or cannot be, and a copy in the cache is taken.
    Cached { reason: &'a str, path: &'a Path },
}

/// Hears of progress; [`ControlFlow::Break`] ends the work.
pub(super) type Observer<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;
