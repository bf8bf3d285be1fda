//! Options of all commands, as the user writes them.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::WeightDtype;
use adaptive_kvcache::compress::{Budget, FASTGEN, parse_size};
use adaptive_kvcache::compress::{METHODS, POLICIES};
use adaptive_kvcache::generate::{GenerationOptions, SamplingOptions};
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::model::PrefillOptions;
use adaptive_kvcache::tune::Limit;
use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use rand::TryRngCore;
use rand::rngs::OsRng;

/// Tokens to generate from a prompt, if the user does not say.
pub const DEFAULT_NEW_TOKENS: usize = 128;

/// The prompt, if the user gives none.
pub const DEFAULT_PROMPT: &str = "What is the recipe of mayonnaise?";

/// Runs LLaMA models with a KV cache that keeps, for every head, only what that head attends to.
#[derive(Debug, Parser)]
#[command(version, about, after_help = policies_help(), max_term_width = 110, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generates text from a prompt
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Generate(GenerateArgs),
    /// Talks with the model, every turn on top of what the cache kept of the turns before
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Chat(ChatArgs),
    /// Runs one prompt with the full and with the adaptive cache, and says how far they agree
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Compare(CompareArgs),
    /// Measures speed and memory: prefill and decoding, with several caches, at several prompt lengths
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Bench(BenchArgs),
    /// Measures what a smaller cache costs: on text against the full cache, and in tasks
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Eval(EvalArgs),
    /// Finds the configuration that a limit on divergence or size allows, and writes it as a file
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Tune(TuneArgs),
    /// Shows what a model file holds, and what its KV cache needs at each context
    Inspect(InspectArgs),
}

fn policies_help() -> String {
    let lines: Vec<String> =
        POLICIES.iter().map(|policy| format!("  {:<12} {}", policy.name(), policy.summary())).collect();
    let methods: Vec<String> =
        METHODS.iter().map(|method| format!("  {:<18} {}", method.name(), method.summary())).collect();
    format!(
        "Policies, in their default search order (key `policies` of the configuration):\n{}\n\n\
         Methods (key `method`):\n  {FASTGEN:<18} for each head the first union of policies that recovers it; the default\n{}\n\n\
         The variable RUST_LOG shows on standard error what heads and layers keep, with every command:\n  \
         RUST_LOG=adaptive_kvcache::head=info",
        lines.join("\n"),
        methods.join("\n")
    )
}

/// Which model, and where and in which numbers it runs.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Numbers of the weight matrices: the file's own, or all converted
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Numbers of the KV cache
    #[arg(long, value_enum, default_value_t = CacheDtype::F16)]
    pub kv_dtype: CacheDtype,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// The most prompt rows that go through a layer at a time: fewer need less memory, more are faster
    #[arg(long, value_name = "N", default_value_t = PrefillOptions::DEFAULT_CHUNK)]
    pub prefill_chunk: NonZeroUsize,
}

/// How long sequences may become.
#[derive(Debug, Clone, Copy, Args)]
pub struct ContextArgs {
    /// The most tokens of a sequence [default: as the model's files say]; what a model writes beyond the length that it was
    /// made for may make no sense
    #[arg(long, value_name = "N", value_parser = positive)]
    pub context: Option<usize>,
}

/// Where a model is computed, and by what.
#[derive(Debug, Clone, Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda[:N] or metal; auto is the first GPU that this build supports, or the CPU
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// What computes: the CPU's own kernels, or candle operations on any device; auto is the first on the CPU and the
    /// second elsewhere
    #[arg(long, alias = "attention", value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,
    /// Instructions that the kernels use: portable, avx2, avx512 or vnni; for tests and measurements
    #[arg(long, value_name = "SET", hide = true)]
    pub isa: Option<InstructionSet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    Auto,
    #[value(alias = "cpu")]
    Kernels,
    Candle,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    F16,
    Bf16,
}

