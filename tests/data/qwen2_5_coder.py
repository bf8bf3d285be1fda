"""Makes `qwen2_5_coder.json`: what transformers computes from the weights of Qwen2.5-Coder-0.5B-Instruct's GGUF file in f32.

    python qwen2_5_coder.py MODEL.gguf        (MODEL.gguf as `scripts/get_model.sh qwen2.5-coder-0.5b` gets it)

`{"made_with": {...}, "cases": [{"text", "ids", "top10_logprobs": [[id, logprob], ...], "greedy24": [24 ids]}, ...]}`, where
`ids` are those of transformers' tokenizer of the same file. Made with torch 2.15.0, transformers 5.24.0, gguf 0.19.0.
"""

import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "What is the recipe of mayonnaise?",
    "def fibonacci(n: int) -> int:\n    \"\"\"The n-th number.\"\"\"\n",
    "<|im_start|>system\nYou answer in one word.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "  fn main() {\n\tprintln!(\"{}\", 1234567890);\n}\n\n\n// d\u00e9j\u00e0 vu \u2014 \u4f60\u597d \U0001f980 I'll we've HE'S <s>x</s",
]

path = pathlib.Path(sys.argv[1]).resolve()
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
cases = []
for text in TEXTS:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, -1].log_softmax(-1)
        top = torch.topk(logprobs, 10)
        greedy = []
        for _ in range(24):
            greedy.append(int(model(tokens).logits[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[greedy[-1]]])], 1)
    top10 = [[int(id), round(float(value), 4)] for value, id in zip(top.values, top.indices)]
    cases.append(dict(text=text, ids=ids, top10_logprobs=top10, greedy24=greedy))
made_with = dict(torch=torch.__version__, transformers=transformers.__version__)
target = pathlib.Path(__file__).with_suffix(".json")
target.write_text(json.dumps(dict(made_with=made_with, cases=cases)) + "\n")
