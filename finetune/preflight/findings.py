"""The result of the doctor: facts by section, errors and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune.utils.errors import FinetuneError

# In the order in which a run comes to them: it would end with the first that fails.
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
    """An error or a warning."""

    section: str
    text: str
    status: int = 0  # exit status of a run with this error; 0: a warning
    host: str | None = None  # where it was found, if it concerns one host

    def facts(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"section": self.section, "status": self.status, "host": self.host, "text": self.text}

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


@dataclass
class DoctorReport:
    """Facts by section, as JSON values, and the findings so far."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, section: str, action: Callable[[], Value]) -> Value | None:
        """Return what `action` returns, or None if it raises an error of this project, which becomes a finding.

        Equal texts are noted once: a missing model fails both the configuration and the data.
        """
        try:
            return action()
        except FinetuneError as error:
            if all(finding.text != str(error) for finding in self.findings):
                self.findings.append(Finding(section, str(error), error.status))
            return None

    def add_error(self, section: str, text: str, *, status: int = 2, host: str | None = None) -> None:
        """Add an error that would end the run with this status."""
        self.findings.append(Finding(section, text, status, host))

    def add_errors(self, section: str, faults: Iterable[tuple[str, str]]) -> None:
        """Add errors of hosts: (host, text)."""
        for host, text in faults:
            self.add_error(section, text, host=host)

    def warn(self, section: str, text: str, *, host: str | None = None) -> None:
        """Add a warning."""
        self.add_error(section, text, status=0, host=host)

    def failed(self, *sections: str) -> bool:
        """Return whether one of these sections has an error."""
        return any(finding.status for finding in self.findings if finding.section in sections)

    @property
    def status(self) -> int:
        """Exit status that the run would have; 0 without errors."""
        errors = [finding for finding in self.findings if finding.status]
        return min(errors, key=lambda finding: SECTIONS.index(finding.section)).status if errors else 0
