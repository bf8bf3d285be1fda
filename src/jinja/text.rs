//! Characters and texts as Python sees them.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::unicode::{DIGITS, NUMERALS, ZEROS};

/// Number of characters.
pub(super) fn count_chars(text: &str) -> usize {
    // Faster than `chars().count()` for the usual case.
    if text.is_ascii() { text.len() } else { text.chars().count() }
}

/// White space as `str.isspace` has it: Unicode's and four separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1C'..='\x1F').contains(&c)
}

/// Ends of lines for `str.splitlines`.
pub(super) fn is_line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0B' | '\x0C' | '\x1C'..='\x1E' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn within(ranges: &[(u32, u32)], c: char) -> bool {
    let at = ranges.partition_point(|&(_, last)| last < c as u32);
    ranges.get(at).is_some_and(|&(first, _)| first <= c as u32)
}

/// The value of a decimal digit of any script.
pub(super) fn decimal(c: char) -> Option<u32> {
    if c.is_ascii() {
        return c.to_digit(10);
    }
    let at = ZEROS.partition_point(|&zero| zero <= c as u32);
    let value = c as u32 - ZEROS.get(at.checked_sub(1)?)?;
    (value < 10).then_some(value)
}

pub(super) fn is_digit(c: char) -> bool {
    decimal(c).is_some() || within(DIGITS, c)
}

pub(super) fn is_numeric(c: char) -> bool {
    c.is_numeric() || within(NUMERALS, c)
}

pub(super) fn is_alpha(c: char) -> bool {
    static LETTER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\p{L}").ok());
    if c.is_ascii() {
        return c.is_ascii_alphabetic();
    }
    LETTER.as_ref().is_some_and(|letter| letter.is_match(c.encode_utf8(&mut [0; 4])).unwrap_or(false))
}

pub(super) fn is_alnum(c: char) -> bool {
    is_alpha(c) || is_numeric(c)
}

/// What Python's regular expressions take for a character of a word.
pub(super) fn is_word(c: char) -> bool {
    c == '_' || is_alnum(c)
}

/// Whether `repr` prints the character as it is.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return (' '..='~').contains(&c);
    }
    // After another character, only what is not printable is escaped.
    let mut text = String::from("a");
    text.push(c);
    text.escape_debug().nth(1) == Some(c)
}

/// Characters that have a case, for `title` and `istitle`.
pub(super) fn is_cased(c: char) -> bool {
    c.is_uppercase() || c.is_lowercase() || is_title(c)
}

/// Letters of which the first half is upper case, such as `ǅ`.
pub(super) fn is_title(c: char) -> bool {
    matches!(c as u32, 0x1C5 | 0x1C8 | 0x1CB | 0x1F2 | 0x1F88..=0x1F8F | 0x1F98..=0x1F9F | 0x1FA8..=0x1FAF | 0x1FBC | 0x1FCC | 0x1FFC)
}

/// The title case of a character, which may be several characters.
pub(super) fn title(c: char) -> String {
    match c as u32 {
        0x1C4..=0x1C6 => return "\u{1C5}".into(),
        0x1C7..=0x1C9 => return "\u{1C8}".into(),
        0x1CA..=0x1CC => return "\u{1CB}".into(),
        0x1F1..=0x1F3 => return "\u{1F2}".into(),
        // Georgian letters have no title case.
        0x10D0..=0x10FF => return c.into(),
        _ => {}
    }
    let mut upper = c.to_uppercase();
    upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
}

/// What `casefold` makes of a character.
pub(super) fn fold(c: char) -> String {
    if c == '\u{131}' { c.into() } else { c.to_uppercase().flat_map(char::to_lowercase).collect() }
}

/// The lines of a text with their ends, as `str.splitlines(True)`.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(is_line_end).map_or(rest.len(), |at| {
            let c = rest[at..].chars().next().map_or(1, char::len_utf8);
            at + if rest[at..].starts_with("\r\n") { 2 } else { c }
        });
        let (line, after) = rest.split_at(end);
        rest = after;
        Some(line)
    })
}

/// A line without its end.
pub(super) fn without_end(line: &str) -> &str {
    line.strip_suffix("\r\n").unwrap_or_else(|| line.strip_suffix(is_line_end).unwrap_or(line))
}
