//! What a run reads and what it writes: found to be usable, and apart from one another, before anything is done.
//!
//! Not for: opening them.

use std::path::{Path, PathBuf};

use adaptive_kvcache::{Error, Result, files};

use super::outputs::{self, same_file};

/// What files of a model are called, beside those with an ending of their own.
#[rustfmt::skip]
const MODEL_FILES: [&str; 10] = [
    "config.json", "generation_config.json", "params.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "vocab.json", "merges.txt",
];

/// Endings of a model's files that nobody else's have.
const MODEL_ENDINGS: [&str; 8] = [".safetensors", ".index.json", ".gguf", ".pth", ".pt", ".bin", ".model", ".jinja"];

/// What a run reads and writes.
pub struct Places<'a> {
    model: &'a Path,
    /// Each with the option that names it.
    inputs: Vec<(&'static str, &'a Path)>,
    outputs: Vec<(&'static str, &'a Path)>,
    log: Option<&'a Path>,
}

impl<'a> Places<'a> {
    pub fn of(model: &'a Path) -> Self {
        Self { model, inputs: Vec::new(), outputs: Vec::new(), log: None }
    }

    /// A file that is read, if it is given; `-` is standard input. What is no file is nobody's business here.
    pub fn reads(mut self, option: &'static str, path: Option<&'a (impl AsRef<Path> + ?Sized)>) -> Self {
        let path = path.map(AsRef::as_ref);
        let path = path.map(|path| if path == Path::new("-") { Path::new("/dev/stdin") } else { path });
        self.inputs.extend(path.map(|path| (option, path)));
        self
    }

    /// A file that is written whole, if it is given.
    pub fn writes(mut self, option: &'static str, path: Option<&'a (impl AsRef<Path> + ?Sized)>) -> Self {
        self.outputs.extend(path.map(|path| (option, path.as_ref())));
        self
    }

    /// The log.
    pub fn logs(mut self, path: &'a Path) -> Self {
        self.log = Some(path);
        self
    }

    /// Refuses what cannot be written, and what would write over something that is read or written.
    ///
    /// # Errors
    /// [`Error::Input`] for two that are one file; as [`files::check`].
    pub fn check(&self) -> Result<()> {
        let log = self.log.map(|log| ("--log-file", log));
        let all: Vec<(&str, &Path)> = self.outputs.iter().copied().chain(log).collect();
        outputs::distinct(&all)?;
        let is_empty = |path: &Path| path.as_os_str().is_empty();
        for (option, path) in &all {
            if is_empty(path) {
                return Err(Error::input(format!("{option} names no file")).with_hint("give it a path"));
            }
            self.expect_no_input(option, path)?;
        }
        self.outputs.iter().try_for_each(|(_, path)| files::check(path))
    }

    /// Refuses to write over something that is read.
    ///
    /// * `option`: what names `path`
    pub fn expect_no_input(&self, option: &str, path: &Path) -> Result<()> {
        // Nothing is read of what is not there.
        if !path.exists() {
            return Ok(());
        }
        let refuse = |what: String| {
            let reason = format!("{option} names `{}`, which is {what}: it would be written over", path.display());
            Err(Error::input(reason).with_hint("name another file"))
        };
        if self.model_files().iter().any(|file| same_file(file, path)) {
            return refuse("a file of the model".to_owned());
        }
        match self.inputs.iter().find(|(_, input)| same_file(input, path)) {
            Some((input, _)) => refuse(format!("read as {input}")),
            None => Ok(()),
        }
    }

    /// The files that the model may consist of.
    fn model_files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.model.to_owned()];
        let name = self.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // One part of several, or one file of a folder's.
        let is_part = name.contains("-of-") || [".safetensors", ".pth"].iter().any(|ending| name.ends_with(ending));
        let folder = match self.model.parent() {
            _ if self.model.is_dir() => self.model,
            Some(folder) if is_part && folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) if is_part => folder,
            _ => return files,
        };
        let ours =
            |name: &str| MODEL_FILES.contains(&name) || MODEL_ENDINGS.iter().any(|ending| name.ends_with(ending));
        for folder in [folder.to_owned(), folder.join("..")] {
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            files.extend(entries.filter(|entry| ours(&entry.file_name().to_string_lossy())).map(|entry| entry.path()));
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_read_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("model")).unwrap();
        for name in ["m.gguf", "p.txt", "model/config.json", "model/a.safetensors", "model/r.json", "old.json"] {
            std::fs::write(at(name), "x").unwrap();
        }
        let refused = |model: &str, output: &str| {
            let (model, prompt, output) = (at(model), at("p.txt"), at(output));
            let places = Places::of(&model).reads("--prompt-file", Some(&prompt)).writes("--report", Some(&output));
            places.check().is_err_and(|error| error.is_usage())
        };
        for (model, output) in [
            ("m.gguf", "m.gguf"),
            ("m.gguf", "model/../m.gguf"),
            ("m.gguf", "p.txt"),
            ("model", "model/config.json"),
            ("model", "model/a.safetensors"),
            ("model/a.safetensors", "model/config.json"),
        ] {
            assert!(refused(model, output), "{model} {output}");
        }
        for (model, output) in
            [("m.gguf", "old.json"), ("m.gguf", "new.json"), ("model", "model/r.json"), ("m.gguf", "model/config.json")]
        {
            assert!(!refused(model, output), "{model} {output}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("m.gguf", at("link")).unwrap();
            std::fs::hard_link(at("m.gguf"), at("hard")).unwrap();
            assert!(refused("m.gguf", "link") && refused("link", "m.gguf") && refused("link", "hard"));
        }
        // A log is added to, but not to a prompt either.
        let (model, prompt) = (at("m.gguf"), at("p.txt"));
        assert!(Places::of(&model).reads("--prompt-file", Some(&prompt)).logs(&prompt).check().is_err());
        assert!(Places::of(&model).logs(&at("l/o.g")).check().is_ok());
        assert!(Places::of(&model).logs(Path::new("")).check().is_err());
    }
}
