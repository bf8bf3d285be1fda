//! Facts hidden in prose, asked for when the prose has been compressed without knowing the question.
//!
//! The answers are the model's own, greedy. How often the full cache finds the fact is measured beside, on the same
//! texts and questions: what a small model does not know anyway says nothing about its cache.

mod ask;
mod facts;
mod filler;
mod reworded;

use super::metrics::mean;
use super::{Observer, Row, Subject, TaskRow, Variant, go_on};
use crate::error::{Error, Result};
use ask::{Outcome, Trial};
use filler::Filler;
pub(super) use filler::sentences_of;

/// Tokens that a question and its answer may take, at most.
const ROOM_FOR_ANSWER: usize = 128;

/// What is asked of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A five-digit number stands in one sentence of the prose.
    Passkey,
    /// A fact of another kind stands at each depth of the same prose; all are asked for, each on a fork of the same
    /// compressed cache.
    MultiQuestion,
    /// A number is told in one turn of a conversation, of which every turn is profiled and compressed on top of what was
    /// kept before, and is asked for in the last.
    MultiTurn,
    /// What is said of somebody is asked for in other words, and the prose says the same of others, and other things of
    /// the same one.
    Reworded,
}

impl Task {
    pub const ALL: [Self; 4] = [Self::Passkey, Self::MultiQuestion, Self::MultiTurn, Self::Reworded];

    /// The name in options, tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::MultiQuestion => "multi-question",
            Self::MultiTurn => "multi-turn",
            Self::Reworded => "reworded",
        }
    }

    /// The task of a name.
    ///
    /// `None` if there is none.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }
}

/// Which tasks, on which texts.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskPlan {
    pub tasks: Vec<Task>,
    /// Tokens of the text before the question, at most; a conversation's are approximate.
    pub contexts: Vec<usize>,
    /// Where the fact stands, as a share of the text, in 0..=1.
    pub depths: Vec<f64>,
    /// Texts for each task, context and depth; one text of `multi-question` serves all depths.
    pub trials: usize,
    /// Of the texts, the places where the prose begins, and the numbers.
    pub seed: u64,
}

impl TaskPlan {
    /// Finds out whether a model can do it.
    ///
    /// # Errors
    /// [`Error::Input`] for no trials, a depth outside 0..=1, too many depths, a context that the model has not got, or a conversation
    /// with a model that has no chat format.
    pub fn check(&self, subject: &Subject<'_>) -> Result<()> {
        let limit = subject.model.config().context_length;
        let depth = self.depths.iter().find(|depth| !(0.0..=1.0).contains(*depth));
        if let Some(depth) = depth {
            return Err(Error::input(format!("a depth of `{depth}`")).with_hint("depths are in 0..=1"));
        }
        let num_depths = self.depths.len();
        if self.tasks.contains(&Task::MultiQuestion) && num_depths > facts::NUM_KINDS {
            let reason = format!("`multi-question` at {num_depths} depths: it has only {} facts", facts::NUM_KINDS);
            return Err(Error::input(reason).with_hint("give fewer --depths"));
        }
        if self.trials == 0 {
            return Err(Error::input("`0` trials").with_hint("ask for at least one"));
        }
        if let Some(context) = self.contexts.iter().find(|context| context.saturating_add(ROOM_FOR_ANSWER) > limit) {
            let reason = format!(
                "{context} tokens and {ROOM_FOR_ANSWER} for an answer are above the model's context of {limit}"
            );
            return Err(Error::input(reason).with_hint("shorten the longest of --contexts"));
        }
        if self.tasks.contains(&Task::MultiTurn) && !ask::can_chat(subject) {
            return Err(Error::input("the task `multi-turn` needs a chat template, and the model has none")
                .with_hint("use an instruction-tuned model, or other --tasks"));
        }
        Ok(())
    }
}

