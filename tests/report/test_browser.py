"""The page in a real browser, driven over Chromium's debugging pipe: no errors, no requests, controls that work."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.report.page import MAXIMUM_BYTES
from preceptor.result import write_page
from tests.report.systems import write_system_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


class Browser:
    """Commands and events as zero-terminated JSON over two pipes, which the browser knows as descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()

        def connect() -> None:
            commands, answers = os.dup(read_commands), os.dup(write_answers)
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *arguments, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.number = 0
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], 60)[0], "the browser has been silent for a minute"
            received = os.read(self.answers, 1 << 20)
            assert received, "the browser has gone"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def width(self, pixels: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 600
        )

    def complaints(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def test_the_page_works_and_asks_nobody(browser: Browser, build_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_page(build_run(tmp_path / "run"))
    browser.open(page.as_uri())
    where = "document.getElementById('where').textContent"
    visible = "[...document.querySelectorAll('#viewer .step')].filter((s) => !s.hidden).length"
    assert browser.value(where) == "step 1 of 8"
    assert browser.value(visible) == 1

    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value(where) == "step 3 of 8"
    # What was read before is struck out, and nothing else, however unlikely it was.
    assert browser.value("document.querySelectorAll('#viewer .step:not([hidden]) .keys .gone').length") == 2
    browser.press("ArrowLeft")
    assert browser.value(where) == "step 2 of 8"
    browser.value("document.querySelectorAll('.path button')[7].click()")
    assert browser.value(where) == "step 8 of 8"
    assert browser.value("document.getElementById('next').disabled") is True

    # Every arm, article and episode opens, the hostile one among them.
    opened = browser.value(
        """(() => {
          let opened = 0;
          const choose = (id, value) => {
            const select = document.getElementById(id);
            select.value = value;
            select.dispatchEvent(new Event("change"));
          };
          const values = (id) => [...document.getElementById(id).options].map((option) => option.value);
          for (const arm of values("arm")) {
            choose("arm", arm);
            for (const article of values("article")) {
              choose("article", article);
              for (const episode of values("episode")) {
                choose("episode", episode);
                if (document.querySelectorAll("#viewer .step").length >= 7) opened++;
              }
            }
          }
          return opened;
        })()"""
    )
    assert opened == 19
    browser.value("document.getElementById('article').value = 'hostile'")
    browser.value("document.getElementById('article').dispatchEvent(new Event('change'))")
    assert "<script>document.title='owned'</script>" in browser.value("document.getElementById('viewer').textContent")

    # The pointer reads a curve.
    browser.value("document.querySelector('[data-chart=reward] svg').scrollIntoView({block: 'center'})")
    box = browser.value(
        "(() => { const b = document.querySelector('[data-chart=reward] svg').getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] / 2, y=box[1] + box[3] / 2)
    assert browser.value("document.querySelector('[data-chart=reward] .readout').textContent").startswith("at 18")

    assert browser.value("document.title") == "run · Preceptor"
    assert browser.value("document.querySelectorAll('img, svg [onload], script').length") == 2
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.documentElement.scrollWidth <= window.innerWidth") is True

    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    # The keyboard reads it too, without moving the trajectory, and leaving it brings the last values back.
    last = browser.value("document.querySelector('[data-chart=reward] .value').textContent")
    browser.value("document.querySelector('[data-chart=reward] svg').focus()")
    browser.press("Home")
    assert browser.value("document.querySelector('[data-chart=reward] .at').textContent") == "at 1"
    browser.press("ArrowRight")
    assert browser.value("document.querySelector('[data-chart=reward] .at').textContent") == "at 2"
    assert browser.value(where) == "step 1 of 7"
    browser.value("document.activeElement.blur()")
    assert browser.value("document.querySelector('[data-chart=reward] .at').textContent") == ""
    assert browser.value("document.querySelector('[data-chart=reward] .value').textContent") == last

    browser.width(400)
    assert browser.value("document.documentElement.scrollWidth") == 400  # nothing sticks out on a telephone
    browser.width(1280)


SHOWN = {
    "reading": ("A reading, step by step", "Query entropy"),
    "bandit": ("Probability of 'bean' under each prompt", "Crossed contexts"),
    "curriculum": ("Weights of the datasets", "static no noise"),
    "surgery": ("Edits by layer and matrix", "layer 1 output"),
}


@pytest.mark.parametrize("system", SHOWN)
def test_ten_thousand_steps_open_at_once(
    system: str, browser: Browser, build_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / system
    if system == "reading":
        build_run(run, num_steps=10_000, num_episodes=400)
    else:
        write_system_run(run, system, num_steps=10_000)
    page = write_page(run)
    assert page.stat().st_size < MAXIMUM_BYTES
    for pixels in (1280, 400):
        browser.width(pixels)
        browser.open(page.as_uri())
        took = browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd")
        assert took < 2_000, f"{took} ms"
        assert browser.requests() == [page.as_uri()]
        assert browser.complaints() == []
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth") is True
    text = browser.value("document.body.textContent")
    assert all(words in text for words in SHOWN[system])
