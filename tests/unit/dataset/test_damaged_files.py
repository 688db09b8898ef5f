"""Damaged data files: whatever happens to the bytes, a row is read as it stands there or refused, never changed.

`MUTATIONS=20000 pytest tests/unit/dataset/test_damaged_files.py` looks at more of them.
"""

import gzip
import json
import os
import random
import zlib
from collections import Counter

import pyarrow
import pytest

from finetune.conversation import BadRow
from tests.helpers.chat_rows import good_row, read, spoken, written

MUTATIONS = int(os.environ.get("MUTATIONS", "120"))
ROLES = {"human": "human", "user": "human", **dict.fromkeys(("model", "gpt", "assistant", "bot"), "model")}
TOKENS = [
    *'"{}[],:\\', "\n", "\0", "\ufeff", " ", "'", "null", "NaN", "-Infinity", "true", "1e5", "\\ud83d", "\\u0000", "中",
    "é", '"from": "human", ', '"id": 1, ', '{"from": "human", "value": "x"}, ', "],[", "}{", "}\n{", "[[", "\\n", "//",
]  # fmt: skip


def rows(random_: random.Random) -> list[dict]:
    """Rows of one to three exchanges, some with words from outside ASCII."""
    made = []
    for number in range(random_.randint(1, 6)):
        row = good_row(number)
        for more in range(random_.randint(0, 2)):
            words = random_.choice(["more", "再说一遍", "encore é", "\U0001f600", 'say "a\\b"\n'])
            row["conversations"] += [
                {"from": "user", "value": f"{words} {more}"},
                {"from": "gpt", "value": f"{words} {number}", **({"train": False} if random_.random() < 0.2 else {})},
            ]
        made.append(row)
    return made


def mutated(content: bytes, random_: random.Random) -> bytes:
    for _ in range(random_.choice([1, 1, 1, 2, 5])):
        content = mutated_once(content, random_)
    return content


def mutated_once(content: bytes, random_: random.Random) -> bytes:
    """A byte changed, a bit flipped, the end cut off, a span left out or said twice, a token put in or in its place."""
    begin, end = sorted(random_.choices(range(len(content) + 1), k=2))
    end = min(end, begin + random_.choice([1, 4, 40, 10_000]))
    place = random_.randint(0, len(content))
    before, span, behind = content[:begin], content[begin:end], content[end:]
    token = random_.choice(TOKENS).encode()
    flipped = bytes(byte ^ 1 << random_.randrange(8) for byte in span[:1]) + span[1:]
    return random_.choice(
        [
            before + bytes([random_.randrange(256)]) + content[begin + 1 :],
            before + flipped + behind,
            before,
            before + behind,
            content[:place] + span + content[place:],
            before + token + span + behind,
            before + token + behind,
        ]
    )


def unpacked(content: bytes) -> bytes | None:
    """What the libraries themselves make of the bytes."""
    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            return pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd").read()
    except (OSError, EOFError, zlib.error):
        return None
    return content


def rows_that_stand_there(text: str) -> list[list]:
    """The text read in each of the ways in which it could be meant: an array as far as it goes, lines, one object."""
    begin = len(text) - len(text.lstrip(" \t\r\n"))
    array, at, decoder = [], begin + (text[begin : begin + 1] == "["), json.JSONDecoder()
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        array.append(value)
    lines = []
    for line in text.split("\n"):
        if line.strip(" \t\r"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                lines.append(None)
    try:
        whole = [json.loads(text)]
    except json.JSONDecodeError:
        whole = []
    return [array, lines, whole]


def meant(row: object) -> list | None:
    try:
        # Without its last letter, and with capitals, the key is one that is read too.
        row = {key.lower(): value for key, value in row.items()}
        turns = row["conversations" if "conversations" in row else "conversation"]
        return [(ROLES[turn["from"].lower()], turn["value"]) for turn in turns]
    except (KeyError, TypeError, AttributeError):
        return None


def check(content: bytes, path) -> str:
    """Read one damaged file; what became of it."""
    found = read(written(path, content))
    numbers = [one.row for one in found if one.row is not None]
    assert found and numbers == list(range(len(numbers)))
    assert all(one.row is not None for one in found[:-1])
    good = [one for one in found if not isinstance(one, BadRow)]
    for bad in found:
        assert not isinstance(bad, BadRow) or (bad.faults and all(fault.startswith(str(path)) for fault in bad.faults))
    if not good:
        return "refused"
    text = (unpacked(content) if found[-1].row is not None else _as_far_as_it_goes(content)).decode(errors="replace")
    ways = rows_that_stand_there(text.removeprefix("\ufeff"))
    matching = [
        way for way in ways if len(way) > good[-1].row and all(meant(way[one.row]) == spoken(one) for one in good)
    ]
    assert matching, "a row was read that does not stand in the file"
    if found[-1].row is not None:
        assert any(len(way) == len(found) for way in matching), "a row of the file is missing"
    return "read" if len(good) == len(found) else "read in part"


def _as_far_as_it_goes(content: bytes) -> bytes:
    """The unpacked bytes of a stream up to where it is damaged."""
    if content.startswith(b"\x1f\x8b"):
        pieces, stream = b"", zlib.decompressobj(31)
        for place in range(len(content)):
            try:
                pieces += stream.decompress(content[place : place + 1])
            except zlib.error:
                break
        return pieces
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        pieces, stream = b"", pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd")
        while True:
            try:
                piece = stream.read(1)
            except OSError:
                return pieces
            if not piece:
                return pieces
            pieces += piece
    return content


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("form", ["array", "indented", "lines"])
@pytest.mark.parametrize("inside", [True, False], ids=["damaged-inside", "damaged-outside"])
def test_damaged_data_is_read_as_it_stands_or_refused(form, pack, inside, tmp_path):
    random_ = random.Random(f"{form} {pack.__name__} {inside}")
    seen: Counter = Counter()
    for _ in range(MUTATIONS):
        made = rows(random_)
        ascii_only = random_.random() < 0.3
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in made]
        whole = "\n".join(lines) if form == "lines" else json.dumps(
            made, ensure_ascii=ascii_only, indent=1 if form == "indented" else None
        )  # fmt: skip
        content = pack(mutated(whole.encode(), random_)) if inside else mutated(pack(whole.encode()), random_)
        seen[check(content, tmp_path / "a.json")] += 1

    assert seen["refused"] and (seen["read"] or not inside)
