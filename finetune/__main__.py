"""`finetune VERB`, the same as `python -m finetune VERB`; training itself starts with the `deepspeed` command."""

from __future__ import annotations

import typer

from finetune.errors import reported
from finetune.tools import convert, doctor, evaluate, launch, preview, quickstart

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Tools around fine-tuning with DeepSpeed. Train with: finetune launch finetune/finetune.py --help",
)
# These take flags of the training command, which have their home and their --help in `arguments`.
TRAINING_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def _every_verb(local_rank: int = typer.Option(0, "--local_rank", hidden=True)) -> None:
    """What the `deepspeed` launcher puts in front of the verb; RANK and LOCAL_RANK say the same."""


@app.command("preview", context_settings=TRAINING_FLAGS, help=preview.SUMMARY)
def _preview(context: typer.Context) -> None:
    preview.main(context.args)


@app.command("convert", context_settings=TRAINING_FLAGS, help=convert.SUMMARY)
def _convert(context: typer.Context) -> None:
    convert.main(context.args)


@app.command("launch", context_settings=TRAINING_FLAGS, help=launch.SUMMARY)
def _launch(context: typer.Context) -> None:
    launch.main(context.args)


@app.command("doctor", context_settings=TRAINING_FLAGS, help=doctor.SUMMARY)
def _doctor(context: typer.Context) -> None:
    doctor.main(context.args)


@app.command("evaluate", context_settings=TRAINING_FLAGS, help=evaluate.SUMMARY)
def _evaluate(context: typer.Context) -> None:
    evaluate.main(context.args)


@app.command("quickstart", help=quickstart.SUMMARY)
def _quickstart(
    output_dir: str = typer.Option("output/quickstart", "--output_dir", help="where the result goes"),
    model_dir: str = typer.Option(quickstart.MODEL_DIR, "--model_dir", help="where the small model is kept"),
    only_model: bool = typer.Option(False, "--only_model", help="obtain the small model and stop"),
    short: bool = typer.Option(
        False, "--short", help="a few steps and questions: shows that it runs, not that it learns"
    ),
) -> None:
    quickstart.main(output_dir, model_dir, only_model=only_model, short=short)


def main() -> None:
    """The console script."""
    with reported():
        app()


if __name__ == "__main__":
    main()
