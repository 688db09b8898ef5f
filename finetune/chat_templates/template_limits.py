"""Apply a chat template within limits of time, memory and length: it may come with a model of anyone.

transformers' sandbox keeps a template from the machine, but not from looping or growing without end.
"""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError

from finetune.chat_templates.compat import text_renderer
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS, SECONDS_PER_ROW = 10.0, 0.02  # of the thread's own time
MEMORY_BYTES = 1 << 30  # beside what the process holds
CHARACTERS, GROWTH = 1_000_000, 100  # of a rendered conversation: so many, and so many for each that it is made of
_this_thread = threading.local()
_one_at_a_time = threading.RLock()  # the limit of memory is the process's


class _TimeIsUp(BaseException):
    """Raised in the thread that renders; no template or library catches it."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], template: str | None, **options: Any
) -> Any:
    """Return what `apply_chat_template` does for one conversation or a list of them.

    Raises:
        ConfigError: The template does not end, or needs too much memory, or writes too much.
    """
    chats = messages if isinstance(messages[0], list) else [messages]
    if _raises_to_a_power(template or tokenizer.get_chat_template()):
        raise _refusal("it uses the operator **, which nothing can interrupt")
    is_text = options.get("tokenize") is False
    render = text_renderer(tokenizer) if is_text and template is not None else None
    with template_limits(len(chats), memory=is_text):
        if render is None or template is None:
            result = tokenizer.apply_chat_template(messages, chat_template=template, **options)
        else:
            texts = render(chats, template, **{name: value for name, value in options.items() if name != "tokenize"})
            result = texts if chats is messages else texts[0]
    for text, chat in zip([result] if isinstance(result, str) else result, chats, strict=False):
        if isinstance(text, str) and len(text) > CHARACTERS:
            given = len(str(chat)) + len(str(options.get("tools", "")))
            if len(text) > CHARACTERS + GROWTH * given:
                raise _refusal(f"it writes {len(text):,} characters for one conversation")
    return result


@contextmanager
def template_limits(num_rows: int, *, memory: bool = True) -> Iterator[None]:
    """Interrupt this thread once `num_rows` take too long; under `memory`, an allocation beyond `MEMORY_BYTES` fails.

    Inside another one it does nothing: setting limits for each row would take longer than rendering it.
    """
    if getattr(_this_thread, "is_limited", False):
        yield
        return
    seconds = SECONDS + SECONDS_PER_ROW * num_rows
    thread, ended = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(thread)  # a busy machine must not stop a template that ends
    stop = time.clock_gettime(clock) + seconds

    def interrupt() -> None:
        wait = seconds
        while not ended.wait(wait):
            try:
                wait = stop - time.clock_gettime(clock)
            except OSError:
                return  # the thread has just ended
            if wait <= 0:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))
            wait = wait if wait > 0 else 1.0

    with _one_at_a_time:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        allowed = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            if memory:
                most = min(
                    [
                        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES,
                        *allowed,
                    ]
                )
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
            _this_thread.is_limited = True
            yield
        except _TimeIsUp:
            raise _refusal(f"it has not ended after {seconds:.0f} s") from None
        except (MemoryError, RecursionError, OverflowError) as error:
            raise _refusal(
                f"{type(error).__name__}: {str(error)[:200] or f'it needs more than {MEMORY_BYTES >> 20} MB'}"
            ) from None
        finally:
            ended.set()
            _this_thread.is_limited = False
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"the chat template was stopped: {reason}: give another with --chat_template")


@cache
def _raises_to_a_power(template: str) -> bool:
    """Whether `**` is used as an operator; after "(" or "," it unpacks arguments."""
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:
        return False  # the rendering says why
    return any(
        token == ("operator", "**") and before[1] not in "(," for before, token in zip(tokens, tokens[1:], strict=False)
    )
