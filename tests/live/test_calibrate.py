"""Calibration: histories as they are, prices as they are listed, and a fleet recovered through a real Prometheus."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pilotage.control.hpa import Hpa
from pilotage.engine.cluster import World
from pilotage.live.calibrate import Fleet, Known, fit
from pilotage.live.history import HistoryError, Prometheus, Recording, increases, quantile_s, read
from pilotage.live.prices import PriceOf
from pilotage.recording import open_metrics
from pilotage.rehearse import Check, check, rehearse, scenario_of
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Diurnal
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError
from tests.live.prometheus import program, remembering

NAN = float("nan")


def test_counters_survive_resets_gaps_and_replicas_that_come() -> None:
    assert increases(np.array([10.0, 15.0, 3.0, 4.0])).tolist() == [5.0, 3.0, 1.0]
    assert increases(np.array([10.0, NAN, 16.0])).tolist() == [0.0, 6.0]
    assert increases(np.array([NAN, NAN, 7.0, 9.0])).tolist() == [0.0, 7.0, 2.0]
    assert increases(np.array([NAN, NAN])).tolist() == [0.0]
    # a replica that changes its name: the old series ends, the new one starts at zero
    assert (increases(np.array([50.0, 60.0, NAN])) + increases(np.array([NAN, NAN, 8.0]))).sum() == 18.0


def test_quantiles_are_those_of_prometheus() -> None:
    edges, counts = np.array([0.1, 0.2, 0.4]), np.array([50.0, 30.0, 20.0, 0.0])
    assert quantile_s(edges, counts, 0.5) == pytest.approx(0.1)
    assert quantile_s(edges, counts, 0.65) == pytest.approx(0.15)
    assert quantile_s(edges, counts, 0.9) == pytest.approx(0.3)
    assert quantile_s(edges, np.array([0.0, 0.0, 0.0, 5.0]), 0.5) == 0.4
    assert math.isnan(quantile_s(edges, np.zeros(4), 0.5))


# --- fits of made-up histories -----------------------------------------------------------------------------
def history(base_s: float = 0.02, per_item_s: float = 0.005, steps: int = 1600, **changes: Any) -> Recording:
    rng = np.random.default_rng(0)
    batches = rng.poisson(200, steps).astype(float)
    batched = np.round(batches * rng.uniform(1, 6, steps))
    busy = base_s * batches + per_item_s * batched
    edges = np.geomspace(0.01, 1.0, 30)
    fields = {
        "service": "ranker", "step_s": 60.0, "arrived": batched, "served": batched, "dropped": np.zeros(steps),
        "edges_s": edges, "buckets": np.ones((steps, 31)), "batches": batches, "batched": batched, "busy_s": busy,
        "ready": np.full(steps + 1, 3.0), "wanted": np.full(steps + 1, 3.0), "start_ups": 9, "start_up_mean_s": 40.0,
        "start_up_cv": 0.1, "missing_share": 0.0,
    }  # fmt: skip
    return Recording(**(fields | changes))


def test_the_law_of_busy_time_is_found() -> None:
    found = fit(history(), 0.2)
    assert found.base_ms[0] == pytest.approx(20.0, rel=1e-6)
    assert found.per_item_ms[0] == pytest.approx(5.0, rel=1e-6)
    assert found.start_up_s[1] < 40.0 < found.start_up_s[2]
    assert found.drift < 1e-9
    assert not found.notes


def test_noise_of_batches_is_told_from_where_steps_cut_them() -> None:
    rng = np.random.default_rng(1)
    plain = history()
    mean_s = plain.busy_s / plain.batches
    busy = plain.busy_s + 0.3 * mean_s * np.sqrt(plain.batches) * rng.standard_normal(len(mean_s))
    cut = 0.01 * rng.standard_normal(len(mean_s) + 1)  # work that one step starts and the next one ends
    found = fit(history(busy_s=busy + np.diff(cut)), 0.2)
    assert found.noise_cv == pytest.approx(0.3, rel=0.1)
    assert found.base_ms[1] <= 20.0 <= found.base_ms[2]


def test_what_is_short_coarse_or_never_started_is_said() -> None:
    notes = " ".join(fit(history(steps=600), 0.2).notes)
    assert "shorter than a day" in notes
    assert "too coarse" in " ".join(fit(history(edges_s=np.geomspace(0.01, 10, 31)[::5][:7]), 0.2).notes)
    assert "no start-up" in " ".join(
        fit(history(start_ups=0, start_up_mean_s=NAN, start_up_cv=NAN), 0.2).notes
    )
    with pytest.raises(SpecError, match="at least 100"):
        fit(history(steps=20, arrived=np.ones(20)), 0.2)


def test_executed_requests_that_never_arrived_are_traffic_unknown() -> None:
    plain = history()
    assert fit(history(arrived=0.8 * plain.arrived), 0.2).unexplained == pytest.approx(0.25)


# --- prices ------------------------------------------------------------------------------------------------
def test_prices_are_read_from_tables_of_three_clouds(tmp_path: Path) -> None:
    (tmp_path / "aws.csv").write_text(
        "instance_type,vcpu,mem_mib,gpu_count,gpu_mem_mib,usd_per_h_us_east_1\ng5.xlarge,4,16384,1,24576,1.006\nx,1,1,,,\n"
    )
    (tmp_path / "azure.csv").write_text("region,sku,usd_per_h\neastus,A1,0.1\nwesteurope,A1,0.12\n")
    (tmp_path / "gce.csv").write_text(
        "table,item,usd_per_h\ninstancePrices,n1-standard-1,0.0475\npreemptiblePrices,n1-standard-1,0.01\n"
    )
    usd, node = PriceOf(path="aws.csv", instance_type="g5.xlarge").look_up(tmp_path)
    assert usd == 1.006
    assert node == Resources(cpu=4.0, memory_gib=16.0, gpus=1.0, gpu_memory_gib=24.0)
    assert PriceOf(path="azure.csv", instance_type="A1", region="westeurope").look_up(tmp_path)[0] == 0.12
    assert PriceOf(path="gce.csv", instance_type="n1-standard-1", spot=True).look_up(tmp_path)[0] == 0.01
    for bad, says in (
        (PriceOf(path="aws.csv", instance_type="g5.xlarg"), "did you mean 'g5.xlarge'"),
        (PriceOf(path="aws.csv", instance_type="x"), "has no price"),
        (PriceOf(path="azure.csv", instance_type="A1", region="westeurop"), "did you mean 'westeurope'"),
        (PriceOf(path="none.csv", instance_type="A1"), "cannot be read"),
    ):
        with pytest.raises(SpecError, match=says):
            bad.look_up(tmp_path)


# --- through a real Prometheus -----------------------------------------------------------------------------
STEP_S = 30.0
CPU = Pool(name="cpu", price_usd_per_hour=1.0, max_nodes=20)
REAL = Service(
    name="ranker",
    slo_ms=300.0,
    pools=("cpu",),
    traffic=Diurnal(rate_rps=60.0, day_amplitude=0.7, peak_hour=3.0, noise_cv=0.3),
    server=BatchServer(max_batch=8, batch_wait_ms=5.0),
    variants=(
        Variant(
            name="v",
            load_s=60.0,
            load_cv=0.1,
            latency={"cpu": Affine(base_ms=20.0, per_item_ms=8.0, noise_cv=0.2)},
        ),
    ),
    initial_replicas=2,
    max_replicas=12,
)
needs_prometheus = pytest.mark.skipif(
    program("prometheus") is None or program("promtool") is None,
    reason="no prometheus and promtool on the path, or in PILOTAGE_PROMETHEUS",
)


def recover(
    service: Service, claimed: BatchServer, folder: Path, hours: float = 3.0
) -> tuple[Any, Check, Scenario, Fleet]:
    scenario = Scenario(title="real", pools=(CPU,), services=(service,), tick_s=STEP_S, horizon_h=hours)
    began = (time.time() - 3600 * (hours + 6)) // STEP_S * STEP_S
    text = open_metrics(scenario, [Hpa(target_utilization=0.6)], World(3), began_s=began)
    with remembering(text, folder) as url:
        when = [np.datetime64(int(t), "s").astype(str) for t in (began, began + 3600 * hours)]
        source = Prometheus(url=url, start=when[0], end=when[1], step_s=STEP_S)
        known = Known(name="ranker", slo_ms=300.0, pool="cpu", server=claimed, max_replicas=12)
        fleet = Fleet(prometheus=source, pools=(CPU,), services=(known,))
        recorded = read(source, "ranker")
        with pytest.raises(HistoryError, match=r"requests_total.*latency_seconds_bucket"):
            read(source, "nobody")
        with pytest.raises(HistoryError, match="400"):
            source.range("sum(")
    found = [(known, recorded, fit(recorded, 0.3))]
    scenario = scenario_of(fleet, fleet.pools, found, folder / "traffic")
    return found, check(scenario, found)[0], scenario, fleet


@needs_prometheus
def test_a_fleet_is_recovered_through_a_real_prometheus(tmp_path: Path) -> None:
    found, judged, scenario, _ = recover(REAL, REAL.server, tmp_path)
    _, recorded, fitted = found[0]
    assert judged.good, judged
    assert fitted.base_ms[0] + 4 * fitted.per_item_ms[0] == pytest.approx(52.0, rel=0.05)
    assert fitted.base_ms[0] == pytest.approx(20.0, rel=0.05)
    assert fitted.start_up_s[0] == pytest.approx(60.0, rel=0.10)
    assert fitted.noise_cv == pytest.approx(0.2, abs=0.1)
    assert judged.predicted["p95"] == pytest.approx(judged.recorded["p95"], rel=0.05)
    rows = rehearse(scenario, found, [("hpa", Hpa())])
    assert rows[0]["total_usd"]["low"] <= rows[0]["total_usd"]["mean"] <= rows[0]["total_usd"]["high"]
    assert rows[0]["requests"] == pytest.approx(5 * float(recorded.arrived.sum()), rel=0.001)  # of five draws


@needs_prometheus
def test_a_wrong_routing_is_not_called_good(tmp_path: Path) -> None:
    others = REAL.server.replace(routing="round-robin")
    _, judged, _, _ = recover(REAL.replace(server=others), REAL.server, tmp_path)
    assert not judged.good
    assert "routing" in judged.misfits[0]


def test_what_is_written_loads_as_the_scenario_that_was_fitted(tmp_path: Path) -> None:
    from pilotage.rehearse import as_toml
    from pilotage.scenario import load

    known = Known(name="ranker", slo_ms=300.0, pool="cpu", server=REAL.server, max_replicas=12)
    recorded = history()
    found = [(known, recorded, fit(recorded, 0.3))]
    source = Prometheus(url="http://127.0.0.1:9090", start="2026-11-20T00:00:00", end="2026-11-21T00:00:00")
    fleet = Fleet(prometheus=source, pools=(CPU,), services=(known,))
    scenario = scenario_of(fleet, fleet.pools, found, tmp_path)
    (tmp_path / "scenario.toml").write_text(as_toml(scenario))
    again = load(tmp_path / "scenario.toml", tmp_path)
    assert again.services == scenario.services
    assert again.pools == scenario.pools
    assert again.horizon_h == scenario.horizon_h
    assert sum(map(int, (tmp_path / "ranker.txt").read_text().split())) == int(recorded.arrived.sum())


@needs_prometheus
def test_the_commands_calibrate_and_rehearse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from pilotage.cli import app

    scenario = Scenario(title="real", pools=(CPU,), services=(REAL,), tick_s=STEP_S, horizon_h=2.0)
    began = (time.time() - 3600 * 8) // STEP_S * STEP_S
    text = open_metrics(scenario, [Hpa(target_utilization=0.6)], World(4), began_s=began)
    (tmp_path / "prices.csv").write_text("instance_type,usd_per_h_us_east_1\nc5,0.34\n")
    with remembering(text, tmp_path) as url:
        start, end = (np.datetime64(int(t), "s").astype(str) for t in (began, began + 7200))
        (tmp_path / "fleet.toml").write_text(
            f"[prometheus]\nurl = '{url}'\nstart = '{start}'\nend = '{end}'\nstep_s = {STEP_S}\n"
            "[[pools]]\nname = 'cpu'\nprice_usd_per_hour = 9.0\nmax_nodes = 20\n"
            "[prices.cpu]\npath = 'prices.csv'\ninstance_type = 'c5'\n"
            "[[services]]\nname = 'ranker'\nslo_ms = 300.0\npool = 'cpu'\nmax_replicas = 12\n"
            "server = {max_batch = 8, batch_wait_ms = 5.0}\neconomics = {late_usd = 0.001, dropped_usd = 0.001}\n"
        )
        out = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "fleet.toml"), *out])
        assert done.exit_code == 0, done.output
        assert "ranker: good" in done.output
        assert "price_usd_per_hour = 0.34" in (tmp_path / "out" / "scenario.toml").read_text()
        done = CliRunner().invoke(
            app, ["rehearse", str(tmp_path / "fleet.toml"), "--policy", "hpa", "--policy", "predictive", *out]
        )
        assert done.exit_code == 0, done.output
        assert "predictive" in done.output
        (tmp_path / "fleet.toml").write_text(
            (tmp_path / "fleet.toml").read_text().replace("'ranker'", "'nobody'")
        )
        done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "fleet.toml"), *out])
    assert done.exit_code == 1
    assert "has none of: requests_total" in done.output + capsys.readouterr().err


def test_an_explosion_of_labels_is_refused_and_long_spans_are_asked_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pilotage.live import history as module

    source = Prometheus(url="http://127.0.0.1:9090", start="2026-11-20T00:00:00", end="2026-11-20T00:10:00")
    asked: list[tuple[float, float]] = []

    def ask(self: Prometheus, query: str, start_s: float, end_s: float) -> list[Any]:
        asked.append((start_s, end_s))
        values = msgspec.Raw(f'[[{start_s},"1"],[{end_s},"NaN"]]'.encode())
        return [module._Row({"pod": str(k)}, values) for k in range(5)]

    monkeypatch.setattr(Prometheus, "_ask", ask)
    monkeypatch.setattr(module, "MOST_POINTS", 4)
    found = source.range("up")
    assert len(found) == 5
    assert len(asked) == 3  # of eleven points
    assert found[0].values[0] == 1.0
    assert math.isnan(found[0].values[1])
    monkeypatch.setattr(module, "MOST_SERIES", 3)
    with pytest.raises(HistoryError, match="recording rule"):
        source.range("up")
    for broken in (b"[1]", b'[[1,"a"]]', b'[[1,"2",3]]', b"{}"):
        row = module._Row({}, msgspec.Raw(broken))
        monkeypatch.setattr(Prometheus, "_ask", lambda *_, row=row: [row])
        with pytest.raises(HistoryError, match="no list of times and values"):
            source.range("up")
    with pytest.raises(SpecError, match="ISO 8601"):
        Prometheus(url="http://x", start="yesterday", end="2026-11-20")
