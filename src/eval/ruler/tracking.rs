//! Variables that are assigned to one another: RULER's task `vt`, of one chain of four hops (Hsieh et al., 2024, section
//! 3.2), behind a solved example.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::index;

use super::needles::NOISE;
use super::prompt::Prompt;
use super::vocabulary::letters;

/// Variables of a chain.
const NUM_NAMES: usize = 5;
const NAME_LETTERS: usize = 5;
const EXAMPLE_NAME_LETTERS: usize = 3;

/// Tokens that the example and its answer may take, at most.
pub(super) const EXAMPLE_TOKENS: usize = 500;

const INTRO: &str = "Memorize and track the chain(s) of variable assignment hidden in the following text.";

/// All that chance decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    /// `[NUM_NAMES]`
    names: Vec<String>,
    value: String,
    /// Times that the noise stands there.
    num_noises: usize,
    /// `[NUM_NAMES]` how many pieces of noise come before each assignment, ascending.
    places: Vec<usize>,
}

impl Chain {
    /// * `num_noises`: at least 1
    pub(super) fn draw(is_example: bool, num_noises: usize, random: &mut StdRng) -> Self {
        let num_letters = if is_example { EXAMPLE_NAME_LETTERS } else { NAME_LETTERS };
        let mut names: Vec<String> = Vec::new();
        while names.len() < NUM_NAMES {
            let name = letters(b'A', num_letters, random);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let value = random.random_range(10_000..99_999).to_string();
        let mut places = index::sample(random, pieces(num_noises).len(), NUM_NAMES).into_vec();
        places.sort_unstable();
        Self { names, value, num_noises, places }
    }

    fn context(&self) -> String {
        let Self { names, value, num_noises, places } = self;
        let mut assigned = vec![format!("VAR {} = {value}", names[0])];
        assigned.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
        let mut sentences = pieces(*num_noises);
        for (index, (place, assignment)) in places.iter().zip(assigned).enumerate() {
            sentences.insert(place + index, assignment);
        }
        sentences.join(" ").replace(". \n", ".\n")
    }

    fn answer_prefix(&self) -> String {
        format!(
            "Answer: According to the chain(s) of variable assignment in the text above, {NUM_NAMES} variables are assgined \
             the value {}, they are: ",
            self.value
        )
    }

    /// The example with its answer: RULER makes it of the same sentences, but for line breaks and the question's last word.
    pub(super) fn example(&self) -> String {
        let Self { value, names, .. } = self;
        let (context, prefix) = (self.context(), self.answer_prefix());
        format!(
            "{INTRO} {context} Question: Find all variables that are assigned the value {value} in the text {prefix} {}\n\n",
            names.join(" ")
        )
    }

    pub(super) fn prompt(self, example: &str) -> Prompt {
        Prompt {
            context: format!(" {example}\n\n{INTRO}\n\n{}\n", self.context()),
            question: format!(
                "Question: Find all variables that are assigned the value {} in the text above. ",
                self.value
            ),
            answer_prefix: self.answer_prefix(),
            answers: self.names,
        }
    }
}

/// What stands around the assignments: lines, or sentences where there are too few lines.
fn pieces(num_noises: usize) -> Vec<String> {
    let line = format!("{NOISE}\n");
    if num_noises > NUM_NAMES {
        return vec![line; num_noises];
    }
    let sentence = |part: &str| if part.trim().is_empty() { part.to_owned() } else { format!("{part}.") };
    let sentences: Vec<String> = line.split('.').map(sentence).collect();
    std::iter::repeat_n(sentences, num_noises).flatten().collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use serde_json::Value;

    use super::super::expected::{cases, expected, number, strings};
    use super::*;

    fn chain(drawn: &Value) -> Chain {
        let places = drawn["places"].as_array().unwrap();
        Chain {
            names: strings(&drawn["answers"]),
            value: drawn["value"].as_str().unwrap().to_owned(),
            num_noises: number(&drawn["noises"]),
            places: places.iter().map(number).collect(),
        }
    }

    #[test]
    fn the_wording_is_the_generators_own() {
        let case = cases().into_iter().find(|case| case["task"] == "vt").unwrap();
        assert_eq!(chain(&case).prompt(&chain(&case["example"]).example()), expected(&case));
    }

    #[test]
    fn chains_can_be_followed() {
        for (is_example, num_noises) in [(true, 1), (true, 5), (false, 6), (false, 40)] {
            let draw = |seed| Chain::draw(is_example, num_noises, &mut StdRng::seed_from_u64(seed));
            assert_eq!(draw(3), draw(3));
            assert_ne!(draw(3), draw(4));
            let Chain { names, value, .. } = draw(3);
            let text = draw(3).context();
            let mut at = text.find(&format!("VAR {} = {value}", names[0])).unwrap();
            for pair in names.windows(2) {
                let next = text.find(&format!("VAR {} = VAR {}", pair[1], pair[0])).unwrap();
                assert!(next > at, "{text}");
                at = next;
            }
            assert_eq!(text.matches("There and back again.").count(), num_noises, "{text}");
        }
    }
}
