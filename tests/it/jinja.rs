//! Chat templates against jinja2's own answers, where their characters come from, and random templates.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use adaptive_kvcache::jinja::{Limits, Origin, Rendered, Template, TemplateError, TemplateErrorKind};
use chrono::{NaiveDate, NaiveDateTime};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::support::computed;

/// The time at which `scripts/jinja_oracle.py` renders.
fn now() -> NaiveDateTime {
    NaiveDate::from_ymd_opt(2024, 7, 6).and_then(|day| day.and_hms_opt(15, 4, 5)).unwrap()
}

fn render(template: &str, input: &Value) -> Result<Rendered, TemplateError> {
    let template = Template::parse(template, "x")?.with_now(now());
    template.render(&Map::new(), input.as_object().unwrap(), &Limits::default())
}

#[test]
fn small_templates_render_as_in_jinja2() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/jinja/cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 600);
    let mut wrong = String::new();
    for case in cases {
        let template = case["template"].as_str().unwrap();
        let ours = render(template, &file["context"]);
        let right = match &ours {
            Ok(text) => case["ok"] == text.text(),
            Err(error) if error.kind() == TemplateErrorKind::Refused => case["refused"] == error.message(),
            Err(error) if error.kind() == TemplateErrorKind::Limit => false,
            Err(error) => case.get("error").is_some() && error.kind() != TemplateErrorKind::Unsupported,
        };
        if !right {
            let ours = ours.map_or_else(|error| error.to_string(), |text| text.text().to_owned());
            writeln!(wrong, "{case}\n  ours {ours:?}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The rendered text with what the user wrote in brackets.
fn marked(template: &str, input: &Value) -> String {
    let rendered = render(template, input).unwrap_or_else(|error| panic!("{template}: {error}"));
    let mut text = String::new();
    let mut last = None;
    for (piece, origin) in rendered.pieces() {
        assert!(!piece.is_empty() && last != Some(origin), "pieces are maximal");
        last = Some(origin);
        match origin {
            Origin::Template => text.push_str(piece),
            Origin::Input => write!(text, "⟦{piece}⟧").unwrap(),
        }
    }
    let whole: String = rendered.pieces().map(|(piece, _)| piece).collect();
    assert_eq!(whole, rendered.text());
    text
}

#[test]
fn characters_know_who_wrote_them() {
    let input = json!({
        "c": "ab<é>", "w": " x y ", "l": ["p", "q"], "d": {"k": "v"}, "n": 5, "lines": "a\nb", "s": "ΑΣ", "t": "a\tb",
    });
    for (template, expected) in [
        ("{{ c }}", "⟦ab<é>⟧"),
        ("<{{ c }}>", "<⟦ab<é>⟧>"),
        ("{{ '<' + c ~ '>' }}", "<⟦ab<é>⟧>"),
        ("{{ c[1:3] }}{{ ('x' ~ c)[0:2] }}", "⟦b<⟧x⟦a⟧"),
        ("{{ ('x' ~ c ~ 'y')[::-1] }}", "y⟦>é<ba⟧x"),
        ("{{ c[0] }}{{ c|first }}{{ c|last }}{{ c|list|join }}", "⟦aa>ab<é>⟧"),
        ("{{ ('x' ~ c).upper() }}{{ c|title }}{{ c.swapcase() }}", "X⟦AB<É>Ab<É>AB<É>⟧"),
        ("{{ ('Σ' ~ s).lower() }}", "σ⟦ας⟧"),
        ("{{ w.strip() }}|{{ w|trim }}|{{ ('-' ~ w).lstrip('-') }}", "⟦x y⟧|⟦x y⟧|⟦ x y ⟧"),
        ("{{ w.split() }}", "['⟦x⟧', '⟦y⟧']"),
        ("{{ ('a,' ~ c ~ ',b').split(',')|join('+') }}", "a+⟦ab<é>⟧+b"),
        ("{{ c.partition('<')|join('|') }}", "⟦ab⟧|<|⟦é>⟧"),
        ("{{ lines.splitlines()|join('\n') }}{{ lines|indent(2) }}", "⟦a⟧\n⟦ba⟧\n  ⟦b⟧"),
        ("{{ c.replace('b', 'X') }}{{ 'a-b'.replace('-', c) }}", "⟦a⟧X⟦<é>⟧a⟦ab<é>⟧b"),
        ("{{ 'aXbX'|replace('X', c[0], 1) }}", "a⟦a⟧bX"),
        ("{{ l|join(', ') }}{{ ', '.join(l) }}{{ '12'|join(c[0]) }}", "⟦p⟧, ⟦qp⟧, ⟦q⟧1⟦a⟧2"),
        ("{{ l }}{{ d }}{{ d.items()|list }}", "['⟦p⟧', '⟦q⟧']{'⟦k⟧': '⟦v⟧'}[('⟦k⟧', '⟦v⟧')]"),
        ("{{ d|tojson }}{{ c|tojson }}", "{\"⟦k⟧\": \"⟦v⟧\"}\"⟦ab<é>⟧\""),
        ("{{ ['\"' ~ c[0]]|tojson }}", "[\"\\\"⟦a⟧\"]"),
        ("{{ '%s-%5s|%-3s' % (c[0], 'x', c[1]) }}", "⟦a⟧-    x|⟦b⟧  "),
        ("{{ '{}{:>3}{!r}'.format(c[0], c[1], c[2]) }}", "⟦a⟧  ⟦b⟧'⟦<⟧'"),
        ("{{ c[:2].format() }}{{ (c[0] ~ '%s') % 'x' }}", "⟦aba⟧x"),
        ("{{ c|e }}{{ c|urlencode }}", "⟦ab&lt;é&gt;ab%3C%C3%A9%3E⟧"),
        ("{{ c.center(7) }}|{{ c.ljust(6, '*') }}|{{ 'x'.rjust(3, c[0]) }}", " ⟦ab<é>⟧ |⟦ab<é>⟧*|⟦aa⟧x"),
        ("{{ c * 2 }}{{ c|truncate(3, true, '..', 0) }}", "⟦ab<é>ab<é>a⟧.."),
        ("{{ n }}{{ n|string }}{{ c|length }}", "555"),
        ("{% set x %}<{{ c }}>{% endset %}{{ x }}", "<⟦ab<é>⟧>"),
        ("{% filter upper %}x{{ c }}{% endfilter %}", "X⟦AB<É>⟧"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(c) }}{{ m('y') }}", "<⟦ab<é>⟧><y>"),
        ("{% for x in c %}{{ x }}{{ loop.nextitem }}{% endfor %}", "⟦abb<<éé>>⟧"),
        (
            "{% set ns = namespace(x='') %}{% for x in l %}{% set ns.x = ns.x ~ x ~ ';' %}{% endfor %}{{ ns.x }}",
            "⟦p⟧;⟦q⟧;",
        ),
        ("{{ 'ab<é>' == c }}{{ {'v': 'tpl'}[d.k] }}{{ {'v': 1}|tojson }}", "Truetpl{\"v\": 1}"),
        ("{{ l|map('upper')|join }}{{ l|sort(reverse=true)|first }}{{ l|unique|list }}", "⟦PQq⟧['⟦p⟧', '⟦q⟧']"),
        ("{{ t.expandtabs(4) }}{{ '-5'.zfill(4) }}{{ c.removeprefix('a') }}", "⟦a   b⟧-005⟦b<é>⟧"),
        ("{{ ('<b>' ~ w ~ '</b>')|striptags }}{{ w|wordwrap(1) }}", "⟦x⟧ ⟦yx⟧\n⟦y⟧"),
        ("{{ {d.k: c[0]}|xmlattr }}{{ dict(a=c[0]) }}", " ⟦v⟧=\"⟦a⟧\"{'a': '⟦a⟧'}"),
        ("{% generation %}{{ c }}{% endgeneration %}", "⟦ab<é>⟧"),
    ] {
        assert_eq!(marked(template, &input), expected, "{template}");
    }
}

#[test]
fn what_the_program_gives_is_the_templates() {
    let template = Template::parse("{{ bos_token }}{{ x }}{{ messages[0] }}", "x").unwrap();
    let trusted = json!({"bos_token": "<s>", "x": "trusted"});
    let input = json!({"messages": ["hi"], "x": "<s>"});
    let (trusted, input) = (trusted.as_object().unwrap(), input.as_object().unwrap());
    let rendered = template.render(trusted, input, &Limits::default()).unwrap();
    let pieces: Vec<_> = rendered.pieces().collect();
    assert_eq!(pieces, [("<s>", Origin::Template), ("<s>hi", Origin::Input)], "the user's variables win");
    assert_eq!(render("", &json!({})).unwrap().pieces().count(), 0);
}

#[test]
fn errors_name_the_template_the_line_and_the_kind() {
    let error = |template: &str| render(template, &json!({})).unwrap_err();
    for (template, kind, line, text) in [
        (
            "a\n{% if %}",
            TemplateErrorKind::Syntax,
            2,
            "`x`, line 2: expected an expression, got `end of statement block`",
        ),
        ("\n\n{{ 1|nope }}", TemplateErrorKind::Syntax, 3, "`x`, line 3: no filter named `nope`"),
        (
            "{% if true %}\n{{ 1 is nope }}{% endif %}",
            TemplateErrorKind::Syntax,
            2,
            "`x`, line 2: no test named `nope`",
        ),
        ("{% nope %}", TemplateErrorKind::Syntax, 1, "`x`, line 1: unknown tag `nope`"),
        (
            "{{ [1]|random }}",
            TemplateErrorKind::Unsupported,
            1,
            "`x`, line 1: the filter `random` is not supported by this program",
        ),
        (
            "\r\n{{ 'a'.encode() }}",
            TemplateErrorKind::Unsupported,
            2,
            "`x`, line 2: the method `encode` of a string is not supported by this program",
        ),
        (
            "{{ 2 ** 300 }}",
            TemplateErrorKind::Unsupported,
            1,
            "`x`, line 1: an integer of more than 128 bits is not supported by this program",
        ),
        (
            "{% for x in [1] %}\n{{ x.y.z }}{% endfor %}",
            TemplateErrorKind::Failed,
            2,
            "`x`, line 2: 'int object' has no attribute 'y'",
        ),
        (
            "{% macro m() %}\n\n{{ none + 1 }}{% endmacro %}{{ m() }}",
            TemplateErrorKind::Failed,
            3,
            "`x`, line 3: unsupported operand type(s) for +: 'NoneType' and 'int'",
        ),
        ("\n{{ raise_exception('no\nway') }}", TemplateErrorKind::Refused, 2, "`x`, line 2: no\nway"),
        (
            "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
            TemplateErrorKind::Limit,
            1,
            "`x`, line 1: it takes more than 10000000 steps",
        ),
    ] {
        let error = error(template);
        assert_eq!((error.kind(), error.line()), (kind, Some(line)), "{template}: {error}");
        assert_eq!(error.to_string(), text);
        assert_eq!(error.name(), "x");
        assert!(text.ends_with(error.message()));
    }
}

#[test]
fn limits_are_obeyed() {
    let template = Template::parse("{% for i in range(50) %}{{ 'x' * 50 }}{% endfor %}", "x").unwrap();
    let render = |limits: Limits| template.render(&Map::new(), &Map::new(), &limits).map(|text| text.text().len());
    let enough = Limits::default();
    assert_eq!(render(enough).unwrap(), 2500);
    for limits in [
        Limits { steps: 100, ..enough },
        Limits { output_bytes: 2000, ..enough },
        Limits { value_bytes: 20, ..enough },
        Limits { memory_bytes: 1000, ..enough },
        Limits { depth: 2, ..enough },
    ] {
        assert_eq!(render(limits).unwrap_err().kind(), TemplateErrorKind::Limit, "{limits:?}");
    }
}

/// Renders the lines of the file `TEMPLATE_CASES` into the file `TEMPLATE_RESULTS`, for `scripts/compare_templates.sh`.
#[test]
#[ignore = "run by scripts/compare_templates.sh"]
fn render_cases() {
    let file = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("`{name}` must name a file"));
    let mut results = String::new();
    for line in std::fs::read_to_string(file("TEMPLATE_CASES")).unwrap().lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let result = match render(case["template"].as_str().unwrap(), &case["context"]) {
            Ok(text) => json!({"ok": text.text()}),
            Err(error) if error.kind() == TemplateErrorKind::Refused => json!({"refused": error.message()}),
            Err(error) => json!({"error": error.message(), "kind": format!("{:?}", error.kind())}),
        };
        writeln!(results, "{result}").unwrap();
    }
    std::fs::write(file("TEMPLATE_RESULTS"), results).unwrap();
}

