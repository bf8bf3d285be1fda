//! What it costs when one KV head alone loses what a method thinks least of: a profile of the model's heads.
//!
//! Not for: what follows from it (see [`HeadPrior`](crate::compress::HeadPrior)).

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::window::Reference;
use super::{FidelityPlan, FidelityText, place};
use crate::cache::{KvDtype, Retention};
use crate::compress::budget::methods::{ALWAYS, LayerBudget, MethodFacts, Needs, Settings};
use crate::compress::budget::select::keep_best;
use crate::compress::{
    AdaptiveConfig, Budget, BudgetOver, BudgetScale, BudgetedMethod, Compression, HeadCost, HeadProfile, Method, Pool,
    Section,
};
use crate::error::{Error, Result};
use crate::eval::metrics::mean;
use crate::eval::{Progress, Subject, Variant};

/// The share of all positions that is kept where heads are measured: each alone loses what it would lose then.
pub const PROFILE_RATIO: f64 = 1.0 / 16.0;

/// Numbers of the caches that are measured, as of the full one.
const DTYPE: KvDtype = KvDtype::F16;

/// Measures what it costs when each KV head alone loses what a method with one budget for all heads would take of it at
/// [`PROFILE_RATIO`], while all others keep everything: on every window, as many caches as there are heads.
///
/// * `texts`: at least one
///
/// # Errors
/// As [`fidelity`](super::fidelity); [`Error::Input`] for a method whose scores are below 0, so that they do not add up to
/// what is lost; [`Error::Unsupported`] for a prompt beyond a sliding window.
pub fn head_profile(
    subject: &Subject<'_>,
    texts: &[FidelityText],
    plan: &FidelityPlan,
    method: &Arc<dyn Method>,
    progress: &mut dyn Progress,
) -> Result<HeadProfile> {
    FidelityText::check_all(texts, plan, subject)?;
    let (num_layers, layout) = (subject.model.config().num_layers, subject.model.config().heads);
    let mut windows: Vec<Vec<(Loss, f64)>> = Vec::new();
    for (text_idx, text) in texts.iter().enumerate() {
        for window in 0..plan.windows {
            let place = place(texts, text_idx, plan, window);
            progress.starts(&format!("{place}, scores"));
            let (prompt, _) = plan.window(subject, &text.ids, window);
            let losses = losses(&scores(subject, &prompt, method, progress)?, layout.num_kv_heads, method.name())?;
            let variants = losses.iter().enumerate().map(|(head, loss)| variant(subject, method, head, loss));
            let variants: Vec<Variant> = variants.collect();
            let (_, scores) = Reference::measure(subject, (&text.ids, plan, window), &variants, &place, progress)?;
            windows.push(losses.into_iter().zip(scores.iter().map(|scores| mean(&scores.kl))).collect());
        }
    }
    let average = |number: &dyn Fn(&(Loss, f64)) -> f64, head: usize| {
        mean(&windows.iter().map(|heads| number(&heads[head])).collect::<Vec<_>>())
    };
    let heads = (0..num_layers * layout.num_kv_heads).map(|head| HeadCost {
        layer: head / layout.num_kv_heads,
        kv_head: head % layout.num_kv_heads,
        kept_ratio: average(&|(loss, _)| loss.kept_ratio, head),
        lost_score: average(&|(loss, _)| loss.lost_score, head),
        kl: average(&|(_, kl)| *kl, head),
    });
    Ok(HeadProfile {
        method: method.name().to_owned(),
        num_layers,
        num_kv_heads: layout.num_kv_heads,
        head_dim: layout.head_dim,
        windows: windows.len(),
        prompt_tokens: plan.prompt_tokens,
        score_tokens: plan.score_tokens,
        heads: heads.collect(),
    })
}

/// What a head loses of a prompt.
#[derive(Debug, Clone, Copy)]
struct Loss {
    /// Share of its own positions that it keeps.
    kept_ratio: f64,
    lost_score: f64,
    /// Share of the positions of all heads that is kept, if the others keep all of theirs.
    all_kept_ratio: f64,
}

