//! Events on standard error, as `RUST_LOG` asks for them; the log file stays as it is.

use super::mishaps::tiny;
use super::{Lab, Refusal, succeeds};

#[test]
fn rust_log_shows_events_on_standard_error() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let generate = ["generate", "--model", &model, "--prompt", "ab c", "-n", "1", "--threads", "1", "--quiet"];
    let run = |args: &[&str], wanted: Option<&str>| {
        let mut command = lab.command(args);
        if let Some(wanted) = wanted {
            command.env("RUST_LOG", wanted);
        }
        let output = command.output().unwrap();
        succeeds(&output);
        String::from_utf8(output.stderr).unwrap()
    };
    // Without the time stamp.
    let log = || {
        let text = std::fs::read_to_string(lab.path("logs/test.log")).unwrap();
        std::fs::remove_file(lab.path("logs/test.log")).unwrap();
        text.lines()
            .map(|line| line.split_once(" - INFO - ").map_or(line, |(_, rest)| rest).to_owned())
            .collect::<Vec<_>>()
    };
    for wanted in [None, Some(""), Some("off"), Some("adaptive_kvcache=warn")] {
        assert_eq!(run(&generate, wanted), "", "{wanted:?}");
    }
    assert_eq!(run(&generate, None), "");
    let logged = log();
    let plain = &logged[logged.len() / 5 * 4..];
    assert!(plain[0].starts_with("layer_id:0(heads:"), "{plain:?}");

    let heads = run(&generate, Some("adaptive_kvcache::head=info"));
    assert_eq!(log(), plain);
    let is_head = |line: &&str| line.starts_with("layer_id:") && line.contains("->[");
    let count = plain.iter().map(String::as_str).filter(|line| is_head(line)).count();
    assert_eq!(heads.lines().count(), count, "{heads}");
    for line in heads.lines() {
        assert!(line.contains("INFO adaptive_kvcache::head: layer=") && line.contains("policies=\""), "{line}");
        assert!(line.contains(" seen=") && line.contains(" kept="), "{line}");
    }
    let all = run(&generate, Some("info"));
    assert!(all.lines().count() > count && all.contains("adaptive_kvcache::layer: layer=0 raw_bytes="), "{all}");

    // Commands without a log speak as well, and write none.
    log();
    let compared = ["compare", "--model", &model, "--prompt", "ab c", "-n", "1", "--threads", "1"];
    let text = run(&compared, Some("adaptive_kvcache::layer=info"));
    assert!(text.contains("kept_bytes="), "{text}");
    assert!(!lab.path("logs").join("test.log").exists());

    let mut command = lab.command(&generate);
    let output = command.env("RUST_LOG", "adaptive_kvcache=loud").output().unwrap();
    Refusal::of(&output, "a level that there is not").names("RUST_LOG").names("`adaptive_kvcache=loud`").hints("unset");
}
