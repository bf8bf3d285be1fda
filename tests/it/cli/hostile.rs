//! Model files that are not what they say: cut off, damaged, or made to hurt.

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::{WeightDtype, load};
use adaptive_kvcache::compress::AdaptiveConfig;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::tiny_gguf::{Meta, TinyGguf};
use super::{Lab, MODEL, Refusal, succeeds};
use crate::support::computed;

/// Seconds, far more than loading a few kilobytes computes.
const SLOW: u64 = 5;
const FUZZ_ROUNDS: usize = 1000;

/// The same, or what the environment variable `FUZZ_ROUNDS` says.
fn fuzz_rounds() -> usize {
    std::env::var("FUZZ_ROUNDS").map_or(FUZZ_ROUNDS, |text| text.parse().expect("FUZZ_ROUNDS is a number"))
}

/// Runs `generate` on a file with 2 GiB of address space: nothing may be allocated on a header's word alone.
pub(super) fn refused(lab: &Lab, model: &Path) -> Refusal {
    let args = ["generate", "--threads", "2", "-n", "1", "--model", model.to_str().unwrap()];
    let mut command = lab.limited(&[("-v", 2 << 20), ("-t", SLOW as usize)], &args);
    command.env("MALLOC_ARENA_MAX", "2");
    let refusal = Refusal::of(&command.output().unwrap(), &model.display().to_string());
    refusal.status(1).names(model).is_short();
    refusal
}

/// Spoils the tiny model in one way.
fn spoilt(lab: &Lab, spoil: impl FnOnce(&mut TinyGguf)) -> Refusal {
    let mut file = TinyGguf::new();
    spoil(&mut file);
    refused(lab, &lab.write("spoilt.gguf", file.bytes()))
}

#[test]
fn the_tiny_model_itself_runs() {
    let lab = Lab::new();
    for (file, ids) in [(TinyGguf::new(), [4, 7, 5, 3].as_slice()), (TinyGguf::sentence_piece(), &[1, 7, 7, 3, 0])] {
        let model = lab.write("tiny.gguf", file.bytes());
        let args = ["generate", "--model", model.to_str().unwrap(), "--prompt", "ab ab c", "-n", "3", "--ignore-eos"];
        succeeds(&lab.run(&[&args[..], &["--report", "r.json"]].concat()));
        let report = lab.json("r.json");
        assert_eq!(report["prompt_tokens"], serde_json::json!(ids));
        assert_eq!(report["generated_tokens"].as_array().unwrap().len(), 3);
    }
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let lab = Lab::new();
    lab.refuses(&["generate", "--model", "none.gguf"]).status(1).names("`none.gguf`").names("No such file").is_short();
    lab.refuses(&["inspect", "--model", "none.gguf"]).status(1).names("`none.gguf`").is_short();
    lab.refuses(&["compare", "--model", "none.gguf"]).status(1).names("`none.gguf`").is_short();
    refused(&lab, &lab.write("empty.gguf", "")).names("GGUF").hints("GGUF");
    refused(&lab, &lab.write("text.gguf", "once upon a time")).names("GGUF").hints("GGUF");
    std::fs::create_dir(lab.path("folder")).unwrap();
    refused(&lab, &lab.path("folder")).names("folder").hints("GGUF");
}

#[test]
fn a_file_that_is_cut_off_is_refused() {
    let lab = Lab::new();
    let half = std::fs::metadata(MODEL).unwrap().len() / 2;
    // Within the magic's neighbour, the counts, the vocabulary, the first tensor, and the layers.
    for len in [4, 100, 1_000_000, 3_000_000, half] {
        let path = lab.path("cut.gguf");
        std::io::copy(&mut File::open(MODEL).unwrap().take(len), &mut File::create(&path).unwrap()).unwrap();
        refused(&lab, &path).hints("fetch it again");
    }
    let (header_len, whole) = (TinyGguf::new().header().len(), TinyGguf::new().bytes());
    let path = lab.path("tiny.gguf");
    for len in (0..header_len).chain((header_len..whole.len()).step_by(997)).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = load(&path, WeightDtype::Auto).expect_err("a file that is cut off");
        assert!(matches!(error, Error::BadFile { .. }) && error.hint().is_some(), "{len} bytes: {error}");
    }
}

