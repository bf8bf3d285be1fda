//! What several tests need: data files, the real model, tiny models in GGUF made from the fixtures' safetensors.

pub mod clock;
pub mod dense;
pub mod evolving;
pub mod fixture;
pub mod scripted;
pub mod sentencepiece;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::Retention;
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, load, open};
use adaptive_kvcache::compress::AdaptiveConfig;
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::ops::{DecodeWith, Ops};
use adaptive_kvcache::tokenizer::Tokenizer;
use candle_core::Device;
use serde_json::Value;

/// Time that this process has computed; a machine that does other work at once does not count.
pub fn computed() -> Duration {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return Duration::ZERO;
    };
    // User and system time, in hundredths of a second, are fields 14 and 15; the name before them ends in a bracket.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Duration::from_millis(fields.map(|ticks| ticks.parse::<u64>().unwrap_or(0) * 10).sum())
}

/// Does a test's work in a process of its own, whose memory no other test changes.
///
/// * `test`: its full name
pub fn in_own_process(test: &str, work: impl FnOnce()) {
    const IS_INNER: &str = "TEST_IN_ITS_OWN_PROCESS";
    if std::env::var_os(IS_INNER).is_some() {
        return work();
    }
    let mut inner = Command::new(std::env::current_exe().unwrap());
    let output = inner.args(["--exact", test]).env(IS_INNER, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// A file under `tests/data`.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// Path of the default model, which `scripts/get_model.sh` fetches.
pub fn smollm2_path() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "`{}` is missing: run scripts/get_model.sh", path.display());
    path
}

/// The real model with weights widened to f32, loaded once.
pub fn smollm2_f32() -> &'static Loaded {
    static MODEL: OnceLock<Loaded> = OnceLock::new();
    MODEL.get_or_init(|| load(smollm2_path(), WeightDtype::F32).unwrap())
}

/// The real model on its quantised blocks, loaded once; with exact products, so that what it says of two words that are
/// nearly as probable does not hang on how many rows are computed at a time.
pub fn smollm2() -> &'static Loaded {
    static MODEL: OnceLock<Loaded> = OnceLock::new();
    let exact = BackendKind::Kernels(Compute::Exact);
    MODEL.get_or_init(|| open(smollm2_path()).unwrap().load(&exact, WeightDtype::Auto, &mut |_, _| {}).unwrap())
}

/// Candle operations on the CPU.
pub fn candle_on_cpu() -> BackendKind {
    BackendKind::Candle(Ops::new(Device::Cpu).unwrap())
}

/// Candle operations on the CPU, with attention from new tokens as on CUDA: in one launch.
pub fn ragged_on_cpu() -> BackendKind {
    BackendKind::Candle(Ops::new(Device::Cpu).unwrap().with_decode(DecodeWith::Ragged))
}

/// An adaptive cache's retention under a configuration in JSON.
pub fn adaptive(tokenizer: &Tokenizer, config: &str) -> Retention {
    let config = AdaptiveConfig::parse(config, None).unwrap();
    let (classifier, words) = (tokenizer.classifier(&config), tokenizer.words_for(&config));
    Retention::Adaptive { config: config.into(), classifier, words }
}

/// The largest difference of two vectors.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
