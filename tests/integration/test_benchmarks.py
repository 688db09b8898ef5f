"""Tasks of lm-evaluation-harness: a local one end to end, and the suite's settings against the installed harness."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from finetune.cli import evaluate
from finetune.evaluation import benchmarks, lingowhale_benchmarks
from finetune.evaluation.tasks import drawn
from finetune.run_dir.eval_results import read_sections
from finetune.utils.errors import ConfigError
from tests.helpers import ranks
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's imports, and those of its metrics

QUESTIONS = [
    {"question": f"What is {one} plus {two}?", "options": [str(one + two + off) for off in range(4)], "answer": 0}
    for one, two in ((1, 2), (3, 4), (5, 1), (2, 2), (7, 2))
]
CHOICE = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "sums.json", "train": "sums.json"}},
    "test_split": "test",
    "fewshot_split": "train",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {
    **{name: value for name, value in CHOICE.items() if name not in ("doc_to_choice", "fewshot_config")},
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{options[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks and a group of both; its data lies beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.json").write_text(json.dumps(QUESTIONS))
    (folder / "sums.yaml").write_text(yaml.safe_dump(CHOICE))
    (folder / "written.yaml").write_text(yaml.safe_dump(WRITTEN))
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["sums", "written"]}))
    return folder


def run(output, *flags):
    evaluate.main([str(output), *map(str, flags)])
    return json.loads((output / "benchmarks.json").read_text())


def wanted(folder, shots):
    """The share of questions of which the right option is the likeliest, by a stock model, one at a time."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(text, option):
        head, whole = (tokenizer(one)["input_ids"] for one in (text, f"{text} {option}"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logits[at - 1, whole[at]].item() for at in range(len(head), len(whole)))

    right = 0
    for question in QUESTIONS:
        others = [one for one in QUESTIONS if one != question][:shots]
        front = "".join(f"Q: {one['question']}\nA: {one['options'][0]}\n\n" for one in others)
        found = [score(f"{front}Q: {question['question']}\nA:", option) for option in question["options"]]
        right += found.index(max(found)) == 0
    return right / len(QUESTIONS)


def test_questions_are_read_without_asking_the_hub(tasks, monkeypatch):
    monkeypatch.setattr(benchmarks, "use_cache", lambda: None)  # it is for the whole process
    questions, unread = benchmarks.read_benchmark_questions([str(tasks), "absent.yaml"])
    assert questions["both"][:5] == [f"Q: {each['question']}\nA:" for each in QUESTIONS]
    assert len(questions["forgetting"]) == 244 and len(questions["both"]) == 10
    assert unread == ["absent.yaml: finetune evaluate OUTPUT --tasks says why they cannot be read"]


@pytest.mark.slow
def test_a_local_task_end_to_end(trained, tasks, capsys):
    output = trained("lora")
    document = run(output, "--tasks", tasks / "sums.yaml", "--num_fewshot", 2)
    (score,) = document["scores"]
    assert (score["name"], score["metric"], score["shots"], score["rows"]) == ("sums", "acc", 2, 5)
    assert score["tuned"]["value"] == pytest.approx(wanted(output, 2)) and score["base"]["stderr"] is not None
    assert document["published"] is None
    shown = capsys.readouterr().out
    assert "Benchmarks" in shown and "sums" in shown
    assert "Benchmarks" in [one.title for one in read_sections(output)]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(trained, tasks, tmp_path):
    output = trained("lora")
    flags = ["--tasks", tasks, "--batch_size", "2"]
    alone = run(output, *flags)
    assert {one["name"] for one in alone["scores"]} == {"sums", "written"} and len(alone["scores"]) == 2
    outcome = ranks.run(tmp_path / "logs", evaluate.main, ([str(output), *map(str, flags)],), world_size=2)
    assert outcome.succeeded, outcome.outputs
    assert json.loads((output / "benchmarks.json").read_text())["scores"] == alone["scores"]
    assert "Benchmarks" in outcome.outputs[0] and "Benchmarks" not in outcome.outputs[1]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_rank_answers_its_share_and_gets_all_answers(monkeypatch, count):
    """Three ranks, fewer requests and more."""
    harness, requests = benchmarks.import_harness(), list(range(count))
    shares = [[f"answer {one}" for one in requests[rank::3]] for rank in range(3)]

    def answer(mine, disable_tqdm):
        assert mine
        return [f"answer {one}" for one in mine]

    monkeypatch.setattr(harness, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(harness, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(harness, "all_gather_object", lambda own, rank=rank: own == shares[rank] and shares)
        assert harness.SharedModel._divided(None, answer, requests, True) == [f"answer {one}" for one in requests]


@pytest.mark.slow
def test_a_task_that_cannot_be_asked_is_explained_before_the_model_loads(trained, tasks, monkeypatch):
    monkeypatch.setattr(
        "finetune.inference.load_result.load_for_inference", lambda *_, **__: pytest.fail("the model was loaded")
    )
    output = trained("lora")
    with pytest.raises(ConfigError, match="lm-eval knows no such task"):
        run(output, "--tasks", "no_such_task")
    with pytest.raises(ConfigError, match="no such file"):
        run(output, "--tasks", tasks / "nothing.yaml")
    (tasks / "sums.json").unlink()
    with pytest.raises(ConfigError, match="sums.yaml: its data or its code cannot be loaded"):
        run(output, "--tasks", tasks / "sums.yaml")
    with pytest.raises(ConfigError, match="humaneval: runs programs that the model writes"):
        run(output, "--tasks", "humaneval")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'lm_eval>=0.4.13,<0.5'"):
        run(output, "--tasks", "mmlu")


@pytest.mark.slow
def test_settings_that_a_task_cannot_have_are_an_error_of_one_line(trained, tasks):
    with pytest.raises(ConfigError, match="sums.yaml: lm-eval does not accept these settings: .*few"):
        run(trained("lora"), "--tasks", tasks / "sums.yaml", "--num_fewshot", 50, "--no_base")


def test_another_number_of_examples_is_a_departure():
    job = benchmarks._benchmark_job(lingowhale_benchmarks.BENCHMARKS[0], 2)
    assert job.shots == 2 and "C-Eval: 2-shot, the table 5-shot" in job.notes
    assert len(benchmarks._benchmark_job(lingowhale_benchmarks.BENCHMARKS[0], None).notes) == len(
        lingowhale_benchmarks.BENCHMARKS[0].departures
    )


@pytest.mark.slow
def test_without_a_network_what_must_be_downloaded_is_named(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GAOKAO_BENCH", str(tmp_path))
    with pytest.raises(ConfigError) as failure:
        run(trained("lora"), "--tasks", "lingowhale")
    said = str(failure.value)
    for needed in (
        "ceval/ceval-exam",
        "cais/mmlu",
        "haonan-li/cmmlu",
        "openai/gsm8k",
        "SaylorTwift/bbh",
        "GAOKAO-Bench",
    ):
        assert needed in said
    assert "HF_HOME" in said and "git clone https://github.com/OpenLMLab/GAOKAO-Bench" in said
    assert "HumanEval is skipped" in capsys.readouterr().err and "humaneval" not in said


# ---- the suite


@pytest.fixture(scope="module")
def manager():
    return benchmarks.import_harness().find_manager(["mmlu"])


def config_of(manager, name):
    """The YAML of a task, or of one task of a group, as the harness reads it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_yaml(benchmarks.import_harness().files_of(manager, name)[-1], resolve_func=False)
    return {**found, **found["task"][0]} if isinstance(found["task"], list) else found


def test_the_suite_has_the_columns_of_the_table():
    settings = {one.name: one.shots for one in lingowhale_benchmarks.BENCHMARKS}
    assert settings == {
        "C-Eval": 5, "MMLU": 5, "CMMLU": 5, "GAOKAO": 5, "HumanEval": 0, "GSM8K": 8, "BBH": 3, "AGIEval": 5,
    }  # fmt: skip
    assert lingowhale_benchmarks.PUBLISHED["rows"]["LingoWhale-8B-base"]["C-Eval"] == 63.6
    assert all(one.departures for one in lingowhale_benchmarks.BENCHMARKS)
    assert [one.name for one in lingowhale_benchmarks.BENCHMARKS if one.runs_code] == ["HumanEval"]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", lingowhale_benchmarks.BENCHMARKS, ids=lambda one: one.name)
def test_settings_are_those_of_the_installed_harness(manager, benchmark):
    config = config_of(manager, benchmark.task)
    path = Path(manager.task_index[benchmark.task].yaml_path)
    assert ("lm_eval/tasks" not in str(path)) == path.is_relative_to(Path(str(lingowhale_benchmarks.__file__)).parent)
    assert (
        bool(config.get("unsafe_code"))
        == benchmark.runs_code
        == benchmarks.import_harness().runs_code(manager, benchmark.task)
    )
    metric, _, kind = benchmark.metric.partition(",")
    metrics = {one["metric"] if isinstance(one["metric"], str) else "pass" for one in config["metric_list"]}
    assert any(str(one).endswith("pass_at_k") or one == metric for one in metrics)
    filters = [one["name"] for one in config.get("filter_list", [])]
    assert kind in (filters or ["none"])
    if benchmark.shots:  # examples must come from somewhere else than the questions
        has_examples = config.get("fewshot_split") not in (None, config.get("test_split"))
        is_set = isinstance(config.get("fewshot_config"), dict) and (
            "samples" in config["fewshot_config"] or "process_docs" in config["fewshot_config"]
        )
        assert has_examples or is_set
    if config.get("num_fewshot") is not None:
        assert config["num_fewshot"] == benchmark.shots
    if "lm_eval/tasks" in str(path):
        assert config["dataset_path"] in benchmark.needs


@pytest.mark.slow
def test_the_sets_of_agieval_are_those_of_the_harness(manager):
    from lm_eval.tasks._yaml_loader import load_yaml

    own = load_yaml(manager.task_index["finetune_agieval"].yaml_path, resolve_func=False)["task"]
    known = {config_of(manager, name)["dataset_path"] for name in manager.all_subtasks if name.startswith("agieval_")}
    assert len(own) == 14 and {one["dataset_path"] for one in own} <= known


def test_questions_are_divided_the_same_way_each_time():
    rows = [{"query": str(number), "choices": "abcd"[: 4 - (number % 7 == 0)], "gold": [0]} for number in range(50)]
    examples, asked = drawn.agieval_examples(rows), drawn.agieval_asked(rows)
    assert len(examples) == 5 and not {one["query"] for one in examples} & {one["query"] for one in asked}
    assert len(examples) + len(asked) == sum(len(one["choices"]) == 4 for one in rows)
    assert drawn.agieval_examples(rows) == examples


@pytest.mark.slow
def test_gaokao_end_to_end(trained, tmp_path, monkeypatch, capsys):
    """Questions in the layout of GAOKAO-Bench: those with four options and one answer are asked behind five others."""
    folder = tmp_path / "Data" / "Objective_Questions"
    folder.mkdir(parents=True)
    rows = [
        {"question": f"{number}．下列正确的是（ ）\nA．甲 B．乙\nC．丙 D．丁\n", "answer": ["ABCD"[number % 4]]}
        for number in range(9)
    ]
    rows += [
        {"question": "A．甲 B．乙 C．丙 D．丁", "answer": ["A", "B"]},
        {"question": "A．甲 B．乙 C．丙", "answer": ["A"]},
    ]
    own = yaml.load(
        (ROOT / "finetune/evaluation/tasks/finetune_gaokao.yaml").read_text().replace("!function ", ""),
        Loader=yaml.SafeLoader,
    )
    for one in own["task"]:
        (folder / one["dataset_kwargs"]["file"]).write_text(json.dumps({"keywords": "", "example": rows}))
    monkeypatch.setenv("GAOKAO_BENCH", str(tmp_path))
    document = run(trained("lora"), "--tasks", "finetune_gaokao", "--num_fewshot", 5, "--no_base", "--json")
    assert json.loads(capsys.readouterr().out) == {"benchmarks": document}
    (score,) = document["scores"]
    assert (score["rows"], score["shots"], score["metric"]) == (4 * len(own["task"]), 5, "acc")
