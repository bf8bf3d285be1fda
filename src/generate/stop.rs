//! Stop texts: cuts a stream of text where one of them begins, and holds back what may become one.

/// Passes text on until a stop text is met.
#[derive(Debug, Clone, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
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
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| longest_beginning(&self.held, stop)).max().unwrap_or(0);
        self.held.drain(..self.held.len() - keep).collect()
    }

    /// Returns what is held back when the text is over.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length in bytes of the longest end of `text` that is a proper beginning of `stop`.
fn longest_beginning(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(index, _)| index).rev();
    ends.into_iter().find(|&len| len > 0 && text.ends_with(&stop[..len])).unwrap_or(0)
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
}
