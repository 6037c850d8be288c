"""Does calibration recover a fleet from its history, and does it know when it does not?

Recordings are simulated runs (`pilotage.recording`) of services drawn at random, and measurements of a real Ray Serve
(`--data`, fidelity/ray_serve). All pass through a real Prometheus: promtool writes them into blocks, a server reads
them, and `live.history` asks it. Judged: the recovered numbers against those that made the recording; the replayed 95th
percentile against the recorded one; how many of 20 wrong fits (routing that is not as claimed, requests that the
counter of arrivals does not see, nodes of which some are slow) are called bad, and how many of 20 right ones good. How
long a rehearsal takes is `experiments/rehearse`'s to say.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.prometheus import missing, remember, serving
from pilotage.control.hpa import Hpa
from pilotage.engine.cluster import World
from pilotage.live.calibrate import Fit, Fleet, Known, fit
from pilotage.live.history import Prometheus, Recording, read
from pilotage.recording import EDGES_S, open_metrics
from pilotage.rehearse import Check, check, scenario_of
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Diurnal
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, Router, Variant
from pilotage.world.services import Service

STEP_S, HOURS = 30.0, 1.5
POOL = Pool(name="cpu", price_usd_per_hour=1.0, max_nodes=30)
WRONG = ("routing", "traffic", "node")
RAY = ("A_6rps", "A_10rps", "B_25rps")
RAY_STEP_S = 10.0


def drawn(name: str, rng: np.random.Generator, routing: str | None = None) -> Service:
    """A service at random, sized so that three to eight replicas carry it."""
    batch = int(rng.choice([4, 8, 16]))
    base, per_item = float(rng.uniform(8, 40)), float(rng.uniform(2, 10))
    capacity = 1e3 * batch / (base + per_item * batch)
    routing = routing or str(rng.choice(["central", "round-robin", "least-outstanding", "power-of-two"]))
    law = Affine(base_ms=base, per_item_ms=per_item, noise_cv=float(rng.uniform(0.05, 0.3)))
    rate = float(rng.uniform(1.5, 3.0)) * capacity
    return Service(
        name=name,
        slo_ms=300.0,
        pools=("cpu",),
        traffic=Diurnal(rate_rps=min(rate, 250.0), day_amplitude=0.6, peak_hour=2.0, noise_cv=0.2),
        server=BatchServer(max_batch=batch, batch_wait_ms=float(rng.choice([0.0, 5.0])), routing=routing),
        variants=(Variant(name="v", load_s=float(rng.uniform(20, 90)), load_cv=0.1, latency={"cpu": law}),),
        initial_replicas=6,
        min_replicas=2,
        max_replicas=20,
    )


@contextmanager
def remembering(texts: list[str], folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that has those histories."""
    body = "\n".join(text.removesuffix("\n").removesuffix("# EOF").rstrip("\n") for text in texts)
    remember(body + "\n# EOF\n", folder)
    with serving(folder) as url:
        yield url


def source_of(url: str, began_s: float, hours: float, step_s: float) -> Prometheus:
    times = [np.datetime64(int(t), "s").astype(str) for t in (began_s, began_s + 3600 * hours)]
    return Prometheus(url=url, start=times[0], end=times[1], step_s=step_s)


def judged(
    source: Prometheus, known: Known, folder: Path
) -> tuple[Recording, Fit, Check, list[tuple[Known, Recording, Fit]]]:
    history = read(source, known.name)
    found = [(known, history, fit(history, known.slo_ms / 1e3))]
    fleet = Fleet(prometheus=source, pools=(POOL,), services=(known,))
    return history, found[0][2], check(scenario_of(fleet, (POOL,), found, folder), found)[0], found


