//! What a smaller cache costs, measured on text: how far the next tokens' distributions move ([`fidelity()`]), whether
//! facts of the text are still known ([`tasks()`], and RULER's, [`ruler()`]), and how prompts are answered ([`answers()`]).
//!
//! All compress with a [`Variant`] and hand over a [`Row`] for each, in the order of the plan; a fidelity row is handed
//! over again, more exact, after each further window, and one of RULER's after each sample. Not for: time or memory ([`crate::bench`]).

mod answers;
mod fidelity;
mod forks;
mod metrics;
mod rows;
mod ruler;
mod tasks;

use std::ops::ControlFlow;

pub use answers::{AnswerPlan, AnswerPrompt, answers};
pub use fidelity::{
    ALL_TEXTS, FidelityPlan, FidelityText, FullScores, POSITIONS_PER_BUCKET, PROFILE_RATIO, TOKENS_PER_ROW,
    WritingPlan, fidelity, head_profile,
};
pub use metrics::{Interval, mean, paired_difference, percentile, perplexity, standard_error, student_975};
pub use rows::{AnswerRow, FidelityRow, GivenBudget, Row, RulerRow, TaskRow, WritingRow, write_csv, write_json};
pub use ruler::{MEAN_NAME, PASS_SCORE, RulerPlan, RulerTask, ruler};
pub use tasks::{Task, TaskPlan, tasks};

use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::model::{Llama, PrefillObserver, PrefillOptions};
use crate::tokenizer::Tokenizer;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub model: &'a Llama,
    pub tokenizer: &'a Tokenizer,
    /// How prompts are read.
    pub prefill_options: PrefillOptions,
    /// Numbers of the full cache that everything is compared with.
    pub full_kv_dtype: KvDtype,
}

/// One way to keep a cache, set against the full one.
#[derive(Debug, Clone)]
pub struct Variant {
    /// `full`, or the configuration as the user named it.
    pub config: String,
    /// The budget that the configuration was given, if any.
    pub budget: Option<GivenBudget>,
    pub kv_dtype: KvDtype,
    pub retention: Retention,
}

impl Variant {
    /// What it is called, for people.
    fn name(&self) -> String {
        format!("{}, {}", self.config, self.kv_dtype.name())
    }

    /// Whether it is what all are compared with.
    fn is_full(&self, full_kv_dtype: KvDtype) -> bool {
        matches!(self.retention, Retention::Full) && self.kv_dtype == full_kv_dtype
    }
}

/// Is told what goes on, and may end it.
pub trait Progress {
    /// Called before each piece of work; `what` is for people.
    fn starts(&mut self, _what: &str) {}

    /// Asked every so often. `true` ends the measurements with [`Error::Interrupted`].
    fn is_over(&self) -> bool {
        false
    }
}

/// Is given rows.
pub trait Observer: Progress {
    /// Called with a row, whenever it is measured or becomes more exact.
    ///
    /// * `index`: its place among the rows of this plan: the next one, or one that was handed over before
    /// * `is_complete`: whether this is the last time
    ///
    /// # Errors
    /// Whatever the observer's own work fails with; it ends the measurements.
    fn row(&mut self, index: usize, row: Row, is_complete: bool) -> Result<()>;
}

/// Ends a prefill when the measurements are to end.
struct Watch<'a>(&'a dyn Progress);

impl PrefillObserver for Watch<'_> {
    fn progress(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        if self.0.is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A cache that holds a prompt, and the logits `[vocab_size]` of the next token.
#[derive(Debug, Clone)]
struct Filled {
    cache: AdaptiveKvCache,
    logits: Vec<f32>,
}

/// What a cache holds when the prompt was read.
#[derive(Debug, Clone, Copy)]
struct CacheStart {
    mean_rows: f64,
    seen: usize,
}

/// What it holds when more tokens were read.
#[derive(Debug, Clone, Copy, Default)]
struct CacheEnd {
    kept_ratio: f64,
    kv_bytes: usize,
    /// Rows that went since the prompt, the mean over heads.
    evicted_rows: f64,
}

impl CacheStart {
    fn of(cache: &AdaptiveKvCache) -> Self {
        Self { mean_rows: cache.mean_rows(), seen: cache.seen() }
    }

    #[expect(clippy::cast_precision_loss)]
    fn end(self, cache: &AdaptiveKvCache) -> CacheEnd {
        let with_all = self.mean_rows + (cache.seen() - self.seen) as f64;
        CacheEnd {
            kept_ratio: cache.kept_ratio(),
            kv_bytes: cache.bytes().kept,
            evicted_rows: with_all - cache.mean_rows(),
        }
    }
}

impl Subject<'_> {
    /// Reads a prompt into a new cache.
    fn fill(&self, ids: &[u32], kv_dtype: KvDtype, retention: &Retention, progress: &dyn Progress) -> Result<Filled> {
        let mut cache = self.model.new_cache(kv_dtype, retention.clone())?;
        let prefill = self.model.prefill_with(ids, &mut cache, self.prefill_options, &mut Watch(progress))?;
        Ok(Filled { cache, logits: prefill.logits })
    }
}

/// [`Error::Interrupted`] if the measurements are to end.
fn go_on(progress: &dyn Progress) -> Result<()> {
    if progress.is_over() { Err(Error::Interrupted) } else { Ok(()) }
}
