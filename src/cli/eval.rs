//! `eval`: what a smaller cache costs, as a table while it is measured, as JSON, as CSV and as a picture.

mod answers;
mod cells;
mod picture;
mod table;
mod tasks;
mod writing;

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::compress::{AdaptiveConfig, Budget, BudgetOver, DecodeMode};
use adaptive_kvcache::eval::{
    self, AnswerPlan, AnswerPrompt, FidelityPlan, FidelityText, GivenBudget, RulerPlan, Subject, TaskPlan, Variant,
    WritingPlan,
};
use adaptive_kvcache::generate::SamplingOptions;
use adaptive_kvcache::tokenizer::ChatTemplate;
use adaptive_kvcache::{Error, Result};
use anyhow::Context;

use super::args::EvalArgs;
use super::configurations::configuration;
use super::interrupt::{interrupted, listen, while_writing};
use super::kept::Start;
use super::measure::{Names, distinct};
use super::prompts::Prompts;
use super::session::Session;
use super::{Outcome, STDOUT_FAILED};
pub use picture::{draw, panels};
use table::Table;
pub use table::{fidelity_heading, fidelity_line};
use tasks::Tasks;

/// Prose for tasks to hide facts in, of a very long text: so many times what one of them takes.
const PROSE_FACTOR: usize = 8;

/// Lengths of tasks' texts if the user gives none.
const CONTEXTS: [usize; 3] = [512, 1024, 2048];
/// Those of RULER's.
const RULER_CONTEXTS: [usize; 1] = [4096];

/// A configuration under one of the budgets, shared out in one of the ways, or as it is.
struct Budgeted {
    name: String,
    budget: Option<GivenBudget>,
    /// Absent for the full cache.
    config: Option<AdaptiveConfig>,
}

