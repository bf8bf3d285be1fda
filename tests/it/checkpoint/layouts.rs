//! Folders as people have them: what a configuration and its weights disagree about, files that are left over, names of
//! classes, contexts. What is computed is compared with transformers' logits wherever a file has them.

use super::*;

/// Logits of the first case of a tiny checkpoint that is long enough, as transformers has them, and ours.
fn compare(name: &str, model: &Llama, tokens: usize) -> f32 {
    let expected = read_json(checkpoints(name).join("expected.json"));
    let cases = expected["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| ids(&case["ids"]).len() >= tokens).unwrap();
    max_difference(&logits(model, &ids(&case["ids"]), &[]), &numbers(&case["last_logits"]))
}

fn load(folder: &Path) -> (Checkpoint, Llama) {
    let checkpoint = checkpoint::open(folder).unwrap();
    let model = checkpoint.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap();
    (checkpoint, model)
}

fn set_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = read_json(&path);
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT: &str = "lm_head.weight";

#[test]
fn an_output_layer_of_its_own_counts_though_the_configuration_ties() {
    // transformers computed this one from weights whose two tables differ.
    let folder = with_config(&checkpoints("bf16"), |config| config["tie_word_embeddings"] = json!(true));
    let (checkpoint, model) = load(folder.path());
    assert!(compare("bf16", &model, 10) < TOLERANCE);
    assert!(!checkpoint.is_tied());
    assert_eq!(checkpoint.notes().len(), 1);
    assert_names(&checkpoint.notes()[0], &["ties", OUTPUT, folder.path().to_str().unwrap()]);

    // The same in several files.
    let several = tempfile::tempdir().unwrap();
    shard(&checkpoints("bf16"), several.path());
    set_config(several.path(), |config| config["tie_word_embeddings"] = json!(true));
    let (checkpoint, model) = load(several.path());
    assert!(compare("bf16", &model, 10) < TOLERANCE && !checkpoint.is_tied());
}

#[test]
fn equal_tables_and_either_one_alone_are_tied() {
    let check = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let folder = with_tensors(&checkpoints("f16"), change);
        let (checkpoint, model) = load(folder.path());
        assert!(compare("f16", &model, 10) < TOLERANCE);
        assert!(checkpoint.is_tied() && checkpoint.notes().is_empty());
    };
    check(&|_| ());
    check(&|tensors| _ = tensors.insert(OUTPUT.to_owned(), tensors[EMBEDDING].copy().unwrap()));
    // The same numbers in another format.
    check(&|tensors| _ = tensors.insert(OUTPUT.to_owned(), tensors[EMBEDDING].to_dtype(DType::F32).unwrap()));
    let only_output = |tensors: &mut HashMap<String, Tensor>| {
        let table = tensors.remove(EMBEDDING).unwrap();
        tensors.insert(OUTPUT.to_owned(), table);
    };
    check(&only_output);
    // Without a word of the configuration there is no such rule.
    let folder = with_tensors(&checkpoints("f16"), only_output);
    set_config(folder.path(), |config| config["tie_word_embeddings"] = json!(false));
    assert_names(&refusal(folder.path()), &[EMBEDDING, "is missing"]);
    // A table that fits no model is not passed over because another one would do.
    let folder = with_tensors(&checkpoints("f16"), |tensors| {
        tensors.insert(OUTPUT.to_owned(), Tensor::zeros((8, 32), DType::F16, &Device::Cpu).unwrap());
    });
    assert_names(&refusal(folder.path()), &[OUTPUT, "expected shape"]);
}

#[test]
fn scaling_lengthens_the_context() {
    let context = |folder: &TempDir| checkpoint::open(folder.path()).unwrap().config().context_length;
    // Neither depends on `max_position_embeddings`, so transformers' logits stay what they are.
    let linear = with_config(&checkpoints("linear"), |config| config["max_position_embeddings"] = json!(16));
    assert_eq!(context(&linear), 64);
    assert!(compare("linear", &load(linear.path()).1, 60) < TOLERANCE);
    let yarn = with_config(&checkpoints("yarn"), |config| config["max_position_embeddings"] = json!(32));
    assert_eq!(context(&yarn), 128);
    assert!(compare("yarn", &load(yarn.path()).1, 100) < TOLERANCE);
    // What is longer already stays so, and Llama 3's scaling is part of what a model was made for.
    assert_eq!(context(&with_config(&checkpoints("yarn"), |_| ())), 256);
    let llama3 = with_config(&checkpoints("old-spelling"), |config| config["max_position_embeddings"] = json!(48));
    assert_eq!(context(&llama3), 48);
    // Old spellings, as of models for 16 thousand tokens.
    let vicuna = with_config(&checkpoints("linear"), |config| {
        config["max_position_embeddings"] = json!(40);
        config["max_sequence_length"] = json!(160);
    });
    assert_eq!(context(&vicuna), 160);
}

