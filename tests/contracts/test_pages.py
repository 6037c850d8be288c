"""Pages in a real browser, as Lighthouse looks at them: the report, the leaderboard, the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `report`")

from pilotage.leaderboard import COLUMNS, write_board
from pilotage.report import write_report
from pilotage.results import as_csv
from tests.contracts.test_report import CONTRAST, Browser, browser, fill  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
LARGEST = 4_000_000
# what a screen reader would find without a name, and what a page must say of itself
NAMES = """(() => {
  const referred = (e) => (e.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id));
  const name = (e) => (e.getAttribute("aria-label") || e.textContent || e.alt || "").trim()
    || [...(e.labels || []), ...referred(e)].map((l) => l?.textContent || "").join("").trim();
  const poor = [...document.querySelectorAll("a[href], button, input, select, [tabindex='0'], [role=img], img")]
    .filter((e) => e.getClientRects().length && !name(e)).map((e) => e.outerHTML.slice(0, 80));
  if (!document.documentElement.lang) poor.push("no language");
  if (!document.title) poor.push("no title");
  if (!document.querySelector("main")) poor.push("no main");
  if (!document.querySelector("meta[name=viewport]")) poor.push("no viewport");
  if (document.querySelectorAll("h1").length !== 1) poor.push("not one h1");
  for (const cell of document.querySelectorAll("th")) if (!cell.scope) poor.push("no scope: " + cell.textContent);
  return poor;
})()"""
OPENED = "performance.getEntriesByType('navigation')[0].duration"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(fill(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboard of twenty policies, one of them submitted, in twelve environments; one did not run everywhere."""
    folder = tmp_path_factory.mktemp("board")
    rows = []
    for p, policy in enumerate(["hpa", "learned", *(f"policy-{k}" for k in range(18))]):
        for e in range(12):
            for seed in range(4):
                row = dict.fromkeys(COLUMNS, "0") | {
                    "env": f"environment-{e}", "policy": policy, "seed": str(seed), "submitted": str(p == 5),
                    "total_usd": str(10 * (1 + 0.3 * ((p * 7 + e * 3) % 5 - 1)) * (1 + 0.02 * ((seed * p) % 3))),
                    "in_time": str(1000 - p * e), "finished": "1000", "policy_sha256": "ab" * 32,
                    "note": "cannot run here" if (p, e) == (7, 3) else "",
                }  # fmt: skip
                rows.append(row)
    (folder / "runs.csv").write_text(as_csv(rows))
    write_board(
        folder, rows, {"seeds": [1, 4], "command": "pilotage leaderboard", "commit": "0" * 40, "dirty": True}
    )
    return folder / "index.html"


@pytest.mark.parametrize("which", ["report", "board"])
def test_it_is_small_opens_at_once_and_everything_has_a_name(
    which: str,
    browser: Browser,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    page: Path = request.getfixturevalue(which)
    assert page.stat().st_size < LARGEST
    times_ms = []
    for _ in range(5):  # others may use this machine: the best of five
        browser.open(page, 1280)
        times_ms.append(browser.ask(OPENED))
    assert min(times_ms) < 1000
    assert browser.ask(NAMES) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_leaderboard_is_readable(browser: Browser, board: Path, width: int, dark: bool) -> None:  # noqa: F811
    browser.complaints.clear()
    browser.open(board, width, dark=dark)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth"), "the page overflows sideways"
    assert browser.ask(CONTRAST) == []
    assert browser.ask("document.querySelectorAll('#ranking tbody tr').length") == 20
    assert browser.ask("document.querySelector('#ranking tbody tr th').textContent").strip()


def test_the_leaderboard_is_reached_by_keyboard(browser: Browser, board: Path) -> None:  # noqa: F811
    browser.open(board, 1280)
    reached = []
    for _ in range(12):
        browser.press("Tab")
        reached.append(
            browser.ask(
                "document.activeElement.textContent.trim().slice(0, 24) + document.activeElement.ariaLabel"
            )
        )
    assert reached[0].startswith("Skip to the ranking")
    assert any(text.endswith("Ranking") for text in reached)  # tables that scroll can be scrolled


@pytest.mark.full
def test_the_documentation_opens_without_a_complaint(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = ["index.html", "tutorial/index.html", "reference-scenario/index.html", "results/index.html"]
    for name in pages:
        browser.complaints.clear()
        browser.open(tmp_path / "site" / name, 1280)
        assert [said for said in browser.complaints if not said.startswith("request to data:")] == [], name
        assert browser.ask("[...document.images].filter((i) => i.complete && !i.naturalWidth).length") == 0
