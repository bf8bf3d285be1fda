//! Runs that are asked to end: Ctrl-C, SIGTERM, SIGHUP; and the signal of a model that is cut short.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::Duration;

use super::mishaps::tiny;
use super::process::{computes_for, ends_soon_by, listens, output_of, reads_input, send, until};
use super::{Lab, MODEL, succeeds};

/// More tokens than any of these runs gets to.
const MANY: &str = "900000";

/// Ends with this status, and without a word of failure.
#[track_caller]
fn ends(child: Child, status: i32, what: &str) -> Output {
    ended(output_of(child, what), status, what)
}

#[track_caller]
fn ended(output: Output, status: i32, what: &str) -> Output {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{what}: {stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{what}: {stderr}");
    output
}

/// Waits until the figures of a run are printed, which come right before its report is written. What follows them is to be
/// read of what is returned.
#[track_caller]
fn prints_figures(child: &mut Child) -> BufReader<ChildStderr> {
    let (mut stderr, mut printed) = (BufReader::new(child.stderr.take().unwrap()), String::new());
    while !printed.contains("\nprocess ") || !printed.ends_with('\n') {
        assert!(stderr.read_line(&mut printed).unwrap() > 0, "{printed}");
    }
    assert!(!printed.contains("panicked") && !printed.contains("error"), "{printed}");
    stderr
}

#[track_caller]
fn says_no_more(mut stderr: impl Read) {
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("panicked") && !rest.contains("error"), "{rest}");
}

/// A FIFO that nobody opens.
fn fifo(lab: &Lab, name: &str) {
    assert!(Command::new("mkfifo").arg(lab.path(name)).status().unwrap().success());
}

#[test]
fn every_signal_ends_generation_in_order() {
    for (signal, status) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let lab = Lab::new();
        let model = tiny(&lab);
        let args = ["generate", "--model", &model, "--prompt", "ab c", "-n", MANY, "--ignore-eos", "--threads", "1"];
        let files = ["--report", "r.json", "--log-file", "log", "--stop", "cccccccccccccccccc"];
        let mut child = lab.command(&[&args[..], &files].concat()).spawn().unwrap();
        let mut start = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
        send(&child, signal);
        let output = ends(child, status, signal);
        let (report, text) = (lab.json("r.json"), [&start[..], &output.stdout].concat());
        assert_eq!(report["finish_reason"], "interrupted");
        assert_eq!(report["text"].as_str().unwrap().trim_end(), String::from_utf8(text).unwrap().trim_end());
        assert!(lab.read("log").ends_with('\n'));
        assert!(String::from_utf8_lossy(&output.stderr).contains("KV cache"));
    }
}

/// While a model is loaded, a prompt is waited for or tokenised, a report waits for its reader: at once.
#[test]
fn waiting_ends_at_once() {
    let lab = Lab::new();
    let model = tiny(&lab);
    for name in ["fifo", "out"] {
        fifo(&lab, name);
    }
    let own = ["--model", &model, "--threads", "1"];
    let start = |case: &[&str]| lab.command(&[&case[..1], &own, &case[1..]].concat()).spawn().unwrap();
    let signals = [("-INT", 130), ("-TERM", 143), ("-HUP", 129)];
    let cases: [&[&str]; 5] = [
        &["generate", "--prompt-file", "fifo"],
        &["generate", "--messages", "fifo"],
        &["generate", "--prompts", "fifo"],
        &["eval", "--text", "fifo"],
        &["chat", "--messages", "fifo"],
    ];
    for (case, (signal, status)) in cases.into_iter().zip(signals.into_iter().cycle()) {
        let child = start(case);
        // It can be opened for writing once there is a reader, who then waits for what is never written.
        let mut writer = None;
        until(&format!("{case:?} opens its file"), || {
            let opened = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(lab.path("fifo"));
            writer = opened.ok();
            writer.is_some()
        });
        send(&child, signal);
        assert!(ends(child, status, &format!("{case:?}")).stdout.is_empty());
    }
    let mut child = start(&["generate", "--prompt", "ab", "-n", "1", "--report", "out"]);
    let stderr = prints_figures(&mut child);
    send(&child, "-TERM");
    ends(child, 143, "a report");
    says_no_more(stderr);
    // Before it is waited for, too: here the figures wait, and the text is written.
    let (mut figures, mut full) = std::io::pipe().unwrap();
    // SAFETY: asks about a file that is open.
    let capacity = unsafe { libc::fcntl(full.as_raw_fd(), libc::F_GETPIPE_SZ) };
    full.write_all(&vec![b' '; usize::try_from(capacity).unwrap()]).unwrap();
    let case = ["generate", "--model", &model, "--prompt", "ab", "-n", "1", "--report", "out"];
    let mut child = lab.command(&case).stderr(full).spawn().unwrap();
    let mut text = Vec::new();
    while text.last() != Some(&b'\n') {
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        text.extend(byte);
    }
    send(&child, "-TERM");
    figures.read_exact(&mut vec![0; usize::try_from(capacity).unwrap()]).unwrap();
    ends(child, 143, "a report that comes next");
    says_no_more(figures);
    // The log is opened before anything is computed.
    let child = start(&["generate", "--prompt", "ab", "-n", "1", "--log-file", "out"]);
    listens(&child);
    send(&child, "-HUP");
    assert!(ends(child, 129, "a log").stdout.is_empty());
}