def simulated(seed: int, count: int, lasted: dict[str, float]) -> list[dict[str, Any]]:
    """Right fits and wrong ones of services at random, through one Prometheus."""
    began_s = (time.time() - 3600 * (HOURS + 6)) // STEP_S * STEP_S
    services, texts = [], []
    began = time.perf_counter()
    for k in range(2 * count):
        wrong = WRONG[k % 3] if k >= count else ""
        rng = np.random.default_rng([seed, k])
        real = drawn(
            f"service-{k}", rng, "round-robin" if wrong == "routing" else "central" if wrong else None
        )
        pool = POOL.replace(slow_share=0.5, slow_factor=2.5) if wrong == "node" else POOL
        scenario = Scenario(title="real", pools=(pool,), services=(real,), tick_s=STEP_S, horizon_h=HOURS)
        text = open_metrics(scenario, [Hpa(target_utilization=0.6)], World(1000 * seed + k), began_s=began_s)
        if wrong == "traffic":  # a fifth of the requests come past what counts them
            text = re.sub(
                r"^(requests_total\{[^}]*\}) (\S+)",
                lambda m: f"{m[1]} {0.8 * float(m[2]):.10g}",
                text,
                flags=re.MULTILINE,
            )
        claimed = real.server.replace(routing="central") if wrong == "routing" else real.server
        services.append(
            (real, Known(name=real.name, slo_ms=300.0, pool="cpu", server=claimed, max_replicas=20), wrong)
        )
        texts.append(text)
    lasted["simulate recordings"] = round(time.perf_counter() - began, 1)
    rows = []
    with tempfile.TemporaryDirectory() as home, remembering(texts, Path(home)) as url:
        source = source_of(url, began_s, HOURS, STEP_S)
        for real, known, wrong in services:
            history, fitted, verdict, _ = judged(source, known, Path(home) / "traffic")
            law = real.variants[0].latency["cpu"]
            size = max(1.0, history.batched.sum() / history.batches.sum())
            true_ms = law.base_ms + law.per_item_ms * size
            rows.append(
                {
                    "recording": real.name, "wrong": wrong, "routing": real.server.routing,
                    "rate_error": f"{fitted.rate_rps[0] * 3600 * HOURS / history.served.sum() - 1:.5f}",
                    "law_error": f"{(fitted.base_ms[0] + fitted.per_item_ms[0] * size) / true_ms - 1:.5f}",
                    "base_error": f"{fitted.base_ms[0] / law.base_ms - 1:.4f}",
                    "per_item_error": f"{fitted.per_item_ms[0] / law.per_item_ms - 1:.4f}",
                    "start_up_error": f"{fitted.start_up_s[0] / real.variants[0].load_s - 1:.4f}"
                    if history.start_ups else "",
                    "start_ups": history.start_ups,
                    "p95_error": f"{verdict.predicted['p95'] / verdict.recorded['p95'] - 1:.4f}",
                    "p99_error": f"{verdict.predicted['p99'] / verdict.recorded['p99'] - 1:.4f}",
                    "good": verdict.good, "misfits": "; ".join(verdict.misfits),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def ray_text(folder: Path, case: str, began_s: float) -> tuple[str, float, dict[str, Any]]:
    """A measured case as Prometheus would have seen it, every RAY_STEP_S; its length in hours; its description."""
    about = json.loads((folder / f"{case}.json").read_text())
    with (folder / f"{case}.detail.csv").open() as file:
        raw = [row for row in csv.DictReader(file) if row["ok"] == "1" and row["done_s"]]
    sent, done, start, end = (
        np.array([float(row[name]) for row in raw])
        for name in ("sent_s", "done_s", "batch_start_s", "batch_end_s")
    )
    _, heads, sizes = np.unique(
        [f"{row['replica']}/{row['batch_no']}" for row in raw], return_index=True, return_counts=True
    )
    steps = int(sent.max() // RAY_STEP_S) + 1
    own, deployed = (
        f'service="{case.lower().replace("_", "-")}"',
        f'deployment="{case.lower().replace("_", "-")}"',
    )
    lines: dict[str, list[str]] = {}
    latency = done - sent
    for k in range(steps + 1):
        t, at = k * RAY_STEP_S, f"{began_s + k * RAY_STEP_S:.3f}"
        answered = done <= t
        values = {
            f"requests_total{{{own}}}": (sent <= t).sum(),
            f'responses_total{{{own},outcome="served"}}': answered.sum(),
            f"batch_requests_count{{{own}}}": (start[heads] <= t).sum(),
            f"batch_requests_sum{{{own}}}": sizes[start[heads] <= t].sum(),
            f"busy_seconds_total{{{own}}}": np.clip(np.minimum(end[heads], t) - start[heads], 0, None).sum(),
            f"kube_deployment_status_replicas_ready{{{deployed}}}": about["config"]["replicas"],
            f"kube_deployment_spec_replicas{{{deployed}}}": about["config"]["replicas"],
            f'latency_seconds_bucket{{{own},le="+Inf"}}': answered.sum(),
        }
        values |= {
            f'latency_seconds_bucket{{{own},le="{edge:g}"}}': (latency[answered] <= edge).sum()
            for edge in EDGES_S
        }
        for name, value in values.items():
            lines.setdefault(name.split("{")[0], []).append(f"{name} {value:.10g} {at}")
    return (
        "\n".join(line for rows in lines.values() for line in rows) + "\n# EOF\n",
        steps * RAY_STEP_S / 3600,
        about,
    )


def ray(data: Path) -> list[dict[str, Any]]:
    folder, rows = data / "fidelity" / "ray_serve", []
    began_s = (time.time() - 3600 * 8) // RAY_STEP_S * RAY_STEP_S
    for case in RAY:
        text, hours, about = ray_text(folder, case, began_s)
        config = about["config"]
        low = about["low_load"]["parts_ms_p50"]
        server = BatchServer(
            max_batch=config["max_batch"], batch_wait_ms=1e3 * config["wait"], former="closed", routing="ray-serve",
            router=Router(max_ongoing_requests=config["max_ongoing"]),
            # on the way while nothing else is there: measured before the case, one request at a time
            overhead_ms=low["client_to_handler"] + low["batch_end_to_client"],
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as home, remembering([text], Path(home)) as url:
            source = source_of(url, began_s, hours, RAY_STEP_S)
            known = Known(name=case.lower().replace("_", "-"), slo_ms=500.0, pool="cpu", server=server)
            _, fitted, verdict, _ = judged(source, known, Path(home) / "traffic")
        rows.append(
            {
                "recording": f"ray serve {case}", "routing": "ray-serve",
                "p95_error": f"{verdict.predicted['p95'] / verdict.recorded['p95'] - 1:.4f}",
                "p99_error": f"{verdict.predicted['p99'] / verdict.recorded['p99'] - 1:.4f}",
                "base_error": f"{fitted.base_ms[0] / max(1e3 * config['a'], 1e-9) - 1:.4f}",
                "good": verdict.good, "misfits": "; ".join(verdict.misfits),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("PILOTAGE_DATA"), help="folder of fidelity/ray_serve"
    )
    parser.add_argument("--out", type=Path, default=Path("results/calibrate"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three right and three wrong fits")
    options = parser.parse_args()
    if why := missing():
        raise SystemExit(f"error: {why}")
    started, lasted = datetime.now(UTC), {}
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rows = simulated(options.seed, 3 if options.quick else 20, lasted)
    lasted["judge recordings"] = round(time.perf_counter() - began - lasted["simulate recordings"], 1)
    right, wrong = [r for r in rows if not r["wrong"]], [r for r in rows if r["wrong"]]

    def worst(name: str) -> float:
        return max(abs(float(r[name])) for r in right if r[name] != "")

    lines = [
        (f"largest relative error of {what}, {len(right)} simulated recordings", f"<= {limit}", worst(name),
         worst(name) <= limit)
        for what, name, limit in (
            ("the rate", "rate_error", 0.03), ("the service law at the mean batch", "law_error", 0.05),
            ("the start-up delay", "start_up_error", 0.10), ("the replayed p95", "p95_error", 0.05),
        )
    ]  # fmt: skip
    bad, good = sum(not r["good"] for r in wrong), sum(r["good"] for r in right)
    lines.append((f"wrong fits called bad, of {len(wrong)}", str(len(wrong)), bad, bad == len(wrong)))
    lines.append(
        (
            f"right fits called good, of {len(right)}",
            str(max(1, len(right) - 1)),
            good,
            good >= len(right) - 1,
        )
    )
    if options.data and (Path(options.data) / "fidelity" / "ray_serve").is_dir():
        real = ray(Path(options.data))
        rows += real
        most = max(abs(float(r["p95_error"])) for r in real)
        lines.append(
            (
                "largest relative error of the replayed p95, recordings of Ray Serve",
                "<= 0.15",
                most,
                most <= 0.15,
            )
        )
    acceptance = [
        {"line": line, "asked": asked, "measured": f"{got:.4g}", "low": "", "high": "", "met": bool(ok)}
        for line, asked, got, ok in lines
    ]  # fmt: skip
    for row in acceptance:
        print(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(options.out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in rows]))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("calibrate", sys.argv, started, lasted)
    record |= {"seed": options.seed, "quick": options.quick, "load_average": os.getloadavg()}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
