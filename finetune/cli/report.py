"""`finetune report`: what a run did, on one page; several runs over each other; a run in progress, watched."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.inference.run_result import TRUST_HELP, read_result
from finetune.report import FILE, RunRecord, read_run, write_report
from finetune.report.html_pages import REPORT, check_replaceable
from finetune.report.live_server import watch as keep_watching
from finetune.report.sample_answers import SamplePrompt, generate_answers, prompts_of, read_prompts, write_answers
from finetune.utils.console import configure_logging, quiet_libraries
from finetune.utils.errors import FinetuneError, raise_faults
from finetune.utils.options import CommandParser, fill, option, positional
from finetune.utils.web_requests import port_faults

logger = logging.getLogger(__name__)

PROMPTS = 3
LEAST_SECONDS = 0.2


@dataclass(frozen=True)
class ReportOptions:
    """Write what one or several runs did as one page, or watch a run in progress."""

    output_dirs: list[str] = positional("OUTPUT", "output folders of training runs")
    html: str | None = option(None, "the file to write; default: OUTPUT/report.html, of several runs report.html")
    prompts: str | None = option(None, "what base and result answer: a text file, one prompt a line")
    no_answers: bool = option(False, "load no model: show only answers that are there already")
    base_model: str | None = option(None, "where the base model is now; default: where it was")
    trust_remote_code: bool = option(False, TRUST_HELP)
    watch: bool = option(False, "keep the page up to date, and serve it, until the run ends")
    every: float = option(5.0, "seconds between two updates, with `--watch`")
    port: int = option(8642, "port of the page on this host, with `--watch`; 0: any")


build_parser = partial(
    CommandParser, "finetune report", "OUTPUT [OUTPUT ...] [--html FILE] [--watch] ...", ReportOptions
)


def main(argv: Sequence[str]) -> None:
    """Write the report of these output folders; that of one complete run has answers, which are made once."""
    options = fill(ReportOptions, build_parser().parse(argv))
    folders = [Path(folder).expanduser() for folder in options.output_dirs]
    raise_faults(_faults(options, folders))
    configure_logging(to_stderr=not options.watch)
    prompts = read_prompts(Path(options.prompts).expanduser()) if options.prompts else []
    default_path = folders[0] / FILE if len(folders) == 1 else Path(FILE)
    path = Path(options.html).expanduser() if options.html else default_path
    check_replaceable(path, REPORT)
    named = list(zip(folders, names(folders), strict=True))
    if options.watch:
        try:
            keep_watching(named, path, every=options.every, port=options.port)
        except KeyboardInterrupt:
            print("\nno longer watched; the run continues", flush=True)
        return
    runs = [read_run(folder, name) for folder, name in named]
    if len(runs) == 1 and not options.no_answers and _needs_answers(runs[0], prompts):
        _answer(runs[0], prompts, options.base_model, trust_remote_code=options.trust_remote_code)
        runs = [read_run(*named[0])]
    write_report(runs, path)
    print(f"{path}: {', '.join(f'{run.name} ({run.state})' for run in runs)}")


def _faults(options: ReportOptions, folders: Sequence[Path]) -> Iterator[str]:
    if len(set(folders)) < len(folders):
        yield "a run is named twice"
    if options.prompts and (len(folders) > 1 or options.no_answers or options.watch):
        yield "--prompts: the answers are those of one run: not with --no_answers, --watch or a second run"
    if not options.every >= LEAST_SECONDS:
        yield f"--every {options.every:g}: expected at least {LEAST_SECONDS:g} seconds"
    yield from port_faults(options.port)


def names(folders: Sequence[Path]) -> list[str]:
    """Name runs by the shortest ends of their paths that tell them apart.

    >>> names([Path("a/lora"), Path("b/lora")])
    ['a/lora', 'b/lora']
    """
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        ends = ["/".join(path[-count:]) for path in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(folder.absolute()) for folder in folders]


def _needs_answers(run: RunRecord, prompts: Sequence[SamplePrompt]) -> bool:
    if run.state != "complete":
        return False
    stored = run.answers
    if stored is None or any(answer.hurried for answer in stored.answered):
        return True
    return bool(prompts) and [answer.prompt.turns for answer in stored.answered] != [one.turns for one in prompts]


def _answer(
    run: RunRecord, prompts: Sequence[SamplePrompt], base_model: str | None, *, trust_remote_code: bool
) -> None:
    """Store the answers of base and result; a failure is only noted, because the report works without them."""
    prompts = prompts or prompts_of(run.cards, PROMPTS)
    if not prompts:
        logger.warning(f"no answers before and after: {run.folder} keeps no rows: name prompts with --prompts FILE")
        return
    from tqdm import tqdm

    quiet_libraries()
    try:
        with tqdm(total=2 * len(prompts), desc="base and result answer", unit=" answers") as bar:
            result = read_result(run.folder, trust_remote_code=trust_remote_code)
            answers = generate_answers(result, prompts, base_name=base_model, each=bar.update)
            write_answers(run.folder, result.run, answers)
    except (FinetuneError, OSError) as error:
        logger.warning(f"no answers before and after: {error}")
