//! Requests to the hub: redirects with the token kept to the endpoint, statuses as sentences, transfers that resume.
//!
//! Done here and not by the crate `hf-hub`, whose client cannot be interrupted, appends to a partial file whatever the
//! server answers, and does not check what it got.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RANGE};
use ureq::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::address::{Origin, endpoint_origin, origin, resolve, show};
use super::settings::{HubSettings, Observer, Progress};
use super::sums::{Digests, Metadata, is_whole};
use crate::error::{Error, Result};

/// Longest answer to a question about a repository.
const MAX_JSON_BYTES: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 10;
/// Bytes between two calls of the observer.
const CHUNK: usize = 256 << 10;

/// Time for a connection to come to be.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Time without a byte after which a connection counts as lost.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two tries to lock a file that another process fetches.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");

/// Why a file is not there.
pub(super) enum Failure {
    /// The hub cannot be used at the moment; a copy in the cache may do.
    Network { reason: String, hint: &'static str },
    /// Nothing else will do.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// What is missing of a file, as storage sends it.
struct Rest {
    origin: Origin,
    answer: Response<Body>,
    /// Where it begins: 0 if storage sends the whole file, whatever it was asked for.
    from: u64,
}

/// How far redirects are followed.
#[derive(Clone, Copy)]
enum Reach {
    /// On the endpoint's host.
    Endpoint,
    /// To storage elsewhere, where the hub has a file's content, which is wanted from this byte on.
    Storage { from: u64 },
}

pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    origin: Origin,
    authorization: Option<HeaderValue>,
    repo: &'a str,
}

impl<'a> Client<'a> {
    /// * `repo`: for messages
    pub(super) fn new(settings: &'a HubSettings, repo: &'a str) -> Result<Self> {
        let endpoint = settings.endpoint.trim_end_matches('/');
        let origin = endpoint_origin(endpoint).ok_or_else(|| {
            Error::input(format!("`{}` is not the address of a hub", settings.endpoint))
                .with_hint("expected http(s)://host[:port][/path], which is what HF_ENDPOINT gives")
        })?;
        let authorization = settings.token.as_ref().map(|token| {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
                .map_err(|_| Error::input("the hub's token holds characters that no token has"))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .proxy(settings.proxy.clone())
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT));
        let agent = config.build().new_agent();
        Ok(Self { agent, endpoint, origin, authorization: authorization.transpose()?, repo })
    }

    pub(super) fn endpoint(&self) -> &str {
        self.endpoint
    }

    /// Gets a small answer.
    pub(super) fn get(&self, url: &str) -> Result<Vec<u8>, Failure> {
        let (_, response) = self.follow(&Method::GET, url, Reach::Endpoint, |_| true)?;
        let body = response.into_body().into_with_config().limit(MAX_JSON_BYTES);
        body.read_to_vec().map_err(|error| unreachable(self.endpoint, &error))
    }

    /// Asks what a file is, without its content.
    pub(super) fn metadata(&self, url: &str) -> Result<Metadata, Failure> {
        let (mut etag, mut size) = (None, None);
        // What the hub says itself is in its first answer; storage that it redirects to may not answer such a question.
        let (_, response) = self.follow(&Method::HEAD, url, Reach::Endpoint, |headers| {
            etag = etag.take().or_else(|| text(headers, &LINKED_ETAG));
            size = size.take().or_else(|| text(headers, &LINKED_SIZE));
            etag.is_none() || size.is_none()
        })?;
        let headers = response.headers();
        let etag = etag.or_else(|| text(headers, &ETAG)).unwrap_or_default();
        let size = size.or_else(|| text(headers, &CONTENT_LENGTH)).and_then(|size| size.parse().ok());
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let is_safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if etag.is_empty() || etag.len() > 128 || etag.starts_with('.') || !etag.chars().all(is_safe) {
            return Err(Error::hub(format!("the hub names no usable version (etag) of `{url}`")).into());
        }
        let size = size.ok_or_else(|| Error::hub(format!("the hub does not say how long `{url}` is")))?;
        Ok(Metadata { etag, size })
    }