#[test]
fn what_is_not_computed_is_named() {
    let lab = Lab::new();
    let text = |key, value| spoilt(&lab, |file| _ = file.set(key, Meta::Text(value)));
    text("general.architecture", "gemma3").names("`gemma3`").hints("llama, qwen2, qwen3");
    text("tokenizer.ggml.model", "bert").names("`bert`").hints("gpt2");
    text("tokenizer.ggml.pre", "who-knows").names("`who-knows`").hints("smollm");
    text("llama.rope.scaling.type", "longrope").names("`longrope`").hints("linear");
    spoilt(&lab, |file| _ = file.set("llama.expert_count", Meta::U32(8))).names("mixture of experts");
    spoilt(&lab, |file| file.version = 1).names("version 1").hints("2 and 3");
    spoilt(&lab, |file| file.tensor("blk.0.attn_q.weight").format = 19).names("19").names("attn_q").hints("Q4_K");
    spoilt(&lab, |file| "blk.0.extra.weight".clone_into(&mut file.tensor("blk.0.attn_q.weight").name));
}

/// What a file says is shown in one line, and cannot steer the terminal.
#[test]
fn names_in_a_file_are_shown_as_plain_text() {
    const NAME: &str = "ll\u{1b}[2Jama\nerror: all is lost";
    let lab = Lab::new();
    let plain = |refusal: Refusal| {
        let text = [refusal.sentence, refusal.rest].concat();
        assert!(text.chars().all(|c| !c.is_control() || c == '\n'), "{text:?}");
    };
    plain(spoilt(&lab, |file| _ = file.set("general.architecture", Meta::Text(NAME))));
    plain(spoilt(&lab, |file| _ = file.set("tokenizer.ggml.pre", Meta::Text(NAME))));
    plain(spoilt(&lab, |file| {
        let tensor = file.tensor("blk.0.attn_q.weight");
        (tensor.name, tensor.offset) = (NAME.to_owned(), 1 << 40);
    }));
}

