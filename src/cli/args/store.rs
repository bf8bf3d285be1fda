//! Options of the prefix store.

use std::path::PathBuf;

use adaptive_kvcache::compress::parse_size;
use clap::Args;

/// Where it is kept what was read, for runs to come.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Folder of what was read before; made if missing. Prompts and conversations that begin with something in it go on from
    /// there, and are kept in it themselves. Without it nothing is kept
    #[arg(long, env = "KV_CACHE_DIR", value_name = "DIR", conflicts_with = "cache_file")]
    pub cache_dir: Option<PathBuf>,
    /// What the files in it may come to, such as 500MB; a bare number is MB. Those go that were not used for the longest time
    #[arg(long, env = "KV_CACHE_DIR_LIMIT", value_name = "SIZE", value_parser = parse_size, default_value = "2GB")]
    pub cache_dir_limit: usize,
}
