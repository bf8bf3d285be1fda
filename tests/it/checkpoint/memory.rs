//! How much memory loading takes.

use super::*;

/// Random f16 weights of about 100 MB.
fn write_large(folder: &Path) -> Checkpoint {
    let (hidden, mlp, layers, vocab) = (1024, 2816, 3, 16_384);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": vocab, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let matrix = |rows: usize, cols: usize| {
        Tensor::randn(0_f32, 0.02, (rows, cols), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()
    };
    let ones = || Tensor::ones(hidden, DType::F16, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), matrix(vocab, hidden)),
        ("model.norm.weight".to_owned(), ones()),
    ]);
    for layer in 0..layers {
        let mut add = |part: &str, tensor| tensors.insert(format!("model.layers.{layer}.{part}.weight"), tensor);
        for part in ["q", "k", "v", "o"] {
            add(&format!("self_attn.{part}_proj"), matrix(hidden, hidden));
        }
        add("mlp.gate_proj", matrix(mlp, hidden));
        add("mlp.up_proj", matrix(mlp, hidden));
        add("mlp.down_proj", matrix(hidden, mlp));
        add("input_layernorm", ones());
        add("post_attention_layernorm", ones());
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    checkpoint::open(folder).unwrap()
}

const CHILD_FOLDER: &str = "CHECKPOINT_TEST_FOLDER";
const CHILD_DTYPE: &str = "CHECKPOINT_TEST_DTYPE";

/// The process whose memory the next test looks at.
#[test]
#[ignore = "run by the test of memory, in a process of its own"]
fn memory_child() {
    use WeightDtype::{Auto, Bf16, Q4_0, Q4K, Q8_0};

    let (Ok(folder), Ok(dtype)) = (std::env::var(CHILD_FOLDER), std::env::var(CHILD_DTYPE)) else { return };
    let dtype = [Auto, Bf16, Q8_0, Q4_0, Q4K].into_iter().find(|known| known.name() == dtype).unwrap();
    let before = process_memory().unwrap().peak;
    logits(&model(folder, dtype), &[1, 2, 3, 4], &[5]);
    println!("grown by {} bytes", process_memory().unwrap().peak - before);
}

/// In their own format, weights are never in memory but as the mapped file; converted, the result and the file's pages of one
/// matrix are: the largest is a third of the weights. In blocks of 32 they have 34 of 64 bytes or 18, of 256 144 of 512, and
/// the output layer 210 of 512.
#[test]
fn loading_takes_little_more_memory_than_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let weights = write_large(folder.path()).tensors().bytes() as f64;
    for (dtype, least, most) in
        [("auto", 0.9, 1.2), ("bf16", 0.9, 1.5), ("q8_0", 0.5, 0.8), ("q4_0", 0.3, 0.65), ("q4_k", 0.3, 0.65)]
    {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint::memory::memory_child", "--ignored", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .env(CHILD_DTYPE, dtype)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let grown = text.split("grown by ").nth(1).and_then(|rest| rest.split(' ').next()).expect(&text);
        let grown: f64 = grown.parse().unwrap();
        assert!(grown > least * weights, "{dtype}: {grown} of {weights}: not all weights were read");
        assert!(grown < most * weights, "{dtype}: {grown} of {weights}");
    }
}
