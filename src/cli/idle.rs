//! Options that would do nothing are wrong use, and so are two that contradict each other: whoever types them expects
//! something.
//!
//! Only what stands on the command line is looked at, defaults and variables never: scripts set these for all runs. What
//! does no harm stays allowed: sampling options at temperature 0, or a configuration for the full cache, so that an A/B
//! run changes one option.

use adaptive_kvcache::{Error, Result};

use super::args::{BenchArgs, CacheCommand, ChatArgs, Command, CompareArgs, EvalArgs, GenerateArgs, PromptArgs};
use super::args::{StoreArgs, Wrap};
use super::variables::{NEED_TEMPLATE, Typed};

/// # Errors
/// [`Error::Input`] with the option that has no effect, and why.
pub fn check(command: &Command, typed: &Typed) -> Result<()> {
    match command {
        Command::Generate(args) => generate(args, typed),
        Command::Chat(args) => chat(args, typed),
        Command::Compare(CompareArgs { run, .. }) => prompt(&run.prompt, typed),
        Command::Bench(args) => bench(args, typed),
        Command::Eval(args) => eval(args, typed),
        Command::Cache(CacheCommand::Create(args)) => {
            budgets(&[("kept_ratio", "--kept-ratio"), ("kv_budget", "--kv-budget")], args.cache.use_adakv, typed)
        }
        Command::Cache(_) | Command::Tune(_) | Command::Inspect(_) => Ok(()),
    }
}

/// Refuses those of the options that are typed.
///
/// * `options`: id and spelling
fn refuse(typed: &Typed, options: &[(&str, &str)], why: &str, hint: &str) -> Result<()> {
    match options.iter().find(|(id, _)| typed.has(id)) {
        Some((_, option)) => Err(Error::input(format!("{option} has no effect {why}")).with_hint(hint)),
        None => Ok(()),
    }
}

fn generate(args: &GenerateArgs, typed: &Typed) -> Result<()> {
    prompt(&args.run.prompt, typed)?;
    store(&args.store, typed)?;
    if args.batch.prompts.is_none() {
        let hint = "give a file of --prompts, or leave --batch out";
        refuse(typed, &[("batch", "--batch")], "without --prompts", hint)?;
        if args.kept_ratio.kept_ratio.is_some() && args.batch.kv_budget.is_some() {
            return Err(Error::input("--kept-ratio and --kv-budget both say how much of the prompt is kept")
                .with_hint("give one of them"));
        }
        budgets(&[("kv_budget", "--kv-budget")], args.cache.use_adakv, typed)?;
    }
    budgets(&[("kept_ratio", "--kept-ratio")], args.cache.use_adakv, typed)?;
    if !args.save_image {
        refuse(typed, &[("image_dir", "--image-dir")], "without --save-image", "add --save-image")?;
    }
    Ok(())
}

fn chat(args: &ChatArgs, typed: &Typed) -> Result<()> {
    store(&args.store, typed)?;
    budgets(&[("kept_ratio", "--kept-ratio"), ("kv_budget", "--kv-budget")], args.cache.use_adakv, typed)
}

fn store(args: &StoreArgs, typed: &Typed) -> Result<()> {
    if args.cache_dir.is_some() {
        return Ok(());
    }
    refuse(typed, &[("cache_dir_limit", "--cache-dir-limit")], "without --cache-dir", "name a folder with --cache-dir")
}

fn budgets(options: &[(&str, &str)], use_adakv: bool, typed: &Typed) -> Result<()> {
    if use_adakv {
        return Ok(());
    }
    refuse(typed, options, "on the full cache, which --use-adakv 0 asks for", "leave one of the two out")
}

fn prompt(args: &PromptArgs, typed: &Typed) -> Result<()> {
    if typed.has("prompt") && typed.has("prompt_file") {
        return Err(Error::input("--prompt and --prompt-file both give the prompt").with_hint("give one of them"));
    }
    if typed.has("chat")
        && args.chat == Wrap::Never
        && let Some((_, option)) = NEED_TEMPLATE.iter().find(|(id, _)| typed.has(id))
    {
        let reason = format!("--chat 0 contradicts {option}, which needs the chat template");
        return Err(Error::input(reason).with_hint("leave one of the two out"));
    }
    Ok(())
}

fn bench(args: &BenchArgs, typed: &Typed) -> Result<()> {
    if args.contexts.is_empty() && !args.prefill.is_empty() {
        let why = "without --contexts, after which tokens are decoded";
        refuse(typed, &[("new_tokens", "--new-tokens")], why, "give --contexts, or leave it out")?;
    }
    Ok(())
}

fn eval(args: &EvalArgs, typed: &Typed) -> Result<()> {
    if args.tasks.is_empty() {
        let of_tasks = [("contexts", "--contexts"), ("depths", "--depths"), ("trials", "--trials"), ("map", "--map")];
        refuse(typed, &of_tasks, "without --tasks", "name --tasks, or leave it out")?;
        if args.writing_tokens == 0 {
            let why = "without --tasks or --writing-tokens";
            refuse(typed, &[("seed", "--seed")], why, "give one of them, or leave it out")?;
        }
    }
    if args.writing_tokens == 0 {
        let of_writing = [("writing_temperature", "--writing-temperature")];
        refuse(typed, &of_writing, "without --writing-tokens", "give --writing-tokens, or leave it out")?;
    }
    if args.prompts.is_none() {
        let of_prompts = [("answer_tokens", "--answer-tokens"), ("chat", "--chat")];
        refuse(typed, &of_prompts, "without --prompts", "give a file of --prompts, or leave it out")?;
    }
    Ok(())
}
