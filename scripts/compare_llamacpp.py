"""What compare_llamacpp.sh needs Python for: `measure` times llama.cpp, `table` prints the figures of all runs.

llama.cpp is called through the declarations of llama-cpp-python (llama_cpp.py) and nothing else of that package, so that
no Python lies between two tokens but the choice of the next, which is not timed.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
import types

# Prompt tokens that a batch holds: llama.cpp's own defaults for its command line tools.
BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512
# Tokens decoded before those that are timed.
WARM_UP_TOKENS = 4


def load_library(folder):
    """The declarations of llama.cpp's functions, over the libraries in `folder`, and what was logged meanwhile."""

    def function_of(library):
        def declared(name, argtypes, restype, enabled=True):
            def decorate(placeholder):
                # What this build lacks stays a placeholder.
                function = getattr(library, name, None) if enabled else None
                if function is None:
                    return placeholder
                function.argtypes, function.restype = argtypes, restype
                return function

            return decorate

        return declared

    # The three helpers that the declarations take from elsewhere in their package, and load_shared_library's meaning.
    package, helpers = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp._ctypes_extensions")
    helpers.load_shared_library = lambda name, base: ctypes.CDLL(str(base / f"lib{name}.so"))
    helpers.ctypes_function_for_shared_library = function_of
    helpers.byref = ctypes.byref
    sys.modules.update({"llama_cpp": package, "llama_cpp._ctypes_extensions": helpers})
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    spec = importlib.util.spec_from_file_location("llama_cpp.llama_cpp", folder / "llama_cpp.py")
    llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama)

    log = []

    def keep(_level, text, _data):
        log.append(text.decode("utf-8", "replace"))

    llama.kept_callback = llama.llama_log_callback(keep)  # must outlive the library
    llama.llama_log_set(llama.kept_callback, ctypes.c_void_p(0))
    ggml = ctypes.CDLL(str(folder / "libggml.so"))
    # Picks the library that was built for this processor.
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama.llama_backend_init()
    return llama, log


class Sequence:
    """A model with a context for one sequence."""

    def __init__(self, llama, log, arguments, context_tokens):
        self.llama = llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(arguments.model.encode(), params)
        if not self.model:
            sys.exit(f"error: llama.cpp failed to load `{arguments.model}`:\n{''.join(log[-8:])}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context_tokens, BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = arguments.threads
        params.flash_attn_type = arguments.flash_attention
        params.no_perf = True
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"error: llama.cpp failed to make a context:\n{''.join(log[-8:])}")
        self.memory = llama.llama_get_memory(self.context)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.vocab_size = llama.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text):
        tokens = (self.llama.llama_token * (len(text) + 16))()
        count = self.llama.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), True, True)
        if count < 0:
            sys.exit("error: llama.cpp failed to tokenize the text")
        return list(tokens[:count])

    def clear(self):
        self.llama.llama_memory_clear(self.memory, True)

    def forget_from(self, position):
        self.llama.llama_memory_seq_rm(self.memory, 0, position, -1)

    def read(self, tokens):
        """Gives tokens to the model, at the positions that follow; logits are made for the last one. Seconds."""
        parts = []
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[start : start + BATCH_TOKENS]
            parts.append((self.llama.llama_token * len(part))(*part))
        started = time.perf_counter()
        for part in parts:
            status = self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(part, len(part)))
            if status != 0:
                sys.exit(f"error: llama.cpp failed to compute (status {status})")
        self.llama.llama_synchronize(self.context)
        return time.perf_counter() - started

    def most_probable(self):
        logits = self.llama.llama_get_logits_ith(self.context, -1)[: self.vocab_size]
        return logits.index(max(logits))

    def generate(self, count):
        """Seconds that each of `count` greedy tokens takes."""
        return [self.read([self.most_probable()]) for _ in range(count)]


