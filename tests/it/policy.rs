//! The contract that every policy and every method of the registries keeps, and what each policy in particular keeps.

#![allow(clippy::cast_precision_loss)] // prompt lengths of tests fit any float

use std::collections::BTreeSet;
use std::sync::Arc;

use adaptive_kvcache::compress::budget::allocation::top_positions;
use adaptive_kvcache::compress::budget::methods::{
    AttentionRows, LastRowsFacts, LayerBudget, Outputs, QueryMoments, RepeatFacts, ReplayFacts,
};
use adaptive_kvcache::compress::fastgen::policies::{HeadFacts, by_name};
use adaptive_kvcache::compress::{
    AdaptiveConfig, Allocation, FastGen, METHODS, Method, MethodFacts, POLICIES, Policy, method_by_name, ratio_count,
};
use adaptive_kvcache::tokens::TokenClass;
use proptest::prelude::*;

/// What a policy is asked about: owned, so that proptest can make it.
#[derive(Debug, Clone)]
struct Case {
    positions: Vec<u32>,
    classes: Vec<TokenClass>,
    column_sums: Vec<f32>,
    settings: FastGen,
    /// What earlier policies kept.
    keep: Vec<bool>,
}

impl Case {
    fn empty() -> Self {
        Self {
            positions: Vec::new(),
            classes: Vec::new(),
            column_sums: Vec::new(),
            settings: FastGen { frequency_ratio: 0.5, locality_ratio: 0.5, ..FastGen::default() },
            keep: Vec::new(),
        }
    }

    fn facts(&self) -> HeadFacts<'_> {
        HeadFacts {
            first_position: 0,
            segment_len: self.classes.len(),
            positions: &self.positions,
            classes: &self.classes,
            column_sums: &self.column_sums,
        }
    }

    fn marked(&self, policy: &dyn Policy, keep: &[bool]) -> Vec<bool> {
        let mut keep = keep.to_vec();
        policy.mark(&self.facts(), &self.settings, &mut keep);
        keep
    }

    /// What the policy keeps by itself.
    fn alone(&self, policy: &dyn Policy) -> Vec<bool> {
        self.marked(policy, &vec![false; self.classes.len()])
    }
}

/// Ratios, with both ends often.
fn ratio() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1.0), Just(0.3), 0.0..=1.0]
}

prop_compose! {
    fn case()(len in 0_usize..60)(
        special in proptest::collection::vec(proptest::bool::weighted(0.1), len),
        punctuation in proptest::collection::vec(proptest::bool::weighted(0.2), len),
        // Few different sums, so that ties are common.
        sums in proptest::collection::vec(0_u8..6, len),
        keep in proptest::collection::vec(any::<bool>(), len),
        frequency_ratio in ratio(),
        locality_ratio in ratio(),
        sink_tokens in 0_usize..70,
    ) -> Case {
        let classes = special.iter().zip(&punctuation);
        Case {
            positions: (0..special.len() as u32).collect(),
            classes: classes.map(|(&special, &punctuation)| TokenClass { special, punctuation }).collect(),
            column_sums: sums.into_iter().map(f32::from).collect(),
            settings: FastGen { frequency_ratio, locality_ratio, sink_tokens, ..FastGen::default() },
            keep,
        }
    }
}

fn count(keep: &[bool]) -> usize {
    keep.iter().filter(|keep| **keep).count()
}

fn union(a: &[bool], b: &[bool]) -> Vec<bool> {
    a.iter().zip(b).map(|(a, b)| a | b).collect()
}

fn policy(name: &str) -> &'static dyn Policy {
    by_name(name).unwrap()
}

/// The definition of `frequency`, by sorting: largest sum first, of equal ones the lower position.
fn heavy_hitters(sums: &[f32], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..sums.len()).collect();
    order.sort_by(|&a, &b| sums[b].partial_cmp(&sums[a]).unwrap().then(a.cmp(&b)));
    let kept: BTreeSet<usize> = order.into_iter().take(count).collect();
    (0..sums.len()).map(|position| kept.contains(&position)).collect()
}

