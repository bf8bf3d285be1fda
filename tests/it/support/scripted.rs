//! A model of one layer, or two, in GGUF that says what it is told to: each token is followed by the one that a script names.
//!
//! Every token's vector is a unit of its own, attention and feed-forward add nothing, and the output's rows say which
//! token follows which. Tokens that nothing follows are followed by any token with equal probability.

use std::path::Path;

use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, load};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

/// At most so many tokens.
const HIDDEN: usize = 32;
const MLP: usize = 32;
const KV_WIDTH: usize = 16;

/// Types of tokens in a GGUF file.
pub const NORMAL: i32 = 1;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;

#[derive(Clone)]
pub struct Scripted {
    tokens: Vec<(&'static str, i32)>,
    metadata: Vec<(&'static str, Value)>,
    weights: Vec<(&'static str, Vec<f32>, Vec<usize>)>,
}

impl Scripted {
    /// Tokens with their types; the first is end-of-sequence unless [`meta`](Self::meta) says otherwise.
    pub fn new(tokens: &[(&'static str, i32)]) -> Self {
        // A byte-level tokenizer must have a merge: one that no test's text comes to.
        let tokens = [tokens, &[("Q", NORMAL), ("W", NORMAL), ("QW", NORMAL)]].concat();
        assert!(tokens.len() <= HIDDEN);
        let zeros = |name, dims: &[usize]| (name, vec![0.0; dims.iter().product()], dims.to_vec());
        let ones = |name| (name, vec![1.0; HIDDEN], vec![HIDDEN]);
        let mut model = Self {
            tokens: tokens.clone(),
            metadata: vec![
                ("general.architecture", Value::String("llama".to_owned())),
                ("llama.context_length", Value::U32(64)),
                ("llama.embedding_length", Value::U32(HIDDEN as u32)),
                ("llama.block_count", Value::U32(1)),
                ("llama.feed_forward_length", Value::U32(MLP as u32)),
                ("llama.attention.head_count", Value::U32(2)),
                ("llama.attention.head_count_kv", Value::U32(1)),
                ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
                ("llama.rope.dimension_count", Value::U32(16)),
                ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
                ("tokenizer.ggml.pre", Value::String("smollm".to_owned())),
                ("tokenizer.ggml.merges", Value::Array(vec![Value::String("Q W".to_owned())])),
                ("tokenizer.ggml.eos_token_id", Value::U32(0)),
                ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
                (
                    "tokenizer.chat_template",
                    Value::String("{% for m in messages %}{{ m.content }}{% endfor %}".to_owned()),
                ),
            ],
            weights: vec![
                zeros("token_embd.weight", &[tokens.len(), HIDDEN]),
                zeros("output.weight", &[tokens.len(), HIDDEN]),
                ones("output_norm.weight"),
                ones("blk.0.attn_norm.weight"),
                zeros("blk.0.attn_q.weight", &[HIDDEN, HIDDEN]),
                zeros("blk.0.attn_k.weight", &[KV_WIDTH, HIDDEN]),
                zeros("blk.0.attn_v.weight", &[KV_WIDTH, HIDDEN]),
                zeros("blk.0.attn_output.weight", &[HIDDEN, HIDDEN]),
                ones("blk.0.ffn_norm.weight"),
                zeros("blk.0.ffn_gate.weight", &[MLP, HIDDEN]),
                zeros("blk.0.ffn_up.weight", &[MLP, HIDDEN]),
                zeros("blk.0.ffn_down.weight", &[HIDDEN, MLP]),
            ],
        };
        for id in 0..tokens.len() {
            model.weight("token_embd.weight")[id * HIDDEN + id] = 1.0;
        }
        model
    }

    fn weight(&mut self, name: &str) -> &mut Vec<f32> {
        &mut self.weights.iter_mut().find(|(known, ..)| *known == name).unwrap().1
    }

    fn id(&self, text: &str) -> usize {
        self.tokens.iter().position(|(token, _)| *token == text).unwrap_or_else(|| panic!("{text}"))
    }

    /// Each of these tokens is followed by the next.
    pub fn says(&mut self, tokens: &[&str]) -> &mut Self {
        for pair in tokens.windows(2) {
            self.leads(pair[0], pair[1], 4.0);
        }
        self
    }

    /// How strongly one token asks for another.
    pub fn leads(&mut self, from: &str, to: &str, weight: f32) -> &mut Self {
        let (from, to) = (self.id(from), self.id(to));
        self.weight("output.weight")[to * HIDDEN + from] = weight;
        self
    }

    /// Sets one number of the vector that the model has for a token.
    pub fn spoil(&mut self, token: &str, number: f32) -> &mut Self {
        let id = self.id(token);
        self.weight("token_embd.weight")[id * HIDDEN + HIDDEN - 1] = number;
        self
    }

    /// Sets what a weight makes of a token, in the first number that it gives.
    pub fn spoil_weight(&mut self, name: &str, token: &str, number: f32) -> &mut Self {
        let id = self.id(token);
        self.weight(name)[id] = number;
        self
    }

    /// Adds a layer that is as the first one is now.
    pub fn second_layer(&mut self) -> &mut Self {
        let first: Vec<_> = self.weights.iter().filter(|(name, ..)| name.starts_with("blk.0.")).cloned().collect();
        let copies =
            first.into_iter().map(|(name, numbers, dims)| (&*name.replace("blk.0.", "blk.1.").leak(), numbers, dims));
        self.weights.extend(copies);
        self.meta("llama.block_count", Value::U32(2))
    }

    pub fn meta(&mut self, key: &'static str, value: Value) -> &mut Self {
        self.metadata.retain(|(known, _)| *known != key);
        self.metadata.push((key, value));
        self
    }

    pub fn write(&self, path: &Path) {
        let array = |values: Vec<Value>| Value::Array(values);
        let tokens = array(self.tokens.iter().map(|(text, _)| Value::String((*text).to_owned())).collect());
        let types = array(self.tokens.iter().map(|(_, kind)| Value::I32(*kind)).collect());
        let mut metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(key, value)| (*key, value)).collect();
        metadata.push(("tokenizer.ggml.tokens", &tokens));
        metadata.push(("tokenizer.ggml.token_type", &types));
        let tensors: Vec<(&str, QTensor)> = self
            .weights
            .iter()
            .map(|(name, numbers, dims)| {
                let tensor = Tensor::from_slice(numbers, &dims[..], &Device::Cpu).unwrap();
                (*name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
            })
            .collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut file = std::fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    /// The model through our own loader.
    pub fn load(&self) -> Loaded {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scripted.gguf");
        self.write(&path);
        load(&path, WeightDtype::Auto).unwrap()
    }
}