/// What random templates are made of.
const FRAGMENTS: &[&str] = &[
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{%- ",
    " -%}",
    "{#",
    "#}",
    "if ",
    "else",
    "elif ",
    "endif",
    "for ",
    "x",
    " in ",
    "endfor",
    "set ",
    "endset",
    "macro m(",
    ")",
    "(",
    "endmacro",
    "call m()",
    "endcall",
    "filter ",
    "endfilter",
    "raw",
    "endraw",
    "with ",
    "endwith",
    "block b",
    "endblock",
    "break",
    "continue",
    "recursive",
    "generation",
    "endgeneration",
    "namespace()",
    "ns",
    ".",
    "|",
    "=",
    "==",
    "+",
    "-",
    "*",
    "**",
    "/",
    "//",
    "%",
    "~",
    "<",
    ",",
    ":",
    "[",
    "]",
    "{",
    "}",
    "not ",
    " and ",
    " or ",
    " is ",
    "'",
    "\"",
    "\\",
    "\n",
    "\r\n",
    " ",
    "1",
    "9",
    "0.5",
    "1e9",
    "'a'",
    "'%s'",
    "'{}'",
    "none",
    "true",
    "messages",
    "content",
    "range(9)",
    "range(99999)",
    "loop",
    "loop.index",
    "loop(x)",
    "caller()",
    "self.b()",
    "m(x)",
    "upper",
    "list",
    "join",
    "map('upper')",
    "select",
    "groupby('role')",
    "sort",
    "batch(2)",
    "slice(3)",
    "tojson",
    "tojson(indent=2)",
    "replace('', x)",
    "indent",
    "format(x)",
    "string",
    "length",
    "first",
    "default(x)",
    "int",
    "e",
    "attr('x')",
    "dictsort",
    "unique",
    "wordwrap(3)",
    "center(99)",
    "urlencode",
    "round(2)",
    "sum",
    "reverse",
    "title",
    "xmlattr",
    "items()",
    "split('a')",
    "strip()",
    "format(x)",
    "get('role')",
    "join(x)",
    "defined",
    "string",
    "odd",
    "in x",
    "é",
    "\u{1F389}",
    "\u{0}",
    "{% for x in messages %}",
    "{% endfor %}",
    "{% if x %}",
    "{% endif %}",
    "{{ x }}",
    "{% set x = x ~ x %}",
    "{% set x = [x, x] %}",
    "{% set ns = namespace(a=ns) %}",
    "{% set ns.a = ns %}",
    "{% for x in range(999) %}",
    "{{ m(x) }}",
    "{% macro m(x) %}",
    "{% endmacro %}",
];

fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        20 => prop::sample::select(FRAGMENTS).prop_map(ToOwned::to_owned),
        1 => any::<String>(),
        1 => (prop::sample::select(FRAGMENTS), 1..2000usize).prop_map(|(text, times)| text.repeat(times)),
    ];
    prop::collection::vec(fragment, 0..60).prop_map(|parts| parts.concat())
}

