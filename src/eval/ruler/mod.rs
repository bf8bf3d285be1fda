//! RULER's eleven synthetic tasks (Hsieh et al., COLM 2024, arXiv 2404.06654; github.com/hsiehjackson/RULER), word for word,
//! in kvpress's protocol: the text is compressed before the question is known, every cache answers greedily, and positions
//! go on at the text's full length.
//!
//! The draws are this program's own: a seed gives other words and numbers than it does there. A text fills the length that
//! is asked for as far as whole pieces do, while the generators stop up to 500 words before.
//!
//! Not for: the tasks of `super::tasks`, whose wording is made for the smallest models.

mod counting;
mod needles;
mod prompt;
mod tracking;
mod vocabulary;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::forks::{Asked, fill_all};
use super::metrics::{Interval, mean, paired_difference};
use super::{Observer, Row, RulerRow, Subject, Variant};
use crate::error::{Error, Result};
use needles::{Haystack, Needles, Thing};
use prompt::{Prompt, PromptIds, largest_fitting};
use tracking::Chain;
use vocabulary::Vocabulary;

/// A task that the full cache itself fails: its mean score is below.
pub const PASS_SCORE: f64 = 0.3;

/// The name in rows of the mean over tasks.
pub const MEAN_NAME: &str = "mean";

/// What is asked of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RulerTask {
    /// One needle in repeated noise.
    NiahSingle1,
    /// One needle in prose.
    NiahSingle2,
    /// One needle in prose, whose value is a UUID.
    NiahSingle3,
    /// One of four needles in prose.
    NiahMultikey1,
    /// One needle among nothing but needles.
    NiahMultikey2,
    /// One needle among nothing but needles, whose keys and values are UUIDs.
    NiahMultikey3,
    /// Four needles of one key in prose.
    NiahMultivalue,
    /// Four needles in prose, all asked for.
    NiahMultiquery,
    /// Variables that are assigned to one another.
    Vt,
    /// The ten most common words of a list.
    Cwe,
    /// The three most frequent words of a coded text.
    Fwe,
}

impl RulerTask {
    pub const ALL: [Self; 11] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
    ];

    /// The name in options, tables and files, which is RULER's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::Vt => "vt",
            Self::Cwe => "cwe",
            Self::Fwe => "fwe",
        }
    }

    /// The task of a name; `None` if there is none.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Tokens of an answer, at most.
    #[must_use]
    pub fn answer_tokens(self) -> usize {
        match self {
            Self::Vt => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            _ => 128,
        }
    }

    /// The haystack of a needle task.
    fn needles(self) -> Option<Needles> {
        let one =
            |haystack, key, value| Needles { haystack, key, value, num_keys: 1, values_per_key: 1, num_queries: 1 };
        let in_prose = one(Haystack::Essay, Thing::Words, Thing::Numbers);
        Some(match self {
            Self::NiahSingle1 => one(Haystack::Noise, Thing::Words, Thing::Numbers),
            Self::NiahSingle2 => in_prose,
            Self::NiahSingle3 => one(Haystack::Essay, Thing::Words, Thing::Uuids),
            Self::NiahMultikey1 => Needles { num_keys: 4, ..in_prose },
            Self::NiahMultikey2 => one(Haystack::Needles, Thing::Words, Thing::Numbers),
            Self::NiahMultikey3 => one(Haystack::Needles, Thing::Uuids, Thing::Uuids),
            Self::NiahMultivalue => Needles { values_per_key: 4, ..in_prose },
            Self::NiahMultiquery => Needles { num_keys: 4, num_queries: 4, ..in_prose },
            Self::Vt | Self::Cwe | Self::Fwe => return None,
        })
    }
}

/// Which tasks, on how many texts of which lengths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulerPlan {
    pub tasks: Vec<RulerTask>,
    /// Tokens of a prompt and its answer together, at most.
    pub lengths: Vec<usize>,
    /// Texts for each task and length, at least 1.
    pub samples: usize,
    /// Of all that is drawn.
    pub seed: u64,
}

impl RulerPlan {
    /// Finds out whether a model can do it.
    ///
    /// # Errors
    /// [`Error::Input`] for no samples, or a length above the model's context.
    pub fn check(&self, subject: &Subject<'_>) -> Result<()> {
        if self.samples == 0 {
            return Err(Error::input("`0` samples").with_hint("ask for at least one"));
        }
        let limit = subject.model.config().context_length;
        if let Some(length) = self.lengths.iter().find(|&&length| length > limit) {
            let reason = format!("{length} tokens are above the model's context of {limit}");
            return Err(Error::input(reason).with_hint("shorten the longest of --contexts"));
        }
        Ok(())
    }
}

