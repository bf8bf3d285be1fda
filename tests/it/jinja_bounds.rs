//! Hostile templates: each must end soon, within bounded memory, with one sentence.
//!
//! The file is long since every kind of attack is a list, one template a line.

use std::time::Duration;

use adaptive_kvcache::jinja::{Limits, Template, TemplateError, TemplateErrorKind};
use serde_json::{Map, json};

use crate::support::computed;

/// What a hostile template may take: less than a second with optimisation, more without.
const MAX_TIME: Duration = Duration::from_secs(20);

/// The whole process, the test's own texts included.
const MAX_KIB: u64 = 200 << 10;

/// The most memory that this process has had.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

fn render(template: &str) -> Result<usize, TemplateError> {
    let input = json!({
        "messages": [{"role": "user", "content": "hello"}],
        "big": "a b".repeat(100_000),
        "nested": (0..100).fold(json!([]), |inner, _| json!([inner])),
    });
    let start = computed();
    let result = Template::parse(template, "x").and_then(|template| {
        template.render(&Map::new(), input.as_object().unwrap(), &Limits::default()).map(|text| text.text().len())
    });
    let shown: String = template.chars().take(200).collect();
    let took = computed().saturating_sub(start);
    assert!(took < MAX_TIME, "{took:?} for {shown}");
    if std::env::var_os("SHOW_BOUNDS").is_some() {
        let error = result.as_ref().map_or_else(ToString::to_string, |len| format!("{len} bytes"));
        let tail: String = template.chars().skip(template.chars().count().saturating_sub(60)).collect();
        eprintln!("{:6} ms  {shown:50.50} ... {tail}  {} MiB  {error}", took.as_millis(), peak_kib() >> 10);
    }
    // Where each test is a process of its own.
    if std::env::var_os("NEXTEST").is_some() {
        assert!(peak_kib() < MAX_KIB, "{} KiB for {shown}", peak_kib());
    }
    if let Err(error) = &result {
        let message = error.to_string();
        assert!(message.len() < 1000 && !message.contains('\n'), "{shown}: {message}");
        assert!(message.starts_with("`x`"), "{message}");
    }
    result
}

/// Must go beyond a limit.
fn beyond(template: &str) {
    let shown: String = template.chars().take(400).collect();
    match render(template) {
        Err(error) if error.kind() == TemplateErrorKind::Limit => {}
        other => panic!("{shown}: {:?}", other.map_err(|error| error.to_string())),
    }
}

/// Must fail, or work, in bounds.
fn within(template: &str) {
    let _ = render(template);
}

#[test]
fn loops_are_bounded() {
    beyond(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    );
    beyond("{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}");
    beyond("{% for a in range(99999) %}{% set x = range(99999)|list %}{% endfor %}");
    beyond("{% for a in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}");
    beyond("{% for a in range(99999) %}{{ range(99999)|select('odd')|map('string')|join|length }}{% endfor %}");
    beyond("{% for a in range(99999) if range(99999)|sum < 0 %}{% endfor %}");
    beyond("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}");
    beyond("{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}");
    beyond("{% for a in range(9999) %}{% for b in range(9999) %}{% continue %}{% endfor %}{% endfor %}");
}