def measure(arguments):
    llama, log = load_library(arguments.libraries.resolve())
    backend = next((line.split("libggml-cpu-")[1].split(".so")[0] for line in log if "libggml-cpu-" in line), "unknown")
    contexts, prefill = numbers(arguments.contexts), numbers(arguments.prefill)
    lengths = sorted({*contexts, *prefill})
    sequence = Sequence(llama, log, arguments, max(lengths) + WARM_UP_TOKENS + arguments.new_tokens)
    tokens = sequence.tokenize(arguments.text.read_bytes())
    if len(tokens) < lengths[-1]:
        sys.exit(f"error: the text has {len(tokens)} tokens, not {lengths[-1]}")
    sequence.read(tokens[:MICRO_BATCH_TOKENS][: lengths[-1]])
    rows = []

    def add(work, context, seconds):
        row = {"work": work, "context": context, "threads": arguments.threads, "kv_dtype": "f16"}
        setting = f"llama.cpp, flash attention {'on' if arguments.flash_attention else 'off'}"
        rows.append({**row, "setting": setting, "tokens_per_s": 1 / seconds, "backend": backend})

    for length in lengths:
        sequence.clear()
        seconds = sequence.read(tokens[:length])
        if length in prefill:
            add("prefill", length, seconds / length)
        if length in contexts:
            sequence.generate(WARM_UP_TOKENS)
            sequence.forget_from(length)
            # The text goes on as the warm-up ended: which tokens they are makes no difference to the work.
            add("decode", length, statistics.median(sequence.generate(arguments.new_tokens)))
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def table(arguments):
    rows = [row for path in arguments.files for row in json.loads(path.read_text())]
    speeds = {}
    for row in rows:
        key = (row["threads"], row["work"], row["context"], f"{row['setting']}:{row['kv_dtype']}")
        speeds.setdefault(key, []).append(row["tokens_per_s"])
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    caches = arguments.caches.split(",")
    rounds = max(len(values) for values in speeds.values())
    backend = next(row["backend"] for row in rows if "backend" in row)
    print(f"llama.cpp {arguments.version}, CPU library `{backend}`; {machine()}")
    for threads in sorted({row["threads"] for row in rows}):
        plural = "s" if threads > 1 else ""
        print(f"\n{threads} thread{plural}, tokens/s, median over rounds ({rounds}); in brackets, the ratio to llama.cpp\n")
        print("| work | llama.cpp | " + " | ".join(cache.replace(":", ", ") for cache in caches) + " |")
        print("|---|---|" + "---|" * len(caches))
        for work, context in sorted({(row["work"], row["context"]) for row in rows}):
            case = {key[3]: value for key, value in medians.items() if key[:3] == (threads, work, context)}
            peers = {name: value for name, value in case.items() if name.startswith("llama.cpp")}
            best = max(peers, key=peers.get)
            flash = "on" if "attention on" in best else "off"
            cells = [f"{peers[best]:.1f} (flash attention {flash})"]
            for cache in caches:
                value = case.get(cache)
                cells.append("" if value is None else f"{value:.1f} ({value / peers[best]:.2f})")
            name = f"decode after {context}" if work == "decode" else f"prefill of {context}"
            print(f"| {name} | " + " | ".join(cells) + " |")


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores"


def numbers(text):
    return [int(number) for number in text.split(",") if number]


parser = argparse.ArgumentParser(description=__doc__)
commands = parser.add_subparsers(required=True)
command = commands.add_parser("measure")
command.set_defaults(run=measure)
command.add_argument("--libraries", type=pathlib.Path, required=True, help="folder of llama.cpp's libraries and llama_cpp.py")
command.add_argument("--model", required=True)
command.add_argument("--text", type=pathlib.Path, required=True)
command.add_argument("--threads", type=int, required=True)
command.add_argument("--flash-attention", type=int, choices=(0, 1), required=True)
command.add_argument("--contexts", default="", help="prompt lengths after which decoding is timed, as 32,2048")
command.add_argument("--prefill", default="", help="prompt lengths whose prefill is timed")
command.add_argument("--new-tokens", type=int, default=16)
command.add_argument("--json", type=pathlib.Path, required=True)
command = commands.add_parser("table")
command.set_defaults(run=table)
command.add_argument("--caches", required=True, help="columns, as full:f16,configs/fastgen.json:f16")
command.add_argument("--version", default="", help="of llama.cpp")
command.add_argument("files", type=pathlib.Path, nargs="+")
arguments = parser.parse_args()
arguments.run(arguments)