/// What a method is asked about, for each KV head of a layer.
#[derive(Debug, Clone)]
struct MethodCase {
    len: usize,
    num_rows: usize,
    first_position: usize,
    budget: usize,
    heads: Vec<HeadNumbers>,
    /// Values for keys that methods may have.
    settings: Vec<(&'static str, u64)>,
}

#[derive(Debug, Clone)]
struct HeadNumbers {
    attention: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<QueryMoments>,
    /// Of the last rows, two query heads each.
    last_queries: Vec<Vec<f32>>,
    /// Shares of 1 that a row gives to each position, before it is divided by their sum and what was settled before.
    row: Vec<f32>,
    mean_scores: Vec<f32>,
}

const METHOD_HEADS: usize = 3;
const HEAD_DIM: usize = 2;

/// Small whole numbers, so that ties are common.
fn numbers(count: usize, range: std::ops::Range<i8>) -> impl Strategy<Value = Vec<f32>> {
    proptest::collection::vec(range.prop_map(f32::from), count)
}

prop_compose! {
    fn head_numbers(len: usize)(
        attention in numbers(len, 0..6),
        keys in numbers(len * HEAD_DIM, -2..3),
        values in numbers(len * HEAD_DIM, -2..3),
        mean in numbers(HEAD_DIM, -2..3),
        variances in numbers(HEAD_DIM, 0..3),
        last_queries in proptest::collection::vec(numbers(2 * HEAD_DIM, -2..3), 1..4),
        row in numbers(len, 0..3),
        mean_scores in numbers(9, -2..3),
    ) -> HeadNumbers {
        let covariance = vec![variances[0], 0.0, 0.0, variances[1]];
        let queries = vec![QueryMoments { mean, covariance }];
        HeadNumbers { attention, keys, values, queries, last_queries, row, mean_scores }
    }
}

prop_compose! {
    fn method_case()(len in 1_usize..60)(
        len in Just(len),
        num_rows in 1..=len,
        first_position in prop_oneof![Just(0_usize), 0_usize..20],
        budget in 1..=len,
        heads in proptest::collection::vec(head_numbers(len), METHOD_HEADS),
        sink_tokens in 0_u64..8,
        observation_window in 1_u64..20,
        half_kernel in 0_u64..4,
        seed in any::<u64>(),
    ) -> MethodCase {
        let settings = vec![
            ("sink_tokens", sink_tokens),
            ("observation_window", observation_window),
            ("pool_kernel", 2 * half_kernel + 1),
            ("seed", seed),
            ("recent_tokens", 7 - sink_tokens),
        ];
        MethodCase { len, num_rows, first_position, budget, heads, settings }
    }
}

impl MethodCase {
    /// Every method of the registry, with these settings.
    fn methods(&self) -> Vec<Arc<dyn Method>> {
        METHODS.iter().map(|method| self.with_settings(*method)).collect()
    }

    fn with_settings(&self, method: &dyn Method) -> Arc<dyn Method> {
        let own = self.settings.iter().filter(|(key, _)| method.keys().contains(key));
        let mut config: serde_json::Map<_, _> = own.map(|&(key, value)| (key.to_owned(), value.into())).collect();
        config.insert("method".to_owned(), method.name().into());
        let config = AdaptiveConfig::parse(&serde_json::Value::from(config).to_string(), None).unwrap();
        Arc::clone(&config.budgeted().unwrap().method)
    }

    /// Scores of every head; what the method does not ask for is not given.
    fn scores(&self, method: &dyn Method) -> Vec<Vec<f32>> {
        let budget = LayerBudget {
            positions: self.budget,
            kept_ratio: self.budget as f64 / self.len as f64,
            allocation: method.allocation(),
        };
        method.layer_scores(&budget, self.of_heads(method, |facts| method.measures(facts)))
    }

