"""Makes `tiny/` and `ids.json`: Qwen's tokenizer with a small vocabulary, and token ids of texts with it and with the real one.

    python make_tokenizer.py [MODEL.gguf]

`tiny/` is a folder as Qwen 2 and 3 have it (NFC, their pieces of text, byte-level BPE, their tokens), trained on the novel in
`../text`. `ids.json` is `{"made_with": {...}, "texts": [...], "tiny": [[ids], ...], "real": ..., "gguf": ...}`, one list of ids for
each text; `real` are those of the vocabulary in MODEL.gguf (`scripts/get_model.sh qwen2.5-coder-0.5b`), and `gguf` those of
transformers' tokenizer of that file, which does not normalise. Without it, both stay as they are. Made with tokenizers 0.23.2, transformers 5.24.0, gguf 0.19.0 (`made_with` tells each run's).
"""

import json
import pathlib
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Of Qwen 3: added, but not special.
PLAIN = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  two  spaces   three ",
    "tabs\tand\t\ttabs\t",
    "lines\n\n\nand\r\nreturns\r\r\n \n  \n",
    "trailing space \n next",
    "a \u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u0085h\u000bi\u000cj",
    "1 12 123 1234567890 3.14159 1,000,000 0x1F 1e-7",
    "\u0661\u0662\u0663 \u0967\u0968 \u2160\u2161 \u00bd \u00b2 \uff11\uff12 \U0001d7ce\u2460",
    "I'm you're he's we'll they've I'd don't",
    "I'M YOU'RE HE'S WE'LL THEY'VE I'D DON'T it'\u017f x'\u212a",
    "'s't're've'm'll'd 's 't ''s",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a \u212b \u1e9b\u0323 q\u0307\u0323 q\u0323\u0307",
    "\ud55c\uae00 \u1112\u1161\u11ab\u1100\u1173\u11af \uac01 \u1100\u1161\u11a8",
    "\u212a\u2126\uf900\ufa10\u2f800 \u0958 \u0915\u093c \ufb2a",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u30ab\u3099 \uff76\uff9e",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0418\u0306 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05c1\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f980 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "def f(x):\n    return x**2  # square\n\n\tif not x: pass\n",
    "fn main() {\r\n\tprintln!(\"{}\", a::<B>::c()?);\r\n}",
    "<html><!-- c --></html> https://a.b/c?d=e&f#g user@example.com",
    "!!! ??? ... --- ___ $$$ \u20ac\u00a3 \u2014\u2013 \u201cq\u201d \u00abx\u00bb",
    "!\n\n!! \n!\r\n ...\n",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "<|im_start|>system\nYou answer.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|> <|im_end|><|endoftext|>x<|im_start |><|IM_END|><|im_end",
    "<|endoftext|>\n <|endoftext|>a<|endoftext|>",
    "<think>\n\n</think>\n\n<tool_call>\n{\"name\": \"f\"}\n</tool_call> <think >",
    "e\u0301<|im_end|>\u0301e <think>\u0308",
    "\u0000\u0001\u001f\u007f\u0080\u009f",
    "\ue000\uffff\U0010ffff\U000e0001\u0378",
    "x" * 200,
    "ab" * 60 + " " * 40 + "\n" * 30,
    "\u00fc" * 40 + "u\u0308" * 40,
    "The quick brown fox jumps over the lazy dog. Phileas Fogg, esquire, of Saville Row.",
]


def parts(tokenizer):
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def added(text, special):
    return AddedToken(text, special=special, normalized=False)


def tiny():
    tokenizer = parts(Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="")))
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    novel = (HERE / "../text/eighty_days_ch1-5.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([novel, *[text for text in TEXTS if "<" not in text]], trainer)
    tokenizer.add_special_tokens([added(text, True) for text in TURNS])
    tokenizer.add_tokens([added(text, False) for text in PLAIN])
    folder = HERE / "tiny"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    decoder = {
        str(tokenizer.token_to_id(text)): dict(
            content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=text in TURNS
        )
        for text in TURNS + PLAIN
    }
    # As Qwen's are.
    config = dict(
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder=decoder,
        additional_special_tokens=TURNS[1:],
        bos_token=None,
        chat_template=(HERE / "qwen3.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        errors="replace",
        model_max_length=131072,
        pad_token="<|endoftext|>",
        split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return tokenizer


def real(path):
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    vocab = {token: id for id, token in enumerate(tokens)}
    # A token that is missing is as if it had never been merged.
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = parts(
        Tokenizer(models.BPE(vocab=vocab, merges=pairs, continuing_subword_prefix="", end_of_word_suffix=""))
    )
    for token, kind in zip(tokens, types):
        if kind == 3:
            tokenizer.add_special_tokens([added(token, True)])
        elif kind == 4:
            tokenizer.add_tokens([added(token, False)])
    by_transformers = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    raw = [by_transformers(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for text, ids in zip(TEXTS, raw):
        if unicodedata.is_normalized("NFC", text):
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids, text
    return tokenizer, raw


def ids_of(tokenizer):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


target = HERE / "ids.json"
before = json.loads(target.read_text()) if target.exists() else {}
result = dict(made_with=dict(tokenizers=tokenizers.__version__), texts=TEXTS, tiny=ids_of(tiny()))
if len(sys.argv) > 1:
    tokenizer, result["gguf"] = real(pathlib.Path(sys.argv[1]).resolve())
    result["real"] = ids_of(tokenizer)
else:
    result |= {key: before[key] for key in ("gguf", "real")}
target.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()) + "\n}\n")
