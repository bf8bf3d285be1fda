//! Where outputs go: descriptors, pipes, links, places that cannot be written, and files that are read.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::mishaps::tiny;
use super::{Lab, Refusal, succeeds};

/// Options of `generate` on the tiny model.
fn generate<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "--model", model, "--prompt", "ab c", "-n", "5", "--ignore-eos", "--threads", "1"], more].concat()
}

/// Text, and the report behind it.
#[track_caller]
fn text_and_report(all: &str) -> (&str, Value) {
    let (text, report) = all.split_once("\n{").unwrap_or_else(|| panic!("{all}"));
    (text, serde_json::from_str(&format!("{{{report}")).unwrap_or_else(|error| panic!("{error}: {all}")))
}

#[cfg(unix)]
#[test]
fn a_report_comes_behind_the_text_on_standard_output() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let text = succeeds(&lab.run(&generate(&model, &[])));
    let args = generate(&model, &["--report", "/dev/stdout"]);
    let check = |all: &str| {
        let (printed, report) = text_and_report(all);
        assert_eq!(printed, text.trim_end());
        assert_eq!(report["text"].as_str().unwrap().trim_end(), printed);
    };
    check(&succeeds(&lab.run(&args)));
    // A file, from its start and from its end.
    for redirect in [">all", ">>all"] {
        lab.write("all", if redirect == ">all" { "" } else { "before\n" });
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$@\" {redirect}"), "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
        lab.prepare(command.args(&args));
        succeeds(&command.output().unwrap());
        check(lab.read("all").trim_start_matches("before\n"));
    }
    // Through a link, and beside the log on standard error.
    std::os::unix::fs::symlink("/dev/stdout", lab.path("link")).unwrap();
    let output = lab.run(&generate(&model, &["--report", "link", "--log-file", "/dev/stderr"]));
    check(&succeeds(&output));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("layer_id:0(heads:0)") && stderr.contains("KV cache"), "{stderr}");
    // Figures and log share a file without writing over one another.
    let script = "exec \"$@\" 2>err";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
    lab.prepare(command.args(generate(&model, &["--log-file", "/dev/stderr"])));
    succeeds(&command.output().unwrap());
    let err = lab.read("err");
    assert!(err.contains("layer_id:0(heads:0)") && err.contains("saving:") && err.contains("KV cache"), "{err}");
    assert!(err.find("layer_id").unwrap() < err.find("KV cache").unwrap(), "{err}");
}

/// As `>(...)` gives it, and as named pipes are.
#[cfg(unix)]
#[test]
fn a_report_goes_into_a_pipe() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let mut command = Command::new("sh");
    let script = "{ \"$@\" 7>&1 >text | cat >report; }";
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
    lab.prepare(command.args(generate(&model, &["--report", "/dev/fd/7"])));
    succeeds(&command.output().unwrap());
    let report: Value = lab.json("report");
    assert_eq!(report["text"].as_str().unwrap().trim_end(), lab.read("text").trim_end());

    assert!(Command::new("mkfifo").arg(lab.path("fifo")).status().unwrap().success());
    for args in [
        generate(&model, &["--report", "fifo"]),
        generate(&model, &["--save-image", "--image-dir", ".", "--report", "fifo"]),
    ] {
        let child = lab.command(&args).spawn().unwrap();
        let report: Value = serde_json::from_str(&lab.read("fifo")).unwrap();
        succeeds(&child.wait_with_output().unwrap());
        assert_eq!(report["generated_tokens"].as_array().unwrap().len(), 5);
    }
    // A descriptor that is not open is refused, even if a file takes its number later.
    lab.refuses(&generate(&model, &["--report", "/dev/fd/3"])).status(1).names("`/dev/fd/3`");
    lab.refuses(&generate(&model, &["--report", "/dev/stdin"])).status(1).names("`/dev/stdin`").names("reading");
}

