use super::*;
use crate::compress::{BudgetScale, SearchOrder, TokenIds, parse_size};

fn message(text: &str) -> String {
    let error = AdaptiveConfig::parse(text, Some(Path::new("c.json"))).unwrap_err();
    format!("{error} | {}", error.hint().unwrap_or("-"))
}

#[test]
fn the_originals_file_loads_unchanged() {
    let text = r#"{"t": 0.9, "top_p_frequency": 0.4, "locality_length": 0.2, "special_token_ids": [-1, 0, 1, 2],
                   "punctuation_list": [",", "."], "punctuation_token_ids": [29892, 29889]}"#;
    let config = AdaptiveConfig::parse(text, None).unwrap();
    let expected = FastGen {
        recovery_threshold: 0.9,
        frequency_ratio: 0.4,
        locality_ratio: 0.2,
        special_token_ids: TokenIds::List(vec![0, 1, 2]),
        punctuation_list: vec![",".to_owned(), ".".to_owned()],
        punctuation_token_ids: TokenIds::List(vec![29892, 29889]),
        ..FastGen::default()
    };
    assert_eq!(config, expected.into());
}

#[test]
fn a_serialised_configuration_reads_back_as_itself() {
    let text = r#"{"criterion": "mass", "gqa": "mean", "profile_rows": 64, "policies": ["locality", "full"]}"#;
    let config = AdaptiveConfig::parse(text, None).unwrap();
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
    let original = ["t", "top_p_frequency", "locality_length"];
    let spelt_out = |keys: &[&str], written: &str| {
        let mut keys: Vec<_> = keys.iter().filter(|key| !original.contains(key)).copied().collect();
        let written: serde_json::Map<String, Value> = serde_json::from_str(written).unwrap();
        let mut written: Vec<_> = written.keys().collect();
        keys.sort_unstable();
        written.sort_unstable();
        assert_eq!(written, keys);
    };
    spelt_out(&[keys::<Common>(), keys::<FastGen>()].concat(), &written);
    for &method in METHODS {
        for budget in [Budget::KeptRatio(0.1), Budget::Bytes((3 << 20) + 1)] {
            let config = AdaptiveConfig::for_method(method).with_budget(budget).unwrap();
            let written = serde_json::to_string(&config).unwrap();
            assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
            spelt_out(&[keys::<Common>(), method.keys(), &[budget.key(), BudgetOver::KEY]].concat(), &written);
        }
    }
}

