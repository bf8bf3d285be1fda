#!/usr/bin/env python3
"""Kept positions of this program's methods beside those of kvpress; see compare_kvpress.sh, which calls this.

The GGUF's weights are widened to f32 and saved once in Hugging Face's layout, so that both sides multiply the same
numbers. The prompt is the beginning of a text; its token ids come from this program's report and are given to
transformers as they are. Of kvpress the kept positions are taken where they are chosen: the presses' scores are
recorded, and which rows they gather (or mask, where heads keep different numbers of rows) follows from them.

What is random in kvpress gets this program's numbers, and what it reads from a data set is taken from the prompt.
Methods that kvpress does not have are written down here as presses of a few lines, after their formulas.
"""

import argparse
import json
import math
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from kvpress import (
    AdaKVPress,
    CapPress,
    CompactorPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    PyramidKVPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import duo_attention_press
from kvpress.presses.leverage_press import LeverageScorePress
from kvpress.utils import get_prerope_query_states
from safetensors.numpy import save_file
from kvpress.presses import kvzip_press
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

WINDOW, KERNEL = 64, 5


def last_rows(module, hidden_states, keys, kwargs):
    """Attention weights of the last rows, `[1, query heads, rows, keys]`."""
    queries = get_prerope_query_states(module, hidden_states[:, -WINDOW:])
    cos, sin = (part[:, -WINDOW:].unsqueeze(1) for part in kwargs["position_embeddings"])
    queries = queries * cos + rotate_half(queries) * sin
    weights = queries @ repeat_kv(keys, queries.shape[1] // keys.shape[1]).transpose(2, 3) / math.sqrt(module.head_dim)
    weights += torch.triu(torch.full_like(weights, -torch.inf), diagonal=keys.shape[2] - WINDOW + 1)
    return weights.softmax(-1)


class DropKV(ScorerPress):
    """What the last rows' attention would lose by each key alone: (p / (1 - p))^2 |v - o|^2 (kvpress's pull request 285)."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        groups = module.config.num_attention_heads // keys.shape[1]
        weights, values = last_rows(module, hidden_states, keys, kwargs), repeat_kv(values, groups)
        distances = torch.cdist((weights @ values).double(), values.double()).square()
        changes = ((weights / (1 - weights).clamp_min(1e-6)) ** 2 * distances).sum(2)[..., :-WINDOW]
        changes = torch.nn.functional.avg_pool1d(changes.float(), KERNEL, stride=1, padding=KERNEL // 2)
        changes = changes.view(1, keys.shape[1], groups, -1).mean(2)
        return torch.nn.functional.pad(changes, (0, WINDOW), value=changes.max().item() + 1)


class LaProx(ScorerPress):
    """The length of what each key of a KV head adds to the layer's output of the last rows (after arXiv 2605.07234)."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        kv_heads, dim = keys.shape[1], module.head_dim
        weights = last_rows(module, hidden_states, keys, kwargs)[0].unflatten(0, (kv_heads, -1))
        parts = module.o_proj.weight.view(module.o_proj.out_features, kv_heads, -1, dim)
        made = torch.einsum("kjd,okgd->kgjo", values[0], parts)
        added = [torch.einsum("grj,gjo->rjo", *head).square().sum((0, 2)).sqrt() for head in zip(weights, made)]
        scores = torch.stack(added)[None]
        scores[..., -WINDOW:] = torch.inf
        return scores


PRESSES = {
    "streaming_llm": StreamingLLMPress,
    "tova": TOVAPress,
    "snapkv": SnapKVPress,
    "pyramidkv": PyramidKVPress,
    "adakv": lambda compression_ratio: AdaKVPress(SnapKVPress(compression_ratio=compression_ratio)),
    "criticalkv": lambda compression_ratio: CriticalKVPress(SnapKVPress(compression_ratio=compression_ratio)),
    "criticaladakv": lambda compression_ratio: CriticalAdaKVPress(SnapKVPress(compression_ratio=compression_ratio)),
    "dropkv": DropKV,
    "laprox": LaProx,
    "expected_attention": ExpectedAttentionPress,
    "expected_attention_authors": lambda compression_ratio: AdaKVPress(
        ExpectedAttentionPress(compression_ratio=compression_ratio, epsilon=0.01)
    ),
    "capkv": CapPress,
    "compactor": CompactorPress,
    "duo_attention": lambda compression_ratio: DuoAttentionPress(
        head_compression_ratio=compression_ratio, on_the_fly_scoring=True
    ),
    "key_norm": KnormPress,
    "keydiff": KeyDiffPress,
    "keydiff_layer": lambda compression_ratio: AdaKVPress(KeyDiffPress(compression_ratio=compression_ratio)),
}
# What is not a method of its own.
CONFIGS = {
    "expected_attention_authors": {"method": "expected_attention", "epsilon": 0.01, "budget_over": "layer"},
    "keydiff_layer": {"method": "keydiff", "budget_over": "layer"},
}
# Of one list of scores for all layers.
POOLED = ["laprox"]
# Not what kvpress has, or of no use for a short prompt.
NOT_GOLDEN = ["dropkv", "laprox", "duo_attention"]

# Methods that run the model a second time, and so are compared in a way of their own.
REPEATING = {
    "kvzip": lambda compression_ratio: KVzipPress(compression_ratio=compression_ratio),
    "kvzip_plus": lambda compression_ratio: KVzipPress(compression_ratio=compression_ratio, kvzip_plus_normalization=True),
}

# What a repetition is asked for with, as our tokenizer's ids of them are wanted.
FROM_START = "\n\nRepeat the previous context exactly."
FROM_WORDS = "\n\nRepeat the part of the previous context exactly, starting with"

# Hugging Face's names of a block's tensors.
TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True, help="this program")
    parser.add_argument("--model", type=Path, required=True, help="LLaMA model as GGUF, or a folder in HF's layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights, prompt and reports")
    parser.add_argument("--text", type=Path, required=True, help="text that the prompt is the beginning of")
    parser.add_argument("--tokens", type=int, default=500, help="length of the prompt, about")
    parser.add_argument("--kept-ratio", type=float, default=0.5)
    parser.add_argument("--methods", help="comma-separated; default all, with --golden those that run the model once")
    parser.add_argument("--repeat-chunk", type=int, default=2048, help="tokens that `kvzip` repeats at a time")
    parser.add_argument("--turn", default="<|im_end|>\\n<|im_start|>assistant\\n", help="the chat template's turn change")
    parser.add_argument("--golden", type=Path, help="only write what kvpress keeps to this file; --model is a folder")
    args = parser.parse_args()
    args.methods = args.methods or ",".join(PRESSES if args.golden else [*PRESSES, *REPEATING])
    return args


def export(gguf, folder):
    """Writes a GGUF's weights as f32 safetensors with a config.json, unless they are there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf)

    def field(key):
        field = reader.fields.get(f"llama.{key}")
        return None if field is None else field.parts[field.data[0]][0].item()

    heads = field("attention.head_count")
    kv_heads = field("attention.head_count_kv") or heads

    def to_halves(weight, heads):
        # GGUF rotates neighbours, Hugging Face the halves of a head.
        rows = weight.shape[0] // heads
        return weight.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)

    weights = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                weight = to_halves(weight, heads if parts[2] == "attn_q" else kv_heads)
            name = f"model.layers.{parts[1]}.{TENSORS[parts[2]]}.weight"
        else:
            names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            name = f"{names[parts[0]]}.weight"
        weights[name] = np.ascontiguousarray(weight)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = LlamaConfig(
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def ours(args, method, prompt, kept_ratio=None):
    """Runs this program; its report."""
    report = args.work / f"{method}.json"
    config = args.work / f"{method}.config.json"
    settings = CONFIGS.get(method, {"method": method}) | {"kept_ratio": kept_ratio or args.kept_ratio}
    if method in REPEATING:
        settings["repeat_chunk"] = args.repeat_chunk
    config.write_text(json.dumps(settings))
    command = [args.binary, "generate", "--model", args.model, "--prompt-file", prompt, "--max-new-tokens", "1"]
    command += ["--dtype", "f32", "--kv-dtype", "f32", "--config", config, "--quiet"]
    command += ["--report", report, "--report-positions", "--log-file", args.work / "compare.log"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


def make_prompt(args):
    """A file with about so many tokens of the text."""
    text = args.text.read_text(encoding="utf-8")
    prompt = args.work / "prompt.txt"
    size = args.tokens * 8
    while True:
        prompt.write_text(text[:size], encoding="utf-8")
        tokens = len(ours(args, "key_norm", prompt)["prompt_tokens"])
        if abs(tokens - args.tokens) <= max(1, args.tokens // 100):
            return prompt
        size += round((args.tokens - tokens) * size / tokens)


def sketch(module, dim, size):
    """This program's normally distributed numbers for the heads of a layer, `[1, heads, dim, size]` (SplitMix64, Box-Muller)."""

    def mix(numbers):
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))

    heads = module.config.num_key_value_heads
    first = np.arange(heads, dtype=np.uint64) + np.uint64(module.layer_idx * heads)
    bits = mix(mix(first)[:, None] + np.arange(2 * dim * size, dtype=np.uint64)[None])
    uniform = (bits >> np.uint64(40)).astype(np.float64) / 2**24
    normal = np.sqrt(-2 * np.log1p(-uniform[:, ::2])) * np.cos(2 * np.pi * uniform[:, 1::2])
    # This program rotates pairs of neighbours, as the file has them, transformers the two halves.
    normal = normal.reshape(1, heads, dim // 2, 2, size).swapaxes(2, 3).reshape(1, heads, dim, size)
    return torch.tensor(normal.astype(np.float32))


def patch(ids):
    """Gives kvpress's presses this program's random numbers, and the prompt in place of a data set."""
    score = LeverageScorePress.score

    def sketched_score(self, module, *args, **kwargs):
        with mock.patch.object(torch, "randn", lambda batch, heads, dim, size, **_: sketch(module, dim, size)):
            return score(self, module, *args, **kwargs)

    class Prompt(dict):
        def to(self, _):
            return self

    tokenizer = mock.Mock(return_value=Prompt(input_ids=torch.tensor([ids])))
    samples = {"chapter": mock.Mock(tolist=lambda: ["the prompt"])}
    data = mock.Mock(to_pandas=lambda: mock.Mock(sample=lambda *_, **__: samples))
    duo_attention_press.AutoTokenizer = mock.Mock(from_pretrained=lambda _: tokenizer)
    duo_attention_press.load_dataset = lambda *_, **__: data
    duo_attention_press.cache.clear()
    return mock.patch.object(LeverageScorePress, "score", sketched_score)


def theirs(model, ids, press):
    """What a press keeps: positions and scores, `[layer][kv_head]`."""
    kept, scores = {}, {}
    scorer = press.press if isinstance(press, (AdaKVPress, CriticalAdaKVPress)) else press
    score, compress = getattr(scorer, "score", None), press.compress

    def recorded_score(module, *rest):
        result = score(module, *rest)
        scores[module.layer_idx] = result[0].clone().numpy()
        return result

    def recorded_compress(module, hidden_states, keys, values, attentions, kwargs):
        # Position numbers in place of values, and scores of the true ones: what is gathered shows where it was.
        new_keys, new_values = compress(module, hidden_states, keys, values, attentions, kwargs)
        length = keys.shape[2]
        if isinstance(press, (AdaKVPress, CriticalAdaKVPress, DuoAttentionPress)):
            _, heads, positions = module.masked_key_indices
            mask = torch.ones(keys.shape[1], length, dtype=torch.bool)
            mask[heads, positions] = False
            kept[module.layer_idx] = [torch.nonzero(row).flatten().tolist() for row in mask]
            module.masked_key_indices = None
        else:
            rows = [{row.tobytes(): at for at, row in enumerate(head.numpy())} for head in keys[0]]
            found = [[at[row.tobytes()] for row in head.numpy()] for at, head in zip(rows, new_keys[0])]
            kept[module.layer_idx] = [sorted(head) for head in found]
        return keys, values

    press.compress = recorded_compress
    if score:
        scorer.score = recorded_score
    with torch.no_grad(), patch(ids), press(model):
        model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1)
    layers = range(model.config.num_hidden_layers)
    if not score:
        scores = {layer: np.zeros((len(kept[layer]), len(ids))) for layer in layers}
    return [kept[layer] for layer in layers], [scores[layer] for layer in layers]