#[test]
fn values_are_bounded() {
    let doubling = |start: &str, step: &str| {
        beyond(&format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
        ));
    };
    doubling("'aaaaaaaa'", "ns.x ~ ns.x");
    doubling("'aaaaaaaa'", "ns.x + ns.x");
    doubling("'aaaaaaaa'", "ns.x * 2");
    doubling("'aaaaaaaa'", "'%s%s' % (ns.x, ns.x)");
    doubling("'aaaaaaaa'", "'{0}{0}'.format(ns.x)");
    doubling("'aaaaaaaa'", "[ns.x, ns.x]|join");
    doubling("'aaaaaaaa'", "ns.x.join([ns.x, ns.x])");
    doubling("'aaaaaaaa'", "ns.x|replace('a', 'aa')");
    doubling("'aaaaaaaa'", "(ns.x, ns.x)|string");
    doubling("'aaaaaaaa'", "[ns.x, ns.x]|tojson");
    doubling("'é'", "(ns.x|urlencode)|replace('%', 'é')");
    doubling("[1]", "ns.x + ns.x");
    doubling("[1]", "ns.x * 2");
    doubling("(1, 2)", "ns.x + ns.x");
    doubling("'ab'", "(ns.x|list + ns.x|list)|join");
    doubling("[1]", "[ns.x, ns.x]|sum(start=[])");
    doubling("'a'", "dict(a=ns.x, b=ns.x)|string");
    beyond(
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    );
    beyond(
        "{% set ns = namespace(x=(1,)) %}{% for i in range(50) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    );
    beyond("{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [ns.x] %}{% endfor %}");
    beyond("{{ 'a' * 10**9 }}");
    beyond("{{ 10**9 * 'a' }}");
    beyond("{{ [1] * 10**9 }}");
    beyond("{{ (1, 2) * 10**12 }}");
    beyond("{{ ('a' * 10**6)|list|length }}{{ ('ab' * 10**6)|list|length }}");
    beyond("{{ big.split('') if false }}{{ (big * 10)|replace('', big) }}");
    beyond("{{ range(99999)|list|join(big) }}");
    beyond("{{ big|replace('a', big) }}");
    beyond("{{ ('x' * 9000000)|upper ~ ('y' * 9000000) }}");
    beyond("{% for i in range(99999) %}{{ big }}{% endfor %}");
    beyond("{% set x %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endset %}");
    beyond("{% filter upper %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endfilter %}");
    beyond("{% macro m() %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endmacro %}{{ m() }}");
    // Many values of which none is large.
    beyond("{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, 'a' * 1000] %}{% endfor %}");
    beyond(
        "{% set ns = namespace() %}{% for i in range(99999) %}{% set ns.x = namespace(y=ns.x, z='a' * 1000) %}{% endfor %}",
    );
    beyond("{{ big.split('a') }}{{ (big * 50).split('a')|length }}");
    beyond("{{ (big * 50)|batch(1)|list|length }}");
    beyond("{{ (big * 50)|map('upper')|list|length }}");
}

#[test]
fn a_namespace_that_holds_itself_is_refused_once_it_is_printed() {
    for cycle in [
        "{% set ns = namespace() %}{% set ns.a = ns %}",
        "{% set ns = namespace() %}{% set ns.a = [1, {'k': ns}] %}",
        "{% set ns = namespace() %}{% set other = namespace(x=ns) %}{% set ns.a = other %}",
    ] {
        for print in ["{{ ns }}", "{{ ns|string }}", "{{ 'x' ~ ns }}", "{{ [ns]|join }}", "{{ '%s' % ns }}"] {
            let error = render(&format!("{cycle}{print}")).unwrap_err();
            assert_eq!(error.message(), "a namespace that holds itself cannot be printed", "{cycle}{print}");
        }
        assert_eq!(render(&format!("{cycle}{{{{ ns is defined and ns == ns }}}}")).unwrap(), "True".len());
    }
}

#[test]
fn sizes_in_arguments_are_bounded() {
    for size in ["10**9", "10**18", "10**30"] {
        for call in [
            "'a'|center(N)",
            "'a'.center(N)",
            "'a'.ljust(N)",
            "'a'.rjust(N, 'x')",
            "'5'.zfill(N)",
            "'a\\tb'.expandtabs(N)",
            "'a\\nb'|indent(N)",
            "'a\\nb'|indent(N, true)",
            "{'a': [1]}|tojson(indent=N)",
            "'%*d' % (N, 5)",
            "'%-*s' % (N, 'x')",
            "'%.*f' % (N, 5.5)",
            "'%.*d' % (N, 5)",
            "'{:{}}'.format('x', N)",
            "'{:0{}d}'.format(5, N)",
            "[1]|batch(N, 0)|list",
            "[1]|slice(N)|list",
            "[1]|slice(N, 0)|list",
            "range(N)|list",
        ] {
            let call = call.replace('N', &format!("({size})"));
            assert!(render(&format!("{{{{ {call} }}}}")).is_err(), "{call}");
        }
    }
    for format in ["%1000000000d", "%.1000000000f", "%99999999999999999999s", "%01000000000d", "%.1000000000e"] {
        beyond(&format!("{{{{ '{format}' % 5 }}}}"));
    }
    for format in ["{:>999999999}", "{:0999999999d}", "{:,.999999999f}", "{:0999999999,d}", "{:99999999999999999999}"] {
        beyond(&format!("{{{{ '{format}'.format(5) }}}}"));
    }
    within("{{ big|wordwrap(1) }}");
    within("{{ big|wordwrap(10**30) }}");
    within("{{ big|truncate(10**30) }}");
    within("{{ 5.5|round(10**30) }}{{ 5|round(-10**30) }}{{ 1e308|round(-400) }}{{ 5.5|round(99999) }}");
    within("{{ big[::10**30] }}{{ big[-10**30:10**30:-1]|length }}{{ range(10**5)[::10**18] }}");
    within("{{ range(-10**18, 10**18, 10**17) }}{{ range(10**30, 10**31) }}");
}