/// Goes through the tasks; for each context and depth every variant has a row.
///
/// * `prose`: text in which facts are hidden, repeated if it is too short
///
/// # Errors
/// As [`TaskPlan::check`]; [`Error::Input`] also if a context has no room for its facts; [`Error::Interrupted`] if the
/// observer says so; whatever the model or the observer fails with.
pub fn tasks(
    subject: &Subject<'_>,
    prose: &str,
    plan: &TaskPlan,
    variants: &[Variant],
    observer: &mut dyn Observer,
) -> Result<()> {
    plan.check(subject)?;
    let filler = Filler::new(subject.tokenizer, prose)?;
    let mut num_rows = 0;
    for &task in &plan.tasks {
        for &context in &plan.contexts {
            // All depths of several questions are in one text.
            let groups: Vec<&[f64]> = match task {
                Task::MultiQuestion => vec![&plan.depths],
                Task::Passkey | Task::MultiTurn | Task::Reworded => plan.depths.chunks(1).collect(),
            };
            for depths in groups {
                let cell = Cell { subject, filler: &filler, plan, task, context, depths };
                for row in cell.measure(variants, observer)? {
                    observer.row(num_rows, Row::Task(row), true)?;
                    num_rows += 1;
                }
            }
        }
    }
    Ok(())
}

/// Texts of one task, length and set of depths.
struct Cell<'a> {
    subject: &'a Subject<'a>,
    filler: &'a Filler,
    plan: &'a TaskPlan,
    task: Task,
    context: usize,
    depths: &'a [f64],
}

impl Cell<'_> {
    /// One row for each depth and variant.
    fn measure(&self, variants: &[Variant], observer: &mut dyn Observer) -> Result<Vec<TaskRow>> {
        let Self { subject, plan, task, context, .. } = *self;
        // No room is made beforehand: the user may ask for any number.
        let mut full: Vec<Outcome> = Vec::new();
        let mut compressed: Vec<Vec<Outcome>> = vec![Vec::new(); variants.len()];
        for trial in 0..plan.trials {
            let name = |what: &str| {
                format!("{}, {context} tokens, {what}: trial {} of {}", task.name(), trial + 1, plan.trials)
            };
            let (known, answered) = self.trial(trial)?.answer(subject, variants, &name, observer)?;
            for (outcomes, outcome) in compressed.iter_mut().zip(answered) {
                outcomes.push(outcome);
            }
            full.push(known);
        }
        let mut rows = Vec::with_capacity(self.depths.len() * variants.len());
        for (depth_idx, &depth) in self.depths.iter().enumerate() {
            let (accuracy_full, trials) = accuracy(&full, depth_idx);
            for (variant, outcomes) in variants.iter().zip(&compressed) {
                let average = |value: fn(&Outcome) -> f64| mean(&outcomes.iter().map(value).collect::<Vec<_>>());
                #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let kv_bytes = average(|outcome| outcome.kv_bytes as f64).round() as usize;
                rows.push(TaskRow {
                    task: task.name(),
                    config: variant.config.clone(),
                    context,
                    depth,
                    accuracy: accuracy(outcomes, depth_idx).0,
                    accuracy_full,
                    trials,
                    kv_dtype: variant.kv_dtype.name(),
                    budget: variant.budget,
                    kept_ratio: average(|outcome| outcome.kept_ratio),
                    kv_bytes,
                });
            }
        }
        Ok(rows)
    }

    /// The text of a trial, the same for every variant.
    fn trial(&self, trial: usize) -> Result<Trial> {
        let Self { subject, filler, plan, task, context, depths } = *self;
        let mut seed = plan.seed ^ (trial as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15); // spreads small numbers
        for part in [context as u64, task as u64, depths[0].to_bits()] {
            seed = seed.rotate_left(17) ^ part.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        match task {
            Task::Passkey => facts::passkey(subject, filler, context, depths, seed),
            Task::MultiQuestion => facts::multi_question(subject, filler, context, depths, seed),
            Task::Reworded => reworded::reworded(subject, filler, context, depths, seed),
            Task::MultiTurn => Ok(facts::multi_turn(filler, context, depths, seed)),
        }
    }
}

/// Share of right answers to the questions of a depth, and how many were asked.
#[expect(clippy::cast_precision_loss)]
fn accuracy(outcomes: &[Outcome], depth_idx: usize) -> (f64, usize) {
    let answers = || outcomes.iter().flat_map(|outcome| &outcome.right).filter(|(depth, _)| *depth == depth_idx);
    let asked = answers().count();
    (answers().filter(|(_, right)| *right).count() as f64 / asked.max(1) as f64, asked)
}
