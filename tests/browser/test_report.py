"""The report in a real Chromium without a network: drawn, usable, readable in light and dark and on a phone."""

import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Error

from finetune import diagnostics
from finetune.diagnostics import Failure
from finetune.report import live_server, read_run, render_report
from tests.helpers.browsers import PAPER_DARK, PAPER_LIGHT, count, open_page, pixels
from tests.helpers.logs import logged
from tests.helpers.preview_pages import CHINESE, HOSTILE
from tests.helpers.reported import answer, card, line, output_dir

pytestmark = pytest.mark.browser
SERIES_LIGHT, SERIES_DARK = (0x2F, 0x6F, 0xDB), (0x74, 0xA3, 0xFF)
LEARNED_LIGHT, LEARNED_DARK = (0xD5, 0xF2, 0xDE), (0x12, 0x3A, 0x25)
PLOTS = [
    "loss", "learning_rate", "grad_norm", "supervised_tokens_per_second", "peak_memory_bytes", "step_seconds", "mfu",
    "loss_by_source", "loss_by_turn",
]  # fmt: skip


def lines(count: int = 30):
    groups = {"loss_by_source": {"a.json": 1.0, "b.json": 2.0}, "loss_by_turn": {"1": 1.0, "2": 2.0}}
    found = [line(step, **groups) for step in range(1, count + 1)]
    return [*found[:10], {"step": 10, "eval_loss": 3.3}, *found[10:]]


def a_run(folder: Path, **changes) -> Path:
    values = {
        "lines": lines(),
        "cards": [card(0, "Who are you?", "I am Nori."), card(1, "请介绍杭州。", CHINESE)],
        "answers": [
            answer("Who?", "I am a model.", "I am Nori."),
            answer("你是谁？", "我是一个人工智能。", "我是 Nori。"),
        ],
        "ledger": [{"source": "a.json", "row": 9, "id": 9, "status": "cut", "reason": "too long"}],
    }
    return output_dir(folder, **{**values, **changes})