/// What expressions are made of.
const ATOMS: [&str; 19] = [
    "x",
    "1",
    "-7",
    "0.5",
    "'a b'",
    "''",
    "none",
    "true",
    "[1, 'b']",
    "{'k': x}",
    "(1,)",
    "range(99)",
    "messages",
    "missing",
    "messages[0].content",
    "10 ** 18",
    "namespace(a=1)",
    "'%s {}'",
    "messages[0]",
];

/// What may stand behind a `|`.
const FILTERS: [&str; 43] = [
    "upper",
    "list",
    "join(x)",
    "map('string')|list",
    "select|list",
    "sort",
    "batch(x)|list",
    "slice(3)|list",
    "tojson(x)",
    "string",
    "tojson(indent=x)",
    "replace(x, 'yy')",
    "indent(x)",
    "format(x, x)",
    "length",
    "first",
    "last",
    "default(x)",
    "int(x)",
    "e",
    "items|list",
    "attr(x)",
    "dictsort",
    "unique|list",
    "wordwrap(x)",
    "center(x)",
    "urlencode",
    "round(x)",
    "sum",
    "reverse",
    "title",
    "xmlattr",
    "truncate(x)",
    "striptags",
    "wordcount",
    "filesizeformat",
    "min",
    "max",
    "groupby(x)",
    "float",
    "abs",
    "trim(x)",
    "map(attribute=x)|list",
];