pub fn run(args: &EvalArgs) -> anyhow::Result<Outcome> {
    let configs = budgeted(args)?;
    let tasks = Tasks::by_names(&args.tasks)?;
    if tasks.is_empty() && args.measure.windows == 0 && args.prompts.is_none() {
        return Err(Error::input("nothing to measure: no windows, no tasks and no prompts")
            .with_hint("give at least one of --windows, or --tasks, or --prompts")
            .into());
    }
    let places = args.measure.places(&args.configs).reads("--prompts", args.prompts.as_ref());
    let places = places.reads("--chat-template", args.chat_template.as_ref());
    args.files.add_to(places).writes("--map", args.map.as_ref()).check()?;
    if args.chat_template.is_some() && tasks.is_empty() && args.prompts.is_none() {
        return Err(Error::input("--chat-template is for --tasks and --prompts, and neither is given").into());
    }
    let template = args.chat_template.as_deref().map(ChatTemplate::from_file).transpose()?;
    let texts = args.measure.texts()?;
    let prompts = args.prompts.as_deref().map(Prompts::read).transpose()?;
    if let Some(prompts) = &prompts {
        prompts.expect_no_keys("all caches answer greedily, up to --answer-tokens")?;
    }
    listen()?;
    let kv_dtypes = distinct(&args.kv_dtype);
    let session = args.measure.open(&kv_dtypes)?.with_chat_template(template);
    let variants = variants(&session, &configs, &kv_dtypes);
    let subject = session.subject();
    let contexts =
        |default: &[usize]| if args.contexts.is_empty() { default.to_vec() } else { distinct(&args.contexts) };
    let (task_contexts, lengths) = (contexts(&CONTEXTS), contexts(&RULER_CONTEXTS));
    let longest = task_contexts.iter().chain(&lengths).copied().max().unwrap_or(0);
    let plan = args.measure.plan();
    let measured = texts.iter().map(|text| text.measured(&session.loaded.tokenizer, &plan));
    let measured = measured.collect::<Result<Vec<_>>>()?;
    let plans = Plans {
        fidelity: FidelityPlan {
            greedy_tokens: args.greedy_tokens,
            layer_error: args.layer_error,
            writing: writing_plan(args),
            ..plan
        },
        texts: measured,
        tasks: TaskPlan {
            tasks: tasks.facts,
            contexts: task_contexts,
            depths: distinct(&args.depths),
            trials: args.trials,
            seed: args.seed,
        },
        ruler: RulerPlan { tasks: tasks.ruler, lengths, samples: args.trials, seed: args.seed },
        prose: session.loaded.tokenizer.beginning(&texts[0].content, longest.saturating_mul(PROSE_FACTOR)),
        answers: AnswerPlan { prompts: answer_prompts(&session, prompts, args)?, answer_tokens: args.answer_tokens },
    };
    plans.check(&subject)?;

    let names = Names::new(&args.configs);
    let evicts = configs.iter().flat_map(|budgeted| &budgeted.config).any(|config| config.decode == DecodeMode::Evict);
    let mut table = Table::new(args, &names, evicts)?;
    let measured = plans.measure(&subject, &variants, &mut table);
    table.finish();
    match measured {
        Ok(()) | Err(Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    table.write(true)?;
    if let Some(path) = &args.files.plot {
        while_writing(path, || draw(path, &args.measure.model.model, &panels(table.rows(), &names)))?;
    }
    if let Some(path) = &args.map {
        while_writing(path, || tasks::draw(path, &args.measure.model.model, &tasks::maps(table.rows(), &names)))?;
    }
    table.into_printed().context(STDOUT_FAILED)?;
    Ok(if interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

/// All that is to be measured; what is not has no windows, tasks or prompts.
struct Plans<'a> {
    fidelity: FidelityPlan,
    /// At least one.
    texts: Vec<FidelityText>,
    tasks: TaskPlan,
    ruler: RulerPlan,
    /// The first text, for tasks.
    prose: &'a str,
    answers: AnswerPlan,
}

impl Plans<'_> {
    /// All of them, before hours are spent on the first.
    fn check(&self, subject: &Subject<'_>) -> Result<()> {
        if self.fidelity.windows > 0 {
            FidelityText::check_all(&self.texts, &self.fidelity, subject)?;
        }
        if !self.tasks.tasks.is_empty() {
            self.tasks.check(subject)?;
        }
        if !self.ruler.tasks.is_empty() {
            self.ruler.check(subject)?;
        }
        self.answers.check(subject)
    }

    fn measure(&self, subject: &Subject<'_>, variants: &[Variant], table: &mut Table) -> Result<()> {
        if self.fidelity.windows > 0 {
            eval::fidelity(subject, &self.texts, &self.fidelity, variants, table)?;
        }
        table.start_kind();
        if !self.tasks.tasks.is_empty() {
            eval::tasks(subject, self.prose, &self.tasks, variants, table)?;
        }
        table.start_kind();
        if !self.ruler.tasks.is_empty() {
            eval::ruler(subject, self.prose, &self.ruler, variants, table)?;
        }
        table.start_kind();
        eval::answers(subject, &self.answers, variants, table)
    }
}

/// The long text behind each prompt.
fn writing_plan(args: &EvalArgs) -> WritingPlan {
    let sampling =
        SamplingOptions { temperature: args.writing_temperature, seed: args.seed, ..SamplingOptions::default() };
    WritingPlan { tokens: args.writing_tokens, sampling }
}

/// The prompts in the form in which the model reads them; none without a file.
fn answer_prompts(session: &Session, prompts: Option<Prompts>, args: &EvalArgs) -> Result<Vec<AnswerPrompt>> {
    let prompts = prompts.map_or_else(
        || Ok(Vec::new()),
        |prompts| prompts.encode(session, &Start::default(), &[], args.chat || args.chat_template.is_some(), false),
    )?;
    let prompts = prompts.into_iter();
    Ok(prompts.map(|prompt| AnswerPrompt { name: prompt.name, text: prompt.text, ids: prompt.ids }).collect())
}

/// Every configuration under every budget, shared out in every way; those that take none, once.
fn budgeted(args: &EvalArgs) -> Result<Vec<Budgeted>> {
    let ratios = distinct(&args.kept_ratio).into_iter().map(Budget::KeptRatio);
    let budgets: Vec<Budget> = ratios.chain(distinct(&args.kv_budget).into_iter().map(Budget::Bytes)).collect();
    let (budgets, overs) = (or_none(&budgets), or_none(&distinct(&args.budget_over)));
    let given = budgets.iter().flat_map(|&budget| overs.iter().map(move |&over| (budget, over)));
    let given: Vec<_> = given.filter(|given| *given != (None, None)).collect();
    let mut all = Vec::new();
    for name in &args.configs {
        let config = configuration(name)?;
        let once = all.len();
        // FastGen's search takes none: it keeps what recovers a head, however much that is.
        if let Some(config) = config.as_ref().filter(|config| config.budgeted().is_some()) {
            for &(budget, over) in &given {
                let config = with_given(config.clone(), budget, over)?;
                let budget = config.budget().map(|budget| GivenBudget { budget, budget_over: over });
                all.push(Budgeted { name: name.clone(), budget, config: Some(config) });
            }
        }
        if all.len() == once {
            all.push(Budgeted { name: name.clone(), budget: None, config });
        }
    }
    if !given.is_empty() && all.iter().all(|config| config.budget.is_none()) {
        return Err(Error::input("none of the configurations takes a budget").with_hint(
            "leave --kept-ratio, --kv-budget and --budget-over out, or give a configuration that takes one",
        ));
    }
    Ok(all)
}

/// Each of the values, or that there is none.
fn or_none<T: Copy>(values: &[T]) -> Vec<Option<T>> {
    if values.is_empty() { vec![None] } else { values.iter().copied().map(Some).collect() }
}

fn with_given(mut config: AdaptiveConfig, budget: Option<Budget>, over: Option<BudgetOver>) -> Result<AdaptiveConfig> {
    if let Some(budget) = budget {
        config = config.with_budget(budget)?;
    }
    if let Some(over) = over {
        config = config.with_budget_over(over)?;
    }
    Ok(config)
}

fn variants(session: &Session, configs: &[Budgeted], kv_dtypes: &[KvDtype]) -> Vec<Variant> {
    let pairs = kv_dtypes.iter().flat_map(|&kv_dtype| configs.iter().map(move |config| (config, kv_dtype)));
    pairs
        .map(|(Budgeted { name, budget, config }, kv_dtype)| Variant {
            config: name.clone(),
            budget: *budget,
            kv_dtype,
            retention: config.as_ref().map_or(Retention::Full, |config| session.loaded.retention(config)),
        })
        .collect()
}
