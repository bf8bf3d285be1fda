//! A fact that is asked for in other words than it was told in, among near ones.
//!
//! The question shares no word with what is told but small ones, so that nothing is found by repetition; and who looks only
//! for the kind of fact, or only for the person, finds others, too.

use rand::rngs::StdRng;
use rand::seq::{SliceRandom, index};
use rand::{Rng, SeedableRng};

use super::ask::{Question, Trial};
use super::facts::{Fact, hide};
use super::filler::Filler;
use crate::error::Result;
use crate::eval::Subject;

const INTRO: &str = "There are several facts about people of a town hidden in a lot of irrelevant text. Find them and memorize \
                     them.";

/// People, as they are told of and as they are asked for.
const PEOPLE: [(&str, &str); 8] = [
    ("baker", "makes bread"),
    ("fisherman", "catches trout and salmon"),
    ("tailor", "sews clothes"),
    ("carpenter", "builds tables and chairs"),
    ("shepherd", "looks after the sheep"),
    ("dentist", "takes care of teeth"),
    ("librarian", "lends out books"),
    ("florist", "sells roses and tulips"),
];

/// Kinds of facts: how they are told and asked, with `{who}` and `{what}` for the person and the answer, and what answers
/// there are.
const KINDS: [(&str, &str, [&str; 6]); 4] = [
    (
        "The {who} moved to {what} last spring.",
        "In which city is the home of the person who {who} now?",
        ["Lisbon", "Vienna", "Madrid", "Prague", "Oslo", "Athens"],
    ),
    (
        "The {who} keeps a {what} in the yard.",
        "Which pet does the person who {who} have?",
        ["tiger", "rabbit", "dolphin", "camel", "fox", "goat"],
    ),
    (
        "The {who} had {what} for supper.",
        "What did the person who {who} eat in the evening?",
        ["banana", "cherry", "lemon", "peach", "mango", "grape"],
    ),
    (
        "The {who} painted the front door {what}.",
        "What is the colour of the entrance to the house of the person who {who}?",
        ["green", "purple", "orange", "yellow", "red", "blue"],
    ),
];

/// Others of whom the same kind of fact is told.
const NEAR_PEOPLE: usize = 3;
/// Other facts that are told of the same person.
const NEAR_FACTS: usize = 2;

/// One fact at a depth, and near ones anywhere.
pub(super) fn reworded(
    subject: &Subject<'_>,
    filler: &Filler,
    context: usize,
    depths: &[f64],
    seed: u64,
) -> Result<Trial> {
    let mut random = StdRng::seed_from_u64(seed);
    let (needle, near, question) = draw(&mut random);
    let mut facts = vec![Fact { depth: depths[0], sentence: needle }];
    facts.extend(near.into_iter().map(|sentence| Fact { depth: random.random_range(0.0..=1.0), sentence }));
    hide(subject, filler, context, INTRO, &facts, vec![question], &mut random)
}

/// What is told and asked for, what is told besides, and the question.
fn draw(random: &mut StdRng) -> (String, Vec<String>, Question) {
    let people = index::sample(random, PEOPLE.len(), 1 + NEAR_PEOPLE).into_vec();
    let kinds = index::sample(random, KINDS.len(), 1 + NEAR_FACTS).into_vec();
    let told = |person: usize, kind: usize, answer: &str| {
        KINDS[kind].0.replace("{who}", PEOPLE[person].0).replace("{what}", answer)
    };
    let (person, kind) = (people[0], kinds[0]);
    let mut answers = KINDS[kind].2;
    answers.shuffle(random);
    let mut near: Vec<String> =
        people[1..].iter().zip(&answers[1..]).map(|(&other, answer)| told(other, kind, answer)).collect();
    for &other in &kinds[1..] {
        let answers = KINDS[other].2;
        near.push(told(person, other, answers[random.random_range(0..answers.len())]));
    }
    let asked = KINDS[kind].1.replace("{who}", PEOPLE[person].1);
    let question =
        Question { depth_idx: 0, text: format!("{asked} Answer with one word."), answer: answers[0].to_owned() };
    (told(person, kind, answers[0]), near, question)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_told_once_and_in_other_words() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let (needle, near, question) = draw(&mut random);
            assert_eq!(near.len(), NEAR_PEOPLE + NEAR_FACTS);
            assert!(needle.contains(&question.answer), "{needle}");
            let words = |text: &str| {
                let words = text.split(|c: char| !c.is_alphabetic()).map(str::to_lowercase);
                words.filter(|word| word.len() > 3).collect::<Vec<_>>()
            };
            let asked = words(&question.text);
            assert!(words(&needle).iter().all(|word| !asked.contains(word)), "{needle} {}", question.text);
            // The person and the kind of fact are each told of elsewhere, but not together.
            let who = needle.split(' ').nth(1).unwrap();
            let kind = needle.split(' ').nth(2).unwrap();
            let of = |fact: &&String| (fact.contains(&format!(" {who} ")), fact.contains(&format!(" {kind} ")));
            assert_eq!(near.iter().filter(|fact| of(fact) == (true, false)).count(), NEAR_FACTS, "{near:?}");
            assert_eq!(near.iter().filter(|fact| of(fact) == (false, true)).count(), NEAR_PEOPLE, "{near:?}");
            assert!(near.iter().all(|fact| !fact.contains(&question.answer)), "{near:?}");
        }
    }
}
