//! Ids of tokens in Hugging Face's configuration files.
//!
//! Not for: tokenizers, which have the tokens themselves.

use serde_json::Value;

use crate::error::Result;
use crate::json::Object;

impl Object<'_> {
    /// Token ids: one, or a list of them; empty if absent. What is no id of a token is left out, and `notes` say so.
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) for anything but numbers and null.
    pub(super) fn token_ids(&self, key: &str, vocab_size: usize, notes: &mut Vec<String>) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let single = std::slice::from_ref(value);
        let items = value.as_array().map_or(single, Vec::as_slice);
        if !items.iter().all(|item| item.is_number() || item.is_null()) {
            return Err(self.wrong(key, "a token id or a list of them"));
        }
        let mut ids = Vec::new();
        for item in items {
            match token_id(item).filter(|&id| (id as usize) < vocab_size) {
                Some(id) => ids.push(id),
                None => notes.push(format!(
                    "key `{}{key}` of `{}` names the token {item}, but tokens are 0 to {}: it is left out",
                    self.prefix,
                    self.path.display(),
                    vocab_size - 1
                )),
            }
        }
        Ok(ids)
    }
}

/// The id that a number is, be it written as `2` or `2.0`.
fn token_id(value: &Value) -> Option<u32> {
    let whole = |number: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let id = number as u32;
        (f64::from(id) == number).then_some(id)
    };
    match value.as_u64() {
        Some(id) => u32::try_from(id).ok(),
        None => value.as_f64().and_then(whole),
    }
}
