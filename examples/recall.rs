//! Whether a conversation still knows at its end what it was told at its beginning: a fact in the first turn, some thousand
//! tokens of a text in the turns between, then a question about it; with the full cache, with a cache of a quarter of its
//! bytes, and with the same saved and taken from its file in between.
//!
//! ```sh
//! cargo run --release --example recall -- MODEL TEXT TRIALS TOKENS PASSAGE CONFIG
//! ```
//!
//! `TOKENS` of the text lie between fact and question, `PASSAGE` of them in each turn.
//!
//! Prints what each said, and how many were right.

use std::io::Write;
use std::ops::ControlFlow;

use adaptive_kvcache::cache::{Bounds, Retention};
use adaptive_kvcache::checkpoint::Loaded;
use adaptive_kvcache::compress::Budget;
use adaptive_kvcache::generate::{Conversation, GenerationOptions};
use adaptive_kvcache::prelude::*;
use adaptive_kvcache::saved::{Dialogue, SavedCache};
use adaptive_kvcache::tokenizer::ChatInput;
use anyhow::{Context, ensure};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, trials, tokens, passage, path] = &arguments[..] else {
        anyhow::bail!("usage: recall MODEL TEXT TRIALS TOKENS PASSAGE CONFIG");
    };
    let loaded = load(model, WeightDtype::Auto)?;
    let text = std::fs::read_to_string(text).with_context(|| format!("failed to read `{text}`"))?;
    let ids = loaded.tokenizer.encode(&text)?;
    let (trials, tokens, passage): (usize, usize, usize) = (trials.parse()?, tokens.parse()?, passage.parse()?);
    ensure!(ids.len() > tokens, "the text has {} tokens", ids.len());
    let config = loaded.model.config();
    let budget =
        tokens * config.num_layers * config.heads.num_kv_heads * KvDtype::F16.token_bytes(config.heads.head_dim) / 4;
    let config = AdaptiveConfig::from_file(path)?.with_budget(Budget::Bytes(budget))?;
    let file = std::env::temp_dir().join(format!("recall-{}.kv", std::process::id()));
    let mut right = [0; 3];
    let mut out = std::io::stdout().lock();
    for trial in 0..trials {
        let key = (10_007 + trial * 36_529 % 89_989).to_string();
        // Another part of the text each time.
        let first = trial * 997 % (ids.len() - tokens);
        let read = &ids[first..first + tokens];
        let passages: Vec<String> = read.chunks(passage.max(1)).map(|ids| loaded.tokenizer.decode(ids, true)).collect();
        let mut answers = Vec::new();
        for (way, right) in right.iter_mut().enumerate() {
            let retention = if way == 0 { Retention::Full } else { loaded.retention(&config) };
            let answer = talk(&loaded, retention, &key, &passages, (way == 2).then_some(&file))?;
            *right += usize::from(answer.contains(&key));
            answers.push(answer.replace('\n', " "));
        }
        writeln!(out, "{key}: {answers:?}")?;
    }
    let _ = std::fs::remove_file(&file);
    let [full, bounded, saved] = right;
    #[expect(clippy::cast_precision_loss)]
    let megabytes = budget as f64 / (1024.0 * 1024.0);
    writeln!(
        out,
        "right of {trials}: full cache {full}, {megabytes:.2} MB {bounded}, saved and loaded in between {saved}"
    )?;
    Ok(())
}

/// Tells the fact, goes through the passages, and asks for it.
///
/// * `file`: where the conversation is saved halfway, to go on from it
fn talk(
    loaded: &Loaded,
    retention: Retention,
    key: &str,
    passages: &[String],
    file: Option<&std::path::PathBuf>,
) -> anyhow::Result<String> {
    let bounds = Bounds { ahead: 64, ..Bounds::default() };
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let mut conversation =
        Conversation::new(model, tokenizer, KvDtype::F16, retention, Vec::new())?.with_bounds(bounds);
    let fact =
        format!("The secret number is {key}. Remember it: {key} is the secret number. What is the secret number?");
    ask(&mut conversation, &fact, 24)?;
    for (index, passage) in passages.iter().enumerate() {
        ask(&mut conversation, &format!("{passage}\n\nIs this text about a man? Answer with yes or no."), 24)?;
        if let (Some(file), true) = (file, index == passages.len() / 2) {
            let (opening, unread) = conversation.resumable().context("a conversation that can be saved")?;
            let input = ChatInput { messages: conversation.messages().to_vec(), ..ChatInput::default() };
            loaded.save_dialogue(conversation.cache(), Some(&Dialogue { input, opening, unread }), file)?;
            let saved = SavedCache::open(file)?;
            let Dialogue { input, opening, unread } = saved.dialogue()?.context("a conversation in the file")?;
            let cache = saved.cache(loaded)?;
            conversation = Conversation::resume(model, tokenizer, cache, input.messages, opening, unread)?;
            conversation = conversation.with_bounds(bounds);
        }
    }
    if let Some(budget) = conversation.cache().budget() {
        let allocated = conversation.cache().bytes().allocated;
        ensure!(allocated <= budget, "{allocated} of {budget} bytes");
    }
    ask(&mut conversation, "What is the secret number mentioned above? Answer with the number only.", 24)
}

fn ask(conversation: &mut Conversation<'_>, question: &str, most: usize) -> anyhow::Result<String> {
    let mut text = String::new();
    let options = GenerationOptions { max_new_tokens: most, ..GenerationOptions::default() };
    conversation.ask(question, &options, &mut (), &mut |new| {
        text += new;
        ControlFlow::Continue(())
    })?;
    Ok(text)
}
