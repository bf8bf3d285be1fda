//! Options of the commands that measure: `bench`, `eval` and `tune`.

use std::path::PathBuf;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::{BudgetOver, parse_size};
use adaptive_kvcache::tune::Limit;
use clap::Args;

use super::model::{BudgetArgs, ModelArgs};
use super::values::{budget_over, divergence, kept_share, kv_dtype, non_negative, positive, ratio, tokens};
use crate::cli::threads;

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text whose first tokens are the prompts, repeated if it is too short [default: chapters of a novel]
    #[arg(long, value_name = "PATH")]
    pub prompt_file: Option<PathBuf>,
    /// How many, one after the other
    #[arg(long, help = threads::help("Numbers of threads to compute with"), value_name = "N,..", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    /// Caches: `full`, `fastgen` (the paper's setting), `replay`, or the path of a configuration (JSON)
    #[arg(long, value_name = "SETTING,..", value_delimiter = ',', default_value = "full")]
    pub settings: Vec<String>,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Numbers of the KV cache
    #[arg(long, value_parser = kv_dtype(), value_name = "DTYPE,..", value_delimiter = ',', default_value = "f16")]
    pub kv_dtype: Vec<KvDtype>,
    /// Prompt lengths, in tokens, after which decoding is timed [default: 32,2048, if --prefill is not given either]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub contexts: Vec<u32>,
    /// Prompt lengths, in tokens, whose prefill is timed [default: 512, if --contexts is not given either]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub prefill: Vec<u32>,
    /// Tokens that each cache holds before the prompts, as of an earlier turn; reading them is not timed
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub past: u32,
    /// Tokens that each run decodes
    #[arg(short = 'n', long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: u32,
    /// Timed runs of each case
    #[arg(long, default_value_t = 3, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Runs before them that are not timed; a prefill warms up on at most 512 tokens
    #[arg(long, default_value_t = 1, value_name = "W")]
    pub warmup: u32,
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
    #[command(flatten)]
    pub model: ModelArgs,
    /// How many
    #[arg(long, help = threads::help("Threads to compute with"), value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Texts that are compressed and scored, the windows of each; tasks hide facts in the first [default: chapters of a
    /// novel]
    #[arg(long, value_name = "PATH,..", value_delimiter = ',')]
    pub text: Vec<PathBuf>,
    /// Numbers of the full cache that all are compared with
    #[arg(long, value_parser = kv_dtype(), value_name = "DTYPE", default_value = "f16")]
    pub full_kv_dtype: KvDtype,
    /// Tokens of a window that are compressed
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    pub prompt_tokens: usize,
    /// Tokens behind them that are scored; the first is left out, since it comes from the exact prompt
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    pub score_tokens: usize,
    /// Windows of each text, one behind the other; 0, with `eval`, for tasks and prompts only
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub windows: usize,
    /// Tokens of each text before the first window
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub offset_tokens: usize,
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
    #[arg(long, value_parser = kv_dtype(), value_name = "DTYPE,..", value_delimiter = ',', default_value = "f16")]
    pub kv_dtype: Vec<KvDtype>,
    /// Shares of the prompt to keep, for configurations that take a budget
    #[arg(long, value_name = "R,..", value_delimiter = ',', value_parser = ratio::<f64>)]
    pub kept_ratio: Vec<f64>,
    /// Sizes to keep, such as 64MB, for configurations that take a budget; a bare number is MB
    #[arg(long, value_name = "SIZE,..", value_delimiter = ',', value_parser = parse_size)]
    pub kv_budget: Vec<usize>,
    /// Whose positions compete for it, instead of what the configurations say: those of each head, of all heads of a layer,
    /// of all layers; or as the method's authors have it, own
    #[arg(long, value_parser = budget_over(), value_name = "OVER,..", value_delimiter = ',')]
    pub budget_over: Vec<BudgetOver>,
    /// Tokens of each cache's own greedy text that are compared; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub greedy_tokens: usize,
    /// Also measure the error of each layer's attention, which decodes the scored tokens once more, slowly
    #[arg(long)]
    pub layer_error: bool,
    /// Tokens of a text that the full cache writes behind each prompt, and all caches read; 0 for none. How far they are
    /// from the full cache is told for each hundred of them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub writing_tokens: usize,
    /// Temperature at which they are drawn; 0 takes the most probable, which soon go round in a loop
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = non_negative)]
    pub writing_temperature: f32,
    /// Tasks: passkey, multi-question, multi-turn, reworded; RULER's `niah_single_1` to 3, `niah_multikey_1` to 3,
    /// `niah_multivalue`, `niah_multiquery`, vt, cwe, fwe, or ruler for all eleven
    #[arg(long, value_name = "TASK,..", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Lengths of the tasks' texts, in tokens, such as 2048 or 2k; of RULER's with question and answer [default:
    /// 512,1024,2048, and 4096 for RULER's]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = tokens)]
    pub contexts: Vec<usize>,
    /// Where in the texts of tasks other than RULER's the facts stand: 0 at the start, 1 at the end
    #[arg(long, value_name = "D,..", value_delimiter = ',', default_value = "0.1,0.5,0.9", value_parser = ratio::<f64>)]
    pub depths: Vec<f64>,
    /// Texts for each task, length and depth; RULER's have no depth
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub trials: usize,
    /// Seed of the tasks' texts, and of what is written
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
    /// Draw which facts are found, over lengths and depths, as PNG
    #[arg(long, value_name = "PATH")]
    pub map: Option<PathBuf>,
    #[command(flatten)]
    pub files: FileArgs,
}

#[derive(Debug, Args)]
pub struct TuneArgs {
    #[command(flatten)]
    pub measure: MeasureArgs,
    #[command(flatten)]
    pub goal: GoalArgs,
    /// Hold the limit in the worst window, not in the mean over --windows
    #[arg(long)]
    pub worst: bool,
    /// Candidates: `replay`, `fastgen` (the paper's setting), `full`, or the path of a configuration (JSON). Of a method
    /// with a budget `kept_ratio` is searched, of FastGen `recovery_threshold`; with --profile one, whose scores are used
    /// [default: `replay,fastgen`; with --profile, `replay`]
    #[arg(long, value_name = "CONFIG,..", value_delimiter = ',')]
    pub configs: Vec<String>,
    /// Numbers of the caches to try with each [default: `f16,q8_0`; with --max-kept, which counts no bytes, f16]
    #[arg(long, value_parser = kv_dtype(), value_name = "DTYPE,..", value_delimiter = ',')]
    pub kv_dtype: Vec<KvDtype>,
    /// The configuration file to write; replaced if there is one [default: tuned.json, which must not be there]
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub files: FileArgs,
}

/// What is looked for: one of the four.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct GoalArgs {
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
    /// No limit: measure how much each KV head matters to the model, and write it to a file that configurations name as
    /// `head_profile`
    #[arg(long, value_name = "PATH", conflicts_with_all = ["worst", "kv_dtype", "output", "json", "csv", "plot"])]
    pub profile: Option<PathBuf>,
}

impl GoalArgs {
    /// The limit; `None` for none.
    pub fn limit(&self) -> Option<Limit> {
        let bytes = || self.max_bytes.map(Limit::MaxBytes);
        self.max_kl.map(Limit::MaxKl).or_else(bytes).or_else(|| self.max_kept.map(Limit::MaxKept))
    }
}
