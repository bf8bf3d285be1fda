//! Words that occur more often than others: RULER's tasks `cwe`, common words of a numbered list, and `fwe`, frequent
//! words of a coded text (Hsieh et al., 2024, section 3.3).

use std::f64::consts::PI;

use rand::rngs::StdRng;
use rand::seq::{SliceRandom, index};

use super::prompt::Prompt;
use super::vocabulary::letters;

/// Common words of a list.
const NUM_COMMON: usize = 10;
/// Lengths from which lists hold each word more often.
const LONG: usize = 4096;

/// Letters of a coded word.
const CODED_LETTERS: usize = 6;
/// Frequent words that are asked for.
const NUM_FREQUENT: usize = 3;
/// What stands in the place of the most frequent word.
const DOTS: &str = "...";

/// How often words of a list occur.
struct Repeats {
    common: usize,
    others: usize,
}

/// A list that was drawn.
struct List {
    /// All of it, in order.
    words: Vec<String>,
    /// `[NUM_COMMON]`
    common: Vec<String>,
}

impl List {
    /// * `num_words`: different words, at least [`NUM_COMMON`] and at most as many as there are
    fn draw(words: &[&str], num_words: usize, repeats: &Repeats, random: &mut StdRng) -> Self {
        let drawn = index::sample(random, words.len(), num_words.min(words.len()));
        let mut drawn: Vec<String> = drawn.into_iter().map(|index| words[index].to_owned()).collect();
        drawn.shuffle(random); // sampling may go through the words in their order
        let (common, others) = drawn.split_at(NUM_COMMON.min(drawn.len()));
        let mut words = Vec::with_capacity(common.len() * repeats.common + others.len() * repeats.others);
        for (some, times) in [(common, repeats.common), (others, repeats.others)] {
            words.extend(some.iter().flat_map(|word| std::iter::repeat_n(word.clone(), times)));
        }
        words.shuffle(random);
        Self { words, common: common.to_vec() }
    }
}

/// The numbers of different words that a list may have.
///
/// * `words`: to draw from
pub(super) fn list_sizes(words: &[&str]) -> (usize, usize) {
    (NUM_COMMON + 1, words.len())
}

/// A prompt of `cwe`.
///
/// * `words`: to draw from
/// * `length`: tokens of the whole, by which words are repeated
/// * `size`: different words of the list
pub(super) fn common_words(words: &[&str], length: usize, size: usize, random: &mut StdRng) -> Prompt {
    let (example_words, example, repeats) = if length < LONG {
        (20, Repeats { common: 3, others: 1 }, Repeats { common: 6, others: 1 })
    } else {
        (40, Repeats { common: 10, others: 3 }, Repeats { common: 30, others: 3 })
    };
    let example = List::draw(words, example_words, &example, random);
    put_list_into_words(&example, List::draw(words, size, &repeats, random))
}

fn put_list_into_words(example: &List, list: List) -> Prompt {
    let intro = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that \
                 appear most often.";
    let question = "Question: What are the 10 most common words in the above list? ";
    let prefix = "Answer: The top 10 words that appear most often in the list are:";
    let numbered = |words: &[String]| {
        let entries: Vec<String> =
            words.iter().enumerate().map(|(index, word)| format!("{}. {word}", index + 1)).collect();
        entries.join(" ")
    };
    let context = format!(
        "{intro}\n{}\n{question}{prefix}{}\n{intro}\n{}\n",
        numbered(&example.words),
        numbered(&example.common),
        numbered(&list.words)
    );
    Prompt { context, question: question.to_owned(), answer_prefix: prefix.to_owned(), answers: list.common }
}

/// The numbers of words that a coded text may have, about: with fewer, those that are asked for would occur equally often.
pub(super) const CODED_SIZES: (usize, usize) = (40, usize::MAX / 4);

