"""Law 7: the engine equals a small plain-Python reference event by event, and itself without compilation."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings

from pilotage.engine.cluster import stream
from pilotage.engine.layout import COUNTS, DRAINING, GONE, STARTING, TICK, TOKEN_COUNTS
from pilotage.engine.placement import RULES
from pilotage.metrics import BUCKET_MIDPOINTS_S, bucket_of
from pilotage.world.servers import Exponential
from tests.strategies import Case, cases, one_of
from tests.traces import reference, reference_log
from tests.traces.reference_cluster import Reference


def close(a: float, b: float) -> bool:
    """Integers, infinity and NaN exactly, other numbers to 1e-9."""
    if a == b or isinstance(b, int) or not math.isfinite(b):
        return a == b or (a != a and b != b)
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b)) + 1e-10


def numbers_of(cluster, r: int, head: int, count: int) -> list[int]:
    """Numbers of the requests in a list of the engine."""
    row = cluster.rows[r]
    links, numbers = cluster.requests[row["storage_lo"] : row["storage_hi"]]["next"], []
    for _ in range(count):
        numbers.append(int(row["first_number"] + head))
        head = links[head]
    return numbers


def engine_state(cluster, w: int, s: int) -> dict:
    """Where every request and replica of a service is, and what it is like; replicas by ordinal."""
    r = w * cluster.shape[1] + s
    param, row = cluster.params[r], cluster.rows[r]
    state = {"queue": numbers_of(cluster, r, row["head"], row["waiting"]), "replacing": int(row["replacing"])}
    for k, replica in enumerate(cluster.replicas[param["replica_lo"] : param["replica_hi"]]):
        if replica["state"] != GONE:
            first = param["slot_lo"] + k * param["slots"]
            slots = cluster.slots[first : first + param["slots"]]
            state[int(replica["ordinal"])] = (
                k,
                int(cluster.nodes[w, replica["node"]]["ordinal"]),
                int(replica["pool"]),
                int(replica["variant"] - param["variant_lo"]),
                ("gone", "starting", "ready", "draining", "leaving")[replica["state"]],
                int(replica["lives"]),
                float(replica["ordered_s"]),
                float(replica["ready_s"]) if replica["state"] == STARTING else 0.0,
                float(replica["pace"]),
                numbers_of(cluster, r, replica["head"], replica["waiting"]),
                [numbers_of(cluster, r, slot["head"], slot["size"]) for slot in slots],
                [float(slot["free_s"]) for slot in slots if slot["size"]],
            )
    return state


def reference_state(world: Reference, s: int) -> dict:
    """The same from the reference."""
    run = world.runs[s]

    def numbers(queue):
        return [q.number for batch in (*queue.closed, queue.open) for q in batch]

    state = {"queue": numbers(run.queue), "replacing": run.replacing}
    for r in run.present:
        state[r.ordinal] = (
            r.number,
            r.node.ordinal,
            world.pools.index(r.node.pool),
            r.variant,
            r.state,
            r.lives,
            r.ordered,
            r.ready if r.state == "starting" else 0.0,
            r.pace,
            numbers(r.queue),
            [[q.number for q in slot.batch.requests] if slot.batch else [] for slot in r.slots],
            [slot.batch.end for slot in r.slots if slot.batch],
        )
    return state


def engine_nodes(cluster, w: int) -> dict:
    """The nodes of a world by ordinal."""
    return {
        int(n["ordinal"]): (
            int(n["pool"]), int(n["zone"]), int(n["owner"]), n["state"] == DRAINING, bool(n["failing"]),
            int(n["replicas"]), n["free"].tolist(),
            *(float(n[f"{name}_s"]) for name in ("ordered", "up", "notice", "death", "empty", "billed")),
            float(n["pace"]),
        )
        for n in cluster.nodes[w] if n["state"] != GONE
    }  # fmt: skip


def reference_nodes(world: Reference) -> dict:
    """The same from the reference."""
    return {
        n.ordinal: (
            world.pools.index(n.pool), world.zones.index(n.zone), world.runs.index(n.owner), n.told, not n.comes,
            len(n.replicas), list(n.free), n.ordered, n.up, n.notice, n.death, n.emptied, n.paid_s, n.pace,
        )
        for n in world.nodes
    }  # fmt: skip


def same(ours, theirs) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return close(ours, theirs) if isinstance(theirs, float) else ours == theirs


def compare(case: Case, read_ahead_s: float) -> None:
    """Runs both and asserts that they agree in every counter of every tick, and on where everybody is."""
    cluster = case.cluster(read_ahead_s=read_ahead_s)
    services = range(len(case.scenario.services))
    worlds = range(len(case.seeds))
    rule, weights = RULES[case.scenario.placement.rule], np.array(case.scenario.placement.weights, np.float64)
    references = [
        Reference(
            case.scenario,
            case.times[w],
            [cluster.seeds(w, s) for s in services],
            cluster.seed_nodes(w),
            stream(case.seeds[w], "outages"),
            lambda candidate: rule(candidate, weights),
        )
        for w in worlds
    ]
    totals = [[dict.fromkeys((*COUNTS, "failed"), 0) for _ in services] for _ in worlds]
    for t, orders in enumerate(case.orders):
        cluster.advance(orders)
        for w in worlds:
            # tokens of an iteration are for LLM services, which have a reference of their own
            ticks = references[w].advance([tuple(order.tolist())[:-1] for order in orders[w]])
            for s in services:
                where = f"tick {t}, world {w}, service {s}"
                ours, theirs = cluster.ticks[w, s], ticks[s]
                assert theirs.keys() == set(TICK.names) - {*TOKEN_COUNTS, "kv_used", "kv_blocks"}
                wrong = {n: (ours[n].item(), x) for n, x in theirs.items() if not close(ours[n].item(), x)}
                assert not wrong, f"{where}: engine, reference: {wrong}"
                ours, theirs = engine_state(cluster, w, s), reference_state(references[w], s)
                assert same(ours, theirs), f"{where}: engine, reference:\n{ours}\n{theirs}"
                for name in totals[w][s]:
                    totals[w][s][name] += ticks[s][name]
            ours, theirs = engine_nodes(cluster, w), reference_nodes(references[w])
            assert same(ours, theirs), f"tick {t}, world {w}: engine, reference:\n{ours}\n{theirs}"
    waiting = cluster.ticks["waiting"].copy()
    cluster.finish()
    for w in worlds:
        for s, last in enumerate(map(reference_log.finish, references[w].runs)):
            for name, n in last.items():
                totals[w][s][name] += n
            for name, total in totals[w][s].items():
                assert close(cluster.totals[w, s][name].item(), total), name
            assert cluster.ticks["overdue"][w, s] == last["overdue"]
            assert waiting[w, s] - cluster.ticks["waiting"][w, s] == last["timed_out"] + last["abandoned"]
            filled = np.flatnonzero(cluster.histograms[w, s])
            histogram = {int(b): int(cluster.histograms[w, s, b]) for b in filled}
            assert histogram == reference_log.histogram(references[w].runs[s])


@settings(max_examples=400, deadline=None)
@given(cases(routed=False), one_of(0.0, 600.0))
def test_engine_equals_reference(case: Case, read_ahead_s: float) -> None:
    compare(case, read_ahead_s)


def test_reference_draws_like_numpy() -> None:
    """The two pieces of arithmetic that the reference and the engine write alike, held against a third."""
    table = Exponential().table()
    probabilities = np.r_[np.arange(511) / 512, (511 + np.arange(513) / 512) / 512]
    u = np.array([reference.uniform(7, k) for k in range(4000)] + [0.0, 0.5, 511 / 512, 1 - 2.0**-53])
    ours = [reference.quantile(table.tolist(), x) for x in u]
    np.testing.assert_allclose(ours, np.interp(u, probabilities, table), rtol=1e-9)
    # SplitMix64 from seed 1234567: the published test vector
    assert [reference.draw(1234567, k) for k in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    latencies = np.r_[0.0, 2.0**-14, np.geomspace(1e-5, 2e6, 5000), 0.5, 1.0, 2.0]
    buckets = np.array([reference_log.bucket(x) for x in latencies.tolist()])
    np.testing.assert_array_equal(buckets, bucket_of(latencies))
    midpoints = [reference_log.bucket_midpoint_s(b) for b in range(len(BUCKET_MIDPOINTS_S))]
    np.testing.assert_array_equal(midpoints, BUCKET_MIDPOINTS_S)


def everything_in_one_run(former: str, routing: str) -> str:
    """sha256 of all that the engine reports of a run with every feature; runs in a fresh process as well."""
    import hashlib

    import msgspec
    import numpy as np

    from pilotage.engine.cluster import Cluster, World
    from pilotage.scenario import Scenario

    pools = [
        {"name": n, "price_usd_per_hour": 1.0, "boot_s": b, "boot_cv": 0.3, "max_nodes": 4, "network_ms": 3.0}
        | {"min_lifetime_s": 1.0, "billing_granularity_s": 0.7, "billing_minimum_s": 2.0}
        for n, b in (("cpu", 1.0), ("gpu", 2.0))
    ]
    law = {"kind": "affine", "base_ms": 40.0, "per_item_ms": 30.0, "noise_cv": 0.3}
    service = {
        "traffic": {"kind": "poisson", "rate_rps": 25.0},
        "slo_ms": 300.0,
        "pools": ["cpu", "gpu"],
        "demand": {"kind": "log-normal", "cv": 1.0},
        "initial_replicas": 2,
        "variants": [{"name": "v", "latency": {"cpu": law, "gpu": law}, "load_s": 0.5, "load_cv": 0.2}],
        "server": {"former": former, "routing": routing, "max_batch": 4, "batch_wait_ms": 30.0}
        | {"queue_limit": 20, "request_timeout_s": 1.5, "patience_s": 2.0, "batches_in_flight": 2},
    }
    services = [service | {"name": name} for name in ("a", "b")]
    raw = {"title": "t", "tick_s": 0.5, "horizon_h": 15 / 3600, "pools": pools, "services": services}
    cluster = Cluster(msgspec.convert(raw, Scenario), [World(1), World(2)])
    rng = np.random.default_rng(3)
    digest = hashlib.sha256()
    for _ in range(cluster.scenario.ticks):
        orders = cluster.no_orders()
        orders["order"] = rng.random((2, 2)) < 0.3
        orders["release"] = rng.random((2, 2)) < 0.3
        orders["max_batch"] = rng.integers(0, 5, (2, 2))
        digest.update(cluster.advance(orders).tobytes())
    cluster.finish()
    assert cluster.totals["served"].min() > 100
    digest.update(cluster.totals.tobytes() + cluster.histograms.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("former", ["late-binding", "closed"])
@pytest.mark.parametrize("routing", ["central", "power-of-two"])
def test_compilation_changes_nothing(former: str, routing: str) -> None:
    code = (
        f"{inspect.getsource(everything_in_one_run)}\nprint(everything_in_one_run({former!r}, {routing!r}))"
    )
    interpreted = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert interpreted.returncode == 0, interpreted.stderr
    assert interpreted.stdout.strip() == everything_in_one_run(former, routing)
