"""A chat template that does not end, or grows without end, is stopped by one error."""

import resource
import threading
import time

import pytest

from finetune.chat_templates import select_chat_format, template_limits
from finetune.conversation import Conversation, Turn
from finetune.utils.errors import ConfigError
from tests.helpers.byte_tokenizer import byte_tokenizer

PLAIN = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
BOMBS = {
    "a loop": "{% for i in range(10**9) %}{% endfor %}",
    "a long range": "{% for i in range(1000000000) %}{% endfor %}",
    "loops in loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10000000000 }}",
    "a list": "{{ ([1] * 10000000000)|length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling a block": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}"
    "{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ (10 ** 10 ** 10) % 3 }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide field": "{{ '{:>9999999999}'.format(1) }}",
    "a wide filter": "{{ 'a'|center(9999999999) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "one conversation only": "{% if messages|length > 2 %}{{ 'a' * 10000000000 }}{% endif %}",
}


@pytest.mark.parametrize(("name", "in_a_thread"), [*((name, False) for name in BOMBS), ("loops in loops", True)])
def test_it_is_stopped(name, in_a_thread, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BOMBS[name] + PLAIN
    chat_format, _ = select_chat_format(tokenizer)
    rows = [Conversation((Turn("human", "a"), Turn("model", "b")) * count) for count in (1, 2)]
    before, raised = resource.getrlimit(resource.RLIMIT_AS), []

    def render() -> None:
        try:
            chat_format.tokenize_all(rows)
        except ConfigError as error:
            raised.append(error)

    began = time.monotonic()
    if in_a_thread:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    else:
        render()
    assert time.monotonic() - began < 20
    assert "the chat template was stopped: " in str(raised[0])
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_arguments_may_be_unpacked_and_stars_may_be_written():
    assert not template_limits._raises_to_a_power("**bold** {{ f(**x) }}{{ f(1, **x) }}")
    assert template_limits._raises_to_a_power("{{ 2 ** 3 }}")
