"""Random small templates for `compare_templates.py`: expressions over all kinds of values, filters, methods, tests."""

import random

CONTEXT = {
    "s": "Hello, World",
    "u": "ÀÉ ßŉ日本 ǅ²٣ \u00a0x",
    "e": "",
    "q": "it's \"q\" \\ \n\t\x01 <b>&amp;</b>",
    "n": 7,
    "z": 0,
    "m": -3,
    "f": 2.5,
    "g": 1e22,
    "t": True,
    "no": False,
    "nil": None,
    "l": [3, 1, 2],
    "ls": ["b", "A", "a", "C"],
    "mix": [1, "x", None, 2.0, [1], {"k": "v"}],
    "el": [],
    "d": {"b": 1, "a": "x", "items": [1, 2], "C": None},
    "ed": {},
    "rows": [
        {"name": "bob", "age": 3, "tags": ["x"], "sub": {"k": 1}},
        {"name": "Al", "age": 1, "tags": [], "sub": {"k": 2}},
        {"name": "cy", "age": 3, "sub": {}},
    ],
    "lines": "one\n  two\r\nthree\n\nfour four-four\n",
    "num": " 42 ",
    "csv": "a,b,,c",
}
ATOMS = [
    *CONTEXT, *CONTEXT, "missing", "0", "1", "2", "-1", "10", "3.0", "0.1", "1e3", "'a'", "'b'", "' '", "','", "'x y'",
    "''", "none", "true", "false", "[]", "{}", "()", "[1, 2]", "(1, 'a')", "{'a': 1}", "range(4)", "'%s'", "'{}'", "'é'",
    "d.items()", "d.keys()", "d.values()", "rows[0]", "l|first", "namespace(a=1)", "missing.x", "rows[5]", "d.zz",
]
BINARY = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">", "<=", ">=", "in", "not in", "and", "or"]
FILTERS = {
    "abs": 0, "attr": 1, "batch": 2, "capitalize": 0, "center": 1, "count": 0, "d": 2, "default": 2, "dictsort": 3,
    "e": 0, "escape": 0, "filesizeformat": 1, "first": 0, "float": 1, "forceescape": 0, "format": 2, "groupby": 1,
    "indent": 3, "int": 2, "items": 0, "join": 2, "last": 0, "length": 0, "list": 0, "lower": 0, "max": 0, "min": 0,
    "reverse": 0, "round": 2, "safe": 0, "slice": 2, "sort": 2, "string": 0, "striptags": 0, "sum": 0, "title": 0,
    "tojson": 0, "trim": 1, "truncate": 3, "unique": 1, "upper": 0, "urlencode": 0, "wordcount": 0, "wordwrap": 2,
    "xmlattr": 1, "replace": 3, "select": 0, "reject": 0, "map": 0,
}
SPECIAL = [
    "map(attribute='name')", "map(attribute='age')|list", "map(attribute='sub.k')|list", "map('upper')|list",
    "map('int')|list", "map('length')|list", "selectattr('name')|list", "selectattr('age', 'gt', 1)|list",
    "selectattr('tags', 'defined')|list", "rejectattr('age', 'equalto', 3)|list", "select('string')|list",
    "select('odd')|list", "reject('none')|list", "select('in', 'abc')|list", "groupby('age')", "groupby('age')|list",
    "sort(attribute='name')", "sort(attribute='age,name', reverse=true)", "sort(reverse=true)", "sum(attribute='age')",
    "sum(start=[])", "join(',', attribute='name')", "unique|list", "unique(attribute='age')|list", "batch(2)|list",
    "batch(2, 'x')|list", "slice(2)|list", "slice(2, 0)|list", "tojson(indent=2)", "tojson(indent='-')",
    "tojson(sort_keys=true)", "tojson(separators=(',', ':'))", "tojson(ensure_ascii=true)", "tojson(true, 0)",
    "default('x', true)", "replace('a', 'b', 1)", "indent(2, true)", "indent('> ', blank=true)", "truncate(5)",
    "truncate(9, true, '..', 0)", "round(1, 'ceil')", "round(-1)", "round(method='floor')", "int(5, 16)", "int(base=2)",
    "dictsort(by='value')", "dictsort(reverse=true)", "map('default', 'x')|list", "items|list", "list|tojson",
    "reverse|list", "min(attribute='age')", "max(case_sensitive=true)", "xmlattr", "wordwrap(5)", "wordwrap(6, false)",
    "center(12)", "format(1)", "first|default('none')", "items|map('first')|join", "map('string')|map('upper')|join('-')",
    "map(attribute='zz', default='?')|join", "map('attr', 'name')|list", "string|length", "trim('ab')", "safe ~ '<'",
]
METHODS = {
    "capitalize": 0, "casefold": 0, "center": 2, "count": 1, "endswith": 2, "expandtabs": 1, "find": 2, "format": 2,
    "index": 1, "isalnum": 0, "isalpha": 0, "isascii": 0, "isdecimal": 0, "isdigit": 0, "islower": 0, "isnumeric": 0,
    "isspace": 0, "istitle": 0, "isupper": 0, "isprintable": 0, "isidentifier": 0, "join": 1, "ljust": 2, "lower": 0,
    "lstrip": 1, "partition": 1, "removeprefix": 1, "removesuffix": 1, "replace": 3, "rfind": 2, "rindex": 1,
    "rjust": 2, "rpartition": 1, "rsplit": 2, "rstrip": 1, "split": 2, "splitlines": 1, "startswith": 2, "strip": 1,
    "swapcase": 0, "title": 0, "upper": 0, "zfill": 1, "get": 2, "items": 0, "keys": 0, "values": 0, "copy": 0,
    "append": 1, "pop": 0, "update": 1, "bit_length": 0, "is_integer": 0,
}
TESTS = [
    "defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "true", "false", "mapping",
    "sequence", "iterable", "callable", "odd", "even", "lower", "upper", "escaped", "divisibleby 2", "divisibleby(0)",
    "in 'abc'", "in [1, 2]", "eq 1", "equalto 'a'", "ne 2", "gt 1", "lt 'b'", "ge 0", "le 3", "sameas none",
    "sameas true", "filter", "test", "== 1", "not none", "not defined", "not string",
]
FORMATS = [
    "%s|%s", "%d", "%5d|", "%-5d|", "%05d", "%+d", "% d", "%x", "%#x", "%X", "%o", "%e", "%.2f", "%8.3f|", "%g", "%.3g",
    "%G", "%c", "%r", "%10s|", "%-10s|", "%.2s", "%%", "%(a)s %(b)5s", "%i", "%*d", "%.*f", "%5.1f%%", "%a", "%q", "%",
]
FIELDS = [
    "{}", "{} {}", "{0} {1} {0}", "{0!r}", "{0!s:>5}", "{:>8}", "{:<8}|", "{:^8}|", "{:*^9}", "{:05d}", "{:+}", "{: d}",
    "{:,}", "{:_}", "{:.2f}", "{:8.3f}|", "{:e}", "{:g}", "{:.3g}", "{:%}", "{:.1%}", "{:x}", "{:#x}", "{:b}", "{:o}",
    "{:c}", "{:s}", "{:.2}", "{:{}}", "{a}", "{a.b}", "{0[0]}", "{0.name}", "{{}}", "{", "}", "{:010,}", "{:=+8}", "{:08.2f}",
    "{0[name]}", "{:n}", "{:5}|", "{!r}",
]


