//! Writes a GGUF file of a one-layer LLaMA with eight tokens, whole or with one thing wrong in it.
//!
//! It knows nothing of the program's reader: numbers are those of the format's specification.

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Texts(Vec<&'static str>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Type number and bytes, whatever they are.
    Raw(u32, Vec<u8>),
}

pub struct Tensor {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    /// Block format; 0 is f32.
    pub format: u32,
    /// From the start of the data.
    pub offset: u64,
}

/// What stands in the file; every field may be spoilt.
pub struct TinyGguf {
    pub version: u32,
    /// Announced, if not the real one.
    pub tensor_count: Option<u64>,
    pub metadata_count: Option<u64>,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
    data_len: u64,
}

const HIDDEN: u64 = 32;
const KV_WIDTH: u64 = 16;
const MLP: u64 = 64;
const TOKENS: [&str; 8] = ["<|endoftext|>", "a", "b", "c", "ab", "\u{120}", "\u{120}a", "\u{120}ab"];

impl TinyGguf {
    pub fn new() -> Self {
        let mut file = Self {
            version: 3,
            tensor_count: None,
            metadata_count: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            data_len: 0,
        };
        for (key, value) in [
            ("general.architecture", Meta::Text("llama")),
            ("general.alignment", Meta::U32(32)),
            ("llama.context_length", Meta::U32(64)),
            ("llama.embedding_length", Meta::U32(32)),
            ("llama.block_count", Meta::U32(1)),
            ("llama.feed_forward_length", Meta::U32(64)),
            ("llama.attention.head_count", Meta::U32(2)),
            ("llama.attention.head_count_kv", Meta::U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
            ("llama.rope.dimension_count", Meta::U32(16)),
            ("llama.rope.freq_base", Meta::F32(10_000.0)),
            ("tokenizer.ggml.model", Meta::Text("gpt2")),
            ("tokenizer.ggml.pre", Meta::Text("smollm")),
            ("tokenizer.ggml.tokens", Meta::Texts(TOKENS.to_vec())),
            ("tokenizer.ggml.token_type", Meta::I32s(vec![3, 1, 1, 1, 1, 1, 1, 1])),
            ("tokenizer.ggml.merges", Meta::Texts(vec!["a b", "\u{120} a", "\u{120} ab"])),
            ("tokenizer.ggml.bos_token_id", Meta::U32(0)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(0)),
        ] {
            file.set(key, value);
        }
        for (name, dims) in [
            ("token_embd.weight", &[HIDDEN, TOKENS.len() as u64][..]),
            ("output_norm.weight", &[HIDDEN]),
            ("blk.0.attn_norm.weight", &[HIDDEN]),
            ("blk.0.attn_q.weight", &[HIDDEN, HIDDEN]),
            ("blk.0.attn_k.weight", &[HIDDEN, KV_WIDTH]),
            ("blk.0.attn_v.weight", &[HIDDEN, KV_WIDTH]),
            ("blk.0.attn_output.weight", &[HIDDEN, HIDDEN]),
            ("blk.0.ffn_norm.weight", &[HIDDEN]),
            ("blk.0.ffn_gate.weight", &[HIDDEN, MLP]),
            ("blk.0.ffn_up.weight", &[HIDDEN, MLP]),
            ("blk.0.ffn_down.weight", &[MLP, HIDDEN]),
        ] {
            let offset = file.data_len;
            file.data_len += 4 * dims.iter().product::<u64>(); // all are whole multiples of the alignment
            file.tensors.push(Tensor { name: name.to_owned(), dims: dims.to_vec(), format: 0, offset });
        }
        file
    }

    /// The same model with a `SentencePiece` tokenizer of as many tokens.
    pub fn sentence_piece() -> Self {
        let tokens = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "ab", "\u{2581}ab"];
        let mut file = Self::new();
        file.remove("tokenizer.ggml.pre")
            .remove("tokenizer.ggml.merges")
            .set("tokenizer.ggml.model", Meta::Text("llama"))
            .set("tokenizer.ggml.tokens", Meta::Texts(tokens.to_vec()))
            .set("tokenizer.ggml.token_type", Meta::I32s(vec![2, 3, 3, 1, 1, 1, 1, 1]))
            .set("tokenizer.ggml.scores", Meta::F32s(vec![0.0, 0.0, 0.0, -5.0, -4.0, -3.0, -2.0, -1.0]))
            .set("tokenizer.ggml.bos_token_id", Meta::U32(1))
            .set("tokenizer.ggml.eos_token_id", Meta::U32(2));
        file
    }

