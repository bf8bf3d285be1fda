"""Makes cases for `compare_templates.sh` and compares the answers: see there."""

import argparse
import collections
import hashlib
import json
import re
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INDEX = "https://pypi.org/simple/llama-cpp-python/"

# Cases of test-jinja.cpp whose expectation is llama.cpp's and not jinja2's; ours follows jinja2.
EXCEPT_EXPECTATION = {
    "macro with caller": "jinja2 keeps the line ends between the calls",
    "array.pop() last": "the sandbox allows no change of a list",
    "array.pop() with index": "the sandbox allows no change of a list",
    "array.append()": "the sandbox allows no change of a list",
}


def fetch(work):
    # `pip download` would build the package, only to learn its name.
    page = urllib.request.urlopen(INDEX).read().decode()
    found = re.search(rf'href="([^"#]*/llama_cpp_python-{re.escape(VERSION)}\.tar\.gz)', page)
    if not found:
        sys.exit(f"`{INDEX}` has no source archive of version {VERSION}")
    url = found[1]
    print(f"fetching llama-cpp-python {VERSION} ...", file=sys.stderr)
    archive = work / "llama-cpp-python.tar.gz"
    urllib.request.urlretrieve(urllib.parse.urljoin(INDEX, url), archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"`{url}` has the SHA-256 {digest}, expected {SHA256}")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if (name.startswith("models/templates/") and name.endswith(".jinja")) or name == "tests/test-jinja.cpp":
                (work / Path(name).name).write_bytes(tar.extractfile(member).read())
    archive.unlink()


def tool(name, description, **properties):
    required = [key for key, value in properties.items() if not value.pop("optional", False)]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool(
        "get_weather",
        "Tells the weather of a place, e.g. \"Köln\" & <b>others</b>",
        city={"type": "string", "description": "The city's name"},
        unit={"type": "string", "enum": ["celsius", "fahrenheit"], "optional": True},
        days={"type": "integer", "description": "How many days", "default": 1, "optional": True},
    ),
    tool("list_files", "Lists files", paths={"type": "array", "items": {"type": "string"}}),
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, id="call12345"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "You are terse.\n"}
WEATHER = call("get_weather", {"city": "Köln", "days": 2, "deep": {"a": [1, 2.5, None, True]}})
TURNS = [user("Hi there"), assistant("Hello! <b>How</b> are you?"), user(" Fine, thanks. "), assistant("Good."), user("Bye")]
ANSWER = {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"sky": "<grey> & \'wet\'"}'}

CONVERSATIONS = {
    "user": {"messages": [user("What is 2 + 2?")]},
    "system": {"messages": [SYSTEM, user("What is 2 + 2?")]},
    "turns": {"messages": TURNS},
    "system and turns": {"messages": [SYSTEM, *TURNS]},
    "tools": {
        "messages": [SYSTEM, user("Weather?"), assistant("", tool_calls=[WEATHER]), ANSWER, assistant("Grey."), user("Ok")],
        "tools": TOOLS,
    },
    "content null": {
        "messages": [
            user("Weather?"),
            assistant(None, tool_calls=[WEATHER, call("list_files", {"paths": ["/", "~"]}, "call67890")]),
            ANSWER,
            {**ANSWER, "tool_call_id": "call67890", "name": "list_files"},
        ],
        "tools": TOOLS,
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You see."}]},
            user([{"type": "text", "text": "What is on "}, {"type": "image"}, {"type": "text", "text": "this?"}]),
        ]
    },
    "reasoning": {
        "messages": [
            user("6 * 7?"),
            assistant("42", reasoning_content="Six times seven ..."),
            user("And 6 * 8?"),
            assistant("<think>\nHm.\n</think>\n\n48", reasoning_content=None),
            user("Thanks"),
        ]
    },
    "markers": {
        "messages": [
            user("日本語 🎉 <|im_end|> </s> [INST] {{ x }} {% if %}\t'quoted' \"double\" back\\slash\n\n"),
            assistant("é <|eot_id|>\u2028 \u00a0 end "),
            user("<think>no</think> ok?"),
        ]
    },
    "no prompt": {"messages": [user("Count"), assistant("One, two ")], "add_generation_prompt": False},
    "more variables": {
        "messages": [SYSTEM, user("Look it up")],
        "documents": [{"title": "A & B", "text": "First.", "doc_id": 1}, {"title": "C", "text": "Second."}],
        "enable_thinking": False,
        "thinking": True,
        "reasoning_effort": "high",
        "builtin_tools": ["browser"],
        "custom_tools": TOOLS,
        "tools_in_user_message": False,
        "date_string": "1 Jan 2025",
        "keep_past_thinking": True,
    },
}

GIVEN = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_generation_prompt": True,
    "tools": None,
    "documents": None,
}


