"""The eight benchmarks of the table published with LingoWhale-8B, as tasks of lm-evaluation-harness.

Source of the table and its settings: README_EN.md of https://github.com/DeepLangAI/LingoWhale-8B at commit
121939d1660b50b02947e0baffe32c7d982bbf02. It does not state prompts, seeds and means. A departure says where a setting
is not available or had to be chosen; departures are printed with the scores.
"""

from dataclasses import dataclass

SUITE = "lingowhale"
SOURCE = "LingoWhale-8B's README, commit 121939d"


@dataclass(frozen=True)
class Benchmark:
    """One column of the table."""

    name: str
    shots: int
    task: str  # name in lm-eval, or in `tasks/` beside this file
    metric: str  # as lm-eval names it: metric,filter
    needs: tuple[str, ...]  # data sets on the hub, or other data
    departures: tuple[str, ...] = ()  # differences from the settings of the table
    runs_code: bool = False


OPEN_MEAN = "mean over questions, not over subjects: the table does not say which"
BENCHMARKS = (
    Benchmark(
        "C-Eval", 5, "ceval-valid", "acc,none", ("ceval/ceval-exam",),
        ("the validation split: the answers of the test split, which the table used, are not published", OPEN_MEAN),
    ),
    Benchmark("MMLU", 5, "mmlu", "acc,none", ("cais/mmlu",), (OPEN_MEAN,)),
    Benchmark("CMMLU", 5, "cmmlu", "acc,none", ("haonan-li/cmmlu",), (OPEN_MEAN,)),
    Benchmark(
        "GAOKAO", 5, "finetune_gaokao", "acc,none", ("GAOKAO-Bench",),
        (
            "five questions of each subject, drawn with a fixed seed, are the examples: the split of the table is not "
            "published",
            "only standalone questions with options A to D and one answer, of seven subjects",
        ),
    ),
    Benchmark(
        "HumanEval", 0, "humaneval", "pass@1,create_test", ("openai/openai_humaneval", "evaluate-metric/code_eval"),
        ("one greedy answer per problem: how the table sampled is not published",), runs_code=True,
    ),
    Benchmark(
        "GSM8K", 8, "gsm8k_cot", "exact_match,strict-match", ("openai/gsm8k",),
        ("the eight worked examples of Wei et al. (2022): which ones the table used is not published",),
    ),
    Benchmark(
        "BBH", 3, "bbh_cot_fewshot", "exact_match,get-answer", ("SaylorTwift/bbh",),
        ("with worked examples: whether the table had them is not published",),
    ),
    Benchmark(
        "AGIEval", 5, "finetune_agieval", "acc,none", ("hails/agieval-* (14 data sets)",),
        (
            "five questions of each set, drawn with a fixed seed, are the examples: the split of the table is not "
            "published",
            "only sets with four options, and questions with one answer",
        ),
    ),
)  # fmt: skip

_NAMES = tuple(benchmark.name for benchmark in BENCHMARKS)
# Percent; * marks scores that the table takes from the publications of those models.
_TABLE = {
    "GPT-4": (68.4, 83.9, 70.3, 66.2, 69.5, 90.0, 75.1, 63.3),
    "GPT-3.5 Turbo": (51.1, 68.5, 54.1, 47.1, 52.4, 57.8, 61.6, 46.1),
    "LLaMA2-7B": (28.9, 45.7, 31.4, 26.0, 12.8, 16.2, 39.2, 26.5),
    "ChatGLM2-6B*": (51.7, 47.9, None, None, None, 32.4, 33.7, None),
    "Baichuan2-7B-Base*": (54.0, 54.2, 57.1, 47.5, 18.3, 24.5, 41.6, 42.7),
    "Qwen-7B v1.1*": (63.5, 58.2, 62.2, None, 29.9, 51.7, 45.0, None),
    "LingoWhale-8B-base": (63.6, 60.2, 62.8, 50.3, 32.9, 55.0, 47.5, 43.8),
}
PUBLISHED = {
    "source": SOURCE,
    "names": list(_NAMES),
    "rows": {model: dict(zip(_NAMES, scores, strict=True)) for model, scores in _TABLE.items()},
}


def how_to_get(needed: str) -> str:
    """Say how to download the data, and where to put it."""
    if needed == "GAOKAO-Bench":
        return (
            "GAOKAO-Bench: git clone https://github.com/OpenLMLab/GAOKAO-Bench ~/.cache/finetune/GAOKAO-Bench, or set "
            "GAOKAO_BENCH to another folder"
        )
    return (
        f"{needed} from the Hugging Face hub: run the same command once with network access, and copy "
        "~/.cache/huggingface to this machine (or set HF_HOME to it)"
    )