impl From<Dtype> for WeightDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Auto => Self::Auto,
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CacheDtype {
    F16,
    F32,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

impl From<CacheDtype> for KvDtype {
    fn from(dtype: CacheDtype) -> Self {
        match dtype {
            CacheDtype::F16 => Self::F16,
            CacheDtype::F32 => Self::F32,
            CacheDtype::Q8_0 => Self::Q8_0,
            CacheDtype::Q4_0 => Self::Q4_0,
        }
    }
}

/// What the model is given.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// The prompt; beside --messages it is the user's next turn [default: What is the recipe of mayonnaise?]
    #[arg(long, env = "PROMPT", value_name = "TEXT")]
    pub prompt: Option<String>,
    /// File to read the prompt from, instead of --prompt; `-` is standard input
    #[arg(long, value_name = "PATH")]
    pub prompt_file: Option<PathBuf>,
    /// Wrap the prompt in the model's own chat template
    #[arg(long, env = "CHAT", num_args = 0..=1, default_missing_value = "1", default_value = "0",
          value_parser = BoolishValueParser::new(), action = clap::ArgAction::Set, hide_possible_values = true, value_name = "0|1")]
    pub chat: bool,
    /// Any of them asks for the chat template, too.
    #[command(flatten)]
    pub dialogue: DialogueArgs,
    /// Go on with the assistant's message that the conversation ends with, instead of beginning a new one
    #[arg(long = "continue")]
    pub go_on: bool,
}

/// What comes before the prompt in a conversation.
#[derive(Debug, Args)]
pub struct DialogueArgs {
    /// What the model is told to be, as the chat template's system message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// JSON file of messages: `[{"role": "user", "content": "..."}]`, or an object that holds them as `messages`, perhaps
    /// with `tools`, `documents` and `chat_template_kwargs`; `-` is standard input
    #[arg(long, value_name = "PATH")]
    pub messages: Option<PathBuf>,
    /// File of a chat template (Jinja), instead of the model's own
    #[arg(long, value_name = "PATH")]
    pub chat_template: Option<PathBuf>,
}

/// How far to generate, and how tokens are drawn.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// The most tokens to generate [default: 128; in a chat, until the answer ends]
    #[arg(short = 'n', long, env = "MAX_NEW_TOKENS", value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// 0 takes the most probable token always
    #[arg(long, default_value_t = 0.0, value_parser = non_negative, value_name = "T")]
    pub temperature: f32,
    /// Draw from the K most probable tokens only; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Draw from the most probable tokens that together hold this probability
    #[arg(long, default_value_t = 1.0, value_parser = ratio, value_name = "P")]
    pub top_p: f32,
    /// Draw from tokens at least this share as probable as the best
    #[arg(long, default_value_t = 0.0, value_parser = ratio, value_name = "P")]
    pub min_p: f32,
    /// Make tokens less probable that were there lately; 1 for not
    #[arg(long, default_value_t = 1.0, value_parser = penalty, value_name = "X")]
    pub repeat_penalty: f32,
    /// How many of the latest tokens the penalty looks at
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub repeat_last_n: usize,
    /// Seed of the random numbers, to repeat a run [default: another one each time, which is told]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End where this text would begin; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArgs {
    /// Draws a seed if there is need of one that the user does not give.
    ///
    /// * `max_new_tokens`: if the user does not say
    pub fn options(&self, max_new_tokens: usize) -> Result<GenerationOptions, Error> {
        let seed = match self.seed {
            Some(seed) => seed,
            None if self.temperature > 0.0 => drawn_seed()?,
            None => 0,
        };
        Ok(GenerationOptions {
            max_new_tokens: self.max_new_tokens.unwrap_or(max_new_tokens),
            sampling: SamplingOptions {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repeat_penalty: self.repeat_penalty,
                repeat_last_n: self.repeat_last_n,
                seed,
            },
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        })
    }
}

/// A seed that nobody can foretell, short enough to be typed again.
pub fn drawn_seed() -> Result<u64, Error> {
    let drawn = OsRng.try_next_u32().map_err(|error| std::io::Error::other(error.to_string()));
    drawn.map(u64::from).map_err(|source| {
        Error::io("draw a seed from", "the operating system", source).with_hint("give one with --seed")
    })
}

fn number(text: &str, accept: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    text.parse()
        .ok()
        .filter(|&value: &f32| value.is_finite() && accept(value))
        .ok_or_else(|| format!("expected {expected}"))
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "a number of at least 0")
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&value| value > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

fn penalty(text: &str) -> Result<f32, String> {
    number(text, |value| (0.1..=10.0).contains(&value), "a number in 0.1..=10")
}

