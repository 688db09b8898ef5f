"""A script on all hosts of a run: the `deepspeed` command on each, watched to its end, started again if that may help.

The command runs with `--no_ssh`: without pdsh and a second shell between, arguments arrive unchanged, the loss of a
host is seen at once, and the exit status is the true one.
"""

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.diagnostics import FAILURE_FILE, Failure, find_first_failure, format_failure_page, write_failure
from finetune.distributed import host_probe, stop_requests
from finetune.launcher import restarts, ssh
from finetune.launcher.deepspeed_args import LauncherArgs
from finetune.launcher.env_variables import environment_of_ranks, redact
from finetune.launcher.hostfile import Resources, local_slots
from finetune.launcher.local_session import HOSTFILE_PLACEHOLDER, HostReport, LocalSession
from finetune.utils.errors import ConfigError, StorageError
from finetune.utils.proc import POLL_SECONDS

SECONDS_FOR_OTHER_HOSTS = 20.0  # the ranks' watchdogs end a run in two or three
SECONDS_TO_KILL = 8.0
PORT_TAKEN = ("--master_port {0} is taken: leave the flag out, and a free port is found; or end what listens there "
              "(`ss -ltnp | grep {0}` shows it)")  # fmt: skip
# Flags that are acted on here; all others are passed to `deepspeed`.
NOT_PASSED_ON = ("hostfile", "master_addr", "master_port", "ssh_port", "venv_script", "no_ssh_check", "launcher",
                 "launcher_args", "force_multi", "max_restarts", "num_nodes", "module")  # fmt: skip
HostSession = LocalSession | ssh.RemoteSession