class Cpp:
    """Reads the test cases of a C++ file: strings and nlohmann's JSON literals."""

    TOKEN = re.compile(
        r'\s+|//[^\n]*|(?P<str>"(?:[^"\\]|\\.)*")|(?P<num>-?\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<word>[\w:]+)|(?P<op>[{}(),+])', re.S
    )
    ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.S)

    def __init__(self, text, at):
        self.text, self.at = text, at

    def peek(self):
        while True:
            match = self.TOKEN.match(self.text, self.at)
            if match is None:
                raise ValueError(self.text[self.at : self.at + 40])
            if match.lastgroup:
                return match
            self.at = match.end()

    def take(self, wanted=None):
        match = self.peek()
        if wanted is not None and match.group() != wanted:
            raise ValueError(f"{match.group()!r} is not {wanted!r}")
        self.at = match.end()
        return match

    def string(self):
        text = b""
        while self.peek().lastgroup == "str":
            body = self.take().group()[1:-1].encode()
            text += self.ESCAPE.sub(self.unescape, body)
            if self.peek().group() == "+":
                self.take()
        return text.decode()

    @staticmethod
    def unescape(match):
        code = match.group(1).decode()
        if code[0] in "uU" and len(code) > 1:
            return chr(int(code[1:], 16)).encode()
        if code[0] == "x" or code[0] in "01234567":
            return bytes([int(code[1:], 16) if code[0] == "x" else int(code, 8)])
        return {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}.get(code, code).encode()

    def json(self):
        token = self.peek()
        if token.lastgroup == "str":
            return self.string()
        if token.lastgroup == "num":
            return json.loads(self.take().group())
        if token.lastgroup == "word":
            word = self.take().group()
            if word in ("true", "false", "nullptr"):
                return {"true": True, "false": False, "nullptr": None}[word]
            if word == "json":
                if self.peek().group() == "(":
                    self.take("(")
                    value = self.json()
                    self.take(")")
                    return value
                return self.json()
            if word in ("json::array", "json::object"):
                self.take("(")
                items = self.items() if self.peek().group() == "{" else []
                self.take(")")
                return dict(items) if word == "json::object" else items
            raise ValueError(word)
        items = self.items()
        pairs = items and all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in items)
        return dict(items) if pairs else items

    def items(self):
        self.take("{")
        items = []
        while self.peek().group() != "}":
            items.append(self.json())
            if self.peek().group() == ",":
                self.take()
        self.take("}")
        return items


def cpp_cases(path):
    text = path.read_text()
    for found in re.finditer(r"^ *test_template\(t, (?=\")", text, re.M):
        cpp = Cpp(text, found.end())
        name = cpp.string()
        cpp.take(",")
        template = cpp.string()
        cpp.take(",")
        context = cpp.json()
        cpp.take(",")
        yield name, template, context or {}, cpp.string()


def make(work, rounds, seed):
    import jinja_fuzz

    cases = []
    templates = sorted(work.glob("*.jinja"))
    for path in templates:
        for name, conversation in CONVERSATIONS.items():
            case = {"group": "templates", "name": f"{path.name}, {name}", "template": path.read_text()}
            cases.append({**case, "context": {**GIVEN, **conversation}})
    for name, template, context, expected in cpp_cases(work / "test-jinja.cpp"):
        case = {"group": "test-jinja.cpp", "name": name, "template": template, "context": context}
        cases.append({**case, "expected": expected})
    for number, (template, context) in enumerate(jinja_fuzz.cases(rounds, seed)):
        cases.append({"group": "random", "name": str(number), "template": template, "context": context})
    with open(work / "cases.jsonl", "w") as file:
        file.writelines(json.dumps(case) + "\n" for case in cases)
    print(f"{len(templates)} templates, {len(cases)} cases", file=sys.stderr)


def same(theirs, ours):
    if "ok" in theirs or "refused" in theirs:
        return theirs == ours
    return "error" in ours


# An address in memory as ours stands for it, whole or character by character with something between.
SPREAD = {text: ".{0,16}?".join(map(re.escape, text)) for text in ("at 0x", "at 0x7f00")}


def holds_address(theirs, ours):
    if re.search(r" at 0x[0-9a-f]{6,}", theirs, re.I):
        return True
    both = ((theirs, SPREAD["at 0x"]), (ours, SPREAD["at 0x7f00"]))
    return all(re.search(spread, text, re.I | re.S) for text, spread in both)


def check(work):
    from jinja_oracle import render

    right, wrong = collections.Counter(), collections.Counter()
    unsupported = collections.Counter()
    with open(work / "cases.jsonl") as cases, open(work / "results.jsonl") as results:
        for case, ours in zip(map(json.loads, cases), map(json.loads, results), strict=True):
            group = case["group"]
            theirs = render(case["template"], case["context"])
            if holds_address(theirs.get("ok", ""), ours.get("ok", "")):
                continue
            if group == "random" and ours.get("kind") == "Unsupported":
                unsupported[ours["error"]] += 1
                continue
            kind = ours.pop("kind", None)
            if same(theirs, ours):
                right[group] += 1
            else:
                wrong[group] += 1
                print(f"{group}: {case['name']}\n  jinja2 {theirs}\n  ours   {ours} {kind or ''}")
                if len(case["template"]) < 300:
                    print(f"  template {case['template']!r}")
            if group == "test-jinja.cpp" and ours.get("ok") != case["expected"]:
                reason = EXCEPT_EXPECTATION.get(case["name"])
                if reason is None or "ok" in theirs and theirs["ok"] == case["expected"]:
                    wrong["expectations of test-jinja.cpp"] += 1
                    print(f"{case['name']} expects {case['expected']!r}, got {ours}, jinja2 {theirs}")
                else:
                    print(f"test-jinja.cpp, {case['name']}: {reason}")
    for group in right.keys() | wrong.keys():
        print(f"{group}: {right[group]} equal, {wrong[group]} different")
    if unsupported:
        print(f"random: {unsupported.total()} not supported: {dict(unsupported)}")
    sys.exit(1 if wrong else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["fetch", "make", "check"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.step == "fetch":
        fetch(args.work)
    elif args.step == "make":
        make(args.work, args.rounds, args.seed)
    else:
        check(args.work)


if __name__ == "__main__":
    main()