/// A share that budgets are counted in, so in f64.
fn kept_ratio(text: &str) -> Result<f64, String> {
    let ratio: Option<f64> = text.parse().ok();
    ratio.filter(|ratio| (0.0..=1.0).contains(ratio)).ok_or_else(|| "expected a number in 0..=1".to_owned())
}

fn ratio(text: &str) -> Result<f32, String> {
    number(text, |value| (0.0..=1.0).contains(&value), "a number in 0..=1")
}

fn share(text: &str, accept: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&value: &f64| accept(value)).ok_or_else(|| format!("expected a number {expected}"))
}

fn divergence(text: &str) -> Result<f64, String> {
    share(text, |value| value.is_finite() && value > 0.0, "above 0")
}

fn kept_share(text: &str) -> Result<f64, String> {
    share(text, |value| value > 0.0 && value <= 1.0, "above 0, and at most 1")
}

fn depth(text: &str) -> Result<f64, String> {
    share(text, |value| (0.0..=1.0).contains(&value), "in 0..=1")
}

/// What every run of a model needs.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Which cache is used, and where its choices are logged.
#[derive(Debug, Args)]
pub struct CacheArgs {
    /// 1: adaptive cache; 0: full cache
    #[arg(long, env = "USE_ADAKV", default_value = "1", value_parser = BoolishValueParser::new(),
          action = clap::ArgAction::Set, hide_possible_values = true, value_name = "0|1")]
    pub use_adakv: bool,
    /// Configuration of the adaptive cache (JSON) [default: the original's values]
    #[arg(long, env = "CONFIG", value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Log that each head's choice is appended to; its folder is made if missing [default: logs/test.log]
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
}

impl CacheArgs {
    /// Where the log is, whoever said so.
    pub fn log_path(&self) -> &Path {
        self.log_file.as_deref().unwrap_or(Path::new("logs/test.log"))
    }
}

/// How much a method with a budget keeps, as a share.
#[derive(Debug, Args)]
pub struct KeptRatioArgs {
    /// Share of each prompt that the configuration's `method` keeps, in 0..=1, instead of its `kept_ratio`
    #[arg(long, value_name = "R", value_parser = kept_ratio)]
    pub kept_ratio: Option<f64>,
}

impl KeptRatioArgs {
    /// The budget, if one is given.
    pub fn budget(&self) -> Option<Budget> {
        self.kept_ratio.map(Budget::KeptRatio)
    }
}

/// How much a method with a budget keeps, as a share or in bytes.
///
/// `generate` takes the share only: with --prompts, its own --kv-budget is what all sequences may come to. The key
/// `kv_budget` of the configuration does there what the option does elsewhere.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    #[command(flatten)]
    pub kept_ratio: KeptRatioArgs,
    /// What the configuration's `method` may keep of each prompt's keys and values, such as 64MB or 1.5GB, instead of
    /// its `kv_budget`; a bare number is MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "kept_ratio")]
    pub kv_budget: Option<usize>,
}

impl BudgetArgs {
    /// The budget, if one is given.
    pub fn budget(&self) -> Option<Budget> {
        self.kv_budget.map(Budget::Bytes).or_else(|| self.kept_ratio.budget())
    }
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Numbers of the full cache, to compare quantised caches with [default: those of --kv-dtype]
    #[arg(long, value_enum, value_name = "KV_DTYPE")]
    pub full_kv_dtype: Option<CacheDtype>,
    /// Configuration of the adaptive cache (JSON) [default: the original's values]
    #[arg(long, env = "CONFIG", value_name = "PATH")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub budget: BudgetArgs,
}

