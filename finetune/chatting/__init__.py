"""Talking with a result: one conversation, in a terminal, from a pipe or in a browser."""

from finetune.chatting.conversation import Chat
from finetune.chatting.piped import answer_once, read_question
from finetune.chatting.terminal import Terminal
from finetune.chatting.voices import Voices
from finetune.chatting.web import check_gradio, serve

__all__ = ["Chat", "Terminal", "Voices", "answer_once", "check_gradio", "read_question", "serve"]
