"""The report: whole from any results folder, safe, deterministic, and readable in a real browser."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")

from pilotage.figures import front_of, nines
from pilotage.measurements import Interval, Row, attained, latency, money, percent, ranges
from pilotage.report import ReportError, draw_figures, draw_timeline, write_report
from pilotage.results import provenance
from pilotage.world.spec import SpecError

POLICIES = ("hpa", "kpa", "predictive", "hpa tuned", "predictive tuned", "ppo")
FUTURE = "clairvoyant schedule"
SHARE_OF_HPA = {"kpa": 1.06, "predictive": 1.01, "hpa tuned": 0.93, "predictive tuned": 0.88, "ppo": 0.855}
GROUPS = {"twitter": 61.2, "azure-functions": 182.5, "azure-chat": 1480.0, "all": 574.6}
HOSTILE = (
    '<script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>$\\frac{$ & "\'_--> \x00'
)


# --- a results folder as a study writes it -----------------------------------------------------------------
def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + 1.1 * half}


def evaluation(group: str, hpa_usd: float, k: int) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    rows, share = [], {"hpa": 1.0, FUTURE: 0.55}
    for p, policy in enumerate((*POLICIES, FUTURE)):
        mean = hpa_usd * (share.get(policy) or SHARE_OF_HPA[policy] + 0.03 * rng.standard_normal())
        if group == "azure-chat" and policy == "ppo":
            mean = 1.04 * hpa_usd  # dearer than the baseline in one group
        share[policy] = mean / hpa_usd
        missed = (0.011, 0.006, 0.004, 0.003, 0.0022, 0.0018, 0.0004)[p] * (1 + 0.3 * k)
        late, dropped = 0.12 * mean * missed / 0.011, 0.03 * mean * missed / 0.011
        usd = {
            "nodes": mean - late - dropped,
            "late": late,
            "dropped": dropped,
            "errors": 0.0,
            "retraining": 0.0,
        }
        rows.append(
            {
                "policy": policy,
                "total_usd": interval(mean, 0.06 * mean),
                "usd": usd,
                "slo_attainment": 1 - missed,
                "latency_ms": {"p50": 128.0, "p95": 247.0 + 20 * p, "p99": 641.0 - 30 * p},
                "requests": 8_728_847,
                "dropped": int(5e5 * missed),
                "replica_hours": 9.1 * mean,
                "node_hours": 9.1 * mean,
                "accuracy": 1.0,
                "over_bound": interval(mean / (0.5 * hpa_usd), 0.08),
            }
        )
    versus = [
        {"policy": a, "baseline": b, "saving": interval(1 - share[a] / share[b], 0.025)}
        for i, a in enumerate((*POLICIES, FUTURE))
        for b in POLICIES[:i]
    ]
    return {
        "group": group,
        "env": "real-traffic",
        "seeds": list(range(1_006_000 + 100 * k, 1_006_012 + 100 * k)),
        "hours": 24.0,
        "policies": rows,
        "versus": versus,
        "bound_usd": {"lower": 0.5 * hpa_usd, "schedule": 0.55 * hpa_usd},
        "engine": {"requests_per_s": 6.1e6},
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def timeline_rows(policy: str, lag: int, spare: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    hours = np.arange(1, 2881) * 30 / 3600
    rate = 60 + 40 * np.sin((hours - 8) / 24 * 2 * math.pi) + 6 * rng.standard_normal(len(hours))
    for start in (9.3, 13.8, 19.1):
        since = np.clip(hours - start, 0, None)
        rate += 110 * np.exp(-since / 0.25) * np.clip(since / 0.05, 0, 1)
    known = np.concatenate([np.full(lag, rate[0]), rate])[: len(rate)]
    wanted = np.ceil(np.convolve(np.pad(known, (9, 0), mode="edge"), np.ones(10) / 10, "valid") * spare / 22)
    load = rate / (22 * wanted)
    p95_s = np.minimum(0.2 + 0.1 * load + 2.5 * np.clip(load - 0.95, 0, None), 4.8)
    late = np.where(p95_s > 0.75, 0.1 * rate * 30, 0).astype(int)
    return [
        {
            "policy": policy,
            "hour": round(float(hours[i]), 5),
            "arrival_rate": round(float(max(0.0, rate[i])), 3),
            "replicas_ready": int(wanted[i]),
            "replicas_starting": int(max(0, wanted[min(i + 2, len(rate) - 1)] - wanted[i])),
            "latency_p95_s": round(float(p95_s[i]), 4),
            "queue_length": int(20 * max(0.0, float(load[i]) - 0.9)),
            "late": int(late[i]),
            "dropped": 0,
            "usd": round(float(wanted[i]) * 1.2 / 120 + 0.002 * int(late[i]), 6),
            "slo_s": 0.75,
            "decision": f"+1: {policy} saw {rate[i]:.0f} requests/s" if i % 97 == 5 else "",
        }
        for i in range(len(rate))
    ]


RUN = {
    "experiment": "real_traffic",
    "title": "Real traffic: what learning saves on Twitter, Azure Functions and Azure chat",
    "question": "Tuned and trained on some days of two services, what does a policy save on later days, and on a"
    " third kind of traffic that it never saw?",
    "command": "pilotage study experiments/real_traffic.toml --data ../shared/data",
    "commit": "2d16fb756b76b1ed3906192f6b76544e675e9539",
    "dirty": True,
    "scenario": "real-traffic",
    "scenario_sha256": "c16ae8a101caca0bda89db847608c3be4e3db2d61abed5ea1b2c1b7144afc58d",
    "experiment_sha256": "0af616e4f93c8dc7b808c0a289bc8ce070bd4ea83a9e5e9b17cb7837e19faa47",
    "seeds": [0],
    "versions": {"pilotage": "0.1.0", "numpy": "2.4.6", "numba": "0.68.1", "torch": "2.13.0+cpu"},
    "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "python": "3.11.7", "os": "Linux 6.18"},
    "durations_s": {"tune": 982.6, "train": 3763.9, "evaluate": 74.6},
    "started_at": "2026-11-23T10:06:45+00:00",
    "policies": {"hpa": "hpa", "hpa tuned": "hpa:target=0.71,stabilization_s=240"},
}


EXPLANATION = {
    "policy": "ppo", "env": "azure-code", "sentence": "tick 7, 10:02: ppo ordered 2 replicas.",
    "outcome": 6.25, "usual": 4.5, "unit": "replicas",
    "contributions": [
        {"input": "load_now", "value": 1.5, "usual": 0.1, "unit": "", "contribution": 2.0},
        {"input": "queue_and_latency", "value": None, "usual": None, "unit": "", "contribution": -0.25},
        *({"input": f"input {k}", "value": 1, "usual": 1, "unit": "rps", "contribution": 0.0} for k in range(8)),
    ],
    "trust": [
        {"name": "deletion", "asked": "beats random order", "measured": 0.3, "low": 0.2, "high": 0.4,
         "passed": True, "note": "area in sd"},
        {"name": "random weights", "asked": "at most 0.3", "measured": None, "passed": True},
    ],
    "trusted": True,
}  # fmt: skip
COMPARISON = {
    "a": "fraud:3", "b": "fraud:4",
    "attention": {"inputs": {"amount": [0.75, 0.5], "country": [0.25, 0.5]}, "moved": 0.25},
}  # fmt: skip
MORE = ("explanation.json", "comparison.json")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six policies and the clairvoyant schedule in four groups, with every optional file, and its report."""
    folder = fill(tmp_path_factory.mktemp("full"))
    write_report(folder)
    return folder


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The same with one group and no tables, and no report yet: quickly drawn, and free to be changed."""
    fill(tmp_path)
    edit(tmp_path, lambda groups: groups.__delitem__(slice(3)))
    for name in ("timeline.csv", "learning_curve.csv", "trials.csv", "acceptance.csv", *MORE):
        (tmp_path / name).unlink()
    return tmp_path


def edit(folder: Path, change: Any, name: str = "evaluation.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def fill(folder: Path) -> Path:
    groups = [evaluation(name, usd, k) for k, (name, usd) in enumerate(GROUPS.items())]
    (folder / "evaluation.json").write_text(json.dumps(groups))
    (folder / "run.json").write_text(json.dumps(RUN))
    for name, content in zip(MORE, (EXPLANATION, COMPARISON), strict=True):
        (folder / name).write_text(json.dumps(content))
    ticks = [
        timeline_rows(*args) for args in (("hpa", 6, 1.5), ("predictive tuned", 1, 1.25), ("ppo", 1, 1.18))
    ]
    write_csv(folder / "timeline.csv", [row for rows in ticks for row in rows])
    rng = np.random.default_rng(3)
    curve = [61.0 - 6.5 * (1 - math.exp(-k / 4)) + 0.35 * rng.standard_normal() for k in range(16)]
    best = np.minimum.accumulate(curve)
    write_csv(
        folder / "learning_curve.csv",
        [
            {
                "steps": 65_536 * k,
                "validation_usd": usd,
                "low": usd - 1.4,
                "high": usd + 1.6,
                "base_usd": 60.2,
                "best": usd == best[k],
            }
            for k, usd in enumerate(curve)
        ],
    )
    trials = []
    for policy, floor in (("hpa tuned", 56.0), ("predictive tuned", 53.0)):
        usd = floor + rng.gamma(1.2, 4.0, 60)
        usd[::13] *= 6
        trials += [
            {"policy": policy, "trial": k, "usd": v, "best_usd": low}
            for k, (v, low) in enumerate(zip(usd, np.minimum.accumulate(usd), strict=True))
        ]
    write_csv(folder / "trials.csv", trials)
    acceptance = [
        ("ppo at least 10 % below default HPA", "mean >= 0.1", 0.121, 0.094, 0.148, True),
        ("the interval excludes 0", "low >= 0", 0.121, 0.094, 0.148, True),
        ("ppo no worse than predictive tuned", "high >= 0", 0.028, 0.001, 0.056, True),
        ("ppo cheaper on traffic it never saw", "low >= 0", -0.04, -0.065, -0.012, False),
        ("engine speed", "5 M requests/s on one core", 6.13e6, math.nan, math.nan, True),
    ]
    names = ("line", "asked", "measured", "low", "high", "met")
    write_csv(folder / "acceptance.csv", [dict(zip(names, row, strict=True)) for row in acceptance])
    return folder


# --- the page, as text -------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Tags with their attributes, ids, and text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.replace("\N{NARROW NO-BREAK SPACE}", " ").split())

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(full: Path) -> Page:
    return Page((full / "report.html").read_text(encoding="utf-8"))


def test_the_sections_come_in_order_and_the_numbers_are_there(whole: Page) -> None:
    words = whole.words
    assert words.index(RUN["title"]) < words.index(RUN["question"])
    words = words[words.index("In one sentence") :]  # after the list of sections
    places = [
        words.index(part)
        for part in (
            "saved in every 24-hour window",
            "Dollars per window",
            "One window, tick by tick",
            "Where it is worse",
            "Why it decides as it does tick 7, 10:02: ppo ordered 2 replicas.",
            "queue and latency",
            "4.50 is usual, and 6.25 came out; 2 smaller contributions are left out",
            "Every check passes.",
            "[0.2, 0.4]",
            "does not apply",
            "25.0 % of all contributions moved from fraud:3 to fraud:4.",
            "4 of 5 met.",
            "Learning and tuning",
            "c16ae8a101caca0bda89db847608c3be4e3db2d61abed5ea1b2c1b7144afc58d",
        )
    ]
    assert places == sorted(places)
    assert "saving at least 10 % (mean)" in words
    assert "12.1 % [9.4, 14.8]" in words
    assert "6,130,000" in words
    assert "with uncommitted changes" in words
    assert "1 h 2 min" in words
    assert "1006000\N{EN DASH}1006011" in words
    assert "default HPA by 4.0 %" in words[words.index("Where it is worse") :]  # azure-chat


def test_it_is_small_and_loads_nothing_from_anywhere(full: Path, whole: Page) -> None:
    path = full / "report.html"
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|\burl\((?!#)|@import|@font-face", text)
    for tag, attrs in whole.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
    assert "default-src 'none'" in text


def test_marks_are_whole_and_ids_are_unique(whole: Page) -> None:
    found = whole
    ids = found.ids()
    assert len(ids) == len(set(ids))
    refers = [
        attrs[k]
        for _, attrs in found.tags
        for k in ("href", "aria-controls", "aria-labelledby")
        if k in attrs
    ]
    assert {r.lstrip("#") for r in refers if r} <= set(ids)
    for tag, attrs in found.tags:
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if "plot" in (attrs.get("class") or "").split():
            assert attrs["role"] == "img"
            assert len(attrs["aria-label"] or "") > 40
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_the_same_input_gives_the_same_bytes(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)  # the user's own settings do not matter
    write_report(fill(tmp_path))
    assert matplotlib.rcParams["font.size"] == 30
    files = sorted(path.relative_to(full) for path in full.rglob("*") if path.is_file())
    assert len(files) == 8 + 11 + 1  # what was given, the figures, the page
    for file in files:
        assert (tmp_path / file).read_bytes() == (full / file).read_bytes(), file


def test_figures_are_svg_files(full: Path, sample: Path) -> None:
    names = {path.name for path in (full / "figures").iterdir()}
    assert {
        "timeline.svg",
        "cost.svg",
        "pareto.svg",
        "cost-twitter.svg",
        "learning_curve.svg",
        "tuning.svg",
    } <= names
    for path in (full / "figures").iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "hpa" in path.read_text() or path.name == "learning_curve.svg"
    assert [path.name for path in draw_figures(sample)] == ["cost.svg", "pareto.svg"]


def test_what_a_user_named_is_only_text(sample: Path) -> None:
    def rename(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["group"] = HOSTILE + group["group"]
            for row in group["policies"]:
                row["policy"] = row["policy"].replace("ppo", f"ppo {HOSTILE}")
            for pair in group["versus"]:
                pair["policy"] = pair["policy"].replace("ppo", f"ppo {HOSTILE}")

    edit(sample, rename)
    write_csv(sample / "timeline.csv", timeline_rows("ppo", 1, 1.2)[::20])
    quoted = '"' + f"ppo {HOSTILE}".replace('"', '""') + '"'
    (sample / "timeline.csv").write_text((sample / "timeline.csv").read_text().replace("ppo", quoted))
    edit(
        sample,
        lambda run: run.update(dict.fromkeys(("title", "question", "command", "commit"), HOSTILE)),
        "run.json",
    )
    clean = [tag for tag, _ in page(sample).tags if tag in ("script", "img", "iframe")]
    assert clean == ["script", "script"]  # the numbers of the timeline, and the page's own
    text = (sample / "report.html").read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "\\frac{" in text  # kept, as text
    assert "\x00" not in text
    for path in (sample / "figures").glob("*.svg"):
        ElementTree.parse(path)  # well formed
        assert path.parent == sample / "figures"


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "absent"])
def test_a_missing_file_leaves_its_section_out(full: Path, whole: Page, sample: Path, empty: bool) -> None:
    if empty:
        for name in ("timeline", "learning_curve", "trials", "acceptance"):
            header = (full / f"{name}.csv").read_text().splitlines()[0]
            (sample / f"{name}.csv").write_text(header + "\n")
    words = page(sample).words
    for section in ("tick by tick", "What was asked", "Cost on validation traffic", "Each mark is one trial",
                    "Why it decides", "What the versions look at"):  # fmt: skip
        assert section in whole.words
        assert section not in words
    assert "Learning and tuning" not in words


def test_the_least_folder_gives_a_page(tmp_path: Path) -> None:
    """One policy, one window: no interval, no bound, nothing to compare."""
    (tmp_path / "run.json").write_text("{}")
    row = evaluation("quickstart", 20.0, 0)["policies"][0]
    row |= {
        "total_usd": {"mean": 20.0, "low": math.nan, "high": math.nan},
        "over_bound": None,
        "accuracy": None,
    }
    row["latency_ms"] = dict.fromkeys(("p50", "p95", "p99"), math.nan)  # nothing was served
    (tmp_path / "evaluation.json").write_text(json.dumps([{"env": "quickstart", "policies": [row]}]))
    words = page(tmp_path).words
    assert "Only default HPA was measured: $20.00 per window" in words
    assert "There is no second policy to compare with." in words


# --- what the headline says --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("saving", "says"),
    [
        ((0.123, 0.101, 0.145), "costs 12.3 % less than default HPA"),
        ((-0.2, -0.3, -0.1), "costs 20.0 % more than default HPA"),
        ((0.05, -0.02, 0.11), "shows no clear difference in cost to default HPA"),
        ((0.05, math.nan, math.nan), "too few windows"),
        ((0.0, 0.0, 0.0), "Both cost the same in every window."),
    ],
)
def test_the_headline_follows_the_interval(
    sample: Path, saving: tuple[float, float, float], says: str
) -> None:
    def change(groups: list[dict[str, Any]]) -> None:
        for pair in groups[-1]["versus"]:
            if (pair["policy"], pair["baseline"]) == ("ppo", "hpa"):
                pair["saving"] = dict(zip(("mean", "low", "high"), saving, strict=True))

    edit(sample, change)
    words = page(sample).words
    headline = words[words.index("In one sentence") : words.index("Cost per 24-hour")]
    assert says in headline
    assert ("saved" in headline) == (saving[1] > 0)


def test_a_saving_can_be_read_the_other_way_round() -> None:
    low = Interval(0.2, 0.1, 0.3).reversed()
    assert low.low == pytest.approx(1 - 1 / 0.7)
    assert low.high == pytest.approx(1 - 1 / 0.9)
    assert low.verdict == "dearer"


def test_where_it_is_worse_stands_even_if_nowhere(sample: Path) -> None:
    def best(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["policies"] = [row for row in group["policies"] if row["policy"] in ("hpa", "ppo")]
            row = group["policies"][1]
            row |= {"slo_attainment": 1.0, "latency_ms": {"p50": 1.0, "p95": 1.0, "p99": 1.0}, "dropped": 0}
            row["node_hours"] = 1.0
            group["versus"] = [{"policy": "ppo", "baseline": "hpa", "saving": interval(0.2, 0.05)}]

    edit(sample, best)
    assert "ppo is at least as good as every other contender" in page(sample).words


def test_the_front_holds_what_is_beaten_in_neither() -> None:
    rows = {
        name: Row(name, Interval(usd), {"nodes": usd}, share, {}, 1, 0, 1.0, 1.0)
        for name, usd, share in (
            ("a", 1.0, 0.9),
            ("b", 2.0, 0.99),
            ("dominated", 2.5, 0.98),
            ("c", 3.0, 0.999),
            (FUTURE, 0.5, 1.0),
        )
    }
    assert [row.policy for row in front_of(list(rows.values()))] == ["a", "b", "c"]
    assert nines(0.999) == pytest.approx(3)
    assert math.isfinite(nines(1.0))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (money(1234.4), "$1,234"),
        (money(24.006), "$24.01"),
        (money(0.01234), "$0.0123"),
        (money(-3.2), "\N{MINUS SIGN}$3.20"),
        (money(-0.0001, 24.0), "$0.00"),
        (money(None), "\N{EN DASH}"),
        (percent(0.1234), "12.3\N{NARROW NO-BREAK SPACE}%"),
        (attained(0.9992), "99.92\N{NARROW NO-BREAK SPACE}%"),
        (attained(0.99997), "99.997\N{NARROW NO-BREAK SPACE}%"),
        (attained(0.999999999), "99.9999\N{NARROW NO-BREAK SPACE}%"),
        (attained(1.0), "100\N{NARROW NO-BREAK SPACE}%"),
        (attained(0.0), "0.00\N{NARROW NO-BREAK SPACE}%"),
        (latency(247.1), "247 ms"),
        (latency(12_340), "12.3 s"),
        (ranges([3, 1, 2, 9]), "1\N{EN DASH}3, 9"),
    ],
)
def test_numbers_are_written_one_way(written: str, expected: str) -> None:
    assert written == expected


# --- bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"policies": 3}', "[" * 100_000])
def test_a_broken_folder_is_named(sample: Path, name: str, content: str | None) -> None:
    (sample / name).unlink() if content is None else (sample / name).write_text(content)
    with pytest.raises(ReportError, match=re.escape(str(sample / name))) as error:
        write_report(sample)
    assert isinstance(error.value, SpecError)  # one line and exit code 2 on the command line
    assert not (sample / "report.html").exists()


@pytest.mark.parametrize("name", MORE)
def test_an_explanation_that_is_not_one_is_named(sample: Path, name: str) -> None:
    (sample / name).write_text('{"sentence": 3}')
    with pytest.raises(ReportError, match=rf"{name}: not as `pilotage (explain|compare)` writes it"):
        write_report(sample)


def test_an_explanation_that_fails_a_check_is_not_to_be_trusted(sample: Path) -> None:
    failed = EXPLANATION["trust"][0] | {"passed": False, "note": "<script>alert(1)</script>"}
    (sample / "explanation.json").write_text(json.dumps(EXPLANATION | {"trust": [failed], "trusted": False}))
    found = page(sample)
    assert "Not to be trusted: a check fails." in found.words
    assert "<script>alert(1)</script>" in found.words


def test_a_broken_evaluation_says_where(sample: Path) -> None:
    edit(sample, lambda groups: groups[0]["policies"][2].update(slo_attainment="high"))
    with pytest.raises(ReportError, match=r"evaluation\.json.*\$\[0\]\.policies\[2\]\.slo_attainment"):
        write_report(sample)


def test_it_says_how_close_the_simulator_is(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    fill(folder)
    edit(folder, lambda groups: groups.__delitem__(slice(3)))
    assert "No measurement of a real system lies beside this folder" in page(folder).words
    beside = tmp_path / "fidelity" / "ray<serve"
    beside.mkdir(parents=True)
    (beside / "acceptance.csv").write_text(
        "line,asked,measured,low,high,met\np95,±8 %,-2.7,-3.2,-2.2,True\np99,±12 %,14.5,,,False\n"
    )
    words = page(folder).words
    assert "fidelity/ray<serve: 1 of 2 met" in words
    assert "\N{MINUS SIGN}2.7" in words
    (beside / "acceptance.csv").write_text("line\nx\n")
    with pytest.raises(ReportError, match=r"acceptance\.csv: lacks the columns asked"):
        write_report(folder)


def test_a_table_without_its_columns_is_named(sample: Path) -> None:
    (sample / "trials.csv").write_text("policy,usd\nhpa,3\n")
    with pytest.raises(ReportError, match=r"trials\.csv: lacks the columns trial, best_usd"):
        write_report(sample)
    with pytest.raises(ReportError, match=r"timeline\.csv: absent or empty"):
        draw_timeline(sample)


def test_a_failed_write_keeps_the_old_page(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(sample).read_bytes()
    edit(sample, lambda run: run.update(title="another"), "run.json")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_report(sample)
    assert (sample / "report.html").read_bytes() == old
    assert not [path for path in sample.rglob("*") if path.name.endswith(".part")]


def test_a_timeline_alone_can_be_drawn(tmp_path: Path) -> None:
    write_csv(tmp_path / "timeline.csv", timeline_rows("hpa", 6, 1.5))
    assert draw_timeline(tmp_path) == tmp_path / "figures" / "timeline.svg"


# --- in a browser ------------------------------------------------------------------------------------------
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
)


class Browser:
    """A page in headless Chromium, over the DevTools protocol. `complaints` are errors, warnings and requests."""

    def __init__(self, profile: Path) -> None:
        websocket = pytest.importorskip("websocket", reason="needs websocket-client, of the extra `dev`")
        command = [CHROMIUM or "", *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.complaints: list[str] = []
        self._last = 0
        try:
            port = self._port(profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            self.socket = websocket.create_connection(
                pages[0]["webSocketDebuggerUrl"], timeout=60, suppress_origin=True
            )
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _port(file: Path) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and len(lines := file.read_text().split()) > 1:
                return lines[0]
            time.sleep(0.05)
        raise TimeoutError("chromium did not open its debugging port within 60 s")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        self.socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            self._listen(message)

    def _listen(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(params)[:500])
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("file:"):
            self.complaints.append("request to " + params["request"]["url"])

    def open(self, path: Path, width: int, *, dark: bool = False, script: bool = True) -> None:
        mobile = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.ask("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ask(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
# the contrast of every piece of text with what is painted behind it, by WCAG's formula
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(element);
    if (!own || !element.getClientRects().length || style.color === "rgba(0, 0, 0, 0)") continue;
    if (element.closest("script, style")) continue;
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const back = ["white", ...behind];
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(paint([...back, ink])), light(paint(back))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push(element.textContent.slice(0, 40) + " " + ratio.toFixed(2));
  }
  return poor;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 960, 800, 360])
def test_it_opens_and_is_readable(browser: Browser, full: Path, width: int, dark: bool) -> None:
    browser.complaints.clear()
    browser.open(full / "report.html", width, dark=dark)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth"), "the page overflows sideways"
    back = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert sum(int(v) for v in re.findall(r"\d+", back)) < 150 if dark else back == "rgb(244, 246, 248)"
    assert browser.ask(CONTRAST) == []
    shown = "[...document.querySelectorAll('.plot svg')].filter((svg) => svg.getClientRects().length)"
    assert browser.ask(f"{shown}.length") == 5  # of the chosen group, and each figure in one width
    small = f"{shown}.flatMap((svg) => [...svg.querySelectorAll('text')]).filter("
    size = "parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a"
    assert browser.ask(f"{small}(t) => {size} < 9.5).length") == 0, "type in a figure is too small"


def test_tabs_work_by_keyboard(browser: Browser, full: Path) -> None:
    browser.open(full / "report.html", 1280)
    focused = "document.activeElement.textContent"
    shown = (
        "[...document.querySelectorAll('.group')].filter((g) => !g.hidden).map((g) => g.dataset.name).join()"
    )
    assert browser.ask(shown) == "all traffic"
    for _ in range(30):
        browser.press("Tab")
        if browser.ask("document.activeElement.getAttribute('role')") == "tab":
            break
    assert browser.ask(focused) == "all traffic"
    for key, expected in (
        ("ArrowRight", "twitter"),
        ("End", "azure-chat"),
        ("ArrowRight", "all traffic"),
        ("ArrowLeft", "azure-chat"),
        ("Home", "all traffic"),
    ):
        browser.press(key)
        assert browser.ask(focused) == expected
        assert browser.ask(shown) == expected
    assert browser.ask("document.querySelectorAll('[role=tab][aria-selected=true]').length") == 1


def test_the_timeline_is_read_out_by_keyboard_and_pointer(browser: Browser, full: Path) -> None:
    browser.open(full / "report.html", 1280)
    time_of = "document.querySelector('#reader output').textContent"
    browser.ask("document.querySelector('#reader input').focus()")
    browser.press("Home")
    assert browser.ask(time_of).startswith("00:0")
    browser.press("End")
    assert browser.ask(time_of).startswith("24:00:00")
    assert browser.ask("document.querySelectorAll('#reader tbody tr').length") == 3
    browser.ask("document.querySelector('#timeline .drawing').scrollIntoView({ behavior: 'instant' })")
    box = browser.ask(
        "(({ x, y, width }) => [x, y, width])"
        "(document.querySelector('#timeline .drawing').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] / 2, y=box[1] + 100)
    assert re.match(r"1[0-3]:", browser.ask(time_of))
    left = browser.ask("document.querySelector('#timeline .cursor').getBoundingClientRect().left")
    assert left == pytest.approx(box[0] + box[2] / 2, abs=4)


def test_decisions_are_stepped_through_and_the_close_up_zooms(browser: Browser, full: Path) -> None:
    browser.complaints.clear()
    browser.open(full / "report.html", 1280)
    browser.ask("document.querySelector('#reader input').focus()")
    browser.press("Home")
    said = "[...document.querySelectorAll('#reader .said')].map((cell) => cell.textContent)"
    assert browser.ask(said) == ["\N{EN DASH}"] * 3  # nothing was decided yet
    browser.press("Tab")
    browser.press("Tab")  # to "next decision"
    assert browser.ask("document.activeElement.textContent").startswith("next decision")
    seen = []
    for _ in range(3):
        browser.ask("document.activeElement.click()")
        seen.append(browser.ask("document.querySelector('#reader output').textContent")[:8])
        assert all(text.startswith("now +1: ") for text in browser.ask(said))
    assert seen == ["00:03:00", "00:51:30", "01:40:00"]  # ticks 5, 102, 199 of 30 s
    browser.ask("document.querySelectorAll('#reader .step')[0].click()")
    assert browser.ask("document.querySelector('#reader output').textContent").startswith("00:51:30")
    span = "document.querySelector('#close-up output').textContent"
    assert browser.ask(span) == "1 h"
    browser.ask("document.querySelector('#close-up button').click()")
    assert browser.ask(span) == "30 min"
    assert (
        browser.ask("document.querySelectorAll('#close-up path').length") == 7
    )  # traffic, and two of each policy
    assert browser.ask("document.querySelectorAll('#close-up circle').length") > 0
    for _ in range(9):
        browser.ask("document.querySelectorAll('#close-up button')[1].click()")
    assert browser.ask(span) == "12 h"
    assert browser.complaints == []


def test_it_is_complete_without_its_script(browser: Browser, full: Path) -> None:
    browser.open(full / "report.html", 1280, script=False)
    shown = "[...document.querySelectorAll('.group')].filter((g) => g.getClientRects().length).length"
    assert browser.ask(shown) == len(GROUPS)
    assert browser.ask(
        "document.querySelectorAll('#reader').length && document.querySelector('#reader').hidden"
    )


def test_it_prints(browser: Browser, full: Path) -> None:
    browser.open(full / "report.html", 1280)
    printed = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 14


def test_a_hostile_page_does_nothing(browser: Browser, sample: Path) -> None:
    def rename(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for row in group["policies"]:
                row["label"] = row["policy"] + HOSTILE

    edit(sample, rename)
    browser.complaints.clear()
    browser.open(write_report(sample), 360)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")


def test_latencies_far_above_the_objective_have_plain_labels(tmp_path: Path) -> None:
    rows = timeline_rows("hpa", 6, 1.5)
    for k, row in enumerate(rows):  # spans one decade, where matplotlib labels minor ticks
        row["latency_p95_s"] = 0.2 + 8 * k / len(rows)
        row["slo_s"] = 0.75
    write_csv(tmp_path / "timeline.csv", rows)
    assert "mathdefault" not in draw_timeline(tmp_path).read_text()


def test_a_recorded_command_names_its_program_and_no_place_of_one_machine() -> None:
    def command(*words: str) -> str:
        return provenance("x", words, datetime.now(UTC), {})["command"]

    run = command("experiments/anomaly/run.py", "--data", "/somewhere/data", "--seed", "1")
    assert run == "python experiments/anomaly/run.py --data data --seed 1"
    assert command("study", "experiments/quickstart.toml") == "pilotage study experiments/quickstart.toml"