/// Goes through the lengths and tasks; for each every variant has a row, which is handed over again after each sample. At
/// the end of a length every variant has a row of the mean over those tasks that the full cache passes, if it passes more
/// than one.
///
/// * `prose`: text in which needles are hidden, from its beginning, repeated if it is too short
///
/// # Errors
/// As [`RulerPlan::check`]; [`Error::Input`] also if a length has no room for a task, or there is no prose;
/// [`Error::Interrupted`] if the observer says so; whatever the model or the observer fails with.
pub fn ruler(
    subject: &Subject<'_>,
    prose: &str,
    plan: &RulerPlan,
    variants: &[Variant],
    observer: &mut dyn Observer,
) -> Result<()> {
    plan.check(subject)?;
    let words = Vocabulary::new();
    let prose: Vec<&str> = prose.split_whitespace().collect();
    if prose.is_empty() {
        let error = Error::input("the text to hide needles in is empty");
        return Err(error.with_hint("give a file with prose as --text"));
    }
    let mut num_rows = 0;
    for &length in &plan.lengths {
        let maker = Maker { subject, words: &words, prose: &prose, length };
        let mut passed: Vec<Scores> = Vec::new();
        for &task in &plan.tasks {
            let mut scores = Scores::new(variants.len());
            for sample in 0..plan.samples {
                let name = format!("{}, {length} tokens: sample {} of {}", task.name(), sample + 1, plan.samples);
                observer.starts(&name);
                let made = maker.make(task, plan.seed, sample);
                let (prompt, ids) = made.map_err(|error| error.in_place(|| name.clone()))?;
                let measured = scores.measure(subject, task, (&prompt, &ids, &name), variants, observer);
                measured.map_err(|error| error.in_place(|| name))?;
                for (index, variant) in variants.iter().enumerate() {
                    let row = scores.row(task.name(), length, variant, index);
                    observer.row(num_rows + index, Row::Ruler(row), sample + 1 == plan.samples)?;
                }
            }
            num_rows += variants.len();
            if mean(&scores.full.score) >= PASS_SCORE {
                passed.push(scores);
            }
        }
        if let [first, second, others @ ..] = &passed[..] {
            let over_tasks = others.iter().fold(first.plus(second), |sum, scores| sum.plus(scores));
            for (index, variant) in variants.iter().enumerate() {
                let row = over_tasks.row(MEAN_NAME, length, variant, index);
                observer.row(num_rows + index, Row::Ruler(row), true)?;
            }
            num_rows += variants.len();
        }
    }
    Ok(())
}

/// Makes prompts of a length.
struct Maker<'a> {
    subject: &'a Subject<'a>,
    words: &'a Vocabulary,
    /// Words, at least one.
    prose: &'a [&'a str],
    length: usize,
}

impl Maker<'_> {
    /// The prompt of a sample, the longest that fits.
    fn make(&self, task: RulerTask, seed: u64, sample: usize) -> Result<(Prompt, PromptIds)> {
        let example = if task == RulerTask::Vt { self.example(seed)? } else { String::new() };
        let seed = mixed(seed, &[self.length as u64, task as u64, sample as u64]);
        let sizes = match (task.needles(), task) {
            (Some(needles), _) => needles.sizes(),
            (None, RulerTask::Cwe) => counting::list_sizes(self.words.all()),
            (None, RulerTask::Fwe) => counting::CODED_SIZES,
            (None, _) => (1, usize::MAX / 4),
        };
        // Whatever the size, keys and values are the same.
        let make = |size| {
            let mut random = StdRng::seed_from_u64(seed);
            match (task.needles(), task) {
                (Some(needles), _) => needles.prompt(self.words, self.prose, size, &mut random),
                (None, RulerTask::Cwe) => counting::common_words(self.words.all(), self.length, size, &mut random),
                (None, RulerTask::Fwe) => counting::frequent_words(self.length, size, &mut random),
                (None, _) => Chain::draw(false, size, &mut random).prompt(&example),
            }
        };
        let room = self.length.saturating_sub(task.answer_tokens());
        let size = largest_fitting(sizes, |size| Ok(make(size).encode(self.subject)?.len() <= room))?;
        let size = size.ok_or_else(|| self.no_room(task))?;
        let prompt = make(size);
        let ids = prompt.encode(self.subject)?;
        Ok((prompt, ids))
    }

    /// The solved example of `vt`, the same for all samples of a length.
    fn example(&self, seed: u64) -> Result<String> {
        let seed = mixed(seed, &[self.length as u64, u64::MAX]);
        let make = |size| Chain::draw(true, size, &mut StdRng::seed_from_u64(seed)).example();
        let room = tracking::EXAMPLE_TOKENS.min(self.length / 2);
        let fits = |size| Ok(self.subject.tokenizer.encode_plain(&make(size))?.len() <= room);
        let size = largest_fitting((1, usize::MAX / 4), fits)?.ok_or_else(|| self.no_room(RulerTask::Vt))?;
        Ok(make(size))
    }

    fn no_room(&self, task: RulerTask) -> Error {
        let reason = format!("a length of {} tokens has no room for `{}`", self.length, task.name());
        Error::input(reason).with_hint("raise the smallest of --contexts")
    }
}

