//! Memory of the real program on a long prompt: what is reported is allocated, and what is not kept is not resident.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::{data, json, smollm2, smollm2_path};

/// Tokens of the prompt.
const PROMPT_TOKENS: usize = 4000;

/// Runs `generate` on a long prompt and returns its report.
fn report(folder: &Path, prompt: &Path, name: &str, adaptive: &str) -> Value {
    let path = folder.join(name);
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/fastgen.json");
    let status = Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache"))
        .args(["generate", "-n", "1", "--quiet", "--use-adakv", adaptive, "--chat", "0", "--save-image", "0"])
        .arg("--model")
        .arg(smollm2_path())
        .arg("--config")
        .arg(config)
        .arg("--prompt-file")
        .arg(prompt)
        .arg("--report")
        .arg(&path)
        .arg("--log-file")
        .arg(folder.join("test.log"))
        .status()
        .unwrap();
    assert!(status.success());
    json(path)
}

#[test]
fn what_is_not_kept_is_neither_allocated_nor_resident() {
    let tokenizer = &smollm2().tokenizer;
    let text = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("prompt.txt");
    std::fs::write(&prompt, tokenizer.decode(&ids[..PROMPT_TOKENS], false)).unwrap();

    let full = report(folder.path(), &prompt, "full.json", "0");
    let adaptive = report(folder.path(), &prompt, "adaptive.json", "1");
    let number = |report: &Value, group: &str, key: &str| report[group][key].as_f64().unwrap();
    assert_eq!(adaptive["prompt_tokens"].as_array().unwrap().len(), PROMPT_TOKENS);

    let (raw, kept) = (number(&adaptive, "kv", "raw_bytes"), number(&adaptive, "kv", "kept_bytes"));
    assert_eq!(raw, (PROMPT_TOKENS * 23_040) as f64);
    assert!(kept < 0.9 * raw, "{kept} of {raw} bytes kept");
    for (report, kept) in [(&full, raw), (&adaptive, kept)] {
        let allocated = number(report, "kv", "allocated_bytes");
        assert!(allocated >= kept && allocated < 1.05 * kept, "{allocated} bytes allocated for {kept}");
    }

    let saved = raw - kept;
    let resident = |report: &Value| number(report, "memory", "prefill_rss_bytes");
    let really_saved = resident(&full) - resident(&adaptive);
    assert!(really_saved > 0.8 * saved, "{really_saved} bytes less resident for {saved} saved");

    let peak = |report: &Value| number(report, "memory", "peak_rss_bytes");
    assert!(peak(&adaptive) < 1.1 * peak(&full), "peak {} against {}", peak(&adaptive), peak(&full));
}
