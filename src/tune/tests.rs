//! The search with made-up measurements.

use std::path::PathBuf;

use super::*;
use crate::compress::Budget;
use crate::compress::method_by_name;
use crate::eval::GivenBudget;

/// Bytes of all keys and values in f16; half as many in `q8_0`.
const FULL_BYTES: f64 = 2000.0;

/// What a made-up bench says of a setting in 0..=1: the kept ratio, and the divergence.
type Model = fn(&Candidate, f64) -> (f64, f64);

struct MadeUp {
    model: Model,
    points: Vec<Point>,
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn row(candidate: &Candidate, budget: Option<Budget>, (kept_ratio, kl): (f64, f64)) -> FidelityRow {
    let share = if candidate.kv_dtype == KvDtype::F16 { 1.0 } else { 0.5 };
    let kv_bytes = (kept_ratio * FULL_BYTES * share).round() as usize;
    FidelityRow {
        config: candidate.name.clone(),
        kept_ratio,
        kv_bytes,
        end_kept_ratio: kept_ratio,
        end_kv_bytes: kv_bytes,
        evicted_rows: None,
        kl_mean: kl,
        kl_median: kl,
        kl_p99: kl,
        top1_agreement: 1.0,
        perplexity: 1.0,
        perplexity_full: 1.0,
        kv_dtype: candidate.kv_dtype.name(),
        full_kv_dtype: "f16",
        budget: budget.map(GivenBudget::from),
        windows: 2,
        prompt_tokens: 100,
        kl_std_error: None,
        kl_worst: kl * 4.0 / 3.0,
        text: None,
        // One window is twice as bad as the other.
        kl_by_window: vec![kl * 2.0 / 3.0, kl * 4.0 / 3.0],
        kept_ratio_by_window: vec![kept_ratio * 0.9, kept_ratio * 1.1],
        kv_bytes_by_window: vec![kv_bytes - kv_bytes / 10, kv_bytes + kv_bytes / 10],
        perplexity_by_position: Vec::new(),
        perplexity_full_by_position: Vec::new(),
        equal_tokens: None,
        greedy_tokens: 0,
        attention_error_by_layer: None,
        writing_kl_mean: None,
        writing_top1_agreement: None,
        writing: Vec::new(),
    }
}

impl Bench for MadeUp {
    fn measure(&mut self, candidate: &Candidate, config: &AdaptiveConfig) -> Result<FidelityRow> {
        let budget = config.budget();
        let value = match budget {
            Some(Budget::KeptRatio(ratio)) => ratio,
            Some(Budget::Bytes(_)) => panic!("a budget in bytes was left"),
            None => config.fastgen().unwrap().recovery_threshold,
        };
        Ok(row(candidate, budget, (self.model)(candidate, value)))
    }

