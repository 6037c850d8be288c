"""Nodes, zones, spot markets, faults and variants: what is refused and how, and what the tables are read as."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilotage.scenario import Scenario, json_schema, load, shipped
from pilotage.world.faults import BANDS, MONTH_H, Advisor, Availability, Hazard, RandomOutages
from pilotage.world.pools import Resources
from pilotage.world.servers import TABLE_CELLS, Affine, Variant
from pilotage.world.spec import SpecError, decode

GPU = {"cpu": 8.0, "memory_gib": 32.0, "gpus": 1.0, "gpu_memory_gib": 22.0}
LAW = {"kind": "affine", "base_ms": 5.0, "per_item_ms": 10.0}
MARKET = {"kind": "availability", "path": "spot.csv", "campaign": "first", "series": {"a": "va", "b": "vb"}}
CLUSTER: dict[str, Any] = {
    "title": "a cluster",
    "outages": [{"zone": "b", "start_h": 1.0, "duration_h": 0.5}],
    "interference": [{"service": "big", "neighbour": "small", "slowdown": 1.5}],
    "pools": [
        {"name": "gpu", "price_usd_per_hour": 1.2, "zones": ["a", "b"], "node": GPU, "max_nodes": 3},
        {"name": "spot", "price_usd_per_hour": 0.5, "zones": ["a", "b"], "node": GPU,
         "spot": {"market": MARKET, "notice_s": 30.0}},
        {"name": "cpu", "price_usd_per_hour": 1.0, "zones": ["c"]},
    ],
    "services": [
        {"name": "big", "slo_ms": 500.0, "pools": ["gpu", "spot"], "zones": ["a", "b"], "max_per_node": 1,
         "traffic": {"kind": "poisson", "rate_rps": 1.0},
         "variants": [
             {"name": "fp16", "latency": {"gpu": LAW, "spot": LAW},
              "resources": {"gpus": 0.5, "gpu_memory_gib": 16.0}},
             {"name": "int8", "latency": {"gpu": LAW}, "accuracy": 0.9,
              "resources": {"gpus": 0.25, "gpu_memory_gib": 8.0}},
         ]},
        {"name": "small", "slo_ms": 500.0, "pools": ["cpu", "gpu"],
         "traffic": {"kind": "poisson", "rate_rps": 1.0},
         "variants": [{"name": "fp32", "latency": {"gpu": LAW, "cpu": LAW}}]},
    ],
}  # fmt: skip


def cluster(*changes: tuple[str, Any]) -> Scenario:
    """The cluster with the values at some places changed, such as "pools.0.zones"."""
    raw = copy.deepcopy(CLUSTER)
    for place, value in changes:
        *way, last = place.split(".")
        at: Any = raw
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        at[last] = value
    return decode(raw, Scenario, "mine.toml")


def refuses(call: Any, *parts: str) -> None:
    with pytest.raises(SpecError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cluster_is_fine_as_it_is() -> None:
    scenario = cluster()
    assert scenario.pools[1].spot is not None
    assert isinstance(scenario.pools[1].spot.market, Availability)
    assert cluster(("pools.1.spot.market", {"kind": "hazard", "per_hour": 0.1})).pools[1].spot.notice_s == 30


BAD = {
    "a service wants a zone that no pool has": (
        ("services.0.zones", ["a", "bb"]), "'big'", "zone 'bb'", "did you mean 'b'?"),
    "a service wants a zone of another's pool": (("services.0.zones", ["c"]), "zone 'c'", "valid: a, b"),
    "an outage of an unknown zone": (("outages.0.zone", "zone-b"), "zone 'zone-b'", "valid: a, b, c"),
    "an outage without length": (("outages.0.duration_h", 0.0), "`float` > 0", "$.outages[0].duration_h"),
    "a zone twice": (("pools.0.zones", ["a", "b", "a"]), "a, b, a", "named twice", "$.pools[0]"),
    "no zone": (("pools.0.zones", []), "length >= 1", "$.pools[0].zones"),
    "a pool twice": (("services.0.pools", ["gpu", "gpu"]), "pools gpu, gpu", "named twice", "$.services[0]"),
    "an unknown pool": (("services.1.pools", ["cpu", "gpus"]), "'gpus'", "no latency law", "cpu"),
    "a law for an unknown pool": (
        ("services.0.variants.1.latency", {"gpu": LAW, "sopt": LAW}),
        "'big'", "'int8'", "'sopt'", "did you mean 'spot'?"),
    "a variant that fits no node": (
        ("services.0.variants.1.resources", {"gpus": 2.0, "gpu_memory_gib": 23.0}),
        "'int8' can be placed nowhere", "has 1 of 2 gpus, 22 of 23 gpu_memory_gib",
        "no latency law for 'spot'"),
    "a pool on which no variant fits": (
        ("pools.1.node", {"cpu": 64.0}), "'big' lists pool 'spot'", "0 of 0.5 gpus", "leave the pool out"),
    "a pool in none of the service's zones": (
        ("pools.0.zones", ["c"]), "'int8' can be placed nowhere", "'gpu' is in c, not in a, b"),
    "a variant that needs nothing": (
        ("services.0.variants.0.resources", {}), "all resources are 0", "gpu_memory_gib"),
    "a node that has nothing": (("pools.0.node", {"cpu": 0.0}), "all resources are 0", "$.pools[0].node"),
    "a misspelt resource": (("pools.0.node", {"gpu": 1.0}), "`gpu`", "$.pools[0].node", "did you mean 'gpus'?"),
    "a negative resource": (("pools.0.node", {"cpu": -1.0}), "`float` >= 0.0", "$.pools[0].node.cpu"),
    "an unknown market": (
        ("pools.1.spot.market", {"kind": "advise"}), "'advise'", "did you mean 'advisor'?"),
    "a zone without a series": (
        ("pools.1.spot.market", MARKET | {"series": {"a": "va"}}),
        "no series for zone 'b'", "which has: a", "$.pools[1]"),
    "a hazard below 0": (
        ("pools.1.spot.market", {"kind": "hazard", "per_hour": -1.0}), ">= 0.0", "market.per_hour"),
    "orders that always fail": (("pools.0.provisioning_failure", 1.0), "< 1.0", "provisioning_failure"),
    "slow nodes that are fast": (("pools.0.slow_factor", 0.5), ">= 1.0", "slow_factor"),
    "an unknown rule": (("placement", {"rule": "worst-fit"}), "'worst-fit'", "did you mean 'first-fit'?"),
    "interference of a stranger": (
        ("interference.0.neighbour", "smal"), "service 'smal'", "did you mean 'small'?"),
    "interference given twice": (
        ("interference", CLUSTER["interference"] * 2), "'small' with 'big'", "given twice"),
    "interference that speeds up": (("interference.0.slowdown", 0.9), ">= 1.0", "$.interference[0].slowdown"),
    "a batch size without a measured time": (
        ("services.1.server", {"max_batch": 4}), "'small': variant 'fp32', latency on pool 'gpu'",
        "batch_ms has 2 entries"),
    "what happens to requests of the dead": (
        ("services.0.on_failure", "retrying"), "'retrying'", "did you mean 'retry'?"),
    "both forms of load time": (
        ("services.1.variants.0.load_quantiles_s", [1.0, 2.0]), "give one or the other", "variants[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_in_one_line(name: str) -> None:
    change, *parts = BAD[name]
    more: list[tuple[str, Any]] = []
    if "batch size" in name:
        more = [("services.1.variants.0.latency.gpu", {"kind": "table", "batch_ms": [5.0, 8.0]})]
    if "both forms" in name:
        more = [("services.1.variants.0.load_s", 3.0)]
    refuses(lambda: cluster(*more, change), "mine.toml", *parts)


def test_replicas_without_room() -> None:
    """One replica a node on at most three and two nodes; without the limit, one of half a GPU by its memory, and
    two of a quarter."""
    few = ("pools.1.max_nodes", 2)
    assert cluster(few, ("services.0.min_replicas", 5)).services[0].min_replicas == 5
    refuses(lambda: cluster(few, ("services.0.min_replicas", 6)), "'big'", "6", "room for at most 5 replicas")
    free = (few, ("services.0.max_per_node", None))
    assert cluster(*free, ("services.0.min_replicas", 8)).services[0].min_replicas == 8
    refuses(lambda: cluster(*free, ("services.0.min_replicas", 9)), "9", "room for at most 8 replicas")


def test_resources() -> None:
    node = Resources(cpu=8, memory_gib=1, gpus=1)
    assert Resources(gpus=0.1).copies_on(node) == 10  # though 10 * 0.1 is not 1 in binary numbers
    assert Resources(cpu=3, memory_gib=0.2).copies_on(node) == 2
    assert Resources(gpu_memory_gib=1).copies_on(node) == 0
    assert Resources(cpu=8).shortfall(node) == []
    assert Resources(cpu=9, gpu_memory_gib=4).shortfall(node) == ["8 of 9 cpu", "0 of 4 gpu_memory_gib"]


def test_the_schema_knows_it_all() -> None:
    definitions = json_schema()["$defs"]
    markets = {d["properties"]["kind"]["enum"][0] for d in definitions.values() if "kind" in d["properties"]}
    assert {"hazard", "advisor", "availability"} <= markets
    assert {"outages", "random_outages", "interference", "placement"} <= set(
        definitions["Scenario"]["properties"]
    )


# --- load times ------------------------------------------------------------------------------------------
DECILES = (1.3, 2.6, 2.9, 3.6, 20.1, 22.7, 26.9, 35.4, 38.3, 42.0, 51.8)


def variant(**fields: Any) -> Variant:
    return Variant(name="v", latency={"gpu": Affine(base_ms=1, per_item_ms=1)}, **fields)


def at(table: np.ndarray, probability: float) -> float:
    """The quantile that the engine reads from a table."""
    from pilotage.engine.randomness import from_table

    return float(from_table(table, probability))


def test_load_times_follow_the_quantiles() -> None:
    mean_s, table = variant(load_quantiles_s=DECILES).load_law()
    assert mean_s == pytest.approx(sum((a + b) / 2 for a, b in itertools.pairwise(DECILES)) / 10)
    assert table.shape == (2 * TABLE_CELLS,)
    cell_s = 10 * max(np.diff(DECILES)) / TABLE_CELLS  # a kink is cut by at most what happens within a cell
    for k, quantile in enumerate(DECILES[1:-1], 1):
        assert mean_s * at(table, k / 10) == pytest.approx(quantile, abs=cell_s)
    assert mean_s * at(table, 0.45) == pytest.approx((20.1 + 22.7) / 2, rel=0.01)  # straight in between
    assert DECILES[0] <= mean_s * at(table, 1e-9) < mean_s * at(table, 1 - 1e-9) <= DECILES[-1]
    drawn = [at(table, (k + 0.5) / 20_000) for k in range(20_000)]
    assert np.mean(drawn) == pytest.approx(1, abs=1e-4)


def test_constant_quantiles_are_a_constant() -> None:
    mean_s, table = variant(load_quantiles_s=(7.0, 7.0)).load_law()
    assert mean_s == 7
    assert table == pytest.approx(np.ones(2 * TABLE_CELLS))
    assert variant(load_quantiles_s=(7.0, 7.0), image_pull_s=3).start_up_s == 10


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [((1.0,), "at least two"), ((2.0, 1.0), "ascending"), ((0.0, 0.0), "all 0"), ((), "at least two")],
)
def test_bad_quantiles(quantiles: tuple[float, ...], message: str) -> None:
    refuses(lambda: variant(load_quantiles_s=quantiles), "load_quantiles_s", message)


# --- outages at random -----------------------------------------------------------------------------------
def test_random_outages_follow_their_rate() -> None:
    outages, weeks, zones = RandomOutages(per_zone_per_week=5, mean_duration_h=2), 400, ("a", "b", "c")
    windows = outages.windows(np.random.default_rng(1), zones, weeks * 7 * 86400.0)
    assert tuple(windows) == zones
    for spans in windows.values():
        assert all(start < end for start, end in spans)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))
        # an M/G/infinity queue: the share of the time with none in progress is exp(-rate * mean duration)
        down = sum(end - start for start, end in spans) / (weeks * 7 * 86400)
        busy = 1 - math.exp(-5 * 2 / 168)
        assert down == pytest.approx(busy, rel=0.1)
        assert len(spans) == pytest.approx(5 * weeks * (1 - busy), rel=0.1)


def test_a_longer_horizon_only_adds_outages() -> None:
    outages = RandomOutages(per_zone_per_week=30, mean_duration_h=4)
    short, long = (outages.windows(np.random.default_rng(3), "ab", 86400.0 * days) for days in (5, 20))
    for zone in "ab":
        before = [start for start, _ in long[zone] if start < 5 * 86400]
        assert [start for start, _ in short[zone]] == before
        assert short[zone][:-1] == long[zone][: len(before) - 1]


# --- spot markets on small tables ------------------------------------------------------------------------
ADVICE = """region,instance_type,savings_pct_vs_ondemand,monthly_interruption_freq
here,g5.xlarge,60,5-10%
here,g5.2xlarge,-20,>20%
there,g5.xlarge,70,<5%
"""
RUNS = """kind,campaign,zone_gpu,start_s,duration_s,available
x,first,va,0,100,1
x,first,va,100,50,0
x,first,va,150,50,0
x,first,va,200,100,1
x,first,vb,0,60,0
x,first,vb,60,40,1
x,first,vb,120,30,0
x,first,vb,180,20,1
x,second,vb,50,100,1
"""
RECORDED = Availability(path="spot.csv", campaign="first", series={"a": "va", "b": "vb"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "advice.csv").write_text(ADVICE)
    (tmp_path / "spot.csv").write_text(RUNS)
    return tmp_path


def test_a_hazard_is_what_it_says() -> None:
    market = Hazard(per_hour=0.3)
    assert market.interruptions_per_hour(None) == 0.3
    assert market.saving(None) == 0
    assert market.closed_s("anywhere", 0, 1e9, None) == []


def test_the_advisor_reads_saving_and_band(data: Path) -> None:
    here = Advisor(region="here", instance_type="g5.xlarge", path="advice.csv")
    assert here.saving(data) == 0.6
    # whoever runs for a month is interrupted with the probability in the middle of the band
    assert 1 - math.exp(-here.interruptions_per_hour(data) * MONTH_H) == pytest.approx(0.075)
    dear = here.replace(instance_type="g5.2xlarge")
    assert dear.saving(data) == -0.2
    assert 1 - math.exp(-dear.interruptions_per_hour(data) * MONTH_H) == pytest.approx(BANDS[">20%"])
    assert here.replace(region="there").saving(data) == 0.7
    assert here.closed_s("a", 0, 1e9, data) == []


def test_availability_gives_the_closed_times(data: Path) -> None:
    assert RECORDED.closed_s("a", 0, 300, data) == [(100, 200)]  # two runs of equal value are one
    assert RECORDED.closed_s("a", 120, 130, data) == [(120, 130)]
    assert RECORDED.closed_s("a", 0, 100, data) == RECORDED.closed_s("a", 200, 300, data) == []
    # nothing is known of [100, 120) and [150, 180): what was seen last holds
    assert RECORDED.closed_s("b", 0, 200, data) == [(0, 60), (120, 180)]
    assert RECORDED.closed_s("b", 30, 130, data) == [(30, 60), (120, 130)]
    assert RECORDED.replace(campaign="second").closed_s("b", 50, 150, data) == []
    # a notice may come within the run for what closes after it: a longer run would have seen it, too
    assert RECORDED.closed_s("a", 0, 90, data, 15) == [(100, 105)]
    assert RECORDED.closed_s("a", 0, 90, data, 5) == []
    assert RECORDED.interruptions_per_hour(data) == RECORDED.saving(data) == 0


def test_a_compressed_table_is_read_alike_and_a_new_one_is_noticed(data: Path) -> None:
    (data / "spot.csv.gz").write_bytes(gzip.compress(RUNS.encode()))
    packed = RECORDED.replace(path="spot.csv.gz")
    assert packed.closed_s("b", 0, 200, data) == RECORDED.closed_s("b", 0, 200, data)
    (data / "spot.csv").write_text(RUNS.replace("vb,120,30,0", "vb,100,50,0"))
    assert RECORDED.closed_s("b", 0, 200, data) == [(0, 60), (100, 180)]


ADVISOR = Advisor(region="here", instance_type="g5.xlarge", path="advice.csv")
UNKNOWN = {
    "region": (lambda d: ADVISOR.replace(region="heer").saving(d), "'heer'", "did you mean 'here'?"),
    "instance type": (
        lambda d: ADVISOR.replace(instance_type="g5.xlarg").saving(d),
        "advice.csv", "'g5.xlarg' in region 'here'", "did you mean 'g5.xlarge'?"),
    "instance type like none": (
        lambda d: ADVISOR.replace(instance_type="p3").saving(d), "valid: the 2 types of that region"),
    "campaign": (
        lambda d: RECORDED.replace(campaign="frist").closed_s("a", 0, 1, d), "'frist'", "did you mean 'first'?"),
    "series": (
        lambda d: RECORDED.replace(series={"a": "vc"}).closed_s("a", 0, 1, d),
        "spot.csv", "'vc' in campaign 'first'", "valid: va, vb"),
    "zone": (lambda d: RECORDED.closed_s("c", 0, 1, d), "no series for zone 'c'", "a, b"),
    "a run that is too long": (
        lambda d: RECORDED.closed_s("a", 0, 301, d),
        "'va' of campaign 'first' covers 0 s to 300 s", "from 0 s to 301 s"),
    "a run before the series": (
        lambda d: RECORDED.replace(campaign="second").closed_s("b", 0, 60, d), "covers 50 s to 150 s"),
    "no data": (lambda d: RECORDED.closed_s("a", 0, 1, None), "'spot.csv'", "--data DIR", "PILOTAGE_DATA"),
    "file": (lambda d: ADVISOR.replace(path="advise.csv").saving(d), "did you mean 'advice.csv'?"),
    "outside": (lambda d: ADVISOR.replace(path="../advice.csv").saving(d), "outside the data directory"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_a_table_does_not_have(what: str, data: Path) -> None:
    call, *parts = UNKNOWN[what]
    refuses(lambda: call(data), *parts)


BAD_ADVICE = {
    "": "advice.csv: empty table",
    "region,instance_type,savings_pct_vs_ondemand,monthly_interruption_freq\n": "empty table",
    ADVICE.replace("region,", "place,"): "no column 'region'; it has: place, instance_type",
    ADVICE.replace(">20%", "often"): "advice.csv:3: monthly_interruption_freq 'often'; valid: <5%, 5-10%",
    ADVICE.replace("-20", "much"): "advice.csv:3: savings_pct_vs_ondemand 'much' is not a finite number",
    ADVICE.replace("-20", "nan"): "advice.csv:3: savings_pct_vs_ondemand 'nan' is not a finite number",
    ADVICE.replace("-20", "120"): "advice.csv:3: savings_pct_vs_ondemand '120'; valid: at most 100",
    ADVICE.replace("there,", "here,"): "advice.csv:4: 'g5.xlarge' occurs twice in region 'here'",
    ADVICE + "\nthere,g6\n": "advice.csv:6: 2 cells; valid: 4",
}
BAD_RUNS = {
    RUNS.replace(
        "va,100,50,0", "va,100,50,2"
    ): "spot.csv:3: available '2'; valid: 0 (no node to be had) or 1",
    RUNS.replace("va,100,50", "va,100,0"): "spot.csv:3: start_s 100, duration_s 0; valid",
    RUNS.replace("va,0,100", "va,-5,100"): "spot.csv:2: start_s -5, duration_s 100; valid",
    RUNS.replace("va,150", "va,149"): "spot.csv:4: series 'va' has a run from 149 s, before the end",
    RUNS.replace("vb,60,40", "vb,60,forty"): "spot.csv:7: duration_s 'forty' is not a finite number",
}


@pytest.mark.parametrize("text", BAD_ADVICE, ids=list(BAD_ADVICE.values()))
def test_a_bad_table_of_advice_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "advice.csv").write_text(text)
    refuses(lambda: ADVISOR.interruptions_per_hour(tmp_path), BAD_ADVICE[text])


@pytest.mark.parametrize("text", BAD_RUNS, ids=list(BAD_RUNS.values()))
def test_a_bad_series_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "spot.csv").write_text(text)
    refuses(lambda: RECORDED.closed_s("a", 0, 1, tmp_path), BAD_RUNS[text])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "spot.csv.gz").write_bytes(gzip.compress(RUNS.encode())[:40])
    refuses(lambda: RECORDED.replace(path="spot.csv.gz").closed_s("a", 0, 1, tmp_path), "cannot be read")
    (tmp_path / "spot.csv").write_bytes(b"\xff\xfe\x00")
    refuses(lambda: RECORDED.closed_s("a", 0, 1, tmp_path), "spot.csv: cannot be read", "give an intact file")
    (tmp_path / "spot.txt").write_text("1\n")
    refuses(lambda: RECORDED.replace(path="spot.txt").closed_s("a", 0, 1, tmp_path), "not a table", ".csv.gz")


# --- the shipped environments, and what they quote -------------------------------------------------------
@pytest.mark.parametrize("stem", shipped())
def test_every_shipped_environment_loads(stem: str) -> None:
    scenario = load(stem)
    assert scenario.name == stem
    assert scenario.title.lower().replace(" ", "-").startswith(stem)


def test_every_scenario_of_the_docs_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "mine.toml").write_text(block)
        load(tmp_path / "mine.toml")


def test_the_many_tenants_are_many_and_unequal() -> None:
    services = load("multi-tenant").services
    assert len(services) >= 20
    late_usd = [service.economics.late_usd for service in services]
    assert max(late_usd) >= 100 * min(late_usd)
    for service in services:
        if len(service.variants) > 1:
            full, small = service.variants
            assert small.accuracy < full.accuracy
            assert small.resources.gpu_memory_gib < full.resources.gpu_memory_gib
            assert small.latency["gpu"].per_item_ms < full.latency["gpu"].per_item_ms


SHARED = Path(os.environ.get("PILOTAGE_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
real = pytest.mark.skipif(not (SHARED / "spot").is_dir(), reason="no recorded markets: set PILOTAGE_DATA")
V100 = Availability(
    path="spot/skypilot_spot_dev.csv.gz",
    campaign="aws-02-15-2023",
    series={z: f"us-{z}_v100_1" for z in ("east-2a", "east-2b", "west-2a", "west-2b", "west-2c")},
)


def table(path: str) -> list[dict[str, str]]:
    with gzip.open(SHARED / path, "rt") as lines:
        return list(csv.DictReader(lines))


@real
def test_the_advisor_of_2025() -> None:
    for region, saving, p in (("us-east-2", 0.58, 0.125), ("us-west-2", 0.63, 0.25)):
        market = Advisor(region=region, instance_type="g5.xlarge")
        assert market.saving(SHARED) == saving
        assert market.interruptions_per_hour(SHARED) == pytest.approx(-math.log(1 - p) / 730.5)
    refuses(
        lambda: Advisor(region="us-east-1", instance_type="g5.xlrge").saving(SHARED),
        "did you mean 'g5.xlarge'?",
    )
    refuses(lambda: Advisor(region="mars-1", instance_type="g5.xlarge").saving(SHARED), "no region 'mars-1'")


@real
def test_recorded_availability() -> None:
    span_s = 3_930_810.0
    closed = {zone: V100.closed_s(zone, 0, span_s, SHARED) for zone in V100.series}
    up_share = {zone: 1 - sum(b - a for a, b in spans) / span_s for zone, spans in closed.items()}
    assert up_share["west-2b"] == pytest.approx(0.90, abs=0.01)  # of the run-length table, counted elsewhere
    assert up_share["east-2a"] == pytest.approx(0.76, abs=0.01)
    assert len(closed["west-2b"]) == 94  # its series begins and ends with nodes to be had
    day = V100.closed_s("west-2a", 10 * 86400.0, 11 * 86400.0, SHARED)
    assert all(10 * 86400 <= a < b <= 11 * 86400 for a, b in day)
    refuses(lambda: V100.closed_s("west-2a", 0, 1100 * 3600.0, SHARED), "(1092 h)", "(1100 h)")


@real
def test_the_spot_fleet_quotes_its_sources() -> None:
    pools = load("spot-fleet").pool_by_name
    prices = {
        row["instance_type"]: row["usd_per_h_us_east_1"]
        for row in table("prices/aws_ec2_ondemand_2026-07.csv.gz")
    }
    price = float(prices["g5.xlarge"])
    assert pools["on-demand"].price_usd_per_hour == price
    assert load("zone-outage").pools[0].price_usd_per_hour == float(prices["c7i.8xlarge"])
    many = load("multi-tenant").pool_by_name
    assert many["gpu"].price_usd_per_hour == float(prices["g5.2xlarge"])
    assert many["cpu"].price_usd_per_hour == float(prices["c7i.8xlarge"])
    for name, region in (("spot-near", "us-east-2"), ("spot-far", "us-west-2")):
        pool = pools[name]
        advisor = Advisor(region=region, instance_type="g5.xlarge")
        assert pool.price_usd_per_hour == pytest.approx(price * (1 - advisor.saving(SHARED)), abs=1e-4)
        runs = [r for r in table(V100.path) if r["campaign"] == V100.campaign and region in r["zone_gpu"]]
        up_h = sum(int(r["duration_s"]) for r in runs if r["available"] == "1") / 3600
        all_h = sum(int(r["duration_s"]) for r in runs) / 3600
        losses = sum(
            a["available"] == "1" and a["zone_gpu"] == b["zone_gpu"] for a, b in itertools.pairwise(runs)
        )
        assert pool.spot is not None
        assert pool.spot.market.interruptions_per_hour(None) == pytest.approx(losses / up_h, abs=1e-4)
        assert pool.provisioning_failure == pytest.approx(1 - up_h / all_h, abs=1e-3)


@real
def test_the_many_tenants_quote_their_sources() -> None:
    scenario = load("multi-tenant")
    measured = {}
    for row in table("profiles/gavel_training_throughput_simulation.csv.gz"):
        if row["gpu"] == "v100":
            measured[row["job"], row["colocated_with"]] = float(row["steps_per_s"])

    def slowdown(job: str, beside: str) -> float:
        job, beside = (f"('{name}', 1)" for name in (job, beside))
        return measured[job, "null"] / measured[job, beside] / 2

    recommender, image, text, language = (
        "Recommendation (batch size 1024)", "ResNet-50 (batch size 32)",
        "Transformer (batch size 64)", "LM (batch size 20)",
    )  # fmt: skip
    kinds = {
        **dict.fromkeys(("feed-ranking", "ads-ranking"), recommender),
        **dict.fromkeys(("video-moderation", "photo-quality"), image),
        **dict.fromkeys(("rerank-shop", "rerank-jobs"), text),
        "chat-guard": language,
    }
    for pair in scenario.interference:
        assert pair.slowdown == pytest.approx(slowdown(kinds[pair.service], kinds[pair.neighbour]), abs=0.05)
    quoted = {q for s in scenario.services for v in s.variants if (q := v.load_quantiles_s)}
    for name in ("pipeline", "basemodel", "lora"):
        seconds = [float(r["value"]) / 1e3 for r in table(f"coldstart/genai_{name}_update_latency.csv.gz")]
        deciles = np.quantile(seconds, [*np.arange(10) / 10, 0.99])
        assert any(np.allclose(q, deciles, atol=0.051) for q in quoted)