#[test]
fn a_file_that_names_a_method_only_is_the_methods_default() {
    for &method in METHODS {
        let text = format!(r#"{{"method": "{}"}}"#, method.name());
        assert_eq!(AdaptiveConfig::parse(&text, None).unwrap(), AdaptiveConfig::for_method(method));
    }
    assert_eq!(AdaptiveConfig::parse(r#"{"method": "fastgen"}"#, None).unwrap(), AdaptiveConfig::default());
}

#[test]
fn eviction_while_decoding_is_for_the_search_and_for_methods_that_say_how() {
    let evicts = |method: &str| {
        let text = format!(r#"{{"decode": "evict", "method": "{method}"}}"#);
        let config = AdaptiveConfig::parse(&text, None).ok()?;
        let written = serde_json::to_string(&config).unwrap();
        assert!(written.contains(r#""decode":"evict""#), "{written}");
        assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
        Some(config.decode)
    };
    for method in [FASTGEN, "streaming_llm", "h2o", "tova", "replay", "rkv"] {
        assert_eq!(evicts(method), Some(DecodeMode::Evict), "{method}");
    }
    for method in METHODS.iter().filter(|method| method.eviction().is_none()) {
        assert_eq!(evicts(method.name()), None, "{}", method.name());
    }
    assert_eq!(AdaptiveConfig::parse(r#"{"decode": "append"}"#, None).unwrap(), AdaptiveConfig::default());
}

#[test]
fn keys_may_stand_before_the_method_that_they_are_for() {
    let text = r#"{"kept_ratio": 0.25, "sink_tokens": 2, "method": "streaming_llm"}"#;
    let config = AdaptiveConfig::parse(text, None).unwrap();
    assert_eq!(config.budget(), Some(Budget::KeptRatio(0.25)));
    assert_eq!(config.method_name(), "streaming_llm");
    assert_eq!(config.budgeted().unwrap().method.settings().unwrap(), serde_json::json!({"sink_tokens": 2}));
    let config = AdaptiveConfig::parse(r#"{"kv_budget": "1.5MB", "method": "h2o"}"#, None).unwrap();
    assert_eq!(config.budget(), Some(Budget::Bytes(3 << 19)));
}

#[test]
fn a_budget_can_be_shared_out_otherwise_than_by_the_methods_authors() {
    use crate::compress::Allocation;
    for &method in METHODS {
        let own = AdaptiveConfig::for_method(method);
        for (over, name) in [
            (BudgetOver::Own, "own"),
            (BudgetOver::Head, "head"),
            (BudgetOver::Layer, "layer"),
            (BudgetOver::Pool, "pool"),
        ] {
            let text = format!(r#"{{"method": "{}", "budget_over": "{name}"}}"#, method.name());
            let read = AdaptiveConfig::parse(&text, None);
            let set = own.clone().with_budget_over(over);
            if method.refuses(over).is_some() {
                assert!(read.is_err() && set.is_err(), "{text}");
                continue;
            }
            let (read, set) = (read.unwrap(), set.unwrap());
            assert_eq!(read, set);
            assert_eq!(read == own, over == BudgetOver::Own);
            let written = serde_json::to_string(&read).unwrap();
            assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), read);
            let expected = match over {
                BudgetOver::Own => method.allocation(),
                BudgetOver::Head => Allocation::Uniform,
                BudgetOver::Layer => Allocation::Adaptive { safeguard: 0.2 },
                BudgetOver::Pool => Allocation::Pooled,
            };
            assert_eq!(read.budgeted().unwrap().allocation(), expected);
        }
    }
    let refused = AdaptiveConfig::default().with_budget_over(BudgetOver::Pool).unwrap_err().to_string();
    assert!(refused.contains("`budget_over`: the method `fastgen` has no budget"), "{refused}");
}

#[test]
fn budgets_become_counts_of_positions() {
    let scale = BudgetScale { num_layers: 3, num_kv_heads: 2, row_bytes: 10, head_bytes: 0 };
    for (budget, len, expected) in [
        (Budget::KeptRatio(0.5), 9, 4.5),
        (Budget::KeptRatio(1.0), 10, 10.0),
        (Budget::KeptRatio(0.0), 10, 1.0),
        (Budget::KeptRatio(0.5), 0, 0.0),
        (Budget::Bytes(600), 100, 10.0), // 200 a layer, 100 a head
        (Budget::Bytes(659), 100, 10.0),
        (Budget::Bytes(660), 100, 11.0),
        (Budget::Bytes(600), 7, 7.0),
        (Budget::Bytes(1), 7, 1.0),
    ] {
        let average = budget.average(len, scale);
        assert!((average - expected).abs() < 1e-12, "{budget:?} of {len}: {average}");
    }
}

#[test]
fn sizes_are_read_in_powers_of_1024() {
    for (text, bytes) in [("64MB", 64 << 20), ("64", 64 << 20), ("1.5 gb", 3 << 29), ("512k", 512 << 10), ("17B", 17)] {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
    for text in ["", "MB", "-1MB", "0", "1TB", "0.5B", "1e300GB", "64 M B"] {
        assert!(parse_size(text).is_err(), "{text}");
    }
}

#[test]
fn a_budget_is_refused_where_there_is_none_and_out_of_range() {
    let message = |error: Error| format!("{error} | {}", error.hint().unwrap_or("-"));
    let fastgen = AdaptiveConfig::default().with_budget(Budget::KeptRatio(0.5)).unwrap_err();
    assert_eq!(
        message(fastgen),
        "`kept_ratio`: the method `fastgen` has no budget | set `recovery_threshold` instead, or choose another `method`"
    );
    let snapkv = || AdaptiveConfig::for_method(&crate::compress::budget::methods::SnapKv::DEFAULT);
    assert!(message(snapkv().with_budget(Budget::KeptRatio(1.1)).unwrap_err()).contains("in 0..=1, got `1.1`"));
    assert!(snapkv().with_budget(Budget::KeptRatio(f64::NAN)).is_err());
    assert!(message(snapkv().with_budget(Budget::Bytes(0)).unwrap_err()).contains("`kv_budget`: expected at least"));
}

#[test]
fn the_default_punctuation_has_the_thirty_signs_of_the_original() {
    let list = FastGen::default().punctuation_list;
    assert_eq!(list.len(), 30);
    assert!(list.iter().all(|sign| sign.chars().count() == 1));
}

#[test]
fn mistakes_name_the_key_the_file_and_the_remedy() {
    for (text, expected) in [
        (
            r#"{"recovery_treshold": 1}"#,
            "`c.json`: `recovery_treshold`: unknown key | did you mean `recovery_threshold`?",
        ),
        (r#"{"t": 0.9, "recovery_threshold": 0.9}"#, "given twice, as `t` and as `recovery_threshold` | keep one"),
        (r#"{"t": 0.9, "t": 0.8}"#, "`c.json` is not usable: not a JSON object: the key `t` is given twice at line 1"),
        (r#"{"frequency_ratio": 1.5}"#, "`frequency_ratio`: expected a number in 0..=1, got `1.5`"),
        (r#"{"locality_length": "x"}"#, "`locality_length`: expected a number in 0..=1, got `\"x\"`"),
        (r#"{"policies": ["special"]}"#, "`policies`: expected a list that ends in `full`"),
        (r#"{"policies": []}"#, "`policies`: expected a list that ends in `full`"),
        (r#"{"policies": ["full", "special"]}"#, "comes after `full`"),
        (r#"{"policies": ["special", "special", "full"]}"#, "listed twice"),
        (r#"{"policies": ["sinks", "full"]}"#, "unknown policy `sinks`"),
        (r#"{"profile_rows": 0}"#, "expected \"all\" or a whole number of at least 1, got `0`"),
        (r#"{"gqa": "mean"}"#, "`gqa`: has no effect with the criterion `max_abs`"),
        (
            r#"{"method": "snap"}"#,
            "`method`: unknown method \"snap\", expected one of `fastgen`, `streaming_llm`, `h2o`",
        ),
        (r#"{"method": 3}"#, "`method`: unknown method 3"),
        (r#"{"method": "h2o", "method": "h2o"}"#, "the key `method` is given twice"),
        (r#"{"kept_ratio": 0.5}"#, "`kept_ratio`: the method `fastgen` has no budget | set `recovery_threshold`"),
        (r#"{"kv_budget": "1MB"}"#, "`kv_budget`: the method `fastgen` has no budget"),
        (r#"{"method": "h2o", "kept_ratio": 2}"#, "expected a number in 0..=1, got `2`"),
        (
            r#"{"method": "h2o", "kv_budget": "x"}"#,
            "`kv_budget`: expected a size such as 64MB, 512KB or 1.5GB, got `x`",
        ),
        (r#"{"method": "h2o", "kv_budget": 64}"#, "`kv_budget`: expected a size such as \"64MB\", got `64`"),
        (r#"{"method": "h2o", "kv_budget": "1MB", "kept_ratio": 0.5}"#, "a method has one budget | keep one"),
        (r#"{"method": "h2o", "t": 0.9}"#, "`t`: has no effect with the method `h2o` | leave this key out"),
        (r#"{"method": "h2o", "pool_kernel": 5}"#, "`pool_kernel`: has no effect with the method `h2o`"),
        (r#"{"seed": 5}"#, "`seed`: has no effect with the method `fastgen`"),
        (r#"{"method": "snapkv", "sink_tokens": 4}"#, "`sink_tokens`: has no effect with the method `snapkv`"),
        (r#"{"method": "snapkv", "pool_kernel": 4}"#, "`pool_kernel`: expected an odd whole number, got `4`"),
        (r#"{"method": "snapkv", "observation_window": 0}"#, "expected a whole number of at least 1, got `0`"),
        (r#"{"method": "random", "seed": -1}"#, "`seed`: expected a whole number of at least 0, got `-1`"),
        (
            r#"{"method": "h2o", "budget_over": "heads"}"#,
            "`budget_over`: expected \"own\" or \"head\" or \"layer\" or \"pool\", got `\"heads\"`",
        ),
        (r#"{"budget_over": "pool"}"#, "`budget_over`: the method `fastgen` has no budget | set `recovery_threshold`"),
        (r#"{"sink_tokens": -1}"#, "expected a whole number of at least 0, got `-1`"),
        (r#"{"decode": "keep"}"#, "`decode`: expected \"append\" or \"evict\", got `\"keep\"`"),
        (
            r#"{"decode": "evict", "method": "snapkv"}"#,
            "`decode`: the method `snapkv` does not evict while decoding (\"evict\"); those that do: `fastgen`, \
             `streaming_llm`, `h2o`, `tova`, `replay`, `rkv` | set `decode` to \"append\"",
        ),
        (
            r#"{"decode": "evict", "method": "tova", "budget_over": "pool"}"#,
            "`budget_over`: the method `tova` evicts the same positions of all heads of a layer (\"evict\") | set it to \"head\"",
        ),
        (r#"{"special_token_ids": [1.5]}"#, "expected \"auto\" or a list of token ids"),
        ("[]", "`c.json` is not usable: not a JSON object"),
        ("{", "`c.json` is not usable: not a JSON object"),
    ] {
        assert!(message(text).contains(expected), "{text}: {}", message(text));
    }
}

#[test]
fn the_last_level_is_full_alone() {
    let order = SearchOrder::default();
    assert_eq!(order.level_names(0), ["special"]);
    assert_eq!(order.level_names(2), ["special", "punctuation", "frequency"]);
    assert_eq!(order.level_names(4), ["full"]);
}
