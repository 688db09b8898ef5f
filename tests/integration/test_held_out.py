"""Held-out losses against a stock model, one conversation at a time, on one rank and on two."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from finetune.chat_templates import Renderer
from finetune.cli import evaluate
from finetune.dataset.conversation_reader import read_conversations
from finetune.evaluation import held_out
from finetune.evaluation.held_out import RowLosses, most_worsened, summarize, worst_rows
from finetune.evaluation.token_losses import group_by_tokens
from finetune.inference.load_result import chat_format_of, load_base, load_tokenizer
from finetune.inference.run_result import read_result
from finetune.run_dir.eval_results import read_sections
from finetune.utils.errors import ConfigError, DataError, NumericsError
from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows
from tests.helpers.short_runs import KINDS_OF_RESULTS
from tests.helpers.tiers import mostly_slow

HELD_OUT = [
    [("human", "Where is Nori from?"), ("model", "From Tidepool.")],
    [("system", "Be kind."), ("human", "你好"), ("model", "你好！"), ("human", "2+2?"), ("model", "It is 4.")],
    [("human", "Say </s>"), ("model", "</s>, as text"), ("human", "again"), ("model", "no"), ("human", "?"),
     ("model", "!")],
    [("human", "A long one: " + "word " * 30), ("model", "answer " * 20)],
    [("human", "a"), ("model", "b")],
]  # fmt: skip
OTHERS = [[("human", "Who?"), ("model", "Nori.")], [("human", "Name?"), ("model", "I am Nori.")]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of held-out rows."""
    folder = tmp_path_factory.mktemp("held_out")
    return [write_rows(folder / "first.json", HELD_OUT), write_rows(folder / "second.json", OTHERS)]


def evaluated(folder, files, *flags):
    evaluate.main([str(folder), "--data_path", *map(str, files), *map(str, flags)])
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def reference(folder, files, model_of, **rendered):
    """By source, row and turn: tokens, and the sum of their losses under a stock model, one conversation at a time."""
    result = read_result(folder)
    tokenizer = load_tokenizer(result)
    renderer = Renderer(chat_format_of(result, tokenizer), **{"max_length": 2048, "too_long": "turns", **rendered})
    model, found = model_of(result, tokenizer), {}
    for rendering in (one for file in files for one in renderer.render_all(read_conversations(file))):
        for example in rendering.examples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, -len(example.input_ids) :]
            labels = torch.tensor(example.labels)
            losses = F.cross_entropy(logits[:-1].double(), labels[1:], reduction="none")
            for span in (span for span in example.turn_spans if span.role == "model"):
                own = [at for at in range(span.start, span.stop) if labels[at] != -100]
                if own:
                    place = rendering.source, rendering.row, span.turn
                    found[place] = len(own), sum(losses[at - 1].item() for at in own)
    return found


def stock(result, tokenizer):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    opener = AutoModelForCausalLM if result.adapter is None else AutoPeftModelForCausalLM
    return opener.from_pretrained(result.folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", mostly_slow(KINDS_OF_RESULTS, ["lora"]))
def test_losses_are_those_of_a_stock_model(trained, files, kind, capsys):
    folder = trained(kind)
    document = evaluated(folder, files)
    said = capsys.readouterr().err
    assert ("tuned: conversations are measured one by one" in said) == (kind in ("prefix", "prompt"))
    assert "base: conversations" not in said
    for label, opener in (("tuned", stock), ("base", load_base)):
        wanted = reference(folder, files, opener)
        found = {
            (row["source"], row["row"], turn["turn"]): (turn["tokens"], turn[label])
            for row in document["rows"]
            for turn in row["turns"]
        }
        assert found.keys() == wanted.keys() and len(found) == 10
        for place, (tokens, loss) in wanted.items():
            assert found[place] == (tokens, pytest.approx(loss / tokens, abs=1e-5))
        whole = sum(loss for _, loss in wanted.values()) / sum(tokens for tokens, _ in wanted.values())
        assert document["groups"][0][label]["loss"] == pytest.approx(whole, abs=1e-5)
        assert document["groups"][0][label]["perplexity"] == pytest.approx(math.exp(whole), rel=1e-4)
    assert document["groups"][0]["tuned"] != document["groups"][0]["base"]
    names = [group["name"] for group in document["groups"]]
    assert names == ["all rows", *map(str, files), "answer 1", "answer 2", "answer 3"]


@pytest.mark.slow
def test_which_rows_are_measured_together_changes_nothing(trained, files):
    folder = trained("lora")
    whole = evaluated(folder, files)
    for budget in (1, 60, 300):
        again = evaluated(folder, files, "--tokens_per_batch", budget)
        for row, other in zip(whole["rows"], again["rows"], strict=True):
            assert (row["tuned"], row["base"]) == (
                pytest.approx(other["tuned"], abs=1e-5),
                pytest.approx(other["base"], abs=1e-5),
            )


@pytest.mark.parametrize("kind", mostly_slow(["full", "prefix"], ["prefix"]))
def test_two_ranks_find_what_one_finds(trained, files, tmp_path, kind):
    folder = trained(kind)
    alone = evaluated(folder, files, "--tokens_per_batch", 100)
    (folder / "evaluation.json").unlink()
    argv = [str(folder), "--data_path", *map(str, files), "--tokens_per_batch", "100"]
    outcome = ranks.run(tmp_path, evaluate.main, (argv,), world_size=2)
    assert outcome.succeeded, outcome.outputs
    together = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["turns"][0]["tokens"] for row in together["rows"]] == [
        row["turns"][0]["tokens"] for row in alone["rows"]
    ]
    assert flat(together["rows"]) == pytest.approx(flat(alone["rows"]), abs=1e-6)
    assert "Held-out conversations" in outcome.outputs[0] and "Held-out conversations" not in outcome.outputs[1]