/// Several prompts at a time.
#[derive(Debug, Args)]
pub struct BatchArgs {
    /// File of prompts, one a line: plain text, a JSON string, a list of messages, or an object with `prompt` or
    /// `messages`, and `max_tokens`, `stop`, `temperature`, `top_p`, `seed` and `custom_id`; `-` is standard input. Results
    /// are written as JSON lines, in the prompts' order
    #[arg(long, value_name = "PATH", conflicts_with_all = ["prompt", "prompt_file", "messages", "report_positions"])]
    pub prompts: Option<PathBuf>,
    /// The most sequences that decode together
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    pub batch: usize,
    /// What the prompt's keys and values may come to, instead of the configuration's `kv_budget`, such as 64MB or 1.5GB; a
    /// bare number is MB. With --prompts, what those of all sequences under way may come to, texts included
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_budget: Option<usize>,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub batch: BatchArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub kept_ratio: KeptRatioArgs,
    /// Write attention heatmaps, and pictures of policies and memory
    #[arg(long, env = "SAVE_IMAGE", num_args = 0..=1, default_missing_value = "1", default_value = "0",
          value_parser = BoolishValueParser::new(), action = clap::ArgAction::Set, hide_possible_values = true, value_name = "0|1")]
    pub save_image: bool,
    /// Folder for the pictures; made if missing
    #[arg(long, env = "IMAGE_DIR", default_value = "images", value_name = "DIR")]
    pub image_dir: PathBuf,
    /// Write everything about the run to a JSON file
    #[arg(long, value_name = "PATH")]
    pub report: Option<PathBuf>,
    /// List the kept positions in the report
    #[arg(long, requires = "report")]
    pub report_positions: bool,
    /// Print the text only, no table and no figures
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub dialogue: DialogueArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Numbers of the weight matrices: the file's own, or all converted
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Text whose first tokens are the prompts, repeated if it is too short [default: chapters of a novel]
    #[arg(long, value_name = "PATH")]
    pub prompt_file: Option<PathBuf>,
    /// Numbers of threads to compute with [default: all cores]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    /// Caches: `full`, or the path of a configuration of the adaptive cache (JSON)
    #[arg(long, value_name = "SETTING,..", value_delimiter = ',', default_value = "full")]
    pub settings: Vec<String>,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Numbers of the KV cache
    #[arg(long, value_enum, value_name = "DTYPE,..", value_delimiter = ',', default_value = "f16")]
    pub kv_dtype: Vec<CacheDtype>,
    /// Prompt lengths, in tokens, after which decoding is timed [default: 32,2048, if --prefill is not given either]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub contexts: Vec<u32>,
    /// Prompt lengths, in tokens, whose prefill is timed [default: 512, if --contexts is not given either]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub prefill: Vec<u32>,
    /// Tokens that each run decodes
    #[arg(short = 'n', long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: u32,
    /// Timed runs of each case
    #[arg(long, default_value_t = 3, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Runs before them that are not timed; a prefill warms up on at most 512 tokens
    #[arg(long, default_value_t = 1, value_name = "W")]
    pub warmup: u32,
    /// The most prompt rows that go through a layer at a time: fewer need less memory, more are faster
    #[arg(long, value_name = "N", default_value_t = PrefillOptions::DEFAULT_CHUNK)]
    pub prefill_chunk: NonZeroUsize,
    /// Write the rows to a JSON file, anew after each case
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Draw speed and memory against the prompt's length, as PNG
    #[arg(long, value_name = "PATH")]
    pub plot: Option<PathBuf>,
}

/// What caches are measured on: the model, and the windows of a text.
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Numbers of the weight matrices: the file's own, or all converted
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Text that is compressed and scored, and that tasks hide facts in [default: chapters of a novel]
    #[arg(long, value_name = "PATH")]
    pub text: Option<PathBuf>,
    /// Numbers of the full cache that all are compared with
    #[arg(long, value_enum, value_name = "DTYPE", default_value_t = CacheDtype::F16)]
    pub full_kv_dtype: CacheDtype,
    /// Tokens of a window that are compressed
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    pub prompt_tokens: usize,
    /// Tokens behind them that are scored; the first is left out, since it comes from the exact prompt
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    pub score_tokens: usize,
    /// Windows of the text, one behind the other; 0, with `eval`, for tasks and prompts only
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub windows: usize,
    /// Tokens of the text before the first window
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub offset_tokens: usize,
    /// The most prompt rows that go through a layer at a time: fewer need less memory, more are faster
    #[arg(long, value_name = "N", default_value_t = PrefillOptions::DEFAULT_CHUNK)]
    pub prefill_chunk: NonZeroUsize,
}