/// The scores of a prompt, `[num_layers * num_kv_heads]` of `[n]`.
fn scores(
    subject: &Subject<'_>,
    prompt: &[u32],
    method: &Arc<dyn Method>,
    progress: &dyn Progress,
) -> Result<Vec<Vec<f32>>> {
    let seen = Arc::default();
    let probe = Probe { method: method.clone(), job: Job::Listen(Arc::clone(&seen)) };
    subject.fill(prompt, DTYPE, &retention(subject, probe, PROFILE_RATIO), progress)?;
    let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(seen)
}

/// What each head loses if the best scores of all are kept.
#[expect(clippy::cast_precision_loss)] // counts of tokens
fn losses(scores: &[Vec<f32>], num_kv_heads: usize, method: &str) -> Result<Vec<Loss>> {
    let len = scores.first().map_or(0, Vec::len);
    if scores.iter().any(|scores| scores.len() != len) {
        return Err(Error::unsupported("a profile of heads on prompts beyond a sliding window")
            .with_hint("lower --prompt-tokens"));
    }
    if scores.iter().flatten().any(|&score| score < 0.0) {
        return Err(Error::input(format!(
            "scores of the method `{method}` are below 0, and do not add up to what is lost"
        ))
        .with_hint("measure a method whose scores are sums or shares, such as `replay`"));
    }
    let all = scores.len() * len;
    let layers = 0..scores.len() / num_kv_heads.max(1);
    let scale = BudgetScale { num_layers: layers.len(), num_kv_heads, row_bytes: 1, head_bytes: 0 };
    let mut pool = Pool::new(Budget::KeptRatio(PROFILE_RATIO).total(len, scale), num_kv_heads);
    for layer in scores.chunks(num_kv_heads.max(1)) {
        let mut layer = layer.to_vec();
        for scores in &mut layer {
            keep_best(scores);
        }
        pool.add_layer(0, layer);
    }
    pool.trim();
    let kept = layers.flat_map(|layer| pool.choices(layer)).map(|choice| choice.positions);
    let loss = |(scores, kept): (&Vec<f32>, Vec<u32>)| {
        // Of a small budget even what is to be kept always can be lost; it has no score that could be added.
        let lost = (0..).zip(scores).filter(|(index, score)| score.is_finite() && kept.binary_search(index).is_err());
        let lost_score = lost.map(|(_, &score)| f64::from(score)).sum();
        let all_kept_ratio = (all - len + kept.len()) as f64 / all.max(1) as f64;
        Loss { kept_ratio: kept.len() as f64 / len.max(1) as f64, lost_score, all_kept_ratio }
    };
    Ok(scores.iter().zip(kept).map(loss).collect())
}

/// The cache of which one head alone loses something.
fn variant(subject: &Subject<'_>, method: &Arc<dyn Method>, head: usize, loss: &Loss) -> Variant {
    let probe = Probe { method: method.clone(), job: Job::Spare(head) };
    Variant {
        config: format!("{}, head {head}", method.name()),
        budget: None,
        kv_dtype: DTYPE,
        retention: retention(subject, probe, loss.all_kept_ratio),
    }
}

fn retention(subject: &Subject<'_>, probe: Probe, kept_ratio: f64) -> Retention {
    let (budget, over) = (Budget::KeptRatio(kept_ratio), BudgetOver::Pool);
    let method = BudgetedMethod { method: Arc::new(probe), budget, over, prior: None };
    let config = AdaptiveConfig { method: Compression::Budgeted(method), ..AdaptiveConfig::default() };
    Retention::Adaptive {
        classifier: subject.tokenizer.classifier(&config),
        words: subject.tokenizer.words_for(&config),
        config: Arc::new(config),
    }
}

/// A method, and what is done with its scores. It is no configuration's.
#[derive(Debug, Clone)]
struct Probe {
    method: Arc<dyn Method>,
    job: Job,
}

