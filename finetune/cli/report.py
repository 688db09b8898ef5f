"""`finetune report`: what a run did, on one page; several runs over each other; a run in progress, watched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.inference.run_result import read_result
from finetune.report import FILE, RunRecord, pages, read_run, write_report
from finetune.report.live_server import watch as keep_watching
from finetune.report.sample_answers import (
    SampleAnswers,
    SamplePrompt,
    generate_answers,
    prompts_of,
    read_prompts,
    write_answers,
)
from finetune.utils.console import quiet_libraries, say_note_aside
from finetune.utils.errors import ConfigError, FinetuneError

PROMPTS = 3
LEAST_SECONDS = 0.2


def main(
    output_dirs: Sequence[str],
    *,
    html: str | None,
    prompts: str | None,
    no_answers: bool,
    base_model: str | None,
    watch: bool,
    every: float,
    port: int,
) -> None:
    """Write the report of these output folders; of one that is complete with answers, which are made once.

    Raises:
        ConfigError: flags that exclude each other, a folder without a run, a file that is not replaced.
    """
    folders = [Path(one).expanduser() for one in output_dirs]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is named twice")
    if prompts and (len(folders) > 1 or no_answers or watch):
        raise ConfigError("--prompts: the answers are those of one run: not with --no_answers, --watch or a second run")
    if not every >= LEAST_SECONDS:
        raise ConfigError(f"--every {every:g}: expected at least {LEAST_SECONDS:g} seconds")
    asked = read_prompts(Path(prompts).expanduser()) if prompts else []
    path = Path(html).expanduser() if html else folders[0] / FILE if len(folders) == 1 else Path(FILE)
    pages.check_replaceable(path, pages.REPORT)
    named = list(zip(folders, names(folders), strict=True))
    if watch:
        try:
            keep_watching(named, path, every=every, port=port, say=lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print("\nno longer watched; the run goes on", flush=True)
        return
    runs = [read_run(folder, name) for folder, name in named]
    if len(runs) == 1 and not no_answers and _needs_answers(runs[0], asked):
        _answer(runs[0], asked, base_model)
        runs = [read_run(*named[0])]
    write_report(runs, path)
    print(f"{path}: {', '.join(f'{run.name} ({run.state})' for run in runs)}")


def names(folders: Sequence[Path]) -> list[str]:
    """How runs are called beside each other: by the last part of their paths that tells them apart.

    >>> names([Path("a/lora"), Path("b/lora")])
    ['a/lora', 'b/lora']
    """
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        found = ["/".join(one[-count:]) for one in parts]
        if len(set(found)) == len(found):
            return found
    return [str(folder.absolute()) for folder in folders]


def _needs_answers(run: RunRecord, asked: Sequence[SamplePrompt]) -> bool:
    if run.state != "complete":
        return False
    kept: SampleAnswers | None = run.answers
    if kept is None or any(one.hurried for one in kept.answered):
        return True
    return bool(asked) and [one.prompt.turns for one in kept.answered] != [one.turns for one in asked]


def _answer(run: RunRecord, asked: Sequence[SamplePrompt], base_model: str | None) -> None:
    """Let base and result answer, or say why not: the rest of the report does not need it."""
    wanted = asked or prompts_of(run.cards, PROMPTS)
    if not wanted:
        say_note_aside(
            f"no answers before and after: {run.folder} keeps no row to ask for: name some with --prompts FILE"
        )
        return
    from tqdm import tqdm

    quiet_libraries()
    try:
        with tqdm(total=2 * len(wanted), desc="base and result answer", unit=" answers") as bar:
            result = read_result(run.folder)
            write_answers(
                run.folder, result.run, generate_answers(result, wanted, base_name=base_model, each=bar.update)
            )
    except (FinetuneError, OSError) as error:
        say_note_aside(f"no answers before and after: {error}")