    /// What a method says of every head, of the facts that it asks for.
    fn of_heads<T>(&self, method: &dyn Method, ask: impl Fn(&MethodFacts<'_>) -> T) -> Vec<T> {
        let needs = method.needs();
        let score = |(head_idx, head): (usize, &HeadNumbers)| {
            let rows = |rows: &'static str| match rows {
                _ if !needs.keys_and_values => &[][..],
                "keys" => &head.keys,
                _ => &head.values,
            };
            let (attention, outputs) = ([head.attention.clone()], [head.attention.iter().rev().copied().collect()]);
            let count = needs.last_rows.min(self.num_rows);
            let sum = head.row.iter().sum::<f32>() + 1.0;
            let row: Vec<f32> = head.row.iter().map(|share| share / sum).collect();
            let (weights, made) = ([row.repeat(count)], [vec![0.5; count * HEAD_DIM]]);
            let last_rows = LastRowsFacts { weights: &weights, outputs: &made };
            let mean_scores = [head.mean_scores.clone()];
            let replay =
                ReplayFacts { squared_attention: &attention, squared_outputs: &outputs, squared_residual: 0.5 };
            let repeat = RepeatFacts { largest_weights: &attention, squared_outputs: &outputs };
            let facts = MethodFacts {
                first_position: self.first_position,
                len: self.len,
                num_rows: self.num_rows,
                budget: self.budget,
                head_idx,
                head_dim: HEAD_DIM,
                attention: if needs.attention == AttentionRows::None { &[] } else { &head.attention },
                keys: rows("keys"),
                values: rows("values"),
                queries: if needs.future_queries.is_none() { &[] } else { &head.queries },
                last_queries: if needs.last_queries == 0 { &[] } else { &head.last_queries },
                replay: if needs.replay { replay } else { ReplayFacts::default() },
                repeat: if needs.repetition.is_some() { repeat } else { RepeatFacts::default() },
                group_size: 1,
                unrotated_keys: if needs.unrotated_keys { &head.keys } else { &[] },
                last_rows: if needs.last_rows > 0 { last_rows } else { LastRowsFacts::default() },
                outputs: if needs.outputs == Outputs::None { &[] } else { &outputs },
                block_attention: if needs.block_attention.is_none() { &[] } else { &head.attention },
                mean_scores: if needs.mean_distances > 0 { &mean_scores } else { &[] },
            };
            ask(&facts)
        };
        self.heads.iter().enumerate().map(score).collect()
    }

