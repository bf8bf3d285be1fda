//! What the commands that run a model share: threads, device, model, prompt, and a prefill that shows its progress.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use adaptive_kvcache::attention::map::MapAccumulator;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary};
use adaptive_kvcache::checkpoint::{self, Loaded};
use adaptive_kvcache::compress::{AdaptiveConfig, Budget};
use adaptive_kvcache::device::{self, DeviceMemory};
use adaptive_kvcache::generate::GenerationOptions;
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::model::{Prefill, PrefillObserver, PrefillOptions};
use adaptive_kvcache::reading::{self, MAX_TEXT};
use adaptive_kvcache::report::{ModelReport, RunReport, size};
use adaptive_kvcache::tokenizer::{ChatFormat, ChatInput, ChatMessage, ChatTemplate, messages_from_json};
use adaptive_kvcache::{Error, Result, events};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{DialogueArgs, ModelArgs, PromptArgs, Wrap};
use super::configurations::configuration;
use super::device::backend;
use super::interrupt::{interrupted, while_waiting};
use super::pictures::{MAP_SIDE, Pictures};
use super::terminal::note;
use super::threads::{self, Threads};
use super::variables;

/// What is over sooner is shown no bar for.
const BAR_AFTER: Duration = Duration::from_millis(500);

/// The built-in configuration that holds a budget if no other is named.
const BUDGET_METHOD: &str = "replay";

/// A model that is ready to run.
pub struct Session {
    pub loaded: Loaded,
    pub load_time: Duration,
    pub threads: Threads,
    pub kv_dtype: KvDtype,
    pub prefill_options: PrefillOptions,
}

impl Session {
    /// Opens the device, sets threads up and loads the model.
    pub fn open(args: &ModelArgs, kv_dtype: KvDtype) -> anyhow::Result<Self> {
        while_waiting(|| Self::load(args, kv_dtype))
    }

