"""Makes `templates.json`: what transformers renders with the chat templates beside this file.

    python make_templates.py

`{"made_with": {...}, "cases": [{"template": "qwen3.jinja", "input": {"messages", "tools", "chat_template_kwargs"}, "text"}]}`;
`input` is a file of `--messages`. Made with transformers 5.24.0, jinja2 3.1.6 (`made_with` tells each run's).
"""

import json
import pathlib

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent


def function(name, description, properties, required):
    parameters = dict(type="object", properties=properties, required=required)
    return dict(type="function", function=dict(name=name, description=description, parameters=parameters))


WEATHER = function(
    "get_weather",
    "Weather of a place, \"now\" <or> later & in °C",
    dict(
        place=dict(type="string", description="A city; e.g. 東京"),
        days=dict(type="integer", minimum=0, maximum=1e3, default=1),
        unit=dict(type="string", enum=["C", "F"]),
        exact=dict(type="boolean", default=False),
        limits=dict(type="array", items=dict(type="number", exclusiveMinimum=-1.5e-7)),
    ),
    ["place"],
)
CLOCK = function("clock", "", {}, [])


def message(role, content, **more):
    return dict(role=role, content=content, **more)


def call(name, arguments):
    return dict(type="function", function=dict(name=name, arguments=arguments))


SYSTEM = message("system", "You answer in one word.")
ASKED = message("user", "What is the capital of France?")
ANSWERED = message("assistant", "Paris")
AGAIN = message("user", "  And of Italy? <|im_end|>\n\n{{ 7 * 7 }} é 🦀\t")
CALLED = message("assistant", "", tool_calls=[call("get_weather", dict(place="Zürich", days=2, limits=[1.0, -2, 1e-7]))])
CALLED_TWICE = message(
    "assistant",
    "I look it up.",
    tool_calls=[call("get_weather", dict(place="\"Rome\"\n", exact=True, unit=None)), call("clock", {})],
)
TOLD = [message("tool", '{"degrees": 21.5}'), message("tool", "12:30")]
THOUGHT = message("assistant", "<think>\nIt is a country in Europe.\nSo: Paris.\n</think>\n\nParis")
REASONED = message("assistant", "Rome", reasoning_content="\nItaly, then.\n")

CONVERSATIONS = [
    [ASKED],
    [SYSTEM, ASKED],
    [ASKED, ANSWERED, AGAIN],
    [SYSTEM, ASKED, ANSWERED, AGAIN, REASONED, ASKED],
    [SYSTEM, AGAIN, CALLED, TOLD[0]],
    [ASKED, CALLED_TWICE, *TOLD],
    [ASKED, CALLED_TWICE, *TOLD, ANSWERED, AGAIN, CALLED, TOLD[1], THOUGHT, ASKED],
    [ASKED, THOUGHT, AGAIN],
    [message("system", ""), message("user", "")],
    [ASKED, SYSTEM, AGAIN],
]

cases = []
for template in ["qwen2.5.jinja", "qwen3.jinja"]:
    text = (HERE / template).read_text()
    for messages in CONVERSATIONS:
        for tools, kwargs in [
            (None, {}),
            ([WEATHER], {}),
            ([WEATHER, CLOCK], dict(enable_thinking=False)),
            (None, dict(enable_thinking=True)),
            (None, dict(enable_thinking=False)),
        ]:
            if template == "qwen2.5.jinja" and kwargs and not tools:
                continue
            given = dict(messages=messages)
            if tools:
                given["tools"] = tools
            if kwargs:
                given["chat_template_kwargs"] = kwargs
            rendered, _ = render_jinja_template(
                conversations=[messages], tools=tools, chat_template=text, add_generation_prompt=True, **kwargs
            )
            cases.append(dict(template=template, input=given, text=rendered[0]))
made_with = dict(transformers=transformers.__version__, jinja2=jinja2.__version__)
lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
(HERE / "templates.json").write_text(
    f'{{"made_with": {json.dumps(made_with)}, "cases": [\n{lines}\n]}}\n', encoding="utf-8"
)
