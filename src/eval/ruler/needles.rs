//! Needles in a haystack: RULER's eight `niah` tasks (Hsieh et al., 2024, section 3.1).

use rand::rngs::StdRng;
use rand::seq::{SliceRandom, index};
use rand::{Rng, RngCore};

use super::prompt::Prompt;
use super::vocabulary::Vocabulary;
use crate::eval::tasks::sentences_of;

/// What stands around the needles, if it is always the same.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Depths to choose from.
const NUM_DEPTHS: usize = 40;

/// What stands around the needles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haystack {
    /// [`NOISE`], line for line.
    Noise,
    /// Prose; needles stand between sentences.
    Essay,
    /// Needles that are not asked for.
    Needles,
}

/// What a key or a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thing {
    /// An adjective and a noun.
    Words,
    /// Seven digits.
    Numbers,
    /// A random UUID.
    Uuids,
}

/// A task's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needles {
    pub haystack: Haystack,
    pub key: Thing,
    pub value: Thing,
    pub num_keys: usize,
    pub values_per_key: usize,
    /// Keys that are asked for.
    pub num_queries: usize,
}

impl Thing {
    fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    fn draw(self, words: &Vocabulary, random: &mut StdRng) -> String {
        match self {
            Self::Words => words.pair(random),
            Self::Numbers => random.random_range(1_000_000..=9_999_999).to_string(),
            Self::Uuids => {
                let mut bytes = [0; 16];
                random.fill_bytes(&mut bytes);
                bytes[6] = bytes[6] & 0x0F | 0x40; // version 4
                bytes[8] = bytes[8] & 0x3F | 0x80; // the variant of RFC 9562
                let hex = format!("{:032x}", u128::from_be_bytes(bytes));
                [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
            }
        }
    }
}

/// All that chance decides.
struct Draw {
    /// Without needles.
    pieces: Vec<String>,
    /// In the order in which they stand in an essay; elsewhere the first stands last.
    needles: Vec<String>,
    /// How many pieces come before each needle: ascending in an essay, elsewhere descending.
    places: Vec<usize>,
    /// Keys that are asked for.
    queries: Vec<String>,
    answers: Vec<String>,
}

impl Needles {
    /// The numbers of pieces that a haystack may have: words of prose, or lines.
    pub(super) fn sizes(self) -> (usize, usize) {
        let first = match self.haystack {
            Haystack::Essay => 10,
            Haystack::Noise | Haystack::Needles => self.num_needles(),
        };
        (first, usize::MAX / 4)
    }

    fn num_needles(self) -> usize {
        self.num_keys * self.values_per_key
    }

    /// A prompt with a haystack of some size.
    ///
    /// * `prose`: words, at least one; they begin anew where there are too few
    pub(super) fn prompt(self, words: &Vocabulary, prose: &[&str], size: usize, random: &mut StdRng) -> Prompt {
        let draw = self.draw(words, prose, size, random);
        self.put_into_words(draw)
    }

    fn draw(self, words: &Vocabulary, prose: &[&str], size: usize, random: &mut StdRng) -> Draw {
        let needle =
            |key: &str, value: &str| format!("One of the special magic {} for {key} is: {value}.", self.value.plural());
        let (mut keys, mut needles) = (Vec::new(), Vec::new());
        for _ in 0..self.num_keys {
            let key = self.key.draw(words, random);
            let values: Vec<String> = (0..self.values_per_key).map(|_| self.value.draw(words, random)).collect();
            needles.extend(values.iter().map(|value| needle(&key, value)));
            keys.push((key, values));
        }
        needles.shuffle(random);
        let pieces = match self.haystack {
            Haystack::Noise => vec![NOISE.to_owned(); size],
            Haystack::Needles => {
                let other = |_| needle(&self.key.draw(words, random), &self.value.draw(words, random));
                (0..size).map(other).collect()
            }
            Haystack::Essay => {
                let text: Vec<&str> = prose.iter().copied().cycle().take(size).collect();
                sentences_of(&text.join(" "), usize::MAX)
            }
        };
        let count = needles.len();
        let mut places: Vec<usize> = if self.haystack == Haystack::Essay {
            index::sample(random, NUM_DEPTHS, count).into_iter().map(|depth| place(depth, pieces.len())).collect()
        } else {
            index::sample(random, size, count).into_vec()
        };
        places.sort_unstable();
        if self.haystack != Haystack::Essay {
            places.reverse();
        }
        let asked = index::sample(random, self.num_keys, self.num_queries).into_vec();
        let (queries, answers): (Vec<String>, Vec<Vec<String>>) =
            asked.into_iter().map(|index| keys[index].clone()).unzip();
        Draw { pieces, needles, places, queries, answers: answers.concat() }
    }

