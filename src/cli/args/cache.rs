//! Options of the commands about saved caches.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{BudgetArgs, CacheArgs, DialogueArgs, ModelArgs, NumbersArgs};

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Reads a text or a conversation, and saves what the cache keeps of it
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Create(Box<CreateArgs>),
    /// Shows what a saved cache holds; no model is needed
    Info {
        /// The file
        #[arg(value_name = "PATH")]
        file: PathBuf,
        /// Print the text that was read, too
        #[arg(long, requires = "model")]
        text: bool,
        /// Model whose tokenizer the text is printed with
        #[arg(long, value_name = "PATH", requires = "text")]
        model: Option<PathBuf>,
    },
    /// Compares every byte of saved caches with its checksum; no model is needed
    Check {
        /// The files
        #[arg(value_name = "PATH", required = true)]
        files: Vec<PathBuf>,
    },
    /// Lists the saved caches in a folder
    List {
        /// The folder
        #[arg(value_name = "DIR", default_value = ".")]
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub numbers: NumbersArgs,
    /// Texts to read, one behind the other as if they were one; `-` is standard input
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "messages", conflicts_with = "messages")]
    pub text: Vec<PathBuf>,
    /// Make the text the system message of a conversation, so that questions follow in the model's chat template
    #[arg(long, conflicts_with_all = ["messages", "system"])]
    pub chat: bool,
    #[command(flatten)]
    pub dialogue: DialogueArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Where to save the cache
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
}
