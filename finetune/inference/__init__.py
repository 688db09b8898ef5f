"""Load the result of a run, generate answers, and chat: in a terminal, through a pipe, in a browser."""

from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.inference.pipe_chat import answer_once, read_question
from finetune.inference.terminal_chat import TerminalChat
from finetune.inference.web_chat import check_gradio, serve
