//! The program as its user meets it: options, exit status, messages, log, report, pictures.
//!
//! Not for: what the numbers should be (see `golden` and `attention`).

mod batch;
mod bench;
mod bounded;
mod bounds;
mod cache;
mod chat;
mod code_formats;
mod device;
mod draft;
mod drawn;
mod errors;
mod eval;
mod eval_table;
mod eval_texts;
mod hostile;
mod isa;
mod kvzip;
mod logging;
mod mishaps;
mod model_files;
mod not_a_number;
mod options;
mod places;
#[cfg(target_os = "linux")]
mod process;
mod prompt_lines;
mod refit;
mod ruler;
mod runs;
mod signals;
mod store;
mod templates;
#[cfg(target_os = "linux")]
mod threads;
pub mod tiny_gguf;
mod tune;
mod turns;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// SmolLM2-135M-Instruct, as `scripts/get_model.sh` fetches it.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
const NUM_LAYERS: usize = 30;
const NUM_KV_HEADS: usize = 3;
/// Variables that stand for options; a test sets those that it is about.
#[rustfmt::skip]
const VARIABLES: [&str; 11] = [
    "MODEL_PATH", "PROMPT", "CHAT", "CONFIG", "USE_ADAKV", "SAVE_IMAGE", "IMAGE_DIR", "MAX_NEW_TOKENS", "RUST_LOG",
    "KV_CACHE_DIR", "KV_CACHE_DIR_LIMIT",
];

/// A temporary folder in which the program runs.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.read(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The program in this folder, with nothing on standard input and no variables set.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache"));
        self.prepare(command.args(args));
        command
    }

    fn prepare(&self, command: &mut Command) {
        command.current_dir(&self.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in VARIABLES {
            command.env_remove(name);
        }
        // candle's thread pool spins while it waits; tests share their cores.
        command.env("CANDLE_BARRIER_POOL_SPIN_LIMIT", "1");
    }

    /// The program under limits as a shell's `ulimit` takes them: `-v` for kilobytes of address space, `-t` for seconds that
    /// it may compute, whatever else the machine does.
    fn limited(&self, limits: &[(&str, usize)], args: &[&str]) -> Command {
        let limits: String =
            limits.iter().map(|(limit, value)| format!("ulimit {limit} {value} && ")).collect::<Vec<_>>().concat();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limits}exec \"$@\""), "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]).args(args);
        self.prepare(&mut command);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `generate` on the default model; what it printed.
    fn generate(&self, args: &[&str]) -> String {
        succeeds(&self.run(&[&["generate", "--model", MODEL][..], args].concat()))
    }

    /// Runs what must be refused.
    fn refuses(&self, args: &[&str]) -> Refusal {
        Refusal::of(&self.run(args), &format!("{args:?}"))
    }

    /// Runs `generate` on the default model with options that must be refused.
    fn generate_refuses(&self, args: &[&str]) -> Refusal {
        self.refuses(&[&["generate", "--model", MODEL, "-n", "1"][..], args].concat())
    }
}

/// Standard output of a run that ended well.
fn succeeds(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A run that failed as it should: nothing on standard output, one sentence on standard error.
struct Refusal {
    status: i32,
    sentence: String,
    /// The lines after the sentence.
    rest: String,
    what: String,
}

impl Refusal {
    fn of(output: &Output, what: &str) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let status = output.status.code().unwrap_or_else(|| panic!("{what}: ended by a signal: {stderr}"));
        assert!(matches!(status, 1 | 2), "{what}: status {status}: {stderr}");
        assert!(!stderr.contains("panicked"), "{what}: {stderr}");
        let sentences = stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(sentences, 1, "{what}: expected one sentence, got {stderr}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{what}: text on standard output");
        let (sentence, rest) = stderr.split_once('\n').unwrap();
        let sentence = sentence.strip_prefix("error: ").unwrap_or_else(|| panic!("{what}: {stderr}"));
        Self { status, sentence: sentence.to_owned(), rest: rest.to_owned(), what: what.to_owned() }
    }

    #[track_caller]
    fn status(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "{}: {}", self.what, self.sentence);
        self
    }

    /// The sentence holds a path or value.
    #[track_caller]
    fn names(&self, part: impl AsRef<Path>) -> &Self {
        let part = part.as_ref().to_str().unwrap();
        assert!(self.sentence.contains(part), "{}: expected `{part}` in: {}", self.what, self.sentence);
        self
    }

    /// One line follows, the remedy.
    #[track_caller]
    fn hints(&self, part: &str) -> &Self {
        let hint = self.rest.strip_prefix("hint: ").and_then(|hint| hint.strip_suffix('\n'));
        let hint = hint.unwrap_or_else(|| panic!("{}: expected a hint after: {}", self.what, self.sentence));
        assert!(hint.contains(part) && !hint.contains('\n'), "{}: expected `{part}` in: {hint}", self.what);
        self
    }

    /// Nothing follows, or a hint.
    #[track_caller]
    fn is_short(&self) -> &Self {
        let lines: Vec<_> = self.rest.lines().collect();
        assert!(
            lines.is_empty() || (lines.len() == 1 && lines[0].starts_with("hint: ")),
            "{}: {}",
            self.what,
            self.rest
        );
        self
    }
}
