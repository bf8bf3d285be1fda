//! Settings, prompts and places that cannot be used. Model files are in `hostile`.

use super::{Lab, MODEL, Refusal};

#[test]
fn a_wrong_configuration_is_refused_by_key_and_file() {
    let lab = Lab::new();
    let refuses = |text: &str| {
        lab.write("bad.json", text);
        let refusal = lab.generate_refuses(&["--config", "bad.json"]);
        refusal.names("`bad.json`").is_short();
        refusal
    };
    let key = |text: &str| {
        let refusal = refuses(text);
        refusal.status(2);
        refusal
    };
    key(r#"{"recovery_treshold": 0.9}"#).names("`recovery_treshold`").hints("`recovery_threshold`");
    key(r#"{"top_p_freqency": 0.9}"#).names("`top_p_freqency`").hints("`top_p_frequency`");
    key(r#"{"frequency_ratio": 1.5}"#).names("`frequency_ratio`").names("0..=1").names("`1.5`");
    key(r#"{"locality_length": -0.1}"#).names("`locality_length`").names("0..=1").names("`-0.1`");
    key(r#"{"t": "high"}"#).names("`t`").names("high");
    key(r#"{"t": 0.9, "recovery_threshold": 0.9}"#).names("`t`").names("`recovery_threshold`").hints("one of them");
    key(r#"{"policies": ["special"]}"#).names("`policies`").names("full");
    key(r#"{"policies": ["specail", "full"]}"#).names("`policies`").names("specail");
    key(r#"{"criterion": "maximum"}"#).names("`criterion`").names("max_abs");
    key(r#"{"sink_tokens": -1}"#).names("`sink_tokens`").names("-1");
    key(r#"{"decode": "keep"}"#).names("`decode`").names("evict");
    key(r#"{"decode": "evict", "method": "snapkv"}"#).names("`snapkv`").names("`tova`").hints("append");
    key(r#"{"gqa": "mean"}"#).names("`gqa`").hints("mass");
    key(r#"{"method": "snap"}"#).names("`method`").names("snap").names("`snapkv`");
    key(r#"{"kept_ratio": 0.5}"#).names("`kept_ratio`").names("fastgen").hints("recovery_threshold");
    key(r#"{"method": "tova", "t": 0.9}"#).names("`t`").names("`tova`").hints("leave this key out");
    for text in ["", "{", "[1]", "not JSON", r#"{"t": 1e999}"#, &"[".repeat(100_000)] {
        refuses(text);
    }
    lab.generate_refuses(&["--config", "none.json"]).names("`none.json`").names("No such file").is_short();
    lab.generate_refuses(&["--config", "."]).names("`.`").is_short();
    lab.refuses(&["compare", "--model", MODEL, "--config", "none.json"]).names("`none.json`");
}

#[test]
fn a_budget_that_cannot_be_used_is_refused() {
    let lab = Lab::new();
    lab.write("h2o.json", r#"{"method": "h2o"}"#);
    lab.write("mass.json", r#"{"criterion": "mass"}"#);
    let mass = ["--model", MODEL, "--config", "mass.json"];
    let generate = lab.refuses(&[&["generate"], &mass[..], &["--kept-ratio", "0.5"]].concat());
    generate.status(2).names("--kept-ratio").names("`mass.json`").hints("`method`");
    let compare = lab.refuses(&[&["compare"], &mass[..], &["--kv-budget", "1MB"]].concat());
    compare.status(2).names("--kv-budget").names("`fastgen`").hints("`method`");
    lab.refuses(&["bench", "--model", MODEL, "--kept-ratio", "0.5"]).status(2).names("`kept_ratio`");
    for [option, value] in [["--kept-ratio", "1.5"], ["--kept-ratio", "half"], ["--kv-budget", "1TB"]] {
        let refusal = lab.refuses(&["compare", "--model", MODEL, "--config", "h2o.json", option, value]);
        refusal.status(2).names(value);
    }
    let both = ["--kept-ratio", "0.5", "--kv-budget", "1MB"];
    lab.refuses(&[&["compare", "--model", MODEL, "--config", "h2o.json"], &both[..]].concat()).status(2);
}

#[test]
fn a_prompt_that_cannot_be_used_is_refused() {
    let lab = Lab::new();
    lab.generate_refuses(&["--prompt", ""]).status(2).names("empty").hints("--prompt").is_short();
    lab.write("empty.txt", "");
    lab.generate_refuses(&["--prompt-file", "empty.txt"]).status(2).names("empty").hints("--prompt-file");
    lab.generate_refuses(&["--prompt-file", "-"]).status(2).names("empty"); // standard input is empty
    lab.generate_refuses(&["--prompt-file", "none.txt"]).names("`none.txt`").names("No such file").is_short();
    lab.write("bytes.txt", [b'a', 0xff, b'b']);
    lab.generate_refuses(&["--prompt-file", "bytes.txt"]).names("`bytes.txt`").names("UTF-8").is_short();
    lab.refuses(&["compare", "--model", MODEL, "--prompt", ""]).status(2).names("empty");

    lab.write("long.txt", " word".repeat(8193));
    for command in ["generate", "compare"] {
        let refusal = lab.refuses(&[command, "--model", MODEL, "--prompt-file", "long.txt"]);
        refusal.status(2).names("8193").names("8192").hints("shorten").is_short();
    }
}

#[test]
fn a_place_that_cannot_be_written_to_is_refused() {
    let lab = Lab::new();
    lab.write("file", "");
    lab.generate_refuses(&["--log-file", "file/test.log"]).status(1).names("`file/test.log`").hints("--log-file");
    lab.generate_refuses(&["--log-file", "file/a/test.log"]).status(1).names("`file/a/test.log`");
    lab.generate_refuses(&["--log-file", "."]).status(1).names("`.`").hints("--log-file");
    let images = ["--save-image", "--image-dir"];
    lab.generate_refuses(&[images[0], images[1], "file"]).status(1).names("`file`").hints("folder").is_short();
    lab.generate_refuses(&[images[0], images[1], "file/x"]).status(1).names("`file/x`").hints("folder").is_short();
    lab.generate_refuses(&["--report", "file/r.json"]).status(1).names("`file`").hints("folder").is_short();
}

/// A report that cannot be written is refused before the model has worked for it.
#[test]
fn a_report_that_is_a_folder_is_refused_early() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("folder")).unwrap();
    let refusal = lab.generate_refuses(&["--prompt", "The capital of France is", "--report", "folder"]);
    refusal.status(1).names("`folder`").is_short();
}

/// The report appears at once and whole, but not in the place of a link or a device.
#[cfg(unix)]
#[test]
fn a_report_goes_where_a_link_leads() {
    let lab = Lab::new();
    std::os::unix::fs::symlink("real.json", lab.path("link.json")).unwrap();
    lab.generate(&["--prompt", "a", "-n", "0", "--report", "link.json"]);
    assert!(lab.path("link.json").is_symlink(), "the link was replaced by the report");
    lab.json("real.json");
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_on_a_full_disk_is_reported_once() {
    let lab = Lab::new();
    let output = lab.run(&["generate", "--model", MODEL, "-n", "0", "--prompt", "a b", "--log-file", "/dev/full"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.matches("No space left").count()), (Some(1), 1), "{stderr}");
    assert!(stderr.contains("error: ") && stderr.contains("`/dev/full`"), "{stderr}");
}

#[cfg(target_os = "linux")]
#[test]
fn text_that_cannot_be_printed_is_an_error() {
    let lab = Lab::new();
    for args in [&["generate", "--quiet"][..], &["compare"], &["inspect"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = lab.command(&[args, &["--model", MODEL]].concat());
        let output = command.env("PROMPT", "a b").env("MAX_NEW_TOKENS", "2").stdout(full).output().unwrap();
        Refusal::of(&output, args[0]).status(1).names("standard output").names("No space left");
    }
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let lab = Lab::new();
    for (device, built) in
        [("cuda", cfg!(feature = "cuda")), ("cuda:1", cfg!(feature = "cuda")), ("metal", cfg!(feature = "metal"))]
    {
        // Of a build for such devices, there may be one.
        if !built {
            let refusal = lab.generate_refuses(&["--device", device]);
            refusal.status(1).names(format!("`{device}`")).hints("--device cpu").is_short();
            refusal.names("this build").hints("--features");
        }
        // Nor do the CPU's kernels run elsewhere, whatever was built.
        let refusal = lab.generate_refuses(&["--device", device, "--backend", "kernels"]);
        refusal.status(1).names(format!("`{device}`")).names("--backend kernels").hints("--backend candle").is_short();
    }
    lab.generate_refuses(&["--device", "nonsense"]).status(2).names("`nonsense`").hints("cpu").is_short();
}

#[test]
fn an_option_out_of_range_is_refused_by_name() {
    let lab = Lab::new();
    for (option, value) in [
        ("--threads", "0"),
        ("--threads", "99999"),
        ("--prefill-chunk", "0"),
        ("--prefill-chunk", "-1"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "2"),
        ("--min-p", "1.5"),
        ("--repeat-penalty", "0"),
        ("--max-new-tokens", "-1"),
        ("--max-new-tokens", "99999999999999999999"),
        ("--seed", "x"),
        ("--kv-dtype", "q4"),
        ("--dtype", "f64"),
        ("--use-adakv", "maybe"),
        ("--nonsense", "1"),
    ] {
        let refusal = lab.refuses(&["generate", "--model", MODEL, option, value]);
        refusal.status(2).names(option);
    }
    lab.refuses(&["generate"]).status(2);
    lab.generate_refuses(&["--report-positions"]).status(2);
}
