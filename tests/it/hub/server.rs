//! A small server that plays the hub: it behaves as a test says, and notes what it was asked for.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use super::*;

/// How the server behaves; a test changes what it is about.
#[derive(Clone, Default)]
pub struct Play {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files whose content another port has, and their etags.
    pub large: BTreeMap<String, String>,
    /// Names in the answer about the model that have no file.
    pub more_names: Vec<String>,
    pub needs_token: bool,
    /// The connection ends after so many bytes of a body longer than that.
    pub cut_after: Option<usize>,
    /// Added to each length that is promised before the file itself is asked for.
    pub lie: i64,
    /// The server knows no ranges.
    pub no_ranges: bool,
    pub commit: Option<String>,
    /// Requests whose path holds the first are led to the second, another host.
    pub lead_away: Option<(String, String)>,
}

/// One request as it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub token: Option<String>,
    pub range: Option<String>,
    /// Asked of the port that has the large files.
    pub storage: bool,
}

struct State {
    play: Mutex<Play>,
    asked: Mutex<Vec<Asked>>,
    storage: SocketAddr,
    ended: AtomicBool,
}

/// The hub, and storage on another port.
pub struct Hub {
    pub address: SocketAddr,
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

impl Hub {
    pub fn new(play: Play) -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [address, storage] = [0, 1].map(|i| listeners[i].local_addr().unwrap());
        let ended = AtomicBool::new(false);
        let state = Arc::new(State { play: Mutex::new(play), asked: Mutex::default(), storage, ended });
        let serve = |(listener, is_storage): (TcpListener, bool)| {
            let state = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if state.ended.load(Ordering::SeqCst) {
                        break;
                    }
                    // A client that went away is its own affair.
                    let _ = stream.and_then(|stream| answer(stream, &state, is_storage));
                }
            })
        };
        let threads = listeners.into_iter().zip([false, true]).map(serve).collect();
        Self { address, state, threads }
    }

    pub fn play(&self) -> MutexGuard<'_, Play> {
        self.state.play.lock().unwrap()
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn settings(&self, cache: &Path) -> HubSettings {
        let (cache, endpoint) = (cache.to_owned(), self.endpoint());
        HubSettings { cache, endpoint, token: None, offline: false, proxy: None }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        for address in [self.address, self.state.storage] {
            // Wakes the thread, which then sees that it is to end.
            let _ = TcpStream::connect(address);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Answers one request; each has a connection of its own.
fn answer(mut stream: TcpStream, state: &State, storage: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let (token, range) = (headers.get("authorization").cloned(), headers.get("range").cloned());
    let asked = Asked { method, path, token, range, storage };
    state.asked.lock().unwrap().push(asked.clone());
    let play = state.play.lock().unwrap().clone();
    let (status, head, body) = reply(&play, &asked, state.storage);
    let length = body.len();
    let length = if head.contains("content-length") { String::new() } else { format!("content-length: {length}\r\n") };
    write!(stream, "HTTP/1.1 {status} X\r\nconnection: close\r\n{length}{head}\r\n")?;
    if asked.method == "HEAD" {
        return Ok(());
    }
    let is_file = asked.path.contains("/resolve/") || storage;
    let end = play.cut_after.filter(|_| is_file).unwrap_or(usize::MAX).min(body.len());
    stream.write_all(&body[..end])
}

/// Status, headers and body.
fn reply(play: &Play, asked: &Asked, storage: SocketAddr) -> (u16, String, Vec<u8>) {
    let none = |status| (status, String::new(), Vec::new());
    if let Some((part, host)) = &play.lead_away
        && asked.path.contains(part)
    {
        return (307, format!("location: {host}{}\r\n", asked.path), Vec::new());
    }
    if play.needs_token && !asked.storage && asked.token.as_deref() != Some(&format!("Bearer {TOKEN}")) {
        return none(401);
    }
    let commit = play.commit.as_deref().unwrap_or(COMMIT);
    if ["main", "v1"].iter().any(|revision| asked.path == format!("/api/models/owner/mha/revision/{revision}")) {
        let names = play.files.keys().chain(&play.more_names);
        let siblings: Vec<_> = names.map(|name| serde_json::json!({ "rfilename": name })).collect();
        let info = serde_json::json!({ "sha": commit, "siblings": siblings });
        return (200, String::new(), info.to_string().into_bytes());
    }
    let prefix = if asked.storage { "/storage/".to_owned() } else { format!("/owner/mha/resolve/{commit}/") };
    let Some(name) = asked.path.strip_prefix(&prefix) else { return none(404) };
    let Some(content) = play.files.get(name) else { return none(404) };
    let promised = i64::try_from(content.len()).unwrap() + play.lie;
    if !asked.storage
        && let Some(etag) = play.large.get(name)
    {
        let head = format!(
            "location: http://{storage}/storage/{name}\r\nx-repo-commit: {commit}\r\n\
             x-linked-etag: \"{etag}\"\r\nx-linked-size: {promised}\r\netag: \"other\"\r\n"
        );
        return (302, head, b"moved".to_vec());
    }
    let head = format!("x-repo-commit: {commit}\r\netag: \"etag-{}\"\r\n", name.replace('/', "-"));
    if asked.method == "HEAD" {
        return (200, format!("{head}content-length: {promised}\r\n"), Vec::new());
    }
    let from = asked.range.as_ref().filter(|_| !play.no_ranges).map(|range| {
        let from = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        from.unwrap().parse::<usize>().unwrap()
    });
    match from {
        Some(from) if from >= content.len() => none(416),
        Some(from) => {
            let (last, size) = (content.len() - 1, content.len());
            (206, format!("{head}content-range: bytes {from}-{last}/{size}\r\n"), content[from..].to_vec())
        }
        None => (200, head, content.clone()),
    }
}