/// A seed of several numbers.
fn mixed(seed: u64, parts: &[u64]) -> u64 {
    let spread = |number: u64| number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    parts.iter().fold(seed, |seed, &part| spread(seed.rotate_left(17) ^ spread(part)))
}

/// What the samples gave for one cache.
#[derive(Debug, Clone, Default)]
struct CacheScores {
    /// `[samples]`
    score: Vec<f64>,
    /// `[samples]`
    kept_ratio: Vec<f64>,
    /// `[samples]`
    kv_bytes: Vec<f64>,
    /// `[samples]`
    answers: Vec<String>,
}

/// What the samples gave, so far.
#[derive(Debug, Clone)]
struct Scores {
    full: CacheScores,
    /// `[variants]`
    compressed: Vec<CacheScores>,
    /// `[samples]`
    expected: Vec<Vec<String>>,
    /// Tasks that are summed up.
    num_tasks: usize,
}

impl Scores {
    fn new(num_variants: usize) -> Self {
        let none = CacheScores::default();
        Self { full: none.clone(), compressed: vec![none; num_variants], expected: Vec::new(), num_tasks: 1 }
    }

    /// Adds a sample.
    ///
    /// * `place`: which one it is, for people
    fn measure(
        &mut self,
        subject: &Subject<'_>,
        task: RulerTask,
        (prompt, ids, place): (&Prompt, &PromptIds, &str),
        variants: &[Variant],
        observer: &dyn Observer,
    ) -> Result<()> {
        let asked = Asked {
            question: &ids.question,
            max_tokens: task.answer_tokens(),
            is_enough: &|text| prompt.score(text) >= 1.0,
        };
        fill_all(subject, &ids.context, variants, observer, |which, filled| {
            let kept: Vec<(f64, usize)> =
                filled.iter().map(|filled| (filled.cache.kept_ratio(), filled.cache.bytes().kept)).collect();
            let names = which.iter().map(|index| index.map_or("full cache".to_owned(), |index| variants[index].name()));
            let names: Vec<String> = names.map(|name| format!("{place}, {name}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let texts = asked.answers(subject, filled, &names, observer)?;
            for ((index, text), (kept_ratio, kv_bytes)) in which.into_iter().zip(texts).zip(kept) {
                let scores = index.map_or(&mut self.full, |index| &mut self.compressed[index]);
                scores.score.push(prompt.score(&text));
                scores.kept_ratio.push(kept_ratio);
                #[expect(clippy::cast_precision_loss)]
                scores.kv_bytes.push(kv_bytes as f64);
                scores.answers.push(text);
            }
            Ok(())
        })?;
        for (variant, scores) in variants.iter().zip(&mut self.compressed) {
            if variant.is_full(subject.full_kv_dtype) {
                *scores = self.full.clone();
            }
        }
        self.expected.push(prompt.answers.clone());
        Ok(())
    }

    /// Samples of two tasks put together one by one.
    fn plus(&self, other: &Self) -> Self {
        let add = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect();
        let add = |a: &CacheScores, b: &CacheScores| CacheScores {
            score: add(&a.score, &b.score),
            kept_ratio: add(&a.kept_ratio, &b.kept_ratio),
            kv_bytes: add(&a.kv_bytes, &b.kv_bytes),
            answers: Vec::new(),
        };
        Self {
            full: add(&self.full, &other.full),
            compressed: self.compressed.iter().zip(&other.compressed).map(|(a, b)| add(a, b)).collect(),
            expected: Vec::new(),
            num_tasks: self.num_tasks + other.num_tasks,
        }
    }

    /// * `index`: of the variant
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn row(&self, task: &'static str, length: usize, variant: &Variant, index: usize) -> RulerRow {
        let scores = &self.compressed[index];
        let count = self.num_tasks as f64;
        let shared = |values: &[f64]| values.iter().map(|value| value / count).collect::<Vec<_>>();
        let (score, score_full) = (shared(&scores.score), shared(&self.full.score));
        let Interval { mean: difference, half_width } = paired_difference(&score, &score_full);
        RulerRow {
            task,
            config: variant.config.clone(),
            context: length,
            score: mean(&score),
            score_full: mean(&score_full),
            difference,
            difference_95: half_width,
            full_fails: mean(&score_full) < PASS_SCORE,
            samples: score.len(),
            num_tasks: self.num_tasks,
            kv_dtype: variant.kv_dtype.name(),
            budget: variant.budget,
            kept_ratio: mean(&shared(&scores.kept_ratio)),
            kv_bytes: mean(&shared(&scores.kv_bytes)).round() as usize,
            score_by_sample: score,
            score_full_by_sample: score_full,
            expected: self.expected.clone(),
            answers: scores.answers.clone(),
            answers_full: self.full.answers.clone(),
        }
    }
}

#[cfg(test)]
mod expected {
    //! Prompts by RULER's own generators; `tests/data/ruler/make.py` made them.

    use serde_json::Value;

    use super::prompt::Prompt;

    pub fn cases() -> Vec<Value> {
        serde_json::from_str(include_str!("../../../tests/data/ruler/expected.json")).unwrap()
    }

    /// A case in parts.
    pub fn expected(case: &Value) -> Prompt {
        let text = |key: &str| case[key].as_str().unwrap().to_owned();
        Prompt {
            context: text("context"),
            question: text("question"),
            answer_prefix: text("answer_prefix"),
            answers: strings(&case["answers"]),
        }
    }

    pub fn strings(list: &Value) -> Vec<String> {
        list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    }

    pub fn number(value: &Value) -> usize {
        usize::try_from(value.as_u64().unwrap()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_have_their_names_and_lengths() {
        for task in RulerTask::ALL {
            assert_eq!(RulerTask::by_name(task.name()), Some(task));
        }
        assert_eq!(RulerTask::by_name("qa_1"), None);
        let tokens = [RulerTask::NiahMultiquery, RulerTask::Vt, RulerTask::Cwe, RulerTask::Fwe];
        assert_eq!(tokens.map(RulerTask::answer_tokens), [128, 30, 120, 50]);
    }

    #[test]
    fn seeds_differ_where_anything_does() {
        let mut seeds = Vec::new();
        for seed in 0..3 {
            for length in [2048, 4096] {
                for task in RulerTask::ALL {
                    seeds.extend((0..3).map(|sample| mixed(seed, &[length, task as u64, sample])));
                }
            }
        }
        let count = seeds.len();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), count);
    }

    #[test]
    fn the_mean_over_tasks_is_paired_by_sample() {
        let scores = |full: [f64; 2], compressed: [f64; 2]| {
            let cache = |score: [f64; 2]| CacheScores {
                score: score.to_vec(),
                kept_ratio: vec![0.5; 2],
                kv_bytes: vec![100.0; 2],
                answers: vec![String::new(); 2],
            };
            Scores {
                full: cache(full),
                compressed: vec![cache(compressed)],
                expected: vec![Vec::new(); 2],
                num_tasks: 1,
            }
        };
        let both = scores([1.0, 1.0], [1.0, 0.0]).plus(&scores([0.5, 1.0], [0.5, 1.0]));
        let variant = Variant {
            config: "a".to_owned(),
            budget: None,
            kv_dtype: crate::cache::KvDtype::F16,
            retention: crate::cache::Retention::Full,
        };
        let row = both.row(MEAN_NAME, 64, &variant, 0);
        assert_eq!((row.score_by_sample, row.score_full_by_sample), (vec![0.75, 0.5], vec![0.75, 1.0]));
        assert_eq!((row.difference, row.num_tasks, row.kv_bytes, row.full_fails), (-0.25, 2, 100, false));
        // Differences of 0 and -0.5: a standard error of 0.25, and Student's 12.706 with one degree of freedom.
        assert!((row.difference_95.unwrap() - 0.25 * 12.706).abs() < 1e-3);
    }
}
