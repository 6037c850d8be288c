"""Every code block of the README and the docs runs, and the public texts name what exists."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the same commands, in a size for a test
SMALLER = {r"--trials \d+": "--trials 2", r"--steps \d+": "--steps 2048", r"--seeds \d+": "--seeds 2"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# the tutorial is followed to the letter by test_first_hour
@pytest.mark.full
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "tutorial.md"], ids=lambda page: page.name
)
def test_code_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        if "[[pools]]" in text:
            (tmp_path / "mine.toml").write_text(text)
    for text in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    for text in blocks(page, "bash"):
        for line in text.splitlines():
            command = line.partition("#")[0].strip()
            name, _, rest = command.partition(" ")
            if not name.endswith("pilotage"):
                assert name in {"", "make", "pip", "python"}, (
                    f"{page.name}: {line}"
                )  # a file is a block above
                continue
            for pattern, smaller in SMALLER.items():
                rest = re.sub(pattern, smaller, rest)
            done = subprocess.run(
                [sys.executable, "-m", "pilotage", *shlex.split(rest)],
                cwd=tmp_path, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*/README.md")], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", text)) <= targets


def test_every_experiment_and_environment_is_listed() -> None:
    listed = (ROOT / "experiments" / "README.md").read_text()
    for path in [*(ROOT / "experiments").glob("*.toml"), *(ROOT / "experiments").glob("*.py")]:
        assert f"`{path.stem}`" in listed
    listed = (ROOT / "envs" / "README.md").read_text()
    for path in (ROOT / "envs").glob("*.toml"):
        assert f"`{path.stem}`" in listed


SHOWN = {
    "hpa": "hpa",
    "hpa, tuned": "hpa tuned",
    "predictive, tuned": "predictive tuned",
    "best tuned rule with the same features": "anticipate tuned",
    "**learned**": "foresight",
    "best constant size, known in hindsight": "static, best in hindsight",
    "clairvoyant schedule": "clairvoyant schedule",
}


def test_the_table_of_the_readme_is_what_the_experiment_printed() -> None:
    with (ROOT / "results" / "scaling" / "leaderboard.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    text = (ROOT / "README.md").read_text().replace("**", "")
    for shown, policy in SHOWN.items():
        row = rows[policy]
        met = f"{100 * float(row['attainment']):.2f} %" if row["attainment"] else ""
        over = f"{float(row['over_hindsight']):.2f} x | {float(row['over_bound']):.2f} x"
        cells = " | ".join((shown.replace("**", ""), f"{float(row['usd_per_window']):.2f}", met, over))
        assert f"| {cells} |".replace("|  |", "| |") in text, cells
