//! Asks many questions about one text that is read and compressed once.
//!
//! ```sh
//! cargo run --release --example many_questions -- MODEL [TEXT_FILE QUESTION...]
//! ```
//!
//! `MODEL` is a GGUF file or a model's folder; it should be one that follows instructions. Without a text, it takes a
//! short one of its own, and questions about it.

use adaptive_kvcache::prelude::*;
use anyhow::Context;

const TEXT: &str = "The Harbour Line is a small railway. It was opened in 1931 and has four stations: Quay, Market, Mill \
    and Hilltop. The first train leaves Quay at six in the morning, the last one at eleven at night. A ticket costs two \
    crowns; children under seven travel free. The trains are painted dark green. Its longest bridge crosses the river Tarn \
    and is 212 metres long. The railway is run by the town of Velm. Its director is Clara Hoste, an engineer who built \
    bridges in Norway before. Dogs are welcome in the last carriage. In winter, when there is much snow, the station \
    Hilltop is closed. Lost umbrellas can be collected at Market station on Fridays.";

const QUESTIONS: [&str; 4] = [
    "When was the railway opened?",
    "Who is the director of the railway?",
    "What does a ticket cost?",
    "How long is the longest bridge?",
];

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("usage: many_questions MODEL [TEXT_FILE QUESTION...]")?;
    let (text, questions): (String, Vec<String>) = match arguments.next() {
        Some(path) => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read `{path}`"))?;
            (text, arguments.collect())
        }
        None => (TEXT.to_owned(), QUESTIONS.map(str::to_owned).to_vec()),
    };
    let loaded = load(model, WeightDtype::Auto)?;

    for kept_ratio in [1.0, 0.5] {
        let text = CompressedText::read(&loaded, &text, kept_ratio)?;
        println!("--- {:.0} % of the text's cache is kept", 100.0 * text.cache.kept_ratio());
        for question in &questions {
            println!("{question}\n  {}", text.ask(question)?.trim());
        }
        println!();
    }
    Ok(())
}

/// A text that was read once, and what the cache keeps of it.
#[derive(Debug)]
pub struct CompressedText<'a> {
    loaded: &'a Loaded,
    /// The tokens that the cache has read.
    ids: Vec<u32>,
    /// The text, to which questions are added.
    text: String,
    pub cache: AdaptiveKvCache,
}

impl<'a> CompressedText<'a> {
    /// Reads a text before any question about it is known.
    ///
    /// # Errors
    /// Of the model, such as a text that its context has no room for.
    pub fn read(loaded: &'a Loaded, text: &str, kept_ratio: f64) -> Result<Self> {
        let method = method_by_name("replay").ok_or_else(|| Error::input("this library has no method `replay`"))?;
        let config = AdaptiveConfig::for_method(method).with_budget(Budget::KeptRatio(kept_ratio))?;
        let mut cache = loaded.cache(KvDtype::F16, &config)?;
        // The question will stand in the same message of the chat template: what comes behind the text is not read yet.
        let (alone, other) = (message(loaded, text, "?")?, message(loaded, text, "!")?);
        let shared = alone.iter().zip(&other).take_while(|(a, b)| a == b).count();
        let ids = alone[..shared].to_vec();
        loaded.model.prefill(&ids, &mut cache, &mut ())?;
        Ok(Self { loaded, ids, text: text.to_owned(), cache })
    }

    /// Answers one question. The next one knows nothing of it.
    ///
    /// # Errors
    /// Of the model, such as a text that its context has no room for.
    pub fn ask(&self, question: &str) -> Result<String> {
        let Loaded { model, tokenizer, .. } = self.loaded;
        let whole = message(self.loaded, &self.text, question)?;
        let asked = whole.strip_prefix(&self.ids[..]).filter(|asked| !asked.is_empty());
        let asked = asked.ok_or_else(|| Error::input("the question changes how the text is split into tokens"))?;

        // A copy of what is kept: the question and the answer grow this one only.
        let mut cache = self.cache.clone();
        // As a further prompt, the question would be compressed too. Token by token it is kept whole.
        let mut logits = Vec::new();
        for &id in asked {
            logits = model.decode(id, &mut cache)?;
        }
        let options = GenerationOptions { max_new_tokens: 40, ..GenerationOptions::default() };
        Generation::new(model, tokenizer, &mut cache, &whole, logits, options).map(|step| Ok(step?.text)).collect()
    }
}

/// Tokens of a message of the user, up to where the answer begins.
fn message(loaded: &Loaded, text: &str, question: &str) -> Result<Vec<u32>> {
    loaded.tokenizer.encode_chat(&[ChatMessage::new("user", format!("{text}\n\n{question}"))])
}
