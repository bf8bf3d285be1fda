//! Settings of the hub from the environment, and a bar while files are fetched.
//!
//! The variables are those of `huggingface_hub`
//! (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).

use std::env;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;

use adaptive_kvcache::Error;
use adaptive_kvcache::hub::{self, HubSettings, Progress};
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::interrupt::interrupted;
use crate::cli::plain;
use crate::cli::terminal::note;

const ENDPOINT: &str = "https://huggingface.co";

/// Fetches a model, or finds it in the cache.
pub fn fetch(id: &str) -> anyhow::Result<PathBuf> {
    let settings = settings()?;
    let bar = progress_bar();
    let path = hub::fetch(id, &settings, &mut |progress| {
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
    let token = text("HF_TOKEN")?.or_else(|| {
        let token = std::fs::read_to_string(home.join("token")).ok()?;
        Some(token.trim().to_owned()).filter(|token| !token.is_empty())
    });
    let offline = text("HF_HUB_OFFLINE")?.unwrap_or_default().to_ascii_lowercase();
    Ok(HubSettings {
        cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        endpoint: text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.to_owned()),
        token,
        offline: matches!(offline.as_str(), "1" | "true" | "yes" | "on"),
        proxy: proxy()?,
    })
}

/// A variable that is set to something; blanks around it do not count.
///
/// # Errors
/// [`Error::Input`] with its name if it is not text, or nothing but blanks: to go on as if it were not set could be to ask
/// somebody else than was meant.
fn text(name: &str) -> Result<Option<String>, Error> {
    let Some(value) = env::var_os(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    match value.to_str().map(str::trim) {
        Some(text) if !text.is_empty() => Ok(Some(text.to_owned())),
        // It may be a secret.
        _ => Err(Error::input(format!("{name} is set to what is not text, or to nothing but blanks"))
            .with_hint(format!("unset {name}, or set it to what you mean"))),
    }
}

/// The proxy that the environment names.
///
/// # Errors
/// [`Error::Input`] if it cannot be used: without it, a host would be asked directly.
fn proxy() -> Result<Option<ureq::Proxy>, Error> {
    for name in ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"] {
        let Some(value) = text(name)? else { continue };
        if ureq::Proxy::new(&value).is_err() {
            // It may hold a password.
            return Err(Error::input(format!("{name} is not the address of a proxy that can be used"))
                .with_hint("expected http(s)://host[:port] or socks4|socks5://host[:port]"));
        }
        break;
    }
    Ok(ureq::Proxy::try_from_env())
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
        Progress::Damaged { name, reason } => {
            bar.suspend(|| note(format_args!("`{name}` in the cache is damaged ({reason}): it is fetched anew")));
        }
        Progress::Cached { reason, path } => {
            bar.suspend(|| note(format_args!("{reason}; taking the copy at `{}`", path.display())));
        }
        _ => {}
    }
}
