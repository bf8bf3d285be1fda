//! The JSON report of a run. Keys may be added, never renamed; times in milliseconds, sizes in bytes, ratios as
//! fractions.

use std::path::Path;

use serde::Serialize;

use crate::cache::{CacheBytes, LayerSummary};
use crate::checkpoint::Loaded;
use crate::compress::AdaptiveConfig;
use crate::error::{Error, Result};
use crate::generate::{DraftCounts, FinishReason, FinishedText, GenerationOptions};

/// How texts were generated, one or many.
#[derive(Debug, Serialize)]
pub struct RunReport {
    pub version: &'static str,
    pub model: ModelReport,
    pub device: String,
    /// What computed: `cpu` for the CPU kernels, `candle` for candle operations.
    pub attention: &'static str,
    /// How tokens were decoded: `team`, `ragged` or `groups`, see [`Backend::decoding`](crate::backend::Backend::decoding).
    pub decoding: &'static str,
    /// How matrices of blocks were multiplied: `fast` or `exact`; `null` for candle operations.
    pub compute: Option<&'static str>,
    pub threads: usize,
    /// Who said how many: `option`, `variable` (`RAYON_NUM_THREADS`), or, of what the machine has, what there is least of:
    /// `cores`, `affinity` (cores that the process may run on) or `quota` (processor time of its control group).
    pub threads_from: &'static str,
    pub kv_dtype: &'static str,
    pub adaptive: bool,
    /// The configuration as used, every default spelt out; `null` for a full cache.
    pub config: Option<AdaptiveConfig>,
    pub generation: GenerationOptions,
}

/// Everything about one `generate` run.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub run: RunReport,
    /// The most prompt rows that went through a layer at a time.
    pub prefill_chunk: usize,
    pub prompt_tokens: Vec<u32>,
    /// The ten most probable next tokens after the prompt.
    pub next_token_logprobs: Vec<(u32, f32)>,
    pub generated_tokens: Vec<u32>,
    pub text: String,
    pub finish_reason: FinishReason,
    pub draft: DraftReport,
    /// The cache right after prefill.
    pub layers: Vec<LayerReport>,
    pub kv: KvReport,
    pub timings: Timings,
    pub memory: MemoryReport,
}

/// Tokens that were guessed from the text.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct DraftReport {
    /// Why none could be; `null` if guesses were made where they were likely to come true.
    pub obstacle: Option<&'static str>,
    #[serde(flatten)]
    pub counts: DraftCounts,
}

impl DraftReport {
    /// * `obstacle`: see [`Draft::obstacle`](crate::generate::Draft::obstacle)
    #[must_use]
    pub fn new(obstacle: Option<&'static str>, counts: DraftCounts) -> Self {
        Self { obstacle, counts }
    }
}

/// The model that ran.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    pub path: String,
    pub format: &'static str,
    pub architecture: &'static str,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub weights_bytes: usize,
    /// The numbers of most weights, as `q4_1`.
    pub dtype: String,
}

impl ModelReport {
    /// Describes a model.
    ///
    /// * `path`: as the user gave it
    #[must_use]
    pub fn new(path: &Path, loaded: &Loaded) -> Self {
        let config = loaded.model.config();
        Self {
            path: path.display().to_string(),
            format: loaded.format.name(),
            architecture: config.architecture.name(),
            num_layers: config.num_layers,
            num_heads: config.heads.num_heads,
            num_kv_heads: config.heads.num_kv_heads,
            head_dim: config.heads.head_dim,
            weights_bytes: loaded.weights_bytes,
            dtype: loaded.dtype.clone(),
        }
    }
}

/// What one layer keeps.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    pub layer: usize,
    #[serde(flatten)]
    pub bytes: KvReport,
    pub heads: Vec<HeadReport>,
}

/// What one head keeps.
#[derive(Debug, Serialize)]
pub struct HeadReport {
    pub kv_head: usize,
    pub level: usize,
    pub policies: Vec<&'static str>,
    pub prompt_len: usize,
    pub kept: usize,
    pub recovered: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<Vec<u32>>,
}

/// Sizes of a cache.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct KvReport {
    pub raw_bytes: usize,
    pub kept_bytes: usize,
    pub allocated_bytes: usize,
    /// Of what is kept, what lies in a saved cache's file and is not allocated.
    pub mapped_bytes: usize,
    pub saved_ratio: f64,
}

