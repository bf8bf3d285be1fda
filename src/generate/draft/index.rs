//! Where a text stood at the same tokens before, and what followed there.

use std::collections::HashMap;

/// Earlier places that are looked at for the longest match, the latest ones.
const MAX_PLACES: usize = 32;

/// Tokens that are compared at most.
const MAX_LENGTH: usize = 32;

/// Not a place.
const NONE: u32 = u32::MAX;

/// A text, and for its end the earlier place that has the most tokens before it in common with it; at least two.
#[derive(Debug, Default)]
pub(super) struct TextIndex {
    text: Vec<u32>,
    /// Where two tokens were last: the place of the second.
    last: HashMap<[u32; 2], u32>,
    /// For each place, the one before where its token came after the same one.
    before: Vec<u32>,
    found: Option<Match>,
}

/// An earlier place that looks like the end of the text.
#[derive(Debug, Clone, Copy)]
struct Match {
    /// Place of the token that followed.
    next: usize,
    /// Tokens that are the same.
    length: usize,
}

impl TextIndex {
    /// Adds a token to the text.
    pub fn push(&mut self, id: u32) {
        // The longest match stays the longest as long as it goes on.
        let goes_on = self.found.filter(|found| self.text[found.next] == id);
        let place = u32::try_from(self.text.len()).unwrap_or(NONE);
        let before = self.text.last().and_then(|&previous| self.last.insert([previous, id], place)).unwrap_or(NONE);
        self.text.push(id);
        self.before.push(before);
        self.found = match goes_on {
            Some(Match { next, length }) => Some(Match { next: next + 1, length: length + 1 }),
            None => self.longest(before),
        };
    }

    /// The guess `ahead` tokens after the next, and how many tokens before it are the same, those guessed before it
    /// included. A match that reaches the end of the text goes on with what is guessed.
    pub fn guess(&self, ahead: usize) -> Option<(usize, u32)> {
        let Match { next, length } = self.found?;
        let period = self.text.len() - next;
        Some((length + ahead, self.text[next + ahead % period]))
    }

    /// The longest match among earlier places, the latest of equal ones.
    ///
    /// * `place`: the latest
    fn longest(&self, mut place: u32) -> Option<Match> {
        let mut longest: Option<Match> = None;
        for _ in 0..MAX_PLACES {
            let Some(before) = self.before.get(place as usize) else { break };
            let earlier = self.text[..=place as usize].iter().rev();
            let length = earlier.zip(self.text.iter().rev()).take(MAX_LENGTH).take_while(|(a, b)| a == b).count();
            if longest.is_none_or(|longest| length > longest.length) {
                longest = Some(Match { next: place as usize + 1, length });
            }
            place = *before;
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &[u32]) -> TextIndex {
        let mut index = TextIndex::default();
        for &id in text {
            index.push(id);
        }
        index
    }

    fn guesses(text: &[u32], count: usize) -> Vec<(usize, u32)> {
        let index = index(text);
        (0..count).filter_map(|ahead| index.guess(ahead)).collect()
    }

    #[test]
    fn what_followed_the_longest_match_is_guessed() {
        assert!(guesses(&[], 1).is_empty());
        assert!(guesses(&[1, 2, 3, 1], 1).is_empty(), "one token is no match");
        assert_eq!(guesses(&[1, 2, 3, 4, 9, 1, 2], 3), [(2, 3), (3, 4), (4, 9)]);
        // The later place has two tokens in common, the earlier one three.
        assert_eq!(guesses(&[5, 1, 2, 3, 7, 1, 2, 4, 5, 1, 2], 1), [(3, 3)]);
        // Of equally long ones the latest.
        assert_eq!(guesses(&[5, 1, 2, 3, 5, 1, 2, 4, 6, 1, 2], 1), [(2, 4)]);
    }

    #[test]
    fn a_match_goes_on_as_long_as_it_holds_and_is_looked_for_anew_when_it_does_not() {
        let mut index = index(&[1, 2, 3, 4, 8, 8, 2, 3, 6, 1, 2]);
        assert_eq!(index.guess(0), Some((2, 3)));
        index.push(3);
        assert_eq!(index.guess(0), Some((3, 4)));
        index.push(6); // 2 3 6 was there, too
        assert_eq!(index.guess(0), Some((3, 1)));
        index.push(77);
        assert_eq!(index.guess(0), None);
    }

    #[test]
    fn a_text_that_goes_round_is_guessed_to_go_round() {
        assert_eq!(guesses(&[7, 1, 2, 3, 1, 2, 3], 5).iter().map(|guess| guess.1).collect::<Vec<_>>(), [1, 2, 3, 1, 2]);
        assert_eq!(guesses(&[4, 4, 4], 3).iter().map(|guess| guess.1).collect::<Vec<_>>(), [4, 4, 4]);
    }

    /// Looked for anew at each token, however far back.
    #[test]
    fn the_match_is_the_longest_there_is() {
        let mut state = 5u32;
        let mut text: Vec<u32> = Vec::new();
        let mut index = TextIndex::default();
        for _ in 0..400 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let id = (state >> 24) % 5;
            text.push(id);
            index.push(id);
            let common =
                |place: usize| text[..place].iter().rev().zip(text.iter().rev()).take_while(|(a, b)| a == b).count();
            let longest = (1..text.len()).map(common).max().filter(|&length| length > 1);
            // Only so many places are looked at.
            if let (Some(longest), true) = (longest, text.len() < 60) {
                let (length, guess) = index.guess(0).unwrap();
                assert_eq!(length, longest, "{text:?}");
                assert!((1..text.len()).any(|place| common(place) == longest && text[place] == guess));
            }
            assert_eq!(index.guess(0).is_some(), longest.is_some());
        }
    }
}
