//! Models by their id: a small server plays the hub, and says afterwards what it was asked for.
//!
//! Not for: which files are chosen, and which texts are ids (see the module's own tests).

mod server;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use adaptive_kvcache::hub::{HubSettings, Progress, fetch};
use adaptive_kvcache::{Error, Result};

use server::{Asked, Hub, Play};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/fixtures");

/// A model with a file on each port; no tensor is ever read of it.
fn model() -> Play {
    let weights: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let files = [
        ("config.json", b"{\"a\": 1}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("README.md", b"not needed".to_vec()),
        ("model.safetensors", weights),
    ];
    let files = files.map(|(name, content)| (name.to_owned(), content)).into();
    Play { files, large: [("model.safetensors".to_owned(), SHA256.to_owned())].into(), ..Play::default() }
}

/// Of the weights in `model`.
const SHA256: &str = "ac64956bfb8b88d81f18a14627f9e7a1b5a9cdf2034344cbe78817d474154fb8";

fn get(settings: &HubSettings) -> Result<PathBuf> {
    fetch("owner/mha", settings, &mut |_| ControlFlow::Continue(()))
}

/// The message, with its hint, of what must fail.
#[track_caller]
fn refuses(settings: &HubSettings) -> String {
    refuses_id("owner/mha", settings)
}

#[track_caller]
fn refuses_id(id: &str, settings: &HubSettings) -> String {
    let error = fetch(id, settings, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::Hub { .. } | Error::Unsupported { .. }), "{error:?}");
    format!("{error} [{}]", error.hint().unwrap_or_default())
}

#[track_caller]
fn assert_holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
}

/// The needed files are there, byte for byte.
#[track_caller]
fn assert_whole(folder: &Path, play: &Play) {
    for (name, content) in play.files.iter().filter(|(name, _)| *name != "README.md") {
        let got = std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(got == *content, "{name} differs");
    }
}

/// Requests for the content of files.
fn bodies(asked: &[Asked]) -> Vec<&Asked> {
    asked.iter().filter(|asked| asked.method == "GET" && !asked.path.starts_with("/api/")).collect()
}

