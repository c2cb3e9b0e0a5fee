"""Limits of chat templates: the rendered text is unchanged, and rendering terminates."""

import pytest
import test_tool_calls
from jinja2 import TemplateError
from test_damaged_files import TEMPLATE
from test_tokenizer import BYTE_LEVEL

from fastgen.text import chat_template, template_limits

CHAT = [{"role": "system", "content": " a "}, {"role": "user", "content": "b\n"}, {"role": "assistant", "content": "c"}]
# White space that tags strip or keep, and every statement that is counted or checked.
TEMPLATES = {
    "loop": TEMPLATE,
    "tags": "x  {%- for m in messages -%}  y  {%+ for c in m.content +%}\n\n {{- c -}} \n{% endfor %}\n\n"
    "{% else %}z{% endfor %}",
    "lines": "\n\n  {% for m in messages %}\n\n    {% if loop.first %}\n  {{ m.role }}\n    {% endif %}\n"
    "{% endfor %}\n\n",
    "set": "{% set n = namespace(s='') %}\n{% for m in messages -%}\n{% set n.s = n.s ~ m.role ~ '{% raw %}' %}\n\n"
    "{% endfor %}"
    "{% set a, b = 'x' * 3, 1 + 2 %}\n {{ n.s }}{{ a }}{{ b }}\n{% set t %}\n {{ a }} {% endset %}\n{{ t }}|\n",
    "macro": "{% macro f(a, b=[1, (2, 3)], c='(,') -%}\n {{ a }}{{ b }}{{ c }}{{ caller() if caller else '' }}\n"
    "{%- endmacro %}"
    "{{ f(1) }}\n{% call f(messages | length, b=2) %}\n in {% endcall %}\n{{ dict(a=1, **{'b': 2}) }}\n",
    "raw": "{# a\n comment #}\n{% raw %}\n{% for x in y %}{{ 10 ** 9 }}\n{% endraw %}\n {%- generation %} g "
    "{% endgeneration %}\n",
    "recursive": "{% for m in [[1, [2]], [3]] recursive %}({% if m is iterable %}{{ loop(m) }}{% else %}{{ m }}"
    "{% endif %}){% endfor %}",
}


@pytest.mark.parametrize("source", [*TEMPLATES.values(), *test_tool_calls.TEMPLATES.values()])
def test_rendered_text_is_unchanged(source: str) -> None:
    """The limited template renders the same text, with tools and without."""
    for tools in (None, test_tool_calls.TOOL_DICTS):
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
        want = BYTE_LEVEL.apply_chat_template(CHAT, chat_template=source, **options)
        assert (
            BYTE_LEVEL.apply_chat_template(CHAT, chat_template=template_limits.limit_template(source), **options)
            == want
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "line 1: it computes a power"),
        ("{% for i in range(1000000000000) %}x{% endfor %}", "line 1: the number 1000000000000"),
        ("{% for i in range(10000000) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "endless"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "endless"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "n.s is too large",
        ),
        (
            "{% macro f(n, s) %}{% if n %}{{ f(n - 1, s ~ s) }}{% endif %}{% endmacro %}{{ f(60, 'x') }}",
            "s is too large",
        ),
        ("\n{{ 'x' * 123456789012 }}", "line 2: the number 123456789012"),
        ("{{ lipsum(99999999) }}", "not callable"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_endless_work_is_rejected(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless loops, recursion, growth and huge numbers raise ValueError."""
    monkeypatch.setattr(BYTE_LEVEL, "chat_template", source)
    limit_template, max_steps = template_limits.limit_template, str(template_limits.MAX_STEPS)
    monkeypatch.setattr(
        chat_template, "limit_template", lambda source: limit_template(source).replace(max_steps, "5000")
    )  # saves a second
    with pytest.raises(ValueError, match=f"the model's chat template refuses these messages: .*{message}"):
        chat_template.render(BYTE_LEVEL, CHAT)


def test_long_conversations_stay_below_the_limit() -> None:
    """Thousands of messages take a small part of the steps."""
    limited = template_limits.limit_template(TEMPLATE)
    text = BYTE_LEVEL.apply_chat_template(CHAT * 3000, chat_template=limited, tokenize=False)
    assert text.count("<|user|>") == 3000
    with pytest.raises(TemplateError, match="endless"):
        BYTE_LEVEL.apply_chat_template(
            CHAT, chat_template=limited.replace(str(template_limits.MAX_STEPS), "2"), tokenize=False
        )