/// Rows that are written anew after each other come once where nothing can be replaced: when they are complete.
#[cfg(unix)]
#[test]
fn rows_go_into_a_pipe_once() {
    let lab = Lab::new();
    let model = tiny(&lab);
    lab.write("text.txt", "ab a b c ".repeat(60));
    let window = ["--text", "text.txt", "--prompt-tokens", "24", "--score-tokens", "8", "--threads", "1"];
    for (command, more) in [("eval", &["--configs", "full,fastgen,replay"][..]), ("tune", &["--max-kept", "0.6"])] {
        for option in ["--json", "--csv"] {
            let args = [&[command, "--model", &model], &window[..], more, &[option, "/dev/stdout"]].concat();
            let args = if command == "tune" { [&args[..], &["-o", "t"]].concat() } else { args };
            let all = succeeds(&lab.run(&args));
            let start = if option == "--csv" {
                "config,"
            } else if command == "tune" {
                "\n{"
            } else {
                "\n["
            };
            assert_eq!(all.matches(start).count(), 1, "{command} {option}: {all}");
            if option == "--json" {
                let json: Value =
                    serde_json::from_str(all[all.find(start).unwrap()..].split("\n\nchosen").next().unwrap())
                        .unwrap_or_else(|error| panic!("{error}: {all}"));
                assert!(json.as_array().is_none_or(|rows| rows.len() == 3));
            }
        }
        let args = [&[command, "--model", &model], &window[..], more, &["--plot", "/dev/stdout"]].concat();
        let args = if command == "tune" { [&args[..], &["-o", "t"]].concat() } else { args };
        let output = lab.run(&args);
        assert_eq!(output.status.code(), Some(0));
        let png = b"\x89PNG\r\n\x1a\n";
        assert!(output.stdout.windows(png.len()).any(|part| part == png), "a picture");
    }
}

#[cfg(unix)]
#[test]
fn a_replaced_file_keeps_its_mode() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new();
    let model = tiny(&lab);
    lab.write("r.json", "old");
    for mode in [0o600, 0o664, 0o755] {
        std::fs::set_permissions(lab.path("r.json"), PermissionsExt::from_mode(mode)).unwrap();
        succeeds(&lab.run(&generate(&model, &["--report", "r.json"])));
        assert_eq!(lab.path("r.json").metadata().unwrap().permissions().mode() & 0o7777, mode);
        lab.json("r.json");
    }
}