def until(page, expression: str, arg=None) -> None:
    """Wait for an expression to hold; playwright's own way evaluates text in the page, whose policy forbids that."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        with suppress(Error):  # it is just being loaded anew
            if page.evaluate(expression, arg):
                return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


@contextmanager
def shown(tmp_path: Path, *folders: Path, **window):
    """The report of these folders in a browser that has no network; nothing may be complained about."""
    path = tmp_path / "report.html"
    path.write_text(render_report([read_run(folder) for folder in folders]), encoding="utf-8")
    with open_page(offline=True, **window) as page:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        until(page, "document.querySelectorAll('.plot .main-svg').length >= 3")
        yield page
        assert [one for one in said if not one.startswith(("data:", "blob:"))] == []


def drawn(page, plot: str) -> list[dict]:
    """Names, numbers and visibility of the curves that a plot holds."""
    return page.evaluate(
        "id => document.querySelector(`#plot-${id} .drawing`).data.map(one => "
        "({name: one.name, x: [...one.x], y: [...one.y], dash: one.line.dash}))",
        plot,
    )


def test_every_plot_is_drawn_with_the_numbers_of_the_run(tmp_path):
    with shown(tmp_path, a_run(tmp_path / "one")) as page:
        assert page.eval_on_selector_all(".plot", "all => all.map(one => one.id)") == [f"plot-{one}" for one in PLOTS]
        training, evaluation = drawn(page, "loss")
        assert training["x"] == list(range(1, 31)) and training["y"] == [4.0 - step / 10 for step in range(1, 31)]
        assert (evaluation["name"], evaluation["x"], evaluation["y"]) == ("evaluation", [10], [3.3])
        assert [round(one, 6) for one in drawn(page, "peak_memory_bytes")[0]["y"]] == [3.0] * 30
        assert [one["name"] for one in drawn(page, "loss_by_source")] == ["a.json", "b.json"]
        assert [one["name"] for one in drawn(page, "loss_by_turn")] == ["answer 1", "answer 2"]
        titles = "all => [...new Set(all.map(one => one.dataset.title))]"
        assert page.eval_on_selector_all(".modebar-btn", titles) == ["Download plot as a PNG", "Reset axes"]
        paths = page.eval_on_selector_all(
            ".plot .scatterlayer .js-line", "all => all.map(one => one.getAttribute('d'))"
        )
        assert len(paths) == 12 and all(len(path) > 10 for path in paths)


OURS = "h2, h3, dt, button, summary, figcaption, .tiles span, .legend > span, .state, .badge, .plot .xtitle, tr th"


def test_labels_are_in_the_language_of_the_reader_and_the_data_stay(tmp_path):
    folder = a_run(tmp_path / "training", answers=[answer("before", "loss", "after", cut=["after"], hurried=True)])
    diagnostics.write_failure(folder, Failure("error", "the disk is full", run="run-1", also=("x",)))
    with shown(tmp_path, folder, locale="zh-CN") as page:
        texts = "all => all.filter(one => !one.closest('.flags, [translate=no]')).map(one => one.textContent.trim())"
        ours = [text for text in page.eval_on_selector_all(OURS, texts) if text and text not in ("token", "ZeRO")]
        assert [text for text in ours if not re.search("[一-鿿]", text)] == [] and len(ours) > 50
        assert page.locator("h1 span").inner_text() == "training"
        assert page.locator(".asked .text").all_inner_texts() == ["before", "loss", "after", "as it says"]
        assert page.locator(".answer:has(.badge.cut) h3").all_inner_texts() == ["微调后"]
        assert "时间用完" in page.locator(".note", has_text="贪心解码").inner_text()
        assert [one["name"] for one in drawn(page, "loss")] == ["训练", "评估"]
    with shown(tmp_path, folder) as page:
        assert not re.search("[一-鿿]", page.locator("h2").all_inner_texts()[1])


def test_answers_stand_under_the_loss_and_few_steps_have_ticks_at_steps(tmp_path):
    with shown(tmp_path, a_run(tmp_path / "one", lines=[line(step) for step in range(1, 5)]), width=390) as page:
        top = "name => document.querySelector(name).getBoundingClientRect().top"
        places = [page.evaluate(top, name) for name in ("#plot-loss", ".asked", "#plot-grad_norm", ".plan")]
        assert places == sorted(places)
        ticks = "[...document.querySelectorAll('#plot-loss .xtick text')].map(one => one.textContent)"
        until(page, f"{ticks}.join() === '1,2,3,4'")
        edges = "all => all.map(one => one.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all(".plan td", edges)) <= 390


def test_it_can_be_used(tmp_path):
    with shown(tmp_path, a_run(tmp_path / "one", lines=lines(80))) as page:
        assert len(drawn(page, "loss")) == 3, "many steps are smoothed, over the raw curve"
        page.get_by_role("button", name="smooth").click()
        until(page, "document.querySelector('#plot-loss .drawing').data.length === 2")
        page.get_by_role("button", name="tokens").click()
        until(page, "document.querySelector('#plot-loss .drawing').data[0].x[79] === 32000")
        page.get_by_role("button", name="step").click()
        until(page, "document.querySelector('#plot-loss .drawing').data[0].x[79] === 80")
        box = page.locator("#plot-loss .nsewdrag").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#plot-loss .hoverlayer .legend")
        assert "training" in page.locator("#plot-loss .hoverlayer").text_content()
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.9, steps=5)
        page.mouse.up()
        until(page, "document.querySelector('#plot-loss .drawing').layout.xaxis.range[0] > 30")
        page.locator("#plot-loss .legendtoggle").last.click()
        until(page, "document.querySelector('#plot-loss .drawing').data[1].visible === 'legendonly'")
        page.get_by_text("Arguments left at their defaults").click()
        assert page.get_by_text("--report_answers").is_visible()


def test_runs_over_each_other_are_switched_together(tmp_path):
    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two", lines=[line(step, loss=1.0) for step in range(1, 9)])
    with shown(tmp_path, one, two) as page:
        assert [each["name"] for each in drawn(page, "grad_norm")] == ["one", "two"]
        assert [each["dash"] for each in drawn(page, "loss_by_turn")] == ["solid"] * 2
        page.get_by_role("button", name="one").click()
        until(page, "document.querySelector('#plot-grad_norm .drawing').data.length === 1")
        assert [each["name"] for each in drawn(page, "loss")] == ["two"]
        page.get_by_role("button", name="one").click()
        until(page, "document.querySelector('#plot-grad_norm .drawing').data.length === 2")


@pytest.mark.parametrize("kind", ["one", "two", "failed"])
def test_nothing_runs_over_the_edge(tmp_path, kind):
    folders = [a_run(tmp_path / "one", notes=["x" * 300])]
    if kind == "two":
        folders.append(a_run(tmp_path / ("a_very_long_name_" * 6), arguments={"model_name_or_path": "m" * 200}))
    if kind == "failed":
        diagnostics.write_failure(folders[0], Failure("error", "y" * 500, run="run-1", traceback="z" * 500))
    with shown(tmp_path, *folders) as page:
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        for width, least in ((1280, 500), (390, 300)):
            page.set_viewport_size({"width": width, "height": 844})
            until(page, "width => document.documentElement.scrollWidth === width", width)
            drawn = "[...document.querySelectorAll('.plot .main-svg')].map(one => one.getBoundingClientRect().width)"
            until(page, f"([least, width]) => {drawn}.every(one => one > least && one < width)", [least, width])


@pytest.mark.parametrize("dark", [False, True])
def test_what_is_seen_in_light_and_dark(tmp_path, dark):
    paper, series, learned = (
        (PAPER_DARK, SERIES_DARK, LEARNED_DARK) if dark else (PAPER_LIGHT, SERIES_LIGHT, LEARNED_LIGHT)
    )
    with shown(tmp_path, a_run(tmp_path / "one"), width=700, height=800, dark=dark) as page:
        page.wait_for_timeout(300)
        page.screenshot(path=tmp_path / "seen.png", full_page=True)
        rows = pixels(tmp_path / "seen.png")
        assert rows[2][:3] == bytes(paper)
        assert count(rows, series) > 1_500, "the curves are not there"
        assert count(rows, learned) > 6_000, "supervised turns are not there"
        page.emulate_media(color_scheme="light" if dark else "dark")
        until(
            page,
            "colour => document.querySelector('#plot-loss .drawing').data[0].line.color !== colour",
            arg="#{:02x}{:02x}{:02x}".format(*series),
        )


def test_hostile_text_does_not_act(tmp_path):
    folder = a_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        lines=[line(1, loss_by_source={HOSTILE: 1.0, '<a href="https://x.example">x</a>': 2.0}), line(2)],
        cards=[card(0, HOSTILE, HOSTILE)],
        answers=[answer(HOSTILE, HOSTILE, HOSTILE)],
        arguments={"model_name_or_path": HOSTILE, HOSTILE: HOSTILE},
    )
    with shown(tmp_path, folder, folder) as page:
        assert "gone" not in page.title() and "<img src=x" in page.title()
        assert page.evaluate("document.querySelectorAll('img, a, iframe').length") == 0
        legend = page.locator("#plot-loss_by_source .legend").text_content()
        assert "document.title" in legend


def test_no_other_script_runs_and_nothing_is_sent(tmp_path):
    (tmp_path / "report.html").write_text(render_report([read_run(a_run(tmp_path / "one"))]), encoding="utf-8")
    with open_page() as page:
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_selector("#plot-loss .main-svg")
        page.evaluate(
            "() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1';"
            " document.body.append(one); document.body.insertAdjacentHTML('beforeend',"
            ' \'<img src=x onerror="window.ran = 2"><a id=go href="javascript:window.ran = 3">x</a>\'); go.click(); }'
        )
        page.wait_for_timeout(300)
        assert page.evaluate("window.ran === undefined")
        assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.message)") != "sent"
        refused = (
            "new Promise(tell => document.addEventListener('securitypolicyviolation', one => tell(one.blockedURI)))"
        )
        assert page.evaluate(
            f"() => {{ const told = {refused}; fetch('http://127.0.0.1:9/').catch(() => 0); return told; }}"
        )


def test_a_page_that_is_watched_changes_in_place(tmp_path):
    folder = a_run(tmp_path / "one", complete=False)
    path = tmp_path / "report.html"
    arguments = {"every": 0.3, "port": 0}
    watch = threading.Thread(target=live_server.watch, args=([(folder, "one")], path), kwargs=arguments, daemon=True)
    with logged() as messages, open_page() as page:
        watch.start()
        while len(messages) < 2 and watch.is_alive():
            watch.join(0.05)
        page.goto(next(word for word in messages[1].split() if word.startswith("http")).rstrip(";"))
        page.wait_for_selector("#plot-loss .main-svg")
        page.evaluate("Plotly.relayout(document.querySelector('#plot-loss .drawing'), {'xaxis.range': [5, 15]})")
        page.get_by_text("Arguments left at their defaults").click()
        page.evaluate("scrollTo(0, 600)")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(31)) + "\n")
        until(page, "document.querySelector('#plot-loss .drawing').data[0].x.length === 31")
        assert page.evaluate("document.querySelector('#plot-loss .drawing').layout.xaxis.range") == [5, 15]
        assert page.evaluate("scrollY") == 600
        (folder / "failure.json").write_text(json.dumps(Failure("error", "the disk is full", run="run-1").to_json()))
        page.wait_for_selector(".trouble")
        assert page.locator(".trouble").text_content().count("the disk is full") == 1
    watch.join(20)
    assert not watch.is_alive()