/// The files of a measurement.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// Write the rows to a JSON file, anew after each
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Write the rows to a file of comma-separated values, anew after each
    #[arg(long, value_name = "PATH")]
    pub csv: Option<PathBuf>,
    /// Draw what was measured against memory, as PNG
    #[arg(long, value_name = "PATH")]
    pub plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub measure: MeasureArgs,
    /// Caches: `full`, `fastgen` (the paper's setting), `replay`, or the path of a configuration (JSON)
    #[arg(long, value_name = "CONFIG,..", value_delimiter = ',', default_value = "full,fastgen")]
    pub configs: Vec<String>,
    /// Numbers of the caches
    #[arg(long, value_enum, value_name = "DTYPE,..", value_delimiter = ',', default_value = "f16")]
    pub kv_dtype: Vec<CacheDtype>,
    /// Shares of the prompt to keep, for configurations that take a budget
    #[arg(long, value_name = "R,..", value_delimiter = ',', value_parser = kept_ratio)]
    pub kept_ratio: Vec<f64>,
    /// Sizes to keep, such as 64MB, for configurations that take a budget; a bare number is MB
    #[arg(long, value_name = "SIZE,..", value_delimiter = ',', value_parser = parse_size)]
    pub kv_budget: Vec<usize>,
    /// Tokens of each cache's own greedy text that are compared; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub greedy_tokens: usize,
    /// Also measure the error of each layer's attention, which decodes the scored tokens once more, slowly
    #[arg(long)]
    pub layer_error: bool,
    /// Tasks: passkey, multi-question, multi-turn
    #[arg(long, value_name = "TASK,..", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Lengths of the tasks' texts, in tokens
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512,1024,2048", value_parser = positive)]
    pub contexts: Vec<usize>,
    /// Where in the tasks' texts the facts stand: 0 at the start, 1 at the end
    #[arg(long, value_name = "D,..", value_delimiter = ',', default_value = "0.1,0.5,0.9", value_parser = depth)]
    pub depths: Vec<f64>,
    /// Texts for each task, length and depth
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub trials: usize,
    /// Seed of the tasks' texts
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// File of prompts that every cache answers, one a line: plain text, a JSON string, a list of messages, or an object
    /// with `prompt` or `messages`; answers and savings are shown side by side
    #[arg(long, value_name = "PATH")]
    pub prompts: Option<PathBuf>,
    /// File of a chat template (Jinja) for the prompts and tasks, instead of the model's own
    #[arg(long, value_name = "PATH")]
    pub chat_template: Option<PathBuf>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    pub answer_tokens: usize,
    /// Wrap the prompts in the model's own chat template
    #[arg(long)]
    pub chat: bool,
    #[command(flatten)]
    pub files: FileArgs,
}

#[derive(Debug, Args)]
pub struct TuneArgs {
    #[command(flatten)]
    pub measure: MeasureArgs,
    #[command(flatten)]
    pub limit: LimitArgs,
    /// Hold the limit in the worst window, not in the mean over --windows
    #[arg(long)]
    pub worst: bool,
    /// Candidates: `replay`, `fastgen` (the paper's setting), `full`, or the path of a configuration (JSON). Of a method
    /// with a budget `kept_ratio` is searched, of FastGen `recovery_threshold`
    #[arg(long, value_name = "CONFIG,..", value_delimiter = ',', default_value = "replay,fastgen")]
    pub configs: Vec<String>,
    /// Numbers of the caches to try with each [default: `f16,q8_0`; with --max-kept, which counts no bytes, f16]
    #[arg(long, value_enum, value_name = "DTYPE,..", value_delimiter = ',')]
    pub kv_dtype: Vec<CacheDtype>,
    /// The configuration file to write; replaced if there is one [default: tuned.json, which must not be there]
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub files: FileArgs,
}

/// What must not be exceeded: one of the three.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
#[expect(clippy::struct_field_names)] // the options' names
pub struct LimitArgs {
    /// Mean KL divergence from the full cache, in nats, within which the smallest cache is looked for
    #[arg(long, value_name = "NATS", value_parser = divergence)]
    pub max_kl: Option<f64>,
    /// Size of each prompt's keys and values, such as 64MB, within which the least divergence is looked for; a bare
    /// number is MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_bytes: Option<usize>,
    /// Share of each prompt's keys and values, above 0 and up to 1, within which the least divergence is looked for
    #[arg(long, value_name = "R", value_parser = kept_share)]
    pub max_kept: Option<f64>,
}

impl LimitArgs {
    /// The limit; `None` for none, which the command line does not allow.
    pub fn limit(&self) -> Option<Limit> {
        let bytes = || self.max_bytes.map(Limit::MaxBytes);
        self.max_kl.map(Limit::MaxKl).or_else(bytes).or_else(|| self.max_kept.map(Limit::MaxKept))
    }
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
}
