//! Caches whose heads let rows go while tokens are generated, held against a dense pass whose masks evolve.

use std::ops::Range;

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary};
use adaptive_kvcache::checkpoint::WeightDtype;
use adaptive_kvcache::model::Llama;
use candle_core::IndexOp;
use candle_core::quantized::GgmlDType;

use super::dense::{Layer, forward};
use super::fixture::Fixture;
use super::{adaptive, candle_on_cpu, max_difference};

/// Between two orders of the same f32 additions.
const TOLERANCE: f32 = 1e-4;

/// A prompt and what was kept of it; tokens up to the next turn's prompt were decoded.
pub struct Turn {
    pub prompt: Range<usize>,
    pub layers: Vec<LayerSummary>,
}

/// Given a layer's index, all turns, the layer's numbers, and `[kv_heads]` of `[len, len]` to set to whether a row sees a
/// column: what each head holds after each token, `[kv_heads]` of `[len]`, settled positions first, each part ascending.
pub type Simulate<'a> = dyn FnMut(usize, &[Turn], &Layer, &mut [Vec<bool>]) -> Vec<Vec<Vec<usize>>> + 'a;

type Decode = fn(&Llama, u32, &mut AdaptiveKvCache) -> adaptive_kvcache::Result<Vec<f32>>;

/// Two prompts and what is decoded after each, under a configuration, in each way to decode. Kept positions are compared
/// after each token, and so are logits.
pub fn check(name: &str, config: &str, simulate: &mut Simulate<'_>) {
    let fixture = Fixture::read(name);
    let kernels = fixture.load(GgmlDType::F32, WeightDtype::Auto);
    let candle = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
    let ways: [(&str, _, Decode); 3] = [
        ("team", &kernels, Llama::decode),
        ("plain", &kernels, Llama::decode_plain),
        ("candle", &candle, Llama::decode),
    ];
    for (way, loaded, decode) in ways {
        let retention = adaptive(&loaded.tokenizer, config);
        let cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
        check_way(&fixture, &loaded.model, cache, simulate, decode, &format!("{name}, {way}, {config}"));
    }
}

fn check_way(
    fixture: &Fixture,
    model: &Llama,
    new_cache: AdaptiveKvCache,
    simulate: &mut Simulate<'_>,
    decode: Decode,
    what: &str,
) {
    let mut cache = new_cache;
    let (mut all, mut turns, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    for (len, decoded) in [(50_u32, 40_u32), (9, 25)] {
        let prompt: Vec<u32> = (0..len).map(|index| 17 + (index * 37 + len * 7) % 900).collect();
        let start = all.len();
        all.extend(&prompt);
        let prefill = model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        turns.push(Turn { prompt: start..all.len(), layers: prefill.layers });
        outputs.push((all.len() - 1, positions(&cache), prefill.logits));
        for step in 0..decoded {
            let id = (step * 53 + len) % 900;
            all.push(id);
            let logits = decode(model, id, &mut cache).unwrap();
            outputs.push((all.len() - 1, positions(&cache), logits));
        }
    }
    let (kv_heads, len) = (fixture.size("num_key_value_heads"), all.len());
    let mut held = Vec::new();
    let mut visible = |layer: usize, numbers: &Layer| {
        let mut visible = vec![vec![false; len * len]; kv_heads];
        held.push(simulate(layer, &turns, numbers, &mut visible));
        visible
    };
    let (_, expected) = forward(fixture, &all, &mut visible);
    let mut evictions = 0;
    for (row, now, logits) in outputs {
        let is_decoded = turns.iter().all(|turn| turn.prompt.end != row + 1);
        for (layer, heads) in now.iter().enumerate() {
            for (kv_head, positions) in heads.iter().enumerate() {
                let head = &held[layer][kv_head];
                assert_eq!(positions, &head[row], "{what}, row {row}, layer {layer}, KV head {kv_head}");
                evictions += usize::from(is_decoded && head[row].len() <= head[row - 1].len());
            }
        }
        let expected: Vec<f32> = expected.i(row).unwrap().to_vec1().unwrap();
        let difference = max_difference(&logits, &expected);
        assert!(difference < TOLERANCE, "{what}, row {row}: {difference}");
    }
    assert!(evictions > 0, "{what}");
}

/// `[layers]` of `[kv_heads]` of positions, ascending.
fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<Vec<usize>>> {
    let sorted = |head: &Vec<u32>| {
        let mut head: Vec<usize> = head.iter().map(|&position| position as usize).collect();
        head.sort_unstable();
        head
    };
    cache.ledgers().iter().map(|ledger| ledger.positions().iter().map(sorted).collect()).collect()
}
