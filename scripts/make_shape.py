#!/usr/bin/env python3
"""Writes a model of any LLaMA shape with random weights, to try sizes, speed, loading and memory without a real one.

    scripts/make_shape.py a.gguf --shape 1.5b --format q4_k_m                # 0.9 GB, Qwen2.5-1.5B's shape
    scripts/make_shape.py b.gguf --shape 7b --format q4_0                    # 3.6 GB, Llama-2-7B's
    scripts/make_shape.py c.gguf --shape 7b --format q4_0 --layers 3 --vocab 3000    # the same matrices, quickly measured
    scripts/make_shape.py d --shape 8b --format f16 --layout safetensors     # 15 GB, a folder in Hugging Face's layout

Weights are normally distributed, such that hidden states and logits keep a sensible size through all layers; the text that
such a model generates means nothing. To be quick, a matrix is made of a thousand runs of 256 weights in random order.
In GGUF, which tensor has which type is what llama.cpp's `llama-quantize` chooses without an importance matrix (q4_k_m has
q6_K tensors, and so on). Blocks are rounded plainly, without its search for the best scales. The tokenizer is that of the
tests (1,000 tokens), filled up with unused ones. Needs nothing but Python's standard library.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, `ggml-common.h` and `llama-quant.cpp` of
https://github.com/ggml-org/llama.cpp, and https://github.com/huggingface/safetensors
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import shutil
import struct
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENIZER = os.path.join(ROOT, "tests/data/fixtures/tokenizer.model")
SHARD_BYTES = 5_000_000_000
ALIGNMENT = 32
RUN = 256  # weights that are made together: one block of the K-quants, eight of the others
POOL = 1024  # different runs of a tensor type and size of weights
CHUNK = 1 << 14  # runs that are written at a time
NORM_EPS = 1e-5
NORMAL = 1  # a SentencePiece token type; mistral.rs needs minutes to load as many of the type for unused tokens
EMBEDDING = 2.0  # the size of logits: embedding and output rows have a norm of this

SIZES = ["layers", "heads", "kv_heads", "head_dim", "hidden", "mlp", "vocab", "context"]
# Sizes in that order, whether the output matrix is the embedding's, and RoPE's base.
SHAPES = {
    "7b": ([32, 32, 32, 128, 4096, 11008, 32_000, 4096], False, 10_000.0),  # Llama-2-7B
    "8b": ([32, 32, 8, 128, 4096, 14336, 128_256, 8192], False, 500_000.0),  # Llama-3-8B
    "1.5b": ([28, 12, 2, 128, 1536, 8960, 151_936, 32_768], True, 1_000_000.0),  # Qwen2.5-1.5B, without its biases
}


# Blocks of the tensor types: 32 or 256 numbers to bytes.


def halves(values):
    """Codes of 4 bits, the first half of the values in the low ones."""
    half = len(values) // 2
    return bytes(low | high << 4 for low, high in zip(values[:half], values[half:]))


def nearest(value, low, high):
    return min(max(round(value), low), high)


def signed(x, largest):
    """Scale and codes of 0..2 * largest, where the number of the largest size becomes code 0."""
    scale = max(x, key=abs) / -largest
    return scale, [min(int(value / scale + largest + 0.5), 2 * largest - 1) for value in x]


def affine(x, largest):
    """Scale, smallest number and codes of 0..=largest."""
    smallest = min(x)
    scale = (max(x) - smallest) / largest
    return scale, smallest, [nearest((value - smallest) / scale, 0, largest) for value in x]


def fifth_bits(codes):
    return struct.pack("<I", sum((code >> 4) << i for i, code in enumerate(codes)))


def q4_0(x):
    scale, codes = signed(x, 8)
    return struct.pack("<e", scale) + halves(codes)


def q4_1(x):
    scale, smallest, codes = affine(x, 15)
    return struct.pack("<ee", scale, smallest) + halves(codes)


def q5_0(x):
    scale, codes = signed(x, 16)
    return struct.pack("<e", scale) + fifth_bits(codes) + halves([code & 15 for code in codes])


def q5_1(x):
    scale, smallest, codes = affine(x, 31)
    return struct.pack("<ee", scale, smallest) + fifth_bits(codes) + halves([code & 15 for code in codes])


def q8_0(x):
    scale = max(map(abs, x)) / 127
    return struct.pack("<e32b", scale, *(round(value / scale) for value in x))


def groups(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def scales_and_codes(x, size, largest, largest_scale):
    """What the affine K-quants share: two scales, a pair of small integers for each group, and codes of 0..=largest."""
    lows = [-min(*part, 0.0) for part in groups(x, size)]
    steps = [(max(part) + low) / largest for part, low in zip(groups(x, size), lows)]
    d, dmin = max(steps) / largest_scale, max(lows) / largest_scale
    pairs = [(nearest(step / d, 1, largest_scale), nearest(low / dmin, 0, largest_scale)) for step, low in zip(steps, lows)]
    codes = []
    for part, (scale, low) in zip(groups(x, size), pairs):
        codes += [nearest((value + dmin * low) / (d * scale), 0, largest) for value in part]
    return struct.pack("<ee", d, dmin), pairs, codes


def signed_scales(x, size, largest, largest_scale):
    """What the symmetric K-quants share: a scale, an integer for each group, and codes of -largest..largest."""
    tops = [max(part, key=abs) / -largest for part in groups(x, size)]
    d = max(tops, key=abs) / -largest_scale
    scales = [nearest(top / d, -largest_scale, largest_scale - 1) or 1 for top in tops]
    codes = []
    for part, scale in zip(groups(x, size), scales):
        codes += [nearest(value / (d * scale), -largest, largest - 1) for value in part]
    return struct.pack("<e", d), scales, codes


def two_bits(codes):
    """Codes of 2 bits: of 128 numbers, a byte holds those 32 apart."""
    return bytes(
        half[i] | half[i + 32] << 2 | half[i + 64] << 4 | half[i + 96] << 6 for half in groups(codes, 128) for i in range(32)
    )


def pairs_of_six_bits(pairs):
    """The 12 bytes of q4_K's and q5_K's scales and minima: low bits of the last four pairs, and their high ones above the first."""
    first, last = pairs[:4], pairs[4:]
    return bytes(
        [scale | (late >> 4) << 6 for (scale, _), (late, _) in zip(first, last)]
        + [low | (late >> 4) << 6 for (_, low), (_, late) in zip(first, last)]
        + [scale & 15 | (low & 15) << 4 for scale, low in last]
    )


def q2_k(x):
    scales, pairs, codes = scales_and_codes(x, 16, 3, 15)
    return bytes(scale | low << 4 for scale, low in pairs) + two_bits(codes) + scales


def q3_k(x):
    d, scales, codes = signed_scales(x, 16, 4, 32)
    codes, scales = [code + 4 for code in codes], [scale + 32 for scale in scales]
    high = bytes(sum((codes[32 * bit + i] >> 2) << bit for bit in range(8)) for i in range(32))
    packed = halves([scale & 15 for scale in scales])
    packed += bytes(sum((scales[4 * part + i] >> 4) << 2 * part for part in range(4)) for i in range(4))
    return high + two_bits([code & 3 for code in codes]) + packed + d


def q4_k(x):
    scales, pairs, codes = scales_and_codes(x, 32, 15, 63)
    return scales + pairs_of_six_bits(pairs) + b"".join(map(halves, groups(codes, 64)))


def q5_k(x):
    scales, pairs, codes = scales_and_codes(x, 32, 31, 63)
    high = bytes(sum((codes[32 * bit + i] >> 4) << bit for bit in range(8)) for i in range(32))
    low = b"".join(halves([code & 15 for code in part]) for part in groups(codes, 64))
    return scales + pairs_of_six_bits(pairs) + high + low


def q6_k(x):
    d, scales, codes = signed_scales(x, 16, 32, 128)
    codes = [code + 32 for code in codes]
    low = b"".join(halves([code & 15 for code in half]) for half in groups(codes, 128))
    return low + two_bits([code >> 4 for code in codes]) + struct.pack("16b", *scales) + d


IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
FP4_VALUES = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]  # in halves


def closest(values, value):
    return min(range(len(values)), key=lambda code: abs(values[code] - value))


def iq4_nl(x):
    scale = max(x, key=abs) / -127
    return struct.pack("<e", scale) + halves([closest(IQ4_VALUES, value / scale) for value in x])


def iq4_xs(x):
    tops = [max(part, key=abs) / -127 for part in groups(x, 32)]
    d = max(tops, key=abs) / -32
    scales = [nearest(top / d, -32, 31) or 1 for top in tops]
    codes = b"".join(
        halves([closest(IQ4_VALUES, value / (d * scale)) for value in part]) for part, scale in zip(groups(x, 32), scales)
    )
    scales = [scale + 32 for scale in scales]
    high = sum((scale >> 4) << 2 * i for i, scale in enumerate(scales))
    low = bytes(even & 15 | (odd & 15) << 4 for even, odd in zip(scales[::2], scales[1::2]))
    return struct.pack("<eH", d, high) + low + codes


def mxfp4(x):
    # The largest number lies in the highest two powers of two that the 4 bits reach.
    exponent = math.frexp(max(map(abs, x)))[1] - 3
    codes = [closest(FP4_VALUES, value / 2.0 ** (exponent - 1)) for value in x]
    return bytes([exponent + 127]) + halves(codes)


def bf16(x):
    # Cut off, not rounded.
    data = struct.pack(f"<{len(x)}f", *x)
    return b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))


def f16(x):
    return struct.pack(f"<{len(x)}e", *x)


def f32(x):
    return struct.pack(f"<{len(x)}f", *x)


# Tensor types: GGUF's number, numbers in a block, bytes of a block, and what makes one.
TYPES = {
    "f32": (0, 1, 4, f32),
    "f16": (1, 1, 2, f16),
    "q4_0": (2, 32, 18, q4_0),
    "q4_1": (3, 32, 20, q4_1),
    "q5_0": (6, 32, 22, q5_0),
    "q5_1": (7, 32, 24, q5_1),
    "q8_0": (8, 32, 34, q8_0),
    "q2_k": (10, 256, 84, q2_k),
    "q3_k": (11, 256, 110, q3_k),
    "q4_k": (12, 256, 144, q4_k),
    "q5_k": (13, 256, 176, q5_k),
    "q6_k": (14, 256, 210, q6_k),
    "iq4_nl": (20, 32, 18, iq4_nl),
    "iq4_xs": (23, 256, 136, iq4_xs),
    "bf16": (30, 1, 2, bf16),
    "mxfp4": (39, 32, 17, mxfp4),
}
# Formats: the type of most tensors, and llama.cpp's number of the file type.
FORMATS = {
    "f32": ("f32", 0),
    "f16": ("f16", 1),
    "bf16": ("bf16", 32),
    "q4_0": ("q4_0", 2),
    "q4_1": ("q4_1", 3),
    "q5_0": ("q5_0", 8),
    "q5_1": ("q5_1", 9),
    "q8_0": ("q8_0", 7),
    "q2_k": ("q2_k", 10),
    "q3_k_s": ("q3_k", 11),
    "q3_k_m": ("q3_k", 12),
    "q3_k_l": ("q3_k", 13),
    "q4_k_s": ("q4_k", 14),
    "q4_k_m": ("q4_k", 15),
    "q5_k_s": ("q5_k", 16),
    "q5_k_m": ("q5_k", 17),
    "q6_k": ("q6_k", 18),
    "iq4_nl": ("iq4_nl", 25),
    "iq4_xs": ("iq4_xs", 30),
    "mxfp4": ("mxfp4", 38),
}
# What takes the place of a K-quant in rows that are no multiple of 256.
FALLBACKS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def tensor_type(args, name, layer, columns):
    """The type that `llama-quantize` gives to a matrix of that name (as attn_v), in that layer."""
    chosen = preferred_type(args, name, layer)
    if columns % TYPES[chosen][1]:
        chosen = FALLBACKS.get(chosen, "f16")
    return chosen if columns % TYPES[chosen][1] == 0 else "f16"


def preferred_type(args, name, layer):
    base, layers = FORMATS[args.format][0], args.layers
    if base in ("f32", "f16", "bf16", "q8_0"):
        return base
    if name == "output" or name == "token_embd" and args.tied:
        return "q8_0" if base == "mxfp4" else "q6_k"
    if base == "mxfp4" and name == "token_embd":
        return "q8_0"
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    many_queries = args.heads // args.kv_heads >= 4
    others = {}  # the format's exceptions
    if args.format == "q2_k":
        others = {"attn_v": "q4_k" if many_queries else "q3_k", "ffn_down": "q3_k", "attn_output": "q3_k"}
    elif args.format == "q3_k_m":
        others = {"attn_v": "q5_k" if layer < 2 else "q4_k", "attn_output": "q4_k"}
        others["ffn_down"] = "q5_k" if layer < layers // 16 else "q4_k"
    elif args.format == "q3_k_l":
        others = {"attn_v": "q5_k", "ffn_down": "q5_k", "attn_output": "q5_k"}
    elif args.format == "q4_k_s":
        others = {"attn_v": "q5_k" if layer < 4 else base, "ffn_down": "q5_k" if layer < layers // 8 else base}
    elif args.format in ("q4_k_m", "q5_k_m") and more_bits:
        others = {"attn_v": "q6_k", "ffn_down": "q6_k"}
    elif args.format in ("iq4_nl", "iq4_xs"):
        others = {"attn_v": "q5_k" if many_queries else base, "ffn_down": "q5_k" if layer < layers // 8 else base}
    chosen = others.get(name, base)
    # llama.cpp's rule for Llama-2-70B and its kind, whose values take an eighth of the place.
    if name == "attn_v" and layers == 80 and args.heads != args.kv_heads and chosen in ("q3_k", "q4_k"):
        return "q5_k"
    return chosen


class Weights:
    """Streams normally distributed weights."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.normal = [[self.random.gauss(0.0, 1.0) for _ in range(RUN)] for _ in range(POOL)]

    @functools.cache
    def pool(self, kind, deviation, count):
        """That many different runs of weights of a type and a standard deviation."""
        _, block, _, encode = TYPES[kind]
        size = RUN if block == 1 else block
        runs = ([deviation * x for x in run] for run in self.normal[:count])
        return [b"".join(map(encode, groups(run, size))) for run in runs]

    def write(self, kind, shape, deviation, write):
        """A matrix; and a norm's vector, whose weights are all 1."""
        count = math.prod(shape)
        if len(shape) == 1:
            write(TYPES[kind][3]([1.0] * count))
            return
        left, pool = tensor_bytes(kind, shape), self.pool(kind, deviation, min(POOL, -(-count // RUN)))
        while left:
            runs = min(CHUNK, -(-left // len(pool[0])))
            data = b"".join(self.random.choices(pool, k=runs))[:left]
            write(data)
            left -= len(data)


def tensor_bytes(kind, shape):
    _, block, size, _ = TYPES[kind]
    return math.prod(shape) // block * size


def tensors(args):
    """Name in GGUF and in Hugging Face's layout, layer, shape and standard deviation of every tensor, in GGUF's order."""
    hidden, mlp, rows = args.hidden, args.mlp, args.heads * args.head_dim
    kept_rows = args.kv_heads * args.head_dim
    embedding = EMBEDDING / math.sqrt(hidden)
    # What a layer adds is scaled down so that the sum over all layers keeps its size.
    added = 1 / math.sqrt(2 * args.layers)
    yield "token_embd", "model.embed_tokens", 0, (args.vocab, hidden), embedding
    for layer in range(args.layers):
        for name, other, shape, scale in [
            ("attn_norm", "input_layernorm", (hidden,), 1.0),
            ("attn_q", "self_attn.q_proj", (rows, hidden), 1.0),
            ("attn_k", "self_attn.k_proj", (kept_rows, hidden), 1.0),
            ("attn_v", "self_attn.v_proj", (kept_rows, hidden), 1.0),
            ("attn_output", "self_attn.o_proj", (hidden, rows), added),
            ("ffn_norm", "post_attention_layernorm", (hidden,), 1.0),
            ("ffn_gate", "mlp.gate_proj", (mlp, hidden), 1.0),
            ("ffn_up", "mlp.up_proj", (mlp, hidden), 1.0),
            ("ffn_down", "mlp.down_proj", (hidden, mlp), added),
        ]:
            deviation = scale / math.sqrt(shape[-1])
            yield f"blk.{layer}.{name}", f"model.layers.{layer}.{other}", layer, shape, deviation
    yield "output_norm", "model.norm", 0, (hidden,), 1.0
    if not args.tied:
        yield "output", "lm_head", 0, (args.vocab, hidden), embedding


def fields(data):
    """Fields of a protobuf message: number and value (an int, a float, or bytes)."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, data[at : at + size]
            at += size
        elif kind == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        else:
            sys.exit(f"error: `{TOKENIZER}` holds a field of kind {kind}, expected a SentencePiece model")


def read_tokenizer():
    """The SentencePiece model, and spelling, score and type of every token."""
    with open(TOKENIZER, "rb") as file:
        model = file.read()
    pieces = []
    for number, value in fields(model):
        if number == 1:
            piece = dict(fields(value))
            pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, 1)))
    return model, pieces


def unused_tokens(pieces, count):
    lowest = min(score for _, score, _ in pieces)
    return [(f"<unused_{i}>", lowest - 1.0 - i, NORMAL) for i in range(count)]


def sentencepiece_fields(pieces):
    """Tokens as a SentencePiece model holds them; they may stand at its end."""
    data = b""
    for text, score, kind in pieces:
        text = text.encode()
        piece = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        data += bytes([0x0A, len(piece)]) + piece
    return data


def gguf_value(value):
    """A metadata value: type and bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        text = value.encode()
        return 8, struct.pack("<Q", len(text)) + text
    kind, _ = gguf_value(value[0])
    kind = 5 if isinstance(value[0], int) else kind
    items = b"".join(struct.pack("<i", item) if kind == 5 else gguf_value(item)[1] for item in value)
    return 9, struct.pack("<IQ", kind, len(value)) + items


def write_gguf(args, path):
    _, pieces = read_tokenizer()
    pieces += unused_tokens(pieces, args.vocab - len(pieces))
    metadata = {
        "general.architecture": "llama",
        "general.name": f"random weights, {args.layers} layers of {args.hidden}",
        "general.alignment": ALIGNMENT,
        "general.file_type": FORMATS[args.format][1],
        "general.quantization_version": 2,
        "llama.block_count": args.layers,
        "llama.context_length": args.context,
        "llama.embedding_length": args.hidden,
        "llama.feed_forward_length": args.mlp,
        "llama.attention.head_count": args.heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": args.rope_base,
        "llama.vocab_size": args.vocab,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    parts = []
    for name, _, layer, shape, deviation in tensors(args):
        short = name.rsplit(".", 1)[-1]
        kind = "f32" if len(shape) == 1 else tensor_type(args, short, layer, shape[-1])
        parts.append((f"{name}.weight", kind, shape, deviation))

    header = b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(metadata))
    for key, value in metadata.items():
        kind, data = gguf_value(value)
        header += gguf_value(key)[1] + struct.pack("<I", kind) + data
    offset = 0
    for name, kind, shape, _ in parts:
        # GGUF lists the innermost size first.
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += gguf_value(name)[1] + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", TYPES[kind][0], offset)
        offset += -(-tensor_bytes(kind, shape) // ALIGNMENT) * ALIGNMENT

    weights = Weights(args.seed)
    with open(path, "wb") as file:
        file.write(header)
        for _, kind, shape, deviation in parts:
            file.write(bytes(-file.tell() % ALIGNMENT))
            weights.write(kind, shape, deviation, file.write)
        file.write(bytes(-file.tell() % ALIGNMENT))


def write_safetensors(args, folder):
    os.mkdir(folder)
    model, pieces = read_tokenizer()
    with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
        file.write(model + sentencepiece_fields(unused_tokens(pieces, args.vocab - len(pieces))))
    dtype = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[args.format]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab,
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": args.context,
        "rope_theta": args.rope_base,
        "hidden_act": "silu",
        "tie_word_embeddings": args.tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)

    shards, filled = [[]], 0
    for _, name, _, shape, deviation in tensors(args):
        size = tensor_bytes(args.format, shape)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((f"{name}.weight", shape, deviation, size))
        filled += size
    weights, weight_map = Weights(args.seed), {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map.update({tensor: name for tensor, _, _, _ in shard})
        ends = list(itertools.accumulate(size for _, _, _, size in shard))
        header = {"__metadata__": {"format": "pt"}}
        for (tensor, shape, _, size), end in zip(shard, ends):
            header[tensor] = {"dtype": args.format.upper(), "shape": shape, "data_offsets": [end - size, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, shape, deviation, _ in shard:
                weights.write(args.format, shape, deviation, file.write)
    total = sum(size for shard in shards for _, _, _, size in shard)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file to write (gguf) or folder (safetensors); it must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="sizes that the options below change; default 7b")
    parser.add_argument("--layout", choices=["gguf", "safetensors"], default="gguf")
    parser.add_argument("--format", choices=FORMATS, help="default q4_0, and f16 in safetensors")
    parser.add_argument("--seed", type=int, default=0)
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int)
    parser.add_argument("--rope-base", type=float)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the output matrix is the embedding's")
    args = parser.parse_args()

    sizes, tied, rope_base = SHAPES[args.shape]
    # The head size follows from sizes that are given, unless it is given itself.
    if args.head_dim is None and (args.hidden is not None or args.heads is not None):
        heads, hidden = args.heads or sizes[SIZES.index("heads")], args.hidden or sizes[SIZES.index("hidden")]
        if heads > 0 and hidden % heads:
            parser.error(f"--hidden {hidden} must be a multiple of --heads {heads}, or --head-dim be given")
        args.head_dim = hidden // heads if heads > 0 else 0
    if args.kv_heads is None and args.heads is not None and sizes[SIZES.index("heads")] == sizes[SIZES.index("kv_heads")]:
        args.kv_heads = args.heads
    for size, default in [*zip(SIZES, sizes), ("tied", tied), ("rope_base", rope_base)]:
        if getattr(args, size) is None:
            setattr(args, size, default)
    if args.format is None:
        args.format = "q4_0" if args.layout == "gguf" else "f16"

    if min(getattr(args, size) for size in SIZES) < 1:
        parser.error("sizes must be at least 1")
    if args.head_dim % 2:
        parser.error(f"the head size {args.head_dim} must be even")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.layout == "safetensors" and args.format not in ("f16", "bf16", "f32"):
        parser.error(f"--format {args.format} is for gguf; safetensors takes f16, bf16 and f32")
    block = 1 if args.format in ("f32", "f16", "bf16") else 32
    for size in ["hidden", "mlp"]:
        if getattr(args, size) % block:
            parser.error(f"--{size} {getattr(args, size)}: must be multiples of {block} in {args.format}")
    if args.heads * args.head_dim % block:
        parser.error(f"--heads times --head-dim, {args.heads * args.head_dim}, must be multiples of {block} in {args.format}")
    tokens = len(read_tokenizer()[1])
    if args.vocab < tokens:
        parser.error(f"--vocab {args.vocab}: the tokenizer has {tokens} tokens already")
    if os.path.exists(args.path):
        parser.error(f"`{args.path}` exists")
    return args


def main():
    args = arguments()
    temporary = f"{args.path}.{os.getpid()}.tmp"
    write = write_gguf if args.layout == "gguf" else write_safetensors
    try:
        write(args, temporary)
        os.rename(temporary, args.path)
    except OSError as error:
        sys.exit(f"error: failed to write `{args.path}`: {error.strerror}")
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


main()
