"""A model that is trained on rows with tools calls them: measured on held-out rows, and in a conversation."""

import json
import sys

import pytest

from finetune.dataset.conversation_reader import read_conversations
from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.terminals import Terminal
from tests.helpers.verbs import finetune_text

TOOL = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
TRAINED = ("Bergen", "Paris", "Rome", "Cairo", "Lima", "Oslo", "Delhi", "Perth", "Quito", "Tunis", "Accra", "Dakar",
           "Hanoi", "Kyoto", "Leeds", "Milan", "Nice", "Osaka", "Porto", "Riga")  # fmt: skip
HELD_OUT = ("Bonn", "Turin", "Lyon", "Basel")


def write_rows(path, towns):
    rows = [
        {"tools": [TOOL], "conversations": [
            {"from": "human", "value": f"Weather in {town}?"},
            {"from": "model", "value": "", "tool_calls": [{"name": "get_weather", "arguments": {"town": town}}]},
            {"from": "tool", "value": f"{number} degrees"},
            {"from": "model", "value": f"It has {number} degrees in {town}."},
        ]}
        for number, town in enumerate(towns)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.slow
def test_a_model_learns_to_call(tmp_path, pretrained):
    output = tmp_path / "output"
    flags = "--use_lora True --chat_template hermes --num_train_epochs 2 --per_device_train_batch_size 4 "
    flags += "--learning_rate 2e-3 --lr_scheduler_type constant --save_strategy no"
    named = ["--model_name_or_path", pretrained, "--data_path", write_rows(tmp_path / "rows.json", TRAINED)]
    named += ["--output_dir", output, *flags.split()]
    outcome = ranks.train(tmp_path / "logs", named, world_size=1)
    assert outcome.succeeded, "\n".join(outcome.outputs)

    held_out = write_rows(tmp_path / "held_out.json", HELD_OUT)
    done = finetune_text("evaluate", output, "--data_path", held_out, "--tool_rows", "2", "--no_base")
    assert done.returncode == 0, done.stderr
    counts = json.loads((output / "evaluation.json").read_text())["tool_calls"]["counts"]
    assert counts["tuned"]["valid"] == counts["tuned"]["right_name"] == 2
    assert "valid call" in done.stdout and "100.0%" in done.stdout

    declared = tmp_path / "tools.json"
    declared.write_text(json.dumps([TOOL]))
    command = [sys.executable, "-m", "finetune", "chat", output, "--tools", declared, "--max_new_tokens", "60"]
    with Terminal([*map(str, command)], PYTHONPATH=str(ROOT), columns=200) as terminal:
        assert "tools: get_weather" in terminal.wait_for("\n> ")
        terminal.type("Weather in Lyon?\n")
        assert 'called: get_weather({"town": "Lyon"})' in terminal.wait_for("\n> ")
        terminal.type("And?\n")
        assert "has no result" in terminal.wait_for("\n> ")
        terminal.type("/tool 3 degrees\n")
        assert "3 degrees" in terminal.wait_for("\n> ").partition("tuned: ")[2]
        terminal.type(f"/save {tmp_path / 'saved.json'}\n/exit\n")
        assert terminal.wait_for_end() == 0
    (row,) = read_conversations(tmp_path / "saved.json")
    assert [turn.role for turn in row.turns] == ["human", "model", "tool", "model"] and len(row.tools) == 1
