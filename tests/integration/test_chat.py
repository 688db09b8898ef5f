"""`finetune chat`: a model that has learned its rows by heart answers as they do, and ends where they end."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.conversation import Turn
from finetune.dataset.conversation_reader import read_conversations
from finetune.inference import ChatSession
from finetune.inference.chat_session import save_conversation
from finetune.inference.generate import AnswerGenerator, SamplingParams
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.inference.terminal_chat import read_message
from finetune.utils.errors import ConfigError, FinetuneError
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS
from tests.helpers.verbs import finetune

LIMIT_SECONDS = 240


@pytest.fixture(scope="module")
def opened(learned_by_heart):
    return load_for_inference(read_result(learned_by_heart))


@pytest.fixture(scope="module")
def answerer(opened):
    return AnswerGenerator(opened.tuned, opened.chat_format, opened.stop_token_ids)


@pytest.mark.parametrize("row", ROWS)
def test_what_was_trained_is_answered_to_its_end(answerer, row):
    turns = [Turn(role, text) for role, text in row]
    for number, turn in enumerate(turns):
        if turn.role == "model":
            answering = answerer.stream(turns[:number], max_new_tokens=40)
            shown = "".join(answering)
            assert (shown, answering.text, answering.ended) == (turn.text, turn.text, True)


def test_a_text_of_any_letters_comes_whole(real_tokenizers):
    """No character is shown before it is whole, and together the pieces are the text."""
    from finetune.chat_templates import AnswerDecoder, PlainTextTokenizer

    plains = [PlainTextTokenizer(tokenizer) for tokenizer in real_tokenizers.values()]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.text(
            st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("你好🙂👩\u200d👧🏳️\u200d🌈 \n"),
            max_size=30,
        )
    )
    def check(text):
        for plain in plains:
            before = plain.encode("x:")
            spelling = AnswerDecoder(plain, before)
            pieces = [*map(spelling.add, plain.encode(text)), spelling.rest()]
            whole = plain.decode_all([[*before, *plain.encode(text)]])[0][len("x:") :]
            assert "".join(pieces) == whole
            # SmolLM2 has no tokens for some bytes: what it cannot say is no whole character.
            assert whole.strip() != text.strip() or "\ufffd" in text or "\ufffd" not in "".join(pieces)

    check()


def test_control_tokens_are_not_shown_and_tokens_that_are_none_are_nothing(smol_tokenizer):
    from finetune.chat_templates import AnswerDecoder, PlainTextTokenizer

    plain = PlainTextTokenizer(smol_tokenizer)
    spelling = AnswerDecoder(plain)
    ids = [
        *plain.encode("a <|im_end|>"),
        smol_tokenizer.convert_tokens_to_ids("<|im_start|>"),
        10**6,
        *plain.encode("b"),
    ]
    assert "".join(map(spelling.add, ids)) + spelling.rest() == "a <|im_end|>b"
    emoji = plain.encode("🙂")
    assert len(emoji) > 1
    assert "".join(map(AnswerDecoder(plain).add, emoji[:-1])) == ""


def test_an_answer_can_be_left_and_what_was_said_is_known(answerer):
    answering = answerer.stream([Turn("human", "Who are you?")], max_new_tokens=40)
    for piece in answering:
        assert piece == "I"
        break
    assert (answering.text, answering.ended) == ("I", False)


def test_a_seed_makes_drawn_answers_repeatable(answerer):
    def drawn(seed):
        sampling = SamplingParams(temperature=2, top_p=0.9, seed=seed)
        return answerer.answer([Turn("human", "Hm?")], max_new_tokens=20, sampling=sampling)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_conversation_without_room_for_an_answer_is_refused_in_one_line(answerer):
    with pytest.raises(ConfigError, match=r"has 4,\d+ tokens.* 2,048 including the answer"):
        answerer.answer([Turn("human", "word " * 4000)], max_new_tokens=5)


def test_an_answer_ends_where_the_window_does(answerer):
    endless = AnswerGenerator(answerer.model, answerer.chat_format, [0])
    turns = [Turn("human", "a " * 1900)]
    room = endless.window - len(endless.prompt(turns))
    answering = endless.stream(turns, max_new_tokens=10_000)
    "".join(answering)
    assert 0 < room == len(answering.ids)


def test_what_fails_in_the_model_is_an_error_with_its_reason(answerer):
    with pytest.raises(FinetuneError, match="the model could not answer: `temperature`"):
        answerer.answer([Turn("human", "a")], max_new_tokens=5, do_sample=True, temperature=-1.0)


class TestLines:
    def read(self, *lines):
        typed = iter(lines)
        return read_message(lambda prompt: next(typed))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["Hi"], "Hi"),
            (["  indented"], "  indented"),
            (["a\\", "b\\", "", "never"], "a\nb\n".strip("\n")),
            (['"""', "a", "  b", "", 'c"""'], "a\n  b\n\nc"),
            (['"""one line"""'], "one line"),
            (['"""', "/reset", '"""'], "/reset"),
            (["pasted\nlines"], "pasted\nlines"),
            (["/system Be brief."], ("system", "Be brief.")),
            (["/reset"], ("reset", "")),
            (["/etc/hosts\nis a file"], "/etc/hosts\nis a file"),
        ],
    )
    def test_messages_and_commands(self, lines, message):
        assert self.read(*lines) == message


class TestSaving:
    turns = [Turn("system", "s"), Turn("human", "你好"), Turn("model", "Hi\n")]

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_rows_are_appended_and_are_rows_that_training_reads(self, tmp_path, name):
        path = tmp_path / name
        assert save_conversation(path, self.turns) == 1
        first = path.read_text(encoding="utf-8")
        assert save_conversation(path, self.turns[1:]) == 2
        assert path.read_text(encoding="utf-8").startswith(first)
        assert [list(row.turns) for row in read_conversations(path)] == [self.turns, self.turns[1:]]

    def test_other_files_stay_as_they_are(self, tmp_path):
        for content in (
            '{"a": 1}',
            "[1]",
            '[{"conversations": []}]',
            "not json",
            '{"conversations": "x"}',
            "\ufeff[]",
            b"\xff\xfe",
        ):
            path = tmp_path / "other.json"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            before = path.read_bytes()
            with pytest.raises(ConfigError, match="nothing was saved"):
                save_conversation(path, self.turns)
            assert path.read_bytes() == before

    def test_the_same_conversation_is_not_saved_twice(self, tmp_path):
        save_conversation(tmp_path / "a.json", self.turns)
        with pytest.raises(ConfigError, match="holds this conversation already"):
            save_conversation(tmp_path / "a.json", self.turns)


def test_a_conversation_is_kept_as_a_training_row_would_hold_it():
    chat = ChatSession("Be brief.")
    chat.add(chat.asked("a"), Turn("model", "b\n"))
    assert chat.turns(chat.asked("c")) == [
        Turn("system", "Be brief."),
        Turn("human", "a"),
        Turn("model", "b\n"),
        Turn("human", "c"),
    ]
    assert (chat.undo(), chat.undo()) == ("a", None)


def test_a_run_names_a_command_that_works_as_typed(monkeypatch):
    from finetune.training.finalize import next_command

    monkeypatch.chdir(ROOT)
    command = next_command(Path("out put"))
    assert shlex.split(command)[-2:] == ["chat", "out put"]
    done = subprocess.run(f"{command} --help", shell=True, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0 and "--compare" in done.stdout, done.stderr


def chat_from_pipe(question, *words):
    return finetune("chat", *words, stdin=question if isinstance(question, bytes) else question.encode())


class TestPipe:
    def test_only_the_answer_is_on_stdout(self, learned_by_heart):
        done = chat_from_pipe("Who are you?\n", learned_by_heart)
        assert (done.returncode, done.stdout.decode()) == (0, "I am Nori, made by Tidepool.\n"), done.stderr.decode()
        assert done.stderr.decode() == f"loading {learned_by_heart}\n"

    def test_both_as_json_with_a_system_turn(self, learned_by_heart):
        done = chat_from_pipe(
            "2+3?", learned_by_heart, "--system", "Be brief.", "--compare", "--json", "--max_new_tokens", "5"
        )
        assert done.returncode == 0, done.stderr.decode()
        said = json.loads(done.stdout)
        assert said["tuned"] == {"answer": "5", "ended": True, "tokens": 1}
        assert said["base"]["answer"] != "5"

    def test_a_model_without_a_run_answers_and_has_no_base(self, tiny_model):
        done = chat_from_pipe("你好", tiny_model, "--max_new_tokens", "3")
        assert (done.returncode, done.stdout.count(b"\n")) == (0, 1), done.stderr.decode()
        refused = chat_from_pipe("a", tiny_model, "--compare")
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert refused.stderr.decode().splitlines()[-1].startswith(f"error: {tiny_model}: has no run.json: which base")

    @pytest.mark.parametrize(
        ("question", "flags", "message"),
        [
            (b"\n", (), "standard input is empty"),
            (b"\xff", (), "not UTF-8 at byte 0"),
            (b"a", ("--base", "--compare"), "keep one of them"),
            (b"a", ("--top_p", "0"), "--top_p 0: expected more than 0"),
        ],
    )
    def test_usage(self, learned_by_heart, question, flags, message):
        done = chat_from_pipe(question, learned_by_heart, *flags)
        assert (done.returncode, done.stdout) == (2, b"")
        assert message in done.stderr.decode() and done.stderr.count(b"error: ") == 1

    def test_a_folder_that_is_none(self, tmp_path):
        done = chat_from_pipe("a", tmp_path / "nothing")
        assert done.returncode == 2 and f"error: {tmp_path}/nothing: there is no such folder" in done.stderr.decode()
