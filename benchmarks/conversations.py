"""Conversations for the measurements: half English, half Chinese, always the same ones.

    python benchmarks/conversations.py OUTPUT.json --rows 2000

Sentences are drawn from the lists below, common words more often than rare ones, and every tenth English word is put
together from syllables: a tokenizer meets known words, new words, numbers and characters that it spells in bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

SEED = 20
FEWEST_TOKENS, MOST_TOKENS = 8, 1_000
# Measured with the SmolLM2 tokenizer, which has no Chinese words.
TOKENS_PER_ENGLISH_WORD, TOKENS_PER_CHINESE_CHARACTER = 1.43, 1.66

ENGLISH = (
    "the of to and a in is it that for you with on as are be this have or not by from at one can which when all if "
    "there more will an your use other time how their about many then them some so these would make like into has two "
    "its most each water number first people over way very may after before used between because same different work "
    "place right where through well must even such here take help another come made part old any small large end does "
    "put home read hand keep never start while might close night real life few open seem together next white children "
    "begin walk example ease paper group always music those both mark often letter until mile river car feet care "
    "second book carry science room friend began idea fish mountain stop once base hear horse cut sure watch color "
    "face wood main enough plain girl usual young ready above ever red list though feel talk bird soon body dog family "
    "direct pose leave song measure door product black short numeral class wind question happen complete ship area "
    "half rock order fire south problem piece told knew pass since top whole king space heard best hour better true "
    "during hundred five remember step early hold west ground interest reach fast verb sing listen six table travel "
    "less morning ten simple several vowel toward war lay against pattern slow center love person money serve appear "
    "road map rain rule govern pull cold notice voice unit power town fine certain fly fall lead cry dark machine note "
    "wait plan figure star box noun field rest correct able pound done beauty drive stood contain front teach week "
    "final gave green quick develop ocean warm free minute strong special mind behind clear tail produce fact street "
    "inch multiply nothing course stay wheel full force blue object decide surface deep moon island foot system busy "
    "test record boat common gold possible plane stead dry wonder laugh thousand ago ran check game shape equate hot "
    "miss brought heat snow tire bring yes distant fill east paint language among function variable memory network "
    "server battery recipe garden muscle budget contract schedule argument evidence improve describe compare explain"
).split()
SYLLABLES = (
    "ba con der el fi gra hul in jo ka lem mi nor op pra qui ra sten tu ul ver wi xen yl zo tion ment ing".split()
)
CHINESE = (
    "的 是 在 了 和 有 不 我 你 他 们 这 那 个 人 上 下 中 大 小 多 少 很 也 都 就 要 会 能 可以 如果 因为 "
    "所以 但是 而且 以及 或者 然后 首先 其次 最后 例如 问题 答案 方法 步骤 时间 地点 原因 结果 学习 工作 生活 "
    "健康 运动 音乐 城市 乡村 河流 山 水 火 天气 春天 夏天 秋天 冬天 早上 晚上 今天 明天 每天 一个 两个 三个 "
    "第一 第二 许多 需要 应该 必须 建议 选择 使用 提高 减少 保持 开始 结束 帮助 解释 描述 比较 分析 总结 写 "
    "读 说 听 看 想 做 吃 喝 走 跑 买 卖 给 把 被 对 从 到 向 与 为 于 之 其 数据 模型 程序 函数 变量 网络 "
    "电脑 手机 软件 系统 信息 安全 技术 科学 历史 文化 艺术 经济 社会 法律 教育 学生 老师 孩子 朋友 家庭 公司 "
    "产品 市场 价格 质量 服务 客户 计划 目标 机会 挑战 经验 能力 知识 语言 文章 句子 词语 意思 简单 复杂 重要 "
    "有效 合适 新鲜 美丽 安静 快乐 认真 仔细 颜色 红色 蓝色 绿色 蔬菜 水果 米饭 面条 鱼 鸡蛋 牛奶 茶 咖啡 糖 "
    "盐 油 锅 厨房 房间 窗户 花园 树 花 草 鸟 猫 狗 马 羊 太阳 月亮 星星 海洋 森林 沙漠 空气 土地 能源 环境 "
    "保护 污染 温度 速度"
).split()


def _weights(words: list[str]) -> list[float]:
    """Cumulative weights that fall with the rank, roughly as word counts do in real text."""
    return list(accumulate(1 / (rank + 4) for rank in range(len(words))))


ENGLISH_WEIGHTS, CHINESE_WEIGHTS = _weights(ENGLISH), _weights(CHINESE)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a question and an answer: medians, and the standard deviation of the logarithm."""

    question: float = 60
    answer: float = 200
    spread: float = 0.6