#[test]
fn numbers_are_bounded() {
    within("{{ 9**9**9**9 }}");
    within("{{ 2**127 }}{{ 2**126 * 2 }}");
    within("{{ -(2**126) * 2 - 5 }}");
    within("{{ (-2)**127 // -1 }}{{ (-2)**127 % -1 }}{{ ((-2)**127)|abs }}{{ -((-2)**127) }}");
    within("{{ 10**400 }}{{ 10.0**400 }}");
    within("{{ 1e400|int }}");
    within("{{ '9'*999|int }}{{ ('9'*99999)|int }}{{ ('1' * 999999)|float }}");
    within("{{ 99999999999999999999999999999999999999999999999999 }}");
    within("{{ 1_0.0e99999 }}{{ 0x1_f }}{{ 5 % 0 }}");
    within(&format!("{{{{ {} }}}}", "9".repeat(500_000)));
    within(&format!("{{{{ 1.{} }}}}", "9".repeat(500_000)));
    within("{{ '{:c}'.format(10**30) }}{{ '%c' % (10**30) }}{{ '%c' % 55296 }}");
}

#[test]
fn work_on_large_values_costs() {
    let each = |work: &str| {
        beyond(&format!(
            "{{% set x = big * 20 %}}{{% set y = x[:-1] ~ 'z' %}}{{% set r = range(90000)|list %}}\
             {{% for i in range(99999) %}}{{% if {work} %}}{{% endif %}}{{% endfor %}}"
        ));
    };
    for work in [
        "'zz' in x",
        "x == y",
        "x < y",
        "x.find('zz')",
        "x.count('zz')",
        "x|upper",
        "x|length and x[::-1]",
        "x|replace('zz', '')",
        "x.strip('ab ')",
        "x.split('zz')",
        "x|tojson",
        "x|string and [x]|string",
        "x|title",
        "x.isalpha()",
        "x|wordcount",
        "x|escape",
        "x.startswith(x)",
        "r|sort",
        "r == r[:]",
        "r + r",
        "-1 in r",
        "r|max",
        "r|tojson",
        "r|string",
        "r|join",
        "r|unique|list",
        "r|batch(2)|groupby(0)",
        "r|reverse|list",
        "r[:]",
        "r.index(89999)",
        "r.count(0)",
        "dict(r|batch(2))",
        "x|urlencode",
        "x|striptags",
        "x|first in x|last",
        "{x: 1}[y]",
        "x|wordwrap",
        "x|indent",
        "x|trim",
        "x.splitlines()",
        "x.partition('zz')",
        "x|list",
        "x.swapcase()",
        "x.casefold()",
        "(x, 1) in [(y, 1)]",
        "x.title()",
        "x % ()",
        "x.format()",
        "x ~ y",
        "x.expandtabs()",
        "x.removeprefix(y)",
        "x.join('ab')",
        "x|truncate(9)",
        "x|int",
        "x|float",
        "x is lower",
        "x is upper",
        "x|e|e",
        "x|batch(3)|list",
        "x|slice(3)|list",
        "r|map('string')|list",
        "r|sum",
        "'%s' % x",
        "'{}'.format(x)",
        "[x, y]|sort",
        "[x, y]|min",
        "x|safe + y",
        "r * 2",
    ] {
        each(work);
    }
}