#[test]
fn a_model_is_fetched_once() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let mut sizes = BTreeMap::new();
    let folder = fetch("owner/mha", &settings, &mut |progress| {
        if let Progress::File { name, done, size } = progress {
            sizes.insert(name.to_owned(), (done, size));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let root = cache.path().join("models--owner--mha");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_whole(&folder, &hub.play());
    assert!(!folder.join("README.md").exists());
    assert_eq!(sizes["model.safetensors"], (3_000_000, 3_000_000));
    assert!(hub.asked().iter().any(|asked| asked.storage), "the large file has a port of its own");
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(folder.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(SHA256),
        "the layout of other programs"
    );

    assert_eq!(get(&settings).unwrap(), folder);
    let asked = hub.asked();
    assert_eq!(bodies(&asked), Vec::<&Asked>::new());
    assert!(asked[0].path.starts_with("/api/"));
    assert_eq!(asked.len(), 4, "what is there is compared with what the hub says of each: {asked:?}");

    #[cfg(unix)]
    {
        // A link whose content was deleted: the content is fetched again.
        std::fs::remove_file(root.join("blobs").join(SHA256)).unwrap();
        assert_whole(&get(&settings).unwrap(), &hub.play());
        assert_eq!(bodies(&hub.asked()).len(), 2);
    }

    // Another commit with the same weights: what the cache has by its hash is not fetched.
    hub.play().commit = Some(COMMIT.replace('0', "f"));
    let newer = get(&settings).unwrap();
    assert_ne!(newer, folder);
    assert_whole(&newer, &hub.play());
    assert_eq!(bodies(&hub.asked()), Vec::<&Asked>::new());
}

#[test]
fn shards_are_those_that_the_index_names() {
    let cache = tempfile::tempdir().unwrap();
    let mut play = model();
    play.files.remove("model.safetensors");
    play.files.insert("a-1.safetensors".to_owned(), b"one".to_vec());
    play.files.insert("a-2.safetensors".to_owned(), b"two".to_vec());
    let index = |second: &str| format!("{{\"weight_map\": {{\"x\": \"a-1.safetensors\", \"y\": \"{second}\"}}}}");
    let name = "model.safetensors.index.json".to_owned();
    play.files.insert(name.clone(), index("a-2.safetensors").into_bytes());
    let hub = Hub::new(play.clone());
    assert_whole(&get(&hub.settings(cache.path())).unwrap(), &play);

    for (second, part) in [("a-3.safetensors", "a-3.safetensors"), ("../../x", "outside")] {
        let cache = tempfile::tempdir().unwrap();
        hub.play().files.insert(name.clone(), index(second).into_bytes());
        assert_holds(&refuses(&hub.settings(cache.path())), &[part, second]);
    }
}

#[test]
fn a_gguf_file_is_asked_for_by_name_and_revision() {
    let cache = tempfile::tempdir().unwrap();
    let files = ["x-Q4.gguf", "q/x-Q8.gguf"].map(|name| (name.to_owned(), name.as_bytes().to_vec()));
    let hub = Hub::new(Play { files: files.into(), ..Play::default() });
    let settings = hub.settings(cache.path());
    assert_holds(&refuses(&settings), &["x-Q4.gguf", "q/x-Q8.gguf", "owner/mha:file.gguf"]);
    let path = fetch("owner/mha@v1:q/x-Q8.gguf", &settings, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"q/x-Q8.gguf");
    assert!(path.ends_with("q/x-Q8.gguf"));
    assert_eq!(bodies(&hub.asked()).len(), 1);
    assert!(cache.path().join("models--owner--mha/refs/v1").is_file());
}

#[test]
fn the_token_goes_to_the_endpoint_only() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(Play { needs_token: true, ..model() });
    let settings = HubSettings { token: Some(TOKEN.to_owned()), ..hub.settings(cache.path()) };
    assert_whole(&get(&settings).unwrap(), &hub.play());
    let asked = hub.asked();
    assert!(asked.iter().any(|asked| asked.storage));
    for asked in asked {
        assert_eq!(asked.token.is_some(), !asked.storage, "{asked:?}");
    }
}

/// Cut short, emptied, or of other bytes: what is damaged is fetched anew, and nothing else.
#[test]
fn a_damaged_file_in_the_cache_is_fetched_anew() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let folder = get(&settings).unwrap();
    hub.asked();
    let flipped = |bytes: &[u8]| -> Vec<u8> {
        bytes.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 1_000_000)).collect()
    };
    let whole = hub.play().files.clone();
    let weights = &whole["model.safetensors"];
    let damages: [(&str, Vec<u8>); 4] = [
        ("model.safetensors", weights[..weights.len() - 1].to_vec()),
        ("model.safetensors", flipped(weights)),
        ("tokenizer.json", Vec::new()),
        ("config.json", [&whole["config.json"][..], b"x"].concat()),
    ];
    for (name, damaged) in damages {
        // Writes through the link, as a full disk or a failing one would have.
        std::fs::write(folder.join(name), damaged).unwrap();
        let mut said = Vec::new();
        let again = fetch("owner/mha", &settings, &mut |progress| {
            if let Progress::Damaged { name, reason } = progress {
                said.push((name.to_owned(), reason.to_owned()));
            }
            ControlFlow::Continue(())
        });
        assert_eq!(again.unwrap(), folder);
        assert_whole(&folder, &hub.play());
        assert!(said.len() == 1 && said[0].0 == name, "{said:?}");
        let asked = hub.asked();
        assert!(bodies(&asked).iter().all(|asked| asked.path.ends_with(name)), "{asked:?}");
    }
}

