//! Models by their id on a Hugging Face hub: fetched once into the cache that other programs share, then local files.
//!
//! Without the feature `hub`, an id is still told from a path, and nothing is fetched.
//!
//! Not for: settings from the environment (the caller's), uploads, data sets, reading the files.

#[cfg(feature = "hub")]
mod address;
#[cfg(feature = "hub")]
mod choice;
#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod http;
mod id;
#[cfg(feature = "hub")]
mod settings;
#[cfg(feature = "hub")]
mod sums;

#[cfg(feature = "hub")]
pub use fetch::fetch;
pub use id::is_hub_id;
#[cfg(feature = "hub")]
pub use settings::{HubSettings, Progress};
