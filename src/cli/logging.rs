//! The log file, in the format of the original: `2024-05-14 18:03:11,862 - INFO - message`, local time, appended.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use adaptive_kvcache::{Error, files};
use anyhow::Context;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::args::CacheArgs;
use super::terminal::note;

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
            Ok(file) => file,
            Err(source) => {
                log.failed(Error::io("open log", path, source).with_hint("choose another place with --log-file"))?;
                return Ok(log);
            }
        };
        let subscriber = tracing_subscriber::fmt()
            .event_format(OriginalFormat)
            .with_env_filter("off,adaptive_kvcache=info")
            .with_writer(Mutex::new(LogWriter { file, is_broken: false, failure }))
            .finish();
        tracing::subscriber::set_global_default(subscriber).context("failed to start the log")?;
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
