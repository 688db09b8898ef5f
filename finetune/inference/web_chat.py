"""A conversation in a browser: a page of Gradio's that needs no network beyond the machine it runs on."""

from __future__ import annotations

import getpass
import html
import importlib.util
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE
from finetune.inference.web_session import WebAnswers, WebSession
from finetune.inference.web_strings import CHINESE, ENGLISH, as_markdown
from finetune.utils.errors import ConfigError, FinetuneError

ONLY_HERE = ("127.0.0.1", "localhost", "::1")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
CODE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
MOST_TOKENS = 4096  # of the slider
CSS = """
.gradio-container { max-width: 76rem !important; width: 100%; margin: 0 auto; }
#about h3 { margin: 0; }
#about p { opacity: .7; margin: .2rem 0 0; overflow-wrap: anywhere; }
#kept, #base { height: calc(100vh - 22rem) !important; min-height: 16rem; }
#kept .top-panel, #base .top-panel { display: none; }  /* it would empty a column and not the conversation */
#kept .bubble-wrap, #base .bubble-wrap { margin-top: 1.8rem; height: calc(100% - 1.8rem); }
@media (max-width: 640px) {
    #answers:has(#base) { flex-direction: column; }
    #answers:has(#base) > * > * { height: 33vh !important; min-height: 12rem; }
}
"""


def check_gradio() -> None:
    """Refuse where Gradio is missing, before a model is loaded.

    Raises:
        ConfigError: it is not installed; what to type.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "--web: Gradio is not installed; it is the extra `web`: pip install 'gradio>=6.31,<7', or, in a clone, "
            "pip install -e '.[web]'"
        )


def build_app(voices: ChatModels, chat: ChatSession) -> tuple[Any, Any]:
    """The page, and its words."""
    import gradio as gr

    words = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE, "zh-TW": CHINESE})
    page, sampling = WebAnswers(voices), voices.sampling
    compares = len(voices.names) > 1
    with gr.Blocks(title=str(voices.opened.result.folder), fill_height=True, analytics_enabled=False) as blocks:
        session = gr.State(WebSession(chat))
        folder = voices.opened.result.folder
        gr.Markdown(f"### {as_markdown(folder.absolute().name)}\n\n{as_markdown(voices.what)}", elem_id="about")
        with gr.Row(elem_id="answers", equal_height=True):
            look: dict[str, Any] = {"height": "56vh", "layout": "bubble", "buttons": ["copy"], "feedback_options": None}
            first = gr.Chatbot(label=words(page.kept), elem_id="kept", min_width=260, **look)
            second = gr.Chatbot(label=words(BASE), elem_id="base", min_width=260, visible=compares, **look)
        with gr.Row(equal_height=True):
            message = gr.Textbox(
                placeholder=words("message"), show_label=False, container=False, lines=1, max_lines=8, scale=8,
                min_width=200, elem_id="message", autofocus=True,
            )  # fmt: skip
            send = gr.Button(words("send"), variant="primary", scale=1, min_width=88, elem_id="send")
            stop = gr.Button(words("stop"), variant="stop", scale=1, min_width=88, elem_id="stop", visible=False)
        with gr.Row():
            retry, undo, reset = (
                gr.Button(words(name), size="sm", min_width=80, elem_id=name) for name in ("retry", "undo", "reset")
            )
        compare = gr.Checkbox(
            compares, label=words("compare"), info=words("compare_info"), visible=page.can_compare, elem_id="compare"
        )
        with gr.Accordion(words("settings"), open=False, elem_id="settings"):
            system = gr.Textbox(chat.system or "", label=words("system"), lines=2, elem_id="system")
            with gr.Row():
                tokens = gr.Slider(
                    1, max(MOST_TOKENS, voices.max_new_tokens), voices.max_new_tokens, step=1,
                    label=words("max_new_tokens"), elem_id="max_new_tokens",
                )  # fmt: skip
                warmth = gr.Slider(
                    0, max(2.0, sampling.temperature), sampling.temperature, step=0.05, label=words("temperature"),
                    info=words("temperature_info"), elem_id="temperature",
                )  # fmt: skip
                share = gr.Slider(0.01, 1, sampling.top_p, step=0.01, label=words("top_p"), elem_id="top_p")
                seed = gr.Textbox(
                    "" if sampling.seed is None else str(sampling.seed), label=words("seed"), info=words("seed_info"),
                    elem_id="seed", min_width=160,
                )  # fmt: skip
        shown = [message, first, second, session, send, stop]
        given = [session, compare, system, tokens, warmth, share, seed]
        steps = _Steps(page)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        model = {**quiet, "concurrency_limit": 1, "concurrency_id": "model"}
        gr.on([send.click, message.submit], steps.ask, [message, *given], shown, **model)
        retry.click(steps.retry, given, shown, **model)
        stop.click(steps.stop, session, None, queue=False, **quiet)
        undo.click(steps.undo, session, [message, first, second, session], **quiet)
        reset.click(steps.reset, session, [message, first, second, session], **quiet)
        compare.change(lambda wanted: gr.update(visible=wanted), compare, second, **quiet)
    return blocks, words


class _Steps:
    """What happens when something is pressed; the values are those of the page's parts, in the order of `build`."""

    def __init__(self, page: WebAnswers) -> None:
        self.page = page

    def ask(self, question: str, session: WebSession, *settings: Any) -> Iterator[list[Any]]:
        """Send: the answer appears while the button says stop."""
        import gradio as gr

        question, left = (question or "").strip("\n"), gr.skip()
        if question.strip():
            compares, system, tokens, *how = settings
            session.chat.system = (system or "").strip() or None
            try:
                for first, second in self.page.answer(
                    session, question, compares=compares, tokens=int(tokens), sampling=_sampling(*how)
                ):
                    yield ["", first, second, session, gr.update(visible=False), gr.update(visible=True)]
                left = ""
            except FinetuneError as error:
                gr.Warning(html.escape(str(error)), duration=None)
                left = question
        yield [left, *session.columns(), session, gr.update(visible=True), gr.update(visible=False)]

    def retry(self, session: WebSession, *settings: Any) -> Iterator[list[Any]]:
        """The last question again."""
        yield from self.ask(session.undo() or "", session, *settings)

    def stop(self, session: WebSession) -> None:
        """The answer that is coming ends here."""
        session.stopped = True

    def undo(self, session: WebSession) -> list[Any]:
        """The last question is back in its box."""
        return [session.undo() or "", *session.columns(), session]

    def reset(self, session: WebSession) -> list[Any]:
        """A new conversation."""
        session.reset()
        return ["", *session.columns(), session]


