"""What compare_peers.sh needs Python for: timing llama.cpp, mistral.rs and ik_llama.cpp, and the table of all runs.

llama.cpp is called through the declarations of llama-cpp-python (llama_cpp.py) and nothing else of that package, so that
no Python lies between two tokens but the choice of the next, which is not timed. mistral.rs says itself how long it took
for the prompt and for the tokens after it; ik_llama.cpp is timed by its own `llama-bench`, on tokens of its choice.

Each `measure-*` writes rows as `adaptive-kvcache bench --json` does: work, context, threads, setting, kv_dtype,
tokens_per_s, and peak_rss_bytes, which is the peak of the whole process here.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
import types

# Prompt tokens that a batch holds: llama.cpp's own defaults for its command line tools.
BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512
# Numbers of a cache, as ggml numbers them.
GGML_TYPES = {"f16": 1, "q8_0": 8}
# Tokens decoded before those that are timed, and the most of a prompt that is read before those that are.
WARM_UP_TOKENS, WARM_UP_PROMPT = 4, 512


class Rows:
    """What a peer's run has measured."""

    def __init__(self, arguments, setting):
        self.arguments, self.setting, self.rows = arguments, setting, []
        self.contexts, self.prefill = numbers(arguments.contexts), numbers(arguments.prefill)
        self.lengths = sorted({*self.contexts, *self.prefill})

    def add(self, work, context, tokens_per_s):
        row = {"work": work, "context": context, "threads": self.arguments.threads}
        row |= {"kv_dtype": getattr(self.arguments, "kv_dtype", "f16"), "past": getattr(self.arguments, "past", 0)}
        self.rows.append({**row, "setting": self.setting, "tokens_per_s": tokens_per_s})

    def save(self, peak_rss_bytes, version):
        common = {"peak_rss_bytes": peak_rss_bytes, "version": version}
        self.arguments.json.write_text(json.dumps([{**row, **common} for row in self.rows], indent=2) + "\n")


def peak_rss_bytes(who=resource.RUSAGE_SELF):
    """The most that was resident, of this process or of the children that have ended."""
    return resource.getrusage(who).ru_maxrss * 1024


def load_library(folder, processor):
    """The declarations of llama.cpp's functions, over the libraries in `folder`, and what was logged meanwhile.

    `processor` names the one of its CPU libraries to use, as haswell; empty, it chooses itself.
    """

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
    load, path = ggml.ggml_backend_load_all_from_path, folder  # picks the library that was built for this processor
    if processor:
        load, path = ggml.ggml_backend_load, folder / f"libggml-cpu-{processor}.so"
        if not path.exists():
            sys.exit(f"error: llama.cpp has no `{path}`")
    load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
    load(str(path).encode())
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
        params.type_k = params.type_v = GGML_TYPES[getattr(arguments, "kv_dtype", "f16")]
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

    def logits_address(self):
        return ctypes.addressof(self.llama.llama_get_logits_ith(self.context, -1).contents)

    def most_probable(self):
        logits = self.llama.llama_get_logits_ith(self.context, -1)[: self.vocab_size]
        return logits.index(max(logits))

    def generate(self, count):
        """Seconds that each of `count` greedy tokens takes."""
        return [self.read([self.most_probable()]) for _ in range(count)]


def measure_llamacpp(arguments):
    llama, log = load_library(arguments.libraries.resolve(), arguments.processor)
    library = next((line.split("libggml-cpu-")[1].split(".so")[0] for line in log if "libggml-cpu-" in line), arguments.processor)
    measured = Rows(arguments, f"llama.cpp, flash attention {'on' if arguments.flash_attention else 'off'}")
    past, longest = arguments.past, arguments.past + measured.lengths[-1]
    sequence = Sequence(llama, log, arguments, longest + WARM_UP_TOKENS + arguments.new_tokens)
    tokens = repeated(sequence.tokenize(arguments.text.read_bytes()), longest)
    sequence.read(tokens[:WARM_UP_PROMPT])
    sequence.clear()
    if past > 0:
        sequence.read(tokens[:past])
    for length in measured.lengths:
        sequence.forget_from(past)
        seconds = sequence.read(tokens[past : past + length])
        if length in measured.prefill:
            measured.add("prefill", length, length / seconds)
        if length in measured.contexts:
            sequence.generate(WARM_UP_TOKENS)
            sequence.forget_from(past + length)
            # The text goes on as the warm-up ended: which tokens they are makes no difference to the work.
            measured.add("decode", length, 1 / statistics.median(sequence.generate(arguments.new_tokens)))
    version = next(arguments.libraries.glob("libllama.v*.so")).stem.split(".v")[1]
    numbers = "" if arguments.kv_dtype == "f16" else f", {arguments.kv_dtype} cache"
    measured.save(peak_rss_bytes(), f"llama.cpp {version} (CPU library `{library or 'unknown'}`{numbers})")


