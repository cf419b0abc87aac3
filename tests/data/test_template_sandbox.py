"""One operation of a chat template cannot make more than a conversation needs; what templates do stays the same."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conftest import TINY_MODEL
from forgebook.data import chat_template
from forgebook.data.template_sandbox import LimitedEnvironment
from forgebook.errors import DataError, ModelError
from forgebook.models.tokenizer import load_tokenizer

NESTED = (
    "{% set n = namespace(a=[x], b=[x]) %}"
    "{% for k in range(40) %}{% set n.a = HERE %}{% endfor %}{{ n.a|string|length }}"
)
LARGE = {
    r"\*": [
        "{{ x * 10**10 }}",
        "{{ ([x] * 10**9)|length }}",
        "{% set n = namespace(a=10) %}{% for k in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a > 1 }}",
    ],
    r"\*\*": ["{{ (x|length + 9) ** (10 ** 9) > 1 }}"],
    "a width in a format": [
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '{:>9999999999}'.format(x) }}",
        "{{ '{:>{}}'.format(x, 10**10) }}",
        "{{ '%9999999999d'|format(1) }}",
    ],
    "format": [
        "{% set a = x * 10**6 %}{{ ('{0}' * 1000).format(a) }}",
        "{% set a = x * 10**6 %}{{ ('%(a)s' * 1000) % {'a': a} }}",
    ],
    "center": ["{{ x|center(10**10) }}", "{{ x.center(10**10) }}", "{{ ['a']|map('center', 10**10)|list }}"],
    "ljust": ["{{ x.ljust(10**10) }}"],
    "zfill": ["{{ x.zfill(10**10) }}"],
    "to_bytes": ["{{ (1).to_bytes(10**10) }}"],
    "expandtabs": ["{{ '\t'.expandtabs(2 * 10**9) }}"],
    "replace": ["{% set a = x * 10**6 %}{{ a.replace('h', a) }}", "{% set a = x * 10**6 %}{{ a|replace('h', a) }}"],
    "join": [
        "{% set a = x * 10**6 %}{{ range(99999)|map('string')|join(a) }}",
        "{% set a = x * 10**6 %}{{ a.join(range(99999)|map('string')|list) }}",
    ],
    "translate": ["{% set a = x * 10**6 %}{{ a.translate({104: a}) }}"],
    "batch": ["{{ [x]|batch(10**9, 0)|list }}"],
    "round": ["{{ 1.5|round(10**9, 'ceil') }}"],
    "tojson": ["{{ [x]|tojson(indent=10**9) }}"],
    "indent": ["{{ 'a\nb'|indent(10**10) }}"],
    "sum": ["{{ range(99999)|map('string')|map('list')|sum(start=[])|length }}"],
    "striptags": ["{{ ('<' * 10**6)|striptags }}"],
    "a list": [
        NESTED.replace("HERE", "[n.a, n.a]"),
        NESTED.replace("HERE", "(n.a, n.a)"),
        NESTED.replace("HERE", "{1: n.a, 2: n.a}"),
        NESTED.replace("HERE", "dict(a=n.a, b=n.a)"),
        NESTED.replace("HERE", "range(99999)|map(attribute='z', default=n.a)|list"),
        NESTED.replace("HERE", "n.a + n.a"),
        NESTED.replace("HERE", "[n.a, n.a]").replace("set n.a", "set n.b = [n.b, n.b] %}{% set n.a"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "operation"),
    [(template, operation) for operation, templates in LARGE.items() for template in templates],
)
def test_an_operation_that_makes_too_much_is_refused_before_it_does(template, operation):
    """In a thread, too, where nothing interrupts it."""
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.chat_template = "{% set x = messages[0].content %}" + template
    started = time.process_time()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ModelError, match=rf"too much in one operation \({operation}\)"):
        pool.submit(chat_template.render, [{"role": "user", "content": "hi"}], tokenizer).result()
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "template",
    [
        "{{ '**{}** 1234567'.format(x) }}{{ '{:*>10}|{0:>5}'.format(4) if none else '{0:>5}{a}'.format(4, a=2) }}",
        "{{ '%s * 1234567 100%%' % x }}{{ '%5d|%-8s' % (3, x) }}",
        "{% for k, v in {'a': x, 'b': [x, (x, 2)]}.items() %}{{ k }}{{ v }}{% endfor %}",
        "{% set a, b = x, 2 %}{{ a }}{{ b }}",
        "{{ 2**10 }}{{ 2**0.5 }}{{ 7 % 3 }}{{ 2 * 3.5 }}{{ x * 3 }}{{ [1, 2]|sum }}{{ [[1], [x]]|sum(start=[]) }}",
        "{{ x|replace('h', '_') }}{{ x.replace('i', x) }}{{ [x, 'b']|join(', ') }}{{ ', '.join([x]) }}",
        "{{ [{'a': 1}]|map(attribute='a')|join }}{{ x|center(9)|indent(3) }}{{ dict(a=x)|tojson(indent=2) }}",
        "{% macro m(a, b=[]) %}{{ a }}{{ b }}{% endmacro %}{{ m(x) }}{{ m([x], b=[x]) }}{{ ([x] + [1])[1:]|list }}",
        "{{ 3.756|round(2) }}{{ x.zfill(5) }}{{ x.translate({104: 'z'}) }}{{ x in [x, 'b'] }}",
        "{{ 'a\tb'.expandtabs(4) }}{{ 'a,b'.split(',') }}",
        "{% set n = namespace(a=[]) %}{% for k in range(3) %}{% set n.a = n.a + [k] %}{% endfor %}{{ n.a }}",
    ],
)  # fmt: skip
def test_what_templates_do_is_as_in_the_sandbox_of_jinja(template):
    plain, limited = (
        kind().from_string(template).render(x="hi") for kind in (ImmutableSandboxedEnvironment, LimitedEnvironment)
    )
    assert limited == plain


@pytest.mark.parametrize(
    "template", ["{{ range(10**9)|list }}", "{{ 1 / 0 }}", "{{ [1][5].a.b }}", "{{ 'a'.index('b') }}"]
)
def test_any_error_of_a_template_is_one_sentence(template):
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"the chat template (fails on|rejects) these messages: "):
        chat_template.render([{"role": "user", "content": "hi"}], tokenizer)
