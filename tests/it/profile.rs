//! The search against a naive one on explicit n x n maps in f64.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any float

use adaptive_kvcache::Error;
use adaptive_kvcache::compress::ratio_count;
use adaptive_kvcache::compress::stats::{HeadStats, MassRequest, UnscaledRows, row_difference};
use adaptive_kvcache::compress::{AdaptiveConfig, Criterion, GroupReduction, ProfileRows};
use adaptive_kvcache::compress::{FastGen, HeadChoice, LayerStats, Segment, StatsRequest};
use adaptive_kvcache::tokens::TokenClass;
use rand::Rng;
use rand::rngs::StdRng;

use crate::numbers::{assert_close, column_sums, largest_difference, seeded, softmax, widen};

/// Values are means and differences of weights in 0..=1, summed up in f32 over at most 100 rows.
const VALUE_TOLERANCE: f64 = 1e-5;

/// Cases that rounding decides are left out: a value so near the threshold, or two column sums so near each other where
/// `frequency` cuts, that f32 may see them the other way round. Ten times the error of a value or of a sum.
const DECISIVE: f64 = 1e-4;

/// Causal softmax of scores that make the kinds of heads that occur: a sink, heavy hitters (punctuation in half of the
/// heads), locality, and a part of noise. Rounded to f32, which is what the library is given.
fn random_map(rng: &mut StdRng, classes: &[TokenClass]) -> Vec<Vec<f64>> {
    let (sink, heavy, local, noise) = (
        rng.random_range(0.0..8.0),
        rng.random_range(0.0..5.0),
        rng.random_range(0.0..6.0),
        rng.random_range(0.1..3.0),
    );
    let len = classes.len();
    let hits_punctuation = rng.random_bool(0.5);
    let hitters: Vec<f64> = classes
        .iter()
        .map(|class| if hits_punctuation { class.punctuation } else { rng.random_bool(0.15) })
        .map(|hit| if hit { heavy } else { 0.0 })
        .collect();
    let mut score = |i: usize, j: usize| {
        let distance = (i - j) as f64;
        let first = if j == 0 { sink } else { 0.0 };
        first + hitters[j] + local * (-distance / 4.0).exp() + rng.random_range(-noise..noise)
    };
    (0..len)
        .map(|i| {
            let weights = softmax(&(0..=i).map(|j| score(i, j)).collect::<Vec<_>>());
            weights.into_iter().map(|weight| f64::from(weight as f32)).collect()
        })
        .collect()
}

fn random_classes(rng: &mut StdRng, len: usize) -> Vec<TokenClass> {
    (0..len).map(|_| TokenClass { special: rng.random_bool(0.05), punctuation: rng.random_bool(0.15) }).collect()
}

/// The search as SPEC writes it, on the maps themselves.
struct Naive<'a> {
    config: &'a FastGen,
    segment: Segment<'a>,
    /// Keys before the segment's, all of them kept.
    settled: usize,
    /// The maps of the query heads of one KV head: rows of the prompt, columns of settled keys and of the segment's.
    group: &'a [Vec<Vec<f64>>],
}

