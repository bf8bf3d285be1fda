//! Chat formats for models that bring no template along, told by their special tokens.
//!
//! Written as Jinja templates, so that they go the same way as a model's own. Sources: Meta's `llama` repository
//! (`generation.py`, function `chat_completion`) for `LLaMA` 2, Meta's `llama3` repository (`tokenizer.py`, class
//! `ChatFormat`) for `LLaMA` 3, `OpenAI`'s description of `ChatML`.

/// Where the chat format of a tokenizer is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatFormat {
    /// The model's own template.
    Own,
    /// A well-known format, by name: `"llama2"`, `"llama3"` or `"chatml"`.
    BuiltIn(&'static str),
    /// None is known.
    None,
}

/// A built-in format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BuiltIn {
    pub name: &'static str,
    pub template: &'static str,
}

pub(super) const CHATML: BuiltIn = BuiltIn {
    name: "chatml",
    template: "{% for turn in messages %}\
               {{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}\
               {% endfor %}\
               {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
};

pub(super) const LLAMA3: BuiltIn = BuiltIn {
    name: "llama3",
    template: "{{ bos_token }}{% for turn in messages %}\
               {{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content | trim + '<|eot_id|>' }}\
               {% endfor %}\
               {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
};

/// The system message is part of the first question; every question begins a text and every answer ends it.
pub(super) const LLAMA2: BuiltIn = BuiltIn {
    name: "llama2",
    template: "{% set has_system = messages[0].role == 'system' %}\
               {% set turns = messages[1:] if has_system else messages %}\
               {% if not turns %}{{ raise_exception('a system message must be followed by a user message') }}{% endif %}\
               {% for turn in turns %}\
               {% if turn.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}\
               {{ raise_exception('after an optional system message, user and assistant must take turns') }}\
               {% endif %}\
               {% if turn.role == 'assistant' %}{{ ' ' + turn.content | trim + ' ' ~ eos_token }}\
               {% elif loop.first and has_system %}\
               {{ bos_token ~ '[INST] ' }}\
               {{ ('<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + turn.content) | trim }}\
               {{ ' [/INST]' }}\
               {% else %}{{ bos_token ~ '[INST] ' + turn.content | trim + ' [/INST]' }}{% endif %}\
               {% endfor %}",
};
