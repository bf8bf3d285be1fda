//! Models by their id on a hub: settings from the environment, a bar while files are fetched.
//!
//! The variables are those of `huggingface_hub`
//! (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).

use std::env;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use adaptive_kvcache::hub::{self, HubSettings, Progress};
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt::interrupted;
use super::plain;
use super::terminal::note;

const ENDPOINT: &str = "https://huggingface.co";

/// The path of a model: itself if it is there, or the local copy of what it names on a hub.
///
/// A text that is neither is returned as it is, so that opening it says what is wrong.
pub fn local_path(model: &Path) -> anyhow::Result<PathBuf> {
    let Some(id) = model.to_str().filter(|text| !model.exists() && hub::is_hub_id(text)) else {
        return Ok(model.to_owned());
    };
    let bar = progress_bar();
    let path = hub::fetch(id, &settings()?, &mut |progress| {
        show(&bar, progress);
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    Ok(path?)
}

/// Where the hub and its cache are, as the environment says.
fn settings() -> anyhow::Result<HubSettings> {
    let home = match (path("HF_HOME"), path("XDG_CACHE_HOME")) {
        (Some(home), _) => home,
        (None, Some(cache)) => cache.join("huggingface"),
        (None, None) => {
            let home = env::home_dir().filter(|home| !home.as_os_str().is_empty());
            home.context("there is no home folder for the hub's cache: set HF_HOME")?.join(".cache/huggingface")
        }
    };
    let token = text("HF_TOKEN").or_else(|| {
        let token = std::fs::read_to_string(home.join("token")).ok()?;
        Some(token.trim().to_owned()).filter(|token| !token.is_empty())
    });
    let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    Ok(HubSettings {
        cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        endpoint: text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
        token,
        offline: matches!(offline.as_str(), "1" | "true" | "yes" | "on"),
        proxy: ureq::Proxy::try_from_env(),
    })
}

/// A variable that is set to something.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

fn path(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// A bar on standard error if that is a terminal, else nothing.
fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn show(bar: &ProgressBar, progress: Progress<'_>) {
    match progress {
        Progress::Asking { what } => bar.set_message(plain(what)),
        Progress::File { name, done, size } => {
            let is_new = bar.length() != Some(size) || bar.position() > done;
            if is_new {
                bar.set_message(plain(name));
                bar.set_length(size);
                bar.set_position(done);
                // What was there before does not count as fetched.
                bar.reset_eta();
            }
            bar.set_position(done);
        }
        Progress::Cached { reason, path } => {
            bar.suspend(|| note(format_args!("{reason}; taking the copy at `{}`", path.display())));
        }
        _ => {}
    }
}
