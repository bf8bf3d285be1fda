//! The log file, in the format of the original: `2024-05-14 18:03:11,862 - INFO - message`, local time, appended.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use adaptive_kvcache::Error;
use anyhow::Context;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The log of a run.
pub struct Log {
    path: PathBuf,
    failure: Arc<Mutex<Option<io::Error>>>,
}

impl Log {
    /// Sends this program's events, from INFO up, to the end of a file; its folder is made if missing.
    pub fn start(path: &Path) -> anyhow::Result<Self> {
        let file = open(path)
            .map_err(|source| Error::io("open log", path, source).with_hint("choose another place with --log-file"))?;
        let failure = Arc::new(Mutex::new(None));
        let subscriber = tracing_subscriber::fmt()
            .event_format(OriginalFormat)
            .with_env_filter("off,adaptive_kvcache=info")
            .with_writer(Mutex::new(LogWriter { file, failure: Arc::clone(&failure) }))
            .finish();
        tracing::subscriber::set_global_default(subscriber).context("failed to start the log")?;
        Ok(Self { path: path.to_owned(), failure })
    }

    /// Whether everything so far was written.
    ///
    /// # Errors
    /// [`Error::Io`] with the path and the first failure.
    pub fn check(&self) -> Result<(), Error> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(source) => Err(Error::io("write log", &self.path, source)),
            None => Ok(()),
        }
    }
}

/// Writes to the log and keeps the first failure, which `tracing` has no way to return.
struct LogWriter {
    file: File,
    failure: Arc<Mutex<Option<io::Error>>>,
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.file.write_all(bytes) {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        // `tracing` would print a line of its own for every event that fails; `Log::check` reports it once.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

struct OriginalFormat;

impl<S, N> FormatEvent<S, N> for OriginalFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let now = chrono::Local::now();
        let mut message = Message(String::new());
        event.record(&mut message);
        let level = event.metadata().level();
        writeln!(writer, "{} - {level} - {}", now.format("%Y-%m-%d %H:%M:%S,%3f"), message.0)
    }
}

/// Picks the message out of an event's fields.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