#[test]
fn work_on_many_variables_costs() {
    let names = |text: fn(usize) -> String| (0..20_000).map(text).collect::<String>();
    let sets = names(|at| format!("{{% set n{at} = 1 %}}"));
    beyond(&format!("{{% for x in range(99999) %}}{{% if x < 0 %}}{sets}{{% endif %}}{{% endfor %}}"));
    beyond(&format!(
        "{{% macro m() %}}{{% if 0 %}}{sets}{{% endif %}}{{% endmacro %}}{{% for x in range(99999) %}}{{{{ m() }}}}{{% endfor %}}"
    ));
    beyond(&format!(
        "{{% for x in range(99999) %}}{{% with %}}{{% if 0 %}}{sets}{{% endif %}}{{% endwith %}}{{% endfor %}}"
    ));
    let blocks = names(|at| format!("{{%block b{at} scoped%}}{{%endblock%}}{{%set n{at}=1%}}"));
    beyond(&blocks);
    let blocks = names(|at| format!("{{% block b{at} %}}{{% endblock %}}"));
    beyond(&format!("{{% for x in range(99999) %}}{{{{ self.b9999 }}}}{{% endfor %}}{blocks}"));
    let named = "{% set d = dict(range(20000)|map('string')|batch(2)) %}";
    beyond(&format!("{named}{{% for x in range(99999) %}}{{% set y = dict(**d) %}}{{% endfor %}}"));
    beyond(&format!(
        "{named}{{{{ ('{{}}' * 99999).format(*range(99999), **d)|length }}}}{{{{ ('{{a}}' * 99999).format(a=1, **d)|length }}}}"
    ));
    beyond("{{ rows|map(attribute='a.' * 5000000)|list }}{{ [1]|sort(attribute='a,' * 5000000) }}");
    beyond("{{ strftime_now('%c' * 5000000) }}");
    within("{{ big[big] }}{{ messages[0][big] }}{{ messages[0][big].x }}");
    within("{{ '%(a)s' % {big: 1} }}{{ ('%(' ~ big ~ ')s') % {} }}");
    within("{{ ('{' ~ big ~ '}').format() }}");
    within("{{ namespace(**{big: 1})|attr(big) }}{{ dict(**{big: 1}) }}{{ range(**{big: 1}) }}");
}

