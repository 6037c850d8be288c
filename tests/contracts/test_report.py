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
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")

from pilotage.figures import front_of, nines
from pilotage.measurements import Interval, Row, attained, latency, money, percent, ranges
from pilotage.metrics import ITEMS
from pilotage.report import ReportError, draw_figures, draw_timeline, write_report
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


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Six policies and the clairvoyant schedule in four groups, with every optional file."""
    return fill(tmp_path)


def fill(folder: Path) -> Path:
    groups = [evaluation(name, usd, k) for k, (name, usd) in enumerate(GROUPS.items())]
    (folder / "evaluation.json").write_text(json.dumps(groups))
    (folder / "run.json").write_text(json.dumps(RUN))
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
