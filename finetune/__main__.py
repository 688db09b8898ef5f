"""`finetune VERB`, the same as `python -m finetune VERB`; training itself starts with the `deepspeed` command.

A verb's file is read when that verb runs: `--help` waits for none of them.
"""

from __future__ import annotations

from typing import Annotated

import typer

import finetune
from finetune.utils.errors import exit_on_error, process_exit_guard

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Tools around fine-tuning with DeepSpeed. Train with: finetune launch finetune/finetune.py --help",
)
# These take flags of the training command, which have their home and their --help in `arguments`.
TRAINING_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"finetune {finetune.__version__}")
        raise typer.Exit


@app.callback()
def _every_verb(
    local_rank: int = typer.Option(0, "--local_rank", hidden=True),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="the version of this toolkit"
    ),
) -> None:
    """What the `deepspeed` launcher puts in front of the verb; RANK and LOCAL_RANK say the same."""


@app.command("preview", context_settings=TRAINING_FLAGS)
def _preview(context: typer.Context) -> None:
    """Show what each row of a data file renders to: tokens, what is learned, what was cut or dropped."""
    from finetune.cli import preview

    preview.main(context.args)


@app.command("convert", context_settings=TRAINING_FLAGS)
def _convert(context: typer.Context) -> None:
    """Write conversation files, folders or data sets as one JSON file in the project's own layout."""
    from finetune.cli import convert

    convert.main(context.args)


@app.command("launch", context_settings=TRAINING_FLAGS)
def _launch(context: typer.Context) -> None:
    """Start training like the deepspeed command does, and see it to its end: hosts checked, nothing left behind."""
    from finetune.cli import launch

    launch.main(context.args)


@app.command("doctor", context_settings=TRAINING_FLAGS)
def _doctor(context: typer.Context) -> None:
    """Will this run, will it fit, what would go wrong? Examines a training command and every host of its hostfile."""
    from finetune.cli import doctor

    doctor.main(context.args)


@app.command("merge")
def _merge(
    output: str = typer.Argument(metavar="OUTPUT", help="the output_dir of a run, or a checkpoint in it"),
    target: str = typer.Argument(None, metavar="DIR", help="where the model goes; default: OUTPUT/merged"),
    base_model: str = typer.Option(None, "--base_model", help="where the base lies now; default: where it was"),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp16 or float32; default: the precision of the training"),
    max_shard_size: str = typer.Option("5GB", "--max_shard_size", help="of a file; about the memory that is needed"),
    gguf: str = typer.Option(None, "--gguf", metavar="TYPE", help="also a GGUF file: f32, f16, bf16, q8_0, q4_0, ..."),
    no_check: bool = typer.Option(False, "--no_check", help="do not open the model and compare its logits"),
) -> None:
    """Merge an adapter into its base, or a ZeRO checkpoint into a plain model, on the CPU, shard by shard."""
    from finetune.cli import merge

    merge.main(
        output,
        target,
        base_model=base_model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        gguf=gguf,
        check=not no_check,
    )


@app.command("evaluate", context_settings=TRAINING_FLAGS)
def _evaluate(context: typer.Context) -> None:
    """Is it better? Held-out conversations, benchmarks, and what was forgotten, beside the base."""
    from finetune.cli import evaluate

    evaluate.main(context.args)


@app.command("quickstart")
def _quickstart(
    output_dir: str = typer.Option("output/quickstart", "--output_dir", help="where the result goes"),
    model_dir: str = typer.Option(".models/SmolLM2-135M-Instruct", "--model_dir", help="where the small model is kept"),
    only_model: bool = typer.Option(False, "--only_model", help="obtain the small model and stop"),
    short: bool = typer.Option(
        False, "--short", help="a few steps and questions: shows that it runs, not that it learns"
    ),
) -> None:
    """Obtain a small model, fine-tune it on data/identity.json, and ask it who it is, before and after."""
    from finetune.cli import quickstart

    quickstart.main(output_dir, model_dir, only_model=only_model, short=short)


@app.command("report")
def _report(
    output_dirs: Annotated[list[str], typer.Argument(metavar="OUTPUT", help="output folders of training runs")],
    html: str = typer.Option(
        None, "--html", help="the file to write; default: OUTPUT/report.html, of several runs report.html"
    ),
    prompts: str = typer.Option(None, "--prompts", help="what base and result answer: a text file, one prompt a line"),
    no_answers: bool = typer.Option(False, "--no_answers", help="load no model: only answers that are there already"),
    base_model: str = typer.Option(None, "--base_model", help="where the base lies now; default: where it was"),
    watch: bool = typer.Option(False, "--watch", help="keep the page up to date, and serve it, until the run ends"),
    every: float = typer.Option(5.0, "--every", help="seconds between two looks, with --watch"),
    port: int = typer.Option(8642, "--port", help="where it is served on this host, with --watch; 0: any"),
) -> None:
    """Write what a run did, or several over each other, as one page; or watch a run in progress."""
    from finetune.cli import report

    report.main(
        output_dirs,
        html=html,
        prompts=prompts,
        no_answers=no_answers,
        base_model=base_model,
        watch=watch,
        every=every,
        port=port,
    )


@app.command("chat")
def _chat(
    output: str = typer.Argument(
        metavar="OUTPUT", help="an output_dir, a checkpoint in one, what merge has written, or any chat model"
    ),
    base: bool = typer.Option(False, "--base", help="the base answers, as it was before the training"),
    compare: bool = typer.Option(False, "--compare", help="both answer; the tuned model's answers are kept"),
    base_model: str = typer.Option(None, "--base_model", help="where the base lies now; default: where it was"),
    system: str = typer.Option(None, "--system", help="a system turn in front of the conversation"),
    max_new_tokens: int = typer.Option(512, "--max_new_tokens", help="the most tokens of an answer"),
    temperature: float = typer.Option(0.0, "--temperature", help="0: greedy, the likeliest token each time"),
    top_p: float = typer.Option(1.0, "--top_p", help="draw from the likeliest tokens that make up this share"),
    seed: int = typer.Option(None, "--seed", help="makes drawn answers repeatable"),
    reasoning: bool = typer.Option(
        False, "--reasoning", help="answers begin with their reasoning; for formats that announce it"
    ),
    trust_remote_code: bool = typer.Option(
        False, "--trust_remote_code", help="run the Python files of a model that has no run.json"
    ),
    as_json: bool = typer.Option(False, "--json", help="from a pipe: the answer as JSON"),
    web: bool = typer.Option(False, "--web", help="a page for the browser instead (the extra `web`: Gradio)"),
    host: str = typer.Option("127.0.0.1", "--host", help="where the page listens; only this machine sees the default"),
    port: int = typer.Option(7860, "--port", help="of the page"),
) -> None:
    """Talk with what a run has left: in a terminal, from a pipe, or in a browser (--web)."""
    from finetune.cli import chat

    chat.main(
        chat.ChatOptions(
            output, base, compare, base_model, system, max_new_tokens, temperature, top_p, seed, reasoning,
            trust_remote_code, as_json, web, host, port,
        )
    )  # fmt: skip


def main() -> None:
    """The console script."""
    with process_exit_guard(), exit_on_error():
        app()


if __name__ == "__main__":
    main()
