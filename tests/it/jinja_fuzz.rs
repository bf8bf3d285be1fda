//! Random templates: whatever they are, there is a text or an error, soon.

use adaptive_kvcache::jinja::{Limits, Template};
use proptest::prelude::*;
use serde_json::json;

use crate::support::computed;

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
