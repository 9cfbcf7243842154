"""The page in a browser: clicked heads sort, a phone does not scroll it sideways, print opens what is folded."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparseft.files import atomic
from sparseft.report.page import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def browse(page: Path, *options: str) -> str:
    """What headless Chromium makes of a page: the document once its scripts have run, with `--dump-dom`."""
    assert BROWSER is not None
    profile = page.parent / "profile"
    usual = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}")
    done = subprocess.run(
        [BROWSER, *usual, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def tell(page: Path, script: str) -> Any:
    """What a script, an expression, finds on the page once its own has run: run without the page's policy, by which no
    other would."""
    content, count = re.subn(r"<meta http-equiv=[^>]*>", "", page.read_text())
    assert count == 1
    told = (
        f'<pre id="told"></pre><script>document.getElementById("told").textContent = JSON.stringify({script})</script>'
    )
    other = page.with_name("told.html")
    other.write_text(content.replace("</body>", f"{told}</body>"))
    found = re.search(r'<pre id="told">(.*?)</pre>', browse(other, "--dump-dom"), re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs side by side, with many settings that differ."""
    root = tmp_path_factory.mktemp("report")
    folders = []
    for name, loss, steps in (("ten", 0.5, 10), ("nine", 1.5, 9), ("none", None, 100)):
        folder = root / name
        folder.mkdir()
        folders.append(folder)
        text = "".join(f"a_setting_with_a_long_name_{i}: {name}/{'very/' * 12}long{i}\n" for i in range(40))
        (folder / "config.yaml").write_text(text)
        summary = {"method": "m", "model": "x", "dataset": "d", "steps": steps, "eval_loss_after": loss, "seed": 0}
        atomic.write_json(folder / "summary.json", summary)
    build_report(folders, root / "report.html")
    return root / "report.html"


def test_a_click_on_a_head_sorts(page: Path) -> None:
    """Numbers first from the largest, names from the first; again: the other way; missing values always last."""
    rows = "[...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim())"
    found = tell(
        page,
        f"""(() => {{
          const table = document.querySelector("table.sorts");
          const heads = [...table.tHead.rows[0].cells];
          const told = [{rows}];
          for (const name of ["steps", "steps", "loss after", "loss after", "run", "run"]) {{
            const head = heads.find((head) => head.textContent === name);
            head.querySelector("button").click();
            told.push([head.getAttribute("aria-sort"), ...{rows}]);
          }}
          return told;
        }})()""",
    )  # fmt: skip
    assert found == [
        ["ten", "nine", "none"],
        ["descending", "none", "ten", "nine"],
        ["ascending", "nine", "ten", "none"],
        ["descending", "nine", "ten", "none"],  # without a loss
        ["ascending", "ten", "nine", "none"],
        ["ascending", "nine", "none", "ten"],
        ["descending", "ten", "none", "nine"],
    ]


def test_its_own_script_runs_under_its_policy(page: Path) -> None:
    dom = browse(page, "--dump-dom")
    assert '<button type="button">' in dom and '<p class="hint">Click on a head to sort.</p>' in dom


def test_a_phone_does_not_scroll_the_page_sideways(page: Path) -> None:
    """In a frame as wide as a phone, with all that is folded open."""
    inside = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text()).replace("<details>", "<details open>")
    frame = page.with_name("phone.html")
    frame.write_text(
        f'<body><iframe width="360" height="700" srcdoc="{html.escape(inside)}"></iframe><pre id="told"></pre><script>'
        'onload = () => { const page = document.querySelector("iframe").contentDocument.documentElement;'
        'document.getElementById("told").textContent = `${page.clientWidth} ${page.scrollWidth}`; }</script></body>'
    )
    width, scrolled = map(int, re.search(r'<pre id="told">(\d+) (\d+)</pre>', browse(frame, "--dump-dom")).groups())
    assert 300 < width <= 360 and scrolled == width


def test_what_is_folded_is_printed(page: Path) -> None:
    assert "<details>" in page.read_text()
    pages = []
    for name, content in (
        ("folded", page.read_text()),
        ("open", page.read_text().replace("<details>", "<details open>")),
    ):
        other, pdf = page.with_name(f"{name}.html"), page.with_name(f"{name}.pdf")
        other.write_text(content)
        browse(other, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
        pages.append(len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())))
    assert pages[0] == pages[1] > 1
