//! Saved caches as commands use them: what a run goes on from, and what it leaves.

use std::path::Path;

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::compress::{AdaptiveConfig, Budget};
use adaptive_kvcache::generate::FinishReason;
use adaptive_kvcache::report::size;
use adaptive_kvcache::saved::{Dialogue, SavedCache};
use adaptive_kvcache::tokenizer::{ChatContext, ChatInput, ChatMessage};
use adaptive_kvcache::{Error, Result, files};

use super::args::{CacheArgs, NumbersArgs};
use super::interrupt::while_waiting;
use super::session::{Session, config};
use super::terminal::note;

/// What a run begins with: how its cache is to be, and what it holds already.
#[derive(Default)]
pub struct Start {
    /// What decides what is kept; of a full cache, what would decide.
    pub config: AdaptiveConfig,
    pub is_adaptive: bool,
    saved: Option<Opened>,
}

struct Opened {
    file: SavedCache,
    dialogue: Option<Dialogue>,
}

/// What the user asks for besides the file.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub config: Option<&'a Path>,
    pub use_adakv: bool,
    pub budget: Option<Budget>,
    pub numbers: &'a NumbersArgs,
}

impl<'a> Asked<'a> {
    pub fn new(cache: &'a CacheArgs, budget: Option<Budget>, numbers: &'a NumbersArgs) -> Self {
        Self { config: cache.config.as_deref(), use_adakv: cache.use_adakv, budget, numbers }
    }
}

impl Start {
    /// Opens the saved cache, if one is named, and settles what the options say.
    ///
    /// # Errors
    /// As [`SavedCache::open`] and [`config`]; [`Error::Input`] if an option asks for another method or other numbers than
    /// the file's.
    pub fn open(path: Option<&Path>, asked: Asked<'_>) -> Result<Self> {
        let Asked { config: named, use_adakv, budget, numbers } = asked;
        let Some(path) = path else {
            return Ok(Self { config: config(named, budget)?, is_adaptive: use_adakv, saved: None });
        };
        let start = Self::saved(path)?;
        let refuse = |option: &str, what: &str| {
            let reason = format!("{option} asks for {what} than `{}` has", path.display());
            Err(Error::input(reason).with_hint("leave the option out: a saved cache stays what it is"))
        };
        if named.is_some() || budget.is_some() {
            let wanted = match (named, budget) {
                (None, Some(budget)) if start.config.budget().is_some() => start.config.clone().with_budget(budget)?,
                _ => config(named, budget)?,
            };
            if !start.is_adaptive || start.config != wanted {
                let option = if named.is_some() { "--config" } else { "the budget" };
                return refuse(option, "another method");
            }
        }
        if !use_adakv && start.is_adaptive {
            return refuse("--use-adakv 0", "another method");
        }
        if numbers.is_given() && numbers.kv_dtype()? != start.kv_dtype(numbers)? {
            return refuse("--kv-dtype", "other numbers");
        }
        Ok(start)
    }

    /// Opens a saved cache.
    ///
    /// # Errors
    /// As [`SavedCache::open`].
    pub fn saved(path: &Path) -> Result<Self> {
        let file = while_waiting(|| SavedCache::open(path))?;
        let (config, dialogue) = (file.config()?, file.dialogue()?);
        let (is_adaptive, config) = (config.is_some(), config.unwrap_or_default());
        Ok(Self { config, is_adaptive, saved: Some(Opened { file, dialogue }) })
    }

    /// Whether a saved cache is gone on from.
    pub fn is_saved(&self) -> bool {
        self.saved.is_some()
    }

    /// The conversation that the file holds.
    pub fn dialogue(&self) -> Option<&Dialogue> {
        self.saved.as_ref().and_then(|saved| saved.dialogue.as_ref())
    }

    /// The numbers of the cache.
    ///
    /// # Errors
    /// As [`NumbersArgs::kv_dtype`].
    pub fn kv_dtype(&self, numbers: &NumbersArgs) -> Result<KvDtype> {
        self.saved.as_ref().map_or_else(|| numbers.kv_dtype(), |saved| Ok(saved.file.kv_dtype()))
    }

    /// What is kept of a prompt.
    pub fn retention(&self, session: &Session) -> Retention {
        if self.is_adaptive { session.loaded.retention(&self.config) } else { Retention::Full }
    }

    /// The cache: empty, or the file's.
    ///
    /// # Errors
    /// As [`SavedCache::cache`], and as new caches.
    pub fn cache(&self, session: &Session) -> Result<AdaptiveKvCache> {
        match &self.saved {
            None => session.loaded.model.new_cache(session.kv_dtype, self.retention(session)),
            Some(saved) => while_waiting(|| saved.file.cache(&session.loaded)),
        }
    }