    fn put_into_words(self, draw: Draw) -> Prompt {
        let Draw { pieces, needles, places, queries, answers } = draw;
        let body = if self.haystack == Haystack::Essay {
            // Two needles at one place have an empty text between them, and a space on either side of it.
            let starts = std::iter::once(&0).chain(&places);
            let texts = starts.zip(&places).map(|(&start, &end)| pieces[start..end].join(" "));
            let rest = pieces[places.last().copied().unwrap_or(0)..].join(" ");
            let parts = texts.zip(needles).flat_map(|(text, needle)| [text, needle]);
            parts.chain([rest]).collect::<Vec<_>>().join(" ")
        } else {
            let mut lines = pieces;
            for (place, needle) in places.into_iter().zip(needles) {
                lines.insert(place, needle);
            }
            lines.join("\n")
        };
        let query = match &queries[..] {
            [one] => one.clone(),
            [others @ .., last] => format!("{}, and {last}", others.join(", ")),
            [] => String::new(),
        };
        let things = self.value.plural();
        let thing = &things[..things.len() - 1];
        let [intro, question, answer_prefix] = if self.num_queries * self.values_per_key == 1 {
            [
                format!(
                    "A special magic {thing} is hidden within the following text. Make sure to memorize it. I will quiz you \
                     about the {thing} afterwards."
                ),
                format!("What is the special magic {thing} for {query} mentioned in the provided text? "),
                format!("The special magic {thing} for {query} mentioned in the provided text is"),
            ]
        } else {
            [
                format!(
                    "Some special magic {things} are hidden within the following text. Make sure to memorize it. I will quiz \
                     you about the {things} afterwards."
                ),
                format!("What are all the special magic {things} for {query} mentioned in the provided text? "),
                format!("The special magic {things} for {query} mentioned in the provided text are"),
            ]
        };
        Prompt { context: format!("{intro}\n{body}\n"), question, answer_prefix, answers }
    }
}

/// How many of `count` sentences come before a depth.
///
/// * `depth_idx`: below [`NUM_DEPTHS`]
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn place(depth_idx: usize, count: usize) -> usize {
    let percent = (depth_idx as f64 * 100.0 / (NUM_DEPTHS - 1) as f64).round();
    ((count as f64 * (percent / 100.0)) as usize).min(count)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::RulerTask;
    use super::super::expected::{cases, expected, strings};
    use super::*;

    fn shape(task: RulerTask) -> Option<Needles> {
        task.needles()
    }

    #[test]
    fn the_wording_is_the_generators_own() {
        let mut num_cases = 0;
        for case in cases() {
            let Some(needles) = RulerTask::by_name(case["task"].as_str().unwrap()).and_then(shape) else { continue };
            let places = case["places"].as_array().unwrap();
            let draw = Draw {
                pieces: strings(&case["pieces"]),
                needles: strings(&case["needles"]),
                places: places.iter().map(|place| usize::try_from(place.as_u64().unwrap()).unwrap()).collect(),
                queries: strings(&case["keys"]),
                answers: strings(&case["answers"]),
            };
            assert_eq!(needles.put_into_words(draw), expected(&case), "{}", case["task"]);
            num_cases += 1;
        }
        assert_eq!(num_cases, 8);
    }

    #[test]
    fn what_is_asked_for_stands_in_the_text() {
        let (words, prose) = (Vocabulary::new(), ["One", "two.", "Three", "four", "five!", "Six", "seven."]);
        for task in RulerTask::ALL {
            let Some(needles) = shape(task) else { continue };
            for seed in 0..5 {
                let make = |size| needles.prompt(&words, &prose, size, &mut StdRng::seed_from_u64(seed));
                let prompt = make(60);
                assert_eq!(prompt, make(60));
                assert_eq!(prompt.answers.len(), needles.num_queries * needles.values_per_key);
                for answer in &prompt.answers {
                    assert_eq!(prompt.context.matches(&format!(" is: {answer}.")).count(), 1, "{prompt:?}");
                }
                let all = prompt.context.matches("One of the special magic").count();
                let others = if needles.haystack == Haystack::Needles { 60 } else { 0 };
                assert_eq!(all, needles.num_needles() + others);
                assert!(make(needles.sizes().0).context.len() < make(60).context.len());
            }
        }
    }

    #[test]
    fn things_look_as_they_should() {
        let (words, mut random) = (Vocabulary::new(), StdRng::seed_from_u64(1));
        for _ in 0..50 {
            assert!(Thing::Numbers.draw(&words, &mut random).parse::<u32>().unwrap() >= 1_000_000);
            let uuid = Thing::Uuids.draw(&words, &mut random);
            let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12]);
            assert!(uuid[14..].starts_with('4') && "89ab".contains(&uuid[19..20]), "{uuid}");
            assert!(Thing::Words.draw(&words, &mut random).contains('-'));
        }
    }

    #[test]
    fn depths_go_from_the_start_to_the_end() {
        let places: Vec<usize> = (0..NUM_DEPTHS).map(|depth| place(depth, 100)).collect();
        assert_eq!((places[0], places[1], places[20], places[38], places[39]), (0, 3, 51, 97, 100));
        assert!(places.is_sorted());
    }
}
