"""What an examination found: facts by section, and what has to be mended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune.utils.errors import FinetuneError

# In the order in which a run comes to them: the first that fails is the one it would end with.
SECTIONS = (
    "command",
    "hosts",
    "configuration",
    "network",
    "data",
    "memory",
    "disk",
    "operators",
    "this host",
    "rehearsal",
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One thing to mend.

    Attributes:
        status: that a run would end with because of it; 0: it would go on, and the user should know.
        host: on which it was found, where it is one host's.
    """

    section: str
    text: str
    status: int = 0
    host: str | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"section": self.section, "status": self.status, "host": self.host, "text": self.text}

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


@dataclass
class DoctorReport:
    """Facts by section, plain values that JSON takes, and the findings so far."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, section: str, action: Callable[[], Value]) -> Value | None:
        """What `action` returns; what it raises as an error of ours becomes a finding, and None is returned.

        The same text is noted once: a model that is missing is missed by the flags and by the data.
        """
        try:
            return action()
        except FinetuneError as error:
            if all(one.text != str(error) for one in self.findings):
                self.findings.append(Finding(section, str(error), error.status))
            return None

    def add_error(self, section: str, text: str, *, status: int = 2, host: str | None = None) -> None:
        """Note something without which the run would end with this status."""
        self.findings.append(Finding(section, text, status, host))

    def add_errors(self, section: str, faults: Iterable[tuple[str, str]]) -> None:
        """Note faults of hosts: (host, what is wrong there)."""
        for host, text in faults:
            self.add_error(section, text, host=host)

    def warn(self, section: str, text: str, *, host: str | None = None) -> None:
        """Note something that a run survives."""
        self.add_error(section, text, status=0, host=host)

    def failed(self, *sections: str) -> bool:
        """Whether a run would end because of one of these sections."""
        return any(finding.status for finding in self.findings if finding.section in sections)

    @property
    def status(self) -> int:
        """What the run would end with; 0: nothing was found that would end it."""
        ending = [finding for finding in self.findings if finding.status]
        return min(ending, key=lambda finding: SECTIONS.index(finding.section)).status if ending else 0
