#!/usr/bin/env python3
"""Writes `cases.json`: small templates and what jinja2 makes of them, set up as transformers does it.

    pip install jinja2==3.1.6
    tests/data/jinja/make_cases.py

Each line of `cases.json` is a template and `ok` (the text), `refused` (the text of raise_exception) or `error` (Python's
message, which ours need not equal). `CONTEXT` goes into the file, too.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "scripts"))

from jinja_oracle import render  # noqa: E402

CONTEXT = {
    "messages": [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hi, é日 <|im_end|>\n"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "x"]}}}],
        },
        {"role": "tool", "name": "add", "content": '{"sum": "<5> & \'six\'"}', "tool_call_id": "c1"},
        {"role": "assistant", "content": "<think>Hm.</think>\n\nSix.", "reasoning_content": "Hm."},
        {"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "this"}]},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds \"two\" <numbers>", "parameters": {}}}],
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "documents": None,
    "s": "Hello, World",
    "u": "ÀÉ ßŉ日本 ǅ²٣ ΑΣ",
    "q": "it's \"q\" \\ \n\t\u0001 <b>&amp;</b>",
    "e": "",
    "n": 7,
    "f": 2.5,
    "no": False,
    "l": [3, 1, 2],
    "d": {"b": 1, "a": "x", "items": [1, 2], "C": None},
    "rows": [{"name": "bob", "age": 3}, {"name": "Al", "age": 1, "x": {"y": 2}}, {"name": "cy", "age": 3}],
    "lines": "one\n  two\r\nthree\n\nfour-four four\n",
    "deep": {"k": [{"v": [1, [2, [3]]]}]},
}

EXPRESSIONS = r"""
1 + 2 * 3 ** 2 ¦ 7 // 2 ¦ -7 // 2 ¦ 7 // -2 ¦ -7 % 3 ¦ 7 % -3 ¦ 7 / 2 ¦ 6 / 2 ¦ 2 ** -1 ¦ 2 ** 0.5 ¦ 7.5 // 2 ¦ -7.5 % 2 ¦ 1e16 ¦ 1e15 ¦ 1e-5 ¦ 0.0001
1.0 ¦ 1e22 + 1
0x1F + 0b11 + 0o17 ¦ 1_000 ¦ 10 ** 20 ¦ 2 ** 100 ¦ True + 1 ¦ true and 0 ¦ [] or 'x' ¦ not none ¦ 1 < 2 < 3 ¦ 1 < 3 < 2 ¦ 1 == 1.0 == true ¦ 'a' < 'b'
[1, 2] < [1, 3]
'a' ~ 1 ~ none ~ [1, 'b'] ~ 2.0 ¦ 'a' 'b' ¦ 'a' * 3 ¦ 3 * [1] ¦ [1] + [2] ¦ (1,) + (2, 3) ¦ (1,) ¦ () ¦ [] ¦ {} ¦ {'a': {'b': (1, 'c')}} ¦ none ¦ true
1.50 ¦ "it's" ¦ ['it\'s', "a\"b"]
'\n\t\\\x41\u00e9\101\q' ¦ 'a\
b'|q|[q]|u|[u]|d|d.items()|d.keys()|d.values()|range(5)|range(1, 10, 3)|range(3)[1]|range(10)[2:8:3]|missing|[missing]|missing.x|missing[0]
missing|length ¦ missing|list ¦ missing|first ¦ missing|last ¦ missing|items ¦ missing|join ¦ missing + 1 ¦ missing == missing2 ¦ missing is defined
missing or 'x' ¦ -missing ¦ missing ~ 'x'
d.zz ¦ d.zz.x ¦ d['zz'] ¦ rows[9] ¦ rows[-1].name ¦ none.x ¦ none['x'] ¦ none|length ¦ n.x ¦ s.x ¦ s[0] ¦ s[-1] ¦ s[99] ¦ s[1:4] ¦ s[::-1] ¦ s[::2]
s[-3:] ¦ u[3:5] ¦ u[::-1] ¦ l[1:] ¦ l[::-1] ¦ l[5:] ¦ l[1:0] ¦ l[::0]
'x' in 'xyz' ¦ 'x' not in s ¦ 1 in l ¦ 'b' in d ¦ none in [none] ¦ 1 in 5 ¦ 1 in none ¦ 'a' in none ¦ [1] in [[1]] ¦ 5 in range(9) ¦ 5.5 in range(9)
'%s and %d' % ('a', 5) ¦ '%5.1f|%-5s|%05d|%x|%%' % (2.25, 'a', 42, 255) ¦ '%(a)s' % {'a': 1} ¦ '%s' % none ¦ '%s' % [1] ¦ '%d' % 'x' ¦ '%s %s' % 'x'
'%d' % 2.9 ¦ '%r' % 'a' ¦ '%c%c' % ('a', 98) ¦ '%s' % (l,)
'%+d % d %e %g %G' % (1, 2, 12345.678, 0.00001, 1e20) ¦ 'abc' % () ¦ 'abc' % 1 ¦ '%.2s|%5s' % ('abc', 'é') ¦ '%*d' % (5, 1)
'{} {}'.format(1, 'a') ¦ '{1}{0}'.format('a', 'b') ¦ '{x!r:>6}'.format(x='a') ¦ '{0.name}{0[age]}'.format(rows[0])
'{:05.1f}|{:<4}|{:^4}|{:,}'.format(2.25, 'a', 'b', 1234567) ¦ '{{}}'.format() ¦ '{'.format() ¦ '{}'.format()
'{:+d} {:x} {:#o} {:b} {:e} {:%} {:g}'.format(1, 255, 8, 5, 1.5, 0.25, 1e10) ¦ '{:{}}'.format('a', 4) ¦ '{:d}'.format(true) ¦ '{:>5}'.format(none)
'{:.3}'.format('abcdef') ¦ '{:010,}'.format(1234) ¦ '{:_}'.format(1234567)
s.upper() ¦ s.lower() ¦ s.title() ¦ s.swapcase() ¦ s.capitalize() ¦ u.upper() ¦ u.lower() ¦ u.title() ¦ u.casefold() ¦ s.split() ¦ s.split(',')
s.split(', ', 1) ¦ s.rsplit(' ', 1) ¦ s.rsplit('o', maxsplit=1) ¦ ' a  b '.split() ¦ ' a  b '.split(none, 1)
' a  b '.rsplit(none, 1) ¦ ' a  b '.split(' ') ¦ ''.split() ¦ ''.split(',') ¦ s.split('') ¦ lines.splitlines() ¦ lines.splitlines(true)
s.strip('Hd') ¦ 'xxaxx'.lstrip('x') ¦ 'xxaxx'.rstrip('x') ¦ '  a '.strip() ¦ '\u3000a\x1c'.strip()
s.startswith('He') ¦ s.startswith(('x', 'H')) ¦ s.startswith('e', 1) ¦ s.endswith('d') ¦ s.endswith(('d',), 0, 5) ¦ s.find('o') ¦ s.find('o', 5)
s.rfind('o') ¦ s.index('zz') ¦ s.count('l') ¦ s.count('') ¦ s.replace('l', 'L') ¦ s.replace('l', 'L', 1) ¦ s.replace('', '-')
s.partition(', ') ¦ s.rpartition('o') ¦ s.partition('zz') ¦ s.removeprefix('Hello') ¦ s.removesuffix('World') ¦ s.removeprefix('x') ¦ '5'.zfill(3)
'-5'.zfill(4) ¦ 'a'.center(4) ¦ 'a'.center(5, '*') ¦ 'a'.ljust(3) ~ '|' ¦ 'a'.rjust(3) ¦ '-'.join(['a', 'b']) ¦ '-'.join([1]) ¦ '-'.join('ab')
''.isdigit() ¦ '12'.isdigit() ¦ '²'.isdigit() ¦ '²'.isdecimal() ¦ '½'.isnumeric() ¦ '日'.isalpha() ¦ 'a1'.isalnum() ¦ ' '.isspace() ¦ ''.isspace()
'Ab'.istitle() ¦ 'AB'.isupper() ¦ 'ab1'.islower() ¦ 'a'.isascii() ¦ 'é'.isascii() ¦ 'a\tb'.expandtabs(4) ¦ 'a_1'.isidentifier()
s.format_map({}) ¦ s.foo() ¦ s.upper ¦ d.update({}) ¦ d.pop('a') ¦ l.append(1) ¦ l.pop() ¦ l.index(1) ¦ l.count(3) ¦ l.index(9)
l.copy() ¦ d.copy() ¦ d.get('a') ¦ d.get('zz') ¦ d.get('zz', 5) ¦ d.get() ¦ d.items ¦ d['items'] ¦ (1, 2).count(1) ¦ d.keys()|list
s.__class__ ¦ s.__class__.x ¦ d.__len__() ¦ n.real ¦ f.is_integer() ¦ n.bit_length() ¦ 2.0.is_integer() ¦ n()|d() ¦ s() ¦ none()
l|sort ¦ l|sort(reverse=true) ¦ ['b', 'A', 'a']|sort ¦ ['b', 'A', 'a']|sort(case_sensitive=true)
rows|sort(attribute='name')|map(attribute='name')|join(',') ¦ rows|sort(attribute='age,name')|map(attribute='name')|join(',') ¦ [1, 'a']|sort
[none, 1]|sort
l|first ¦ l|last ¦ l|sum ¦ l|max ¦ l|min ¦ []|max ¦ rows|map(attribute='age')|list ¦ rows|map(attribute='x.y')|list
rows|map(attribute='zz', default='?')|list ¦ rows|sum(attribute='age') ¦ ['a']|sum ¦ [[1], [2]]|sum(start=[]) ¦ l|map('string')|list
l|map('pow')|list ¦ l|map
rows|selectattr('age', 'equalto', 3)|map(attribute='name')|list ¦ rows|selectattr('x')|list|length
rows|rejectattr('x', 'defined')|map(attribute='name')|join ¦ l|select('odd')|list ¦ l|reject('gt', 1)|list ¦ l|select|list ¦ none|select|list
5|select|list ¦ rows|selectattr|list
rows|groupby('age')|map('first')|list ¦ rows|groupby('age') ¦ rows|groupby('name')|map(attribute='grouper')|list ¦ ['a', 'A', 'b']|unique|list
['a', 'A']|unique(case_sensitive=true)|list ¦ rows|unique(attribute='age')|map(attribute='name')|list ¦ [[1], [1]]|unique|list
l|batch(2)|list ¦ l|batch(2, 'x')|list ¦ l|slice(2)|list ¦ l|slice(2, 0)|list ¦ l|reverse|list ¦ s|reverse|d|reverse|list
5|reverse|d|dictsort|d|dictsort(by='value') ¦ {'b': 2, 'a': 1}|dictsort(reverse=true)|d|items|list ¦ l|items|list ¦ l|join('-')
rows|join(', ', attribute='name') ¦ s|join('.')|d|join
s|length|d|length ¦ 5|length ¦ l|map('string')|length ¦ s|list|d|list ¦ none|list ¦ s|upper ¦ none|upper ¦ 5|string ¦ [1]|string ¦ s|title
'a-b (c) [d'|title ¦ s|capitalize ¦ s|trim ¦ 'xax'|trim('x') ¦ s|replace('l', 'L') ¦ 5|replace(5, 'x') ¦ s|replace('l', 'L', 1) ¦ s|center(20)
s|wordcount ¦ 'a b-c'|wordcount
'3'|int ¦ 'x'|int ¦ 'x'|int(5) ¦ '0x1f'|int(base=16) ¦ '12.7'|int ¦ 3.9|int ¦ -3.9|int ¦ none|int ¦ none|int(9) ¦ '1_0'|int ¦ ' 4 '|int ¦ 'x'|float
'2.5'|float ¦ 'inf'|float ¦ none|float(1.5) ¦ true|int ¦ 2.5|round ¦ 3.5|round ¦ 2.675|round(2) ¦ 2.1|round(0, 'ceil') ¦ 25|round(-1)
2.5|round(method='x')
-5|abs ¦ 'x'|abs ¦ 1000000|filesizeformat ¦ 1024|filesizeformat(true) ¦ 1|filesizeformat ¦ 1.5|filesizeformat ¦ none|default('x')
missing|default('x') ¦ ''|default('x') ¦ ''|default('x', true) ¦ missing|d(1) ¦ s|truncate(8) ¦ s|truncate(8, true) ¦ s|truncate(12) ¦ s|truncate(2)
s|truncate(9, false, '~', 0)
lines|indent ¦ lines|indent(2, true) ¦ lines|indent('> ', blank=true) ¦ ''|indent(first=true) ¦ lines|wordwrap(5) ¦ 'a long-ish word here'|wordwrap(6)
'abcdefghij'|wordwrap(4) ¦ 'abcdefghij k'|wordwrap(4, false) ¦ 'a b c'|wordwrap(3, wrapstring='|')
q|e ¦ q|escape|e ¦ q|forceescape ¦ '<'|safe|e ¦ ('<'|safe) + '<' ¦ '<' + ('<'|safe) ¦ ('<'|safe) ~ '<' ¦ ('%s'|safe) % '<' ¦ ['<'|safe]
('<'|safe)|upper ¦ ('<'|safe) is escaped ¦ '<b>x  y</b> &lt;'|striptags ¦ {'a': '<', 'b': none}|xmlattr ¦ {'a b': 1}|xmlattr ¦ 'a b/é'|urlencode
{'a': 'x y'}|urlencode ¦ [('a', 1)]|urlencode
messages[3]|tojson|d|tojson ¦ q|tojson ¦ u|tojson ¦ u|tojson(ensure_ascii=true) ¦ u|tojson(true)|d|tojson(indent=2)
deep|tojson(indent=1)|d|tojson(sort_keys=true)|d|tojson(separators=(',', ':')) ¦ []|tojson(indent=2) ¦ {}|tojson(indent=2) ¦ (1, none)|tojson
{1: 2, none: 3, true: 4, 1.5: 5}|tojson ¦ missing|tojson ¦ [missing]|tojson
{(1, 2): 1}|tojson ¦ 1e16|tojson ¦ 1.0|tojson ¦ range(2)|tojson ¦ d.items()|tojson ¦ l|map('string')|tojson
namespace(a=1)|tojson|d|tojson(2)|d|tojson(x=1) ¦ '\x7f\u2028\x1f'|tojson ¦ deep|tojson(indent='\t')
n is odd ¦ n is even ¦ n is divisibleby 7 ¦ n is divisibleby(0) ¦ s is string ¦ s is mapping ¦ s is sequence ¦ s is iterable ¦ n is number
f is float ¦ n is integer ¦ true is integer ¦ true is boolean ¦ none is none ¦ none is iterable ¦ d is mapping ¦ l is sequence ¦ range(2) is sequence
d.items() is iterable ¦ d.items() is sequence
n is in [7] ¦ n is eq 7 ¦ n is ne 7 ¦ n is gt 5 ¦ n is ge(7) ¦ n is lessthan 9 ¦ s is lower ¦ s is upper ¦ 'a' is lower ¦ 'upper' is filter
'nope' is filter ¦ 'odd' is test ¦ s is sameas s ¦ none is sameas none ¦ n is not none ¦ not n is none ¦ missing is undefined ¦ s.upper is callable
range is callable ¦ n is callable ¦ n is true ¦ no is false ¦ missing is callable
'a' if n else 'b' ¦ 'a' if no ¦ ('a' if no) is defined ¦ 'a' if no else 'b' if n else 'c' ¦ (1 if no) + 1 ¦ [1, 2][0] ¦ {'a': 1}['a'] ¦ {'a': 1}.a
deep.k[0].v[1][1][0] ¦ deep['k'].0.v.0 ¦ rows[0]['na' ~ 'me'] ¦ -n|abs ¦ -2 ** 2 ¦ 2 ** 3 ** 2 ¦ +n ¦ 1 - 1 - 1 ¦ not n == 7 ¦ (not n) == 7
1 if 2 if 0 else 3
namespace(a=1).a ¦ namespace(a=1)['a'] ¦ namespace(a=1) ¦ namespace({'b': 2}).b ¦ namespace(a=1).b ¦ dict(a=1, b='x') ¦ dict([('a', 1)])
dict(d, z=1) ¦ dict(1) ¦ cycler('a', 'b').next() ¦ cycler() ¦ joiner()() ¦ range(100001) ¦ range('a') ¦ range(3.0) ¦ range(1, 2, 0) ¦ range()
lipsum is defined ¦ foo(1)
strftime_now('%Y-%m-%d %H:%M:%S') ¦ strftime_now('%d %b %Y, %A %-d %e %j %y %p %I') ¦ strftime_now('%Q %f %Z|%%') ¦ raise_exception('no: ' ~ n)
raise_exception(5) ¦ raise_exception() ¦ self ¦ super() ¦ loop ¦ caller() ¦ varargs
n|attr('real')|d|attr('b')|d|attr('items') ¦ rows|map('attr', 'name')|list ¦ s|map('upper')|join|d|map('upper')|join ¦ l|map('default', 1)|list
['1', 'x']|map('int', 5)|list ¦ messages|map(attribute='role')|unique|join(' ') ¦ messages|selectattr('role', 'in', ['user', 'tool'])|list|length
s|truncate(1e3) ¦ s|truncate(5.0) ¦ s|truncate(1.5) ¦ s|truncate(12, leeway=0.5) ¦ s|truncate('a') ¦ [1]|truncate(3.0) ¦ ''|wordwrap(none) ¦ s|wordwrap(none)
'{"b": 1, "a": "x", "items": [1]}'|wordwrap(5) ¦ 'so_long--way_off and-so-on x--y a_-b_-c'|wordwrap(4) ¦ 'ab-cd-ef gh--ij--kl a1-b2-c3 1-2'|wordwrap(3) ¦ 'ä-öü-ß é--è'|wordwrap(4, break_on_hyphens=false)
l|batch('a', 0)|list ¦ l|batch('a')|list ¦ []|batch('a', 0)|list ¦ l|batch(2.0)|list ¦ l|batch(2.0, 0)|list ¦ l|batch(9.5, 0)|list ¦ l|batch(-1, 0)|list ¦ l|batch(none, 0)|list ¦ l|batch(true, 0)|list
{l|map('string'): 1}|length ¦ {d.keys(): 1} ¦ {d.items(): 1} ¦ ('a,b'|safe).rpartition('x')|last|escape ¦ ('a'|safe).partition('x')|map('escape')|list
' a  b c '.split(none, 2) ¦ ' a  b c '.rsplit(none, 2) ¦ ' a  b c '.rsplit(none, 0) ¦ ' a  b c '.split(none, 0) ¦ ' a  b c '.rsplit() ¦ 'a b'.split(none, 9) ¦ 'a b'.rsplit(none, -2) ¦ '  '.split(none, 0) ¦ '  '.rsplit(none, 3)
'%-05d|%+5d|% 05d|%.3d|%8.3d|%-8.3d|%08.3d|%#x|%#010x|%+.2e|%010.2f|%-8g|' % (42, 3, 7, 5, -5, 5, 5, 255, 255, 1.5, -2.25, 0.5) ¦ '%05s|%-3c|%3c|%05r' % ('a', 'b', 99, 'd') ¦ '%05f|%-5F|%+g' % (1e999, 1e999, -1e999) ¦ '%x' % 2.5 ¦ '%i %u' % (2.5, -3) ¦ '%+ d|% +d' % (1, 2) ¦ '%*d|%-*d|%.*f' % (-4, 1, 4, 2, 1, 2.55)
'é١²ⅷ五\u0301'|map('escape')|map('list')|list ¦ 'é'.isalpha() ¦ '\u0301'.isalpha() ¦ 'ⅷ'.isalpha() ¦ '五'.isalpha() ¦ 'ª'.isalpha() ¦ 'Ⓐ'.isalpha() ¦ '²'.isalnum() ¦ 'aé五'.isalpha() ¦ 'a b'.isalpha()
"""

STATEMENTS = [
    # White space.
    "  {% if true %}\n  a\n  {% endif %}\n  b\n", "a\n  {%- if true -%}\n  b\n  {%- endif %}\nc", "{% if true +%}\na{% endif %}",
    "  {%+ if true %}a{% endif %}", "{{ 1 }}\n{{ 2 }}\n", "a\n\n", "a\n", "\n", "", "{# c #}\na", "  {# c #}  \na", "{#- c -#}  a",
    "a\r\nb\rc\n{% if true %}\r\nd{% endif %}\r\n", "{% raw %}\n{{ x }}{% endraw %}\nb", "a {%- raw -%} {{ }} {%- endraw -%} b",
    "x{{- ' a ' -}}  y", "x  {{ 1 }}\n", "\t{% set x = 1 %}\t{{ x }}", "a {% if true %} b {% endif %} c", "{{ '\n' }}x", "{{ 1 -}}\n\n2",
    "{% if true -%}\n\n x {%- endif %}", "{%- if true %}\n{%- endif %}\n x", "{{ '{{' }}{{ '%}' }}", "{{ {'a': 1}['a'] }}}", "{{'a'}}{%if 1%}b{%endif%}",
    "a{#\nlong\n#}b", "{% set x = {'a': {'b': 1}} %}{{ x }}", "{{ [1,\n2] }}", "a\n{# c #}\nb\n{#- d #}\ne", "{%set x=1%}\n\n{{x}}",
    # Conditions and loops.
    "{% if n > 5 %}a{% elif n > 3 %}b{% else %}c{% endif %}", "{% if 0 %}a{% elif 0 %}b{% else %}c{% endif %}", "{% if missing %}a{% endif %}b",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }};{% endfor %}",
    "{% for x in l %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}", "{% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}", "{% for x in [] %}a{% else %}b{% endfor %}", "{% for x in missing %}a{% else %}b{% endfor %}",
    "{% for x in none %}{% endfor %}", "{% for x in 5 %}{% endfor %}", "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k in d %}{{ k }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% endfor %}", "{% for x in l if x > 9 %}{% else %}none{% endfor %}",
    "{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in l %}{% break %}{% else %}e{% endfor %}", "{% for x in l %}{% continue %}{% else %}e{% endfor %}", "{% break %}",
    "{% for a in [[1, [2, [3]]]] recursive %}{% if a is iterable %}({{ loop.depth }}{{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
    "{% for x in 'ab' %}{{ x }}-{% endfor %}", "{% for (a, b) in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}", "{% for a, b in [1] %}{% endfor %}", "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% for x in l|map('string') %}{{ loop.length }}{{ loop.last }}{% endfor %}", "{% for x in l recursive %}{{ loop(x) }}{% endfor %}", "{% for loop in l %}{% endfor %}",
    "{% for x in l %}{% for y in l %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}", "{% for x in range(3) %}{{ x }}{% endfor %}{{ x }}", "{{ loop is defined }}",
    "{% for x in l %}{% set loop = 1 %}{% endfor %}", "{% for x in l %}{{ loop }}{% endfor %}", "{% for x in l if loop.index %}{% endfor %}", "{% set g = l|map('string') %}{{ g|list }}{{ g|list }}",
    # Variables and scopes.
    "{% set x = 1 %}{% for i in l %}{% set x = x + i %}{{ x }} {% endfor %}{{ x }}", "{% set ns = namespace(x=1) %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% if true %}{% set x = 1 %}{% endif %}{{ x }}", "{% if false %}{% set n = 1 %}{% endif %}{{ n }}", "{% for i in [1, 2] %}{{ n }}{% endfor %}{% set n = 1 %}{{ n }}",
    "{{ n }}{% for i in [1] %}{{ n }}{% endfor %}{% set n = 1 %}{{ n }}", "{% set n = n + 1 %}{{ n }}", "{% set n %}{{ n }}x{% endset %}{{ n }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a = 1, 2 %}{{ a }}",
    "{% set a, b = [1] %}", "{% set x %} a {% endset %}[{{ x }}]", "{% set x | upper | trim %} a {% endset %}[{{ x }}]", "{% with a = 1, b = n %}{{ a }}{{ b }}{% endwith %}{{ a }}", "{% with n = 1 %}{% with m = n %}{{ m }}{% endwith %}{% endwith %}{{ n }}",
    "{% with %}{% set z = 1 %}{{ z }}{% endwith %}{{ z }}", "{% set d.x = 1 %}", "{% set missing.x = 1 %}", "{% set true = 1 %}", "{% set ns = namespace() %}{% set ns.a, b = 1, 2 %}{{ ns.a }}{{ b }}", "{% set ns = namespace() %}{% set ns.a %}x{% endset %}{{ ns }}",
    "{% filter upper %}a{{ s }}{% endfilter %}", "{% filter replace('a', 'b')|upper %}aa{% endfilter %}", "{% for i in [1, 2] %}{% set x %}{{ i }}{% if i == 1 %}{% continue %}{% endif %}{% endset %}{{ x }}{% endfor %}",
    "{{ 'a\\\nb' }}", "{% set x = 1 %}{% macro m() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ m() }}", "{% macro m() %}{{ y }}{% endmacro %}{% set y = 2 %}{{ m() }}", "{% for i in [1] %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}",
    # Macros and calls.
    "{% macro m(a, b=2, *c) %}{% endmacro %}", "{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=4, a=5) }}{{ m() }}", "{% macro m(a, b=a) %}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}{% endmacro %}{{ m(z=2) }}", "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }}", "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{{ n }}{% endcall %}", "{% macro m() %}{{ caller(1, y=2) }}{% endmacro %}{% call(x, y) m() %}{{ x }}{{ y }}{% endcall %}",
    "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}", "{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}", "{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}", "{{ m() }}{% macro m() %}{% endmacro %}",
    "{% macro m() %}a{% endmacro %}{{ m }}{{ m.name }}{{ m.arguments }}{{ m()|length }}", "{% macro m() %}{{ loop is defined }}{% endmacro %}{% for i in [1] %}{{ m() }}{% endfor %}", "{% macro m(x) %}{{ x|default('d') }}{{ x is defined }}{% endmacro %}{{ m() }}", "{% call m %}{% endcall %}",
    "{% macro outer() %}{% macro inner() %}{{ x }}{% endmacro %}{% set x = 5 %}{{ inner() }}{% endmacro %}{{ outer() }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'x': 2}) }}{{ m(*[1, 2]) }}", "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}x{% endmacro %}{{ a() }}",
    # Tags.
    "{% generation %}a{% set x = 1 %}{{ n }}{% endgeneration %}{{ x }}", "{% for i in l %}{% generation %}{{ i }}{{ loop.index }}{% endgeneration %}{% endfor %}", "{% block b %}a{{ n }}{% endblock %}", "{% set z = 1 %}{% block b %}{{ z }}{% endblock %}", "{% for i in l %}{% block b %}{{ i }}{% endblock %}{% endfor %}",
    "{% for i in l %}{% block b scoped %}{{ i }}{{ loop.index }}{% endblock %}{% endfor %}", "{% block b %}x{% endblock %}{{ self.b() }}", "{% block b %}{{ super() }}{% endblock %}", "{% block b %}{% endblock %}{% block b %}{% endblock %}", "{% block b required %}{% endblock %}", "{% block b %}{% endblock b %}",
    "{% include 'x' %}", "{% if false %}{% include 'x' %}{% endif %}ok", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% extends 'x' %}", "{% print 1, 2 %}", "{% autoescape false %}{{ '<' }}{% endautoescape %}", "{% do x %}", "{% trans %}{% endtrans %}", "{% nope %}", "{% endif %}", "{% if %}",
    "{{ n|nope }}", "{{ n is nope }}", "{% if false %}{{ n|nope }}{% endif %}ok", "{% if true %}{{ n|nope }}{% endif %}", "{{ 1 if true else n|nope }}", "{{ }}", "{{ 1", "{% if true %}", "{# c", "{{ 'a }}", "{{ (1 }}", "{{ 1) }}", "{{ a b }}", "{{ 1 ! 2 }}", "{{ a. }}", "{{ a.b.1.c }}", "{{ f(a=1, 2) }}", "{{ f(a=1, a=2) }}",
    "{{ [1, 2 }}", "{{ {1} }}", "{% for x l %}{% endfor %}", "{% set 1 = 2 %}", "{% raw %}", "{% for x in l %}", "{% macro m(a=1, b) %}{% endmacro %}", "{% macro m(a, a) %}{% endmacro %}", "{{ n is }}", "{{ n| }}", "{{ 08 }}", "{{ 1.e5 }}", "{{ x is string is string }}", "{{ 'a'.'b' }}", "{% else %}", "{% if 1 %}{% endfor %}",
    # Chats.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages if m.role == 'user' %}[INST] {{ m.content if m.content is string else m.content|selectattr('type', 'equalto', 'text')|map(attribute='text')|join }} [/INST]{% endfor %}",
    "{%- for m in messages %}\n  {%- if m.tool_calls is defined and m.tool_calls %}\n    {%- for c in m.tool_calls %}\n{{ '<tool_call>' ~ c.function|tojson ~ '</tool_call>' }}\n    {%- endfor %}\n  {%- endif %}\n{%- endfor %}",
    "{% for m in messages %}{% if m['content'] is string and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}{% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content.strip() %}{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}{{ sys }}|{{ rest|length }}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate, ' ~ m.role ~ '!') }}{% endif %}{% endfor %}",
    "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% if m.role == 'user' and ns.last < 0 %}{% set ns.last = messages|length - loop.index %}{% endif %}{% endfor %}{{ ns.last }}",
    "{{ tools|tojson(indent=4) }}\n{{ tools[0].function.description }}", "{% for m in messages %}{{ m.reasoning_content|default('-', true) }}{{ m.get('name', '') }}{% endfor %}", "{{ documents is none }}{{ documents|length if documents else 0 }}",
    "{% macro part(c) %}{% if c is string %}{{ c }}{% elif c is iterable and c is not mapping %}{% for p in c %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ part(m.content)|trim }};{% endfor %}",
    "{% for m in messages %}{{ m.items()|list|length }}{{ m.keys()|join('+') }} {% endfor %}", "{{ messages[2].content.strip() }}", "{{ messages[2].content ~ '' }}", "{{ messages[2]['content'] + 'x' }}",
]


def templates():
    for line in EXPRESSIONS.strip().split("\n"):
        yield from ("{{ " + expression + " }}" for expression in line.split(" ¦ "))
    yield from STATEMENTS


def main():
    lines = []
    for template in dict.fromkeys(templates()):
        answer = render(template, CONTEXT)
        if " at 0x" not in answer.get("ok", ""):
            lines.append(json.dumps({"template": template, **answer}, ensure_ascii=False))
    context = json.dumps(CONTEXT, ensure_ascii=False)
    (HERE / "cases.json").write_text(f'{{"context": {context},\n"cases": [\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{len(lines)} cases")


if __name__ == "__main__":
    main()