@pytest.mark.slow
def test_the_launcher_starts_it_on_two_ranks(trained, files):
    """`deepspeed` puts --local_rank in front of the verb."""
    folder = trained("lora")
    alone = evaluated(folder, files)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
    command = [*launcher, str(ranks.free_port()), "--module", "finetune", "evaluate", folder, "--data_path", *files]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    together = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert flat(together["rows"]) == pytest.approx(flat(alone["rows"]), abs=1e-6)
    assert done.stdout.count("Loss per token") == 1


def flat(rows):
    return [row[model] for row in rows for model in ("tuned", "base")]


def test_a_checkpoint_and_the_settings_of_the_training(trained, files, capsys):
    folder = trained("lora") / "checkpoint-6"
    document = evaluated(folder, files, "--no_base", "--json")
    assert json.loads(capsys.readouterr().out) == {"evaluation": document}
    assert "base" not in document["groups"][0] and document["data"]["split"] == 0
    windows = evaluated(folder, files, "--no_base", "--model_max_length", 40, "--too_long", "windows")
    assert windows["data"]["split"] + windows["data"]["cut"] > 0
    wanted = reference(folder, files, stock, max_length=40, too_long="windows")
    sums = {place: tokens for place, (tokens, _) in wanted.items()}
    assert sums == {
        (row["source"], row["row"], turn["turn"]): turn["tokens"] for row in windows["rows"] for turn in row["turns"]
    }


def test_what_is_shown(trained, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = trained("lora")
    evaluated(folder, files, "--worst", 2)
    shown = capsys.readouterr().out
    assert "the tuned model" in shown.casefold() and "(95 %:" in shown
    assert "Rows with the largest loss" in shown and "⟦" in shown and "answer 1" in shown
    (section,) = [one for one in read_sections(folder) if one.title == "Held-out conversations"]
    assert section.tables[0].head[0] == "" and len(section.tables[0].rows) == 6


def test_faults_come_before_the_model(trained, files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "finetune.inference.load_result.load_for_inference", lambda *_, **__: pytest.fail("the model was loaded")
    )
    bad = tmp_path / "bad.json"
    bad.write_text('[{"id": 0, "conversations": [{"from": "human", "value": "a"}]}]')
    with pytest.raises(DataError, match="bad.json, row 0"):
        evaluate.main([str(trained("lora")), "--data_path", str(bad)])
    for argv, said in (
        ([], "nothing to evaluate"),
        (["--data_path", "a", "--wrost", "2"], "did you mean --worst"),
        (["--forgetting", "--no_base"], "leave --no_base out"),
        (["--data_path", "a", "--fail_below", "3"], "give it too"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate.main(["somewhere", *argv])
    with pytest.raises(ConfigError, match="there is no such folder"):
        evaluate.main([str(tmp_path / "nothing"), "--data_path", str(files[0])])


def test_rows_that_are_not_finite_are_named_and_in_no_mean():
    def row(number, tuned, base):
        return RowLosses(
            "a.json", number, None, [number], {1: 2}, {"base": {1: base}, "tuned": {1: tuned}}, {1: "model"}
        )

    rows = [row(0, 2.0, 4.0), row(1, math.nan, 1.0), row(2, 6.0, 4.0), row(3, 1.0, math.inf)]
    whole = summarize(rows)[0]
    assert (whole["rows"], whole["tuned"]["loss"], whole["base"]["loss"]) == (2, 2.0, 2.0)
    assert rows[1].non_finite == ["tuned"] and rows[3].non_finite == ["base"] and rows[1].to_json()["tuned"] is None
    assert [one.row for one in worst_rows(rows, 5)] == [2, 0] and [one.row for one in most_worsened(rows, 5)] == [2]
    assert "no significant difference" in held_out.verdict(whole)
    with pytest.raises(NumericsError):
        summarize(rows[1:2])


def test_groups_hold_each_example_once_and_no_more_than_they_may():
    lengths = [5, 100, 7, 1, 30, 30, 8]
    groups = group_by_tokens(lengths, 40)
    assert sorted(number for group in groups for number in group) == list(range(7))
    assert [1] in groups and all(len(group) == 1 or sum(lengths[one] for one in group) <= 40 for group in groups)
