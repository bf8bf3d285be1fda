//! Options of all commands, as the user writes them. Here are the commands, and the options of those that run a prompt.

mod bounds;
mod cache;
mod measure;
mod model;
mod prompt;
mod store;
mod values;

use std::path::PathBuf;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::{FASTGEN, METHODS, POLICIES, parse_size};
use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand};

pub use bounds::BoundsArgs;
pub use cache::{CacheCommand, CreateArgs};
pub use measure::{BenchArgs, EvalArgs, FileArgs, MeasureArgs, TuneArgs};
pub use model::{BackendChoice, BudgetArgs, CacheArgs, ContextArgs, DeviceArgs, KeptRatioArgs};
pub use model::{ModelArgs, NumbersArgs, SaveArgs, StartArgs};
pub use prompt::{
    DEFAULT_NEW_TOKENS, DEFAULT_PROMPT, DialogueArgs, DraftArgs, PromptArgs, SamplingArgs, Wrap, drawn_seed,
};
pub use store::StoreArgs;
use values::{kv_dtype, positive};

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
    /// Keeps what was read of a text in a file, and shows what such files hold
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Shows what a model file holds, and what its KV cache needs at each context
    Inspect(InspectArgs),
}

impl Command {
    /// The most threads that the user asks for.
    pub fn threads(&self) -> Option<u16> {
        match self {
            Self::Generate(args) => args.run.numbers.threads,
            Self::Chat(args) => args.numbers.threads,
            Self::Compare(args) => args.run.numbers.threads,
            Self::Bench(args) => args.threads.iter().copied().max(),
            Self::Eval(args) => args.measure.threads,
            Self::Tune(args) => args.measure.threads,
            Self::Cache(CacheCommand::Create(args)) => args.numbers.threads,
            Self::Cache(_) | Self::Inspect(_) => None,
        }
    }
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

/// What every run of a model needs.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub numbers: NumbersArgs,
    #[command(flatten)]
    pub prompt: PromptArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Numbers of the full cache, to compare quantised caches with [default: those of --kv-dtype]
    #[arg(long, value_parser = kv_dtype(), value_name = "KV_DTYPE")]
    pub full_kv_dtype: Option<KvDtype>,
    #[command(flatten)]
    pub start: StartArgs,
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
    /// What the whole cache may come to, text included, instead of the configuration's `kv_budget`, such as 64MB or 1.5GB:
    /// keys, values and positions; a bare number is MB. With --prompts, what those of all sequences under way may come to
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_budget: Option<usize>,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub batch: BatchArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub start: StartArgs,
    #[command(flatten)]
    pub save: SaveArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub kept_ratio: KeptRatioArgs,
    #[command(flatten)]
    pub bounds: BoundsArgs,
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
    pub numbers: NumbersArgs,
    #[command(flatten)]
    pub dialogue: DialogueArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub start: StartArgs,
    #[command(flatten)]
    pub save: SaveArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub bounds: BoundsArgs,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Say what fits into a cache of so many bytes, such as 512MB; a bare number is MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_budget: Option<usize>,
}
