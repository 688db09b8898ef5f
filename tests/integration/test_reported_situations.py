"""Situations that users of this and of other tools have reported, one a line: what is run, and what a user must see.

A line has what is run, its status, and a stable part of what it says. Words in capitals stand for what a test makes:
MODEL a tiny model, DATA a file of the `rows` (by default of good ones), OUT a new output folder, DIR its parent with
the `files`. `preview`, `doctor` and the other verbs run in this process; `train` is one rank that is forked from a
server. Keep `train` for what only a run shows, and mark it SLOW if another line shows nearly the same.
"""

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune import cli
from finetune.utils import console
from finetune.utils.errors import exit_on_error
from tests.helpers import ranks
from tests.helpers.chat_rows import good_row, turns
from tests.helpers.short_runs import SHORT

GOOD = [good_row(0), good_row(1)]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DATED, STRIPPING = "{{ strftime_now('%d %b %Y') }}" + CHATML, CHATML.replace("m.content", "m.content | trim")
ONE_STEP = ("--max_steps 1 --per_device_train_batch_size 1 --save_strategy no").split()


@dataclass(frozen=True)
class Situation:
    """One line of the table.

    Attributes:
        what: the situation, in words.
        words: the command, without the flags that each command of its verb gets (see `_command`).
        status: how it ends.
        shows: regular expressions, all found in what it says.
        rows: content of the data file.
        files: further files, by name.
        hides: a regular expression that is not found.
        source: a public report, `owner/repository#number`.
        encoding: of stdout and stderr; default: UTF-8.
        slow: for the slow tier.
    """

    what: str
    words: str
    status: int
    shows: tuple[str, ...] = ()
    rows: Any = None
    files: dict[str, str] = field(default_factory=dict)
    hides: str = ""
    source: str = ""
    encoding: str = "utf-8"
    slow: bool = False


def answered(answer: str = "Yes.", **keys: Any) -> dict[str, Any]:
    """A row of one question with these keys beside it."""
    return {**turns(("human", "Is tea a fruit?"), ("model", answer)), **keys}