#[test]
fn recursion_is_bounded() {
    beyond("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    beyond("{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}");
    beyond("{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}");
    beyond("{% macro m(x) %}{% call(y) m(x) %}x{% endcall %}{{ caller(1) }}{% endmacro %}{{ m(1) }}");
    beyond("{% set ns = namespace() %}{% macro m() %}{{ ns.f() }}{% endmacro %}{% set ns.f = m %}{{ m() }}");
    beyond("{% block b %}{{ self.b() }}{% endblock %}");
    beyond("{% macro m(x=m()) %}{{ m() }}{% endmacro %}{{ m() }}");
    beyond(
        "{% macro m() %}{% filter upper %}{% set x %}{% with y = m() %}{% endwith %}{% endset %}{% endfilter %}{% endmacro %}{{ m() }}",
    );
    beyond(
        "{% macro m() %}{{ [1]|map(attribute='x')|list }}{% for i in [1] %}{% if true %}{{ m() }}{% endif %}{% endfor %}{% endmacro %}{{ m() }}",
    );
}

#[test]
fn deep_values_are_freed_and_read_in_bounds() {
    let deep = |work: &str| {
        let build = "{% set ns = namespace(x=[], y={}, z=()) %}{% for i in range(9999) %}\
                     {% set ns.x = [ns.x] %}{% set ns.y = {'a': ns.y} %}{% set ns.z = (ns.z, 1) %}{% endfor %}";
        format!("{build}{work}")
    };
    assert!(render(&deep("ok")).is_ok());
    beyond(&deep("{{ ns.x }}"));
    beyond(&deep("{{ ns.y }}"));
    beyond(&deep("{{ ns }}"));
    beyond(&deep("{{ ns.x|tojson }}"));
    beyond(&deep("{{ ns.y|tojson }}"));
    beyond(&deep("{{ [ns.x] == [[ns.x[0]]] and [ns.x[0]] < [[ns.x[0][0]]] }}{{ ns.x|string }}"));
    beyond(&deep("{{ {ns.z: 1} }}"));
    beyond(&deep(
        "{% set a = ns.x %}{% for i in range(9999) %}{% set ns.q = [ns.q|d([])] %}{% endfor %}{{ ns.q == a }}",
    ));
    // Chains of what owns values in other ways.
    let chain = |start: &str, link: &str| {
        let template =
            format!("{{% set ns = namespace(x={start}) %}}{{% for i in range(20000) %}}{link}{{% endfor %}}ok");
        within(&template);
    };
    chain("none", "{% set ns.x = namespace(x=ns.x) %}");
    chain("[]", "{% set ns.x = ns.x|map('string') %}");
    chain("[]", "{% set ns.x = ns.x|select('in', ns.x) %}");
    chain("[]", "{% set ns.x = ns.x|batch(2) %}");
    chain("'a'", "{% set ns.x = cycler(ns.x) %}");
    chain("'a'", "{% set ns.x = joiner(ns.x) %}");
    chain("{}", "{% set ns.x = {'a': ns.x}.items %}");
    chain("{}", "{% set ns.x = {'a': ns.x}.values() %}");
    chain("none", "{% macro m(a=ns.x) %}{{ a }}{% endmacro %}{% set ns.x = m %}");
    chain("none", "{% for y in [ns.x] %}{% set ns.x = loop %}{% endfor %}");
    chain("none", "{% set ns.x = dict(a=ns.x) %}");
    within(
        "{% set ns = namespace(f=none) %}{% macro k(p) %}{% macro i() %}{{ p }}{% endmacro %}{% set ns.f = i %}{% endmacro %}{% for i in range(20000) %}{{ k(ns.f) }}{% endfor %}",
    );
    within(
        "{% set ns = namespace(x=[1]) %}{% for i in range(9999) %}{% set ns.x = ns.x|map('string') %}{% endfor %}{{ ns.x|list }}",
    );
    within("{{ nested }}{{ nested|tojson }}{{ nested == nested }}{{ nested|sort }}");
}

#[test]
fn values_that_own_themselves_are_read_and_freed() {
    for template in [
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns == ns }}{{ [ns.a, ns]|sort }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns|tojson }}",
        "{% set ns = namespace() %}{% set ns.a = [ns, ns.a] %}{{ [ns.a] == [ns.a] }}",
        "{% set ns = namespace() %}{% macro m() %}{{ ns }}{% endmacro %}{% set ns.m = m %}{{ ns.m() }}",
        "{% set ns = namespace() %}{% for i in [1] %}{% set ns.l = loop %}{{ ns }}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace() %}{% set ns.a = [1]|map('attr', ns) %}{% set ns.b = ns.a %}{{ ns.b|list }}",
        "{% set x = [1] %}{% set x = x|select('in', x) %}{{ x|list }}{{ x|list }}",
        "{% set ns = namespace() %}{% set ns.g = [ns]|map(attribute='g') %}{{ ns.g|list|length }}",
    ] {
        within(template);
    }
}

/// Characters of a large template.
const LARGE: usize = 400_000;

/// A text over and over.
fn times(text: &str) -> String {
    text.repeat(LARGE / text.len())
}

/// Chains are loops, not recursion.
#[test]
fn long_chains_are_read() {
    for (link, last) in [
        ("1+", "1"),
        ("1-", "1"),
        ("1*", "1"),
        ("1/", "1"),
        ("1//", "1"),
        ("1%", "1"),
        ("1**", "1"),
        ("1~", "1"),
        ("1 or ", "1"),
        ("1 and ", "1"),
        ("1==", "1"),
        ("1<", "1"),
        ("'a' in ", "'a'"),
        ("'' '' ", "''"),
    ] {
        within(&format!("{{{{ {}{last} }}}}", times(link)));
    }
    for link in ["|upper", ".x", "[0]", "()", "|d(1)", " is defined", "[:]", ".strip()", "(1)", "|map('upper')"] {
        within(&format!("{{{{ messages{} }}}}", times(link)));
    }
}

