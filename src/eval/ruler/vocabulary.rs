//! The words that are drawn: those that RULER's generators take from wonderwords (see `words/README.md`).

use rand::Rng;
use rand::rngs::StdRng;

const NOUNS: &str = include_str!("words/nouns.txt");
const ADJECTIVES: &str = include_str!("words/adjectives.txt");
const VERBS: &str = include_str!("words/verbs.txt");

/// Words to draw from.
#[derive(Debug)]
pub(super) struct Vocabulary {
    nouns: Vec<&'static str>,
    adjectives: Vec<&'static str>,
    /// Nouns, adjectives and verbs, each once.
    all: Vec<&'static str>,
}

impl Vocabulary {
    pub(super) fn new() -> Self {
        let [nouns, adjectives, verbs] =
            [NOUNS, ADJECTIVES, VERBS].map(|list| list.lines().collect::<Vec<&'static str>>());
        let mut all = [&nouns[..], &adjectives, &verbs].concat();
        all.sort_unstable();
        all.dedup();
        Self { nouns, adjectives, all }
    }

    /// All words, sorted.
    pub(super) fn all(&self) -> &[&'static str] {
        &self.all
    }

    /// An adjective and a noun, with a hyphen between them.
    pub(super) fn pair(&self, random: &mut StdRng) -> String {
        let adjective = self.adjectives[random.random_range(0..self.adjectives.len())];
        format!("{adjective}-{}", self.nouns[random.random_range(0..self.nouns.len())])
    }
}

/// Letters of the alphabet, drawn one by one.
///
/// * `first`: `a` or `A`
pub(super) fn letters(first: u8, count: usize, random: &mut StdRng) -> String {
    (0..count).map(|_| char::from(first + random.random_range(0..26u8))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_words() {
        let words = Vocabulary::new();
        assert!(words.all().len() > 8000 && words.nouns.len() > 6000 && words.adjectives.len() > 800);
        for word in words.all() {
            assert!(word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-') && !word.is_empty(), "{word}");
        }
    }
}
