//! GGUF files whose metadata leave something open: what llama.cpp makes of them, compared with transformers' logits of the same
//! model in its own layout.

use super::*;

/// A tiny checkpoint as GGUF, without its own rotary keys but with these.
fn gguf(name: &str, more: &[(&'static str, GgufValue)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    Fixture::read_folder(&checkpoints(name)).write_gguf(&plain, GgmlDType::F32);
    split_gguf(&plain, folder.path(), 1, |_, metadata| {
        for (key, value) in more {
            metadata.retain(|(known, _)| known != key);
            metadata.push((key, value.clone()));
        }
    });
    std::fs::remove_file(plain).unwrap();
    folder
}

/// The largest difference from transformers' logits of a prompt of 60 tokens with positions divided by 4.
fn difference(more: &[(&'static str, GgufValue)]) -> f32 {
    let folder = gguf("linear", more);
    let expected = read_json(checkpoints("linear").join("expected.json"));
    let case = &expected["cases"][1];
    let model = model(folder.path(), WeightDtype::F32);
    max_difference(&logits(&model, &ids(&case["ids"]), &[]), &numbers(&case["last_logits"]))
}

#[test]
fn a_factor_without_a_type_is_linear() {
    let text = |text: &str| GgufValue::String(text.to_owned());
    let (factor, old) = ("llama.rope.scaling.factor", "llama.rope.scale_linear");
    let kind = "llama.rope.scaling.type";
    let four = GgufValue::F32(4.0);
    for same in [
        vec![(factor, four.clone())],
        vec![(old, four.clone())],
        vec![(kind, text("linear")), (old, four.clone())],
        // The newer key counts.
        vec![(factor, four.clone()), (old, GgufValue::F32(2.0))],
        vec![(factor, four.clone()), ("llama.rope.scaling.attn_factor", GgufValue::F32(1.0))],
    ] {
        assert!(difference(&same) < TOLERANCE, "{same:?}");
    }
    let plain = difference(&[]);
    assert!(plain > 100.0 * TOLERANCE);
    for none in [
        vec![(factor, GgufValue::F32(0.0))],
        vec![(factor, GgufValue::F32(0.0)), (old, four.clone())],
        vec![(kind, text("none")), (factor, four.clone())],
        vec![(kind, text("none")), (old, four.clone())],
        vec![(kind, text("yarn"))],
    ] {
        assert!((difference(&none) - plain).abs() < TOLERANCE, "{none:?}");
    }
    // It lengthens the context, too.
    let context = |more: &[(&'static str, GgufValue)]| {
        let folder = gguf("linear", more);
        checkpoint::open(folder.path()).unwrap().config().context_length
    };
    assert_eq!((context(&[]), context(&[(factor, four.clone())])), (256, 1024));
    let original = ("llama.rope.scaling.original_context_length", GgufValue::U32(100));
    assert_eq!(context(&[(kind, text("yarn")), (factor, four.clone()), original]), 400);
}

#[test]
fn head_counts_may_be_lists_of_equal_numbers() {
    let list = |numbers: &[u32]| GgufValue::Array(numbers.iter().copied().map(GgufValue::U32).collect());
    let (heads, kv, mlp) = ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length");
    let factor = ("llama.rope.scaling.factor", GgufValue::F32(4.0));
    let same = [(heads, list(&[4, 4])), (kv, list(&[2, 2])), (mlp, list(&[20, 20])), factor];
    assert!(difference(&same) < TOLERANCE);
    for (more, parts) in [
        ((heads, list(&[4, 2])), [heads, "layers differ"]),
        ((kv, list(&[2, 1])), [kv, "2 and 1"]),
        ((mlp, list(&[20, 24])), [mlp, "layers differ"]),
        ((heads, list(&[4])), [heads, "has 1 numbers"]),
        ((kv, list(&[2, 2, 2])), [kv, "2 layers"]),
        ((kv, list(&[0, 0])), [kv, "0 KV heads"]),
    ] {
        assert_names(&refusal(gguf("linear", &[more]).path()), &parts);
    }
}

#[test]
fn settings_that_are_not_computed_are_refused() {
    let (f32, u32) = (GgufValue::F32, GgufValue::U32);
    for (key, value) in [
        ("llama.rope.dimension_count", u32(0)),
        ("llama.rope.dimension_count", u32(4)),
        ("llama.rope.dimension_count", u32(16)),
        ("llama.rope.freq_base", f32(-1.0)),
        ("llama.rope.freq_base", f32(0.0)),
        ("llama.rope.freq_base", f32(f32::NAN)),
        ("llama.rope.scaling.factor", f32(-2.0)),
        ("llama.rope.scaling.attn_factor", f32(0.0)),
        ("llama.attention.layer_norm_rms_epsilon", f32(f32::NAN)),
        ("llama.attention.layer_norm_rms_epsilon", f32(-1e-5)),
        ("llama.attention.layer_norm_rms_epsilon", f32(1.0)),
        ("llama.attention.key_length", u32(7)),
        ("llama.attention.value_length", u32(16)),
        ("llama.block_count", u32(0)),
        ("llama.expert_used_count", u32(2)),
        ("llama.logit_scale", f32(0.0625)),
        ("llama.residual_scale", f32(0.22)),
        ("llama.attention.clamp_kqv", f32(8.0)),
        ("llama.attention.max_alibi_bias", f32(8.0)),
        ("llama.attention.causal", GgufValue::Bool(false)),
        ("llama.final_logit_softcapping", f32(30.0)),
    ] {
        let text = refusal(gguf("linear", &[(key, value)]).path());
        let named = if key.contains("expert") { "mixture of experts" } else { key };
        assert_names(&text, &[named]);
    }
    let kind = ("llama.rope.scaling.type", GgufValue::String(String::new()));
    assert_names(&refusal(gguf("linear", &[kind]).path()), &["rope scaling ``", "linear"]);
}

/// A window of all layers, or of some.
#[test]
fn a_window_is_read() {
    let size = ("llama.attention.sliding_window", GgufValue::U32(48));
    let pattern = |layers: &[bool]| {
        let layers = layers.iter().map(|&is_windowed| GgufValue::Bool(is_windowed)).collect();
        ("llama.attention.sliding_window_pattern", GgufValue::Array(layers))
    };
    let windows = |more: &[(&'static str, GgufValue)]| {
        let config = checkpoint::open(gguf("linear", more).path()).unwrap().config().clone();
        assert_eq!(config.context_length, 256);
        [config.window(0), config.window(1)]
    };
    assert_eq!(windows(&[]), [None; 2]);
    assert_eq!(windows(&[("llama.attention.sliding_window", GgufValue::U32(0))]), [None; 2]);
    assert_eq!(windows(std::slice::from_ref(&size)), [Some(48); 2]);
    assert_eq!(windows(&[size.clone(), pattern(&[false, true])]), [None, Some(48)]);
    assert_eq!(windows(&[size.clone(), pattern(&[false, false])]), [None; 2]);
    for wrong in [pattern(&[true]), ("llama.attention.sliding_window_pattern", GgufValue::U32(2))] {
        let text = refusal(gguf("linear", &[size.clone(), wrong]).path());
        assert_names(&text, &["`llama.attention.sliding_window_pattern`"]);
    }
}

#[test]
fn files_that_hold_no_model_are_named() {
    let text = |text: &str| GgufValue::String(text.to_owned());
    for (more, parts) in [
        (vec![("general.type", text("adapter"))], ["adapter (LoRA)", "llama-export-lora"]),
        (vec![("general.type", text("imatrix"))], ["importance matrix", "give the model"]),
        (vec![("imatrix.chunk_count", GgufValue::U32(3))], ["importance matrix", "give the model"]),
        (vec![("general.type", text("mmproj"))], ["mmproj", "text model"]),
        (vec![("general.architecture", text("clip"))], ["mmproj", "text model"]),
        (vec![("general.architecture", text("controlvector"))], ["control vector", "give the model"]),
        (vec![("general.type", text("vocab"))], ["vocabulary without a model", "give the model"]),
    ] {
        assert_names(&refusal(gguf("linear", &more).path()), &parts);
    }
    assert!(checkpoint::open(gguf("linear", &[("general.type", text("model"))]).path()).is_ok());
}
