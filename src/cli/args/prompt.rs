//! Options of a prompt, and of how its answer is drawn.

use std::path::PathBuf;

use adaptive_kvcache::Error;
use adaptive_kvcache::generate::{Draft, GenerationOptions, SamplingOptions};
use clap::{Args, ValueEnum};
use rand::TryRngCore;
use rand::rngs::OsRng;

use super::values::{non_negative, penalty, ratio};

/// Tokens to generate from a prompt, if the user does not say.
pub const DEFAULT_NEW_TOKENS: usize = 128;

/// The prompt, if the user gives none.
pub const DEFAULT_PROMPT: &str = "What is the recipe of mayonnaise?";

/// What the model is given.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// The prompt; beside --messages it is the user's next turn [default: What is the recipe of mayonnaise?]
    #[arg(long, env = "PROMPT", value_name = "TEXT")]
    pub prompt: Option<String>,
    /// File to read the prompt from, instead of --prompt; `-` is standard input
    #[arg(long, value_name = "PATH")]
    pub prompt_file: Option<PathBuf>,
    /// Wrap the prompt in the model's own chat template; `auto`: if it has one
    #[arg(long, env = "CHAT", num_args = 0..=1, default_missing_value = "1", default_value = "0",
          value_parser = wrap, action = clap::ArgAction::Set, value_name = "0|1|auto")]
    pub chat: Wrap,
    /// Any of them asks for the chat template, too.
    #[command(flatten)]
    pub dialogue: DialogueArgs,
    /// Go on with the assistant's message that the conversation ends with, instead of beginning a new one
    #[arg(long = "continue")]
    pub go_on: bool,
}

/// Whether a prompt is wrapped in the model's chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrap {
    Never,
    Always,
    /// If the model brings one.
    Auto,
}

/// Reads what clap takes for yes and no, and `auto`.
fn wrap(text: &str) -> Result<Wrap, String> {
    match text.to_lowercase().as_str() {
        "y" | "yes" | "t" | "true" | "on" | "1" => Ok(Wrap::Always),
        "n" | "no" | "f" | "false" | "off" | "0" => Ok(Wrap::Never),
        "auto" => Ok(Wrap::Auto),
        _ => Err("expected 1, 0 or auto".to_owned()),
    }
}

/// What comes before the prompt in a conversation.
#[derive(Debug, Args)]
pub struct DialogueArgs {
    /// What the model is told to be, as the chat template's system message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// JSON file of messages: `[{"role": "user", "content": "..."}]`, or an object that holds them as `messages`, perhaps
    /// with `tools`, `documents` and `chat_template_kwargs`; `-` is standard input
    #[arg(long, value_name = "PATH")]
    pub messages: Option<PathBuf>,
    /// File of a chat template (Jinja), instead of the model's own
    #[arg(long, value_name = "PATH")]
    pub chat_template: Option<PathBuf>,
}

/// How far to generate, and how tokens are drawn.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// The most tokens to generate [default: 128; in a chat, until the answer ends]
    #[arg(short = 'n', long, env = "MAX_NEW_TOKENS", value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// 0 takes the most probable token always
    #[arg(long, default_value_t = 0.0, value_parser = non_negative, value_name = "T")]
    pub temperature: f32,
    /// Draw from the K most probable tokens only; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Draw from the most probable tokens that together hold this probability
    #[arg(long, default_value_t = 1.0, value_parser = ratio::<f32>, value_name = "P")]
    pub top_p: f32,
    /// Draw from tokens at least this share as probable as the best
    #[arg(long, default_value_t = 0.0, value_parser = ratio::<f32>, value_name = "P")]
    pub min_p: f32,
    /// Make tokens less probable that were there lately; 1 for not
    #[arg(long, default_value_t = 1.0, value_parser = penalty, value_name = "X")]
    pub repeat_penalty: f32,
    /// How many of the latest tokens the penalty looks at
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub repeat_last_n: usize,
    /// Seed of the random numbers, to repeat a run [default: another one each time, which is told]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End where this text would begin; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub ignore_eos: bool,
}

/// Whether tokens are guessed.
#[derive(Debug, Args)]
pub struct DraftArgs {
    /// Guess from the text what comes next, and check several guesses in one pass over the weights: the text stays the
    /// same, and comes sooner where it repeats itself or the prompt. `auto` guesses where guesses have come true; never
    /// with --backend candle or a GPU, with `"decode": "evict"`, or while several of --prompts decode together
    #[arg(long, value_enum, default_value_t = DraftChoice::Auto, value_name = "auto|off", hide_possible_values = true)]
    pub draft: DraftChoice,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum DraftChoice {
    Auto,
    Off,
}

impl From<DraftChoice> for Draft {
    fn from(draft: DraftChoice) -> Self {
        match draft {
            DraftChoice::Auto => Self::Auto,
            DraftChoice::Off => Self::Off,
        }
    }
}

impl SamplingArgs {
    /// Draws a seed if there is need of one that the user does not give.
    ///
    /// * `max_new_tokens`: if the user does not say
    pub fn options(&self, max_new_tokens: usize) -> Result<GenerationOptions, Error> {
        let seed = match self.seed {
            Some(seed) => seed,
            None if self.temperature > 0.0 => drawn_seed()?,
            None => 0,
        };
        Ok(GenerationOptions {
            max_new_tokens: self.max_new_tokens.unwrap_or(max_new_tokens),
            sampling: SamplingOptions {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repeat_penalty: self.repeat_penalty,
                repeat_last_n: self.repeat_last_n,
                seed,
            },
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            draft: Draft::default(),
        })
    }
}

/// A seed that nobody can foretell, short enough to be typed again.
pub fn drawn_seed() -> Result<u64, Error> {
    let drawn = OsRng.try_next_u32().map_err(|error| std::io::Error::other(error.to_string()));
    drawn.map(u64::from).map_err(|source| {
        Error::io("draw a seed from", "the operating system", source).with_hint("give one with --seed")
    })
}