impl Naive<'_> {
    fn len(&self) -> usize {
        self.segment.len()
    }

    /// Column sums of the segment over all rows and over the query heads.
    fn group_sums(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.len()];
        for map in self.group {
            let columns = column_sums(map, |_, _| true);
            sums.iter_mut().zip(&columns[self.settled..]).for_each(|(sum, value)| *sum += value);
        }
        sums
    }

    /// Positions from most to least attention, and how many of them `frequency` keeps.
    fn heavy_hitters(&self) -> (Vec<usize>, usize) {
        let sums = self.group_sums();
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
        (order, ratio_count(self.config.frequency_ratio, self.len()))
    }

    fn window(&self) -> usize {
        ratio_count(self.config.locality_ratio, self.len())
    }

    /// What the union of policies keeps for good of the segment.
    fn keep(&self, policies: &[&str]) -> Vec<bool> {
        let (order, count) = self.heavy_hitters();
        let Segment { first_position, classes, .. } = self.segment;
        let rule = |policy: &str, index: usize| match policy {
            "special" => classes[index].special || first_position + index < self.config.sink_tokens,
            "punctuation" => classes[index].punctuation,
            "frequency" => order[..count].contains(&index),
            "locality" => index + self.window() >= self.len(),
            "full" => true,
            other => panic!("no rule for the policy `{other}`"),
        };
        (0..self.len()).map(|index| policies.iter().any(|policy| rule(policy, index))).collect()
    }

    /// The same for all keys.
    fn keep_with_settled(&self, policies: &[&str]) -> Vec<bool> {
        [vec![true; self.settled], self.keep(policies)].concat()
    }

    /// Mean over the profiled rows of the mass that the policies keep, `locality` as a sliding band.
    fn recovered_mass(&self, map: &[Vec<f64>], policies: &[&str]) -> f64 {
        let fixed: Vec<&str> = policies.iter().copied().filter(|policy| *policy != "locality").collect();
        let fixed = self.keep_with_settled(&fixed);
        let band = if policies.contains(&"locality") { self.window() } else { 0 };
        let first = match self.config.profile_rows {
            ProfileRows::All => 0,
            ProfileRows::Last(rows) => map.len().saturating_sub(rows),
        };
        let mut total = 0.0;
        for row in &map[first..] {
            let own = row.len() - 1;
            let kept = row.iter().enumerate().filter(|(j, _)| fixed[*j] || own - j < band);
            total += kept.map(|(_, weight)| weight).sum::<f64>();
        }
        total / (map.len() - first) as f64
    }

    fn value(&self, policies: &[&str]) -> f64 {
        match self.config.criterion {
            Criterion::MaxAbs => {
                let keep = self.keep_with_settled(policies);
                self.group.iter().map(|map| largest_difference(map, &keep)).fold(0.0, f64::max)
            }
            Criterion::Mass => {
                let masses = self.group.iter().map(|map| self.recovered_mass(map, policies));
                match self.config.gqa {
                    GroupReduction::Min => masses.fold(f64::INFINITY, f64::min),
                    GroupReduction::Mean => masses.sum::<f64>() / self.group.len() as f64,
                }
            }
        }
    }

    /// Level, values up to it, kept positions; `None` if rounding may decide otherwise.
    fn search(&self) -> Option<(usize, Vec<f64>, Vec<u32>)> {
        let names: Vec<&str> = self.config.policies.policies().iter().map(|policy| policy.name()).collect();
        let threshold = self.config.recovery_threshold;
        let mut values = Vec::new();
        for level in 0..names.len() {
            let policies = &names[..=level];
            if policies.contains(&"frequency") && !self.frequency_is_decisive() {
                return None;
            }
            let last = level + 1 == names.len();
            let value = match (last, self.config.criterion) {
                (true, Criterion::MaxAbs) => 0.0,
                (true, Criterion::Mass) => 1.0,
                (false, _) => self.value(policies),
            };
            values.push(value);
            let (recovered, margin) = match self.config.criterion {
                Criterion::MaxAbs => (value < 1.0 - threshold, (value - (1.0 - threshold)).abs()),
                Criterion::Mass => (value >= threshold, (value - threshold).abs()),
            };
            if !last && margin < DECISIVE {
                return None;
            }
            if recovered || last {
                let first = self.segment.first_position as u32;
                let positions = (first..).zip(self.keep(policies)).filter(|(_, keep)| *keep);
                return Some((level, values, positions.map(|(position, _)| position).collect()));
            }
        }
        unreachable!("the last level is always taken")
    }

    fn frequency_is_decisive(&self) -> bool {
        let sums = self.group_sums();
        let (order, count) = self.heavy_hitters();
        count == 0 || count == order.len() || sums[order[count - 1]] - sums[order[count]] > DECISIVE
    }
}

