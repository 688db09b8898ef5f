"""`finetune push`: upload a result to the Hugging Face hub.

finetune push output you/name              # lists the files, asks, creates the repository if there is none
finetune push output/merged you/name --private --yes
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.run_dir.run_json import RUN_FILE
from finetune.utils.errors import ConfigError, FinetuneError, first_line
from finetune.utils.options import CommandParser, fill, option, positional

if TYPE_CHECKING:
    from finetune.inference.run_result import RunResult

CARD = "README.md"
# All that is ever uploaded. Rows of the data, reports and answers that quote them, logs, optimizer states and
# checkpoints have other names.
FILES = (
    CARD, RUN_FILE, "config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors",
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "*.gguf", "Modelfile",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "chat_template.jinja", "*processor_config.json", "*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class PushOptions:
    """Upload a result to the Hugging Face hub: weights, config, tokenizer, model card, run.json; no row of the data."""

    output: str = positional("OUTPUT", "the output_dir of a run, a checkpoint in it, or a merged model")
    repo: str = positional("REPO", "owner/name; created if there is none")
    private: bool = option(False, "create the repository for yourself alone; one that is there stays as it is")
    yes: bool = option(False, "upload without asking")


build_parser = partial(CommandParser, "finetune push", "OUTPUT REPO [--private] [--yes]", PushOptions)


def main(argv: Sequence[str]) -> None:
    """List what would be uploaded, ask, and upload it."""
    options = fill(PushOptions, build_parser().parse(argv))
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    from finetune.inference.run_result import read_result

    with hub_problems(options.repo, constants.ENDPOINT):
        validate_repo_id(options.repo)
    result = read_result(Path(options.output))
    if not options.yes and not sys.stdin.isatty():
        raise ConfigError("finetune push asks before it uploads, and there is no terminal: give --yes")
    upload(contents_of(result), options)


def contents_of(result: RunResult) -> dict[str, Path | bytes]:
    """Return what is uploaded by name: files, and the card and run.json without folders of this machine."""
    from finetune.export.model_card import model_card, shown

    merges = result.adapter is None and "merged" in result.run
    card = result.folder / CARD
    is_ours = card.is_file() and "[More Information Needed]" not in card.read_text(encoding="utf-8", errors="replace")
    contents: dict[str, Path | bytes] = {path.name: path for path in files_of(result.folder)}
    contents[CARD] = card if is_ours else model_card(result, merges=merges).encode()
    facts = shown({**result.run, "model": {**result.base, "folder": None}})
    contents[RUN_FILE] = json.dumps(facts, ensure_ascii=False, indent=2).encode()
    return contents


def files_of(folder: Path) -> list[Path]:
    """Return the files of a result that may be uploaded, by name.

    Raises:
        ConfigError: no weights are among them.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, p) for p in FILES))
    if not any(path.suffix in (".safetensors", ".gguf") for path in paths):
        raise ConfigError(f"{folder}: holds no weights in safetensors: `finetune merge {folder}` writes them")
    return paths


def upload(contents: dict[str, Path | bytes], options: PushOptions) -> None:
    """Show the files with their sizes, ask, and upload them in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    api = HfApi()
    with hub_problems(options.repo, constants.ENDPOINT):
        account = api.whoami()["name"]
        sizes = {name: content.stat().st_size if isinstance(content, Path) else len(content)
                 for name, content in contents.items()}  # fmt: skip
        for name, size in sorted(sizes.items()):
            print(f"  {size / 1e6:10,.1f} MB  {name}")
        place = f"{constants.ENDPOINT}/{options.repo}"
        total, private = sum(sizes.values()) / 1e6, " (private)" * options.private
        print(f"{len(sizes)} files, {total:,.1f} MB, to {place}{private}, as {account}")
        if not options.yes and input("Upload them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was uploaded.")
            return
        api.create_repo(options.repo, private=options.private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                      for name, content in contents.items()]  # fmt: skip
        api.create_commit(options.repo, operations=operations, commit_message="Upload with finetune push")
    print(f"Uploaded: {place}")


@contextmanager
def hub_problems(repo: str, endpoint: str) -> Iterator[None]:
    """Turn what the hub's client raises into one error with a remedy."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    from finetune.utils.hub import hub_errors

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{repo}: {first_line(error)}: expected owner/name") from None
    except LocalTokenNotFoundError:
        raise FinetuneError(f"{endpoint}: no token: run `hf auth login`, or set HF_TOKEN") from None
    except hub_errors() as error:
        raise FinetuneError(f"{repo}: not uploaded to {endpoint}: {_reason(error)}") from None


def _reason(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedies = {
        401: "the token is not valid: run `hf auth login`, or set HF_TOKEN",
        403: "the token may not write there: make one with write access at /settings/tokens, or name a REPO of yours",
        404: "there is no such owner or repository: check REPO, which is owner/name",
    }
    offline = " (HF_HUB_OFFLINE is set: unset it)" if os.environ.get("HF_HUB_OFFLINE") else ""
    network = f"{first_line(error)}{offline}: check the network, HTTPS_PROXY, or set HF_ENDPOINT to a mirror"
    return remedies.get(status or 0, network if status is None else f"{first_line(error)}: try again later")
