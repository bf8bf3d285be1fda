//! How many threads compute, who says so, and that all pools of threads follow.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use super::mishaps::tiny;
use super::{Lab, MODEL, succeeds};

/// Lets a command run on this one CPU only, out of those of the test.
fn pin(command: &mut Command) {
    // SAFETY: a mask is plain bits.
    let mut mask: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes to no more than these bytes.
    assert_eq!(unsafe { libc::sched_getaffinity(0, size_of_val(&mask), &raw mut mask) }, 0);
    // SAFETY: the numbers are below what a mask holds.
    let last = (0..libc::CPU_SETSIZE as usize).rfind(|&cpu| unsafe { libc::CPU_ISSET(cpu, &mask) }).unwrap();
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::CPU_SET(last, &mut one) };
    let narrow = move || {
        // SAFETY: the call reads these bytes.
        let status = unsafe { libc::sched_setaffinity(0, size_of_val(&one), &raw const one) };
        if status == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: what runs in the child makes one call of the system, and allocates nothing.
    unsafe { command.pre_exec(narrow) };
}

#[test]
fn the_number_of_threads_is_the_options_the_variables_or_the_machines() {
    let lab = Lab::new();
    let model = tiny(&lab);
    let run = |options: &[&str], variable: Option<&str>, is_pinned: bool| {
        let args =
            [&["generate", "--model", &model, "--prompt", "ab c", "-n", "2", "--report", "r.json"], options].concat();
        let mut command = lab.command(&args);
        command.env_remove("RAYON_NUM_THREADS");
        if let Some(variable) = variable {
            command.env("RAYON_NUM_THREADS", variable);
        }
        if is_pinned {
            pin(&mut command);
        }
        command.env("RUST_LOG", "adaptive_kvcache::threads=info");
        let output = command.output().unwrap();
        succeeds(&output);
        let report = lab.json("r.json");
        let (threads, source) =
            (report["threads"].as_u64().unwrap(), report["threads_from"].as_str().unwrap().to_owned());
        let stderr = String::from_utf8(output.stderr).unwrap();
        let event = format!("adaptive_kvcache::threads: threads={threads} source=\"{source}\"");
        assert!(stderr.contains(&event), "{event} in {stderr}");
        assert!(!lab.read("logs/test.log").contains("threads"));
        (threads, source)
    };
    assert_eq!(run(&["--threads", "3"], None, false), (3, "option".into()));
    assert_eq!(run(&["--threads", "3"], Some("2"), true), (3, "option".into()));
    assert_eq!(run(&[], Some("5"), true), (5, "variable".into()));
    for variable in [None, Some(""), Some("0"), Some("many"), Some("-1")] {
        let (threads, source) = run(&[], variable, false);
        assert!(["cores", "affinity", "quota"].contains(&source.as_str()), "{source}");
        assert!(threads as usize <= std::thread::available_parallelism().unwrap().get() + 1, "{threads}");
        let (threads, source) = run(&[], variable, true);
        assert_eq!(threads, 1, "{variable:?}");
        assert!(["cores", "affinity"].contains(&source.as_str()), "{source}");
    }
}

#[test]
fn help_says_what_is_chosen() {
    let lab = Lab::new();
    for command in ["generate", "chat", "compare", "bench", "eval", "tune"] {
        let mut command = lab.command(&[command, "--help"]);
        pin(&mut command);
        let help = succeeds(&command.output().unwrap()).split_whitespace().collect::<Vec<_>>().join(" ");
        let (_, behind) = help.split_once("hreads to compute with [default: ").unwrap();
        let default = behind.split(']').next().unwrap();
        assert!(
            default.contains("physical core") && default.contains("affinity mask") && default.contains("CPU quota")
        );
        assert!(default.ends_with(": 1 here"), "{default}");
    }
}

fn count_of(names: &[String], prefix: &str) -> usize {
    names.iter().filter(|name| name.starts_with(prefix)).count()
}

/// Names of a process's threads.
fn threads(child: &Child) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
    tasks.filter_map(|task| Some(std::fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned())).collect()
}

/// rayon's, candle's and the team: none has more threads than are asked for, nor fewer.
#[test]
fn all_pools_have_as_many_threads() {
    let lab = Lab::new();
    let tiny = tiny(&lab);
    // candle starts a pool of its own for products that are large enough.
    for (backend, model, counts) in [("kernels", tiny.as_str(), &[1, 3, 5][..]), ("candle", MODEL, &[1, 3])] {
        for &count in counts {
            let number = count.to_string();
            let args = ["generate", "--model", model, "--prompt", "ab c", "-n", "5000", "--ignore-eos"];
            let options = ["--backend", backend, "--threads", &number];
            let mut child = lab.command(&[&args[..], &options].concat()).spawn().unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
            let expected = if backend == "kernels" { [count - 1, 0] } else { [0, count - 1] };
            // A thread gives itself its name, some time after it is started.
            let mut names = threads(&child);
            for _ in 0..500 {
                if ["team-", "candle-bp-"].map(|prefix| count_of(&names, prefix)) == expected {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
                names = threads(&child);
            }
            child.kill().unwrap();
            child.wait().unwrap();
            let [team, candle] = ["team-", "candle-bp-"].map(|prefix| count_of(&names, prefix));
            assert_eq!([team, candle], expected, "{backend}, {count} threads: {names:?}");
            // The first thread, and rayon's.
            assert_eq!(names.len() - team - candle, 1 + count, "{backend}, {count} threads: {names:?}");
        }
    }
}