/// What the library chooses, its statistics fed from the maps; the second pass is naive too.
fn choose(config: &FastGen, segment: Segment<'_>, maps: &[Vec<Vec<f64>>], group_size: usize) -> Vec<HeadChoice> {
    let request = config.request(segment);
    let num_keys: Vec<usize> = maps.iter().map(|map| map.last().unwrap().len()).collect();
    let mut stats = LayerStats::new(request.clone(), num_keys.iter().copied());
    for (stats, map) in stats.heads.iter_mut().zip(maps) {
        for (row, weights) in map.iter().enumerate() {
            let weights: Vec<f32> = weights.iter().map(|&weight| weight as f32).collect();
            stats.add_row(&request, row, &weights);
        }
    }
    let mut passes = 0;
    let second_pass = |pending: &[(usize, Vec<Vec<f32>>)]| {
        passes += 1;
        let of_head = |(kv_head, masks): &(usize, Vec<Vec<f32>>)| {
            let group = &maps[kv_head * group_size..(kv_head + 1) * group_size];
            let of_mask = |mask: &Vec<f32>| {
                assert!(mask.len() == segment.len() && mask.iter().all(|number| [0.0, 1.0].contains(number)));
                let settled = num_keys[kv_head * group_size] - segment.len();
                let mut keep = vec![true; settled];
                keep.extend(mask.iter().map(|&number| number == 1.0));
                group.iter().map(|map| largest_difference(map, &keep)).fold(0.0, f64::max) as f32
            };
            masks.iter().map(of_mask).collect()
        };
        assert!(!pending.is_empty());
        Ok(pending.iter().map(of_head).collect())
    };
    let choices = config.choose(segment, maps.len() / group_size, &stats, second_pass).unwrap();
    assert!(passes <= usize::from(config.may_need_second_pass()), "{passes} second passes");
    choices
}

/// How many keys each KV head of a random layer has settled, and how many tokens were decoded since.
type Past = ([usize; NUM_KV_HEADS], usize);

const NOTHING: Past = ([0; NUM_KV_HEADS], 0);

/// Compares one random layer, and adds the levels of the heads that were compared to `levels`.
fn check_layer(config: &FastGen, (len, past): (usize, Past), group_size: usize, seed: u64, levels: &mut Vec<usize>) {
    let mut rng = seeded(seed);
    let (settled, recent) = past;
    let classes = random_classes(&mut rng, recent + len);
    // More was seen than is kept; nothing, if nothing is kept.
    let first_position = if settled == [0; NUM_KV_HEADS] { 0 } else { 100 };
    let segment = Segment { first_position, classes: &classes, recent };
    let mut maps = Vec::new();
    for settled in settled {
        for _ in 0..group_size {
            let all = [random_classes(&mut rng, settled), classes.clone()].concat();
            maps.push(random_map(&mut rng, &all).split_off(settled + recent));
        }
    }
    let choices = choose(config, segment, &maps, group_size);
    assert_eq!(choices.len(), NUM_KV_HEADS);
    for (kv_head, (choice, group)) in choices.iter().zip(maps.chunks(group_size)).enumerate() {
        let naive = Naive { config, segment, settled: settled[kv_head], group };
        let Some((level, values, positions)) = naive.search() else { continue };
        let case =
            format!("KV head {kv_head}, {len} tokens after {past:?}, groups of {group_size}, seed {seed}, {config:?}");
        assert_eq!((choice.kv_head, choice.level), (kv_head, level), "{case}: {choice:?}, expected {values:?}");
        assert_eq!(choice.recovered.len(), values.len(), "{case}");
        for (got, expected) in choice.recovered.iter().zip(&values) {
            let close = (got - expected).abs() <= VALUE_TOLERANCE;
            assert!(close, "{case}: {:?}, expected {values:?}", choice.recovered);
        }
        assert_eq!(choice.positions, positions, "{case}");
        levels.push(level);
    }
}

