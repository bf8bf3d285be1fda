//! Models by their id on a hub, fetched where the program is built with the feature `hub`.

use std::path::{Path, PathBuf};

use adaptive_kvcache::hub;

#[cfg(feature = "hub")]
mod fetch;

#[cfg(feature = "hub")]
use fetch::fetch;

/// The path of a model: itself if it is there, or the local copy of what it names on a hub.
///
/// A text that is neither is returned as it is, so that opening it says what is wrong.
pub fn local_path(model: &Path) -> anyhow::Result<PathBuf> {
    match model.to_str().filter(|text| !model.exists() && hub::is_hub_id(text)) {
        Some(id) => fetch(id),
        None => Ok(model.to_owned()),
    }
}

/// Says what would fetch the model.
#[cfg(not(feature = "hub"))]
fn fetch(id: &str) -> anyhow::Result<PathBuf> {
    let what = format!("fetching `{id}` from a hub, for which the program was built without the feature `hub`,");
    Err(adaptive_kvcache::Error::unsupported(what)
        .with_hint("build it with `--features hub`, or give a local path")
        .into())
}

#[cfg(all(test, not(feature = "hub")))]
mod tests {
    use super::*;

    #[test]
    fn an_id_without_a_hub_names_the_feature() {
        let error = local_path(Path::new("owner/name@main")).unwrap_err();
        let error = error.downcast::<adaptive_kvcache::Error>().unwrap();
        let text = error.to_string();
        assert!(text.contains("`owner/name@main`") && text.contains("feature `hub`"), "{text}");
        assert!(error.hint().unwrap().contains("--features hub"));
        assert_eq!(local_path(Path::new("model.gguf")).unwrap(), Path::new("model.gguf"));
    }
}