class Words:
    """Stands for a tokenizer, whose ids of what asks for a repetition are known."""

    chat_template = None

    def __init__(self, ids):
        self.ids = ids

    def encode(self, text, **_):
        return torch.tensor([self.ids[text]], dtype=torch.long)


def words(args):
    """This program's ids of what asks for a repetition: plain text and, behind it, the turn of the chat template."""
    if args.golden:
        return {"": [], FROM_START: [500, 501, 502, 503], FROM_WORDS: [600, 601, 602], "\n": [700, 701]}
    file = args.work / "words.txt"

    def encode(text):
        file.write_text(text, encoding="utf-8")
        return ours(args, "key_norm", file)["prompt_tokens"]

    turn = args.turn.encode().decode("unicode_escape")
    return {"": [], FROM_START: encode(FROM_START), FROM_WORDS: encode(FROM_WORDS), "\n": encode(turn)}


def repeated(model, ids, press, chunk, words):
    """What KVzip keeps: positions and scores, `[layer][kv_head]`."""
    kvzip_press.AutoTokenizer.from_pretrained = lambda *_, **__: Words(words)
    prepare, found = press.prepare, {}

    def finish(model):
        # kvpress means to keep the sinks, and does where a chat's prefix stands before the text.
        press.score_val[..., : press.n_sink] = torch.inf
        found["scores"] = press.score_val.clone()
        KVzipPress.compress_post(press, model)

    press.prepare = lambda model, tokenizer: prepare(model, tokenizer, chunk_size=chunk)
    press.compress_post = finish
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with torch.no_grad(), press(model):
        model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1)
    kept = []
    for layer in model.model.layers:
        _, heads, positions = layer.self_attn.masked_key_indices
        layer.self_attn.masked_key_indices = None
        mask = torch.ones(model.config.num_key_value_heads, len(ids), dtype=torch.bool)
        mask[heads, positions] = False
        kept.append([torch.nonzero(row).flatten().tolist() for row in mask])
    return kept, [layer[0].numpy() for layer in found["scores"]]