/// Standard input is waited for as well; and of a conversation's answers, Ctrl-C ends one and SIGTERM all.
#[test]
fn a_conversation_ends() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let start = || {
        let mut command = lab.command(&["chat", "--model", &model, "--ignore-eos", "-n", MANY, "--log-file", "log"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"ab c\n").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
        child
    };
    for (signal, status) in [("-TERM", 143), ("-HUP", 129)] {
        let child = start();
        send(&child, signal);
        ends(child, status, signal);
        assert!(lab.read("log").ends_with('\n'));
    }
    let mut child = start();
    send(&child, "-INT");
    let mut told = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    while !told.contains("broken off") && !told.contains("cut off") {
        assert!(stderr.read_line(&mut told).unwrap() > 0, "{told}");
    }
    // It goes on, and waits for the next line, which another Ctrl-C ends.
    reads_input(&child);
    send(&child, "-INT");
    ends(child, 130, "waiting for a question");
}

/// Measurements end with the rows that they have.
#[test]
fn measurements_end_with_what_they_have() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let text = "ab a b c ".repeat(3000);
    lab.write("text.txt", text);
    let own = ["--model", &model, "--threads", "1", "--text", "text.txt"];
    let eval = ["--windows", "10000", "--prompt-tokens", "64", "--score-tokens", "64", "--offset-tokens", "1"];
    // More windows than the text has are refused; these are many.
    let eval = [&eval[..1], &["90"], &eval[2..], &["--json", "e.json", "--csv", "e.csv", "--plot", "e.png"]].concat();
    let mut child = lab.command(&[&["eval"], &own[..], &eval].concat()).spawn().unwrap();
    let has_rows = || std::fs::read_to_string(lab.path("e.json")).is_ok_and(|json| json.contains("kl_mean"));
    until("rows are written", || has_rows() || child.try_wait().unwrap().is_some());
    send(&child, "-TERM");
    ends(child, 143, "eval");
    assert!(!lab.json("e.json").as_array().unwrap().is_empty());
    assert!(lab.path("e.png").exists() && lab.read("e.csv").lines().count() > 1);
}

/// A long chunk is not waited for: one of 8,000 rows takes minutes on one thread.
#[test]
fn a_long_chunk_is_not_waited_for() {
    let lab = Lab::new();
    lab.write("long.txt", " word".repeat(8000));
    let chunk = ["--threads", "1", "--prefill-chunk", "8192"];
    for args in [
        &["generate", "--prompt-file"][..],
        &["compare", "--prompt-file"],
        &["eval", "--prompt-tokens", "7000", "--text"],
    ] {
        let args = [&args[..1], &["--model", MODEL], &chunk, &args[1..], &["long.txt"]].concat();
        let child = lab.command(&args).spawn().unwrap();
        computes_for(&child, Duration::from_secs(3)); // loaded, and in the first chunk
        let output = ended(ends_soon_by(child, "-INT", args[0]), 130, args[0]);
        assert!(args[0] == "eval" || output.stdout.is_empty());
    }
}

/// What `nohup` has switched off stays off.
#[test]
fn an_ignored_hangup_stays_ignored() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
    command.args([
        "generate",
        "--model",
        &model,
        "--prompt",
        "ab c",
        "-n",
        "6000",
        "--ignore-eos",
        "--report",
        "r.json",
    ]);
    lab.prepare(&mut command);
    let mut child = command.spawn().unwrap();
    let mut start = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
    send(&child, "-HUP");
    succeeds(&child.wait_with_output().unwrap());
    assert_eq!(lab.json("r.json")["finish_reason"], "length");
}

/// The second signal does not wait for anything.
#[test]
fn a_second_signal_ends_at_once() {
    let lab = Lab::new();
    let model = tiny(&lab);
    fifo(&lab, "out");
    // After the first, the report waits for a reader that never comes.
    let args = ["generate", "--model", &model, "--prompt", "ab c", "-n", MANY, "--ignore-eos", "--report", "out"];
    let mut child = lab.command(&args).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    send(&child, "-INT");
    let stderr = prints_figures(&mut child);
    send(&child, "-TERM");
    ends(child, 143, "twice");
    says_no_more(stderr);
}

#[test]
fn a_model_that_is_cut_short_is_named() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let args = ["generate", "--model", &model, "--prompt", "ab c", "-n", MANY, "--ignore-eos", "--threads", "2"];
    let mut child = lab.command(&args).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    std::fs::File::options().write(true).open(&model).unwrap().set_len(0).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(
        errors.len() == 1 && errors[0].contains(&format!("`{model}`")) && errors[0].contains("cut short"),
        "{stderr}"
    );
    assert!(stderr.contains("\nhint: "), "{stderr}");

    // A fault that is not about a model is what it always was.
    let model = tiny(&lab);
    let args = ["generate", "--model", &model, "--prompt", "ab c", "-n", MANY, "--ignore-eos"];
    let mut child = lab.command(&args).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    send(&child, "-BUS");
    let output = child.wait_with_output().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(7), "{output:?}");
}