    /// Fetches a file to `blob`, by way of `blob.part`, which stays if the transfer ends early and is then continued.
    pub(super) fn download(
        &self,
        name: &str,
        url: &str,
        metadata: &Metadata,
        blob: &Path,
        observer: &mut Observer<'_>,
    ) -> Result<(), Failure> {
        let size = metadata.size;
        let mut part_path = blob.as_os_str().to_owned();
        part_path.push(".part");
        let part_path = PathBuf::from(part_path);
        let failed = |action| {
            let path = part_path.clone();
            move |source| Failure::Final(Error::io(action, path, source))
        };
        let options = File::options().read(true).write(true).create(true).truncate(false).open(&part_path);
        let mut part = options.map_err(failed("create"))?;
        lock(&part, name, observer)?;
        if is_whole(blob, metadata)? {
            // Another process has made it since; what was opened is its file, or a new one that nobody needs.
            let _ = std::fs::remove_file(&part_path);
            return Ok(());
        }

        let mut done = part.metadata().map_err(failed("read"))?.len();
        if done > size {
            done = 0;
        }
        let mut response = None;
        if done < size {
            let rest = self.rest(name, url, size, done)?;
            done = rest.from;
            response = Some(rest);
        }

        let mut hash = Digests::of(&metadata.etag, size);
        let mut buffer = vec![0; CHUNK];
        if let Some(hash) = &mut hash {
            for start in (0..done).step_by(CHUNK) {
                tell(observer, Progress::File { name, done: start, size })?;
                let want = usize::try_from(done - start).unwrap_or(CHUNK).min(CHUNK);
                part.read_exact(&mut buffer[..want]).map_err(failed("read"))?;
                hash.write_all(&buffer[..want]).map_err(failed("read"))?;
            }
        }
        part.set_len(done).and_then(|()| part.seek(SeekFrom::Start(done))).map_err(failed("write"))?;
        if let Some(Rest { origin, mut answer, .. }) = response {
            let mut body = answer.body_mut().as_reader();
            loop {
                tell(observer, Progress::File { name, done, size })?;
                let cut = |reason: &str| Failure::Network {
                    reason: format!(
                        "the transfer of `{name}` from `{}` ended after {done} of {size} bytes: {reason}",
                        show(&origin)
                    ),
                    hint: "run it again: it goes on where it ended",
                };
                let read = match body.read(&mut buffer) {
                    Ok(0) if done < size => return Err(cut("the connection was closed")),
                    Ok(0) => break,
                    Ok(read) => read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(cut(&error.to_string())),
                };
                if read as u64 > size - done {
                    part.set_len(0).map_err(failed("write"))?;
                    return Err(wrong_length(name, size, done + read as u64).into());
                }
                part.write_all(&buffer[..read]).map_err(failed("write"))?;
                if let Some(hash) = &mut hash {
                    hash.write_all(&buffer[..read]).map_err(failed("write"))?;
                }
                done += read as u64;
            }
        }
        if let Some(hash) = hash
            && !hash.finish().eq_ignore_ascii_case(&metadata.etag)
        {
            // It is of no use, and would be taken for the start of the right one.
            part.set_len(0).map_err(failed("write"))?;
            return Err(Error::hub(format!("`{name}` arrived damaged: its sum is not the one that the hub gives"))
                .with_hint("run it again to fetch it anew")
                .into());
        }
        std::fs::rename(&part_path, blob).map_err(failed("rename"))
    }

    /// Asks for what is missing of a file.
    ///
    /// * `size`: bytes of the whole file
    /// * `done`: those that are there, fewer
    fn rest(&self, name: &str, url: &str, size: u64, done: u64) -> Result<Rest, Failure> {
        let (origin, answer) = self.follow(&Method::GET, url, Reach::Storage { from: done }, |_| true)?;
        let is_part = answer.status() == StatusCode::PARTIAL_CONTENT;
        if is_part && text(answer.headers(), &CONTENT_RANGE) != Some(format!("bytes {done}-{}/{size}", size - 1)) {
            let reason = format!("`{}` answers with another part of `{name}` than it was asked for", show(&origin));
            return Err(Error::hub(reason).into());
        }
        let from = if is_part { done } else { 0 };
        match answer.body().content_length() {
            Some(length) if length != size - from => Err(wrong_length(name, size, from + length).into()),
            _ => Ok(Rest { origin, answer, from }),
        }
    }