    fn kept(&self, method: &dyn Method) -> Vec<Vec<usize>> {
        method.allocation().select(&self.scores(method), self.budget)
    }
}

/// The definition of the best scores, by sorting: of equal ones the lower position.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap().then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn methods_score_every_position_and_keep_exactly_their_budget(case in method_case()) {
        for method in case.methods() {
            let (scores, kept) = (case.scores(&*method), case.kept(&*method));
            for (scores, kept) in scores.iter().zip(&kept) {
                prop_assert_eq!(scores.len(), case.len, "{}", method.name());
                prop_assert!(scores.iter().all(|score| !score.is_nan()), "{}", method.name());
                prop_assert!(kept.is_sorted_by(|a, b| a < b), "{}", method.name());
                prop_assert!(kept.iter().all(|&position| position < case.len), "{}", method.name());
            }
            let total: usize = kept.iter().map(Vec::len).sum();
            prop_assert_eq!(total, METHOD_HEADS * case.budget, "{}", method.name());
        }
    }

    #[test]
    fn a_heads_scores_are_those_of_a_layer_that_it_is_alone_in(mut case in method_case()) {
        case.heads.truncate(1);
        for method in case.methods() {
            let alone = case.of_heads(&*method, |facts| method.scores(facts));
            prop_assert_eq!(alone, case.scores(&*method), "{}", method.name());
        }
    }

    #[test]
    fn methods_keep_the_best_scores_and_the_lower_position_of_ties(case in method_case()) {
        for method in case.methods() {
            let (scores, kept) = (case.scores(&*method), case.kept(&*method));
            for (scores, kept) in scores.iter().zip(&kept) {
                prop_assert_eq!(kept, &best(scores, kept.len()), "{}", method.name());
                prop_assert_eq!(kept, &top_positions(scores, kept.len()), "{}", method.name());
            }
            if !matches!(method.allocation(), Allocation::Adaptive { .. } | Allocation::Pooled) {
                prop_assert!(kept.iter().all(|kept| kept.len() == case.budget), "{}", method.name());
            }
        }
    }

    #[test]
    fn a_safeguard_is_kept_and_the_rest_goes_to_the_best_of_all(case in method_case()) {
        let method = case.with_settings(method_by_name("adakv").unwrap());
        let (scores, kept) = (case.scores(&*method), case.kept(&*method));
        let safe = ratio_count(0.2, case.budget);
        prop_assert!(kept.iter().all(|kept| kept.len() >= safe));
        let kept_at = |head: usize, position: usize| kept[head].binary_search(&position).is_ok();
        let all = || (0..METHOD_HEADS).flat_map(|head| (0..case.len).map(move |position| (head, position)));
        let best_lost = all().filter(|&(head, position)| !kept_at(head, position)).map(|(h, p)| scores[h][p]);
        let best_lost = best_lost.fold(f32::NEG_INFINITY, f32::max);
        for (head, position) in all().filter(|&(head, position)| kept_at(head, position)) {
            let is_safe = best(&scores[head], safe).binary_search(&position).is_ok();
            prop_assert!(is_safe || scores[head][position] >= best_lost);
        }
    }

    #[test]
    fn marks_only_add_and_do_not_depend_on_what_is_kept_already(case in case()) {
        for &policy in POLICIES {
            let marked = case.marked(policy, &case.keep);
            prop_assert_eq!(&marked, &union(&case.keep, &case.alone(policy)), "{}", policy.name());
        }
    }

    #[test]
    fn marking_twice_is_marking_once(case in case()) {
        for &policy in POLICIES {
            let once = case.marked(policy, &case.keep);
            prop_assert_eq!(&case.marked(policy, &once), &once, "{}", policy.name());
        }
    }

    #[test]
    fn only_policies_that_say_so_read_column_sums(case in case()) {
        let blind = Case { column_sums: Vec::new(), ..case.clone() };
        for &policy in POLICIES.iter().filter(|policy| !policy.needs_column_sums()) {
            prop_assert_eq!(case.alone(policy), blind.alone(policy), "{}", policy.name());
        }
    }

    #[test]
    fn a_window_is_as_wide_as_what_is_kept_in_the_end(case in case()) {
        for &policy in POLICIES {
            if let Some(width) = policy.window(case.classes.len(), &case.settings) {
                let keep = case.alone(policy);
                prop_assert_eq!(count(&keep), width, "{}", policy.name());
                prop_assert!(keep.iter().rev().take(width).all(|keep| *keep), "{}", policy.name());
            }
        }
    }

    #[test]
    fn a_policy_that_says_it_keeps_all_does(case in case()) {
        for &policy in POLICIES.iter().filter(|policy| policy.keeps_all()) {
            prop_assert!(case.alone(policy).iter().all(|keep| *keep), "{}", policy.name());
        }
    }

    #[test]
    fn special_keeps_special_tokens_and_the_sink(case in case()) {
        for (position, keep) in case.alone(policy("special")).into_iter().enumerate() {
            prop_assert_eq!(keep, case.classes[position].special || position < case.settings.sink_tokens);
        }
    }

    #[test]
    fn punctuation_keeps_punctuation(case in case()) {
        let expected: Vec<bool> = case.classes.iter().map(|class| class.punctuation).collect();
        prop_assert_eq!(case.alone(policy("punctuation")), expected);
    }

    #[test]
    fn frequency_keeps_its_share_of_heavy_hitters_and_the_lower_of_ties(case in case()) {
        let share = ratio_count(case.settings.frequency_ratio, case.classes.len());
        let keep = case.alone(policy("frequency"));
        prop_assert_eq!(count(&keep), share);
        prop_assert_eq!(keep, heavy_hitters(&case.column_sums, share));
    }

    #[test]
    fn locality_keeps_the_last_share(case in case()) {
        let len = case.classes.len();
        let share = ratio_count(case.settings.locality_ratio, len);
        let expected: Vec<bool> = (0..len).map(|position| position + share >= len).collect();
        prop_assert_eq!(case.alone(policy("locality")), expected);
    }

    #[test]
    fn a_ratio_of_k_in_n_stands_for_k(len in 1_usize..200_000, part in 0.0..=1.0_f64) {
        let k = ratio_count(part, len);
        prop_assert!(k <= len);
        prop_assert_eq!(ratio_count(k as f64 / len as f64, len), k);
    }
}

