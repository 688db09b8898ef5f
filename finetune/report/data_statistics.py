"""Questions about a data set as tables: lengths, scripts, shares of the loss, near-duplicates, benchmark questions."""

import heapq
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from finetune.chat_templates import RenderedConversation
from finetune.chat_templates.example import IGNORE_INDEX
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.dataset.prepare import PreparedData
from finetune.dataset.text_overlap import OVERLAP, SHINGLE, SIMILARITY, NearDuplicates, QuestionIndex, word_hashes
from finetune.run_dir.eval_results import ResultSection, ResultTable

SHOWN = 5
PERCENTILES = (50, 90, 99, 100)
BETWEEN = "(between turns)"
BAR_DELAY_SECONDS = 2.0
TRAINING, HELD_OUT, SUFFIX = "training", "held-out", " (held out)"


def statistics_section(
    prepared: PreparedData, plain: PlainTextTokenizer, benchmarks: Mapping[str, Sequence[str]], unread: Sequence[str]
) -> ResultSection:
    """Return the statistics of the training data and of separate held-out data.

    Args:
        benchmarks: the questions to look for in the training data.
        unread: why others could not be read.
    """
    statistics = _Statistics(plain, QuestionIndex(benchmarks))
    for part, data in ((TRAINING, prepared), (HELD_OUT, prepared.evaluation)):
        if data is not None:
            rows = tqdm(data.renderings(), "statistics", data.summary.rows, delay=BAR_DELAY_SECONDS, unit=" rows")
            for row in filter(lambda row: row.examples, rows):
                statistics.add(row, part)
    tables = [*statistics.by_source(), statistics.largest_rows(), statistics.near_duplicates()]
    questions = statistics.questions
    counts = Counter(questions.names), Counter(questions.names[number] for number in questions.first_place)
    first = {questions.names[number]: place for number, place in reversed(questions.first_place.items())}
    tables.append(
        ResultTable(
            "Benchmark questions in the training data",
            ["Benchmark", "Questions", f"Of {OVERLAP} words or more", "In the data", "First in"],
            [
                [name, f"{len(texts):,}", f"{counts[0][name]:,}", f"{counts[1][name]:,}", first.get(name, "")]
                for name, texts in benchmarks.items()
            ],
        )
    )
    notes = [
        f"near-duplicates: an estimated {SIMILARITY:g} of the {SHINGLE}-word sequences of both are the same",
        f"a question is in the data where one of its {OVERLAP}-word sequences is; a Chinese character is a word",
        *(f"not looked for: {reason}" for reason in unread),
    ]
    seen = f"{counts[1].total():,} of {counts[0].total():,} benchmark questions are in the training data"
    return ResultSection(
        "Statistics", [*statistics.sentences(), seen], [table for table in tables if table.rows], notes=notes
    )