SITUATIONS = [
    # ---- data
    Situation("preference pairs without an answer that is called good", "preview", 3, ("rejected",),
              rows=[{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    Situation("rows with label false are not imitated", "preview", 3, ('row 1: "label": false',),
              source="hiyouga/LlamaFactory#3803",
              rows=[answered("No.", label=True), answered("Yes.", label=False)]),
    Situation("many rows of a kind are one line with the count", "preview", 3, ("30 of 30 rows: .kto_tag.*20 more",),
              rows=[answered(f"Yes {n}.", kto_tag=False) for n in range(30)]),
    Situation("rejected rows can be dropped", "preview --bad_rows drop --max_dropped_rows 1", 0, ("1 kept.*1 dropped",),
              rows=[answered("No."), answered(rejected=True)]),
    Situation("a score beside an answer", "preview", 3, ('"score" grades the answer',), rows=[answered(score=0.1)]),
    Situation("a score that the user ignores", "preview --repairs ignore_verdicts", 0, ("1 kept",),
              rows=[answered(score=0.1)]),
    Situation("a class name under label", "preview", 0, ("1 kept",), rows=[answered(label="food")]),
    Situation("a tools column without tools", "preview", 0, ("2 kept",),
              rows=[answered("No.", tools="[]"), answered("Yes.", tools=None)]),
    Situation("all rows are fine", "preview", 0, ("2 kept",), hides="note: "),
    Situation("held-out rows that are training rows", "doctor --eval_data_path DATA", 3,
              ("2 of 2 examples of --eval_data_path are training", "row 1 = .*row 1\n", "--allow_seen_held_out True")),
    Situation("held-out rows that are training rows are allowed", "preview --eval_data_path DATA --allow_seen_held_out",
              0, ("2 of 2 examples of --eval_data_path are training",), hides="would refuse"),
    Situation("held-out rows of their own", "preview --eval_data_path DIR/other.json", 0, hides="are training",
              files={"other.json": json.dumps([good_row(7)])}),
    Situation("a template that writes today's date", "preview --chat_template DIR/t.jinja", 0,
              (f"today's date .*: {datetime.now(UTC).date()} .UTC.",), files={"t.jinja": DATED},
              source="sgl-project/sglang#3296"),
    Situation("a model whose config is a list", "preview --model_name_or_path DIR", 2,
              ("config.json: expected a JSON object, found an array",), files={"config.json": "[]"}),
    Situation("an index of weights that leaves its folder", "doctor --model_name_or_path DIR", 2,
              ("index.json: not an index of weights .*/x.bin",),
              files={"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "../../x.bin"}}'}),
    Situation("a model without a head", "train --model_name_or_path DIR", 2, ("num_attention_heads 0: no model has",),
              files={"config.json": '{"model_type": "llama", "num_attention_heads": 0}'}),
    Situation("a template that would fill the memory is one error", "preview --chat_template DIR/t.jinja", 2,
              ("the chat template was stopped",), hides="(?s)stopped.*stopped",
              files={"t.jinja": "{{ 'a' * 10000000000 }}" + CHATML}),
    Situation("white space that a template strips from an answer", "preview --chat_template DIR/t.jinja", 0,
              ("strips white space around answers",), rows=[answered("Yes. ")], files={"t.jinja": STRIPPING}),
    # ---- flags
    *(
        Situation(f"refused before data and model are read: {flags}", f"doctor {flags}", 2, (shows,))
        for flags, shows in {
            "--per_device_train_batch_size 0": "--per_device_train_batch_size 0",
            "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0",
            "--max_steps 0": "--max_steps 0",
            "--save_strategy steps --save_steps 0": "--save_steps 0",
            "--fsdp full_shard": "fsdp",
            "--average_tokens_across_devices False": "--average_tokens_across_devices",
            "--lr_scheduler_type cosin": "cosin",
            "--lr_scheduler_kwargs nojson": "nojson",
        }.items()
    ),
    Situation("a scheduler in the DeepSpeed JSON beside another by flag",
              "doctor --deepspeed DIR/ds.json --lr_scheduler_type cosine", 2, ("--lr_scheduler_type",),
              files={"ds.json": json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}})}),
    Situation("a misspelt key in the DeepSpeed JSON", "doctor --deepspeed DIR/ds.json", 2, ("stge", "stage"),
              files={"ds.json": json.dumps({"zero_optimization": {"stge": 2}})}),
    Situation("--lora_target_modules with commas", "train --use_lora True --lora_target_modules q_proj,v_proj", 0,
              ("lora",), slow=True),
    Situation("the output folder is a file", "doctor --output_dir DIR/a", 2, ("a: is a file",), files={"a": ""}),
    Situation("the output folder is below a file", "doctor --output_dir DIR/a/b/c", 2, ("/a is a file",),
              files={"a": ""}),
    Situation("the folder of prepared data is a file", "preview --data_cache_dir DIR/a", 6, ("/a is a file",),
              files={"a": ""}),
    Situation("the DeepSpeed JSON is a folder", "doctor --deepspeed DIR", 2, ("--deepspeed .*: is a folder",)),
    Situation("the model is a file", "doctor --model_name_or_path DIR/a", 2, ("a: is a file",), files={"a": ""}),
    Situation("the model folder holds no model", "doctor --model_name_or_path DIR", 2, ("holds no config.json",)),
    Situation("the data folder holds no data", "preview --data_path DIR/cache", 3, ("there is no such file",)),
    Situation("the checkpoint is a file", "train --resume_from_checkpoint DIR/a", 2, ("a: is a file",),
              files={"a": ""}, slow=True),
    # ---- consoles
    *(
        Situation(f"a run ends where the terminal writes {encoding}", "train --max_steps 2", 0,
                  ("loss by step", "Saved|saved"), encoding=encoding, slow=encoding != "ascii",
                  source="AnswerDotAI/fastprogress#37")
        for encoding in ("ascii", "gbk", "cp1252")
    ),
    Situation("a preview of Chinese rows in ASCII", "preview", 0, (r"\[\[.*\\u4f60", "#"), encoding="ascii",
              rows=[answered("你好")]),
    Situation("a message with Chinese in ASCII", "preview --data_path DIR/你.json", 3, (r"\\u4f60",), encoding="ascii"),
]  # fmt: skip


@pytest.mark.parametrize(
    "situation",
    [pytest.param(one, id=one.what, marks=[pytest.mark.slow] if one.slow else []) for one in SITUATIONS],
)
def test_a_user_sees_what_the_table_says(situation, tiny_model, tmp_path, monkeypatch):
    made = {"MODEL": tiny_model, "DATA": tmp_path / "data.json", "OUT": tmp_path / "out", "DIR": tmp_path}
    made["DATA"].write_text(json.dumps(GOOD if situation.rows is None else situation.rows), encoding="utf-8")
    for name, content in situation.files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    verb, *words = situation.words.split()
    words = [re.sub("|".join(made), lambda found: str(made[found[0]]), word) for word in words]
    if verb == "train":
        command = _command(verb, words, made)
        outcome = ranks.train(tmp_path / "logs", command, world_size=1, encoding=situation.encoding)
        status, said = outcome.statuses[0], outcome.outputs[0]
    else:
        status, said = _run([verb, *_command(verb, words, made)], situation.encoding)
    assert status == situation.status, said
    assert [pattern for pattern in situation.shows if not re.search(pattern, said)] == [], said
    assert not situation.hides or not re.search(situation.hides, said), said


def _command(verb: str, words: list[str], made: dict[str, Path]) -> list[str]:
    """Give `train`, `doctor` and `preview` the flags that they need; those of the line come later and win."""
    common = ["--model_name_or_path", str(made["MODEL"]), "--data_path", str(made["DATA"])]
    training = [*common, "--output_dir", str(made["OUT"]), *SHORT, *ONE_STEP]
    return [*{"train": training, "doctor": training, "preview": common}.get(verb, []), *words]


def _run(argv: list[str], encoding: str) -> tuple[int, str]:
    """Run a verb in this process; return the status and all that it wrote."""
    written, status = io.BytesIO(), 0
    stream = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        console.accept_all_characters()
        try:
            with exit_on_error():
                cli.main(argv)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return status, written.getvalue().decode(encoding)