impl From<CacheBytes> for KvReport {
    fn from(bytes: CacheBytes) -> Self {
        Self {
            raw_bytes: bytes.raw,
            kept_bytes: bytes.kept,
            allocated_bytes: bytes.allocated,
            mapped_bytes: bytes.mapped,
            saved_ratio: bytes.saved_ratio(),
        }
    }
}

/// How long the parts of a run took.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timings {
    pub load_ms: f64,
    /// The whole prefill, profiling included.
    pub prefill_ms: f64,
    /// Choosing and storing alone; collecting statistics is part of attention.
    pub profile_ms: f64,
    pub decode_ms: f64,
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
}

/// Memory of the process; 0 where the system does not tell.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct MemoryReport {
    pub peak_rss_bytes: usize,
    /// Resident right after prefill.
    pub prefill_rss_bytes: usize,
    /// Of the device's own memory taken right after prefill, by all processes; absent where there is no such device, or
    /// its driver does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_device_bytes: Option<usize>,
    /// What there is of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_total_bytes: Option<usize>,
}

/// Level and policy names of a head, or 0 and the name of the method that chose; a head that nothing chose for keeps
/// everything.
#[must_use]
pub fn head_policies(level: Option<usize>, config: &AdaptiveConfig) -> (usize, Vec<&'static str>) {
    let level = level.unwrap_or(config.num_levels() - 1);
    (level, config.level_names(level))
}

impl LayerReport {
    /// Describes a layer; `with_positions` lists the kept positions too.
    #[must_use]
    pub fn new(summary: &LayerSummary, config: &AdaptiveConfig, with_positions: bool) -> Self {
        let heads = summary.heads.iter().map(|head| {
            let (level, policies) = head_policies(head.level, config);
            HeadReport {
                kv_head: head.kv_head,
                level,
                policies,
                prompt_len: summary.prompt_len,
                kept: head.positions.len(),
                recovered: head.recovered.clone(),
                positions: with_positions.then(|| head.positions.clone()),
            }
        });
        Self { layer: summary.layer, bytes: summary.bytes.into(), heads: heads.collect() }
    }
}

/// Everything about a `generate --prompts` run.
#[derive(Debug, Serialize)]
pub struct BatchReport {
    #[serde(flatten)]
    pub run: RunReport,
    /// The most sequences that were allowed at a time.
    pub batch: usize,
    pub kv_budget_bytes: Option<usize>,
    /// The most sequences that were under way at a time.
    pub most_sequences: usize,
    /// The most bytes that all kept keys and values came to.
    pub most_kv_bytes: usize,
    pub prefill_ms: f64,
    pub decode_ms: f64,
    pub prefill_tokens_per_s: f64,
    /// Of all sequences together.
    pub decode_tokens_per_s: f64,
    pub peak_rss_bytes: usize,
    /// Of sequences as long as no others were under way.
    pub draft: DraftReport,
    pub texts: Vec<BatchTextReport>,
}

/// One text of a batch; also a line of the output.
#[derive(Debug, Serialize)]
pub struct BatchTextReport {
    /// Of the prompt, from 0.
    pub index: usize,
    /// Of the prompt in its file, from 1.
    pub line: usize,
    /// What the prompt's line calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub custom_id: Option<String>,
    pub text: String,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
    pub generated_tokens: Vec<u32>,
    /// Seed with which the tokens were drawn; absent if the most probable one was taken always.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The cache right after the prompt.
    pub kv: KvReport,
}

impl BatchTextReport {
    /// * `line`: of the prompt in its file, from 1
    #[must_use]
    pub fn new(text: FinishedText, line: usize) -> Self {
        Self {
            index: text.index,
            line,
            custom_id: None,
            text: text.text,
            finish_reason: text.finish_reason,
            prompt_tokens: text.prompt_tokens,
            generated_tokens: text.ids,
            seed: text.seed,
            kv: text.kv.into(),
        }
    }

    /// The text as one line of JSON, without a line feed.
    #[must_use]
    pub fn to_line(&self) -> String {
        // Strings and numbers only: nothing that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl BatchReport {
    /// Writes the report, as [`Report::write`] does.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_json(self, path)
    }
}

impl Report {
    /// Writes the report, to a temporary file first: a reader never meets half a report.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_json(self, path)
    }
}

/// Writes a value as a JSON file, in the place of what the file held.
pub(crate) fn write_json(value: &(impl Serialize + ?Sized), path: &Path) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::io("write", path, error.into()))?;
    text.push(b'\n');
    crate::files::replace(path, &text)
}
