"""A closed loop with nothing simulated but the accelerator's time, predicted beforehand by the simulator.

Load generator -> Ray Serve -> Prometheus -> `pilotage steer --mode act` -> replicas change -> the objective is met
again. First the machine is measured, one request at a time and a few starts of replicas, and the simulator says what
will happen; then the same requests are sent to Ray Serve steered by the learned policy, and to Ray Serve under its own
autoscaler (its defaults; with --thorough also the best of its settings for this very load, found in the simulator).

    make demo-live            # or: python experiments/live_loop/run.py --out runs/live_loop

Everything runs in network and process namespaces of its own, and ends with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measurement import (
    POLICY,
    SCRAPE_S,
    SERVICE,
    WINDOW_S,
    application,
    calibrated,
    measured,
    steering_config,
    toml,
)
from prediction import best_of_ray, predicted, ray_policy
from rayhead import METRICS, declare, inside, loopback_up, missing, ray_head

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import prometheus

HERE = Path(__file__).parent
QUICK_S = 45.0
RECOVERED = 3  # ticks at the end


def compared(
    prediction: dict[str, dict[str, Any]], reality: dict[str, dict[str, Any]], slo_ms: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """table.csv, and the lines of acceptance.csv."""
    rows, lines = [], []
    for name, was in reality.items():
        said = prediction[name]
        row: dict[str, Any] = {"run": name, "policy": said["policy"], "requests": was["requests"]}
        for what in ("p95_ms", "replica_hours", "usd", "late"):
            row |= {f"{what}_predicted": said[what]["mean"], f"{what}_measured": was[what]}
        row |= {"failed": was["failed"], "attainment": was["attainment"], "load_average": was["load_average"]}
        rows.append(row)
        for what, share in (("p95_ms", 0.15), ("replica_hours", 0.10)):
            error = {k: said[what][k] / was[what] - 1 for k in ("mean", "low", "high")}
            if name == POLICY:
                lines.append(
                    line(
                        f"{what} predicted", f"within {100 * share:.0f} %", error, abs(error["mean"]) <= share
                    )
                )
    end_ms = [1e3 * (x or 0.0) for x in reality[POLICY]["latency_p95_s"][-RECOVERED:]]
    lines.append({
        "line": f"p95 in the last {RECOVERED} ticks: the objective is met again", "asked": f"at most {slo_ms:g} ms",
        "measured": f"{max(end_ms):.0f} ms", "low": f"{min(end_ms):.0f} ms", "high": f"{max(end_ms):.0f} ms",
        "met": max(end_ms) <= slo_ms,
    })  # fmt: skip
    ours, theirs = reality[POLICY]["usd"], reality["ray-serve default"]["usd"]
    ratio = dict.fromkeys(("mean", "low", "high"), ours / theirs - 1)
    lines.append(
        line("measured dollars of learned against Ray Serve's autoscaler", "below 0 %", ratio, ours < theirs)
    )
    return rows, lines


def line(what: str, asked: str, value: dict[str, float], met: bool) -> dict[str, Any]:
    return {
        "line": what, "asked": asked, "measured": f"{100 * value['mean']:.1f} %", "low": f"{100 * value['low']:.1f} %",
        "high": f"{100 * value['high']:.1f} %", "met": met,
    }  # fmt: skip


def drawn(
    path: Path, spec: Any, times_s: np.ndarray, said: dict[str, Any], was: dict[str, Any], title: str
) -> None:
    """Prediction against reality on one time line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    end_s, slo_ms = spec.horizon_h * 3600, spec.services[0].slo_ms
    figure, (load, replicas, latency) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    edges = np.arange(0, end_s + 1e-9, spec.tick_s)
    load.stairs(np.histogram(times_s, edges)[0] / spec.tick_s, edges, color="0.4")
    load.set_ylabel("requests/s")
    said_s = said["tick_s"] * (1 + np.arange(len(said["ready"])))
    replicas.step(said_s, said["ready"], where="post", label="predicted", color="C0")
    replicas.step(
        np.arange(len(was["grid_ready"])), was["grid_ready"], where="post", label="measured", color="C1"
    )
    replicas.set_ylabel("replicas ready")
    replicas.legend(frameon=False)
    latency.plot(
        said_s, 1e3 * np.array(said["latency_p95_s"]), color="C0", label=f"predicted, in {said['tick_s']:g} s"
    )
    was_ms = [np.nan if x is None else 1e3 * x for x in was["latency_p95_s"]]
    latency.plot(
        spec.tick_s * (1 + np.arange(len(was_ms))),
        was_ms,
        color="C1",
        label=f"measured, in {spec.tick_s:g} s",
    )
    latency.axhline(slo_ms, color="0.6", linestyle="--", label="objective")
    latency.set(ylabel="p95, ms", xlabel="seconds", yscale="log")
    latency.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def shown(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'':28}{'p95 ms':>18}{'replica-hours':>18}{'dollars':>18}{'in time':>10}")
    print(f"{'':28}" + f"{'predicted':>10}{'was':>8}" * 3)
    for row in rows:
        cells = "".join(
            f"{row[f'{what}_predicted']:>10.{d}f}{row[f'{what}_measured']:>8.{d}f}"
            for what, d in (("p95_ms", 0), ("replica_hours", 3), ("usd", 3))
        )
        print(f"{row['run']:28}{cells}{100 * row['attainment']:>9.1f}%")
    for one in lines:
        print(
            f"{'met    ' if one['met'] else 'NOT MET'} {one['line']}: {one['measured']} (asked: {one['asked']})"
        )