@dataclass
class SupervisedRun:
    """A script, what it is run with, and where."""

    flags: LauncherArgs
    resources: Resources | None = None  # None: this machine alone
    words: Sequence[str] = ()  # the script's arguments
    environment: Mapping[str, str] = field(default_factory=dict)
    output_dir: Path | None = None  # of a training of this package, whose ranks report their ends; None: not known
    may_shrink: bool = False  # may be started again with fewer ranks
    signals: list[int] = field(default_factory=list)  # that have arrived

    def run(self) -> int:
        """Run the script to its end, with the restarts that are allowed, and return its status."""
        for number in stop_requests.SIGNALS:
            signal.signal(number, lambda received, _: self.signals.append(received))
        most = self.flags.given.get("max_restarts", 0)
        for restart in range(most + 1):
            status, failure = self._run_once(is_first=not restart)
            cause = None if self.signals else restarts.cause_of(status, failure, self.output_dir or Path("/"))
            if failure is not None:
                self.report_failure(failure)
            if cause is None or self.output_dir is None or restart == most:
                break
            self._choose_hosts(failure)
            self.words = restarts.resuming(self.words)
            self.environment = {**self.environment, **restarts.variables(cause)}
            self._wait(restarts.seconds_to_wait(restart), f"restart {restart + 1} of {most}: {cause}")
            if self.signals:
                return stop_requests.EXIT_STOPPED
        return status

    def _run_once(self, *, is_first: bool) -> tuple[int, Failure | None]:
        """Start the script, supervise it to its end, and return its status and its failure, if any."""
        try:
            sessions = self.start()
        except ConfigError as error:
            if is_first:
                raise
            hosts = tuple(self.resources.slots) if self.resources else ()
            return 1, Failure("missing", f"hosts are not ready: {error}", hosts=hosts)
        self._watch(sessions)
        return self.outcome([session.finish() for session in sessions])

    def start(self) -> list[HostSession]:
        """Start the command on every host; a `ConfigError` names hosts that cannot be reached, or differ."""
        environment = {**self.environment, "FINETUNE_LAUNCH_KEY": secrets.token_hex(16)}
        if self.resources is not None:
            environment["FINETUNE_WORLD_SIZE"] = str(self.resources.world_size)
            if not self.flags.no_ssh:
                return self._start_on_hosts(self.resources, environment)
        return [self._start_here(environment)]

    def _start_here(self, environment: dict[str, str]) -> LocalSession:
        port = self.flags.given.get("master_port") or host_probe.free_port()
        if self.flags.node_rank <= 0 and host_probe.is_taken(port):
            raise ConfigError(PORT_TAKEN.format(port))
        gpus = host_probe.count_gpus()
        if self.resources is None:
            local_slots(self.flags, gpus)
        command = self._command(*self.passed_on("hostfile", "master_addr"), f"--master_port={port}")
        _say(shlex.join(redact(command[1:])))
        has_none = not gpus and not host_probe.has_unlisted_gpus()
        if has_none:  # else DeepSpeed warns, in each of its processes, that it found none
            environment = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), **environment}
        if has_none or os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":  # DeepSpeed would look for those numbers
            environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
        return LocalSession(command, environment, hostfile=None, host=os.uname().nodename)

    def _start_on_hosts(self, resources: Resources, environment: dict[str, str]) -> list[HostSession]:
        flags = self.flags
        if flags.launcher.lower() != "pdsh" or flags.launcher_args:
            given = f"--launcher_args {flags.launcher_args}" if flags.launcher_args else f"--launcher {flags.launcher}"
            raise ConfigError(
                f"{given}: this command reaches hosts over ssh by itself: leave the flag out, or "
                "use the deepspeed command, without supervision"
            )
        shell = ssh.SshShell(flags.ssh_port, flags.venv_script)
        address, port, interfaces = self._check_hosts(resources, shell)
        is_alone = len(resources.slots) == 1
        _say(f"{len(resources.slots)} hosts, {resources.world_size} ranks, rendezvous at {address}:{port}")
        sessions: list[HostSession] = []
        for number, host in enumerate(resources.slots):
            node = ["--no_ssh", f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}"]
            command = self._command(HOSTFILE_PLACEHOLDER, *self.passed_on(), *node)
            if number == 0:
                _say(shlex.join(redact(command[1:])))
            interface = None if is_alone else interfaces.get(host)
            variables = ssh.add_interface({**environment_of_ranks(), **environment}, interface)
            text = resources.hostfile_text()
            if ssh.is_here(host):
                sessions.append(LocalSession(command, variables, hostfile=text, host=host, prefix_lines=not is_alone))
            else:
                sessions.append(ssh.RemoteSession(shell, command, variables, hostfile=text, host=host))
        return sessions

    def _check_hosts(self, resources: Resources, shell: ssh.SshShell) -> tuple[str, int, dict[str, str]]:
        """Compare all hosts; return address and port of the rendezvous, and host -> interface where known."""
        flags, given_port = self.flags, self.flags.given.get("master_port")
        if flags.no_ssh_check and flags.master_addr and given_port:
            return flags.master_addr, given_port, {}
        hosts = [resources.first_host] if flags.no_ssh_check else list(resources.slots)
        answers = ssh.probe_hosts(hosts, shell, ssh.shared_words(self.words), {"wanted": given_port})
        ssh.compare_hosts(answers, resources.slots)
        first = answers[resources.first_host]
        if not isinstance(first, str) and first["wanted_is_taken"]:
            raise ConfigError(f"{hosts[0]}: {PORT_TAKEN.format(given_port)}")
        address, port = ssh.rendezvous_address(answers, address=flags.master_addr, port=given_port)
        return address, port, ssh.interfaces_between(answers)

    def _command(self, *launcher_words: str) -> list[str]:
        """The `deepspeed` command of this interpreter, with the script and its arguments."""
        script = Path(sys.executable).with_name("deepspeed")
        deepspeed = [str(script)] if script.is_file() else ["-m", "deepspeed.launcher.runner"]
        module = ["--module"] if self.flags.module else []
        return [sys.executable, *deepspeed, *launcher_words, *module, self.flags.script, *self.words]

    def passed_on(self, *also: str) -> list[str]:
        """The user's own launcher flags, with those of `NOT_PASSED_ON` that `also` names; and a quieter log level."""
        words = self.flags.typed(without={*NOT_PASSED_ON} - {*also})
        if self.flags.given.keys() & {"log_level", "quiet"}:
            return words
        return [*words, f"--log_level={'critical' if self.output_dir else 'error'}"]  # ours says how a rank ended

    def _watch(self, sessions: Sequence[HostSession]) -> None:
        """Wait for all hosts; the first signal asks the ranks to save and exit, the second kills them."""
        handled, first_end = 0, None
        while running := [session for session in sessions if session.is_running()]:
            if len(self.signals) > handled:
                handled += 1
                for session in running:
                    session.ask_to_stop() if handled == 1 else session.kill()
            if len(running) < len(sessions):
                first_end = first_end or time.monotonic()
                waited = time.monotonic() - first_end
                for session in running if waited > SECONDS_FOR_OTHER_HOSTS else ():
                    session.kill()
                    if waited > SECONDS_FOR_OTHER_HOSTS + SECONDS_TO_KILL:
                        session.disconnect()
            time.sleep(POLL_SECONDS)

    def outcome(self, reports: Sequence[HostReport]) -> tuple[int, Failure | None]:
        """Return the run's exit status and its failure, if any, from the reports of its hosts.

        Where ranks report their ends, a status of 0 counts only if every rank has done so: a `deepspeed` command whose
        launcher was killed exits with 0, too.
        """
        if len(self.signals) > 1:
            return 128 + self.signals[1], None
        failures = [report.failure for report in reports if report.failure is not None]
        statuses = [report.status for report in reports]
        if failures:
            failure = find_first_failure(failures)
            if failure.kind in ("error", "exception") or failure.signal is not None:
                return failure.status, failure
            of_its_host = [report.status for report in reports if report.host == failure.host]
            status = next(filter(None, [*of_its_host, *statuses]), 1)
            return status, replace(failure, status=status)
        for report in reports:
            if report.status not in (0, stop_requests.EXIT_STOPPED):
                if self.output_dir and 2 <= report.status <= StorageError.status:  # a rank has said why in one line
                    return report.status, None
                text = f"the deepspeed command on {report.host} ended with status {report.status}, "
                text += "and no rank reported why"
                return report.status, Failure(kind="launcher", host=report.host, status=report.status, error=text)
        if stop_requests.EXIT_STOPPED in statuses:
            return stop_requests.EXIT_STOPPED, None
        for report in reports if self.output_dir else ():
            slots = self.resources.slots if self.resources else {}
            if report.statuses.count(0) < len(slots.get(report.host, [0])):
                text = f"the run on {report.host} is not complete, although the deepspeed command ended with status 0"
                return 1, Failure(kind="launcher", host=report.host, error=text)
        return 0, None

    def report_failure(self, failure: Failure) -> None:
        """Print the failure page, after writing the record if the run has a folder and could not write it itself."""
        record = self.output_dir / FAILURE_FILE if self.output_dir else None
        if record and record.parent.is_dir() and failure.kind in ("launcher", "lost"):
            write_failure(record.parent, failure)  # a record that the run has left stays as it is
        if not failure.is_said():
            where = str(record) if record and record.is_file() else ""
            page = format_failure_page(failure, colour=sys.stderr.isatty(), record=where)
            print(f"\n{page}", file=sys.stderr, flush=True)

    def _choose_hosts(self, failure: Failure | None) -> None:
        """Leave out the host that failed, if it can be replaced or left out."""
        host = restarts.failed_host(failure, self.resources) if self.resources else None
        if self.resources is None or host is None:
            return
        chosen = restarts.without_host(self.resources, host, may_shrink=self.may_shrink)
        added = [name for name in chosen.slots if name not in self.resources.slots]
        if chosen is not self.resources:
            _say(f"without {host}" + (f", with the spare {added[0]}" if added else ""))
        self.resources = chosen

    def _wait(self, seconds: float, why: str) -> None:
        """Wait before a restart; a signal ends the wait."""
        _say(f"{why}: starting from the newest checkpoint in {seconds:.0f} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.signals:
            time.sleep(POLL_SECONDS)


def _say(text: str) -> None:
    print(f"launch: {text}", flush=True)
