//! Runs that are killed, that meet a full disk, or whose reader goes away: what they write is whole, or as it was.
//!
//! Not for: runs that are asked to end (see `signals`), and paths that cannot be written (see `places`).

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, succeeds};

/// Kills of each kind of run: 200 together.
const KILLS: [usize; 6] = [63, 31, 41, 41, 20, 4];

/// A model of one small layer, which has a chat template and room for some text.
pub(super) fn tiny(lab: &Lab) -> String {
    let mut file = TinyGguf::new();
    file.set("llama.context_length", Meta::U32(1_000_000));
    file.set("tokenizer.chat_template", Meta::Text("{% for m in messages %}{{ m['content'] }} {% endfor %}"));
    lab.write("tiny.gguf", file.bytes()).to_str().unwrap().to_owned()
}

/// A command that writes files, on the tiny model.
struct Run {
    lab: Lab,
    args: Vec<String>,
    /// Lines that are typed, if it reads any.
    typed: &'static str,
    outputs: &'static [&'static str],
}

impl Run {
    fn new(args: &[&str], outputs: &'static [&'static str]) -> Self {
        let lab = Lab::new();
        let model = tiny(&lab);
        lab.write("text.txt", "ab a b c ab ".repeat(60));
        lab.write("prompts.txt", "ab ab\nc a b\nab c ab c\n");
        let own = ["--model", &model, "--threads", "1"];
        let args = args[..1].iter().chain(&own).chain(&args[1..]).map(|&arg| arg.to_owned()).collect();
        Self { lab, args, typed: "", outputs }
    }

    fn generate() -> Self {
        let args = ["generate", "--prompt", "ab ab c", "-n", "40", "--ignore-eos", "--save-image", "--image-dir", "i"];
        let files = &["r.json", "log", "i/layer0_attention.png", "i/policies.png", "i/kv_memory.png"];
        Self::new(&[&args[..], &["--report", "r.json", "--log-file", "log"]].concat(), files)
    }

    fn batch() -> Self {
        let args = ["generate", "--prompts", "prompts.txt", "-n", "30", "--ignore-eos"];
        Self::new(&[&args[..], &["--report", "r.json", "--log-file", "log"]].concat(), &["r.json", "log"])
    }

    fn eval() -> Self {
        let args = ["eval", "--text", "text.txt", "--prompt-tokens", "24", "--score-tokens", "8", "--windows", "2"];
        let more = ["--greedy-tokens", "4", "--configs", "full,fastgen,replay"];
        let files = ["--json", "e.json", "--csv", "e.csv", "--plot", "e.png"];
        Self::new(&[&args[..], &more, &files].concat(), &["e.json", "e.csv", "e.png"])
    }

    fn tune() -> Self {
        let args = ["tune", "--text", "text.txt", "--prompt-tokens", "24", "--score-tokens", "8", "--max-kept", "0.6"];
        let files = ["-o", "t.json", "--json", "c.json", "--csv", "c.csv", "--plot", "c.png"];
        Self::new(&[&args[..], &files].concat(), &["t.json", "c.json", "c.csv", "c.png"])
    }

    fn bench() -> Self {
        let args = ["bench", "--prompt-file", "text.txt", "--contexts", "8,16", "--prefill", "16", "-n", "2"];
        Self::new(&[&args[..], &["--json", "b.json", "--plot", "b.png"]].concat(), &["b.json", "b.png"])
    }

    fn chat() -> Self {
        let args = ["chat", "-n", "8", "--log-file", "log"];
        let mut run = Self::new(&args, &["talk.json", "log"]);
        run.typed = "ab a\n/save talk.json\nc c\n/save talk.json\nb\n/save talk.json\n";
        run
    }

    fn all() -> [Self; 6] {
        [Self::generate(), Self::batch(), Self::eval(), Self::tune(), Self::chat(), Self::bench()]
    }

    fn command(&self) -> Command {
        self.lab.command(&self.args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a command, and types.
    fn start(&self, mut command: Command) -> Child {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // It may be gone before it has read anything.
        let _ = child.stdin.take().unwrap().write_all(self.typed.as_bytes());
        child
    }

    fn run(&self, command: Command) -> Output {
        self.start(command).wait_with_output().unwrap()
    }

    /// What the outputs hold, if they are there.
    fn contents(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let read = |name: &&'static str| std::fs::read(self.lab.path(name)).ok().map(|content| (*name, content));
        self.outputs.iter().filter_map(read).collect()
    }

    /// All outputs that are there are whole.
    #[track_caller]
    fn assert_whole(&self) {
        for (name, content) in self.contents() {
            assert_whole(name, &content);
        }
    }

    /// Temporary files in all folders.
    fn temporaries(&self) -> Vec<PathBuf> {
        let folders = [self.lab.path("."), self.lab.path("i")];
        let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.file_name().unwrap().to_string_lossy().contains(".tmp")).collect()
    }

    /// Kills it at random moments between its start and a little after its end.
    fn is_killed(&self, kills: usize) {
        let started = Instant::now();
        succeeds(&self.run(self.command()));
        let whole_run = started.elapsed();
        assert_eq!(self.contents().len(), self.outputs.len(), "{:?}", self.args);
        self.assert_whole();
        let mut random = StdRng::seed_from_u64(14);
        for kill in 0..kills {
            // Half of them have nothing to replace.
            if kill % 2 == 0 {
                self.outputs.iter().for_each(|name| drop(std::fs::remove_file(self.lab.path(name))));
            }
            let mut child = self.start(self.command());
            std::thread::sleep(whole_run.mul_f64(random.random_range(0.0..1.1)));
            child.kill().unwrap();
            child.wait_with_output().unwrap();
            self.assert_whole();
        }
        // One that was killed in the middle of a write is certain to be among them.
        let dead = dead_process();
        let left = [format!(".{}.{dead}-0.tmp", Path::new(self.outputs[0]).display()), format!(".x.{dead}-7.tmp.png")];
        for name in &left {
            self.lab.write(name, "half");
        }
        succeeds(&self.run(self.command()));
        self.assert_whole();
        assert_eq!(self.contents().len(), self.outputs.len());
        assert_eq!(self.temporaries(), Vec::<PathBuf>::new(), "{:?}", self.args);
    }
}

