//! Pictures of a run: one of each layer's attention as soon as the layer is done, two of the whole at the end.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::map::MapAccumulator;
use adaptive_kvcache::cache::LayerSummary;
use adaptive_kvcache::compress::AdaptiveConfig;
use adaptive_kvcache::model::LlamaConfig;
use adaptive_kvcache::plot::{self, HeadMap, PolicyGrid};
use adaptive_kvcache::report::head_policies;
use adaptive_kvcache::{Result, files};

use super::outputs::same_file;

/// Cells of an attention map's side at most.
pub const MAP_SIDE: usize = 128;

const POLICIES: &str = "policies.png";
const KV_MEMORY: &str = "kv_memory.png";

fn layer_name(layer: usize) -> String {
    format!("layer{layer}_attention.png")
}

/// Writes the pictures into a folder.
pub struct Pictures {
    folder: PathBuf,
    config: AdaptiveConfig,
    layout: HeadLayout,
}

impl Pictures {
    /// Makes the folder if it is missing, and finds out early whether all pictures can be written there.
    ///
    /// # Errors
    /// As [`files::check`].
    pub fn new(folder: &Path, config: AdaptiveConfig, model: &LlamaConfig) -> Result<Self> {
        let names = (0..model.num_layers).map(layer_name).chain([POLICIES.to_owned(), KV_MEMORY.to_owned()]);
        names.into_iter().try_for_each(|name| files::check(&folder.join(name)))?;
        Ok(Self { folder: folder.to_owned(), config, layout: model.heads })
    }

    /// Draws `layer{L}_attention.png`.
    pub fn layer(&self, summary: &LayerSummary, maps: &MapAccumulator) -> Result<()> {
        let group_size = self.layout.group_size();
        let names: Vec<String> =
            summary.heads.iter().map(|head| head_policies(head.level, &self.config).1.join("+")).collect();
        let heads: Vec<HeadMap<'_>> = (0..self.layout.num_heads)
            .map(|query_head| {
                let kv_head = query_head / group_size;
                HeadMap {
                    query_head,
                    kv_head,
                    policy: &names[kv_head],
                    cells: maps.cells(query_head),
                    side: maps.side(),
                    kept: &summary.heads[kv_head].positions,
                }
            })
            .collect();
        let path = self.folder.join(layer_name(summary.layer));
        plot::layer_attention(&path, summary.layer, summary.prompt_len, &heads)
    }

    /// Draws `policies.png` and `kv_memory.png`.
    pub fn finish(&self, layers: &[LayerSummary]) -> Result<()> {
        let heads = || layers.iter().flat_map(|layer| layer.heads.iter().map(move |head| (layer.prompt_len, head)));
        let levels: Vec<u8> = heads()
            .map(|(_, head)| u8::try_from(head_policies(head.level, &self.config).0).unwrap_or(u8::MAX))
            .collect();
        #[expect(clippy::cast_precision_loss)]
        let kept_ratio: Vec<f32> =
            heads().map(|(prompt_len, head)| head.positions.len() as f32 / prompt_len.max(1) as f32).collect();
        let level_names: Vec<String> =
            (0..self.config.num_levels()).map(|level| self.config.level_names(level).join("+")).collect();
        // Of a full cache, nothing chose.
        let method = heads().any(|(_, head)| head.level.is_some()).then_some(&self.config);
        let method = method.filter(|config| config.budgeted().is_some()).map(AdaptiveConfig::method_name);
        let grid = PolicyGrid {
            num_layers: layers.len(),
            num_kv_heads: self.layout.num_kv_heads,
            levels: &levels,
            level_names: &level_names,
            kept_ratio: &kept_ratio,
            method,
        };
        plot::policies(&self.folder.join(POLICIES), &grid)?;
        let bytes =
            |pick: fn(&LayerSummary) -> usize| layers.iter().map(|layer| pick(layer) as u64).collect::<Vec<_>>();
        let (raw, kept) = (bytes(|layer| layer.bytes.raw), bytes(|layer| layer.bytes.kept));
        plot::kv_memory(&self.folder.join(KV_MEMORY), &raw, &kept)
    }
}

/// Whether a path is one that a picture in this folder may have.
pub fn is_picture(folder: &Path, path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let layer = name.strip_prefix("layer").and_then(|rest| rest.strip_suffix("_attention.png"));
    let is_layer = layer.is_some_and(|layer| !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()));
    (is_layer || [POLICIES, KV_MEMORY].contains(&name)) && same_file(&folder.join(name), path)
}
