//! Going through the cases of a plan.

use std::ops::ControlFlow;

use super::read_loop::read_rate;
use super::row::{Reading, Row, Work};
use super::threads::with_threads;
use super::times::{Spread, timed};
use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::generate::{Sampler, SamplingOptions};
use crate::memory;
use crate::model::{Llama, PrefillObserver, PrefillOptions};

/// Prompt tokens of a prefill that only warms up: what a first run pays for (weights read from disk, threads started) it
/// pays within so many.
const WARM_UP_TOKENS: usize = 512;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub model: &'a Llama,
    /// Ids, at least as many as the longest prompt of the plan; each case takes the first ones.
    pub prompt: &'a [u32],
    /// Bytes of the weights that decoding one token reads.
    pub decode_bytes: usize,
    /// How prompts are read.
    pub prefill_options: PrefillOptions,
}

/// One way to keep a cache.
#[derive(Debug, Clone)]
pub struct Setting {
    /// What rows call it.
    pub name: String,
    pub retention: Retention,
}

/// What is to be measured: every setting in every KV dtype, at every length, on every number of threads.
#[derive(Debug, Clone)]
pub struct Plan {
    pub threads: Vec<usize>,
    pub settings: Vec<Setting>,
    pub kv_dtypes: Vec<KvDtype>,
    /// Tokens of an earlier turn that every cache holds before the prompt, read while nothing is timed.
    pub past: usize,
    /// Prompt lengths after which decoding is timed.
    pub contexts: Vec<usize>,
    /// Prompt lengths whose prefill is timed.
    pub prefill: Vec<usize>,
    /// Tokens that one run decodes, at least 1.
    pub new_tokens: usize,
    /// Timed runs, at least 1.
    pub runs: usize,
    /// Runs before them that are not timed.
    pub warmup: usize,
}

impl Plan {
    /// Prompt lengths of all cases, ascending.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths = [&self.contexts[..], &self.prefill].concat();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Tokens of the text that are read, at most.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.lengths().last().map_or(0, |longest| self.past.saturating_add(*longest))
    }

    /// Finds out whether a model can do it.
    ///
    /// # Errors
    /// [`Error::Input`] for a length of 0, no runs or no tokens, or more tokens than the model's context.
    pub fn check(&self, context_length: usize) -> Result<()> {
        if self.runs == 0 || self.new_tokens == 0 || self.lengths().first() == Some(&0) {
            return Err(Error::input("a length, a number of runs or a number of new tokens is `0`")
                .with_hint("give numbers of at least 1"));
        }
        let too_long = |what: String| {
            let reason = format!("{what} are more than the model's context of {context_length}");
            Err(Error::input(reason).with_hint("shorten the longest of --contexts and --prefill"))
        };
        let (new, past) = (self.new_tokens, self.past);
        let earlier = if past > 0 { format!("{past} tokens of an earlier turn, ") } else { String::new() };
        match (self.contexts.iter().max(), self.prefill.iter().max()) {
            (Some(context), _) if past.saturating_add(*context).saturating_add(new) > context_length => {
                too_long(format!("{earlier}a prompt of {context} tokens and {new} new ones"))
            }
            (_, Some(&prefill)) if past.saturating_add(prefill) > context_length => {
                too_long(format!("{earlier}{prefill} tokens"))
            }
            _ => Ok(()),
        }
    }
}

/// Is told what goes on, and may end it.
pub trait Observer: Send {
    /// Called before each run; `what` is for people.
    fn starts(&mut self, _what: &str) {}

    /// Called for each number of threads with what a plain loop reads, in 1e9 bytes a second.
    fn read_rate(&mut self, _threads: usize, _gb_per_s: f64) {}

    /// Called with each case's result.
    ///
    /// # Errors
    /// Whatever the observer's own work fails with; it ends the measurements.
    fn row(&mut self, row: Row) -> Result<()>;

    /// Asked after each round of runs, and while prompts are read. `true` ends the measurements; the cases under way end
    /// with the runs they have.
    fn is_over(&self) -> bool {
        false
    }
}

/// Ends a prefill when the measurements are to end.
struct Watch<'a>(&'a dyn Observer);