/// What may stand behind a dot.
const METHODS: [&str; 27] = [
    "split(x)",
    "rsplit(none, x)",
    "strip(x)",
    "format(x, x)",
    "join(x)",
    "replace(x, x, x)",
    "find(x, x)",
    "center(x, x)",
    "zfill(x)",
    "expandtabs(x)",
    "splitlines(x)",
    "partition(x)",
    "startswith(x)",
    "count(x)",
    "index(x)",
    "get(x)",
    "items()",
    "title()",
    "lower()",
    "removeprefix(x)",
    "a",
    "x",
    "capitalize()",
    "isdigit()",
    "casefold()",
    "swapcase()",
    "istitle()",
];

/// What may stand between two expressions.
const OPERATORS: [&str; 15] = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">=", "in", "not in", "and", "or"];

/// A whole expression, so that more than the parser is reached.
fn expressions() -> impl Strategy<Value = String> {
    let of = |words: &'static [&'static str]| prop::sample::select(words);
    let (filter, method, operator) = (of(&FILTERS), of(&METHODS), of(&OPERATORS));
    let atom = of(&ATOMS).prop_map(ToOwned::to_owned);
    let expression = atom.prop_recursive(5, 40, 3, move |inner| {
        let pair = (inner.clone(), inner.clone());
        prop_oneof![
            (inner.clone(), filter.clone()).prop_map(|(of, filter)| format!("({of})|{filter}")),
            (inner.clone(), method.clone()).prop_map(|(of, method)| format!("({of}).{method}")),
            (pair.clone(), operator.clone()).prop_map(|((a, b), op)| format!("({a} {op} {b})")),
            (pair.clone(), 0..9i32).prop_map(|((a, b), step)| format!("({a})[{b}::{}]", step - 4)),
            pair.prop_map(|(a, b)| format!("({a} if {b})")),
        ]
    });
    (expression.clone(), expression).prop_map(|(x, of)| {
        format!("{{% set x = {x} %}}{{% for y in [x, {of}] %}}{{{{ y }}}}{{% set x = y %}}{{{{ {of} }}}}{{% endfor %}}")
    })
}