def measure_mistralrs(arguments):
    import mistralrs

    measured = Rows(arguments, "mistral.rs")
    folder, file = os.path.split(os.path.abspath(arguments.model))
    which = mistralrs.Which.GGUF(quantized_model_id=folder, quantized_filename=file)
    runner = mistralrs.Runner(which=which, prefix_cache_n=0)
    tokenize = lambda text: runner.tokenize_text(text, True, None)

    def usage(prompt, new_tokens):
        options = {"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
        usage = runner.send_completion_request(mistralrs.CompletionRequest(prompt=prompt, model="", **options)).usage
        if usage.completion_tokens != new_tokens:
            sys.exit(f"error: mistral.rs made {usage.completion_tokens} tokens, not {new_tokens}")
        return usage

    text = arguments.text.read_text()
    usage(prompt_of(tokenize, text, min(WARM_UP_PROMPT, measured.lengths[-1])), 1 + WARM_UP_TOKENS)
    for length in measured.lengths:
        prompt = prompt_of(tokenize, text, length)
        # The first token is the prompt's.
        spent = usage(prompt, 1 + arguments.new_tokens if length in measured.contexts else 1)
        if spent.prompt_tokens != length:
            sys.exit(f"error: mistral.rs read {spent.prompt_tokens} tokens, not {length}")
        if length in measured.prefill:
            measured.add("prefill", length, length / spent.total_prompt_time_sec)
        if length in measured.contexts:
            measured.add("decode", length, arguments.new_tokens / spent.total_completion_time_sec)
    measured.save(peak_rss_bytes(), f"mistral.rs {importlib.metadata.version('mistralrs')}")


def measure_ik(arguments):
    measured = Rows(arguments, "ik_llama.cpp")
    # One prompt more than asked for: it warms up by a single token itself.
    warm_up = min(WARM_UP_PROMPT, measured.lengths[-1]) - 1
    lengths = [warm_up, *measured.prefill]
    command = [arguments.bench, "-m", arguments.model, "-t", str(arguments.threads), "-r", "1", "-o", "json"]
    command += ["-n", "0", "-p", ",".join(map(str, lengths))]
    for length in measured.contexts:
        command += ["-gp", f"{length},{arguments.new_tokens}"]
    ran = subprocess.run(command, stdout=subprocess.PIPE)
    if ran.returncode != 0:
        sys.exit(f"error: `{' '.join(command)}` failed (status {ran.returncode})")
    tests = json.loads(ran.stdout)
    for test in tests:
        length = test["n_prompt"]
        if test["n_gen"]:
            measured.add("decode", length, test["avg_ts"])
        elif length in measured.prefill:
            measured.add("prefill", length, test["avg_ts"])
    if len(measured.rows) != len(measured.contexts) + len(measured.prefill):
        sys.exit(f"error: `{' '.join(command)}` printed {len(tests)} tests, not what was asked for")
    measured.save(peak_rss_bytes(resource.RUSAGE_CHILDREN), f"ik_llama.cpp {tests[0]['build_commit']}")


def repeated(tokens, count):
    return (tokens * -(-count // len(tokens)))[:count]


def prompt_of(tokenize, text, count):
    """The first characters of the text, repeated if it is short, that are `count` tokens."""
    while len(tokenize(text)) < count:
        text += text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if len(tokenize(text[:middle])) < count else (low, middle)
    # A character more can be a token less, where it completes a word.
    for end in range(low, len(text)):
        if len(tokenize(text[:end])) == count:
            return text[:end]
    sys.exit(f"error: no part of the text has {count} tokens")


def table(arguments):
    rows = [row for path in arguments.files for row in json.loads(path.read_text())]
    speeds, peaks = {}, {}
    for row in rows:
        column = f"{row['setting']}:{row['kv_dtype']}"
        speeds.setdefault((row["threads"], row["work"], (row["context"], row.get("past", 0)), column), []).append(row["tokens_per_s"])
        peaks.setdefault((row["threads"], column), []).append(row["peak_rss_bytes"])
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    caches, others = arguments.caches.split(","), [peer for peer in arguments.peers.split(",") if peer not in ("", "llama.cpp")]
    rounds = max(len(values) for values in speeds.values())
    versions = [row["version"] for row in rows if "version" in row]
    print("; ".join([*dict.fromkeys(versions), machine()]))
    for threads in sorted({row["threads"] for row in rows}):
        plural = "s" if threads > 1 else ""
        print(f"\n{threads} thread{plural}, tokens/s, median over rounds ({rounds}); in brackets, the ratio to llama.cpp\n")
        columns = ["work", "llama.cpp", *(cache.replace(":", ", ") for cache in caches), *others, "ours to the fastest peer"]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for work, (context, past) in sorted({key[1:3] for key in medians if key[0] == threads}):
            case = {key[3]: value for key, value in medians.items() if key[:3] == (threads, work, (context, past))}
            cells = table_cells(case, caches, others)
            behind = f" behind {past}" if past else ""
            print(f"| {'decode after' if work == 'decode' else 'prefill of'} {context}{behind} | " + " | ".join(cells) + " |")
        most = {column: max(values) for (count, column), values in peaks.items() if count == threads}
        print("| peak MB | " + " | ".join(peak_cells(most, caches, others)) + " |")


def table_cells(case, caches, others):
    """A row: tokens/s of llama.cpp's better setting, of our caches, of other peers, and ours to the fastest peer."""
    reference = max((name for name in case if name.startswith("llama.cpp")), key=case.get, default=None)

    def cell(value):
        if value is None:
            return ""
        return f"{value:.1f} ({value / case[reference]:.2f})" if reference else f"{value:.1f}"

    cells = ["" if reference is None else f"{case[reference]:.1f} (flash attention {reference.split()[-1].split(':')[0]})"]
    cells += [cell(case.get(name)) for name in [*caches, *(f"{peer}:f16" for peer in others)]]
    peers = {name.split(":")[0].split(",")[0]: case[name] for name in case if name not in caches and name != reference}
    if reference:
        peers["llama.cpp"] = case[reference]
    if not peers or caches[0] not in case:
        return [*cells, ""]
    fastest = max(peers, key=peers.get)
    return [*cells, f"{case[caches[0]] / peers[fastest]:.2f} ({fastest})"]


def peak_cells(most, caches, others):
    """The last row: the most that was resident in any round and at any length, in MB (2^20 bytes), mapped weights included.

    Of llama.cpp, that of the setting which needs less.
    """
    llamacpp = [value for name, value in most.items() if name.startswith("llama.cpp")]
    values = [min(llamacpp, default=None), *(most.get(name) for name in [*caches, *(f"{peer}:f16" for peer in others)])]
    return [*("" if value is None else f"{value / 2**20:.0f}" for value in values), ""]


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores"


def logits_llamacpp(arguments):
    """Writes the logits after each of some tokens behind a prompt, `[tokens, vocabulary]` f32."""
    llama, log = load_library(arguments.libraries.resolve(), arguments.processor)
    ids = [int(line) for line in arguments.ids.read_text().split()]
    sequence = Sequence(llama, log, arguments, len(ids) + 1)
    sequence.read(ids[: arguments.prompt_tokens])
    with arguments.logits.open("wb") as out:
        for token in ids[arguments.prompt_tokens :]:
            sequence.read([token])
            out.write(bytes((ctypes.c_float * sequence.vocab_size).from_address(sequence.logits_address())))


def state_llamacpp(arguments):
    """Saves the state after some tokens, and times taking it from the file until there are logits of one token more."""
    llama, log = load_library(arguments.libraries.resolve(), arguments.processor)
    ids = [int(line) for line in arguments.ids.read_text().split()]
    sequence = Sequence(llama, log, arguments, len(ids) + 1)
    read, question = ids[:-1], ids[-1:]
    sequence.read(read[:WARM_UP_PROMPT])
    sequence.clear()
    read_seconds = sequence.read(read)
    path, tokens = str(arguments.state).encode(), (llama.llama_token * len(read))(*read)
    started = time.perf_counter()
    if not llama.llama_state_save_file(sequence.context, path, tokens, len(read)):
        sys.exit("error: llama.cpp failed to save its state")
    save_seconds = time.perf_counter() - started
    loads, firsts = [], []
    for _ in range(arguments.loads):
        sequence.clear()
        found, count = (llama.llama_token * len(read))(), ctypes.c_size_t()
        started = time.perf_counter()
        if not llama.llama_state_load_file(sequence.context, path, found, len(read), ctypes.byref(count)):
            sys.exit("error: llama.cpp failed to load its state")
        loads.append(time.perf_counter() - started)
        sequence.read(question)
        firsts.append(time.perf_counter() - started)
    print(json.dumps({
        "tokens": len(read), "bytes": arguments.state.stat().st_size, "read_ms": 1e3 * read_seconds, "save_ms": 1e3 * save_seconds,
        "load_ms": 1e3 * statistics.median(loads), "first_logits_ms": 1e3 * statistics.median(firsts),
    }))


def numbers(text):
    return [int(number) for number in text.split(",") if number]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(required=True)
for name, run in [("llamacpp", measure_llamacpp), ("mistralrs", measure_mistralrs), ("ik", measure_ik)]:
    command = commands.add_parser(f"measure-{name}")
    command.set_defaults(run=run)
    command.add_argument("--model", required=True)
    command.add_argument("--threads", type=int, required=True)
    command.add_argument("--contexts", default="", help="prompt lengths after which decoding is timed, as 32,2048")
    command.add_argument("--prefill", default="", help="prompt lengths whose prefill is timed")
    command.add_argument("--new-tokens", type=int, default=16)
    command.add_argument("--json", type=pathlib.Path, required=True)
    if name == "ik":
        command.add_argument("--bench", required=True, help="its llama-bench")
        continue
    command.add_argument("--text", type=pathlib.Path, required=True)
    if name == "llamacpp":
        command.add_argument("--libraries", type=pathlib.Path, required=True, help="folder of its libraries and llama_cpp.py")
        command.add_argument("--processor", default="", help="the one of its CPU libraries to use, as haswell")
        command.add_argument("--flash-attention", type=int, choices=(0, 1), required=True)
        command.add_argument("--kv-dtype", choices=list(GGML_TYPES), default="f16")
        command.add_argument("--past", type=int, default=0, help="tokens in the cache before what is timed")
for name, run in [("logits", logits_llamacpp), ("state", state_llamacpp)]:
    command = commands.add_parser(f"{name}-llamacpp")
    command.set_defaults(run=run)
    command.add_argument("--model", required=True)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--flash-attention", type=int, choices=(0, 1), default=0)
    command.add_argument("--libraries", type=pathlib.Path, required=True)
    command.add_argument("--processor", default="")
    command.add_argument("--ids", type=pathlib.Path, required=True, help="file of the text's tokens, one a line")
    if name == "state":
        command.add_argument("--state", type=pathlib.Path, required=True, help="file to write")
        command.add_argument("--loads", type=int, default=15)
        continue
    command.add_argument("--prompt-tokens", type=int, required=True, help="how many of them are the prompt")
    command.add_argument("--logits", type=pathlib.Path, required=True, help="file to write")
command = commands.add_parser("table")
command.set_defaults(run=table)
command.add_argument("--caches", required=True, help="our columns, as full:f16,configs/fastgen.json:f16")
command.add_argument("--peers", required=True, help="as llama.cpp,mistral.rs,ik_llama.cpp")
command.add_argument("files", type=pathlib.Path, nargs="+")
arguments = parser.parse_args()
arguments.run(arguments)