def _sampling(temperature: float, top_p: float, seed: str | None) -> SamplingParams:
    try:
        return SamplingParams(temperature, top_p, int(seed) if seed and seed.strip() else None)
    except ValueError:
        raise ConfigError(f"seed {seed}: expected a whole number, or nothing") from None


def serve(voices: ChatModels, chat: ChatSession, *, host: str, port: int) -> None:
    """Show the page until Ctrl-C.

    Raises:
        ConfigError: the port is taken, or the host is not an address of this machine.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("no_proxy", "NO_PROXY"):  # the page asks itself whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *ONLY_HERE]))
    with tempfile.TemporaryDirectory(prefix="finetune-chat-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        import gradio as gr

        blocks, words = build_app(voices, chat)
        theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS)
        try:
            blocks.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                footer_links=[], run_history=False, enable_monitoring=False, i18n=words, theme=theme, css=CSS,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error}") from None
        print("\n".join(server_url(host, port)), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
        blocks.close(verbose=False)


def server_url(host: str, port: int) -> list[str]:
    """How to reach the page, line by line."""
    if host not in ONLY_HERE:
        return [
            f"the page is at http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}",
            "anyone who reaches this machine can use it: there is no password. Ctrl-C ends it",
        ]
    user = f"{getpass.getuser()}@{socket.gethostname()}"
    return [
        f"the page is at http://{host}:{port}",
        f"from another machine: ssh -L {port}:127.0.0.1:{port} {user}, then the same address there. Ctrl-C ends it",
    ]
