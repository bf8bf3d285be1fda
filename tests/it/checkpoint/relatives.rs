//! Architectures that differ from LLaMA's by little: what they compute from GGUF files, as llama.cpp's converter writes them.

use super::*;

/// Writes a tiny checkpoint as GGUF; rows stay as they are, since these rotate halves.
fn write_gguf(name: &str, path: &Path, change: impl FnOnce(&mut Vec<(String, GgufValue)>)) {
    let folder = checkpoints(name);
    let config = read_json(folder.join("config.json"));
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let renamed = |name: &str| {
        let name = name.strip_prefix("model.").unwrap_or(name).replace("layers.", "blk.");
        [
            ("embed_tokens", "token_embd"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ]
        .iter()
        .fold(if name == "norm.weight" { "output_norm.weight".to_owned() } else { name }, |name, (from, to)| {
            name.replace(from, to)
        })
    };
    let tensors: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| (renamed(name), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let whole = |key: &str| GgufValue::U32(u32::try_from(config[key].as_u64().unwrap()).unwrap());
    let mut metadata = vec![
        ("general.architecture".to_owned(), GgufValue::String(name.to_owned())),
        (format!("{name}.rope.freq_base"), GgufValue::F32(10_000.0)),
        (format!("{name}.attention.layer_norm_rms_epsilon"), GgufValue::F32(1e-6)),
    ];
    for (key, from) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        metadata.push((format!("{name}.{key}"), whole(from)));
    }
    if config["head_dim"].is_u64() {
        metadata.push((format!("{name}.attention.key_length"), whole("head_dim")));
        metadata.push((format!("{name}.attention.value_length"), whole("head_dim")));
    }
    change(&mut metadata);
    let metadata: Vec<(&str, &GgufValue)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn relatives_compute_what_transformers_does_from_gguf_files_and_with_both_backends() {
    for name in ["qwen2", "qwen3"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        write_gguf(name, &path, |_| {});
        for (path, backend) in
            [(&path, BackendKind::default()), (&path, candle_on_cpu()), (&checkpoints(name), candle_on_cpu())]
        {
            let model = checkpoint::open(path).unwrap().model(&backend, WeightDtype::F32, &mut |_, _| {}).unwrap();
            expect_all_cases(name, &model);
        }
    }
}

/// A key of another architecture's name says nothing, and one of its own counts.
#[test]
fn keys_begin_with_the_name_of_the_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_gguf("qwen3", &path, |metadata| {
        metadata.push(("llama.expert_count".to_owned(), GgufValue::U32(8)));
        metadata.retain(|(key, _)| !key.ends_with("attention.head_count"));
    });
    let text = refusal(&path);
    assert_names(&text, &["`qwen3.attention.head_count` is missing"]);
}

/// A window is one only where it is in use, in layers that there are.
#[test]
fn windows_of_qwen_count_where_they_are_in_use() {
    let window = |changes: &[(&str, Value)]| {
        let folder = with_config(&checkpoints("qwen2"), |config| {
            config.as_object_mut().unwrap().remove("layer_types");
            for (key, value) in changes {
                config[*key] = value.clone();
            }
        });
        let config = adaptive_kvcache::checkpoint::hf_config::read(folder.path()).unwrap().config;
        [config.window(0), config.window(1)]
    };
    assert_eq!(window(&[("sliding_window", json!(48))]), [None; 2]);
    let in_use = ("use_sliding_window", json!(true));
    let of =
        |more: &[(&'static str, Value)]| window(&[&[in_use.clone(), ("sliding_window", json!(48))], more].concat());
    assert_eq!(of(&[("max_window_layers", json!(1))]), [None, Some(48)]);
    assert_eq!(of(&[("max_window_layers", json!(2))]), [None; 2]);
    assert_eq!(of(&[("max_window_layers", json!(0))]), [Some(48); 2]);
    assert_eq!(of(&[("layer_types", json!(["sliding_attention", "full_attention"]))]), [Some(48), None]);
    assert_eq!(
        of(&[("layer_types", json!(["full_attention", "full_attention"])), ("max_window_layers", json!(0))]),
        [None; 2]
    );
    for (types, part) in [
        (json!(["full_attention"]), "of 1 layers, expected 2"),
        (json!(["full_attention", "chunked_attention"]), "chunked_attention"),
        (json!(["full_attention", 3]), "`layer_types`"),
    ] {
        let folder = with_config(&checkpoints("qwen2"), |config| {
            config["use_sliding_window"] = json!(true);
            config["layer_types"] = types;
        });
        assert_names(&refusal(folder.path()), &[part]);
    }
}
