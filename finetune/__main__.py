"""`finetune VERB`, the same as `python -m finetune VERB`; training itself starts with the `deepspeed` command."""

from __future__ import annotations

import typer

from finetune.errors import reported
from finetune.tools import chat, convert, doctor, launch, preview, quickstart

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Tools around fine-tuning with DeepSpeed. Train with: finetune launch finetune/finetune.py --help",
)
# These take flags of the training command, which have their home and their --help in `arguments`.
TRAINING_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


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


@app.command("chat", help=chat.SUMMARY)
def _chat(
    output: str = typer.Argument(help="an output_dir, a checkpoint in one, what merge has written, or any chat model"),
    base: bool = typer.Option(False, "--base", help="the base answers, as it was before the training"),
    compare: bool = typer.Option(False, "--compare", help="both answer; the tuned model's answers are kept"),
    base_model: str = typer.Option(None, "--base_model", help="where the base lies now, unless where it was"),
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
    chat.main(
        chat.ChatOptions(
            output, base, compare, base_model, system, max_new_tokens, temperature, top_p, seed, reasoning,
            trust_remote_code, as_json, web, host, port,
        )
    )  # fmt: skip


def main() -> None:
    """The console script."""
    with reported():
        app()


if __name__ == "__main__":
    main()
