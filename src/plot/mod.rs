//! Pictures of a run as PNG files: attention maps per layer, the policy of every KV head, KV memory per layer; and of
//! measurements: speed and memory against the prompt's length, what a smaller cache costs against its size, and
//! where it still finds facts.
//!
//! All inputs are plain slices, so that nothing here depends on the model or the cache; collecting attention rows while
//! a prompt is read is [`crate::attention::map::MapAccumulator`]'s work. Not for measuring anything, and not for other
//! formats than PNG.
//!
//! Every file is drawn in memory, written to a temporary file beside its destination and renamed, so that a reader
//! never meets half a picture. Text is set in a subset of `DejaVu` Sans that is compiled in (`font/`, with its licence
//! and the script that made it): no font of the system is needed.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "pixel arithmetic on picture sizes that `Canvas::new` bounds"
)]

mod attention;
mod axis;
mod canvas;
mod color;
mod legend;
mod memory;
mod needles;
mod panels;
mod policy;
mod speed;
mod text;
mod tradeoff;

pub use attention::{HeadMap, layer_attention};

pub use memory::kv_memory;
pub use needles::{NeedleMap, needle_maps};
pub use policy::{PolicyGrid, policies};
pub use speed::{SpeedLine, speed};
pub use tradeoff::{TradeoffLimit, TradeoffLine, TradeoffPanel, TradeoffPoint, TradeoffScale, tradeoff};

#[cfg(test)]
mod test_png {
    //! What the tests of this module ask of a written picture.

    use std::path::Path;

    /// Width and height in pixels from a PNG file's header; `None` if the file does not start as a PNG does.
    pub(super) fn size(path: &Path) -> Option<(u32, u32)> {
        let bytes = std::fs::read(path).ok()?;
        let header = bytes.get(..24)?;
        if &header[..8] != b"\x89PNG\r\n\x1a\n" || &header[12..16] != b"IHDR" || !bytes.ends_with(b"IEND\xaeB`\x82") {
            return None;
        }
        let number = |at: usize| header[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte));
        Some((number(16), number(20)))
    }

    /// Names in a folder, to see that no temporary file is left.
    pub(super) fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}