#[test]
fn a_context_is_set_to_what_one_wants() {
    let short = with_config(&checkpoints("biases"), |config| config["max_position_embeddings"] = json!(16));
    let mut checkpoint = checkpoint::open(short.path()).unwrap();
    checkpoint.set_context(64).unwrap();
    assert_names(&checkpoint.notes()[0], &["64", "16"]);
    assert!(
        compare("biases", &checkpoint.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap(), 40)
            < TOLERANCE
    );

    let mut checkpoint = checkpoint::open(checkpoints("biases")).unwrap();
    checkpoint.set_context(8).unwrap();
    assert!(checkpoint.notes().is_empty());
    let model = checkpoint.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap();
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    assert!(model.prefill(&[1; 9], &mut cache, &mut ()).unwrap_err().is_usage());

    for absurd in [0, (1 << 30) + 1, usize::MAX] {
        assert!(checkpoint.set_context(absurd).unwrap_err().is_usage());
    }
    let mut window = checkpoint::open(checkpoints("mistral")).unwrap();
    window.set_context(500).unwrap();
    assert_eq!((window.config().context_length, window.config().window(0)), (500, Some(48)));
}

#[test]
fn classes_that_somebody_derived_are_what_their_type_says() {
    let names = ["LLaMAForCausalLM", "LlamaForCausalLM2", "VicunaForCausalLM", "MyLMHeadModel", "llamaforcausallm"];
    for name in names {
        let folder = with_config(&checkpoints("linear"), |config| config["architectures"] = json!([name]));
        assert!(compare("linear", &load(folder.path()).1, 60) < TOLERANCE, "{name}");
    }
    // Without the type, only the two names that are known.
    for (name, is_known) in [("LLaMAForCausalLM", true), ("VicunaForCausalLM", false)] {
        let folder = with_config(&checkpoints("linear"), |config| {
            config["architectures"] = json!([name]);
            config.as_object_mut().unwrap().remove("model_type");
        });
        assert_eq!(checkpoint::open(folder.path()).is_ok(), is_known, "{name}");
    }
    // Other models' classes are not believed to be LLaMA: some have the same tensors.
    for name in
        ["Gemma2ForCausalLM", "GPTNeoXForCausalLM", "LlamaForSequenceClassification", "LlavaForConditionalGeneration"]
    {
        let folder = with_config(&checkpoints("linear"), |config| config["architectures"] = json!([name]));
        assert_names(&refusal(folder.path()), &[name, "not supported"]);
    }
}

#[test]
fn a_single_file_comes_before_an_index() {
    let folder = copy_of(&checkpoints("f16"));
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#).unwrap();
    let (checkpoint, model) = load(folder.path());
    assert!(compare("f16", &model, 10) < TOLERANCE);
    assert_names(&checkpoint.notes()[0], &["model.safetensors", "single file"]);
    assert_names(&refusal(&index), &["model-00001-of-00002.safetensors", "No such file"]);

    // The other way round: the single file has not all, and what to do is said.
    let folder = tempfile::tempdir().unwrap();
    shard(&checkpoints("f16"), folder.path());
    let first = folder.path().join("model-00001-of-00003.safetensors");
    std::fs::copy(first, folder.path().join("model.safetensors")).unwrap();
    assert_names(&refusal(folder.path()), &["is missing", "model.safetensors.index.json", "give its path"]);
    load(&folder.path().join("model.safetensors.index.json"));
}

#[test]
fn buffers_that_no_index_lists_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    shard(&checkpoints("f16"), folder.path());
    let part = folder.path().join("model-00002-of-00003.safetensors");
    let mut tensors = candle_core::safetensors::load(&part, &Device::Cpu).unwrap();
    for name in ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "masked_bias", "bias"] {
        let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert(format!("model.layers.1.self_attn.{name}"), zeros);
    }
    candle_core::safetensors::save(&tensors, &part).unwrap();
    assert!(compare("f16", &load(folder.path()).1, 10) < TOLERANCE);
    // And one that it lists need not be there.
    let path = folder.path().join("model.safetensors.index.json");
    let mut index = read_json(&path);
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = json!("model-00001-of-00003.safetensors");
    std::fs::write(&path, index.to_string()).unwrap();
    assert!(compare("f16", &load(folder.path()).1, 10) < TOLERANCE);
}

#[test]
fn ids_that_no_token_has_are_left_out() {
    let folder = with_config(&checkpoints("f16"), |config| {
        config["bos_token_id"] = json!(-1);
        config["eos_token_id"] = json!([2, 64, -1, 3.0, 2.5, null, 4_294_967_296_u64]);
    });
    std::fs::write(
        folder.path().join("generation_config.json"),
        r#"{"bos_token_id": 1, "eos_token_id": [9, 1000], "pad_token_id": -1}"#,
    )
    .unwrap();
    let read = checkpoint::hf_config::read(folder.path()).unwrap();
    assert_eq!((read.ids.bos_id, &read.ids.eos_ids[..]), (Some(1), &[2, 3, 9][..]));
    let notes = checkpoint::open(folder.path()).unwrap().notes().join("\n");
    assert_eq!(notes.lines().count(), 7, "{notes}");
    assert_names(
        &notes,
        &["`bos_token_id`", "-1", "`eos_token_id`", " 64,", "2.5", "null", "generation_config.json", "1000"],
    );
    for wrong in [json!("2"), json!([2, "x"]), json!({"a": 1}), json!(true), json!([[2]])] {
        let folder = with_config(&checkpoints("f16"), |config| config["eos_token_id"] = wrong);
        assert_names(&refusal(folder.path()), &["eos_token_id", "a token id or a list"]);
    }
}