#[test]
fn what_is_read_is_not_written_over() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let contents = [
        ("prompt.txt", "ab c"),
        ("messages.json", r#"[{"role": "user", "content": "ab"}]"#),
        ("config.json", r#"{"method": "tova"}"#),
        ("prompts.txt", "ab\nc\n"),
        ("text.txt", "ab a b c "),
    ];
    for (name, content) in contents {
        lab.write(name, content);
    }
    std::fs::hard_link(lab.path("config.json"), lab.path("hard")).unwrap();
    let mut cases: Vec<Vec<&str>> = vec![
        generate(&model, &["--report", "tiny.gguf"]),
        generate(&model, &["--log-file", "./tiny.gguf"]),
        generate(&model, &["--config", "config.json", "--report", "config.json"]),
        generate(&model, &["--config", "config.json", "--log-file", "hard"]),
        generate(&model, &["--messages", "messages.json", "--report", "messages.json"]),
        vec!["generate", "--model", &model, "--prompt-file", "prompt.txt", "--report", "prompt.txt"],
        vec!["generate", "--model", &model, "--prompt-file", "prompt.txt", "--log-file", "prompt.txt"],
        vec!["generate", "--model", &model, "--prompts", "prompts.txt", "--report", "prompts.txt"],
        vec!["eval", "--model", &model, "--text", "text.txt", "--csv", "text.txt"],
        vec!["eval", "--model", &model, "--configs", "config.json", "--json", "config.json"],
        vec!["eval", "--model", &model, "--prompts", "prompts.txt", "--plot", "prompts.txt"],
        vec!["tune", "--model", &model, "--max-kept", "0.5", "-o", "tiny.gguf"],
        vec!["tune", "--model", &model, "--max-kept", "0.5", "--text", "text.txt", "-o", "t", "--json", "text.txt"],
        vec!["bench", "--model", &model, "--prompt-file", "text.txt", "--json", "text.txt"],
        vec!["bench", "--model", &model, "--settings", "config.json", "--plot", "config.json"],
        vec!["chat", "--model", &model, "--messages", "messages.json", "--log-file", "messages.json"],
    ];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("tiny.gguf", lab.path("link")).unwrap();
        cases.push(generate(&model, &["--report", "link"]));
        cases.push(generate("link", &["--report", "tiny.gguf"]));
    }
    let bytes = std::fs::read(&model).unwrap();
    for case in &cases {
        let refusal = lab.refuses(case);
        refusal.status(2).names("written over").hints("another").is_short();
    }
    // As standard input as well.
    let mut command = lab.command(&["generate", "--model", &model, "--prompt-file", "-", "--report", "prompt.txt"]);
    if cfg!(unix) {
        let file = std::fs::File::open(lab.path("prompt.txt")).unwrap();
        Refusal::of(&command.stdin(file).output().unwrap(), "stdin").status(2).names("--prompt-file");
    }
    assert!(std::fs::read(&model).unwrap() == bytes);
    for (name, content) in contents {
        assert_eq!(lab.read(name), content);
    }
    // Messages may be saved to where they came from, but not over the model.
    let mut command = lab.command(&["chat", "--model", &model, "--messages", "messages.json", "-n", "2"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let lines = b"/save tiny.gguf\n/save config\n/save messages.json\n/save logs/test.log\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.matches("written over").count(), 2, "{stderr}");
    assert!(std::fs::read(&model).unwrap() == bytes);
    assert_eq!(lab.json("messages.json")["messages"][0]["content"], "ab");
}

/// Before the model runs: nothing is on standard output.
#[test]
fn places_that_cannot_be_written_are_found_early() {
    let lab = Lab::new();
    let model = tiny(&lab);
    lab.write("file", "");
    lab.write("text.txt", "ab a b c ".repeat(60));
    std::fs::create_dir(lab.path("folder")).unwrap();
    std::fs::create_dir_all(lab.path("images/layer0_attention.png")).unwrap();
    let long = "n".repeat(300);
    let deep = format!("{}x", "d/".repeat(3000));
    let places = ["file/x", "file/x/y", "folder", "folder/", "new/", ".", "..", "/", &long, &deep];
    for place in places {
        lab.refuses(&generate(&model, &["--report", place])).status(1).is_short();
        let own = ["--model", &model, "--text", "text.txt"];
        for option in ["--json", "--csv", "--plot"] {
            lab.refuses(&[&["eval"], &own[..], &[option, place]].concat()).status(1).is_short();
        }
        lab.refuses(&[&["tune", "--max-kept", "0.5"], &own[..], &["-o", place]].concat()).status(1).is_short();
        lab.refuses(&["bench", "--model", &model, "--json", place]).status(1).is_short();
    }
    lab.refuses(&generate(&model, &["--report", ""])).status(2).names("--report");
    lab.refuses(&generate(&model, &["--log-file", ""])).status(2).names("--log-file");
    lab.refuses(&["eval", "--model", &model, "--json", ""]).status(2).names("--json");
    lab.refuses(&generate(&model, &["--save-image"])).status(1).names("layer0_attention.png").is_short();
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        // Whoever one is, there is no file to be made there.
        for place in ["/proc/none.json", "/proc/self/none/r.json", "/sys/none.json"] {
            lab.refuses(&generate(&model, &["--report", place])).status(1).is_short();
        }
        std::os::unix::fs::symlink("circle", lab.path("circle")).unwrap();
        lab.refuses(&generate(&model, &["--report", "circle"])).status(1).names("`circle`").is_short();
        let _socket = std::os::unix::net::UnixListener::bind(lab.path("socket")).unwrap();
        lab.refuses(&generate(&model, &["--report", "socket"])).status(1).names("socket").is_short();
        // A name need not be text to be a file's.
        let name = std::ffi::OsStr::from_bytes(b"r\xff.json");
        let mut command = lab.command(&generate(&model, &["--report"]));
        succeeds(&command.arg(name).output().unwrap());
        assert!(lab.0.path().join(name).exists());
    }
    // What is missing of a path is made.
    succeeds(&lab.run(&generate(&model, &["--report", "new/folder/r.json"])));
    lab.json("new/folder/r.json");
    // The longest names there are.
    let longest = "n".repeat(255);
    succeeds(&lab.run(&generate(&model, &["--report", &longest])));
    lab.json(&longest);
}

/// A log that nobody asked for is done without.
#[test]
fn a_default_log_that_cannot_be_opened_is_a_note() {
    let lab = Lab::new();
    let model = tiny(&lab);
    lab.write("logs", "a file");
    let output = lab.run(&generate(&model, &["--quiet"]));
    assert!(!succeeds(&output).is_empty());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("note: ") && stderr.contains("`logs/test.log`"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    lab.refuses(&generate(&model, &["--log-file", "logs/test.log"])).status(1).names("`logs/test.log`");
    #[cfg(target_os = "linux")]
    {
        std::fs::remove_file(lab.path("logs")).unwrap();
        std::fs::create_dir(lab.path("logs")).unwrap();
        std::os::unix::fs::symlink("/dev/full", lab.path("logs/test.log")).unwrap();
        let output = lab.run(&generate(&model, &["--quiet"]));
        assert!(!succeeds(&output).is_empty());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with("note: ") && stderr.contains("No space left"), "{stderr}");
    }
}