#[derive(Debug, Clone)]
enum Job {
    /// They are noted, `[heads]` of all layers so far.
    Listen(Arc<Mutex<Vec<Vec<f32>>>>),
    /// All heads but this one of the model keep everything.
    Spare(usize),
}

impl Settings for Probe {
    fn keys(&self) -> &'static [&'static str] {
        &[]
    }

    fn read(&self, _settings: &Section<'_>) -> serde_json::Result<Arc<dyn Method>> {
        Ok(self.to_arc())
    }

    fn settings(&self) -> serde_json::Result<Value> {
        self.method.settings()
    }

    fn to_arc(&self) -> Arc<dyn Method> {
        Arc::new(self.clone())
    }
}

impl Method for Probe {
    fn name(&self) -> &'static str {
        self.method.name()
    }

    fn summary(&self) -> &'static str {
        self.method.summary()
    }

    fn needs(&self) -> Needs {
        self.method.needs()
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        self.method.scores(facts)
    }

    /// Those of the method, and behind them the index of the head.
    #[expect(clippy::cast_precision_loss)] // models have no million heads
    fn measures(&self, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
        let mut measures = self.method.measures(facts);
        measures.push(vec![facts.head_idx as f32]);
        measures
    }

    fn layer_scores(&self, budget: &LayerBudget, mut measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        let heads: Vec<Option<Vec<f32>>> = measures.iter_mut().map(Vec::pop).collect();
        let mut scores = self.method.layer_scores(budget, measures);
        match &self.job {
            Job::Listen(seen) => seen.lock().unwrap_or_else(PoisonError::into_inner).extend(scores.iter().cloned()),
            #[expect(clippy::cast_precision_loss)] // as above
            Job::Spare(cut) => {
                let spared = scores.iter_mut().zip(heads).filter(|(_, head)| *head != Some(vec![*cut as f32]));
                spared.for_each(|(scores, _)| scores.fill(ALWAYS));
            }
        }
        scores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers with two heads each, of 8 positions: 2 of 32 are kept beside what each head keeps at least.
    fn scores() -> Vec<Vec<f32>> {
        let mut scores = vec![vec![1.0; 8]; 4];
        scores[0][3] = ALWAYS;
        scores[2][5] = 9.0;
        scores
    }

    #[test]
    fn heads_lose_what_one_budget_for_all_takes_from_them() {
        let losses = losses(&scores(), 2, "made up").unwrap();
        // A budget of 2 is raised to one position for each head.
        let lost: Vec<f64> = losses.iter().map(|loss| loss.lost_score).collect();
        assert_eq!(lost, [7.0, 7.0, 7.0, 7.0]);
        for loss in losses {
            assert_eq!((loss.kept_ratio, loss.all_kept_ratio), (1.0 / 8.0, 25.0 / 32.0));
        }
    }

    #[test]
    fn better_heads_lose_less() {
        let mut scores = vec![vec![1.0_f32; 64]; 2];
        scores[1][10..14].fill(5.0);
        // 8 of 128: the other head keeps its best, and one that is as good as all others.
        let losses = losses(&scores, 1, "made up").unwrap();
        let kept: Vec<f64> = losses.iter().map(|loss| 64.0 * loss.kept_ratio).collect();
        assert_eq!(kept.iter().sum::<f64>(), 8.0, "{kept:?}");
        assert!(kept[1] >= 4.0, "{kept:?}");
        assert_eq!(losses[1].lost_score, 64.0 - kept[1], "all of the best are kept");
    }

    #[test]
    fn scores_below_zero_and_windows_are_refused() {
        let mut negative = scores();
        negative[1][0] = -0.5;
        assert!(losses(&negative, 2, "made up").unwrap_err().to_string().contains("`made up` are below 0"));
        let mut short = scores();
        short[3].pop();
        assert!(losses(&short, 2, "made up").unwrap_err().to_string().contains("sliding window"));
    }
}
