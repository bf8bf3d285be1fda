//! `--isa`: the instructions that kernels use, for tests and measurements.

use adaptive_kvcache::kernels::simd::InstructionSet;

use super::tiny_gguf::TinyGguf;
use super::{Lab, succeeds};

const MODEL: [&str; 4] = ["--model", "tiny.gguf", "--threads", "1"];

#[test]
fn every_command_that_loads_a_model_runs_on_each_set_of_the_processor() {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    for set in InstructionSet::available() {
        let generate = ["generate", "--prompt", "ab a b", "-n", "4", "--isa", set.name()];
        succeeds(&lab.run(&[&generate[..1], &MODEL, &generate[1..]].concat()));
    }
    for command in [
        &["compare", "--prompt", "ab a b", "-n", "2", "--isa", "portable"][..],
        &["bench", "--contexts", "8", "-n", "2", "--runs", "1", "--warmup", "0", "--isa", "portable"],
    ] {
        succeeds(&lab.run(&[&command[..1], &MODEL, &command[1..]].concat()));
    }
}

#[test]
fn what_the_processor_lacks_and_what_is_none_are_refused_in_one_sentence() {
    let lab = Lab::new();
    lab.write("tiny.gguf", TinyGguf::new().bytes());
    let available: Vec<&str> = InstructionSet::available().iter().map(|set| set.name()).collect();
    for name in ["portable", "avx2", "avxvnni", "avx512", "vnni"].into_iter().filter(|name| !available.contains(name)) {
        lab.refuses(&["generate", "--model", "tiny.gguf", "--isa", name])
            .status(2)
            .names("--isa")
            .names("this processor");
        assert!(name.parse::<InstructionSet>().is_err());
    }
    for name in ["", "AVX2", "neon", "best"] {
        lab.refuses(&["generate", "--model", "tiny.gguf", "--isa", name])
            .status(2)
            .names("--isa")
            .names("expected one of");
    }
    let help = succeeds(&lab.run(&["generate", "--help"]));
    assert!(!help.contains("--isa"), "an option for tests");
}