#[test]
fn ratios_that_floats_cannot_hold_stand_for_the_number_that_is_meant() {
    for (ratio, len, expected) in [
        (0.3, 10, 3),
        (0.29, 100, 29), // 28.999999999999996
        (0.57, 100, 57), // 56.99999999999999
        (0.7, 10, 7),
        (0.1, 30, 3),
        (0.8, 18, 14), // 14.4: the original's published run
        (0.4, 18, 7),
        (0.2, 18, 3),
        (0.999, 10, 9),
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.5, 1, 0),
        (0.0, 0, 0),
        (1.0, 0, 0),
    ] {
        assert_eq!(ratio_count(ratio, len), expected, "{ratio} of {len}");
    }
}

#[test]
fn of_equal_sums_the_lower_positions_are_kept() {
    let case = Case {
        positions: (0..8).collect(),
        classes: vec![TokenClass::default(); 8],
        column_sums: vec![1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 2.0, 1.0],
        settings: FastGen { frequency_ratio: 0.375, ..FastGen::default() },
        keep: Vec::new(),
    };
    assert_eq!(case.alone(policy("frequency")), [false, true, false, true, false, true, false, false]);
}

#[test]
fn an_empty_prompt_is_no_trouble() {
    let settings = FastGen { frequency_ratio: 1.0, locality_ratio: 1.0, ..FastGen::default() };
    for policy in POLICIES {
        policy.mark(&Case::empty().facts(), &settings, &mut []);
        assert!(policy.window(0, &settings).is_none_or(|width| width == 0), "{}", policy.name());
    }
}

#[test]
fn the_registry_is_in_the_default_search_order_and_ends_in_full() {
    let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name()).collect();
    assert_eq!(names, ["special", "punctuation", "frequency", "locality", "full"]);
    assert_eq!(POLICIES.iter().position(|policy| policy.keeps_all()), Some(POLICIES.len() - 1));
    for policy in POLICIES {
        assert_eq!(by_name(policy.name()).unwrap().name(), policy.name());
        assert!(!policy.summary().is_empty() && !policy.summary().contains('\n'), "{}", policy.name());
    }
    assert!(by_name("Full").is_none());
}

#[test]
fn the_registry_of_methods_has_names_of_its_own() {
    let names: BTreeSet<&str> = METHODS.iter().map(|method| method.name()).collect();
    assert_eq!(names.len(), METHODS.len());
    assert!(METHODS.iter().all(|method| by_name(method.name()).is_none() && method.name() != "fastgen"));
    for method in METHODS {
        assert_eq!(method_by_name(method.name()).unwrap().name(), method.name());
        assert!(!method.summary().is_empty() && !method.summary().contains('\n'), "{}", method.name());
        // The registry's settings are those of a file that names the method only.
        let by_default = AdaptiveConfig::parse(&format!(r#"{{"method": "{}"}}"#, method.name()), None).unwrap();
        assert_eq!(by_default, AdaptiveConfig::for_method(*method));
        // Every key has a value that is not ignored.
        let settings = method.settings().unwrap();
        assert_eq!(settings.as_object().map_or(0, serde_json::Map::len), method.keys().len(), "{}", method.name());
    }
    assert!(method_by_name("SnapKV").is_none());
}