/// Whom the user has named is asked, or nobody.
#[test]
fn a_bad_endpoint_is_refused_and_nobody_else_asked() {
    let home = tempfile::tempdir().unwrap();
    for endpoint in
        ["localhost", " ", "https:/hub", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://u:p@127.0.0.1"]
    {
        let output = program(endpoint, home.path(), &["inspect", "--model", "owner/mha"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{endpoint}: {stderr}");
        assert_holds(&stderr, &[endpoint, "HF_ENDPOINT", "\nhint: "]);
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let mut command = program_command("", home.path(), &["inspect", "--model", "owner/mha"]);
        let output = command.env("HF_ENDPOINT", std::ffi::OsStr::from_bytes(b"http://\xff")).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert_holds(&String::from_utf8_lossy(&output.stderr), &["HF_ENDPOINT"]);
    }
    let mut command = program_command("http://127.0.0.1:1", home.path(), &["inspect", "--model", "owner/mha"]);
    let output = command.env("ALL_PROXY", "nonsense://x y").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_holds(&String::from_utf8_lossy(&output.stderr), &["ALL_PROXY"]);
}

/// A hub that leads to another host with what is to be known of a model is not followed there.
#[test]
fn answers_come_from_the_endpoint_itself() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, other) = (Hub::new(model()), Hub::new(model()));
    let away = format!("http://localhost:{}", other.address.port());
    for part in ["/api/", "/resolve/"] {
        hub.play().lead_away = Some((part.to_owned(), away.clone()));
        assert_holds(&refuses(&hub.settings(cache.path())), &["leads away", &away, "HF_ENDPOINT"]);
        assert_eq!(other.asked(), []);
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(Play { needs_token: true, ..model() });
    let settings = hub.settings(cache.path());
    assert_holds(&refuses(&settings), &["a token is needed", "owner/mha", "HF_TOKEN", &hub.endpoint()]);
    hub.play().needs_token = false;
    let message = refuses_id("owner/other", &settings);
    assert_holds(&message, &["`owner/other` does not exist", &hub.endpoint(), "check the id"]);
    let message = refuses_id("owner/mha@v2", &settings);
    assert_holds(&message, &["does not exist", "revision/v2"]);
    hub.play().files = [("pytorch_model.bin".to_owned(), Vec::new())].into();
    assert_holds(&refuses(&settings), &[".bin", "convert"]);
    assert!(!cache.path().join("models--owner--mha").exists(), "nothing was to be written");
    for endpoint in ["", "hub", "ftp://hub", "http://"] {
        let settings = HubSettings { endpoint: endpoint.to_owned(), ..settings.clone() };
        assert!(matches!(get(&settings), Err(Error::Input { .. })), "{endpoint}");
    }
}

#[test]
fn a_cut_transfer_goes_on_where_it_ended() {
    for no_ranges in [false, true] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::new(Play { cut_after: Some(1_234_567), no_ranges, ..model() });
        let settings = hub.settings(cache.path());
        assert_holds(&refuses(&settings), &["1234567 of 3000000 bytes", "run it again"]);
        let part = cache.path().join(format!("models--owner--mha/blobs/{SHA256}.part"));
        assert_eq!(part.metadata().unwrap().len(), 1_234_567);
        assert!(!cache.path().join("models--owner--mha/refs/main").exists());
        hub.asked();

        hub.play().cut_after = None;
        let folder = get(&settings).unwrap();
        assert_whole(&folder, &hub.play());
        let asked = hub.asked();
        let bodies = bodies(&asked);
        assert!(bodies.iter().all(|asked| asked.range.as_deref() == Some("bytes=1234567-")), "{bodies:?}");
        assert_eq!(bodies.len(), 2, "the hub, and where it redirects to: {bodies:?}");
        assert!(!part.exists());
    }
}

#[test]
fn an_interrupted_transfer_goes_on_too() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let result = fetch("owner/mha", &settings, &mut |progress| match progress {
        Progress::File { name: "model.safetensors", done, .. } if done > 0 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
    hub.asked();
    assert_whole(&get(&settings).unwrap(), &hub.play());
    let asked = hub.asked();
    assert!(bodies(&asked).iter().all(|asked| asked.range.is_some()), "{asked:?}");
    let result = fetch("owner/mha", &settings, &mut |_| ControlFlow::Break(()));
    assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
}

#[test]
fn two_at_once_fetch_one_copy() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let folders: Vec<_> = std::thread::scope(|scope| {
        let threads = [(); 3].map(|()| scope.spawn(|| get(&settings).unwrap()));
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for folder in folders {
        assert_whole(&folder, &hub.play());
    }
    assert_eq!(hub.asked().iter().filter(|asked| asked.storage).count(), 1, "the large file is sent once");
    let blobs = std::fs::read_dir(cache.path().join("models--owner--mha/blobs")).unwrap();
    let names: Vec<_> = blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.contains(&SHA256.to_owned()) && names.len() == 3, "{names:?}");
}

#[test]
fn a_wrong_length_or_hash_is_noticed() {
    for lie in [-1, 1, i64::from(u32::MAX)] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::new(Play { lie, ..model() });
        let settings = hub.settings(cache.path());
        assert_holds(&refuses(&settings), &["config.json", "length"]);
        hub.play().lie = 0;
        assert_whole(&get(&settings).unwrap(), &hub.play());
    }
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let weights = hub.play().files["model.safetensors"].clone();
    hub.play().files.get_mut("model.safetensors").unwrap()[2_000_000] ^= 1;
    assert_holds(&refuses(&settings), &["model.safetensors", "damaged"]);
    hub.play().files.insert("model.safetensors".to_owned(), weights);
    assert_whole(&get(&settings).unwrap(), &hub.play());
}

#[test]
fn names_that_lead_elsewhere_are_never_asked_for() {
    for name in ["../x", "/etc/x", "a\\x", "a/../../x.gguf", "C:x", "../tokenizer.json"] {
        let lab = tempfile::tempdir().unwrap();
        let cache = lab.path().join("cache");
        let hub = Hub::new(Play { more_names: vec![name.to_owned()], ..model() });
        assert_whole(&get(&hub.settings(&cache)).unwrap(), &hub.play());
        assert!(hub.asked().iter().all(|asked| !format!("{asked:?}").contains("..")), "{name}");
        assert_eq!(std::fs::read_dir(lab.path()).unwrap().count(), 1, "{name}: something beside the cache");
    }
    for commit in ["../../x", "", "main"] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::new(Play { commit: Some(commit.to_owned()), ..model() });
        assert_holds(&refuses(&hub.settings(cache.path())), &["does not answer as a hub does"]);
    }
    for etag in ["../../x", "", "a/b", ".."] {
        let cache = tempfile::tempdir().unwrap();
        let large = [("model.safetensors".to_owned(), etag.to_owned())].into();
        let hub = Hub::new(Play { large, ..model() });
        assert_holds(&refuses(&hub.settings(cache.path())), &["etag"]);
    }
}

