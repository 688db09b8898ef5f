"""Drawn conversations with tools and reasoning, the messages of a server for them, and parsers of generated calls."""

import json
import re
from dataclasses import replace

from hypothesis import strategies as st

from finetune.conversation import Conversation, ToolCall, Turn
from tests.helpers.template_families import Family

ROLES = {"human": "user", "model": "assistant", "system": "system", "tool": "tool"}
NAMES = ("get_weather", "end", "find.all-2")
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"]) | st.sampled_from(" \n\t\"\\{}[]:,<>|/'")
MARK = "\ue100{}\ue101"  # a control token that is one, not its spelling


def strings(family: Family, *, spelled: bool):
    """Short strings, some of which spell a control token of the family."""
    kinds = [st.text(LETTERS, max_size=10), st.sampled_from(["", "你好 🙂", "null", '{"a": 1}', "a\n\n\nb"])]
    if spelled:
        kinds.append(st.sampled_from([f"x{token}y" for token in (*family.special, *family.added, "</s>")]))
        return st.one_of(kinds)
    # Hypothesis draws constants of the code, too.
    tokens = (*family.special, *family.added, "</s>")
    return st.one_of(kinds).filter(lambda text: not any(token in text for token in tokens))


def words(family: Family, *, spelled: bool):
    """Texts of turns: white space at the ends belongs to templates, reasoning is drawn beside them."""
    kinds = st.builds("{}{}".format, st.sampled_from(["a", "Yes.", "好", "7", "-"]), st.text(LETTERS, max_size=12))
    if spelled:
        kinds |= st.sampled_from([f"Say {token}!" for token in family.special])
    return kinds.map(lambda text: (text.replace("think>", "")).strip())


@st.composite
def conversations(draw, family: Family, *, spelled: bool = False):
    """A conversation that a server of the family could have had; its last turn is the model's."""
    text, string = words(family, spelled=spelled), strings(family, spelled=spelled)
    keys = st.sampled_from(["k", "键", "two"])
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.sampled_from([0.5, 1e-9, -3.25e20]) | string,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
        max_leaves=3,
    )  # fmt: skip
    arguments = st.dictionaries(st.sampled_from(["city", "n", "filter"]), values, max_size=3)
    has_tools = family.max_calls > 0 and draw(st.booleans())
    reasons = draw(st.sampled_from(["none", "all", "some"]))
    turns: list[Turn] = []
    count = 0

    def answer(calls: tuple[ToolCall, ...]) -> Turn:
        said = draw(text) if not calls or (family.text_beside_calls and draw(st.booleans())) else ""
        turn = Turn("model", said, draw(st.integers(0, 3)) > 0, tool_calls=calls)
        if (
            reasons == "none"
            or (reasons == "some" and draw(st.booleans()))
            or (calls and not family.reasoning_beside_calls)
        ):
            return turn
        reasoning = draw(text)
        if not calls and draw(st.booleans()):
            blank = draw(st.sampled_from(["\n", "\n\n"]))
            return replace(turn, text=f"<think>\n{reasoning}\n</think>{blank}{said}")
        return replace(turn, reasoning=reasoning)

    if family.system and draw(st.booleans()):
        turns.append(Turn("system", draw(text)))
    for question in range(draw(st.integers(1, 3))):
        if question and family.later_system and draw(st.integers(0, 5)) == 0:
            turns.append(Turn("system", draw(text)))
        turns.append(Turn("human", draw(text)))
        for _ in range(draw(st.integers(0, 2)) if has_tools else 0):
            calls, with_ids = [], draw(st.booleans()) or family.short_ids
            for _ in range(draw(st.integers(1, family.max_calls))):
                count += 1
                calls.append(
                    ToolCall(draw(st.sampled_from(NAMES)), draw(arguments), f"ab{count:07}" if with_ids else None)
                )
            turns.append(answer(tuple(calls)))
            turns += [Turn("tool", draw(string), tool_call_id=call.id, tool_name=call.name) for call in calls]
        turns.append(answer(()))
    if has_tools and draw(st.booleans()):
        call = ToolCall(NAMES[0], draw(arguments), "zz0000000")
        turns += [Turn("human", draw(text)), answer((call,))]
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": draw(string) + "?",
                "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": [draw(string)]}}},
            },
        }
        for name in (NAMES if has_tools else ())
    )
    return Conversation(tuple(turns), 0, "rows.json", 0, tools=tools)