fn runs_in_bounds(template: &str) {
    let input =
        json!({"messages": [{"role": "user", "content": "hello wörld"}, {"role": "assistant", "content": null}]});
    let limits = Limits {
        steps: 200_000,
        value_bytes: 1 << 20,
        output_bytes: 1 << 20,
        memory_bytes: 4 << 20,
        ..Limits::default()
    };
    let before = computed();
    let result = Template::parse(template, "x").and_then(|template| {
        template.render(&json!({"bos_token": "<s>"}).as_object().unwrap().clone(), input.as_object().unwrap(), &limits)
    });
    let took = computed().saturating_sub(before);
    assert!(took.as_secs() < 5, "{took:?}");
    match result {
        Ok(rendered) => {
            assert!(rendered.text().len() <= limits.output_bytes);
            assert_eq!(rendered.pieces().map(|(piece, _)| piece.len()).sum::<usize>(), rendered.text().len());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

proptest! {
    /// Whatever a template is, there is a text or an error, soon.
    #[test]
    fn fuzz_templates(random in fragments(), expression in expressions()) {
        runs_in_bounds(&random);
        runs_in_bounds(&expression);
    }
}

#[test]
fn a_template_may_end_where_a_tag_begins() {
    for template in ["{#", "a{#-", "{%", "{{", "{%-", "{% raw", "{"] {
        runs_in_bounds(template);
    }
}

#[test]
fn kinds_of_answers_are_all_there() {
    // The recorded cases are no use if all of them are of one kind.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/jinja/cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut kinds = BTreeMap::new();
    for case in file["cases"].as_array().unwrap() {
        for kind in ["ok", "error", "refused"].iter().filter(|kind| case.get(**kind).is_some()) {
            *kinds.entry(*kind).or_insert(0) += 1;
        }
    }
    assert!(kinds["ok"] > 500 && kinds["error"] > 100 && kinds["refused"] > 1, "{kinds:?}");
}
