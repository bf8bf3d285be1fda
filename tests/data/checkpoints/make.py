"""Makes the tiny checkpoints beside this file, with the logits that transformers computes from them.

    python make.py [NAME ...]

Each folder gets `config.json` and `model.safetensors`, as `save_pretrained` writes them, and `expected.json`:
`{"made_with": {...}, "cases": [{"ids", "last_logits", "decoded": [{"id", "logits"}, ...]}, ...]}`. `last_logits` are those
after the prompt; `decoded` feeds one token at a time on top of it, with transformers' own cache.
Weights are random, with a fixed seed, and large enough that every part of the model shows in the logits.
Made with torch 2.15.0, transformers 5.23.0, safetensors 0.8.0 (`made_with` tells each run's).
"""

import json
import pathlib
import sys

import safetensors
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

HERE = pathlib.Path(__file__).parent
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)

# name: (class of the configuration, its arguments, dtype, prompt lengths, change of the written config.json)
CHECKPOINTS = {
    "biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True), "float32", [1, 9, 40], None),
    "linear": (
        LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
        "float32",
        [5, 60],
        None,
    ),
    # Prompts beyond `max_position_embeddings`, where the scaling is at work, and one that gets there while decoding.
    "dynamic": (
        LlamaConfig,
        dict(
            max_position_embeddings=32,
            rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0),
        ),
        "float32",
        [10, 30, 32, 33, 100],
        None,
    ),
    "yarn": (LlamaConfig, dict(rope_parameters=YARN), "float32", [10, 32, 100], None),
    "yarn-mscale": (
        LlamaConfig,
        dict(
            rope_parameters=dict(
                YARN, mscale=1.5, mscale_all_dim=0.5, beta_fast=16.0, beta_slow=2.0, truncate=False
            )
        ),
        "float32",
        [10, 100],
        None,
    ),
    "old-spelling": (
        LlamaConfig,
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
                rope_theta=5000.0,
            )
        ),
        "float32",
        [10, 100],
        "old rope keys",
    ),
    "mistral": (
        MistralConfig,
        dict(sliding_window=48, head_dim=16, eos_token_id=[2, 7]),
        "float32",
        [10, 44],
        None,
    ),
    # Prompts within the window, at its border, and far beyond it. Heads of 32 numbers fit a quantised cache.
    "mistral-window": (MistralConfig, dict(sliding_window=16, head_dim=32), "float32", [5, 15, 16, 17, 40, 200], None),
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=True), "float32", [1, 9, 60], None),
    # A window in the second layer only.
    "qwen2-window": (
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "float32",
        [5, 17, 100],
        None,
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16), "float32", [1, 9, 60], None),
    "f16": (LlamaConfig, dict(tie_word_embeddings=True), "float16", [10, 40], None),
    "bf16": (LlamaConfig, dict(tie_word_embeddings=False), "bfloat16", [10, 40], "several EOS"),
}
DECODED = 3
# Texts that get beyond the window while they are decoded.
DECODED_OF = {"mistral-window": 20, "qwen2-window": 20}


def rounded(logits):
    return [round(value, 5) for value in logits.tolist()]


def make(name):
    config_class, arguments, dtype, lengths, change = CHECKPOINTS[name]
    torch.manual_seed(sum(name.encode()))
    config = config_class(**{**SIZES, **arguments})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in key:
                parameter.normal_(0, 1)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    model = model.to(getattr(torch, dtype))
    folder = HERE / name
    model.save_pretrained(folder)

    # The reference computes in f32 with the stored numbers: what is compared is arithmetic, not rounding.
    weights = model.float().state_dict()
    cases = []
    for length in lengths:
        # A new one for each prompt: dynamic scaling remembers the longest sequence.
        reference = AutoModelForCausalLM.from_config(config).eval().float()
        reference.load_state_dict(weights)
        ids = [1] + [(7 * i * i + 5 * i + length) % (config.vocab_size - 3) + 3 for i in range(length - 1)]
        with torch.no_grad():
            out = reference(torch.tensor([ids]), use_cache=True)
            case = dict(ids=ids, last_logits=rounded(out.logits[0, -1]), decoded=[])
            for step in range(DECODED_OF.get(name, DECODED)):
                token = (11 * step + 4) % config.vocab_size
                out = reference(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                case["decoded"].append(dict(id=token, logits=rounded(out.logits[0, -1])))
        cases.append(case)
    made_with = dict(
        torch=torch.__version__, transformers=transformers.__version__, safetensors=safetensors.__version__
    )
    (folder / "expected.json").write_text(json.dumps(dict(made_with=made_with, cases=cases)) + "\n")

    path = folder / "config.json"
    written = json.loads(path.read_text())
    generation = folder / "generation_config.json"
    if change == "old rope keys":
        # As files of transformers 4 are, and `type` for `rope_type` as in those before 4.43.
        parameters = written.pop("rope_parameters")
        written["rope_theta"] = parameters.pop("rope_theta")
        parameters["type"] = parameters.pop("rope_type")
        written["rope_scaling"] = parameters
        written["torch_dtype"] = written.pop("dtype")
    if change == "several EOS":
        written["eos_token_id"] = 5
        generation.write_text(json.dumps(dict(bos_token_id=1, eos_token_id=[9, 5])) + "\n")
    elif generation.exists():
        generation.unlink()
    path.write_text(json.dumps(written, indent=2) + "\n")


for name in sys.argv[1:] or CHECKPOINTS:
    make(name)
