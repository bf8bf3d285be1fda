//! Where a legend's entries go.

use super::text::{self, Size};

const LINE: i32 = 22;
/// Length of a sample of a line, in pixels; a gap of 8 is behind it.
pub(super) const SAMPLE: i32 = 34;

/// Places the legend's entries one after the other, in lines of a width; gives their places and the height of all.
pub(super) fn flow(entries: &[String], width: i32) -> (Vec<(i32, i32)>, i32) {
    let (mut x, mut y) = (0, 0);
    let place = |entry: &String| {
        let entry_width = SAMPLE + 8 + text::width(entry, Size::Normal);
        if x > 0 && x + entry_width > width {
            (x, y) = (0, y + LINE);
        }
        let at = (x, y);
        x += entry_width + 28;
        at
    };
    let places: Vec<_> = entries.iter().map(place).collect();
    (places, y + LINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_go_on_in_the_next_line() {
        let entries = ["one", "two", "three"].map(str::to_owned);
        assert_eq!(flow(&entries, 10_000).1, LINE);
        let (places, height) = flow(&entries, 60);
        assert_eq!((places.as_slice(), height), ([(0, 0), (0, LINE), (0, 2 * LINE)].as_slice(), 3 * LINE));
    }
}
