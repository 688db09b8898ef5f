"""`finetune chat --web`: a Gradio page that needs no network beyond the machine it runs on."""

import getpass
import html
import importlib.util
import json
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.conversation import to_row
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE
from finetune.inference.web_session import WebAnswers, WebSession, spelled
from finetune.run_dir.data_samples import read_samples
from finetune.utils.errors import ConfigError, FinetuneError, exit_now, raise_faults
from finetune.utils.web_requests import LOCAL_NAMES, is_own_request

MAX_CHARACTERS, MAX_REQUEST_BYTES = 200_000, 4_000_000
REFUSED_PATHS = re.compile(r"/(upload|proxy=|file=|process_recording|deep_link|component_server)")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "font-src 'self' data:; img-src 'self' data:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
POLICY_HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
CODE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
MAX_NEW_TOKENS = 4096  # of the slider
EXAMPLES, MAX_EXAMPLES, MAX_EXAMPLE_CHARACTERS = ("Who are you?", "你是谁？"), 4, 80
FOLDER = Path(__file__).resolve().parent
STRINGS = json.loads((FOLDER / "web_chat_strings.json").read_text(encoding="utf-8"))
ENGLISH, CHINESE = ({name: texts[language] for name, texts in STRINGS.items()} for language in (0, 1))