fn search(json: &str) -> FastGen {
    AdaptiveConfig::parse(json, None).unwrap().fastgen().unwrap().clone()
}

/// Compares many layers of one configuration; every level must occur, or the comparison means little.
fn check(json: &str, lens: &[usize], wanted_levels: &[usize]) {
    let mut levels = Vec::new();
    let mut possible = 0;
    for (frequency_ratio, locality_ratio) in [(0.3, 0.3), (0.8, 0.8), (0.1, 0.5), (0.5, 0.1)] {
        for threshold in [0.5, 0.8, 0.95] {
            let mut config = search(json);
            (config.frequency_ratio, config.locality_ratio) = (frequency_ratio, locality_ratio);
            config.recovery_threshold = threshold;
            for &len in lens {
                for group_size in [1, 3] {
                    let later = [([2, 0, 9], 0), ([0, 0, 0], 4), ([11, 30, 1], 6)];
                    let first = (0..LAYERS).map(|seed| (NOTHING, seed));
                    for (past, seed) in first.chain(later.map(|past| (past, 0))) {
                        possible += NUM_KV_HEADS;
                        check_layer(&config, (len, past), group_size, seed, &mut levels);
                    }
                }
            }
        }
    }
    assert!(levels.len() * 10 >= possible * 9, "only {} of {possible} heads were decisive: {json}", levels.len());
    for level in wanted_levels {
        assert!(levels.contains(level), "no head at level {level}: {json}");
    }
}

/// KV heads of a random layer.
const NUM_KV_HEADS: usize = 3;

/// Random layers of each shape.
const LAYERS: u64 = 3;

/// Lengths of random prompts.
const LENS: &[usize] = &[1, 2, 13, 40, 97];

