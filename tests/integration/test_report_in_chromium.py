"""The demo's report in a real browser: no error, every picture loaded, scores and regions to be seen."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from colqwen3_retrievers.demo.run import run_demo
from colqwen3_retrievers.retrieval.similarity_maps import FRAME_COLOUR

NAMES = (os.environ.get("CHROME_PATH", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if name and (path := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here; CHROME_PATH names one")

WHAT_IS_SHOWN = """JSON.stringify({
  images: [...document.images].map(i => [i.complete, i.naturalWidth]),
  scores: [...document.querySelectorAll('figcaption .dim')].map(s => s.textContent),
  sections: document.querySelectorAll('section[id]').length,
  regions: [...document.querySelectorAll('#q1 .region')].map(r => {
    const b = r.getBoundingClientRect(), p = r.parentElement.getBoundingClientRect();
    return {left: b.left, top: b.top + scrollY, right: b.right, bottom: b.bottom + scrollY,
            inside: b.left >= p.left && b.right <= p.right + 1 && b.top >= p.top && b.bottom <= p.bottom + 1};
  }),
  width: document.documentElement.scrollWidth,
  height: document.querySelector('#q1').getBoundingClientRect().bottom + scrollY,
})"""


class Tab:
    """A tab of a headless browser, spoken to through the DevTools protocol; events are kept."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number, self.events = socket, 0, list[dict[str, Any]]()

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": values}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def wait_for(self, event: str) -> None:
        while all(each.get("method") != event for each in self.events):
            self.events.append(json.loads(self.socket.recv(timeout=60)))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    profile = tmp_path_factory.mktemp("profile")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--hide-scrollbars", "--window-size=1280,1000", "--remote-debugging-port=0", f"--user-data-dir={profile}",
        "--disable-background-networking", "about:blank",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            port, until = profile / "DevToolsActivePort", time.monotonic() + 60
            while not (port.exists() and len(port.read_text().splitlines()) == 2):
                assert browser.poll() is None, "the browser ended at once"
                assert time.monotonic() < until, "the browser did not start"
                time.sleep(0.1)
            number, path = port.read_text().splitlines()
            root = f"ws://127.0.0.1:{number}"
            with connect(f"{root}{path}", max_size=None, proxy=None) as whole:
                [target] = [
                    each["targetId"] for each in Tab(whole).call("Target.getTargets")["targetInfos"]
                    if each["type"] == "page"
                ]  # fmt: skip
                with connect(f"{root}/devtools/page/{target}", max_size=None, proxy=None) as socket:
                    yield Tab(socket)
        finally:
            browser.terminate()


def test_the_report_opens_without_an_error_and_shows_pages_scores_and_regions(tab: Tab, tmp_path: Path) -> None:
    result = run_demo(tmp_path / "out")
    for domain in ("Page", "Runtime", "Log", "Network"):
        tab.call(f"{domain}.enable")
    tab.call("Page.navigate", url=result.report.as_uri())
    tab.wait_for("Page.loadEventFired")
    found = json.loads(tab.call("Runtime.evaluate", expression=WHAT_IS_SHOWN)["result"]["value"])

    said = [each["method"] for each in tab.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"} & {
        *said
    }
    assert found["sections"] == result.n_questions
    assert len(found["images"]) == 3 * result.n_questions
    assert all(complete and width > 0 for complete, width in found["images"])
    assert len(found["scores"]) == len(found["images"])
    assert all(float(score.removeprefix("score ")) > 0 for score in found["scores"])
    assert found["regions"]
    assert all(region["inside"] for region in found["regions"])
    assert found["width"] <= 1280

    clip = {"x": 0, "y": 0, "width": 1280, "height": found["height"], "scale": 1}
    shot = tab.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")).astype(int)
    assert picture.std() > 10, "blank"
    framed = np.abs(picture - FRAME_COLOUR).max(axis=2) < 12
    for region in found["regions"]:
        left, right = int(np.ceil(region["left"])), int(region["right"])
        top, bottom = int(np.ceil(region["top"])), int(region["bottom"])
        for edge in (framed[top : top + 2, left:right], framed[bottom - 2 : bottom, left:right]):
            assert edge.any(axis=0).mean() > 0.9, region
        middle = framed[top + 4 : bottom - 4, left + 4 : right - 4]
        assert not middle.size or middle.mean() < 0.5, f"a frame, not a block: {region}"
