//! `layer{L}_attention.png`: the attention maps of a layer's query heads, and what their KV heads kept.
//!
//! Holds what a caller gives, and its checks; `picture` draws, with the sizes that `layout` finds. Not for collecting
//! maps: that is [`crate::attention::map::MapAccumulator`]'s work.

mod layout;
mod picture;

use std::path::Path;

use super::canvas::check_count;
use crate::error::{Error, Result};

/// One query head's attention map, and what its KV head kept of the prompt.
#[derive(Debug, Clone, Copy)]
pub struct HeadMap<'a> {
    /// Index of the query head in its layer.
    pub query_head: usize,
    /// Index of the KV head that it reads.
    pub kv_head: usize,
    /// The KV head's policy, such as `special+punctuation+frequency`.
    pub policy: &'a str,
    /// `[side, side]`, row-major, row = query, column = key: block maxima of softmaxed rows, in 0..=1; 0 above the
    /// diagonal. Position `p` lies in cell `p * side / prompt_len`, as [`crate::attention::map::MapAccumulator`] has it.
    pub cells: &'a [f32],
    /// Cells on a side, in `1..=prompt_len`; the same for all heads of a picture.
    pub side: usize,
    /// Positions of the prompt that the KV head kept, ascending, each below `prompt_len`.
    pub kept: &'a [u32],
}

/// Draws the maps of a layer's query heads, each above a strip of the positions that its KV head kept.
///
/// Colours are matplotlib's `hot` on a square-root scale. Cells are squares of whole pixels; maps with more cells than
/// the picture has room for are drawn by the maxima of their blocks. The picture stays below 2400 pixels in width.
///
/// * `prompt_len`: positions of the prompt, below 2^32
///
/// # Errors
/// [`Error::Shape`] if there is no head, a map is not `[side, side]`, the sides differ or are not in `1..=prompt_len`,
/// or a kept position is not in the prompt; [`Error::Unsupported`] for more than 20 000 heads; [`Error::Io`] if `path`
/// cannot be written.
pub fn layer_attention(path: &Path, layer: usize, prompt_len: usize, heads: &[HeadMap<'_>]) -> Result<()> {
    let Some(first) = heads.first() else {
        return Err(Error::shape("attention maps", "at least 1 head", 0));
    };
    if prompt_len > u32::MAX as usize {
        return Err(Error::shape("prompt of attention maps", "below 2^32", prompt_len));
    }
    if !(1..=prompt_len).contains(&first.side) {
        return Err(Error::shape("side of an attention map", 1..=prompt_len, first.side));
    }
    for head in heads {
        if head.side != first.side {
            return Err(Error::shape("side of an attention map", first.side, head.side));
        }
        if head.cells.len() != head.side.saturating_mul(head.side) {
            return Err(Error::shape("attention map", [head.side; 2], head.cells.len()));
        }
        if let Some(&beyond) = head.kept.iter().find(|&&position| position as usize >= prompt_len) {
            return Err(Error::shape("kept position", format!("below {prompt_len}"), beyond));
        }
    }
    check_count(heads.len(), "attention maps")?;
    picture::Picture::new(layer, prompt_len, heads).draw(heads)?.save(path)
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    const POLICY: &str = "special+punctuation+frequency+local";

    /// Draws `num_heads` equal maps of `side` x `side` cells; gives the picture's size.
    fn size(num_heads: usize, prompt_len: usize, side: usize) -> (u32, u32) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer3_attention.png");
        let cells = vec![0.5; side * side];
        let kept: Vec<u32> = (0..prompt_len as u32).step_by(3).collect();
        let head = HeadMap { query_head: 0, kv_head: 0, policy: POLICY, cells: &cells, side, kept: &kept };
        layer_attention(&path, 3, prompt_len, &vec![head; num_heads]).unwrap();
        assert_eq!(test_png::names(folder.path()), ["layer3_attention.png"]);
        test_png::size(&path).unwrap()
    }

    #[test]
    fn every_model_and_prompt_has_a_picture_of_a_sensible_width() {
        for num_heads in [1, 2, 4, 5, 7, 9, 12, 32, 40, 64] {
            for (prompt_len, side) in [(1, 1), (2, 2), (9, 9), (345, 128), (131_072, 256), (70_000, 300)] {
                let (width, height) = size(num_heads, prompt_len, side);
                assert!((500..=2400).contains(&width), "{num_heads} heads, {prompt_len} tokens: {width} x {height}");
            }
        }
        assert!(size(1, 4000, 3000).0 <= 2400);
    }

    #[test]
    fn the_picture_is_as_high_as_its_rows() {
        let [one, two, three] = [3, 6, 9].map(|num_heads| size(num_heads, 9, 9).1);
        assert_eq!(two - one, three - two);
    }

    #[test]
    fn sizes_must_agree() {
        let path = Path::new("/nowhere/layer0_attention.png");
        let cells = [1.0, 0.0, 0.5, 0.5];
        let good = HeadMap { query_head: 0, kv_head: 0, policy: "", cells: &cells, side: 2, kept: &[0, 1] };
        let bad = [
            HeadMap { side: 1, ..good },
            HeadMap { side: usize::MAX, ..good },
            HeadMap { cells: &cells[..3], ..good },
            HeadMap { kept: &[2], ..good },
        ];
        for bad in bad {
            for heads in [[bad, good], [good, bad]] {
                assert!(matches!(layer_attention(path, 0, 2, &heads), Err(Error::Shape { .. })));
            }
        }
        assert!(matches!(layer_attention(path, 0, 2, &[]), Err(Error::Shape { .. })));
        assert!(matches!(layer_attention(path, 0, 1, &[good]), Err(Error::Shape { .. })));
        assert!(matches!(layer_attention(path, 0, 0, &[HeadMap { side: 0, ..good }]), Err(Error::Shape { .. })));
        assert!(matches!(layer_attention(path, 0, usize::MAX, &[good]), Err(Error::Shape { .. })));
        assert!(
            layer_attention(path, 0, 2, &[good]).unwrap_err().to_string().contains("/nowhere/layer0_attention.png")
        );
    }
}