/// Fetches, and hears why the cache was used.
fn get_cached(settings: &HubSettings) -> (PathBuf, String) {
    let mut said = String::new();
    let path = fetch("owner/mha", settings, &mut |progress| {
        if let Progress::Cached { reason, .. } = progress {
            reason.clone_into(&mut said);
        }
        ControlFlow::Continue(())
    });
    (path.unwrap(), said)
}

#[test]
fn without_a_network_the_cache_is_used() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(model());
    let settings = hub.settings(cache.path());
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert_holds(&refuses(&offline), &["`owner/mha` is not in the cache", "offline", "HF_HUB_OFFLINE"]);
    assert_eq!(hub.asked(), []);
    let folder = get(&settings).unwrap();
    hub.asked();
    assert_eq!(get_cached(&offline), (folder.clone(), "the hub is not asked (offline)".to_owned()));
    assert_eq!(hub.asked(), []);

    // A newer commit whose transfer fails: the older one is whole.
    let mut play = hub.play().clone();
    play.commit = Some(COMMIT.replace('0', "f"));
    play.cut_after = Some(3);
    play.large.clear();
    *hub.play() = play;
    let (path, reason) = get_cached(&settings);
    assert_eq!(path, folder);
    assert_holds(&reason, &["3 of 3000000 bytes"]);

    let endpoint = hub.endpoint();
    drop(hub);
    let (path, reason) = get_cached(&settings);
    assert_eq!(path, folder);
    assert_holds(&reason, &[&endpoint, "cannot be reached"]);
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let message = refuses(&settings);
    assert_holds(&message, &["`owner/mha` is not in the cache", &endpoint, "cannot be reached", "HF_ENDPOINT"]);
    assert_holds(&refuses(&offline), &["is not in the cache"]);
}

/// The program, with a hub and nothing of the environment's own.
fn program(endpoint: &str, home: &Path, args: &[&str]) -> std::process::Output {
    program_command(endpoint, home, args).output().unwrap()
}

fn program_command(endpoint: &str, home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache"));
    command.args(args).current_dir(home).env("CANDLE_BARRIER_POOL_SPIN_LIMIT", "1");
    for name in ["MODEL_PATH", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("NO_PROXY", "*");
    command
}

#[test]
fn the_program_takes_an_id_for_a_model() {
    let home = tempfile::tempdir().unwrap();
    let mut play = Play { needs_token: true, ..Play::default() };
    for (name, path) in [
        ("config.json", "mha/config.json"),
        ("model.safetensors", "mha/model.safetensors"),
        ("tokenizer.model", "tokenizer.model"),
    ] {
        play.files.insert(name.to_owned(), std::fs::read(Path::new(FIXTURES).join(path)).unwrap());
    }
    let hub = Hub::new(play);
    let args = ["inspect", "--model", "owner/mha"];
    let refused = program(&hub.endpoint(), home.path(), &args);
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert_holds(&stderr, &["error: a token is needed", "\nhint: ", "HF_TOKEN"]);
    assert_eq!(stderr.lines().count(), 2, "{stderr}");

    std::fs::write(home.path().join("token"), format!("{TOKEN}\n")).unwrap();
    let output = program(&hub.endpoint(), home.path(), &args);
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr, "");
    assert_holds(&stdout, &["models--owner--mha", "safetensors"]);
    assert!(home.path().join("hub/models--owner--mha/refs/main").is_file());

    let endpoint = hub.endpoint();
    drop(hub);
    let output = program(&endpoint, home.path(), &args);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), stdout);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_holds(&stderr, &["note: ", &endpoint, "cannot be reached"]);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}
