//! Options of the model, of what computes it, and of the cache.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::WeightDtype;
use adaptive_kvcache::compress::{Budget, parse_size};
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::model::PrefillOptions;
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use super::values::{kv_dtype, positive, ratio, row_dtype};
use crate::cli::threads;

/// Which model, and where and in which numbers it is computed.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model: a file in GGUF format, a folder, or a hub id (owner/name[@revision][:file.gguf])
    #[arg(long, value_name = "PATH", env = "MODEL_PATH")]
    pub model: PathBuf,
    #[command(flatten)]
    pub context: ContextArgs,
    /// Numbers of the weight matrices: the file's own, or all converted; in q8_0, q4_0 and q4_k floats are quantised as they
    /// are loaded: the matrices of all layers, and the output layer to q8_0, or to q6_k with the latter two; the embedding
    /// stays as it is stored
    #[expect(clippy::doc_markdown, reason = "printed by --help")]
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The most prompt rows that go through a layer at a time: fewer need less memory, more are faster
    #[arg(long, value_name = "N", default_value_t = PrefillOptions::DEFAULT_CHUNK)]
    pub prefill_chunk: NonZeroUsize,
}

/// The numbers of a run's cache, and how many threads compute.
#[derive(Debug, Args)]
pub struct NumbersArgs {
    /// Numbers of the KV cache, or of keys/values; mixed is q8_0/q4_0 for what a prompt leaves, q8_0 for what comes later
    /// [default: f16]
    #[expect(clippy::doc_markdown, reason = "printed by --help")]
    #[arg(long, value_parser = kv_dtype())]
    pub kv_dtype: Option<KvDtype>,
    /// Numbers of the cached keys [default: as --kv-dtype says]
    #[arg(long, value_parser = row_dtype(), value_name = "DTYPE", alias = "cache-type-k")]
    pub k_dtype: Option<KvDtype>,
    /// Numbers of the cached values [default: as --kv-dtype says]
    #[arg(long, value_parser = row_dtype(), value_name = "DTYPE", alias = "cache-type-v")]
    pub v_dtype: Option<KvDtype>,
    /// How many
    #[arg(long, help = threads::help("Threads to compute with"), value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
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
    /// How the CPU's own kernels multiply with weights in blocks: fast, in whole numbers of 8 bits as they are stored in, or
    /// exact, in f32 [default: fast]
    #[arg(long, value_enum)]
    pub compute: Option<ComputeChoice>,
    /// Instructions that the kernels use: portable, avx2, avxvnni, avx512 or vnni; for tests and measurements
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ComputeChoice {
    Exact,
    Fast,
}

impl From<ComputeChoice> for Compute {
    fn from(compute: ComputeChoice) -> Self {
        match compute {
            ComputeChoice::Exact => Self::Exact,
            ComputeChoice::Fast => Self::Fast,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k")]
    Q4K,
}

impl From<Dtype> for WeightDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Auto => Self::Auto,
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
            Dtype::Q8_0 => Self::Q8_0,
            Dtype::Q4_0 => Self::Q4_0,
            Dtype::Q4K => Self::Q4K,
        }
    }
}

impl NumbersArgs {
    /// Whether the user says anything of the cache's numbers.
    pub fn is_given(&self) -> bool {
        self.kv_dtype.is_some() || self.k_dtype.is_some() || self.v_dtype.is_some()
    }

    /// The numbers of the cache.
    ///
    /// # Errors
    /// As [`KvDtype::of`].
    pub fn kv_dtype(&self) -> adaptive_kvcache::Result<KvDtype> {
        let both = self.kv_dtype.unwrap_or(KvDtype::F16);
        if self.k_dtype.is_none() && self.v_dtype.is_none() {
            return Ok(both);
        }
        KvDtype::of(self.k_dtype.unwrap_or(both.keys()), self.v_dtype.unwrap_or(both.values()))
    }
}

/// What a run goes on from.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Saved cache to go on from, as `cache create` or --save-cache writes it: what it holds is not read again. Method and
    /// numbers are the file's. The prompt follows at once, or in the chat template if the file holds a conversation
    #[arg(long = "cache", value_name = "PATH")]
    pub cache_file: Option<PathBuf>,
}

/// What a run leaves.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Save the cache as it is at the end, for --cache
    #[arg(long, value_name = "PATH")]
    pub save_cache: Option<PathBuf>,
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
    #[arg(long, value_name = "R", value_parser = ratio::<f64>)]
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
    /// What a sequence's whole cache may come to, such as 64MB or 1.5GB, instead of the configuration's `kv_budget`: keys,
    /// values and positions, of all turns; a bare number is MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "kept_ratio")]
    pub kv_budget: Option<usize>,
}

impl BudgetArgs {
    /// The budget, if one is given.
    pub fn budget(&self) -> Option<Budget> {
        self.kv_budget.map(Budget::Bytes).or_else(|| self.kept_ratio.budget())
    }
}