#[test]
fn what_nests_deep_is_refused() {
    for (open, close) in [
        ("(", ")"),
        ("[", "]"),
        ("{1:", "}"),
        ("not ", ""),
        ("-", ""),
        ("+", ""),
        ("x[", "]"),
        ("f(", ")"),
        ("1 if 1 else ", ""),
        ("a|d(", ")"),
        ("x(y=", ")"),
        ("x(*", ")"),
        ("- -", ""),
        ("x.y[1:", "]"),
        ("1 is eq(", ")"),
    ] {
        for count in [1000, LARGE / open.len()] {
            beyond(&format!("{{{{ {}1{} }}}}", open.repeat(count), close.repeat(count)));
            beyond(&format!("{{{{ {}1 }}}}", open.repeat(count)));
        }
    }
    beyond(&format!("{{{{ 1{} }}}}", times(" if 1")));
    for (open, close) in [
        ("{% if 1 %}", "{% endif %}"),
        ("{% for x in [1] %}", "{% endfor %}"),
        ("{% set x %}", "{% endset %}"),
        ("{% with %}", "{% endwith %}"),
        ("{% filter upper %}", "{% endfilter %}"),
        ("{% macro m() %}", "{% endmacro %}"),
        ("{% call m() %}", "{% endcall %}"),
        ("{% generation %}", "{% endgeneration %}"),
        ("{% if 1 %}{% else %}", "{% endif %}"),
        ("{% autoescape false %}", "{% endautoescape %}"),
    ] {
        beyond(&format!("{}{}", open.repeat(5000), close.repeat(5000)));
        beyond(&times(open));
        within(&format!("{}{}", open.repeat(150), close.repeat(150)));
    }
}

#[test]
fn many_parts_are_bounded() {
    for repeated in [
        "{% set x = 1 %}",
        "{{ x }}",
        "{# c #}",
        "{%",
        "{{",
        "{#",
        "}}",
        "%}",
        "{% raw %}",
        "{% endraw %}",
        "{% if x %}{% endif %}",
        "{% block b %}{% endblock %}",
        "{% macro m() %}{% endmacro %}",
        "{% elif 1 %}",
        "{% else %}",
        "{% endif %}",
        "'",
        "\"",
        "\\",
        "{% for x in y %}{% endfor %}",
        "{{ [1,2,3] }}",
        "{{ 'a' }}",
        "\n",
        " ",
        "\r",
        "{%- raw -%}x{%- endraw -%}",
        "{% break %}",
        "{{ range(99)|list }}",
        "{",
        "{% set a, b = 1, 2 %}",
        "{% include 'x' %}",
    ] {
        within(&times(repeated));
    }
}

#[test]
fn long_lists_and_names_are_bounded() {
    within(&format!("{{% if 1 %}}{}{{% endif %}}", times("{% elif 1 %}x")));
    within(&format!("{{{{ [{}] }}}}", times("1,")));
    within(&format!("{{{{ {{{}}} }}}}", times("1:1,")));
    within(&format!("{{{{ x({}) }}}}", times("1,")));
    within(&format!("{{{{ dict({}) }}}}", (0..50_000).fold(String::new(), |text, at| text + &format!("a{at}=1,"))));
    within(&format!(
        "{{% macro m({}) %}}{{% endmacro %}}",
        (0..50_000).fold(String::new(), |text, at| text + &format!("a{at},"))
    ));
    within(&format!("{{% set {}x = 1 %}}", times("x, ")));
    within(&format!("{{{{ '{}' }}}}", times("\\n")));
    within(&format!("{{{{ {} }}}}", times("a")));
    // Scopes in scopes, each with many names.
    let names = (0..2000).fold(String::new(), |text, at| text + &format!("{{{{ n{at} }}}}{{% set n{at} = 1 %}}"));
    within(&format!("{}{names}{}", "{% for x in [1] %}".repeat(150), "{% endfor %}".repeat(150)));
    within(&format!("{}{names}{}", "{% if 1 %}".repeat(150), "{% endif %}".repeat(150)));
    within(&format!("{}{names}{}", "{% macro m() %}".repeat(150), "{% endmacro %}".repeat(150)));
    beyond(&"x".repeat(2 << 20));
}

#[test]
fn long_conversations_fit() {
    let template = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content | trim }}{% else %}\
                    {{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{{ '<|end|>' }}\n{% endfor %}";
    let content = "word ".repeat(2000);
    let message =
        |at: usize| json!({"role": if at.is_multiple_of(2) { "user" } else { "assistant" }, "content": content});
    let input = json!({"messages": (0..500).map(message).collect::<Vec<_>>()});
    let template = Template::parse(template, "x").unwrap();
    let rendered = template.render(&Map::new(), input.as_object().unwrap(), &Limits::default()).unwrap();
    assert!(rendered.text().len() > 4_900_000);
}
