//! The slow obvious forward pass of a fixture, with all numbers that attention is made of.

use candle_core::{D, Device, IndexOp, Tensor};

use super::fixture::Fixture;

/// One layer's numbers over a whole sequence.
pub struct Layer {
    /// `[heads]` of `[len, len]` scores before the softmax, hidden ones included.
    pub scores: Vec<Vec<f32>>,
    /// `[heads]` of `[len]` rotated queries.
    pub queries: Vec<Vec<Vec<f32>>>,
    /// `[kv_heads]` of `[len]` rotated keys.
    pub keys: Vec<Vec<Vec<f32>>>,
    /// `[len]` lengths of what attention reads.
    pub input_lengths: Vec<f64>,
    /// `[heads]` of `[len]` lengths of values behind the head's part of the output projection.
    pub output_lengths: Vec<Vec<f64>>,
}

/// Given a layer, `[kv_heads]` of `[len, len]`: whether a row sees a column.
pub type Visible<'a> = dyn FnMut(usize, &Layer) -> Vec<Vec<bool>> + 'a;

/// All layers, and the logits `[len, vocab_size]`.
pub fn forward(fixture: &Fixture, ids: &[u32], visible: &mut Visible<'_>) -> (Vec<Layer>, Tensor) {
    let (heads, kv_heads) = (fixture.size("num_attention_heads"), fixture.size("num_key_value_heads"));
    let (dim, len, group) = (fixture.size("head_dim"), ids.len(), heads / kv_heads);
    let weight = |name: &str| fixture.weights[name].clone();
    let norm = |x: &Tensor, name: &str| {
        let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
        let eps = fixture.config["rms_norm_eps"].as_f64().unwrap();
        let scaled = x.broadcast_div(&(mean + eps).unwrap().sqrt().unwrap()).unwrap();
        scaled.broadcast_mul(&weight(name)).unwrap()
    };
    let linear = |x: &Tensor, name: &str| x.matmul(&weight(name).t().unwrap()).unwrap();
    let (cos, sin) = fixture.angles(len);
    let by_heads = |x: Tensor, heads: usize| {
        x.reshape((1, len, heads, dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
    };
    let rotate =
        |x: Tensor, heads| candle_nn::rotary_emb::rope(&by_heads(x, heads), &cos, &sin).unwrap().squeeze(0).unwrap();
    let lengths = |x: &Tensor| -> Vec<f64> {
        let rows: Vec<Vec<f32>> = x.to_vec2().unwrap();
        rows.iter().map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()).collect()
    };
    let ids = Tensor::new(ids, &Device::Cpu).unwrap();
    let mut x = weight("model.embed_tokens.weight").index_select(&ids, 0).unwrap();
    let mut layers = Vec::new();
    for layer in 0..fixture.size("num_hidden_layers") {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let normed = norm(&x, &name("input_layernorm"));
        let q = rotate(linear(&normed, &name("self_attn.q_proj")), heads);
        let k = rotate(linear(&normed, &name("self_attn.k_proj")), kv_heads);
        let v = by_heads(linear(&normed, &name("self_attn.v_proj")), kv_heads).squeeze(0).unwrap();
        let project = weight(&name("self_attn.o_proj"));
        let mut numbers = Layer {
            scores: Vec::new(),
            queries: q.to_vec3().unwrap(),
            keys: k.to_vec3().unwrap(),
            input_lengths: lengths(&normed),
            output_lengths: Vec::new(),
        };
        let mut scores = Vec::new();
        for head in 0..heads {
            let (q, k, v) = (q.i(head).unwrap(), k.i(head / group).unwrap(), v.i(head / group).unwrap());
            let own = (q.matmul(&k.t().unwrap()).unwrap() * (1.0 / (dim as f64).sqrt())).unwrap();
            numbers.scores.push(own.flatten_all().unwrap().to_vec1().unwrap());
            scores.push(own);
            let part = project.narrow(1, head * dim, dim).unwrap().contiguous().unwrap();
            numbers.output_lengths.push(lengths(&v.matmul(&part.t().unwrap()).unwrap()));
        }
        let visible = visible(layer, &numbers);
        let attend = |(head, scores): (usize, Tensor)| {
            let mask = visible[head / group].iter().map(|&sees| if sees { 0.0_f32 } else { f32::NEG_INFINITY });
            let mask = Tensor::from_vec(mask.collect::<Vec<f32>>(), (len, len), &Device::Cpu).unwrap();
            let weights = candle_nn::ops::softmax(&(scores + mask).unwrap(), D::Minus1).unwrap();
            weights.matmul(&v.i(head / group).unwrap().contiguous().unwrap()).unwrap()
        };
        let outs: Vec<Tensor> = scores.into_iter().enumerate().map(attend).collect();
        layers.push(numbers);
        x = (x + linear(&Tensor::cat(&outs, 1).unwrap(), &name("self_attn.o_proj"))).unwrap();
        let normed = norm(&x, &name("post_attention_layernorm"));
        let gate = candle_nn::ops::silu(&linear(&normed, &name("mlp.gate_proj"))).unwrap();
        let up = linear(&normed, &name("mlp.up_proj"));
        x = (x + linear(&(gate * up).unwrap(), &name("mlp.down_proj"))).unwrap();
    }
    let tied = fixture.config["tie_word_embeddings"].as_bool().unwrap();
    let output = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let logits = linear(&norm(&x, "model.norm.weight"), output);
    (layers, logits)
}