    /// Ids of a text behind the cache's. One that begins with the text which the cache holds is read from there on.
    ///
    /// # Errors
    /// [`Error::Input`] if nothing is left to read; as [`Tokenizer::encode`](adaptive_kvcache::tokenizer::Tokenizer::encode).
    pub fn encode_text(&self, session: &Session, text: &str) -> Result<Vec<u32>> {
        let tokenizer = &session.loaded.tokenizer;
        let ids = tokenizer.encode(text)?;
        let Some(saved) = &self.saved else { return Ok(ids) };
        match ids.strip_prefix(&saved.file.ids()[..]) {
            Some([]) => Err(Error::input("the prompt is what the saved cache holds, and nothing follows")
                .with_hint("ask something about it")),
            Some(rest) if saved.file.num_tokens() > 0 => Ok(rest.to_vec()),
            _ => tokenizer.encode_following(text),
        }
    }

    /// Ids of messages behind the cache's, up to the start of an answer.
    ///
    /// # Errors
    /// [`Error::Input`] if the cache holds text and no conversation; what the chat template fails with.
    pub fn encode_messages(
        &self,
        session: &Session,
        messages: &[ChatMessage],
        context: &ChatContext,
    ) -> Result<Vec<u32>> {
        let tokenizer = &session.loaded.tokenizer;
        let Some(Opened { file, dialogue }) = &self.saved else { return tokenizer.chat(context)?.encode(messages) };
        let Some(Dialogue { input, unread, .. }) = dialogue else {
            if file.num_tokens() == 0 {
                return tokenizer.chat(context)?.encode(messages);
            }
            let reason =
                format!("`{}` holds a text and no conversation, so messages can't follow", file.path().display());
            return Err(Error::input(reason)
                .with_hint("give the prompt as plain text (--chat 0), or save the text with `cache create --chat`"));
        };
        if *context != ChatContext::default() && *context != input.context {
            return Err(Error::input("tools, documents and variables are the saved conversation's")
                .with_hint("leave them out of the messages"));
        }
        let ids = tokenizer.chat(&input.context)?.encode_turn(&input.messages, messages)?;
        Ok(unread.iter().copied().chain(ids).collect())
    }
}

/// What was answered to a prompt.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// Whether it goes on with the last message, which is an answer, too.
    pub goes_on: bool,
    pub ids: &'a [u32],
    pub text: &'a str,
    pub finish_reason: FinishReason,
}

impl Start {
    /// The conversation behind a prompt's messages and their answer, of which the cache has got all tokens but the last.
    pub fn answered(&self, session: &Session, new: ChatInput, answer: Answer<'_>) -> Dialogue {
        let before = self.dialogue().cloned();
        let asked = if answer.goes_on { 2 } else { 1 };
        let opening = before.as_ref().map_or(new.messages.len().saturating_sub(asked), |before| before.opening);
        let mut input = before.map_or_else(|| ChatInput { messages: Vec::new(), ..new.clone() }, |before| before.input);
        input.messages.extend(new.messages);
        let (last, read) = answer.ids.split_last().map_or((None, &[][..]), |(&last, read)| (Some(last), read));
        let unread = last.filter(|_| answer.finish_reason != FinishReason::Eos);
        // A stop text is not part of the answer, and the cache holds it.
        let text = match answer.finish_reason {
            FinishReason::Stop => session.loaded.tokenizer.decode(&[read, unread.as_slice()].concat(), true),
            _ => answer.text.to_owned(),
        };
        let begun = if answer.goes_on { input.messages.pop() } else { None };
        let begun = begun.map(|message| message.text()).unwrap_or_default();
        input.messages.push(ChatMessage::new("assistant", begun + &text));
        Dialogue { input, opening, unread }
    }
}

/// Refuses to save a cache where no file can be put.
pub fn expect_file(path: &Path) -> Result<()> {
    if files::is_stream(path) {
        let reason = format!("a cache is saved as a file, and `{}` is none", path.display());
        return Err(Error::input(reason).with_hint("name a file"));
    }
    Ok(())
}

/// Saves what a run leaves, and says so.
pub fn save(session: &Session, cache: &AdaptiveKvCache, dialogue: Option<&Dialogue>, path: &Path) -> Result<()> {
    session.loaded.save_dialogue(cache, dialogue, path)?;
    let bytes = usize::try_from(path.metadata().map_or(0, |metadata| metadata.len())).unwrap_or(usize::MAX);
    note(format_args!("{} tokens are in `{}` ({})", cache.seen(), path.display(), size(bytes)));
    Ok(())
}
