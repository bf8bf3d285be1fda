//! `eval`: what a smaller cache costs, as a table while it is measured, as JSON, as CSV and as a picture.

mod picture;
mod table;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::config::{AdaptiveConfig, Budget};
use adaptive_kvcache::eval::{self, FidelityPlan, Subject, Task, TaskPlan, Variant};
use adaptive_kvcache::tokenizer::Tokenizer;
use adaptive_kvcache::{Error, Result};
use anyhow::Context;

use super::args::{EvalArgs, ModelArgs};
use super::bench::{FULL, TEXT, distinct};
use super::generate::check_report_path;
use super::interrupt::{interrupted, listen};
use super::session::Session;
use super::{Outcome, STDOUT_FAILED};
use picture::draw;
use table::Table;

/// The configuration that is built in, and its name.
const FASTGEN: &str = "fastgen";
const FASTGEN_JSON: &str = include_str!("../../configs/fastgen.json");

/// A configuration under one of the budgets, or under none.
struct Budgeted {
    name: String,
    budget: Option<Budget>,
    /// Absent for the full cache.
    config: Option<AdaptiveConfig>,
}

pub fn run(args: &EvalArgs) -> anyhow::Result<Outcome> {
    let configs = budgeted(args)?;
    let tasks = distinct(&args.tasks.iter().map(|name| Task::by_name(name)).collect::<Result<Vec<_>>>()?);
    if tasks.is_empty() && args.windows == 0 {
        return Err(Error::input("nothing to measure: no windows and no tasks")
            .with_hint("give at least one of --windows, or --tasks")
            .into());
    }
    for path in args.json.iter().chain(&args.csv).chain(&args.plot) {
        check_report_path(path)?;
    }
    let text = match &args.text {
        Some(path) => &std::fs::read_to_string(path).map_err(|source| Error::io("read text", path, source))?,
        None => TEXT,
    };
    listen()?;
    let session = Session::open(&ModelArgs {
        model: args.model.clone(),
        dtype: args.dtype,
        kv_dtype: args.full_kv_dtype,
        device: "auto".to_owned(),
        threads: args.threads,
        prefill_chunk: args.prefill_chunk,
    })?;
    let kv_dtypes: Vec<KvDtype> = distinct(&args.kv_dtype.iter().map(|&dtype| dtype.into()).collect::<Vec<_>>());
    for dtype in &kv_dtypes {
        dtype.check(session.loaded.model.config().heads.head_dim)?;
    }
    let variants = variants(&session, &configs, &kv_dtypes);
    let subject = Subject {
        model: &session.loaded.model,
        tokenizer: &session.loaded.tokenizer,
        prefill_options: session.prefill_options,
        full_kv_dtype: session.kv_dtype,
    };
    let ids = ids_without_bos(&session.loaded.tokenizer, text)?;
    let fidelity = FidelityPlan {
        prompt_tokens: args.prompt_tokens,
        score_tokens: args.score_tokens,
        windows: args.windows,
        offset_tokens: args.offset_tokens,
        greedy_tokens: args.greedy_tokens,
        layer_error: args.layer_error,
    };
    let tasks = TaskPlan {
        tasks,
        contexts: distinct(&args.contexts),
        depths: distinct(&args.depths),
        trials: args.trials,
        seed: args.seed,
    };
    // Both, before hours are spent on the first.
    if args.windows > 0 {
        fidelity.check(&subject, ids.len())?;
    }
    if !tasks.tasks.is_empty() {
        tasks.check(&subject)?;
    }

    let mut table = Table::new(args)?;
    let measured = measure(&subject, args, (&fidelity, &ids), (&tasks, text), &variants, &mut table);
    table.finish();
    match measured {
        Ok(()) | Err(Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some(path) = &args.plot {
        draw(path, &args.model, table.rows())?;
    }
    table.into_printed().context(STDOUT_FAILED)?;
    Ok(if interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

fn measure(
    subject: &Subject<'_>,
    args: &EvalArgs,
    (fidelity, ids): (&FidelityPlan, &[u32]),
    (tasks, prose): (&TaskPlan, &str),
    variants: &[Variant],
    table: &mut Table,
) -> Result<()> {
    if args.windows > 0 {
        eval::fidelity(subject, ids, fidelity, variants, table)?;
    }
    table.start_kind();
    if tasks.tasks.is_empty() { Ok(()) } else { eval::tasks(subject, prose, tasks, variants, table) }
}

/// Every configuration under every budget; those that take none, once.
fn budgeted(args: &EvalArgs) -> Result<Vec<Budgeted>> {
    let ratios = distinct(&args.kept_ratio).into_iter().map(Budget::KeptRatio);
    let budgets: Vec<Budget> = ratios.chain(distinct(&args.kv_budget).into_iter().map(Budget::Bytes)).collect();
    let mut all = Vec::new();
    for name in &args.configs {
        let config = configuration(name)?;
        let once = all.len();
        for &budget in &budgets {
            // FastGen's search takes none: it keeps what recovers a head, however much that is.
            if let Some(config) = config.as_ref().filter(|config| config.method.is_some()) {
                let config = Some(config.clone().with_budget(budget)?);
                all.push(Budgeted { name: name.clone(), budget: Some(budget), config });
            }
        }
        if all.len() == once {
            all.push(Budgeted { name: name.clone(), budget: None, config });
        }
    }
    if !budgets.is_empty() && all.iter().all(|config| config.budget.is_none()) {
        return Err(Error::input("none of the configurations takes a budget")
            .with_hint("leave --kept-ratio and --kv-budget out, or give a configuration that takes one"));
    }
    Ok(all)
}

/// `None` for the full cache.
fn configuration(name: &str) -> Result<Option<AdaptiveConfig>> {
    match name {
        FULL => Ok(None),
        FASTGEN => AdaptiveConfig::parse(FASTGEN_JSON, None).map(Some),
        path => AdaptiveConfig::from_file(path).map(Some).map_err(|error| match error {
            Error::Io { .. } => {
                error.with_hint(format!("a configuration is `{FULL}`, `{FASTGEN}`, or the path of a JSON file"))
            }
            other => other,
        }),
    }
}

fn variants(session: &Session, configs: &[Budgeted], kv_dtypes: &[KvDtype]) -> Vec<Variant> {
    let pairs = kv_dtypes.iter().flat_map(|&kv_dtype| configs.iter().map(move |config| (config, kv_dtype)));
    pairs
        .map(|(Budgeted { name, budget, config }, kv_dtype)| Variant {
            config: name.clone(),
            budget: *budget,
            kv_dtype,
            retention: config.clone().map_or(Retention::Full, |config| session.adaptive(config)),
        })
        .collect()
}

/// Ids of a text; the library puts BOS before each window.
fn ids_without_bos(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text)?;
    if tokenizer.adds_bos() && ids.first().copied() == tokenizer.bos_id() {
        ids.remove(0);
    }
    Ok(ids)
}
