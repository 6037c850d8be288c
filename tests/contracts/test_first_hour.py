"""The first hour of a newcomer: the tutorial is followed to the letter, in order, with its own file names and sizes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = re.compile(
    r"Save this as `(?P<file>[\w.]+)`|^```(?P<language>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
# minutes from the start, as the project asks of itself; an installation comes before it
BY = {"simulate quickstart": 5, "evaluate mine.toml": 10, "queue_rule.py": 20}


def follow(page: Path, folder: Path) -> list[tuple[str, str, float]]:
    """Saves what is to be saved, runs what is to be run; (command, what it printed, minutes from the start)."""
    began, done, name = time.monotonic(), [], ""
    for step in STEP.finditer(page.read_text()):
        if step["file"]:
            name = step["file"]
        elif step["language"] in ("toml", "python"):
            assert name, "the page does not say under which name this is saved"
            (folder / name).write_text(step["text"])
            name = ""
        elif step["language"] == "bash":
            for command in step["text"].splitlines():
                program, *arguments = command.split()
                if program in ("pip", "make"):
                    continue  # that is how this test's own environment was made
                assert program in ("pilotage", "python"), command
                line = [sys.executable, *(["-m", "pilotage"] if program == "pilotage" else []), *arguments]
                run = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=1200)
                assert run.returncode == 0, f"{command}\n{run.stderr}"
                done.append((command, run.stdout, (time.monotonic() - began) / 60))
    return done


@pytest.mark.full
def test_the_tutorial_as_it_stands(tmp_path: Path) -> None:
    done = follow(ROOT / "docs" / "tutorial.md", tmp_path)
    assert len(done) == 4
    for command, _, minutes in done:
        for words, within in BY.items():
            if words in command:
                assert minutes < within, f"{command}: {minutes:.1f} minutes from the start"
    printed = {command: text for command, text, _ in done}
    assert any("x bound" in text and "lower bound" in text for text in printed.values())
    (verdict,) = re.findall(r"saving (-?\d+) % \[(-?\d+), (-?\d+)\]", printed["python queue_rule.py"])
    mean, low, high = map(int, verdict)
    assert low <= mean <= high
    assert low > 0, "the page's policy is cheaper than hpa in these runs, as it is meant to be"
