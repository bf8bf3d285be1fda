//! `tune --profile`: how much each KV head matters to a model, as a file.

use std::path::Path;
use std::sync::Arc;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::budget::methods::Method;
use adaptive_kvcache::compress::{BudgetOver, FASTGEN, HeadCost, HeadPrior, HeadProfile};
use adaptive_kvcache::eval::{FidelityText, Progress, head_profile};
use adaptive_kvcache::{Error, Result, tune};
use anyhow::Context;

use super::REPLAY;
use crate::cli::args::TuneArgs;
use crate::cli::configurations::configuration;
use crate::cli::interrupt::{interrupted, listen, while_writing};
use crate::cli::measure::Lines;
use crate::cli::{Outcome, STDOUT_FAILED, plain};

/// Heads that are told of.
const SHOWN: usize = 5;

/// * `path`: the file to write
pub fn run(args: &TuneArgs, path: &Path) -> anyhow::Result<Outcome> {
    let configs = if args.configs.is_empty() { vec![REPLAY.to_owned()] } else { args.configs.clone() };
    let method = method(&configs)?;
    args.measure.places(&configs).writes("--profile", Some(path)).check()?;
    let texts = args.measure.texts()?;
    listen()?;
    let session = args.measure.open(&[KvDtype::F16])?;
    let (subject, plan) = (session.subject(), args.measure.plan());
    let texts = texts.iter().map(|text| text.measured(&session.loaded.tokenizer, &plan));
    let texts = texts.collect::<Result<Vec<FidelityText>>>()?;
    let mut shown = Shown(Lines::new());
    let profile = head_profile(&subject, &texts, &plan, &method, &mut shown);
    shown.0.finish();
    let profile = match profile {
        Err(Error::Interrupted) => return Ok(Outcome::Interrupted),
        profile => profile?,
    };
    while_writing(path, || tune::write_profile(path, &profile))?;
    shown.0.print(&summary(&profile, path));
    shown.0.into_printed().context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

/// The one method whose scores are used.
fn method(configs: &[String]) -> Result<Arc<dyn Method>> {
    let [name] = configs else {
        return Err(Error::input(format!("--profile is of one method, and --configs names {}", configs.len()))
            .with_hint("name one configuration"));
    };
    let config = configuration(name)?.filter(|config| config.budgeted().is_some());
    let config = config.ok_or_else(|| {
        Error::input(format!("`{name}` has no budget that heads could compete for"))
            .with_hint(format!("name a configuration with another `method` than `{FASTGEN}`, such as `{REPLAY}`"))
    })?;
    let config = config.with_budget_over(BudgetOver::Pool)?;
    config.budgeted().map(|method| Arc::clone(&method.method)).ok_or_else(|| Error::input("no budget"))
}

/// What was measured, where it is, and how it is used.
fn summary(profile: &HeadProfile, path: &Path) -> String {
    let mut heads: Vec<&HeadCost> = profile.heads.iter().collect();
    heads.sort_by(|a, b| b.kl.total_cmp(&a.kl));
    let line = |head: &&HeadCost| {
        let HeadCost { layer, kv_head, kept_ratio, kl, .. } = head;
        format!("  layer {layer}, KV head {kv_head}: {:.1} % kept, KL {kl:.6}\n", 100.0 * kept_ratio)
    };
    let costly: String = heads.iter().take(SHOWN).map(line).collect();
    let all: f64 = profile.heads.iter().map(|head| head.kl).sum();
    let file = plain(&path.display().to_string());
    format!(
        "{} heads that alone lose what `{}` thinks least of, {} windows: KL {all:.6} in all, most of it by\n{costly}\
         profile -> {file}\nuse it with: {{\"method\": \"{}\", \"{}\": {file:?}}}",
        heads.len(),
        profile.method,
        profile.windows,
        profile.method,
        HeadPrior::KEY,
    )
}

/// Shows what is being measured.
struct Shown(Lines);

impl Progress for Shown {
    fn starts(&mut self, what: &str) {
        self.0.set_message(what);
    }

    fn is_over(&self) -> bool {
        interrupted()
    }
}
