//! What becomes of the library's events: the log file, in the format of the original
//! (`2024-05-14 18:03:11,862 - INFO - message`, local time, appended), and standard error, as far as `RUST_LOG` asks for
//! them.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use adaptive_kvcache::cache::CacheBytes;
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::{Error, events, files};
use anyhow::Context;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

use super::args::CacheArgs;
use super::terminal::note;

/// The variable that says which events go to standard error.
const VARIABLE: &str = "RUST_LOG";

/// The log of a run.
pub struct Log {
    path: PathBuf,
    /// The user did not name it, so that a run without it is what was asked for, too.
    is_default: bool,
    failure: Arc<Mutex<Option<io::Error>>>,
}

impl Log {
    /// Sends this program's events, from INFO up, to the end of the log; its folder is made if missing. If the user did not
    /// name it and it cannot be opened, a note says so, and nothing is logged.
    pub fn start(args: &CacheArgs) -> anyhow::Result<Self> {
        let (path, is_default) = (args.log_path(), args.log_file.is_none());
        let failure = Arc::new(Mutex::new(None));
        let log = Self { path: path.to_owned(), is_default, failure: Arc::clone(&failure) };
        let file = match files::open_to_append(path) {
            Ok(file) => Some(Mutex::new(LogWriter { file, is_broken: false, failure })),
            Err(source) => {
                log.failed(Error::io("open log", path, source).with_hint("choose another place with --log-file"))?;
                None
            }
        };
        subscribe(file)?;
        Ok(log)
    }

    /// What a failure of the log means: the run's, or a note.
    fn failed(&self, error: Error) -> Result<(), Error> {
        if self.is_default {
            note(format_args!("{error}; nothing more is logged"));
            return Ok(());
        }
        Err(error)
    }

    /// Whether everything so far was written.
    ///
    /// # Errors
    /// [`Error::Io`] with the path and the first failure, if the user named the log.
    pub fn check(&self) -> Result<(), Error> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(source) => self.failed(Error::io("write log", &self.path, source)),
            None => Ok(()),
        }
    }
}

/// Sends events to standard error, as far as the environment asks for them; for commands without a log.
pub fn start() -> anyhow::Result<()> {
    subscribe(None)
}

fn subscribe(log: Option<Mutex<LogWriter>>) -> anyhow::Result<()> {
    let wanted = std::env::var_os(VARIABLE).filter(|wanted| !wanted.is_empty());
    let filter = wanted.map(|wanted| wanted.to_str().and_then(|wanted| EnvFilter::try_new(wanted).ok()).ok_or(wanted));
    let filter = filter.transpose().map_err(|wanted| {
        Error::input(format!("{VARIABLE} is `{}`, which names no events", wanted.display())).with_hint(format!(
            "unset {VARIABLE}, or set it to a level, as `info`, or to `adaptive_kvcache::head=info`"
        ))
    })?;
    let stderr = filter.map(|filter| {
        let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
        layer.with_filter(filter)
    });
    let subscriber = Registry::default().with(log.map(log_layer)).with(stderr);
    tracing::subscriber::set_global_default(subscriber).context("failed to start the log")
}