#[test]
fn the_default_order_by_largest_difference() {
    check("{}", LENS, &[0, 1, 2, 3, 4]);
    check(r#"{"sink_tokens": 0}"#, LENS, &[1, 2, 3, 4]);
}

#[test]
fn the_default_order_by_recovered_mass() {
    check(r#"{"criterion": "mass"}"#, LENS, &[0, 1, 2, 3, 4]);
    check(r#"{"criterion": "mass", "sink_tokens": 4}"#, LENS, &[0, 1, 2, 3, 4]);
}

#[test]
fn the_mean_over_query_heads() {
    check(r#"{"criterion": "mass", "gqa": "mean"}"#, LENS, &[0, 1, 2, 3, 4]);
}

#[test]
fn an_observation_window() {
    for rows in [1, 8, 1000] {
        for gqa in ["min", "mean"] {
            check(&format!(r#"{{"criterion": "mass", "profile_rows": {rows}, "gqa": "{gqa}"}}"#), LENS, &[0, 2, 3, 4]);
        }
    }
}

#[test]
fn other_search_orders() {
    for (policies, wanted_levels) in [
        (r#"["locality", "full"]"#, &[0, 1][..]),
        (r#"["frequency", "special", "full"]"#, &[0, 1, 2]),
        (r#"["punctuation", "locality", "frequency", "full"]"#, &[0, 1, 2, 3]),
        (r#"["locality", "frequency", "punctuation", "special", "full"]"#, &[0, 1, 4]),
        (r#"["special", "locality", "full"]"#, &[0, 1, 2]),
        (r#"["frequency", "full"]"#, &[0, 1]),
        (r#"["full"]"#, &[0]),
    ] {
        for criterion in ["max_abs", "mass"] {
            check(&format!(r#"{{"criterion": "{criterion}", "policies": {policies}}}"#), LENS, wanted_levels);
        }
        let window = format!(r#"{{"criterion": "mass", "policies": {policies}, "profile_rows": 5}}"#);
        check(&window, LENS, &[]);
    }
}

/// With `max_abs`, locality is the prompt's last positions for every row; with `mass` it slides with the row.
#[test]
fn locality_slides_only_for_the_recovered_mass() {
    // Each token attends to itself alone: a band of one holds everything, the last position alone nearly nothing.
    let maps = vec![(0..10).map(|i| (0..=i).map(|j| if i == j { 1.0 } else { 0.0 }).collect()).collect()];
    let classes = vec![TokenClass::default(); 10];
    let config = |criterion: &str| {
        let json = r#"{"locality_ratio": 0.1, "policies": ["locality", "special", "full"], "criterion": "#;
        search(&format!("{json}\"{criterion}\"}}"))
    };
    let mass = &choose(&config("mass"), Segment::prompt(&classes), &maps, 1)[0];
    assert_eq!((mass.level, &mass.recovered[..], &mass.positions[..]), (0, &[1.0][..], &[9][..]));
    // Rows that keep no mass are skipped, so the last position alone recovers the head.
    let max_abs = &choose(&config("max_abs"), Segment::prompt(&classes), &maps, 1)[0];
    assert_eq!((max_abs.level, &max_abs.recovered[..], &max_abs.positions[..]), (0, &[0.0][..], &[9][..]));
}

#[test]
fn a_threshold_that_nothing_reaches_keeps_everything() {
    let json = r#"{"recovery_threshold": 1, "frequency_ratio": 0.5, "locality_ratio": 0.5}"#;
    let config = search(json);
    let mut rng = seeded(2);
    let classes = random_classes(&mut rng, 30);
    let maps = vec![random_map(&mut rng, &classes)];
    let choice = &choose(&config, Segment::prompt(&classes), &maps, 1)[0];
    assert_eq!((choice.level, choice.recovered.len(), choice.recovered[4]), (4, 5, 0.0));
    assert!(choice.positions.iter().copied().eq(0..30));
}

/// A difference is a difference of two shares: it cannot leave 0..=1, however little mass is kept.
#[test]
fn a_tiny_kept_mass_gives_no_infinite_difference() {
    for kept in [1e-10_f32, 1e-30, 1e-38, 2e-39, 1e-40] {
        // The one kept key takes all of the renormalised attention.
        let difference = row_difference(0, &[1.0, kept], &[0.0, 1.0]);
        assert!((difference - 1.0).abs() < 1e-6, "kept {kept:e}: {difference}");
        let halves = row_difference(0, &[1.0, kept, kept], &[0.0, 1.0, 1.0]);
        assert!((halves - 0.5).abs() < 1e-6, "kept twice {kept:e}: {halves}");
    }
}

/// Rows taken in together, unscaled, against the same rows one by one: every combination of what may be requested.
#[test]
fn statistics_of_several_rows_are_those_of_each() {
    const ROWS: usize = 67;
    for (settled, recent) in [(0, 0), (600, 3)] {
        let num_keys = settled + recent + ROWS;
        let mut rng = seeded(7);
        let map: Vec<Vec<f32>> = (0..ROWS)
            .map(|row| {
                let scores: Vec<f64> = (0..num_keys - (ROWS - 1 - row)).map(|_| rng.random_range(-3.0..3.0)).collect();
                softmax(&scores).into_iter().map(|weight| weight as f32).collect()
            })
            .collect();
        let mask = |rng: &mut StdRng| (0..recent + ROWS).map(|_| f32::from(rng.random_range(0..2_u8))).collect();
        let masks: Vec<Vec<f32>> = vec![mask(&mut rng), vec![0.0; recent + ROWS], mask(&mut rng)];
        for column_sums in [false, true] {
            for first_row in [0, 1, 30, ROWS - 1] {
                for window in [None, Some(0), Some(1), Some(20), Some(ROWS), Some(num_keys), Some(10_000)] {
                    let mass = Some(MassRequest { first_row, window });
                    for mass in [mass, None] {
                        let request = StatsRequest { column_sums, mass, masks: masks.clone(), recent, log_sums: false };
                        let mut plain = HeadStats::new(&request, num_keys);
                        map.iter().enumerate().for_each(|(row, weights)| plain.add_row(&request, row, weights));
                        for step in [1, 13, ROWS] {
                            let case = format!("{settled} settled, steps of {step}, {column_sums}, {mass:?}");
                            let mut fused = HeadStats::new(&request, num_keys);
                            for (index, rows) in map.chunks(step).enumerate() {
                                let len = rows.last().unwrap().len();
                                // Twice as large weights, half the scale, in every other row.
                                let factor = |row: usize| if row.is_multiple_of(2) { 1.0 } else { 2.0 };
                                let mut weights = vec![0.0; rows.len() * len];
                                for (row, out) in weights.chunks_mut(len).enumerate() {
                                    out.iter_mut().zip(&rows[row]).for_each(|(out, w)| *out = w * factor(row));
                                }
                                let scales: Vec<f32> = (0..rows.len()).map(|row| 1.0 / factor(row)).collect();
                                let rows = UnscaledRows { first_row: index * step, weights: &weights, scales: &scales };
                                fused.add_rows(&request, rows);
                            }
                            let close = |what: &str, fused: &[f32], plain: &[f32]| {
                                assert_close(&format!("{what}, {case}"), fused, &widen(plain), VALUE_TOLERANCE);
                            };
                            close("column sums", &fused.column_sums, &plain.column_sums);
                            close("profiled sums", &fused.profiled_sums, &plain.profiled_sums);
                            close("window sums", &fused.window_sums, &plain.window_sums);
                            close("differences", &fused.differences, &plain.differences);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn query_heads_that_cannot_be_shared_out_are_refused() {
    let config = FastGen::default();
    let classes = vec![TokenClass::default(); 4];
    let stats = LayerStats::new(config.request(Segment::prompt(&classes)), [4; 5]);
    for num_kv_heads in [0, 2, 3, 6] {
        let result = config
            .choose(Segment::prompt(&classes), num_kv_heads, &stats, |pending| Ok(vec![Vec::new(); pending.len()]));
        assert!(result.is_err(), "5 query heads over {num_kv_heads} KV heads");
    }
}

/// Comparisons pass over what is not a number: one query head of a group may have all of it, and nothing would be seen.
#[test]
fn statistics_that_are_not_numbers_choose_nothing() {
    let classes = vec![TokenClass { special: false, punctuation: false }; 6];
    let segment = Segment::prompt(&classes);
    for config in [
        r#"{"criterion": "mass", "gqa": "min"}"#,
        r#"{"criterion": "mass", "gqa": "mean"}"#,
        r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "profile_rows": 2}"#,
        r#"{"criterion": "max_abs"}"#,
    ] {
        let config = search(config);
        let whole = LayerStats::new(config.request(segment), [6; 4]);
        assert!(config.choose(segment, 2, &whole, |pending| Ok(vec![vec![0.0; 9]; pending.len()])).is_ok());
        let mut spoilt = 0;
        for which in 0..4 {
            let mut stats = whole.clone();
            let head = &mut stats.heads[3];
            let numbers =
                [&mut head.column_sums, &mut head.profiled_sums, &mut head.window_sums, &mut head.differences];
            let Some(number) = numbers.into_iter().nth(which).unwrap().last_mut() else { continue };
            *number = f32::NAN;
            spoilt += 1;
            let refused = config.choose(segment, 2, &stats, |pending| Ok(vec![vec![0.0; 9]; pending.len()]));
            let error = refused.unwrap_err();
            assert!(matches!(error, Error::NotANumber { .. }) && !error.is_usage(), "{error}");
            assert!(error.to_string().contains("query head 3"), "{error}");
        }
        assert!(spoilt > 0);
    }
}