def served_messages(family: Family, conversation: Conversation) -> list[dict]:
    """The messages that a client would send for these turns."""
    messages = []
    for turn in conversation.turns:
        message = {"role": ROLES[turn.role], "content": turn.text}
        if turn.role == "tool":
            message |= {"name": turn.tool_name} | ({"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {})
        if turn.reasoning and family.reasoning:
            message[family.reasoning] = turn.reasoning
        elif turn.reasoning:
            message["content"] = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.text}"
        if family.reasoning and "</think>" in turn.text and not family.parses_reasoning:
            reasoning, _, message["content"] = turn.text.removeprefix("<think>\n").partition("</think>")
            message |= {family.reasoning: reasoning.strip(), "content": message["content"].strip()}
        if turn.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": arguments_of(family, call)}}
                | ({"id": call.id} if call.id else {})
                for call in turn.tool_calls
            ]
        messages.append(message)
    return messages


def arguments_of(family: Family, call: ToolCall):
    return json.dumps(call.arguments, ensure_ascii=False) if family.arguments_as_json else call.arguments


def marked_text(tokenizer, ids) -> str:
    """The decoded ids, each control token between two marks."""
    parts, run = [], []
    for token_id in [*ids, None]:
        token = None if token_id is None else tokenizer.added_tokens_decoder.get(token_id)
        if token_id is not None and (token is None or not str(token).strip()):
            run.append(token_id)
            continue
        parts.append(tokenizer.decode(run, clean_up_tokenization_spaces=False) if run else "")
        parts.append("" if token is None else MARK.format(token))
        run = []
    return "".join(parts)


def parsed_calls(name: str, text: str) -> list[tuple[str, object]]:
    """The calls in what a model of the family wrote, as a server would read it; control tokens are marked."""
    if name.startswith("qwen"):  # what is spelled is text
        text = re.sub(r"(?<!\ue100)<tool_call>\n", "\n", text)
    if name in ("hermes", "qwen2.5", "qwen3", "qwen3, no thinking"):
        places = re.finditer(r"(?:\ue100)?<tool_call>(?:\ue101)?\n", text)
        return [(call["name"], call["arguments"]) for call in (json_at(text, place.end()) for place in places)]
    if name == "llama3.1":
        call = json_at(text, 0)
        return [(call["name"], call["parameters"])]
    if name == "mistral":
        return [
            (call["name"], call["arguments"])
            for call in json_at(text.split(MARK.format("[TOOL_CALLS]"))[-1].lstrip(), 0)
        ]
    if name in ("granite", "phi4-mini"):
        return [(call["name"], call["arguments"]) for call in json_at(text.split(MARK.format("<|tool_call|>"))[1], 0)]
    if name == "command-r":
        calls = json_at(text.split(MARK.format("<|START_ACTION|>"))[1], 0)
        return [(call["tool_name"], call["parameters"]) for call in calls]
    if name == "glm4":
        function, _, rest = text.partition("\n")
        return [(function, json_at(rest, 0))]
    if name == "gpt-oss":
        found = re.search(
            r"to=functions\.(\S+?)\ue100<\|channel\|>\ue101commentary json\ue100<\|message\|>\ue101", text
        )
        return [(found[1], json_at(text, found.end()))]
    if name.startswith("deepseek"):
        places = re.finditer(r"function\ue100<｜tool▁sep｜>\ue101(\S+)\n```json\n", text)
        return [(place[1], json_at(text, place.end())) for place in places]
    if name == "glm4.5":
        return [_glm_call(part) for part in text.split(MARK.format("<tool_call>"))[1:]]
    raise AssertionError(name)


def _glm_call(text: str):
    pattern = "\n{}(.*?){}\n{}(.*?){}".format(
        *(MARK.format(f"<{name}>") for name in ("arg_key", "/arg_key", "arg_value", "/arg_value"))
    )
    return text.partition("\n")[0], dict(re.findall(pattern, text, re.DOTALL))


def json_at(text: str, place: int):
    return json.JSONDecoder().raw_decode(text, place)[0]


def expected_call(name: str, call: ToolCall):
    """The call as `parsed_calls` gives it: the values of GLM-4.5's are texts."""
    if name == "glm4.5":
        values = call.arguments.items()
        return call.name, {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in values
        }
    return call.name, dict(call.arguments)


def gemma_call(call: ToolCall) -> str:
    """A call as Gemma 4 writes it."""
    return f"{MARK.format('<|tool_call>')}call:{call.name}{_gemma(call.arguments)}{MARK.format('<tool_call|>')}"


def _gemma(value) -> str:
    if isinstance(value, str):
        quote = MARK.format('<|"|>')
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(value[key])}" for key in sorted(value, key=str.lower)) + "}"
    return json.dumps(value)