/// The number of a process that is gone.
fn dead_process() -> u32 {
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

#[track_caller]
fn assert_whole(name: &str, content: &[u8]) {
    match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("json") => drop(serde_json::from_slice::<serde_json::Value>(content).expect(name)),
        Some("png") => {
            assert!(content.starts_with(b"\x89PNG\r\n\x1a\n") && content.ends_with(b"IEND\xaeB`\x82"), "{name}");
        }
        Some("csv") => {
            let text = std::str::from_utf8(content).unwrap();
            assert!(text.ends_with("\r\n"), "{name}: {text}");
            let columns = |line: &str| line.matches(',').count();
            let first = text.lines().next().map_or(0, columns);
            assert!(text.lines().all(|line| columns(line) == first), "{name}: {text}");
        }
        // A log: lines are added whole.
        _ => assert!(content.is_empty() || content.ends_with(b"\n"), "{name}"),
    }
}

#[test]
fn a_killed_generate_leaves_whole_files() {
    Run::generate().is_killed(KILLS[0]);
}

#[test]
fn a_killed_batch_leaves_whole_files() {
    Run::batch().is_killed(KILLS[1]);
}

#[test]
fn a_killed_eval_leaves_whole_files() {
    Run::eval().is_killed(KILLS[2]);
}

#[test]
fn a_killed_tune_leaves_whole_files() {
    Run::tune().is_killed(KILLS[3]);
}

#[test]
fn a_killed_chat_leaves_whole_files() {
    Run::chat().is_killed(KILLS[4]);
}

#[test]
fn a_killed_bench_leaves_whole_files() {
    assert_eq!(KILLS.iter().sum::<usize>(), 200);
    Run::bench().is_killed(KILLS[5]);
}

/// Every file may have no bytes at all, as on a disk that is full; what was there stays.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_old_files_and_is_told() {
    for run in Run::all() {
        let mut command = Command::new("sh");
        // The limit's signal, by its number, would end the process; ignored, it is the error of a write.
        command.args(["-c", "trap '' 25; ulimit -f 0; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
        command.args(run.args.iter().map(|arg| if arg == "log" { "/dev/null" } else { arg }));
        run.lab.prepare(&mut command);
        let old: BTreeMap<_, _> = run.outputs.iter().map(|&name| (name, b"old\n".to_vec())).collect();
        std::fs::create_dir_all(run.lab.path("i")).unwrap();
        for (name, content) in &old {
            run.lab.write(name, content);
        }
        let output = run.run(command);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!stderr.contains("panicked") && stderr.contains("File too large"), "{:?}: {stderr}", run.args);
        // A conversation goes on.
        let expected = i32::from(run.args[0] != "chat");
        assert_eq!(output.status.code(), Some(expected), "{:?}: {stderr}", run.args);
        let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(run.outputs.iter().any(|name| error.contains(&format!("`{name}`"))), "{stderr}");
        assert_eq!(run.contents(), old, "{:?}", run.args);
        assert_eq!(run.temporaries(), Vec::<PathBuf>::new(), "{:?}", run.args);
    }
}