class _Statistics:
    """Counts over rows, by source; `questions` and `near` look at the text of all turns but system turns."""

    def __init__(self, plain: PlainTextTokenizer, questions: QuestionIndex) -> None:
        self.plain, self.questions, self.near = plain, questions, NearDuplicates()
        self.rows: Counter[str] = Counter()
        self.lengths: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self.characters: dict[str, Counter[str]] = defaultdict(Counter)
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.supervised: Counter[tuple[str, str]] = Counter()
        self.supervised_of_rows = array("q")
        self.largest: list[tuple[int, str]] = []
        self.similar: dict[tuple[str, str], int] = Counter()
        self.first_similar: dict[tuple[str, str], list[list[str]]] = defaultdict(list)

    def add(self, row: RenderedConversation, part: str) -> None:
        """Count a row of the training or the held-out data."""
        source = row.source if part == TRAINING else row.source + SUFFIX
        place = f"{row.source}, row {row.row}"
        texts: dict[int, list[int]] = {}
        for example in row.examples:
            self.lengths[source].append(len(example.input_ids))
            rest, supervised_rest = len(example.input_ids), example.num_supervised
            for span in example.turn_spans:
                tokens = span.stop - span.start
                supervised = tokens - example.labels[span.start : span.stop].count(IGNORE_INDEX)
                self.tokens[source, span.role] += tokens
                self.supervised[source, span.role] += supervised
                rest, supervised_rest = rest - tokens, supervised_rest - supervised
                if span.role != "system":
                    ids = example.input_ids[span.start : span.stop]
                    texts.setdefault(span.turn, [each for each in ids if each not in self.plain.control_ids])
            self.tokens[source, BETWEEN] += rest
            self.supervised[source, BETWEEN] += supervised_rest
        text = "\n".join(self.plain.decode_all([*texts.values()]))
        self.characters[source].update(text)
        self.rows[part] += 1
        words = word_hashes(text)
        if part == TRAINING:
            supervised = sum(example.num_supervised for example in row.examples)
            self.supervised_of_rows.append(supervised)
            push = heapq.heappush if len(self.largest) < SHOWN else heapq.heappushpop
            push(self.largest, (supervised, place))
            self.questions.add(words, place)
        found = self.near.first_like(words, (part, place))
        if found is not None:
            (other_part, other_place), similarity = found
            self.similar[part, other_part] += 1
            if len(self.first_similar[part, other_part]) < SHOWN:
                self.first_similar[part, other_part].append([place, other_place, f"{similarity:.2f}"])

    def by_source(self) -> Iterator[ResultTable]:
        """Lengths and scripts of each source; tokens of each role in it."""
        rows = []
        for source, lengths in self.lengths.items():
            percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
            numbers = [len(lengths), sum(lengths), *map(int, percentiles)]
            rows.append([source, *(f"{number:,}" for number in numbers), _scripts(self.characters[source])])
        head = ["Source", "Examples", "Tokens", *(f"{share} %" for share in PERCENTILES[:-1]), "Longest", "Letters"]
        yield ResultTable("Lengths in tokens, and scripts", head, rows)
        every, rows = max(sum(self.supervised_of_rows), 1), []
        for (source, role), tokens in self.tokens.items():
            number = self.supervised[source, role]
            of_all = "" if source.endswith(SUFFIX) else f"{number / every:.1%}"
            if tokens:
                rows.append([f"{source}: {role}", f"{tokens:,}", f"{number:,}", f"{number / tokens:.1%}", of_all])
        yield ResultTable("Tokens by role", ["Source", "Tokens", "Supervised", "Share", "Of all supervised"], rows)

    def largest_rows(self) -> ResultTable:
        """The training rows with the most supervised tokens."""
        every = max(sum(self.supervised_of_rows), 1)
        rows = [[place, f"{number:,}", f"{number / every:.2%}"] for number, place in sorted(self.largest, reverse=True)]
        return ResultTable("Rows with the most supervised tokens", ["Row", "Supervised", "Of all supervised"], rows)

    def near_duplicates(self) -> ResultTable:
        """The first near-duplicates of each kind."""
        rows = [row for of_kind in self.first_similar.values() for row in of_kind]
        return ResultTable("Near-duplicates, the first", ["Row", "Earlier row", "Similarity"], rows)

    def sentences(self) -> Iterator[str]:
        """What the tables say, one sentence each."""
        largest = sorted(self.supervised_of_rows, reverse=True)[: -(-len(self.supervised_of_rows) // 100)]
        share = sum(largest) / max(sum(self.supervised_of_rows), 1)
        yield f"{len(largest):,} of {self.rows[TRAINING]:,} rows hold {share:.1%} of the supervised tokens"
        for part, other in ((TRAINING, TRAINING), (HELD_OUT, TRAINING), (HELD_OUT, HELD_OUT)):
            if self.rows[part]:
                count = f"{self.similar[part, other]:,} of {self.rows[part]:,} {part} rows"
                yield f"{count} are near-duplicates of {'an earlier' if part == other else 'a'} {other} row"


def _scripts(characters: Mapping[str, int]) -> str:
    """Shares of the letters by script, after the first word of their Unicode names; scripts below 1 % are left out."""
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[unicodedata.name(character, "other").split(" ")[0].capitalize()] += count
    shares = [(name, count / scripts.total()) for name, count in scripts.most_common()]
    return ", ".join(f"{name.replace('Cjk', 'CJK')} {share:.0%}" for name, share in shares if share >= 0.01)
