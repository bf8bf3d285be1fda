#!/usr/bin/env python3
"""Writes a model of Llama-2-7B's shape with random weights, to try sizes, loading and memory without the real one.

32 layers, 32 heads of 128 (no grouping), hidden size 4096, MLP 11008, and the tokenizer of the tests (1,000 tokens). The
text that it generates means nothing. Needs nothing but Python's standard library.

    scripts/make_llama7b_shape.py llama7b-shape.gguf                        # Q4_0, 3.4 GB
    scripts/make_llama7b_shape.py llama7b-shape --format safetensors        # f16, 12.1 GB, a folder in Hugging Face's layout

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and https://github.com/huggingface/safetensors
"""

import argparse
import json
import os
import random
import shutil
import struct
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKENIZER = os.path.join(ROOT, "tests/data/fixtures/tokenizer.model")
CHUNK = 1 << 20  # blocks or numbers that are made at a time
SHARD_BYTES = 5_000_000_000
ALIGNMENT = 32
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an f16 scale and 32 nibbles
F32, Q4_0 = 0, 2  # GGUF's numbers of tensor types
NORM_EPS, CONTEXT, THETA = 1e-5, 4096, 10000.0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file to write (gguf) or folder (safetensors); it must not exist")
    parser.add_argument("--format", choices=["gguf", "safetensors"], default="gguf")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in [("layers", 32), ("heads", 32), ("hidden", 4096), ("mlp", 11008)]:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    if min(args.layers, args.heads, args.hidden, args.mlp) < 1:
        parser.error("sizes must be at least 1")
    if args.hidden % args.heads or args.hidden // args.heads % 2:
        parser.error(f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}")
    if args.format == "gguf" and (args.hidden % BLOCK or args.mlp % BLOCK):
        parser.error(f"--hidden and --mlp must be multiples of {BLOCK} in Q4_0")
    if os.path.exists(args.path):
        parser.error(f"`{args.path}` exists")
    return args


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


def vocabulary():
    """Spelling, score and type of every token of the SentencePiece model."""
    with open(TOKENIZER, "rb") as file:
        model = file.read()
    pieces = []
    for number, value in fields(model):
        if number == 1:
            piece = dict(fields(value))
            pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, 1)))
    return pieces


class Weights:
    """Streams random weights of a standard deviation of about 0.02."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def q4_0(self, count, write):
        # Nibbles are uniform in -8..=7, whose standard deviation is 4.6.
        low, high = struct.pack("<e", 0.02 / 4.6)
        blocks = count // BLOCK
        while blocks:
            some = min(blocks, CHUNK)
            nibbles = self.random.randbytes(16 * some)
            chunk = bytearray(BLOCK_BYTES * some)
            chunk[0::BLOCK_BYTES] = bytes([low]) * some
            chunk[1::BLOCK_BYTES] = bytes([high]) * some
            for i in range(16):
                chunk[2 + i :: BLOCK_BYTES] = nibbles[i::16]
            write(chunk)
            blocks -= some

    # Sign and two bits of the mantissa stay, the exponent becomes 2^-6: numbers of 0.016 to 0.031 of both signs.
    F16_HIGH = bytes(byte & 0x83 | 0x24 for byte in range(256))

    def f16(self, count, write):
        while count:
            some = min(count, CHUNK)
            chunk = bytearray(self.random.randbytes(2 * some))
            chunk[1::2] = chunk[1::2].translate(self.F16_HIGH)
            write(chunk)
            count -= some


def product(shape):
    result = 1
    for size in shape:
        result *= size
    return result


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
    kind = 5 if value and isinstance(value[0], int) else kind
    items = b"".join(struct.pack("<i", item) if kind == 5 else gguf_value(item)[1] for item in value)
    return 9, struct.pack("<IQ", kind, len(value)) + items


def write_gguf(args, vocab, path):
    head_dim = args.hidden // args.heads
    metadata = {
        "general.architecture": "llama",
        "general.name": "random weights in the shape of Llama 2 7B",
        "general.alignment": ALIGNMENT,
        "llama.block_count": args.layers,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": args.hidden,
        "llama.feed_forward_length": args.mlp,
        "llama.attention.head_count": args.heads,
        "llama.attention.head_count_kv": args.heads,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": THETA,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in vocab],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in vocab],
        "tokenizer.ggml.token_type": [kind for _, _, kind in vocab],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    matrix = lambda rows, columns: ((rows, columns), Q4_0)
    norm = ((args.hidden,), F32)
    tensors = {"token_embd.weight": matrix(len(vocab), args.hidden)}
    for layer in range(args.layers):
        parts = {
            "attn_norm": norm,
            "attn_q": matrix(args.hidden, args.hidden),
            "attn_k": matrix(args.hidden, args.hidden),
            "attn_v": matrix(args.hidden, args.hidden),
            "attn_output": matrix(args.hidden, args.hidden),
            "ffn_norm": norm,
            "ffn_gate": matrix(args.mlp, args.hidden),
            "ffn_up": matrix(args.mlp, args.hidden),
            "ffn_down": matrix(args.hidden, args.mlp),
        }
        tensors.update({f"blk.{layer}.{name}.weight": part for name, part in parts.items()})
    tensors["output_norm.weight"] = norm
    tensors["output.weight"] = matrix(len(vocab), args.hidden)

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = gguf_value(value)
        header += gguf_value(key)[1] + struct.pack("<I", kind) + data
    offset = 0
    for name, (shape, kind) in tensors.items():
        # GGUF lists the innermost size first.
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += gguf_value(name)[1] + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)
        size = 4 * product(shape) if kind == F32 else product(shape) // BLOCK * BLOCK_BYTES
        offset += -(-size // ALIGNMENT) * ALIGNMENT

    weights = Weights(args.seed)
    with open(path, "wb") as file:
        file.write(header)
        for shape, kind in tensors.values():
            file.write(bytes(-file.tell() % ALIGNMENT))
            if kind == F32:
                file.write(struct.pack("<f", 1.0) * product(shape))
            else:
                weights.q4_0(product(shape), file.write)
        file.write(bytes(-file.tell() % ALIGNMENT))


def write_safetensors(args, vocab, folder):
    os.mkdir(folder)
    shutil.copy(TOKENIZER, os.path.join(folder, "tokenizer.model"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "vocab_size": len(vocab),
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)

    hidden, mlp = args.hidden, args.mlp
    tensors = {"model.embed_tokens.weight": (len(vocab), hidden)}
    for layer in range(args.layers):
        parts = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, hidden),
            "self_attn.v_proj": (hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        tensors.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()})
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (len(vocab), hidden)

    shards = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * sum(map(product, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weights = Weights(args.seed)
    weight_map = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map.update({tensor: name for tensor in shard})
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape in shard.items():
            end = offset + 2 * product(shape)
            header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                if len(shape) == 1:
                    file.write(struct.pack("<e", 1.0) * product(shape))
                else:
                    weights.f16(product(shape), file.write)
    index = {"metadata": {"total_size": 2 * sum(map(product, tensors.values()))}, "weight_map": weight_map}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump(index, file, indent=2)


def main():
    args = arguments()
    temporary = f"{args.path}.{os.getpid()}.tmp"
    write = write_gguf if args.format == "gguf" else write_safetensors
    try:
        write(args, vocabulary(), temporary)
        os.rename(temporary, args.path)
    except OSError as error:
        sys.exit(f"error: failed to write `{args.path}`: {error.strerror}")
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


main()