def peer(args, model, method, ids):
    """What kvpress keeps with the press of a method, and its scores."""
    if method in REPEATING:
        # It rounds what is removed down.
        press_of = REPEATING[method](compression_ratio=1 - args.kept_ratio + 1e-9)
        return repeated(model, ids, press_of, args.repeat_chunk, words(args))
    return theirs(model, ids, press(method, args.kept_ratio))


def pooled(scores, kept_ratio):
    """The best scores of all layers and heads together, `[layer][kv_head]` positions."""
    shape = np.shape(scores)
    room = math.floor(kept_ratio * np.size(scores) + 1e-9)
    best = np.argsort(-np.ravel(scores), kind="stable")[:room]
    mask = np.zeros(np.size(scores), dtype=bool)
    mask[best] = True
    return [[np.nonzero(head)[0].tolist() for head in layer] for layer in mask.reshape(shape)]


def press(method, kept_ratio):
    # kvpress takes the part to remove, and rounds what is kept down: nudged, so that 1 - 0.7 does not lose a position.
    # The pyramid is rounded to the nearest.
    nudge = 0 if method == "pyramidkv" else 1e-9
    return PRESSES[method](compression_ratio=1 - kept_ratio - nudge)


def write_golden(args, model):
    """What kvpress keeps of a prompt of made-up ids, with the smallest gaps between scores that were decided on."""
    ids = [(index * index * 31 + index * 17 + 5) % model.config.vocab_size for index in range(args.tokens)]
    golden = {"made_by": "scripts/compare_kvpress.py --golden, kvpress 0.5.4", "kept_ratio": args.kept_ratio}
    golden |= {"prompt_tokens": ids, "settings": CONFIGS, "methods": {}}
    if any(method in REPEATING for method in args.methods.split(",")):
        said = words(args)
        names = {"from_start": FROM_START, "from_words": FROM_WORDS, "turn": "\n"}
        golden |= {"repeat_chunk": args.repeat_chunk, "words": {name: said[text] for name, text in names.items()}}
    for method in [method for method in args.methods.split(",") if method not in NOT_GOLDEN]:
        kept, scores = peer(args, model, method, ids)
        golden["methods"][method] = kept
        for layer, (heads, layer_scores) in enumerate(zip(kept, scores)):
            for head, (positions, head_scores) in enumerate(zip(heads, layer_scores)):
                lost = np.delete(head_scores, positions)
                if len(lost):
                    gap = (head_scores[positions].min() - lost.max()) / abs(lost.max() or 1)
                    print(f"{method}, layer {layer}, head {head}: gap {gap:.1e}")
    args.golden.parent.mkdir(parents=True, exist_ok=True)
    args.golden.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def compare(layers, kept, scores):
    """How many heads agree, how many positions do not, and the largest relative distance of scores decided otherwise."""
    equal = heads = different = positions = 0
    distance, notes = 0.0, []
    for layer, (mine, theirs, layer_scores) in enumerate(zip(layers, kept, scores)):
        for head, (mine, theirs, head_scores) in enumerate(zip(mine["heads"], theirs, layer_scores)):
            mine, theirs = set(mine["positions"]), set(theirs)
            heads += 1
            positions += len(theirs)
            equal += mine == theirs
            only_mine, only_theirs = sorted(mine - theirs), sorted(theirs - mine)
            different += len(only_theirs)
            if mine == theirs:
                continue
            if only_mine and only_theirs:
                best, worst = head_scores[only_mine].min(), head_scores[only_theirs].max()
                gap = abs(worst - best) / abs(worst)
                distance = max(distance, gap)
                change = f"{only_theirs[:8]} -> {only_mine[:8]}, scores {worst:.7g} -> {best:.7g}"
                notes.append(f"layer {layer} head {head}: {change}")
            else:
                notes.append(f"layer {layer} head {head}: only theirs {only_theirs[:8]}, only ours {only_mine[:8]}")
    return equal, heads, different, positions, distance, notes


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.model
    if args.model.is_file():
        folder = args.work / f"{args.model.stem}-f32"
        export(args.model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    if args.golden:
        write_golden(args, model)
        return
    prompt = make_prompt(args)
    print(f"{'method':<20}{'equal heads':>14}{'other positions':>18}{'largest distance':>19}")
    remarks = []
    for method in args.methods.split(","):
        report = ours(args, method, prompt)
        ids = report["prompt_tokens"]
        kept, scores = peer(args, model, method, ids)
        if method in POOLED:
            kept = pooled(scores, args.kept_ratio)
        if method == "duo_attention":
            # A share of heads, not of positions: as many positions as that comes to.
            positions = sum(len(head) for layer in kept for head in layer)
            everything = len(ids) * sum(len(layer) for layer in kept)
            report = ours(args, method, prompt, (positions + 0.5) / everything)
        equal, heads, different, positions, distance, notes = compare(report["layers"], kept, scores)
        print(f"{method:<20}{equal:>7} of {heads:<4}{different:>9} of {positions:<6}{distance:>19.1e}", flush=True)
        remarks += [f"{method}, {note}" for note in notes]
    print(f"prompt of {len(ids)} tokens")
    print(*remarks[:20], sep="\n")


if __name__ == "__main__":
    main()
