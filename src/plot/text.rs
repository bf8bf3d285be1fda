//! Setting text: the compiled-in font, measuring, wrapping and shortening. Drawing it is [`super::canvas`]'s work.

use std::sync::OnceLock;

use plotters::style::{FontDesc, FontFamily, FontStyle, register_font};

const FAMILY: &str = "adaptive-kvcache-plot";
const SUBSET: &[u8] = include_bytes!("font/dejavu-sans-subset.ttf");

/// Height of a line, ascent plus descent, in pixels.
///
/// All are even: plotters puts the baseline half a line below the anchor and rounds every glyph on its own, so that an
/// odd size makes letters dance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// Inside cells.
    Tiny,
    /// Nearly everything.
    Normal,
    /// The picture's title.
    Title,
}

impl Size {
    /// The line height.
    pub(super) const fn line(self) -> i32 {
        match self {
            Self::Tiny => 12,
            Self::Normal => 14,
            Self::Title => 20,
        }
    }

    /// Height of a digit, in pixels: 0.73 em, an em being 0.86 lines in `DejaVu` Sans.
    pub(super) const fn digit(self) -> i32 {
        (self.line() * 63 + 50) / 100
    }
}

/// The compiled-in font; registered with plotters on first use.
pub(super) fn font(size: Size) -> FontDesc<'static> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    // A font that cannot be parsed shows up as a drawing failure in `Canvas`.
    REGISTERED.get_or_init(|| register_font(FAMILY, FontStyle::Normal, SUBSET).is_ok());
    FontDesc::new(FontFamily::Name(FAMILY), f64::from(size.line()), FontStyle::Normal)
}

/// Width of a line of text in pixels.
pub(super) fn width(text: &str, size: Size) -> i32 {
    // The box is cut to whole pixels: one more covers the last one.
    font(size).layout_box(text).map_or(0, |((left, _), (right, _))| right - left + 1)
}

/// Shortens a line to a width, with an ellipsis for what is cut off; as it is if it fits.
pub(super) fn shorten(text: &str, size: Size, max_width: i32) -> String {
    if width(text, size) <= max_width {
        return text.to_owned();
    }
    // No glyph is narrower than a pixel.
    let mut kept: Vec<char> = text.chars().take(max_width.max(0) as usize).collect();
    while kept.pop().is_some() {
        let line: String = kept.iter().chain(['…'].iter()).collect();
        if width(&line, size) <= max_width {
            return line;
        }
    }
    String::new()
}

/// Breaks a text into at most `max_lines` lines (at least 1) of a width, after spaces and plus signs.
///
/// Words that are too long for a line, and what is too much for the last one, are shortened.
pub(super) fn wrap(text: &str, size: Size, max_width: i32, max_lines: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split_inclusive([' ', '+']) {
        let is_last_line = lines.len() + 1 >= max_lines;
        if !is_last_line && !line.is_empty() && width(format!("{line}{word}").trim_end(), size) > max_width {
            lines.push(std::mem::take(&mut line));
        }
        line.push_str(word);
    }
    lines.push(line);
    lines.iter().map(|line| shorten(line.trim_end(), size, max_width)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sign_we_print_has_a_glyph_of_its_own() {
        let missing = width("\u{fffd}", Size::Title);
        assert!(missing > 1, "the font is not registered");
        assert!(width("iiii", Size::Title) < width("MMMM", Size::Title));
        for sign in "→≥≤×—…".chars() {
            assert_ne!(width(&sign.to_string(), Size::Title), missing, "{sign}");
        }
    }

    #[test]
    fn wrapping_keeps_the_text_and_the_width() {
        let text = "head 31 (KV 7): special+punctuation+frequency+local";
        for max_width in [150, 200, 300, 1000] {
            let lines = wrap(text, Size::Normal, max_width, 9);
            assert!(lines.iter().all(|line| width(line, Size::Normal) <= max_width), "{lines:?}");
            assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        }
        assert_eq!(wrap(text, Size::Normal, 1000, 3), [text]);
        assert_eq!(wrap("", Size::Normal, 100, 3), [""]);
    }

    #[test]
    fn what_does_not_fit_is_shortened() {
        let lines = wrap("one+two+three+four+five+six", Size::Normal, 60, 2);
        assert_eq!(lines.len(), 2);
        assert!(lines[1].ends_with('…') && width(&lines[1], Size::Normal) <= 60);
        assert_eq!(shorten("anything", Size::Normal, 0), "");
    }
}
