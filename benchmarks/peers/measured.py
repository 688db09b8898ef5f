"""What every driver shares: its arguments, a clock for one function of a library, and the figures it leaves behind.

Standard library only: each driver runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LENGTH = 2048
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
_DECLARATIONS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_HEADER = "{{ '<|im_start|>' + message['role'] + '\n' }}"
_BODY = (
    "{% if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}{{ '<tool_call>\n{\"name\": \"' + "
    'call.function.name + \'", "arguments": \' + (call.function.arguments if call.function.arguments is string else '
    "call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}"
)
# With declared tools, calls and reasoning; the reasoning of earlier answers stays. Plain rows are those of `CHATML`.
CHATML_WITH_TOOLS = f"{_DECLARATIONS}{{% for message in messages %}}{_HEADER}{_BODY}{{{{ '\n' }}}}{{% endfor %}}"
# The same, for toolkits that are shown by the template what is supervised.
CHATML_WITH_GENERATION = (
    f"{_DECLARATIONS}{{% for message in messages %}}{_HEADER}{{% if message['role'] == 'assistant' %}}"
    f"{{% generation %}}{_BODY}{{% endgeneration %}}{{% else %}}{_BODY}{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}"
)


@dataclass(frozen=True)
class Task:
    """What to prepare: `data` in the form {"conversations": [{"from", "value"}]}, `messages` the same rows in the form
    {"messages": [{"role", "content"}]}; `cache` is a fresh folder."""

    data: Path
    messages: Path
    tokenizer: str
    processes: int
    cache: Path
    output: Path


def given_task() -> Task:
    """The task on the command line; call it before any library is imported, it sets where they cache."""
    parser = argparse.ArgumentParser()
    for name, kind in Task.__annotations__.items():
        parser.add_argument(f"--{name}", required=True, type={"Path": Path, "str": str, "int": int}[kind])
    task = Task(**vars(parser.parse_args()))
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = os.environ["MODELSCOPE_CACHE"] = str(task.cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return task


class Clock:
    """What a block costs, or a function of a library wherever that calls it: seconds, CPU seconds, memory.

    CPU seconds are those of this process and of its children that have ended, busy seconds those of the whole machine:
    what is left between the two is other work, which takes cores away from runs with several processes.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = self.busy_seconds = 0.0
        self.before: dict[str, int] = {}
        self.after: dict[str, int] = {}

    def __enter__(self) -> Clock:
        self.before = self.before or memory()
        self._cpu_begin, self._busy_begin, self._begin = _cpu_seconds(), _busy_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begin
        self.cpu_seconds += _cpu_seconds() - self._cpu_begin
        self.busy_seconds += _busy_seconds() - self._busy_begin
        self.after = memory()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return timed


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _busy_seconds() -> float:
    """CPU seconds of all processes of this machine since it started."""
    counts = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, counts[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, and at most so far; and of the largest child that has ended."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    return {"now": now, "peak": peak, "largest_child": child}


def report(task: Task, clock: Clock, *, rows: int, reading: Clock | None = None, **figures: Any) -> None:
    """Leave the figures where the caller reads them; `reading` is a part of `clock` that is told apart."""
    child = clock.after["largest_child"]
    facts = {
        "rows": rows,
        "seconds": clock.seconds - (reading.seconds if reading else 0),
        "cpu_seconds": clock.cpu_seconds - (reading.cpu_seconds if reading else 0),
        "other_work_cores": max(0.0, clock.busy_seconds - clock.cpu_seconds) / clock.seconds,
        "rss_before_bytes": clock.before["now"],
        "peak_rss_bytes": clock.after["peak"],
        # What an import started earlier (a look at the processor, say) is no part of the work.
        "largest_child_rss_bytes": child if child > clock.before["largest_child"] else 0,
        **figures,
    }
    if reading:
        facts["reading_seconds"] = reading.seconds
    task.output.write_text(json.dumps(facts))


def token_counts(input_ids: Iterable[Sequence[int]], labels: Iterable[Sequence[int]]) -> dict[str, int]:
    """How many tokens there are, and how many are supervised: contenders that do the same work agree on both."""
    tokens = sum(map(len, input_ids))
    supervised = sum(sum(label != -100 for label in row) for row in labels)
    return {"tokens": tokens, "supervised_tokens": supervised}