#[test]
fn absurd_sizes_are_refused_at_once() {
    let lab = Lab::new();
    spoilt(&lab, |file| file.tensor_count = Some(1 << 60)).names("1152921504606846976").hints("fetch it again");
    spoilt(&lab, |file| file.tensor_count = Some(u64::MAX)).hints("fetch it again");
    spoilt(&lab, |file| file.metadata_count = Some(1 << 60)).names("1152921504606846976").hints("fetch it again");
    let long_text = Meta::Raw(8, (1u64 << 63).to_le_bytes().to_vec());
    spoilt(&lab, |file| _ = file.set("general.name", long_text)).names("9223372036854775808").hints("fetch it again");
    let long_array = Meta::Raw(9, [&6u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat());
    spoilt(&lab, |file| _ = file.set("general.name", long_array)).hints("fetch it again");
    // An array of arrays of arrays ..., each with one element.
    let level = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    spoilt(&lab, |file| _ = file.set("general.name", Meta::Raw(9, level.repeat(100_000)))).names("nested");
    spoilt(&lab, |file| _ = file.set("general.name", Meta::Raw(77, Vec::new()))).names("77");

    for dims in [vec![1 << 32, 1 << 32], vec![1 << 62, 1 << 62, 1 << 62, 1 << 62], vec![1 << 61, 4], vec![1 << 40]] {
        spoilt(&lab, |file| file.tensor("blk.0.attn_q.weight").dims = dims).names("attn_q");
    }
    for dims in [vec![], vec![0, 32], vec![32; 5], vec![32; 1000], vec![16, 64]] {
        spoilt(&lab, |file| file.tensor("blk.0.attn_q.weight").dims = dims).names("attn_q");
    }
    for offset in [u64::MAX, u64::MAX - 4095, 1 << 63, 1 << 40, 33] {
        spoilt(&lab, |file| file.tensor("blk.0.attn_q.weight").offset = offset).names("attn_q");
    }
    for alignment in [0, 3, u32::MAX, 1 << 31] {
        spoilt(&lab, |file| _ = file.set("general.alignment", Meta::U32(alignment))).names(alignment.to_string());
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let lab = Lab::new();
    for (key, values) in [
        ("llama.block_count", [0, 2, 1_000_000_000, u32::MAX]),
        ("llama.context_length", [0, u32::MAX, u32::MAX, u32::MAX]),
        ("llama.embedding_length", [0, 31, 64, u32::MAX]),
        ("llama.feed_forward_length", [0, 65, 1 << 30, u32::MAX]),
        ("llama.attention.head_count", [0, 3, 1 << 30, u32::MAX]),
        ("llama.attention.head_count_kv", [0, 2, 3, u32::MAX]),
        ("llama.rope.dimension_count", [15, 17, 1 << 31, u32::MAX]),
        ("llama.attention.key_length", [0, 8, 1 << 31, u32::MAX]),
    ] {
        for value in values {
            spoilt(&lab, |file| _ = file.set(key, Meta::U32(value)));
        }
        spoilt(&lab, |file| _ = file.set(key, Meta::Text("seven"))).names(key);
    }
    for key in ["general.architecture", "llama.block_count", "llama.context_length", "tokenizer.ggml.tokens"] {
        spoilt(&lab, |file| _ = file.remove(key));
    }
    spoilt(&lab, |file| _ = file.set("tokenizer.ggml.tokens", Meta::Texts(vec!["a", "a"])));
    spoilt(&lab, |file| _ = file.set("tokenizer.ggml.tokens", Meta::Texts(Vec::new())));
    spoilt(&lab, |file| _ = file.set("tokenizer.ggml.token_type", Meta::I32s(vec![9; 8])));
    spoilt(&lab, |file| _ = file.set("tokenizer.ggml.merges", Meta::Texts(vec!["a z"])));
    for number in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
        spoilt(&lab, |file| _ = file.set("llama.rope.freq_base", Meta::F32(number)));
    }
}

/// A list of flags takes a byte each in the file and must not take many times as much in memory.
#[test]
fn a_long_list_needs_no_more_memory_than_its_file_suggests() {
    const FLAGS: u64 = 200 << 20;
    let lab = Lab::new();
    let mut file = TinyGguf::new();
    let list = [&7u32.to_le_bytes()[..], &FLAGS.to_le_bytes()].concat();
    file.metadata = vec![("general.flags".to_owned(), Meta::Raw(9, list))];
    let path = lab.write("long.gguf", file.header());
    File::options().write(true).open(&path).unwrap().set_len(FLAGS + (1 << 20)).unwrap(); // sparse
    refused(&lab, &path);
}

/// Damage at random: an error or a model that works, never a panic, at once.
#[test]
fn random_damage_never_panics() {
    let lab = Lab::new();
    let files = [TinyGguf::new(), TinyGguf::sentence_piece()].map(|file| (file.header().len(), file.bytes()));
    let path = lab.path("damaged.gguf");
    let mut rng = StdRng::seed_from_u64(20_240_514);
    let mut loaded = 0;
    let rounds = fuzz_rounds();
    for round in 0..rounds {
        let (header_len, bytes) = &files[round % files.len()];
        let mut damaged = bytes.clone();
        for _ in 0..rng.random_range(1..=2) {
            damage(&mut damaged, *header_len, &mut rng);
        }
        std::fs::write(&path, &damaged).unwrap();
        let before = computed();
        let outcome = catch_unwind(AssertUnwindSafe(|| try_out(&path)));
        let took = computed().saturating_sub(before);
        assert!(took < Duration::from_secs(SLOW), "round {round} took {took:?}");
        match outcome {
            Ok(Ok(())) => loaded += 1,
            Ok(Err(_)) => {}
            Err(_) => {
                let kept = std::env::temp_dir().join(format!("adaptive-kvcache-panic-{round}.gguf"));
                std::fs::write(&kept, &damaged).unwrap();
                panic!("round {round} panicked, with {}", kept.display());
            }
        }
    }
    // Some damage is harmless, most is not: else this would test nothing.
    assert!((1..rounds / 2).contains(&loaded), "{loaded} of {rounds} loaded");
}

/// Spoils one place of the header.
fn damage(bytes: &mut Vec<u8>, header_len: usize, rng: &mut StdRng) {
    let at = rng.random_range(4..header_len.min(bytes.len() - 8));
    match rng.random_range(0..6) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = rng.random(),
        2 => bytes.insert(at, rng.random()),
        3 => _ = bytes.remove(at),
        4 => bytes.truncate(bytes.len() - rng.random_range(1..16)),
        _ => {
            let numbers = [0, 1, 1 << 31, 1 << 32, 1 << 60, 1 << 63, u64::MAX, u64::MAX - 31];
            let number = numbers[rng.random_range(0..numbers.len())];
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
    }
}

/// Loads a file and runs it for two tokens.
fn try_out(path: &Path) -> adaptive_kvcache::Result<()> {
    let loaded = load(path, WeightDtype::Auto)?;
    let ids = loaded.tokenizer.encode("ab ab c")?;
    let mut cache = loaded.cache(KvDtype::F16, &AdaptiveConfig::default()).unwrap();
    loaded.model.prefill(&ids, &mut cache, &mut ())?;
    loaded.model.decode(0, &mut cache)?;
    Ok(())
}