    fn load(args: &ModelArgs, kv_dtype: KvDtype) -> anyhow::Result<Self> {
        let backend = backend(&args.device)?;
        let threads = threads::chosen();
        // The error's own cause says the same again.
        let started = rayon::ThreadPoolBuilder::new().num_threads(threads.number).build_global();
        started.map_err(|error| anyhow::anyhow!("failed to start {} threads: {error}", threads.number))?;
        events::threads_chosen(threads.number, threads.source.name());
        let model = super::hub::local_path(&args.model)?;
        let started = Instant::now();
        let bar = progress_bar("loading");
        let mut checkpoint = checkpoint::open(&model)?;
        if let Some(tokens) = args.context.context {
            checkpoint.set_context(tokens)?;
        }
        let loaded = checkpoint.load(&backend, args.dtype.into(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        loaded.notes().for_each(note);
        let session = Self {
            loaded,
            load_time: started.elapsed(),
            threads,
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
        let model = &self.loaded.model;
        (model.ops().map_or_else(|| "cpu".to_owned(), |ops| device::name(ops.device())), model.backend())
    }

    /// How texts are generated: with a configuration, or with a full cache.
    ///
    /// * `model`: as it was named
    pub fn report(&self, model: &Path, config: Option<AdaptiveConfig>, generation: GenerationOptions) -> RunReport {
        let (device, attention) = self.device();
        RunReport {
            version: env!("CARGO_PKG_VERSION"),
            model: ModelReport::new(model, &self.loaded),
            device,
            attention,
            decoding: self.loaded.model.decoding(),
            compute: self.loaded.model.compute().map(Compute::name),
            threads: self.threads.number,
            threads_from: self.threads.source.name(),
            kv_dtype: self.kv_dtype.name(),
            adaptive: config.is_some(),
            config,
            generation,
        }
    }

    /// The device's memory, if it has its own and its driver tells.
    pub fn device_memory(&self) -> Option<DeviceMemory> {
        self.loaded.model.ops().and_then(|ops| device::memory(ops.device()))
    }

    /// Uses a chat template instead of the model's own, if there is one.
    pub fn with_chat_template(mut self, template: Option<ChatTemplate>) -> Self {
        if let Some(template) = template {
            self.loaded.tokenizer.set_chat_template(template);
        }
        self
    }

    /// Whether prompts are wrapped in the chat template. Where that is left to the model, it is as in llama.cpp's `llama-cli`:
    /// if there is a template of its own.
    pub fn wraps(&self, wrap: Wrap) -> bool {
        match wrap {
            Wrap::Never => false,
            Wrap::Always => true,
            Wrap::Auto => self.loaded.tokenizer.chat_format() == ChatFormat::Own,
        }
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

    /// Processes a prompt behind what a cache holds.
    pub fn prefill(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        pictures: Option<&Pictures>,
    ) -> Result<(Prefill, Duration)> {
        let mut observer = Observer::new(pictures);
        let started = Instant::now();
        self.loaded.model.make_positions(cache, ids.len())?;
        let prefill = self.loaded.model.prefill_with(ids, cache, self.prefill_options, &mut observer);
        let time = started.elapsed();
        observer.finish();
        Ok((prefill?, time))
    }
}

impl DialogueArgs {
    /// Whether a prompt becomes a message without being one of a file's.
    pub fn asks_for_chat(&self) -> bool {
        self.system.is_some() || self.chat_template.is_some()
    }

    /// The chat template that is to be used, if it is not the model's own.
    pub fn template(&self) -> Result<Option<ChatTemplate>> {
        self.chat_template.as_deref().map(ChatTemplate::from_file).transpose()
    }
}

impl PromptArgs {
    /// As [`DialogueArgs::template`], once it is known that there is an answer to go on with where one is asked for.
    pub fn template(&self) -> Result<Option<ChatTemplate>> {
        if self.go_on && self.dialogue.messages.is_none() {
            return Err(Error::input("--continue goes on with the last answer of a conversation, and none is given")
                .with_hint("give one with --messages"));
        }
        self.dialogue.template()
    }
}

/// What a conversation begins with: messages, and what else the chat template is told.
pub fn opening(args: &DialogueArgs) -> Result<ChatInput> {
    let mut input = match args.messages.as_deref() {
        None => ChatInput::default(),
        Some(path) if path.as_os_str() == "-" => {
            ChatInput::from_json(read_text(path, "read messages")?.as_bytes(), path)?
        }
        Some(path) => messages_from_json(path)?,
    };
    if let (Some(path), false) = (&args.messages, input.unread.is_empty()) {
        let keys: Vec<_> = input.unread.iter().map(|key| format!("`{key}`")).collect();
        note(format_args!("`{}`: not used: {}", path.display(), keys.join(", ")));
    }
    if let Some(system) = &args.system {
        if input.messages.first().is_some_and(|message| message.role() == "system") {
            return Err(Error::input("both --system and the file of --messages give a system message"));
        }
        input.messages.insert(0, ChatMessage::new("system", system));
    }
    Ok(input)
}

/// Reads the configuration, or takes the defaults, and sets the budget if one is given. A budget needs a method that has
/// one: where no configuration is named on the command line, that is [`BUDGET_METHOD`], and a note says so.
pub fn config(path: Option<&Path>, budget: Option<Budget>) -> Result<AdaptiveConfig> {
    let config = path.map_or_else(|| Ok(AdaptiveConfig::default()), AdaptiveConfig::from_file)?;
    let Some(budget) = budget else { return Ok(config) };
    if config.budgeted().is_some() {
        return config.with_budget(budget);
    }
    let option = format!("--{}", budget.key().replace('_', "-"));
    let method = match path {
        None => format!("{option} is held by the method `{BUDGET_METHOD}`"),
        Some(_) if variables::gave("config") => {
            format!("the configuration of the variable CONFIG has no budget; {option} is held by `{BUDGET_METHOD}`")
        }
        Some(path) => {
            let reason =
                format!("{option}: the method `{}` of `{}` has no budget", config.method_name(), path.display());
            return Err(Error::input(reason).with_hint(format!(
                "leave --config out, and `{BUDGET_METHOD}` holds the budget; or name a configuration whose `method` has one, \
                 such as configs/best.json"
            )));
        }
    };
    note(method);
    configuration(BUDGET_METHOD)?.unwrap_or_default().with_budget(budget)
}

/// Says so if a prompt takes more than its budget: a head keeps a position at least, whatever that comes to.
///
/// * `kept_bytes`: what is kept of the prompt
pub fn note_budget(config: &AdaptiveConfig, kept_bytes: usize) {
    if let Some(Budget::Bytes(budget)) = config.budget()
        && kept_bytes > budget
    {
        let (kept, budget) = (size(kept_bytes), size(budget));
        note(format_args!("{kept} are kept, more than the budget of {budget}: every head keeps at least one position"));
    }
}

/// Tokens in a second; 0 for no time.
pub fn per_second(tokens: usize, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let tokens = tokens as f64;
    if time.is_zero() { 0.0 } else { tokens / time.as_secs_f64() }
}

/// Reads a text, of standard input if the path is `-`.
///
/// * `action`: a verb phrase for messages
pub fn read_text(path: &Path, action: &'static str) -> Result<String> {
    // A pipe may have no writer yet.
    while_waiting(|| {
        if path.as_os_str() == "-" {
            reading::text_of(std::io::stdin(), path, action, MAX_TEXT)
        } else {
            reading::text(path, action, MAX_TEXT)
        }
    })
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

/// Shows the progress of a prefill and draws its pictures.
pub struct Observer<'a> {
    /// Absent for short prompts, and as long as it is not known how long it is.
    bar: Option<ProgressBar>,
    started: Instant,
    pictures: Option<&'a Pictures>,
}

impl<'a> Observer<'a> {
    pub fn new(pictures: Option<&'a Pictures>) -> Self {
        Self { bar: None, started: Instant::now(), pictures }
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
        // Where all layers are done at the same time, many pictures follow one another.
        if self.pictures.is_some() && interrupted() {
            return Err(Error::Interrupted);
        }
        match (self.pictures, maps) {
            (Some(pictures), Some(maps)) => pictures.layer(summary, maps),
            _ => Ok(()),
        }
    }
}
