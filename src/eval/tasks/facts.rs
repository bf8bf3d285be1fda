//! The texts: which facts are hidden where, and how they are asked for.
//!
//! The wording is one with which SmolLM2-135M-Instruct, the smallest of its family, finds a single number in up to 2,048
//! tokens with the full cache: it is told that there is something to find, the number stands twice in its sentence, and
//! the question says where the number is from and how to answer. Several facts are of different kinds, since of several
//! people's numbers it mixes up whose is whose. In conversations it says again what it said last, unless that was short:
//! so the turns between ask for a yes or a no.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::ask::{Question, Trial, prompt_len};
use super::filler::Filler;
use crate::error::{Error, Result};
use crate::eval::Subject;

const PASSKEY_INTRO: &str = "There is an important number hidden in a lot of irrelevant text. Find it and memorize it.";
const FACTS_INTRO: &str =
    "There are several important facts hidden in a lot of irrelevant text. Find them and memorize them.";

/// Kinds of facts, and what may be told of each.
const KINDS: [(&str, [&str; 6]); NUM_KINDS] = [
    ("city", ["Lisbon", "Vienna", "Madrid", "Prague", "Oslo", "Athens"]),
    ("colour", ["green", "purple", "orange", "yellow", "red", "blue"]),
    ("animal", ["elephant", "tiger", "rabbit", "dolphin", "camel", "fox"]),
    ("fruit", ["banana", "cherry", "lemon", "peach", "mango", "grape"]),
    ("metal", ["copper", "silver", "iron", "tin", "gold", "zinc"]),
    ("number", ["27461", "90358", "61847", "35192", "48270", "73906"]),
];

/// The most facts that one text can hide.
pub(super) const NUM_KINDS: usize = 6;

/// Tokens that a turn of filler takes, its answer and the template's markers included, about.
const TURN_TOKENS: usize = 140;
/// Those of them that are prose.
const TURN_PROSE_TOKENS: usize = 100;

/// A sentence to hide.
pub(super) struct Fact {
    /// Share of the sentences before it.
    pub depth: f64,
    pub sentence: String,
}

/// One five-digit number.
pub(super) fn passkey(
    subject: &Subject<'_>,
    filler: &Filler,
    context: usize,
    depths: &[f64],
    seed: u64,
) -> Result<Trial> {
    let mut random = StdRng::seed_from_u64(seed);
    let key = random.random_range(10_000..100_000).to_string();
    let sentence = format!("The secret number is {key}. Remember it: {key} is the secret number.");
    let question = Question {
        depth_idx: 0,
        text: "What is the secret number mentioned in the text above? Answer with the number only.".to_owned(),
        answer: key,
    };
    let fact = Fact { depth: depths[0], sentence };
    hide(subject, filler, context, PASSKEY_INTRO, &[fact], vec![question], &mut random)
}

/// One fact at each depth, each of another kind.
///
/// * `depths`: at most [`NUM_KINDS`]
pub(super) fn multi_question(
    subject: &Subject<'_>,
    filler: &Filler,
    context: usize,
    depths: &[f64],
    seed: u64,
) -> Result<Trial> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut kinds = KINDS;
    kinds.shuffle(&mut random);
    let (mut facts, mut questions) = (Vec::new(), Vec::new());
    for ((depth_idx, &depth), (kind, values)) in depths.iter().enumerate().zip(kinds) {
        let value = values[random.random_range(0..values.len())];
        let sentence = format!("The secret {kind} is {value}. Remember it: {value} is the secret {kind}.");
        facts.push(Fact { depth, sentence });
        let text = format!("What is the secret {kind} mentioned in the text above? Answer with the {kind} only.");
        questions.push(Question { depth_idx, text, answer: value.to_owned() });
    }
    hide(subject, filler, context, FACTS_INTRO, &facts, questions, &mut random)
}

/// Turns of filler, one turn that tells a number, and the question.
pub(super) fn multi_turn(filler: &Filler, context: usize, depths: &[f64], seed: u64) -> Trial {
    let mut random = StdRng::seed_from_u64(seed);
    let key = random.random_range(10_000..100_000).to_string();
    let num_fillers = (context / TURN_TOKENS).max(1);
    let mut turns: Vec<String> = (0..num_fillers)
        .map(|_| {
            let prose = filler.take(random.random_range(0..usize::MAX), TURN_PROSE_TOKENS).join(" ");
            format!("{prose}\n\nIs this text about a man? Answer with yes or no.")
        })
        .collect();
    let fact =
        format!("The secret number is {key}. Remember it: {key} is the secret number. What is the secret number?");
    turns.insert(place(depths[0], num_fillers), fact);
    let text = "What is the secret number mentioned above? Answer with the number only.".to_owned();
    Trial::Conversation { turns, question: Question { depth_idx: 0, text, answer: key } }
}

/// Hides facts in as much prose as there is room for.
pub(super) fn hide(
    subject: &Subject<'_>,
    filler: &Filler,
    context: usize,
    intro: &str,
    facts: &[Fact],
    questions: Vec<Question>,
    random: &mut StdRng,
) -> Result<Trial> {
    let mut body: Vec<&str> = facts.iter().map(|fact| fact.sentence.as_str()).collect();
    let needed = prompt_len(subject, &format!("{intro}\n\n{}", body.join(" ")))?;
    let Some(room) = context.checked_sub(needed) else {
        let reason = format!("a context of {context} tokens has no room for facts of {needed} tokens");
        return Err(Error::input(reason).with_hint("raise the smallest of --contexts, or give fewer --depths"));
    };
    body = filler.take(random.random_range(0..usize::MAX), room);
    let num_sentences = body.len();
    // From the last: places of those before stay as they are.
    let mut order: Vec<&Fact> = facts.iter().collect();
    order.sort_by(|a, b| b.depth.total_cmp(&a.depth));
    for fact in order {
        body.insert(place(fact.depth, num_sentences), &fact.sentence);
    }
    Ok(Trial::Text { text: format!("{intro}\n\n{}", body.join(" ")), questions })
}

/// How many of `count` pieces come before a depth.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn place(depth: f64, count: usize) -> usize {
    ((depth * count as f64) as usize).min(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_are_places() {
        assert_eq!((place(0.0, 5), place(0.5, 5), place(0.99, 5), place(1.0, 5), place(0.5, 0)), (0, 2, 4, 5, 0));
    }
}