/// A prompt of `fwe`.
///
/// * `length`: tokens of the whole, by which there are more different words
/// * `size`: words of the text, about
pub(super) fn frequent_words(length: usize, size: usize, random: &mut StdRng) -> Prompt {
    let num_different = (length / 50).max(NUM_FREQUENT + 1);
    let mut different: Vec<String> = Vec::with_capacity(num_different);
    while different.len() < num_different {
        let word = letters(b'a', CODED_LETTERS, random);
        if !different.contains(&word) {
            different.push(word);
        }
    }
    DOTS.clone_into(&mut different[0]);
    let counted = different.iter().enumerate().map(|(rank_idx, word)| (word, occurrences(size, rank_idx + 1)));
    let mut words: Vec<String> = counted.flat_map(|(word, count)| std::iter::repeat_n(word.clone(), count)).collect();
    words.shuffle(random);
    put_coded_into_words(&words, different[1..=NUM_FREQUENT].to_vec())
}

/// How often the word of a rank occurs: as a zeta distribution with an exponent of 2 has it.
///
/// * `rank`: from 1
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn occurrences(num_words: usize, rank: usize) -> usize {
    let zeta = PI * PI / 6.0;
    (num_words as f64 * (rank as f64).powi(-2) / zeta) as usize
}

fn put_coded_into_words(words: &[String], frequent: Vec<String>) -> Prompt {
    let intro = "Read the following coded text and track the frequency of each coded word. Find the three most frequently \
                 appeared coded words.";
    let question = "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently \
                    appeared words in the above coded text? ";
    let prefix = "Answer: According to the coded text above, the three most frequently appeared words are:";
    Prompt {
        context: format!("{intro} {}\n", words.join(" ")),
        question: question.to_owned(),
        answer_prefix: prefix.to_owned(),
        answers: frequent,
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::expected::{cases, expected, number, strings};
    use super::super::vocabulary::Vocabulary;
    use super::*;

    #[test]
    fn the_wording_is_the_generators_own() {
        for case in cases().into_iter().filter(|case| case["task"] == "cwe") {
            let list = |index: usize| {
                let list = &case["lists"][index];
                List { words: strings(&list[0]), common: strings(&list[1]) }
            };
            assert_eq!(put_list_into_words(&list(0), list(1)), expected(&case));
        }
        let case = cases().into_iter().find(|case| case["task"] == "fwe").unwrap();
        assert_eq!(put_coded_into_words(&strings(&case["words"]), strings(&case["answers"])), expected(&case));
        let counts: Vec<usize> = case["counts"].as_array().unwrap().iter().map(number).collect();
        let ranks = 1..=counts.len();
        assert_eq!(ranks.map(|rank| occurrences(number(&case["num_words"]), rank)).collect::<Vec<_>>(), counts);
    }

    #[test]
    fn words_occur_as_often_as_the_generators_have_it() {
        let words = Vocabulary::new();
        for (length, common, others) in [(2048, 6, 1), (4096, 30, 3)] {
            let make = || common_words(words.all(), length, 50, &mut StdRng::seed_from_u64(7));
            let prompt = make();
            assert_eq!(prompt, make());
            let list = prompt.context.rsplit("most often.\n").next().unwrap();
            let occur = |word: &str| list.split_whitespace().filter(|other| *other == word).count();
            assert_eq!(prompt.answers.len(), NUM_COMMON);
            assert!(prompt.answers.iter().all(|word| occur(word) == common), "{prompt:?}");
            assert_eq!(list.split_whitespace().count(), 2 * (common * NUM_COMMON + others * 40));
        }
    }

    #[test]
    fn the_frequent_words_are_those_after_the_dots() {
        let prompt = frequent_words(2048, 300, &mut StdRng::seed_from_u64(2));
        let counts: Vec<usize> =
            prompt.answers.iter().map(|word| prompt.context.matches(word.as_str()).count()).collect();
        assert_eq!(counts, [45, 20, 11]);
        assert_eq!(prompt.context.matches(" ...").count(), 182);
        let [first, last] = [CODED_SIZES.0, CODED_SIZES.0 * 2].map(|size| occurrences(size, NUM_FREQUENT + 1));
        assert!(first >= 1 && last > first);
    }
}