class Maker:
    def __init__(self, rng):
        self.rng = rng

    def pick(self, options):
        return self.rng.choice(options)

    def expr(self, depth):
        rng = self.rng
        kind = rng.random()
        if depth <= 0 or kind < 0.15:
            return self.pick(ATOMS)
        inner = lambda: self.expr(depth - 1)  # noqa: E731
        if kind < 0.30:
            return f"({inner()} {self.pick(BINARY)} {inner()})"
        if kind < 0.45:
            name = self.pick(list(FILTERS))
            return f"({inner()})|{name}{self.args(FILTERS[name])}"
        if kind < 0.60:
            return f"({inner()})|{self.pick(SPECIAL)}"
        if kind < 0.75:
            name = self.pick(list(METHODS))
            return f"({inner()}).{name}{self.args(METHODS[name]) or '()'}"
        if kind < 0.80:
            return f"(({inner()}) is {self.pick(TESTS)})"
        if kind < 0.84:
            bounds = [self.pick(["", "", "0", "1", "2", "-1", "-2", "9", "-9", "n"]) for _ in range(3)]
            # jinja2 takes a slice of a constant that has none for undefined, and of a variable for an error.
            return f"{self.pick(list(CONTEXT))}[{':'.join(bounds[: rng.choice([2, 3])])}]"
        if kind < 0.88:
            return f"({inner()})[{self.pick(['0', '1', '-1', '9', chr(39) + 'a' + chr(39), chr(39) + 'name' + chr(39), 'n', 's'])}]"
        if kind < 0.90:
            return f"({inner()} if {inner()}{self.pick(['', ' else ' + inner()])})"
        if kind < 0.92:
            return f"({self.pick(FORMATS)!r} % {self.pick([inner(), f'({inner()}, {inner()})', '{' + chr(39) + 'a' + chr(39) + ': 1}'])})"
        if kind < 0.95:
            return f"({self.pick(FIELDS)!r}).format({inner()}, {inner()}, a=rows[0])"
        if kind < 0.97:
            return f"[{inner()}, {inner()}]"
        if kind < 0.98:
            return f"(-{inner()})"
        return f"{{{inner()}: {inner()}}}"

    def args(self, most):
        count = self.rng.randint(0, most)
        if self.rng.random() < 0.05:
            count += 1
        if count == 0:
            return "" if self.rng.random() < 0.8 else "()"
        return "(" + ", ".join(self.pick(ATOMS) for _ in range(count)) + ")"

    def template(self):
        expr = self.expr(self.rng.randint(1, 3))
        kind = self.rng.random()
        if kind < 0.75:
            return f"{{{{ {expr} }}}}"
        if kind < 0.85:
            return f"{{% for x in {expr} %}}{{{{ loop.index }}}}:{{{{ x }}}}{{{{ loop.last }}}};{{% else %}}none{{% endfor %}}"
        if kind < 0.92:
            return f"{{% set a, b = {expr} %}}{{{{ a }}}}/{{{{ b }}}}"
        if kind < 0.96:
            return f"{{% if {expr} %}}yes{{% else %}}no{{% endif %}}"
        return self.layout()

    def layout(self):
        """White space and scopes."""
        parts = [
            "\n", " ", "  \n", "\t", "x", "y\n", "{%- if t %}", "{% if no +%}", "{%+ if t -%}", "{% else -%}", "{% endif %}",
            "{%- endif -%}", "{{- x -}}", "{{ x }}", "{#- c -#}", "{# c #}", "{% set x = 1 %}", "{%- set x = x ~ 'a' -%}",
            "{% for x in l %}", "{% for y in l if y > 1 -%}", "{% endfor %}", "{{ y }}", "{% raw %}{{ x }}{%- endraw -%}",
            "{% set ns = namespace(a=0) %}", "{% set ns.a = ns.a + 1 %}", "{{ ns.a }}", "{% macro k(x, y=2) %}", "{{ x }}{{ y }}",
            "{% endmacro %}", "{{ k(1) }}", "{{ k(y=x) }}", "{% call k(3) %}", "{% endcall %}", "{% with x = 5 %}", "{% endwith %}",
            "{% break %}", "{% continue %}", "{% set x %}", "{% endset %}", "{% filter upper %}", "{% endfilter %}", "\r\n", "\r",
            "{% generation %}", "{% endgeneration %}", "{{ loop.index if loop is defined }}", "{% block b %}", "{% endblock %}",
        ]
        return "".join(self.pick(parts) for _ in range(self.rng.randint(2, 14)))


def cases(rounds, seed):
    maker = Maker(random.Random(seed))
    for _ in range(rounds):
        yield maker.template(), CONTEXT