/// What goes to a full device is an error that names it; everything else is done.
#[cfg(target_os = "linux")]
#[test]
fn a_full_device_is_told() {
    for run in Run::all() {
        for output in run.outputs.iter().filter(|name| !name.contains('/') && **name != "log" && **name != "talk.json")
        {
            let mut changed = Command::new(env!("CARGO_BIN_EXE_adaptive-kvcache"));
            changed.args(run.args.iter().map(|arg| if arg == output { "/dev/full" } else { arg }));
            run.lab.prepare(&mut changed);
            let result = run.run(changed);
            let stderr = String::from_utf8(result.stderr).unwrap();
            assert_eq!(result.status.code(), Some(1), "{output}: {stderr}");
            assert!(stderr.contains("`/dev/full`") && stderr.contains("No space left"), "{output}: {stderr}");
            assert!(!result.stdout.is_empty(), "{output}: the text was there before");
            run.assert_whole();
        }
    }
}

/// Nobody reads what is printed: files are written all the same, and the run has gone well.
#[test]
fn a_closed_pipe_is_success_and_files_are_whole() {
    for run in Run::all() {
        let mut child = run.start(run.command());
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{:?}: {stderr}", run.args);
        assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{:?}: {stderr}", run.args);
        run.assert_whole();
        // A conversation ends where nobody hears the answer.
        if run.args[0] != "chat" {
            assert_eq!(run.contents().len(), run.outputs.len(), "{:?}", run.args);
        }
    }
}

/// Standard error is full, closed, or has no reader: the run is what it is otherwise.
#[cfg(target_os = "linux")]
#[test]
fn nobody_need_hear_notes_and_figures() {
    for run in Run::all() {
        let expected = run.run(run.command());
        let times_differ = run.args[0] == "bench";
        let redirects = ["2>/dev/full", "2>&-", "2>&1 >&3 3>&- | true"];
        // It reads much memory each time.
        for redirect in &redirects[..if times_differ { 1 } else { 3 }] {
            let mut command = Command::new("sh");
            let script = format!("exec 3>&1; \"$@\" {redirect}");
            command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]).args(&run.args);
            run.lab.prepare(&mut command);
            run.outputs.iter().for_each(|name| drop(std::fs::remove_file(run.lab.path(name))));
            let output = run.run(command);
            assert_eq!(output.status.code(), Some(0), "{redirect} {:?}", run.args);
            assert!(times_differ || output.stdout == expected.stdout, "{redirect} {:?}", run.args);
            run.assert_whole();
            assert_eq!(run.contents().len(), run.outputs.len(), "{redirect} {:?}", run.args);
        }
    }
}

/// A closed descriptor is not taken by a file that is opened later: nothing that is printed lands in a file.
#[cfg(unix)]
#[test]
fn closed_descriptors_are_not_taken_by_files() {
    let run = Run::generate();
    let model = std::fs::read(run.lab.path("tiny.gguf")).unwrap();
    let clean = succeeds(&run.run(run.command()));
    let log = run.lab.read("log");
    for redirect in ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"] {
        run.outputs.iter().for_each(|name| drop(std::fs::remove_file(run.lab.path(name))));
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$@\" {redirect}"), "sh", env!("CARGO_BIN_EXE_adaptive-kvcache")]);
        run.lab.prepare(command.args(&run.args));
        let output = run.run(command);
        assert_eq!(output.status.code(), Some(0), "{redirect}");
        assert!(std::fs::read(run.lab.path("tiny.gguf")).unwrap() == model, "{redirect}: the model was written to");
        assert_eq!(run.lab.json("r.json")["text"].as_str().unwrap().trim_end(), clean.trim_end(), "{redirect}");
        assert_eq!(run.lab.read("log").lines().count(), log.lines().count(), "{redirect}");
        assert_eq!(run.contents().len(), run.outputs.len());
        run.assert_whole();
    }
}

/// The last of a report that a slow reader takes arrives.
#[cfg(unix)]
#[test]
fn a_slow_reader_gets_all_of_a_report() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let args = ["generate", "--model", &model, "--prompt", "ab c", "-n", "1500", "--ignore-eos", "-q", "--report"];
    let mut child = lab.command(&[&args[..], &["/dev/stdout"]].concat()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let read = stdout.read(&mut chunk).unwrap();
        bytes.extend_from_slice(&chunk[..read]);
        if read == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    let text = String::from_utf8(bytes).unwrap();
    let (text, report) = text.split_once("\n{").unwrap();
    let report: serde_json::Value = serde_json::from_str(&format!("{{{report}")).unwrap();
    assert_eq!(report["generated_tokens"].as_array().unwrap().len(), 1500);
    assert_eq!(report["text"].as_str().unwrap().trim_end(), text.trim_end());
}
