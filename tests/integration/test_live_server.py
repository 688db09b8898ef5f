"""A run in progress, watched: what is served follows the files, to this host alone, and ends with the run."""

import gzip
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.report import live_server
from finetune.run_dir import run_json
from finetune.utils.errors import ConfigError
from tests.helpers.logs import logged
from tests.helpers.paths import ROOT
from tests.helpers.ranks import free_port
from tests.helpers.reported import line, output_dir

START = "import sys; from finetune.__main__ import main; main()"


class Watch:
    """`finetune report FOLDER --watch`, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = [sys.executable, "-c", START, "report", folder, "--watch", "--every", "0.2", "--port", self.port]
        self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def get(self, path: str, **headers: str) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            is_packed = answer.headers.get("Content-Encoding") == "gzip"
            return answer.status, dict(answer.headers), gzip.decompress(content) if is_packed else content
        finally:
            connection.close()

    def now(self) -> dict:
        return json.loads(self.get("/now")[2])

    def wait_for(self, wanted, seconds: float = 20.0):
        """What `wanted` returns, once that is something."""
        until, refused = time.monotonic() + seconds, None
        while True:
            try:
                if found := wanted():
                    return found
            except (ConnectionError, http.client.HTTPException) as error:
                refused = error  # a server that is not there yet is asked again
            assert time.monotonic() < until and self.process.poll() is None, f"it never came; last: {refused!r}"
            time.sleep(0.05)


@pytest.fixture
def watching_run(tmp_path):
    folder = output_dir(tmp_path / "one", [line(1), line(2)], complete=False)
    watch = Watch(folder)
    yield folder, watch
    watch.process.kill()
    watch.process.communicate()


def test_the_page_follows_the_run_and_ends_with_it(watching_run):
    folder, watch = watching_run
    watch.wait_for(lambda: watch.now()["numbers"]["runs"][0]["x"]["step"] == [1, 2])
    status, headers, page = watch.get("/")
    assert status == 200 and b'data-every="0.2"' in page and b"connect-src 'self'" in page
    assert (folder / "report.html").read_text("utf-8").count("connect-src") == 0

    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(3, loss=0.125)) + "\n")
    news = watch.wait_for(
        lambda: (found := watch.now())["numbers"]["runs"][0]["columns"]["loss"][-1] == 0.125 and found
    )
    assert not news["ended"] and "0.125" in news["parts"]["head"]

    run_json.update_run_json(folder, {"completed": True, "result": {"steps": 3}})
    run_json.mark_complete(folder, "run-1")
    assert watch.wait_for(lambda: (found := watch.now())["ended"] and found)["numbers"]["runs"][0]["x"]["step"][-1] == 3
    out, _ = watch.process.communicate(timeout=60)
    assert watch.process.returncode == 0 and out.endswith("report.html: the run has ended\n")
    html = (folder / "report.html").read_text("utf-8")
    assert "data-every=" not in html and "Complete after 3 steps." in html


def test_only_this_host_under_its_own_name_and_only_the_page(watching_run):
    folder, watch = watching_run
    assert watch.wait_for(lambda: watch.get("/"))[0] == 200
    assert watch.get("/", Host="localhost:9000")[0] == 200
    for path, headers in (
        ("/", {"Host": "evil.example"}),
        ("/now", {"Host": "evil.example:1"}),
        ("/", {"Host": ""}),
        ("/now", {"Origin": "http://evil.example"}),
    ):
        status, _, content = watch.get(path, **headers)
        assert (status, content) == (403, b""), (path, headers)
    for path in ("/run.json", "/../run.json", "/report.html"):
        assert watch.get(path)[::2] == (404, b""), path
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True).stdout
    assert re.findall(rf"(\S+):{watch.port}\s", listening) in ([], ["127.0.0.1"])
    watch.process.send_signal(signal.SIGINT)
    out, _ = watch.process.communicate(timeout=60)
    assert watch.process.returncode == 0 and "no longer watched" in out
    assert (folder / "report.html").is_file()


def test_a_run_that_has_ended_is_not_watched(tmp_path):
    folder = output_dir(tmp_path / "one")
    with logged() as said:
        live_server.watch([(folder, "one")], tmp_path / "page.html", every=1.0, port=0)
    assert said == [f"{tmp_path / 'page.html'}: the run has ended"]
    assert "data-every=" not in (tmp_path / "page.html").read_text("utf-8")


def test_a_port_that_is_taken(tmp_path):
    folder = output_dir(tmp_path / "one", complete=False)
    with (
        live_server._serving(0) as server,
        pytest.raises(ConfigError, match=f"--port {server.server_port}: Address already"),
    ):
        live_server.watch([(folder, "one")], tmp_path / "a.html", every=1.0, port=server.server_port)


def test_a_run_that_failed_or_was_stopped_has_ended(tmp_path):
    one, two = (output_dir(tmp_path / name, complete=False) for name in ("one", "two"))
    assert not live_server.has_ended(one)
    (one / "failure.json").write_text("{}")
    run_json.update_run_json(two, {"starts": run_json.ended(two, "stopped by SIGTERM")})
    assert live_server.has_ended(one) and live_server.has_ended(two)
