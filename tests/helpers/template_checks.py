"""Conversations through a chat template, checked by another route than the package's."""

from collections import Counter

from hypothesis import strategies as st

from finetune.chat_templates import IGNORE_INDEX, Renderer
from finetune.conversation import Conversation, Turn

ROLES = {"human": "user", "model": "assistant", "system": "system"}


CONVERSATIONS = {
    "one pair": [("human", "Who are you?"), ("model", "I am Nori.")],
    "system": [("system", "Be brief."), ("human", "2+3?"), ("model", "5")],
    "chinese and emoji": [
        ("system", "请用中文回答。"),
        ("human", "你是谁？🙂"),
        ("model", "我是 Nori，由 Tidepool 制作。👩‍👩‍👧"),
        ("human", "谢谢"),
        ("model", "不客气！"),
    ],
    "white space at the ends": [
        ("human", "  a\n\n"),
        ("model", "\n b \n"),
        ("human", "\tc"),
        ("model", " d\n\n\n"),
        ("human", "e"),
        ("model", "f  "),
    ],
    "words of the template": [("human", "user\nassistant\n"), ("model", "assistant"), ("human", "a"), ("model", "a")],
    "code": [("human", "sort?"), ("model", "```python\ndef f(x):\n    return sorted(x)\n```\nDone: `f([3, 1])`.")],
    "the same text in each turn": [("human", "ok"), ("model", "ok"), ("human", "ok"), ("model", "ok")],
    "reasoning": [
        ("human", "2+2?"),
        ("model", "<think>\nAdd them.\n</think>\n\n4"),
        ("human", "3+3?"),
        ("model", "<think>\nAgain.\n</think>\n\n6"),
    ],
    "reasoning in one turn": [("human", "x"), ("model", "<think>\nr\n</think>\n\ny"), ("human", "z"), ("model", "w")],
}


def rendered(chat_format, turns):
    conversation = Conversation(tuple(Turn(role, text) for role, text in turns), 0, "rows.json", 0)
    return Renderer(chat_format, 100_000).render(conversation)


def messages(turns, *, merged: bool):
    if merged and turns[0][0] == "system":
        turns = [("human", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    return [{"role": ROLES[role], "content": text} for role, text in turns]


def runs(labels):
    """The learned runs of labels, found without knowing where they should be."""
    return [labels[start:stop] for start, stop in places_of_runs(labels)]


def places_of_runs(labels):
    """Where the learned runs of labels begin and end."""
    learned = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [place for place in range(len(labels) + 1) if learned[place] != learned[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def served_prompts(tokenizer, turns, merged):
    """The ids that a server sends for each model turn, and whether the template writes a prompt in them."""
    prompts, is_written = [], True
    for number in [number for number, (role, _) in enumerate(turns) if role == "model" and number]:
        before = messages(turns[:number], merged=merged)
        prompts.append(tokenizer.apply_chat_template(before, return_dict=False, add_generation_prompt=True))
        is_written &= prompts[-1] != tokenizer.apply_chat_template(before, return_dict=False)
    return prompts, is_written


def check(tokenizer, rendering, turns):
    """Each answer stands behind the ids that a server sends, is learned once, with its end, and nothing else is.

    The ids are apply_chat_template's for a beginning of the conversation, but for a prompt that the tokenizer would
    join with the answer. An answer that the template writes otherwise once other turns follow, or that is joined so, is
    the last one of an example of its own.
    """
    merged = "system turn put in front" in (rendering.reason or "")
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    learned = []
    for example in rendering.examples:
        assert any(ids_of(tokenizer, example, turns[:stop], merged, rendering.spelled) for stop in lasts(turns))
        assert all(
            label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True)
        )
        learned += runs(example.labels)
        prompts, is_written = served_prompts(tokenizer, turns, merged)
        if is_written and not rendering.spelled:
            assert all(example.input_ids[:start] in prompts for start, _ in places_of_runs(example.labels))
    read = []
    for run in learned:
        assert run[-1] in tokenizer.added_tokens_decoder and control.isdisjoint(run[:-1])
        text = tokenizer.decode(run[:-1], clean_up_tokenization_spaces=False)
        read.append(text.removeprefix("<think>\n\n</think>\n\n").strip())
    # An answer with an example of its own may stand in front of earlier ones.
    assert sorted(read) == sorted(text.strip() for role, text in turns if role == "model")


def lasts(turns):
    """Where the conversation may end: after any model turn."""
    return [number + 1 for number, (role, _) in enumerate(turns) if role == "model"]


def ids_of(tokenizer, example, turns, merged, spelled):
    """Whether the ids are those of these turns; of a turn that spells a control token, these stay text."""
    expected = tokenizer.apply_chat_template(messages(turns, merged=merged), return_dict=False)
    if not spelled:
        whole = [expected, [*expected, max(example.labels[-1], 0)]]
        ((start, _),) = places_of_runs(example.labels)[-1:]
        is_apart = example.input_ids[:start] == served_prompts(tokenizer, turns, merged)[0][-1]
        texts = [tokenizer.decode(ids) for ids in whole] if is_apart else []
        return example.input_ids in whole or tokenizer.decode(example.input_ids) in texts
    contents = Counter()
    for role, text in turns:
        for token in tokenizer.encode(text, add_special_tokens=False):
            added = tokenizer.added_tokens_decoder.get(token)
            contents[token] += added is not None and (role != "model" or added.special)
    return any(
        all(
            ids.count(token) == max(expected.count(token) - contents[token], 0)
            for token in tokenizer.added_tokens_decoder
        )
        for ids in (example.input_ids, example.input_ids[:-1])  # the end that a next turn would write is appended
    )


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Co"]) | st.sampled_from(" \n\t<|>[]/"), min_size=1, max_size=24
)


contents = st.one_of(
    texts, st.sampled_from(["user", "assistant\n", "</s>", "[INST] x [/INST]", "a\n\n\nb", "你好，世界"])
)
