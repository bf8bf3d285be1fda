//! `scripts/make_llama7b_shape.py`, with small sizes: what it writes loads in both formats and computes finite numbers.

use std::path::Path;
use std::process::Command;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Format, WeightDtype, load};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make_llama7b_shape.py");

fn write(path: &Path, args: &[&str]) -> std::process::Output {
    let sizes = ["--layers", "2", "--heads", "2", "--hidden", "64", "--mlp", "96"];
    Command::new("python3").arg(SCRIPT).arg(path).args(sizes).args(args).output().unwrap()
}

#[test]
fn both_formats_load_and_compute() {
    let folder = tempfile::tempdir().unwrap();
    for (name, format, dtype) in [("a.gguf", Format::Gguf, "q4_0"), ("b", Format::Safetensors, "f16")] {
        let path = folder.path().join(name);
        let output = write(&path, &["--format", format.name()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let loaded = load(&path, WeightDtype::Auto).unwrap();
        assert_eq!((loaded.format, loaded.dtype.as_str()), (format, dtype));
        let config = loaded.model.config();
        assert_eq!((config.num_layers, config.heads.num_heads, config.heads.num_kv_heads), (2, 2, 2));
        let ids = loaded.tokenizer.encode("The Reform Club was founded in 1836.!").unwrap();
        assert_eq!(ids.len(), 18, "the original's published run had 18 tokens");
        let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
        let logits = loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap().logits;
        assert_eq!(logits.len(), loaded.tokenizer.vocab_size());
        assert!(logits.iter().all(|logit| logit.is_finite()));
        let spread = logits.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        assert!(spread > 0.01 && spread < 100.0, "weights of no sensible size: logits up to {spread}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing half-written stays");
}

#[test]
fn sizes_that_do_not_fit_and_existing_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    for (args, part) in
        [(["--hidden", "65"], "--hidden 65"), (["--mlp", "97"], "multiples of 32"), (["--layers", "0"], "1")]
    {
        let output = write(&path, &args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(part), "{args:?}: {text}");
        assert!(!text.contains("Traceback") && !path.exists());
    }
    std::fs::write(&path, "mine").unwrap();
    assert!(!write(&path, &[]).status.success());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}
