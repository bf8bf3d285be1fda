#!/usr/bin/env python3
"""Makes expected.json: prompts by RULER's own generators, with all that they drew, so that the same draws can be put into
words by this program and compared letter by letter.

    git clone https://github.com/hsiehjackson/RULER && python3 tests/data/ruler/make.py RULER > tests/data/ruler/expected.json

Needs numpy and tqdm. What else the generators import is replaced: the tokenizer splits at white space, sentences end at
full stops, and the words are a few that are listed below. Contexts and questions are split as kvpress splits them
(evaluation/benchmarks/ruler/create_huggingface_dataset.py).
"""
import contextlib
import json
import math
import re
import sys
import tempfile
import types
from pathlib import Path

RULER = Path(sys.argv[1]) / "scripts/data/synthetic"
NOUNS = ["abacus", "badger", "candle", "dolphin", "engine", "ferry"] + [f"noun{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
ADJECTIVES = ["amber", "brisk", "calm", "dusty"]
ESSAY = (
    "Some people work with care. Others hurry, and regret it.  Was it worth it? Nobody asked.\nWe began early that day. The road "
    "was long and dry! A cart came by. Its driver slept. The horse knew the way. So did we."
)
NIAH = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1, 6),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1, 40),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1, 33),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1, 42),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1, 5),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1, 4),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1, 42),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4, 42),
}
QUESTIONS = {
    "niah": (r"What (?:is|are all) the special magic", r"The special magic"),
    "vt": (r"Question: Find all variables that are assigned the value", r"Answer:"),
    "cwe": (r"Question: What are the 10 most common words in the above list\?", r"Answer:"),
    "fwe": (r"Question: Do not provide any explanation\.", r"Answer:"),
}


def module(name, **members):
    made = types.ModuleType(name)
    made.__dict__.update(members)
    sys.modules[name] = made
    return made


class Words:
    def text_to_tokens(self, text):
        return text.split()


def replace_imports():
    utils = module("nemo.collections.asr.parts.utils.manifest_utils", read_manifest=None, write_manifest=None)
    for name in ["nemo", "nemo.collections", "nemo.collections.asr", "nemo.collections.asr.parts"]:
        module(name)
    module("nemo.collections.asr.parts.utils", manifest_utils=utils)
    module("tokenizer", select_tokenizer=lambda *_: Words())
    module("nltk")
    module("nltk.tokenize", sent_tokenize=lambda text: re.split(r"(?<=[.!?]) ", text))
    lists = {"nounlist.txt": NOUNS, "adjectivelist.txt": ADJECTIVES, "verblist.txt": []}
    module("wonderwords", random_word=types.SimpleNamespace(_get_words_from_text_file=lambda name: lists[name]))
    module("scipy")
    module("scipy.special", zeta=lambda alpha: math.pi**2 / 6 if alpha == 2 else None)


def load(name, args, replacements=()):
    """A generator's functions; each replacement adds to what is remembered of a draw."""
    folder = Path(tempfile.mkdtemp())
    (folder / "json").mkdir()
    (folder / "json/PaulGrahamEssays.json").write_text(json.dumps({"text": ESSAY}))
    source = (RULER / f"{name}.py").read_text()
    for old, new in replacements:
        assert source.count(old) == 1, (name, old, source.count(old))
        source = source.replace(old, new)
    base = {"save_dir": ".", "save_name": "x", "tokenizer_path": "x", "num_samples": 1, "tokens_to_generate": 8}
    sys.argv = [name] + [f"--{key}={value}" for key, value in {**base, **args}.items()]
    sys.path.insert(0, str(RULER))
    made = {"__name__": name, "__file__": str(folder / f"{name}.py"), "DRAWN": {}}
    exec(compile(source, name, "exec"), made)
    return made


def split(task, text):
    question, answer = QUESTIONS[task.split("_")[0]]
    at = list(re.finditer(question, text))[-1].start()
    context, rest = text[:at], text[at:]
    at = re.search(answer, rest).start()
    return {"context": context, "question": rest[:at], "answer_prefix": rest[at:]}


def template(constants, name):
    return constants["TASKS"][name]["template"] + constants["TASKS"][name]["answer_prefix"]


def main():
    replace_imports()
    constants = {}
    exec((RULER / "constants.py").read_text(), constants)
    cases = []
    for task, (haystack, key, value, num_k, num_v, num_q, num_haystack) in NIAH.items():
        made = load(
            "niah",
            {
                "max_seq_length": 2048, "type_haystack": haystack, "type_needle_k": key, "type_needle_v": value,
                "num_needle_k": num_k, "num_needle_v": num_v, "num_needle_q": num_q,
                "template": template(constants, "niah"),
            },
            [
                ("    # Context\n", "    DRAWN.update(needles=list(needles))\n"),
                ("        document_sents_list = []\n",
                 "        document_sents_list = []\n"
                 "        DRAWN.update(pieces=list(document_sents), places=[int(p) for p in insertion_positions[1:-1]])\n"),
                ("        for index, element in zip(indexes, needles):\n",
                 "        DRAWN.update(pieces=list(sentences), places=list(indexes))\n"
                 "        for index, element in zip(indexes, needles):\n"),
                ("    query = ', '.join", "    DRAWN.update(keys=list(queries))\n    query = ', '.join"),
            ],
        )
        text, answers = made["generate_input_output"](num_haystack)
        cases.append({"task": task, **made["DRAWN"], "answers": answers, **split(task, text)})
    made = load(
        "variable_tracking",
        {"max_seq_length": 2048, "template": template(constants, "variable_tracking")},
        [
            ("        for insert_pi, j in zip",
             "        DRAWN.update(places=positions, noises=num_noises, value=chain_i[0].split(' = ')[1])\n"
             "        for insert_pi, j in zip"),
        ],
    )
    sample = made["sys_vartrack_w_noise_random"]
    example = sample(num_samples=1, max_seq_length=200, incremental=5)[0]
    drawn = {"example": {**made["DRAWN"], "answers": example["outputs"]}}
    row = sample(num_samples=1, max_seq_length=500, icl_example=dict(example))[0]
    cases.append({"task": "vt", **made["DRAWN"], **drawn, "answers": row["outputs"], **split("vt", row["input"])})
    for length in [2048, 4096]:
        made = load(
            "common_words_extraction",
            {"max_seq_length": length, "template": template(constants, "common_words_extraction")},
            [("    # Formatting the word list",
              "    DRAWN.setdefault('lists', []).append([list(word_list), list(common)])\n    # Formatting the word list")],
        )
        made["words"] = NOUNS[:25] + [f"word{n}" for n in range(20)]
        text, answers = made["generate_input_output"](14)
        cases.append({"task": "cwe", "length": length, **made["DRAWN"], "answers": answers, **split("cwe", text)})
    made = load(
        "freq_words_extraction",
        {"max_seq_length": 2048, "template": template(constants, "freq_words_extraction")},
        [("        return template.format(context",
          "        DRAWN.update(num_words=num_words, counts=[int(c) for c in sampled_cnt.astype(int)], words=list(sampled_words))\n"
          "        return template.format(context")],
    )
    text, answers, _ = made["generate_input_output"](4096, num_words=50, vocab_size=40)
    cases.append({"task": "fwe", **made["DRAWN"], "answers": answers, **split("fwe", text)})
    return cases


with contextlib.redirect_stdout(sys.stderr):
    cases = main()
print(json.dumps(cases, indent=1))
