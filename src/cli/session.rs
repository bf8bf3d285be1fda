//! What the commands that run a model share: threads, device, model, prompt, and a prefill that shows its progress.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adaptive_kvcache::attention::map::MapAccumulator;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, Retention};
use adaptive_kvcache::checkpoint::{self, Loaded};
use adaptive_kvcache::config::{AdaptiveConfig, Budget, TokenIds};
use adaptive_kvcache::device::{self, DeviceMemory};
use adaptive_kvcache::model::{Prefill, PrefillObserver, PrefillOptions};
use adaptive_kvcache::profile::Profiler;
use adaptive_kvcache::reading::{self, MAX_TEXT};
use adaptive_kvcache::report::log_lines;
use adaptive_kvcache::tokenizer::{ChatFormat, ChatMessage, Tokenizer, messages_from_json};
use adaptive_kvcache::tokens::TokenClassifier;
use adaptive_kvcache::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{DialogueArgs, ModelArgs, PromptArgs};
use super::device::backend;
use super::interrupt::{interrupted, while_waiting};
use super::pictures::{MAP_SIDE, Pictures};
use super::terminal::note;
use super::threads;

/// What is over sooner is shown no bar for.
const BAR_AFTER: Duration = Duration::from_millis(500);

/// A model that is ready to run.
pub struct Session {
    pub loaded: Loaded,
    pub load_time: Duration,
    pub threads: usize,
    pub kv_dtype: KvDtype,
    pub prefill_options: PrefillOptions,
}