/// Writes the events of this program as the original did.
fn log_layer<S, W>(writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static + Send + Sync,
{
    let layer = tracing_subscriber::fmt::layer().event_format(OriginalFormat).with_writer(writer);
    // Scripts read the log: heads and layers, and nothing else.
    let targets = Targets::new().with_target("adaptive_kvcache", Level::INFO);
    layer.with_filter(targets.with_target(events::THREADS, LevelFilter::OFF))
}

/// Writes to the log and keeps the first failure, which `tracing` has no way to return.
struct LogWriter {
    file: File,
    is_broken: bool,
    failure: Arc<Mutex<Option<io::Error>>>,
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_broken
            && let Err(error) = self.file.write_all(bytes)
        {
            // Half a log that goes on behind a gap would mislead.
            self.is_broken = true;
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        // `tracing` would print a line of its own for every event that fails; `Log::check` reports it once.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

struct OriginalFormat;

impl<S, N> FormatEvent<S, N> for OriginalFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let now = chrono::Local::now();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let (level, message) = (event.metadata().level(), fields.message(event.metadata().target()));
        writeln!(writer, "{} - {level} - {message}", now.format("%Y-%m-%d %H:%M:%S,%3f"))
    }
}

/// The fields of an event that the log writes.
#[derive(Default)]
struct Fields {
    message: String,
    policies: String,
    layer: u64,
    head: u64,
    seen: u64,
    kept: u64,
    raw_bytes: usize,
    kept_bytes: usize,
}

impl Fields {
    /// What the log says of an event. Scripts read it, so it stays as it is.
    fn message(&self, target: &str) -> String {
        let Self { message, policies, layer, head, seen, kept, raw_bytes, kept_bytes } = self;
        match target {
            events::HEAD => {
                let policies = policies.replace(", ", "', '");
                format!("layer_id:{layer}(heads:{head})->['{policies}']-> kv cache len:{seen}->{kept}")
            }
            events::LAYER => {
                let saved = raw_bytes.saturating_sub(*kept_bytes);
                let bytes = CacheBytes { raw: *raw_bytes, kept: *kept_bytes, allocated: *kept_bytes, mapped: 0 };
                format!(
                    "layer_id:{layer} cache:\n{:.3} MB -> {:.3}MB\nsaving:\n{:.3}MB ({:.3})%",
                    megabytes(*raw_bytes),
                    megabytes(*kept_bytes),
                    megabytes(saved),
                    100.0 * bytes.saved_ratio()
                )
            }
            _ => message.clone(),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "policies" => value.clone_into(&mut self.policies),
            _ => self.record_debug(field, &format_args!("{value}")),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        let bytes = || usize::try_from(value).unwrap_or(usize::MAX);
        match field.name() {
            "layer" => self.layer = value,
            "head" => self.head = value,
            "seen" => self.seen = value,
            "kept" => self.kept = value,
            "raw_bytes" => self.raw_bytes = bytes(),
            "kept_bytes" => self.kept_bytes = bytes(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use adaptive_kvcache::cache::{HeadSummary, LayerSummary};
    use adaptive_kvcache::compress::AdaptiveConfig;
    use adaptive_kvcache::compress::budget::methods::SnapKv;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What the log has of an event, without the time stamps.
    fn logged(summary: &LayerSummary, config: &AdaptiveConfig) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = Registry::default().with(log_layer(move || writer.clone()));
        tracing::subscriber::with_default(subscriber, || events::layer_decided(summary, config));
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let stamped = |line: &str| line.len() > 23 && line.as_bytes()[4] == b'-' && line.as_bytes()[19] == b',';
        text.lines().map(|line| if stamped(line) { &line[23..] } else { line }).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn lines_are_the_originals() {
        let head = |kv_head, level, kept: u32| HeadSummary {
            kv_head,
            level: Some(level),
            recovered: vec![0.0; level + 1],
            positions: (0..kept).collect(),
        };
        // Llama-2-7B, layer 30: 32 heads, 18 tokens, f16; 467 of 576 kept.
        let summary = LayerSummary {
            layer: 30,
            prompt_len: 18,
            heads: vec![head(0, 4, 18), head(1, 2, 16), head(2, 0, 2)],
            bytes: CacheBytes { raw: 576 * 512, kept: 467 * 512, allocated: 467 * 512, mapped: 0 },
        };
        let expected = " - INFO - layer_id:30(heads:2)->['special']-> kv cache len:18->2
 - INFO - layer_id:30(heads:1)->['special', 'punctuation', 'frequency']-> kv cache len:18->16
 - INFO - layer_id:30(heads:0)->['full']-> kv cache len:18->18
 - INFO - layer_id:30 cache:
0.281 MB -> 0.228MB
saving:
0.053MB (18.924)%";
        assert_eq!(logged(&summary, &AdaptiveConfig::default()), expected);
        let full = HeadSummary { level: None, ..head(0, 0, 18) };
        assert_eq!(logged(&LayerSummary { heads: vec![full], ..summary }, &AdaptiveConfig::default()), "");
    }

    #[test]
    fn a_method_stands_in_place_of_policies() {
        let head = HeadSummary { kv_head: 1, level: Some(0), recovered: Vec::new(), positions: (0..1024).collect() };
        let summary = LayerSummary { layer: 3, prompt_len: 2048, heads: vec![head], bytes: CacheBytes::default() };
        let text = logged(&summary, &AdaptiveConfig::for_method(&SnapKv::DEFAULT));
        assert!(text.starts_with(" - INFO - layer_id:3(heads:1)->['snapkv']-> kv cache len:2048->1024\n"), "{text}");
    }
}
