"""report.html in a real browser, where one is at hand: `pip install PyQt6-WebEngine` (Chromium, without a display).

The browser runs in a child process: this file as a script.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmquant
from llmquant.report.data import RunReport
from llmquant.report.html import make_html
from llmquant.report.plain import parse
from llmquant.report.verdict import verdict

pytestmark = pytest.mark.usefixtures("drawn")

FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 640, "eval_seq_len": 64}
EVIL = "x.<script>alert(1)</script><img src=x onerror=alert(2)>" + "w" * 200
LOOK = """(() => {
  const count = () => document.getElementById("count").textContent, counts = [count()];
  const filter = document.getElementById("filter");
  filter.value = "UP_PROJ";
  filter.dispatchEvent(new Event("input"));
  counts.push(count());
  const wide = [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1);
  return JSON.stringify({
    verdict: document.getElementById("verdict").textContent, counts: counts, wide: wide.map(e => e.outerHTML),
    page: document.documentElement.scrollWidth, window: innerWidth,
    paper: getComputedStyle(document.body).backgroundColor, drawn: document.querySelector("svg").clientHeight});
})()"""


def child(page: str, width: str) -> None:
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(["browser"])
    said: list[str] = []

    class Page(QWebEnginePage):  # type: ignore[misc]
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
            said.append(message)

        def javaScriptAlert(self, origin: Any, message: str) -> None:  # noqa: N802
            said.append(message)

    view = QWebEngineView()
    shown = Page(view)
    view.setPage(shown)
    view.resize(int(width), 1000)
    view.show()
    view.load(QUrl.fromLocalFile(page))

    def finish(found: str) -> None:
        print("FOUND " + json.dumps(json.loads(found) | {"said": said}))
        application.quit()

    view.loadFinished.connect(lambda _: QTimer.singleShot(1000, lambda: shown.runJavaScript(LOOK, finish)))
    QTimer.singleShot(60_000, application.quit)
    application.exec()


def look_at(page: Path, width: int, dark: bool = False) -> dict[str, Any]:
    flags = "--no-sandbox --disable-gpu" + (" --blink-settings=preferredColorScheme=0" if dark else "")
    settings = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    settings["QTWEBENGINE_CHROMIUM_FLAGS"] = flags
    command = [sys.executable, __file__, str(page), str(width)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    return found


@pytest.mark.skipif(importlib.util.find_spec("PyQt6") is None, reason="needs a browser: pip install PyQt6-WebEngine")
def test_the_page_holds_in_a_browser(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    data = llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), tmp_path / "out").data
    data["layers"][0]["notes"] = [EVIL]
    data["tensors"][0]["name"] = data["model"]["id"] = data["evaluation"]["dataset"] = EVIL
    page = tmp_path / "page.html"
    facts = parse(RunReport, data, "report.json")
    page.write_text(make_html(EVIL, facts), "utf-8")
    papers = []
    for width, dark in ((400, False), (1400, False), (400, True)):
        found = look_at(page, width, dark)
        assert found["said"] == []
        assert found["verdict"] == verdict(facts)
        assert found["counts"] == [f"{len(data['tensors'])} of {len(data['tensors'])}", f"3 of {len(data['tensors'])}"]
        assert found["wide"] == []
        assert found["page"] <= found["window"] == width
        assert found["drawn"] > 100
        papers.append(found["paper"])
    assert papers[0] == papers[1] != papers[2]


if __name__ == "__main__":
    child(*sys.argv[1:])
