//! What tells one kind of cache from another.

use crate::cache::{KvDtype, Retention};
use crate::checkpoint::Loaded;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::kernels::quant::Compute;

/// The [`Fingerprint`] of what a cache's rows depend on beside its tokens: the model, how it is computed, the numbers that rows
/// are stored in, and what decides which rows stay.
///
/// # Errors
/// [`Error::Unsupported`] for a configuration that can't be written down.
pub(super) fn kind(loaded: &Loaded, kv_dtype: KvDtype, retention: &Retention) -> Result<String> {
    let config = loaded.model.config();
    let windows: Vec<Option<usize>> = (0..config.num_layers).map(|layer| config.window(layer)).collect();
    let mut fingerprint = Fingerprint::default();
    let mut line = |text: &str| {
        fingerprint.add(text);
        fingerprint.add("\n");
    };
    line(&loaded.fingerprint);
    line(&loaded.tokenizer.fingerprint());
    line(&config.architecture.to_string());
    line(&format!("{} {:?} {windows:?}", config.num_layers, config.heads));
    line(&format!("{:?}", config.rope));
    // Weights that are rounded give other rows, and so do products of rounded numbers.
    line(&loaded.dtype);
    line(loaded.model.compute().map_or("", Compute::name));
    line(kv_dtype.name());
    match retention {
        Retention::Full => line("full"),
        Retention::Adaptive { config, words, .. } => {
            let text = serde_json::to_string(&**config);
            line(
                &text
                    .map_err(|error| Error::unsupported(format!("a configuration that can't be written ({error})")))?,
            );
            // A profile of heads is in a file of its own, which may become another.
            line(&format!("{:?}", config.budgeted().and_then(|method| method.prior.as_ref())));
            line(&format!("{words:?}"));
        }
    }
    Ok(fingerprint.finish())
}