impl Session {
    /// Opens the device, sets threads up and loads the model.
    pub fn open(args: &ModelArgs) -> anyhow::Result<Self> {
        let backend = backend(&args.device)?;
        let threads = threads::number(args.threads);
        // The error's own cause says the same again.
        let started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        started.map_err(|error| anyhow::anyhow!("failed to start {threads} threads: {error}"))?;
        let model = super::hub::local_path(&args.model)?;
        let started = Instant::now();
        let bar = progress_bar("loading");
        let loaded = checkpoint::load_for(&backend, &model, args.dtype.into(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let kv_dtype = KvDtype::from(args.kv_dtype);
        let session = Self {
            loaded,
            load_time: started.elapsed(),
            threads: rayon::current_num_threads(),
            kv_dtype,
            prefill_options: PrefillOptions { chunk: args.prefill_chunk },
        };
        session.check_kv_dtype(kv_dtype)?;
        Ok(session)
    }

    /// Checks that a cache of this model can be stored so.
    ///
    /// # Errors
    /// As [`KvDtype::check`], and [`KvDtype::tensor_dtype`] where tensors hold the cache.
    pub fn check_kv_dtype(&self, dtype: KvDtype) -> Result<()> {
        let model = &self.loaded.model;
        model.ops().map_or(Ok(()), |_| dtype.tensor_dtype().map(drop))?;
        dtype.check(model.config().heads.head_dim)
    }

    /// The device's name, and what computes, for reports.
    pub fn device(&self) -> (String, &'static str) {
        match self.loaded.model.ops() {
            Some(ops) => (device::name(ops.device()), "candle"),
            None => ("cpu".to_owned(), "cpu"),
        }
    }

    /// The device's memory, if it has its own and its driver tells.
    pub fn device_memory(&self) -> Option<DeviceMemory> {
        self.loaded.model.ops().and_then(|ops| device::memory(ops.device()))
    }

    /// Token ids of the prompt.
    pub fn encode(&self, args: &PromptArgs) -> Result<Vec<u32>> {
        let tokenizer = &self.loaded.tokenizer;
        let mut messages = opening(&args.dialogue)?;
        let ids = if args.dialogue.messages.is_some() {
            self.announce_chat_format()?;
            tokenizer.encode_chat(&messages)?
        } else if args.chat || args.dialogue.system.is_some() {
            self.announce_chat_format()?;
            let text = prompt_text(args)?;
            tokenizer.check_length(&text)?;
            messages.push(ChatMessage::new("user", text));
            tokenizer.encode_chat(&messages)?
        } else {
            tokenizer.encode(&prompt_text(args)?)?
        };
        if ids.is_empty() {
            return Err(Error::input("the prompt is empty").with_hint("give some text with --prompt or --prompt-file"));
        }
        Ok(ids)
    }

    /// Says which chat format is used, if it is not the model's own.
    ///
    /// # Errors
    /// [`Error::Input`] if there is none.
    pub fn announce_chat_format(&self) -> Result<()> {
        match self.loaded.tokenizer.chat_format() {
            ChatFormat::Own => Ok(()),
            ChatFormat::BuiltIn(name) => {
                note(format_args!(
                    "the model brings no chat template, so the format `{name}` is used, which fits its tokens"
                ));
                Ok(())
            }
            ChatFormat::None => Err(Error::input("the model has no chat template")
                .with_hint("give the text as a raw prompt with `generate`, or use an instruction-tuned model")),
        }
    }

    /// What an adaptive cache of this model keeps under a configuration.
    pub fn adaptive(&self, config: AdaptiveConfig) -> Retention {
        let classifier = classifier(&config, &self.loaded.tokenizer);
        Retention::Adaptive { profiler: Profiler::new(Arc::new(config)), classifier }
    }

    /// Processes a prompt into a new cache.
    ///
    /// * `log`: write each head's choice to the log
    pub fn prefill(
        &self,
        ids: &[u32],
        retention: Retention,
        log: bool,
        pictures: Option<&Pictures>,
    ) -> Result<(AdaptiveKvCache, Prefill, Duration)> {
        let mut cache = self.loaded.model.new_cache(self.kv_dtype, retention)?;
        let config = match cache.retention() {
            Retention::Adaptive { profiler, .. } if log => Some(profiler.config().clone()),
            _ => None,
        };
        let mut observer = Observer::new(config, pictures);
        let started = Instant::now();
        let prefill = self.loaded.model.prefill_with(ids, &mut cache, self.prefill_options, &mut observer);
        let time = started.elapsed();
        observer.finish();
        Ok((cache, prefill?, time))
    }
}

/// The messages that a conversation begins with.
pub fn opening(args: &DialogueArgs) -> Result<Vec<ChatMessage>> {
    let mut messages = args.messages.as_ref().map_or_else(|| Ok(Vec::new()), messages_from_json)?;
    if let Some(system) = &args.system {
        if messages.first().is_some_and(|message| message.role == "system") {
            return Err(Error::input("both --system and the file of --messages give a system message"));
        }
        messages.insert(0, ChatMessage::new("system", system));
    }
    Ok(messages)
}

/// Reads the configuration, or takes the defaults, and sets the budget if one is given.
pub fn config(path: Option<&Path>, budget: Option<Budget>) -> Result<AdaptiveConfig> {
    let config = path.map_or_else(|| Ok(AdaptiveConfig::default()), AdaptiveConfig::from_file)?;
    match budget {
        Some(budget) => config.with_budget(budget),
        None => Ok(config),
    }
}

/// Tokens in a second; 0 for no time.
pub fn per_second(tokens: usize, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let tokens = tokens as f64;
    if time.is_zero() { 0.0 } else { tokens / time.as_secs_f64() }
}

fn prompt_text(args: &PromptArgs) -> Result<String> {
    let Some(path) = &args.prompt_file else { return Ok(args.prompt.clone()) };
    // A pipe may have no writer yet.
    while_waiting(|| {
        if path.as_os_str() == "-" {
            reading::text_of(std::io::stdin(), path, "read prompt", MAX_TEXT)
        } else {
            reading::text(path, "read prompt", MAX_TEXT)
        }
    })
}

fn classifier(config: &AdaptiveConfig, tokenizer: &Tokenizer) -> TokenClassifier {
    let special = match &config.special_token_ids {
        TokenIds::Auto => tokenizer.special_ids().to_vec(),
        TokenIds::List(ids) => ids.clone(),
    };
    let punctuation = match &config.punctuation_token_ids {
        TokenIds::Auto => tokenizer.punctuation_ids(&config.punctuation_list),
        TokenIds::List(ids) => ids.clone(),
    };
    TokenClassifier::new(special, punctuation)
}

/// A bar on standard error if that is a terminal, else nothing.
fn progress_bar(what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {percent}%") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Shows the progress of a prefill, writes its choices to the log and draws its pictures.
pub struct Observer<'a> {
    /// Absent for short prompts, and as long as it is not known how long it is.
    bar: Option<ProgressBar>,
    started: Instant,
    /// Present if choices are logged.
    config: Option<AdaptiveConfig>,
    pictures: Option<&'a Pictures>,
}

impl<'a> Observer<'a> {
    /// * `config`: present if choices are logged
    pub fn new(config: Option<AdaptiveConfig>, pictures: Option<&'a Pictures>) -> Self {
        Self { bar: None, started: Instant::now(), config, pictures }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl PrefillObserver for Observer<'_> {
    fn progress(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        if self.started.elapsed() >= BAR_AFTER {
            let bar = self.bar.get_or_insert_with(|| progress_bar("reading the prompt"));
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        }
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn map_side(&self) -> Option<usize> {
        self.pictures.map(|_| MAP_SIDE)
    }

    fn layer_done(&mut self, summary: &LayerSummary, maps: Option<&MapAccumulator>) -> Result<()> {
        if let Some(config) = &self.config {
            for line in log_lines(summary, config) {
                tracing::info!("{line}");
            }
        }
        match (self.pictures, maps) {
            (Some(pictures), Some(maps)) => pictures.layer(summary, maps),
            _ => Ok(()),
        }
    }
}
