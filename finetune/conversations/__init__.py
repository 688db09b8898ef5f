"""Conversation data -> checked `Conversation` objects, from files in any layout that chat data comes in.

A row of this project's own is

    {"id": 0, "conversations": [{"from": "human", "value": "..."}, {"from": "model", "value": "..."}]}

A row may begin with a system turn; human and model turns alternate and the last one is the model's. Whether a row may
begin with a model turn depends on the chat format, so that is left to the renderer. Rows and turns count from 0. All
faults of all files are found, and nothing that a row says is left out or changed without a word.
"""

from finetune.conversations.checks import REPAIRS
from finetune.conversations.reading import ConversationReader, load_conversations
from finetune.conversations.sources import Source, find_sources, fingerprint, shipped_files, shipped_folder
from finetune.conversations.turns import BadRow, Conversation, Role, Turn, answer_number, as_row

__all__ = [
    "REPAIRS",
    "BadRow",
    "Conversation",
    "ConversationReader",
    "Role",
    "Source",
    "Turn",
    "answer_number",
    "as_row",
    "find_sources",
    "fingerprint",
    "load_conversations",
    "shipped_files",
    "shipped_folder",
]