impl PrefillObserver for Watch<'_> {
    fn progress(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        if self.0.is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Measures all cases of a plan.
///
/// At each length, the settings and dtypes take turns: run 1 of each, then run 2 of each, and so on. Before decoding, a
/// prompt is processed once for each; every run decodes greedily on a fork of that cache. While a length is measured, the
/// caches of all settings and dtypes are held.
///
/// # Errors
/// As [`Plan::check`] and [`with_threads`]; [`Error::Input`] if the subject's prompt is too short; whatever the model
/// or the observer fails with.
pub fn run(subject: Subject<'_>, plan: &Plan, clock: &dyn Clock, observer: &mut dyn Observer) -> Result<()> {
    plan.check(subject.model.config().context_length)?;
    let longest = plan.tokens();
    if subject.prompt.len() < longest {
        return Err(Error::input(format!("the text has {} tokens, not {longest}", subject.prompt.len())));
    }
    for &threads in &plan.threads {
        observer.starts(&format!("reading memory with {threads} threads"));
        let loop_gb_per_s = read_rate(threads)?;
        if observer.is_over() {
            return Ok(());
        }
        observer.read_rate(threads, loop_gb_per_s);
        for context in plan.lengths() {
            let stage = Stage { subject, plan, clock, threads, loop_gb_per_s, context };
            with_threads(threads, || stage.measure(observer))??;
            if observer.is_over() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// All cases of one prompt length on one number of threads.
struct Stage<'a> {
    subject: Subject<'a>,
    plan: &'a Plan,
    clock: &'a dyn Clock,
    threads: usize,
    loop_gb_per_s: f64,
    context: usize,
}

/// One setting in one KV dtype, and what was measured of it.
struct Variant<'a> {
    setting: &'a Setting,
    kv_dtype: KvDtype,
    /// The cache after the earlier turn, if there is one.
    past: Option<AdaptiveKvCache>,
    /// The cache right after the prompt, as long as it is needed.
    filled: Option<Filled>,
    kept_ratio: f64,
    kv_bytes: usize,
    prefill: Samples,
    decode: Samples,
    /// Bytes of kept keys and values, summed up over the decoded tokens.
    kv_bytes_read: usize,
}

/// A cache that holds a prompt, and the logits of the next token.
struct Filled {
    cache: AdaptiveKvCache,
    logits: Vec<f32>,
}

/// What the runs of a case gave.
#[derive(Default)]
struct Samples {
    times_ms: Vec<f64>,
    runs: usize,
    peak_rss_bytes: usize,
}

impl Stage<'_> {
    fn measure(&self, observer: &mut dyn Observer) -> Result<()> {
        let Plan { settings, kv_dtypes, .. } = self.plan;
        let pairs = kv_dtypes.iter().flat_map(|&kv_dtype| settings.iter().map(move |setting| (setting, kv_dtype)));
        let mut variants: Vec<Variant<'_>> = pairs.map(|(setting, kv_dtype)| Variant::new(setting, kv_dtype)).collect();
        if self.plan.past > 0 && !self.read_past(&mut variants, observer)? {
            return Ok(());
        }
        self.prefill(&mut variants, observer)?;
        if self.plan.contexts.contains(&self.context) && !observer.is_over() {
            self.decode(&mut variants, observer)?;
        }
        Ok(())
    }

    /// Fills the variants' caches with an earlier turn; whether all of it was read.
    fn read_past(&self, variants: &mut [Variant<'_>], observer: &mut dyn Observer) -> Result<bool> {
        let Subject { model, prompt, prefill_options, .. } = self.subject;
        for variant in variants {
            let what = format!("the earlier turn, {}, {}", variant.setting.name, variant.kv_dtype.name());
            observer.starts(&what);
            let mut cache = model.new_cache(variant.kv_dtype, variant.setting.retention.clone())?;
            let past = &prompt[..self.plan.past];
            match model.prefill_with(past, &mut cache, prefill_options, &mut Watch(observer)) {
                Err(Error::Interrupted) => return Ok(false),
                read => read.map_err(|error| error.in_place(|| what))?,
            };
            variant.past = Some(cache);
        }
        Ok(true)
    }

    /// Processes the prompt for each variant, several times if that is to be timed.
    fn prefill(&self, variants: &mut [Variant<'_>], observer: &mut dyn Observer) -> Result<()> {
        let is_timed = self.plan.prefill.contains(&self.context);
        let needs_cache = self.plan.contexts.contains(&self.context);
        let (warmup, runs) = if is_timed { (self.plan.warmup, self.plan.runs) } else { (0, 1) };
        'runs: for run in 0..warmup + runs {
            let is_warm_up = run < warmup;
            let len = if is_warm_up { self.context.min(WARM_UP_TOKENS) } else { self.context };
            for index in 0..variants.len() {
                variants[index].filled = None;
                let waiting = waiting_bytes(variants);
                let variant = &mut variants[index];
                let what = self.describe(Work::Prefill, variant, run, warmup, runs);
                observer.starts(&what);
                let mut cache = match &variant.past {
                    Some(past) => past.clone(),
                    None => self.subject.model.new_cache(variant.kv_dtype, variant.setting.retention.clone())?,
                };
                memory::release_unused();
                memory::reset_peak();
                let prompt = &self.subject.prompt[self.plan.past..][..len];
                let Subject { model, prefill_options, .. } = self.subject;
                let (prefill, time_ms) =
                    timed(self.clock, || model.prefill_with(prompt, &mut cache, prefill_options, &mut Watch(observer)));
                let logits = match prefill {
                    Err(Error::Interrupted) => break 'runs,
                    prefill => prefill.map_err(|error| error.in_place(|| what))?.logits,
                };
                if is_warm_up {
                    continue;
                }
                variant.prefill.add(&[time_ms], waiting);
                variant.kept_ratio = cache.kept_ratio();
                variant.kv_bytes = cache.bytes().kept;
                variant.filled = needs_cache.then_some(Filled { cache, logits });
            }
            if observer.is_over() {
                break;
            }
        }
        if is_timed { self.report(Work::Prefill, variants, observer) } else { Ok(()) }
    }

    /// Decodes on forks of the variants' caches.
    fn decode(&self, variants: &mut [Variant<'_>], observer: &mut dyn Observer) -> Result<()> {
        let Plan { warmup, runs, new_tokens, .. } = *self.plan;
        'runs: for run in 0..warmup + runs {
            let waiting = waiting_bytes(variants);
            for variant in &mut *variants {
                let what = self.describe(Work::Decode, variant, run, warmup, runs);
                observer.starts(&what);
                let Some(filled) = &variant.filled else { continue };
                memory::release_unused();
                let mut fork = filled.cache.clone();
                memory::reset_peak();
                let mut sampler = Sampler::new(SamplingOptions::default(), &[]);
                let mut id = sampler.sample(&filled.logits)?;
                let mut times_ms = Vec::with_capacity(new_tokens);
                let mut kv_bytes_read = 0;
                for _ in 0..new_tokens {
                    let (logits, time_ms) = timed(self.clock, || self.subject.model.decode(id, &mut fork));
                    let logits = match logits {
                        Err(Error::Interrupted) => break 'runs,
                        logits => logits.map_err(|error| error.in_place(|| what.clone()))?,
                    };
                    id = sampler.sample(&logits)?;
                    times_ms.push(time_ms);
                    kv_bytes_read += fork.bytes().kept;
                }
                if run >= warmup {
                    variant.decode.add(&times_ms, waiting);
                    variant.kv_bytes_read += kv_bytes_read;
                }
            }
            if observer.is_over() {
                break;
            }
        }
        self.report(Work::Decode, variants, observer)
    }

    /// Hands over the rows of the variants that were timed at least once.
    fn report(&self, work: Work, variants: &[Variant<'_>], observer: &mut dyn Observer) -> Result<()> {
        for variant in variants {
            let samples = match work {
                Work::Prefill => &variant.prefill,
                Work::Decode => &variant.decode,
            };
            let Some(times) = Spread::of(&samples.times_ms) else { continue };
            let reading = (work == Work::Decode).then(|| {
                let bytes = self.subject.decode_bytes + variant.kv_bytes_read / samples.times_ms.len();
                Reading::new(bytes, times.median_ms, self.loop_gb_per_s)
            });
            #[expect(clippy::cast_precision_loss)]
            let tokens_in_time = if work == Work::Prefill { self.context as f64 } else { 1.0 };
            observer.row(Row {
                work,
                past: self.plan.past,
                context: self.context,
                threads: self.threads,
                setting: variant.setting.name.clone(),
                kv_dtype: variant.kv_dtype.name(),
                tokens_per_s: tokens_in_time * 1e3 / times.median_ms,
                times,
                runs: samples.runs,
                kept_ratio: variant.kept_ratio,
                kv_bytes: variant.kv_bytes,
                peak_rss_bytes: samples.peak_rss_bytes,
                reading,
            })?;
        }
        Ok(())
    }

    fn describe(&self, work: Work, variant: &Variant<'_>, run: usize, warmup: usize, runs: usize) -> String {
        let run = if run < warmup { "warm-up".to_owned() } else { format!("run {} of {runs}", run - warmup + 1) };
        let Variant { setting, kv_dtype, .. } = variant;
        let Self { context, threads, .. } = self;
        let (work, kv_dtype) = (work.name(), kv_dtype.name());
        format!("{work}, {context} tokens, {threads} threads, {}, {kv_dtype}: {run}", setting.name)
    }
}

impl<'a> Variant<'a> {
    fn new(setting: &'a Setting, kv_dtype: KvDtype) -> Self {
        Self {
            setting,
            kv_dtype,
            past: None,
            filled: None,
            kept_ratio: 1.0,
            kv_bytes: 0,
            prefill: Samples::default(),
            decode: Samples::default(),
            kv_bytes_read: 0,
        }
    }
}

impl Samples {
    /// Takes in a run that has just ended.
    ///
    /// * `waiting`: bytes that are held and are no part of the run
    fn add(&mut self, times_ms: &[f64], waiting: usize) {
        let peak = memory::process_memory().unwrap_or_default().peak;
        self.times_ms.extend_from_slice(times_ms);
        self.runs += 1;
        self.peak_rss_bytes = self.peak_rss_bytes.max(peak.saturating_sub(waiting));
    }
}

/// Bytes of the caches that wait for their turn.
fn waiting_bytes(variants: &[Variant<'_>]) -> usize {
    let filled = variants.iter().filter_map(|variant| variant.filled.as_ref()).map(|filled| &filled.cache);
    let past = variants.iter().filter_map(|variant| variant.past.as_ref());
    filled.chain(past).map(|cache| cache.bytes().allocated).sum()
}
