//! `scripts/compare_peers.py table`: medians, ratios and the order of columns, from rows whose figures are known.

use std::process::Command;

use serde_json::{Value, json};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/compare_peers.py");

fn row(setting: &str, kv_dtype: &str, case: (&str, usize), tokens_per_s: f64, peak_mb: u64) -> Value {
    let (work, context) = case;
    json!({
        "setting": setting, "kv_dtype": kv_dtype, "work": work, "context": context, "threads": 2,
        "tokens_per_s": tokens_per_s, "peak_rss_bytes": peak_mb << 20,
    })
}

/// What the script prints of the rows of each round, after its line with versions.
fn table(rounds: &[Value], caches: &str, peers: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command.arg(SCRIPT).args(["table", "--caches", caches, "--peers", peers]);
    for (round, rows) in rounds.iter().enumerate() {
        let path = folder.path().join(format!("{round}.json"));
        std::fs::write(&path, rows.to_string()).unwrap();
        command.arg(path);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter(|line| line.starts_with("| ")).collect::<Vec<_>>().join("\n")
}

#[test]
fn ours_stand_after_llama_cpp_and_the_fastest_peer_is_named() {
    let decode = ("decode", 32);
    let prefill = ("prefill", 512);
    let round = |factor: f64| {
        json!([
            row("llama.cpp, flash attention off", "f16", decode, 10.0 * factor, 100),
            row("llama.cpp, flash attention on", "f16", decode, 8.0 * factor, 90),
            row("llama.cpp, flash attention off", "f16", prefill, 50.0 * factor, 100),
            row("llama.cpp, flash attention on", "f16", prefill, 60.0 * factor, 90),
            row("full", "f16", decode, 12.0 * factor, 40),
            row("full", "f16", prefill, 90.0 * factor, 50),
            row("configs/best.json", "q8_0", decode, 15.0 * factor, 30),
            row("mistral.rs", "f16", decode, 11.0 * factor, 200),
            row("ik_llama.cpp", "f16", prefill, 120.0 * factor, 80),
        ])
    };
    // The median of the three rounds is the one with the factor 1.
    let rounds = [round(1.0), round(5.0), round(0.5)];
    let caches = "full:f16,configs/best.json:q8_0";
    let expected = "\
| work | llama.cpp | full, f16 | configs/best.json, q8_0 | mistral.rs | ik_llama.cpp | ours to the fastest peer |
| decode after 32 | 10.0 (flash attention off) | 12.0 (1.20) | 15.0 (1.50) | 11.0 (1.10) |  | 1.09 (mistral.rs) |
| prefill of 512 | 60.0 (flash attention on) | 90.0 (1.50) |  |  | 120.0 (2.00) | 0.75 (ik_llama.cpp) |
| peak MB | 90 | 50 | 30 | 200 | 80 |  |";
    assert_eq!(table(&rounds, caches, "llama.cpp,mistral.rs,ik_llama.cpp"), expected);
}

#[test]
fn a_table_needs_neither_llama_cpp_nor_any_peer() {
    let decode = ("decode", 32);
    let alone = json!([row("full", "f16", decode, 12.0, 40)]);
    let expected = "\
| work | llama.cpp | full, f16 | ours to the fastest peer |
| decode after 32 |  | 12.0 |  |
| peak MB |  | 40 |  |";
    assert_eq!(table(&[alone], "full:f16", ""), expected);
    let with_a_peer = json!([row("full", "f16", decode, 12.0, 40), row("mistral.rs", "f16", decode, 8.0, 200)]);
    let expected = "\
| work | llama.cpp | full, f16 | mistral.rs | ours to the fastest peer |
| decode after 32 |  | 12.0 | 8.0 | 1.50 (mistral.rs) |
| peak MB |  | 40 | 200 |  |";
    assert_eq!(table(&[with_a_peer], "full:f16", "mistral.rs"), expected);
}
