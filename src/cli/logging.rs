//! The log file, in the format of the original: `2024-05-14 18:03:11,862 - INFO - message`, local time, appended.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Mutex;

use adaptive_kvcache::Error;
use anyhow::Context;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Sends this program's events, from INFO up, to the end of a file; its folder is made if missing.
pub fn to_file(path: &Path) -> anyhow::Result<()> {
    let file = open(path)
        .map_err(|source| Error::io("open log", path, source).with_hint("choose another place with --log-file"))?;
    let subscriber = tracing_subscriber::fmt()
        .event_format(OriginalFormat)
        .with_env_filter("off,adaptive_kvcache=info")
        .with_writer(Mutex::new(file))
        .finish();
    tracing::subscriber::set_global_default(subscriber).context("failed to start the log")
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