def decisions(ledger: Path) -> list[dict[str, Any]]:
    """What steer decided, tick by tick, and why, from its ledger."""
    from pilotage.live.ledger import Ledger

    return [
        {"time": entry.time, "kind": entry.kind, "outcome": entry.outcome, "reason": entry.reason}
        for entry in Ledger(ledger).entries(SERVICE)
    ]


def run(out: Path, seed: int, thorough: bool, quick: bool, folder: Path) -> None:
    import msgspec

    from pilotage import results, scenario
    from pilotage.engine.cluster import Cluster, World

    started, clock = datetime.now(UTC), time.perf_counter()
    durations: dict[str, float] = {}

    def lap(what: str) -> None:
        durations[what] = round(time.perf_counter() - clock - sum(durations.values()), 1)
        print(f"{what}: {durations[what]} s", flush=True)

    spec = scenario.load(HERE / "scenario.toml")
    if quick:
        spec = spec.replace(horizon_h=QUICK_S / 3600)
    scraping = {
        "global": {"scrape_interval": f"{SCRAPE_S:g}s", "scrape_timeout": f"{SCRAPE_S:g}s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{METRICS}"]}]}],
    }
    with ray_head(folder) as url, prometheus.serving(folder, scraping) as scraped:
        declare(url, application(spec))
        lap("Ray Serve and Prometheus started")
        times_s = Cluster(spec, [World(seed)]).arrivals(0, 0)
        predicted(spec, times_s, POLICY, seed, (WINDOW_S, SCRAPE_S / 2))
        lap("simulator compiled")
        fitted, machine = calibrated(spec, url)
        table = {k: v for k, v in msgspec.to_builtins(fitted).items() if k not in ("name", "data")}
        (folder / "calibrated.toml").write_text(toml(table))
        lap("machine measured")
        print(json.dumps(machine))
        rays: dict[str, dict[str, float]] = {"ray-serve default": {}}
        if thorough:
            rays["ray-serve tuned"] = best_of_ray(fitted, times_s, seed)
        # steer sees through Prometheus, whose latest sample is half a scrape old on average; Ray's autoscaler does not
        monitor = (WINDOW_S, SCRAPE_S / 2)
        prediction = {POLICY: predicted(fitted, times_s, POLICY, seed, monitor)} | {
            name: predicted(fitted, times_s, ray_policy(settings), seed) for name, settings in rays.items()
        }
        lap("predicted")
        reality = {POLICY: measured(fitted, times_s, url, folder, steering_config(fitted, url, scraped))}
        lap(f"measured: {POLICY}")
        for name, settings in rays.items():
            declare(url, application(spec, settings))
            reality[name] = measured(fitted, times_s, url, folder, None)
            lap(f"measured: {name}")
    rows, lines = compared(prediction, reality, fitted.services[0].slo_ms)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in reality:
        path = out / "figures" / f"{name.replace(' ', '_')}.svg"
        drawn(
            path,
            fitted,
            times_s,
            prediction[name],
            reality[name],
            f"Ray Serve, {name}: predicted and measured",
        )
    results.write_whole(out / "table.csv", results.as_csv(rows))
    results.write_whole(out / "acceptance.csv", results.as_csv(lines))
    record = results.provenance("live_loop", sys.argv, started, durations) | {
        "seed": seed, "machine_measured": machine, "prediction": prediction, "reality": reality,
    }  # fmt: skip
    results.write_whole(out / "run.json", json.dumps(record, indent=1) + "\n")
    results.write_whole(out / "decisions.csv", results.as_csv(decisions(folder / "ledger")))
    shown(rows, lines)
    print(f"\n{sum(durations.values()):.0f} s in all; the time lines are in {out / 'figures'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="not used: the load is drawn from the scenario")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/live_loop"))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s of load instead of all")
    parser.add_argument(
        "--thorough", action="store_true", help="also Ray's autoscaler with its best settings"
    )
    arguments = parser.parse_args()
    if not os.environ.get("PILOTAGE_INSIDE"):
        why = missing() or prometheus.missing()
        if why is not None:
            raise SystemExit(f"error: {why}")
        command = inside([sys.executable, *sys.argv])
        os.environ["PILOTAGE_INSIDE"] = "1"
        os.execv(command[0], command)
    loopback_up()
    with tempfile.TemporaryDirectory(
        prefix="ll", ignore_cleanup_errors=True
    ) as folder:  # short: Ray's sockets
        run(arguments.out, arguments.seed, arguments.thorough, arguments.quick, Path(folder))


if __name__ == "__main__":
    main()