def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def check_gradio() -> None:
    """Check that Gradio is installed, before a model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "--web: Gradio is not installed; it is the extra `web`: pip install 'gradio>=6.31,<7', or, in a clone, "
            "pip install -e '.[web]'"
        )


def build_app(models: ChatModels, chat: ChatSession) -> tuple[Any, Any]:
    """Build the page; return it with its strings in all languages."""
    import gradio as gr

    strings = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE, "zh-TW": CHINESE})
    answers, sampling, folder = WebAnswers(models), models.sampling, models.loaded.result.folder
    compares = len(models.names) > 1
    with gr.Blocks(title=str(folder), fill_height=True, analytics_enabled=False) as blocks:
        session = gr.State(WebSession(chat))
        about = f"<h3>{spelled(folder.absolute().name)}</h3><p>{spelled(models.model_description)}</p>"
        gr.Markdown(about, elem_id="about")
        with gr.Row(elem_id="answers", equal_height=True):
            column: dict[str, Any] = {
                "height": "56vh", "layout": "bubble", "buttons": [], "feedback_options": None, "min_width": 260,
                "latex_delimiters": [],
            }  # fmt: skip
            kept = gr.Chatbot(label=strings(answers.kept), elem_id="kept", **column)
            base = gr.Chatbot(label=strings(BASE), elem_id="base", visible=compares, **column)
        with gr.Row(elem_id="examples"):
            examples = [gr.Button(text, size="sm") for text in example_questions(folder)]
        with gr.Row(equal_height=True):
            message = gr.Textbox(
                placeholder=strings("message"), show_label=False, container=False, lines=1, max_lines=8, scale=8,
                min_width=200, elem_id="message", autofocus=True, max_length=MAX_CHARACTERS,
            )  # fmt: skip
            send = gr.Button(strings("send"), variant="primary", scale=1, min_width=88, elem_id="send")
            stop = gr.Button(strings("stop"), variant="stop", scale=1, min_width=88, elem_id="stop", visible=False)
        with gr.Row():
            retry, undo, reset, save = (
                gr.Button(strings(name), size="sm", min_width=64, elem_id=name)
                for name in ("retry", "undo", "reset", "save")
            )
        saved = gr.Textbox(visible="hidden")
        compare = gr.Checkbox(
            compares, label=strings("compare"), info=strings("compare_info"), visible=answers.can_compare,
            elem_id="compare",
        )  # fmt: skip
        with gr.Accordion(strings("settings"), open=False, elem_id="settings"):
            system = gr.Textbox(
                chat.system or "", label=strings("system"), lines=2, elem_id="system", max_length=MAX_CHARACTERS
            )
            with gr.Row():
                max_new_tokens = gr.Slider(
                    1, max(MAX_NEW_TOKENS, sampling.max_new_tokens), sampling.max_new_tokens, step=1,
                    label=strings("max_new_tokens"), elem_id="max_new_tokens",
                )  # fmt: skip
                temperature = gr.Slider(
                    0, max(2.0, sampling.temperature), sampling.temperature, step=0.05, label=strings("temperature"),
                    info=strings("temperature_info"), elem_id="temperature",
                )  # fmt: skip
                top_p = gr.Slider(0.01, 1, sampling.top_p, step=0.01, label=strings("top_p"), elem_id="top_p")
                seed = gr.Textbox(
                    "" if sampling.seed is None else str(sampling.seed), label=strings("seed"),
                    info=strings("seed_info"), elem_id="seed", min_width=160,
                )  # fmt: skip
        settings = [session, compare, system, max_new_tokens, temperature, top_p, seed]
        handlers = _EventHandlers(answers)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        model: dict[str, Any] = {
            **quiet, "outputs": [message, kept, base, session, send, stop], "concurrency_limit": 1,
            "concurrency_id": "model",
        }  # fmt: skip
        gr.on([send.click, message.submit], handlers.ask, [message, *settings], **model)
        for example in examples:
            example.click(handlers.ask, [example, *settings], **model)
        retry.click(handlers.retry, settings, **model)
        stop.click(handlers.stop, session, None, queue=False, **quiet)
        undo.click(handlers.undo, session, [message, kept, base, session], **quiet)
        reset.click(handlers.reset, session, [message, kept, base, session], **quiet)
        save.click(handlers.save, session, saved, **quiet).then(None, saved, None, js=_asset("web_chat.js"), **quiet)
        compare.change(lambda wanted: gr.update(visible=wanted), compare, base, **quiet)
    return blocks, strings


def example_questions(folder: Path) -> list[str]:
    """Return short questions with which rows of the training data begin; without such rows, who the model is."""
    turns = [[turn for turn in row.examples[0] if turn.role] for row in read_samples(folder) if row.examples]
    asked = [row[0].text.strip() for row in turns if row and row[0].role == "human"]
    short = [text for text in asked if 0 < len(text) <= MAX_EXAMPLE_CHARACTERS and text.isprintable()]
    return list(dict.fromkeys(short or EXAMPLES))[:MAX_EXAMPLES]


class _EventHandlers:
    """What buttons do. Parameters and returned values are those of the components, in the order of `build_app`."""

    def __init__(self, answers: WebAnswers) -> None:
        self.answers = answers

    def ask(self, question: str, session: WebSession, *settings: Any) -> Iterator[list[Any]]:
        """Answer the message; the button says "stop" in the meantime."""
        import gradio as gr

        question, unsent = (question or "").strip("\n"), gr.skip()
        if question.strip():
            compares, system, *decoding = settings
            session.chat.system = (system or "").strip() or None
            try:
                sampling = _sampling_params(*decoding)
                _check_lengths(question, session.chat.system)
                for kept, base in self.answers.stream(session, question, compares=compares, sampling=sampling):
                    yield ["", kept, base, session, gr.update(visible=False), gr.update(visible=True)]
                unsent = ""
            except FinetuneError as error:
                gr.Warning(html.escape(str(error)), duration=None)
                unsent = question
        yield [unsent, *session.columns(), session, gr.update(visible=True), gr.update(visible=False)]

    def retry(self, session: WebSession, *settings: Any) -> Iterator[list[Any]]:
        """Ask the last question again."""
        yield from self.ask(session.undo() or "", session, *settings)

    def stop(self, session: WebSession) -> None:
        """Stop the answer that is being generated."""
        session.stopped = True

    def undo(self, session: WebSession) -> list[Any]:
        """Put the last question back into the message box."""
        return [session.undo() or "", *session.columns(), session]

    def save(self, session: WebSession) -> str:
        """Return the conversation as one line of training data; the page saves it."""
        chat = session.chat
        return json.dumps(to_row(chat.turns(), tools=chat.tools), ensure_ascii=False) + "\n" if chat.pairs else ""

    def reset(self, session: WebSession) -> list[Any]:
        """Start a new conversation."""
        session.reset()
        return ["", *session.columns(), session]


def _sampling_params(new_tokens: float, temperature: float, top_p: float, seed: str | None) -> SamplingParams:
    seed = (seed or "").strip()
    if not re.fullmatch(r"\d{0,18}", seed):
        raise ConfigError(f"seed {seed[:40]}: expected an integer of up to 18 digits, or nothing")
    most = int(new_tokens) if new_tokens == new_tokens else 1  # NaN passes the slider's limits
    sampling = SamplingParams(temperature, top_p, int(seed) if seed else None, most)
    raise_faults(sampling.faults())
    return sampling


def _check_lengths(*texts: str | None) -> None:
    longest = max(len(text or "") for text in texts)
    if longest > MAX_CHARACTERS:
        raise ConfigError(f"{longest:,} characters: a message may have {MAX_CHARACTERS:,}")


def serve(models: ChatModels, chat: ChatSession, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, which ends the process."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("no_proxy", "NO_PROXY"):  # Gradio sends a request to its own page at the start
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOCAL_NAMES]))
    with tempfile.TemporaryDirectory(prefix="finetune-chat-", ignore_cleanup_errors=True) as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        import gradio as gr
        from starlette.middleware import Middleware

        blocks, strings = build_app(models, chat)
        guard = Middleware(_RequestGuard, listens_on=host)
        theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS)
        try:
            blocks.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                footer_links=[], run_history=False, enable_monitoring=False, i18n=strings, theme=theme,
                css=_asset("web_chat.css"), app_kwargs={"middleware": [guard]}, max_file_size=1,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error}") from None
        try:
            print("\n".join(server_url(host, port)), flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once
            print()
    # Uvicorn would wait for clients that hold a connection open, Python for threads that may read a prompt for minutes.
    exit_now(0)


class _RequestGuard:
    """Answer requests to this page from this page alone: no other name or site, no upload, nothing large."""

    def __init__(self, app: Any, listens_on: str) -> None:
        self.app, self.listens_on = app, listens_on

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import Response

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_own = is_own_request(headers.get("host", ""), headers.get("origin"), self.listens_on)
        size = headers.get("content-length", "0")
        if not is_own or scope["type"] != "http" or REFUSED_PATHS.search(scope["path"]):
            await Response(status_code=403)(scope, receive, send)
        elif "transfer-encoding" in headers or not size.isdigit() or int(size) > MAX_REQUEST_BYTES:
            await Response(status_code=413)(scope, receive, send)
        else:

            async def send_with_policy(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], *POLICY_HEADERS]
                await send(message)

            await self.app(scope, receive, send_with_policy)


def server_url(host: str, port: int) -> list[str]:
    """Return lines that say how to open the page."""
    if host not in LOCAL_NAMES:
        return [
            f"the page is at http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}",
            "anyone who can reach this machine can use it: there is no password. Press Ctrl-C to stop",
        ]
    user = f"{getpass.getuser()}@{socket.gethostname()}"
    return [
        f"the page is at http://{host}:{port}",
        f"from another machine: ssh -L {port}:127.0.0.1:{port} {user}, then the same address. Press Ctrl-C to stop",
    ]