    /// The same model with a token for each byte (its value), for each of `markers`, and for the space, so that ids spell
    /// text one to one; BOS is not put before prompts.
    pub fn chat(template: &str, markers: &[&str]) -> Self {
        let leak = |text: String| -> &'static str { text.leak() };
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let others = markers.iter().copied().chain(["\u{2581}"]).map(str::to_owned);
        let tokens: Vec<_> = bytes.chain(others).map(leak).collect();
        let count = tokens.len();
        let kind = |id| if id < 256 { 6 } else { 3 };
        let kinds = (0..count - 1).map(kind).chain([1]).collect();
        let mut file = Self::sentence_piece();
        file.set("tokenizer.ggml.tokens", Meta::Texts(tokens))
            .set("tokenizer.ggml.token_type", Meta::I32s(kinds))
            .set("tokenizer.ggml.scores", Meta::F32s(vec![0.0; count]))
            .set("tokenizer.ggml.add_bos_token", Meta::Raw(7, vec![0]))
            .set("tokenizer.ggml.add_space_prefix", Meta::Raw(7, vec![0]))
            .set("tokenizer.ggml.bos_token_id", Meta::U32(256))
            .set("tokenizer.ggml.eos_token_id", Meta::U32(257))
            .set("llama.context_length", Meta::U32(16384))
            .set("tokenizer.chat_template", Meta::Text(leak(template.to_owned())));
        file.tensor("token_embd.weight").dims[1] = count as u64;
        file.data_len = 0;
        for tensor in &mut file.tensors {
            tensor.offset = file.data_len;
            file.data_len += 4 * tensor.dims.iter().product::<u64>();
        }
        file
    }

    /// Adds a metadata entry, or replaces it.
    pub fn set(&mut self, key: &str, value: Meta) -> &mut Self {
        match self.metadata.iter_mut().find(|(known, _)| known == key) {
            Some(entry) => entry.1 = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(known, _)| known != key);
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Everything before the tensors' data.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let (kind, bytes) = value.encode();
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend(u32::try_from(tensor.dims.len()).unwrap().to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.format.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out
    }

    /// The whole file; its weights are small numbers of both signs.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32), 0);
        let weight = |i: u64| f32::from(u16::try_from(i * 37 % 101).unwrap()) / 101.0 - 0.4;
        out.extend((0..self.data_len / 4).flat_map(|i| weight(i).to_le_bytes()));
        out
    }
}

impl Meta {
    /// Type number and bytes.
    fn encode(&self) -> (u32, Vec<u8>) {
        let mut out = Vec::new();
        let mut array = |kind: u32, len: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        let kind = match self {
            Self::U32(number) => {
                out.extend(number.to_le_bytes());
                4
            }
            Self::F32(number) => {
                out.extend(number.to_le_bytes());
                6
            }
            Self::Text(value) => {
                text(&mut out, value);
                8
            }
            Self::Texts(values) => {
                array(8, values.len());
                for value in values {
                    text(&mut out, value);
                }
                9
            }
            Self::I32s(values) => {
                array(5, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                9
            }
            Self::F32s(values) => {
                array(6, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                9
            }
            Self::Raw(kind, bytes) => {
                out.extend(bytes);
                *kind
            }
        };
        (kind, out)
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}