    /// Sends a request and follows redirects as far as `reach`, as long as `go_on` says so of the headers.
    fn follow(
        &self,
        method: &Method,
        url: &str,
        reach: Reach,
        mut go_on: impl FnMut(&HeaderMap) -> bool,
    ) -> Result<(Origin, Response<Body>), Failure> {
        let bad = |url: &str| Failure::Final(Error::hub(format!("the hub answers with the unusable address `{url}`")));
        let mut uri: Uri = url.parse().map_err(|_| bad(url))?;
        for _ in 0..=MAX_REDIRECTS {
            let here = origin(&uri).ok_or_else(|| bad(&uri.to_string()))?;
            let mut request = Request::builder().method(method).uri(&uri);
            if let Reach::Storage { from: from @ 1.. } = reach {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if let Some(authorization) = self.authorization.as_ref().filter(|_| here == self.origin) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let request = request.body(()).map_err(|_| bad(&uri.to_string()))?;
            let response = self.agent.run(request).map_err(|error| unreachable(&show(&here), &error))?;
            let status = response.status();
            let wants_more = go_on(response.headers());
            if !status.is_redirection() {
                self.check(&here, status, url)?;
                return Ok((here, response));
            }
            if !wants_more {
                return Ok((here, response));
            }
            let location = text(response.headers(), &LOCATION).unwrap_or_default();
            let next = resolve(&uri, &location).ok_or_else(|| bad(&location))?;
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(bad(&location));
            }
            // What a model is made of is never asked of anybody else than whom the user has named.
            if matches!(reach, Reach::Endpoint) && origin(&next).is_none_or(|(_, host, _)| host != self.origin.1) {
                let reason = format!("`{}` leads away to `{location}`", self.endpoint);
                return Err(Error::hub(reason).with_hint("set HF_ENDPOINT to a hub that answers itself").into());
            }
            uri = next;
        }
        Err(Error::hub(format!("`{}` redirects in circles", self.endpoint)).into())
    }

    fn check(&self, here: &Origin, status: StatusCode, url: &str) -> Result<(), Failure> {
        let (repo, endpoint) = (self.repo, self.endpoint);
        let later = || Failure::Network {
            reason: format!("`{}` answers with status {status}", show(here)),
            hint: "try again later, or give a local path",
        };
        let error = match status.as_u16() {
            200..=299 => return Ok(()),
            // Storage that the hub redirects to refuses a link that is too old.
            400..=499 if *here != self.origin => return Err(later()),
            401 | 403 => {
                let reason = if self.authorization.is_some() { "that may read it is needed" } else { "is needed" };
                Error::hub(format!("a token {reason} for `{repo}` at `{endpoint}`, or there is no such model"))
                    .with_hint(format!("check the id; accept the model's terms at {endpoint}/{repo}, and set HF_TOKEN"))
            }
            404 => Error::hub(format!("`{repo}` does not exist at `{endpoint}`: nothing is at `{url}`"))
                .with_hint("check the id and the revision, or give a local path"),
            408 | 429 | 500..=599 => return Err(later()),
            _ => Error::hub(format!("`{endpoint}` answers with status {status} to `{url}`")),
        };
        Err(error.into())
    }
}

fn unreachable(place: &str, error: &ureq::Error) -> Failure {
    let cause = match error {
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    Failure::Network {
        reason: format!("`{place}` cannot be reached: {cause}"),
        hint: "check the network and HF_ENDPOINT, or give a local path",
    }
}

/// Waits until no other process fetches the same file.
///
/// * `part`: what is there of it so far
/// * `name`: what the observer is told
fn lock(part: &File, name: &str, observer: &mut Observer<'_>) -> Result<(), Failure> {
    loop {
        match part.try_lock() {
            // Some network drives know no locks.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                tell(observer, Progress::Asking { what: name })?;
                std::thread::sleep(LOCK_INTERVAL);
            }
        }
    }
}

/// Tells the observer, and ends if it says so.
pub(super) fn tell(observer: &mut Observer<'_>, progress: Progress<'_>) -> Result<()> {
    match observer(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    }
}

fn wrong_length(name: &str, expected: u64, got: u64) -> Error {
    Error::hub(format!("the hub gives `{name}` a length of {expected} bytes, and sends {got}"))
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
