//! What `eval` measures while a text is written, against one cache after the other that reads the same tokens one by one.

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::eval::{
    FidelityPlan, FidelityRow, FidelityText, Observer, Progress, Row, Subject, Variant, WritingPlan, fidelity, mean,
};
use adaptive_kvcache::fidelity::{kl_divergence, log_softmax, same_top1};
use adaptive_kvcache::generate::{Sampler, SamplingOptions};
use adaptive_kvcache::model::PrefillOptions;
use candle_core::quantized::GgmlDType;

use crate::support::adaptive;
use crate::support::fixture::Fixture;

/// Means of the same numbers, added up in another order.
const TOLERANCE: f64 = 1e-12;

const CONFIGS: [&str; 3] = [
    r#"{"method": "h2o", "decode": "evict", "kept_ratio": 0.3}"#,
    r#"{"method": "replay", "kept_ratio": 0.5}"#,
    r#"{"decode": "evict", "criterion": "mass", "frequency_ratio": 0.2, "locality_ratio": 0.2, "recovery_threshold": 0.4}"#,
];

const PROMPT: usize = 40;

#[derive(Default)]
struct Rows(Vec<FidelityRow>);

impl Progress for Rows {}

impl Observer for Rows {
    fn row(&mut self, index: usize, row: Row, _is_complete: bool) -> adaptive_kvcache::Result<()> {
        let Row::Fidelity(row) = row else { panic!("{row:?}") };
        self.0.truncate(index);
        self.0.push(row);
        Ok(())
    }
}

fn variants(loaded: &Loaded) -> Vec<Variant> {
    let adaptive = CONFIGS.iter().map(|config| adaptive(&loaded.tokenizer, config));
    let retentions = std::iter::once(Retention::Full).chain(adaptive);
    let variant = |(index, retention): (usize, Retention)| Variant {
        config: index.to_string(),
        budget: None,
        kv_dtype: KvDtype::F32,
        retention,
    };
    retentions.enumerate().map(variant).collect()
}

fn measured(loaded: &Loaded, ids: &[u32], windows: usize, writing: WritingPlan) -> Vec<FidelityRow> {
    let plan = FidelityPlan {
        prompt_tokens: PROMPT,
        score_tokens: 3,
        windows,
        offset_tokens: 0,
        greedy_tokens: 0,
        layer_error: false,
        writing,
    };
    let subject = Subject {
        model: &loaded.model,
        tokenizer: &loaded.tokenizer,
        prefill_options: PrefillOptions::default(),
        full_kv_dtype: KvDtype::F32,
    };
    let mut rows = Rows::default();
    let text = FidelityText { name: None, ids: ids.to_vec() };
    fidelity(&subject, &[text], &plan, &variants(loaded), &mut rows).unwrap();
    rows.0
}

fn read(loaded: &Loaded, prompt: &[u32], retention: Retention) -> (AdaptiveKvCache, Vec<f32>) {
    let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
    let logits = loaded.model.prefill(prompt, &mut cache, &mut ()).unwrap().logits;
    (cache, logits)
}

/// The text that the full cache writes, and the distributions behind its tokens.
fn written(loaded: &Loaded, prompt: &[u32], writing: WritingPlan) -> (Vec<u32>, Vec<Vec<f32>>) {
    let (mut cache, mut logits) = read(loaded, prompt, Retention::Full);
    let mut sampler = Sampler::new(writing.sampling, &[]);
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    for _ in 0..writing.tokens {
        for &id in loaded.tokenizer.eos_ids() {
            logits[id as usize] = f32::NEG_INFINITY;
        }
        ids.push(sampler.sample(&logits).unwrap());
        logits = loaded.model.decode(ids[ids.len() - 1], &mut cache).unwrap();
        logprobs.push(log_softmax(&logits));
    }
    (ids, logprobs)
}

#[test]
fn every_cache_is_measured_on_the_text_that_the_full_one_writes() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let ids: Vec<u32> = (0..2 * (PROMPT as u32 + 3)).map(|index| 17 + index * 37 % 900).collect();
    for temperature in [0.0, 1.0] {
        let writing = WritingPlan {
            tokens: 130,
            sampling: SamplingOptions { temperature, seed: 5, ..SamplingOptions::default() },
        };
        let rows = measured(&loaded, &ids, 1, writing);
        let prefix: Vec<u32> = loaded.tokenizer.bos_id().filter(|_| loaded.tokenizer.adds_bos()).into_iter().collect();
        let prompt = [&prefix[..], &ids[..PROMPT - prefix.len()]].concat();
        let (text, full) = written(&loaded, &prompt, writing);
        assert!(!text.iter().any(|id| loaded.tokenizer.eos_ids().contains(id)));
        for (row, variant) in rows.iter().zip(variants(&loaded)) {
            let (mut cache, _) = read(&loaded, &prompt, variant.retention);
            let (mut kl, mut same, mut ends) = (Vec::new(), Vec::new(), Vec::new());
            for (index, (&id, full)) in text.iter().zip(&full).enumerate() {
                let own = log_softmax(&loaded.model.decode(id, &mut cache).unwrap());
                kl.push(kl_divergence(full, &own));
                same.push(f64::from(u8::from(same_top1(full, &own))));
                if [99, 129].contains(&index) {
                    ends.push((cache.kept_ratio(), cache.bytes().kept));
                }
            }
            let near = |a: f64, b: f64| assert!((a - b).abs() < TOLERANCE, "{a} instead of {b}: {row:?}");
            near(row.writing_kl_mean.unwrap(), mean(&kl));
            near(row.writing_top1_agreement.unwrap(), mean(&same));
            let [first, second] = &row.writing[..] else { panic!("{row:?}") };
            assert_eq!((first.tokens, second.tokens), (100, 130));
            for (part, tokens, end) in [(first, 0..100, ends[0]), (second, 100..130, ends[1])] {
                near(part.kl_mean, mean(&kl[tokens.clone()]));
                near(part.top1_agreement, mean(&same[tokens]));
                assert_eq!((part.kept_ratio, part.kv_bytes), end);
            }
            let is_full = row.config == "0";
            assert_eq!(row.writing_kl_mean == Some(0.0), is_full, "{row:?}");
            assert_eq!(second.kept_ratio == 1.0, is_full);
        }
    }
}

/// What is read of the text itself is measured as if nothing were written.
#[test]
fn writing_changes_no_other_measurement() {
    let loaded = Fixture::read("mha").load(GgmlDType::F32, WeightDtype::Auto);
    let ids: Vec<u32> = (0..2 * (PROMPT as u32 + 3)).map(|index| 17 + index * 37 % 900).collect();
    let without = measured(&loaded, &ids, 2, WritingPlan::default());
    let sampling = SamplingOptions { temperature: 1.0, ..SamplingOptions::default() };
    let with = measured(&loaded, &ids, 2, WritingPlan { tokens: 7, sampling });
    assert_eq!(with.len(), 1 + CONFIGS.len());
    for (with, without) in with.into_iter().zip(without) {
        assert_eq!((with.writing.len(), without.writing.len()), (1, 0));
        assert!(without.writing_kl_mean.is_none() && without.writing_top1_agreement.is_none());
        let unwritten =
            FidelityRow { writing_kl_mean: None, writing_top1_agreement: None, writing: Vec::new(), ..with };
        assert_eq!(unwritten, without);
    }
}