def conversations(
    rows: int, seed: int = SEED, lengths: Lengths | None = None, english_only: bool = False
) -> Iterator[dict[str, Any]]:
    """`rows` conversations in the project's own form; even rows are English, odd ones Chinese unless told otherwise."""
    rng, lengths = random.Random(seed), lengths or Lengths()
    for row in range(rows):
        write = _chinese if row % 2 and not english_only else _english
        yield {
            "id": row,
            "conversations": [
                {"from": "human", "value": write(rng, _num_tokens(rng, lengths.question, lengths.spread), "?？")},
                {"from": "model", "value": write(rng, _num_tokens(rng, lengths.answer, lengths.spread), ".。")},
            ],
        }


def tool_conversations(rows: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Conversations in OpenAI's form: reasoning and a call, its result, reasoning and an answer; two tools declared."""
    rng = random.Random(seed)
    numbers = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a"]}
    words = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    for row in range(rows):
        write = _chinese if row % 2 else _english

        def text(median: float, write: Any = write) -> str:
            return write(rng, _num_tokens(rng, median, 0.6), ".。")

        names = [f"{rng.choice(ENGLISH)}_{rng.choice(SYLLABLES)}" for _ in range(2)]
        declared = [
            {"name": name, "description": text(20), "parameters": parameters}
            for name, parameters in zip(names, (numbers, words), strict=True)
        ]
        arguments = {"a": rng.randrange(1_000), "b": rng.random()} if row % 3 else {"query": text(8)}
        function = {"name": names[row % 3 == 0], "arguments": json.dumps(arguments, ensure_ascii=False)}
        call = {"id": f"call_{row}", "type": "function", "function": function}
        messages = [
            {"role": "user", "content": text(60)},
            {"role": "assistant", "content": "", "reasoning_content": text(60), "tool_calls": [call]},
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "content": json.dumps({"result": text(60)}, ensure_ascii=False),
            },
            {"role": "assistant", "content": text(100), "reasoning_content": text(40)},
        ]
        tools = [{"type": "function", "function": function} for function in declared]
        yield {"id": row, "tools": tools, "messages": messages}


def as_messages(conversation: dict[str, Any]) -> dict[str, Any]:
    """The same conversation in the form that the other toolkits take as it is."""
    if "messages" in conversation:
        return conversation
    roles = {"human": "user", "model": "assistant"}
    turns = conversation["conversations"]
    return {"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON array, one row a line, without ever holding more than one."""
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write("[\n" if number == 0 else ",\n")
            file.write(json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def _num_tokens(rng: random.Random, median: float, spread: float) -> int:
    wanted = math.exp(rng.gauss(math.log(median), spread))
    return int(min(max(wanted, FEWEST_TOKENS), MOST_TOKENS))


def _english(rng: random.Random, num_tokens: int, ends: str) -> str:
    count = max(3, round(num_tokens / TOKENS_PER_ENGLISH_WORD))
    words = rng.choices(ENGLISH, cum_weights=ENGLISH_WEIGHTS, k=count)
    for place in range(9, count, 10):
        words[place] = "".join(rng.choices(SYLLABLES, k=3)) if place % 20 == 9 else str(rng.randrange(3_000))
    begin = 0
    while begin < count:
        words[begin] = words[begin].capitalize()
        stop = min(begin + rng.randint(6, 18), count)
        if stop - begin > 9:
            words[begin + 5] += ","
        words[stop - 1] += ends[0] if stop == count else rng.choices(".:.\n", k=1)[0]
        begin = stop
    return " ".join(words)


def _chinese(rng: random.Random, num_tokens: int, ends: str) -> str:
    characters = max(4, round(num_tokens / TOKENS_PER_CHINESE_CHARACTER))
    clauses, written = [], 0
    while written < characters:
        clause = "".join(rng.choices(CHINESE, cum_weights=CHINESE_WEIGHTS, k=rng.randint(3, 9)))
        clauses.append(clause[: characters - written])
        written += len(clauses[-1]) + 1
        clauses.append(rng.choices("，，。；", k=1)[0])
    return "".join(clauses[:-1]) + ends[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write conversations to prepare: half English, half Chinese.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    write_rows(given.output, conversations(given.rows, given.seed))


if __name__ == "__main__":
    main()