    fn point(&mut self, point: Point) -> Result<()> {
        self.points.push(point);
        Ok(())
    }
}

fn candidate(text: &str, kv_dtype: KvDtype) -> Candidate {
    let config = AdaptiveConfig::parse(text, None).unwrap();
    Candidate { name: config.method_name().to_owned(), config, kv_dtype }
}

fn replay(kv_dtype: KvDtype) -> Candidate {
    candidate(r#"{"method": "replay", "kv_budget": "1MB"}"#, kv_dtype)
}

fn fastgen(kv_dtype: KvDtype) -> Candidate {
    candidate(r#"{"criterion": "mass", "t": 0.5}"#, kv_dtype)
}

/// What is kept is what was asked for; the divergence falls to 0 at 1, or with `q8_0` to 0.001.
fn smooth(candidate: &Candidate, value: f64) -> (f64, f64) {
    let rounding = if candidate.kv_dtype == KvDtype::F16 { 0.0 } else { 0.001 };
    // The search keeps more than a method does, and goes wrong sooner.
    let (kept, scale) = if candidate.name == "fastgen" { (value.sqrt(), 0.1) } else { (value, 0.05) };
    (kept, rounding + scale * (1.0 - value))
}

fn searched(candidates: &[Candidate], model: Model, goal: Goal) -> Vec<Point> {
    let mut bench = MadeUp { model, points: Vec::new() };
    search(candidates, goal, &mut bench).unwrap();
    bench.points
}

fn mean(limit: Limit) -> Goal {
    Goal { limit, judge: Judge::Mean }
}

/// Name, KV dtype and setting of the chosen point.
fn chosen(points: &[Point], goal: Goal) -> Option<(&str, &str, f64)> {
    let point = &points[best(points, goal)?];
    assert!(point.within_limit);
    let value = match point.row.budget.map(|given| given.budget) {
        Some(Budget::KeptRatio(ratio)) => ratio,
        _ => point.recovery_threshold().unwrap(),
    };
    Some((&point.row.config, point.row.kv_dtype, value))
}

#[test]
fn a_divergence_gives_the_smallest_cache_and_a_size_the_most_exact() {
    let both = [replay(KvDtype::F16), fastgen(KvDtype::F16)];
    for (limit, expected) in [
        // 0.05 * (1 - 0.6) = 0.02
        (Limit::MaxKl(0.02 + 1e-9), ("replay", "f16", 0.6)),
        (Limit::MaxBytes(600), ("replay", "f16", 0.3)),
        (Limit::MaxBytes(609), ("replay", "f16", 0.3)),
        (Limit::MaxKept(0.25), ("replay", "f16", 0.25)),
        // Nothing is given up that need not be.
        (Limit::MaxBytes(2000), ("replay", "f16", 1.0)),
        (Limit::MaxKept(1.0), ("replay", "f16", 1.0)),
        (Limit::MaxKl(7.0), ("replay", "f16", 0.0)),
    ] {
        let points = searched(&both, smooth, mean(limit));
        assert_eq!(chosen(&points, mean(limit)), Some(expected), "{limit:?}");
        assert!(points.len() <= 10 + 12, "{limit:?}: {}", points.len());
    }
}

#[test]
fn the_threshold_of_the_search_is_bisected_to_the_thousandth() {
    let goal = mean(Limit::MaxKept(0.5));
    let points = searched(&[fastgen(KvDtype::F16)], smooth, goal);
    // The square root of 0.25 is 0.5.
    assert_eq!(chosen(&points, goal), Some(("fastgen", "f16", 0.25)));
    assert!(points.iter().any(|point| point.recovery_threshold() == Some(0.251) && !point.within_limit));
}

#[test]
fn more_rows_of_smaller_numbers_win_where_they_are_smaller_or_more_exact() {
    let dtypes = [replay(KvDtype::F16), replay(KvDtype::Q8_0)];
    let goal = mean(Limit::MaxBytes(600));
    // 0.3 of f16 costs 0.035, 0.6 of q8_0 0.021.
    assert_eq!(chosen(&searched(&dtypes, smooth, goal), goal), Some(("replay", "q8_0", 0.6)));
    // Whatever q8_0 keeps, it diverges by 0.001.
    let goal = mean(Limit::MaxKl(0.0009));
    let points = searched(&dtypes, smooth, goal);
    assert_eq!(chosen(&points, goal), Some(("replay", "f16", 0.985)));
    assert_eq!(points.iter().filter(|point| point.row.kv_dtype == "q8_0").count(), 1);
}

#[test]
fn a_candidate_is_given_up_when_it_cannot_win() {
    let both = [replay(KvDtype::F16), fastgen(KvDtype::F16)];
    for (limit, expected) in [
        // Of the second, everything; then a setting that is larger than the first's, and not exact enough.
        (Limit::MaxKl(0.02 + 1e-9), vec![1.0, 0.5]),
        // Everything is too much, and exact; so is 0.5, and it diverges more than the first.
        (Limit::MaxBytes(600), vec![1.0, 0.5]),
    ] {
        let points = searched(&both, smooth, mean(limit));
        let tried: Vec<f64> = points.iter().filter_map(Point::recovery_threshold).collect();
        assert_eq!(tried, expected, "{limit:?}");
        // The other way round, the first is searched to the end.
        let points = searched(&[fastgen(KvDtype::F16), replay(KvDtype::F16)], smooth, mean(limit));
        assert!(points.iter().filter_map(Point::recovery_threshold).count() > 9, "{limit:?}");
        assert_eq!(points[best(&points, mean(limit)).unwrap()].row.config, "replay");
    }
}

#[test]
fn with_noise_the_best_of_what_was_measured_is_chosen() {
    /// Jumps up and down from step to step, by up to a third.
    fn noisy(candidate: &Candidate, value: f64) -> (f64, f64) {
        let (kept, kl) = smooth(candidate, value);
        (kept, kl * (1.0 + (value * 1234.5).sin() / 3.0))
    }
    for limit in (1..50).map(|step| f64::from(step) / 1000.0) {
        let goal = mean(Limit::MaxKl(limit));
        let points = searched(&[replay(KvDtype::F16)], noisy, goal);
        let index = best(&points, goal).unwrap();
        assert!(points[index].row.kl_mean <= limit);
        let smaller = |point: &&Point| point.row.kv_bytes < points[index].row.kv_bytes;
        assert!(points.iter().filter(smaller).all(|point| point.row.kl_mean > limit), "{limit}");
    }
    for bytes in (1..20).map(|step| step * 100) {
        let goal = mean(Limit::MaxBytes(bytes));
        let points = searched(&[replay(KvDtype::F16)], noisy, goal);
        let index = best(&points, goal).unwrap();
        assert!(points[index].row.kv_bytes <= bytes);
        let exacter = |point: &&Point| point.row.kl_mean < points[index].row.kl_mean;
        assert!(points.iter().filter(exacter).all(|point| point.row.kv_bytes > bytes), "{bytes}");
    }
}

#[test]
fn the_worst_window_keeps_to_a_stricter_limit() {
    let limit = Limit::MaxKl(0.02 + 1e-9);
    let worst = Goal { limit, judge: Judge::Worst };
    // Four thirds of 0.05 * (1 - 0.7) are 0.02.
    let points = searched(&[replay(KvDtype::F16)], smooth, worst);
    assert_eq!(chosen(&points, worst), Some(("replay", "f16", 0.7)));
    let bytes = Goal { limit: Limit::MaxBytes(660), judge: Judge::Worst };
    assert_eq!(chosen(&searched(&[replay(KvDtype::F16)], smooth, bytes), bytes), Some(("replay", "f16", 0.3)));
    let kept = Goal { limit: Limit::MaxKept(0.55), judge: Judge::Worst };
    assert_eq!(chosen(&searched(&[replay(KvDtype::F16)], smooth, kept), kept), Some(("replay", "f16", 0.5)));
}

#[test]
fn an_impossible_limit_has_no_best_point_but_a_closest() {
    fn at_least_a_tenth(candidate: &Candidate, value: f64) -> (f64, f64) {
        let (kept, kl) = smooth(candidate, value);
        (kept.max(0.1), kl + 0.01)
    }
    for (limit, closest_kept) in [(Limit::MaxKl(0.005), 1.0), (Limit::MaxBytes(199), 0.1), (Limit::MaxKept(0.05), 0.1)]
    {
        let points = searched(&[replay(KvDtype::F16)], at_least_a_tenth, mean(limit));
        assert_eq!(best(&points, mean(limit)), None, "{limit:?}");
        let index = closest(&points, mean(limit)).unwrap();
        assert_eq!(points[index].row.kept_ratio, closest_kept, "{limit:?}");
    }
    assert_eq!((best(&[], mean(Limit::MaxKl(1.0))), closest(&[], mean(Limit::MaxKl(1.0)))), (None, None));
}

#[test]
fn a_divergence_that_is_no_number_is_never_chosen() {
    for limit in [Limit::MaxKl(7.0), Limit::MaxBytes(600)] {
        let points = searched(&[replay(KvDtype::F16)], |_, value| (value, f64::NAN), mean(limit));
        assert_eq!(best(&points, mean(limit)), None);
    }
}

#[test]
fn what_keeps_everything_is_measured_once() {
    let full = candidate(r#"{"policies": ["full"]}"#, KvDtype::F16);
    let goal = mean(Limit::MaxKl(0.5));
    let points = searched(&[full], |_, _| (1.0, 0.0), goal);
    assert_eq!((points.len(), best(&points, goal), points[0].recovery_threshold()), (1, Some(0), None));
}

#[test]
fn files_say_what_was_chosen() {
    let goal = mean(Limit::MaxKept(0.5));
    let points = searched(&[replay(KvDtype::Q8_0), fastgen(KvDtype::F16)], smooth, goal);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let file = PathBuf::from("tuned.json");
    let index = best(&points, goal).unwrap();
    let curve = Curve::new(goal, &points, Some((index, &file)));
    curve.write_json(&path("a.json")).unwrap();
    curve.write_csv(&path("a.csv")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path("a.json")).unwrap()).unwrap();
    assert_eq!(json["limit"]["max_kept_ratio"], 0.5);
    assert_eq!(json["worst_window"], false);
    assert_eq!(json["chosen"]["kv_dtype"], "q8_0");
    assert_eq!(json["chosen"]["settings"]["kept_ratio"], 0.5);
    let rows = json["points"].as_array().unwrap();
    assert_eq!(rows.len(), points.len());
    assert_eq!(rows.iter().filter(|row| row["chosen"] == true).count(), 1);
    assert_eq!(rows[index]["chosen"], true);
    assert!(rows.iter().all(|row| row["recovery_threshold"].is_null() == (row["config"] == "replay")));
    let csv = std::fs::read_to_string(path("a.csv")).unwrap();
    assert_eq!(csv.lines().count(), points.len() + 1);
    assert!(csv.lines().next().unwrap().ends_with("recovery_threshold,within_limit,chosen"), "{csv}");

    write_config(&path("c.json"), &points[index].config).unwrap();
    assert_eq!(AdaptiveConfig::from_file(path("c.json")).unwrap(), points[index].config);
    assert!(method_by_name("replay").is_some());
}
