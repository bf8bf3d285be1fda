//! Stop texts: cuts a stream of text where one of them begins, and holds back what may become one.
//!
//! A token that prints nothing, such as `<|user|>`, may be part of a stop text as well: its spelling takes part in the
//! search, as a whole, and never comes out.

use std::ops::Range;

/// Passes text on until a stop text is met.
#[derive(Debug, Clone, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    /// What may become a stop text, spellings of tokens that print nothing included.
    held: String,
    /// Where in `held` such spellings are, ascending.
    unprinted: Vec<Range<usize>>,
    stopped: bool,
}

impl StopFilter {
    /// A filter for these texts; empty ones are left out.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), ..Self::default() }
    }

    /// Whether a stop text was met.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes in text; returns what can't be part of a stop text any more. After a stop it returns nothing.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped || self.stops.is_empty() {
            return if self.stopped { String::new() } else { text.to_owned() };
        }
        self.held.push_str(text);
        self.advance()
    }

    /// Takes in the spelling of a token that prints nothing. A stop text holds all of it or none, or is found as if it
    /// were not there. Returns as [`push`](Self::push) does.
    pub fn push_unprinted(&mut self, spelling: &str) -> String {
        if self.stopped || self.stops.is_empty() || spelling.is_empty() {
            return String::new();
        }
        let start = self.held.len();
        self.held.push_str(spelling);
        self.unprinted.push(start..self.held.len());
        self.advance()
    }

    /// Returns what is held back when the text is over.
    pub fn finish(&mut self) -> String {
        self.take(self.held.len())
    }

    /// Looks for stop texts in what is held, and gives out what is free of them.
    fn advance(&mut self) -> String {
        let printed = self.printed(self.held.len());
        let stops = self.stops.iter();
        let found = stops.clone().filter_map(|stop| self.find(stop)).min();
        let found_printed = stops.clone().filter_map(|stop| printed.find(stop.as_str())).min();
        let found_printed = found_printed.map(|start| self.place_of_printed(start));
        if let Some(start) = found.into_iter().chain(found_printed).min() {
            let text = self.take(start);
            (self.held, self.unprinted, self.stopped) = (String::new(), Vec::new(), true);
            return text;
        }
        let open = stops.clone().filter_map(|stop| self.beginning(stop));
        let open_printed = stops
            .filter_map(|stop| beginnings(&printed, stop).next().map(|len| self.place_of_printed(printed.len() - len)));
        let free = open.chain(open_printed).min().unwrap_or(self.held.len());
        self.take(free)
    }

    /// Where a stop text begins that cuts through no spelling.
    fn find(&self, stop: &str) -> Option<usize> {
        let starts = self.held.char_indices().map(|(start, _)| start);
        starts.into_iter().find(|&start| {
            self.held[start..].starts_with(stop) && self.is_between(start) && self.is_between(start + stop.len())
        })
    }

    /// Where the longest beginning of a stop text begins at the end of what is held.
    fn beginning(&self, stop: &str) -> Option<usize> {
        beginnings(&self.held, stop).map(|len| self.held.len() - len).find(|&start| self.is_between(start))
    }

    /// Whether a place in what is held is not inside a spelling.
    fn is_between(&self, place: usize) -> bool {
        !self.unprinted.iter().any(|range| range.start < place && place < range.end)
    }

    /// The printed text before a place in what is held.
    fn printed(&self, end: usize) -> String {
        let mut text = String::with_capacity(end);
        let mut done = 0;
        for range in &self.unprinted {
            text.push_str(&self.held[done.min(end)..range.start.min(end)]);
            done = range.end;
        }
        text.push_str(&self.held[done.min(end)..end]);
        text
    }

    /// The place in what is held of a place in its printed text.
    fn place_of_printed(&self, printed: usize) -> usize {
        let before = self.unprinted.iter();
        before.fold(printed, |place, range| if range.start <= place { place + range.len() } else { place })
    }

    /// Drops what is held before a place, and returns what of it is printed.
    fn take(&mut self, end: usize) -> String {
        let text = self.printed(end);
        self.held.drain(..end);
        self.unprinted.retain(|range| range.end > end);
        for range in &mut self.unprinted {
            *range = range.start.saturating_sub(end)..range.end - end;
        }
        text
    }
}

/// Lengths in bytes, longest first, of the ends of `text` that are proper beginnings of `stop`.
fn beginnings<'a>(text: &'a str, stop: &'a str) -> impl Iterator<Item = usize> + 'a {
    let ends = stop.char_indices().map(|(index, _)| index).rev();
    ends.filter(move |&len| len > 0 && text.ends_with(&stop[..len]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes the parts and returns everything that came out, and whether it stopped.
    fn run(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut out: String = parts.iter().map(|part| filter.push(part)).collect();
        out += &filter.finish();
        (out, filter.stopped())
    }

    #[test]
    fn a_stop_text_is_found_however_the_stream_is_cut() {
        let text = "one\n\nUser: two";
        for cut in 0..=text.len() {
            assert_eq!(run(&["\nUser:"], &[&text[..cut], &text[cut..]]), ("one\n".to_owned(), true), "{cut}");
        }
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(run(&["\nUser:"], &letters), ("one\n".to_owned(), true));
    }

    #[test]
    fn what_only_looks_like_a_stop_text_comes_out_whole() {
        assert_eq!(run(&["abc"], &["xab", "abd", "ab"]), ("xababdab".to_owned(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".to_owned(), false));
        assert_eq!(run(&[""], &["anything"]), ("anything".to_owned(), false));
    }

    #[test]
    fn the_earliest_of_several_stop_texts_cuts() {
        assert_eq!(run(&["z", "y"], &["xyz"]), ("x".to_owned(), true));
    }

    /// As [`run`], where parts in brackets are spellings of tokens that print nothing.
    fn run_spelt(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let push = |part: &&str| {
            if part.starts_with('[') { filter.push_unprinted(part) } else { filter.push(part) }
        };
        let mut out: String = parts.iter().map(push).collect();
        out += &filter.finish();
        (out, filter.stopped())
    }

    #[test]
    fn a_token_that_prints_nothing_is_met_as_a_whole_and_never_comes_out() {
        for (stops, parts, text, stopped) in [
            (&["[user]"][..], &["hi", "[user]", "x"][..], "hi", true),
            (&["\n[user]"], &["hi\n", "[user]"], "hi", true),
            (&["[user]\nx"], &["hi", "[user]", "\n", "xy"], "hi", true),
            (&["[user]\nx"], &["hi", "[user]", "\n", "y"], "hi\ny", false),
            // Parts of a spelling are no text.
            (&["user"], &["hi", "[user]", "x"], "hix", false),
            (&["i[us"], &["hi", "[user]", "x"], "hix", false),
            (&["]x"], &["hi", "[user]", "x"], "hix", false),
            // Text is found as if nothing were between.
            (&["ab"], &["xa", "[user]", "[e]", "b"], "x", true),
            (&["ab"], &["xa", "[user]", "c"], "xac", false),
            (&["ab", "[user]"], &["xa", "[user]", "b"], "xa", true),
            (&["a[e]b"], &["a", "[e]", "a", "[e]", "b!"], "a", true),
            (&["ab"], &["[e]", "a", "[e]"], "a", false),
        ] {
            assert_eq!(run_spelt(stops, parts), (text.to_owned(), stopped), "{stops:?} {parts:?}");
        }
    }
}
