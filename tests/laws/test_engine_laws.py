"""Laws 1 to 6 of the design for the engine: what holds in every scenario, under whatever a policy orders."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import (
    ANY_POOL,
    COUNTS,
    DRAINING,
    GONE,
    LEAVING,
    ORDER,
    READY,
    SAME_VARIANT,
    SAME_WAIT,
    STARTING,
)
from pilotage.engine.router import ANSWERS
from pilotage.metrics import BUCKET_MIDPOINTS_S, ITEMS, attainment, dollars
from pilotage.world.arrivals import Poisson
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer, LogNormal, log_normal_table
from tests.strategies import Case, cases, one_of, orders, scenario, scenarios, service

laws = settings(max_examples=120, deadline=None)


def run(cluster: Cluster, the_orders: np.ndarray) -> bytes:
    """Runs to the end; everything the engine has reported on the way."""
    seen = [cluster.advance(now).tobytes() for now in the_orders]
    cluster.finish()
    return b"".join([*seen, cluster.ticks.tobytes(), cluster.totals.tobytes(), cluster.histograms.tobytes()])


def rows_of(cluster: Cluster):
    """(world, service, row, its parameters, its replicas, its slots) for every row."""
    services = cluster.shape[1]
    for r, (row, param) in enumerate(zip(cluster.rows, cluster.params, strict=True)):
        replicas = cluster.replicas[param["replica_lo"] : param["replica_hi"]]
        slots = cluster.slots[param["slot_lo"] : param["slot_hi"]]
        yield *divmod(r, services), row, param, replicas, slots.reshape(len(replicas), param["slots"])


def requests_of(cluster: Cluster, row, head: int, count: int) -> list[int]:
    """The places, among the row's arrivals, of a list of requests."""
    links, found = cluster.requests[row["storage_lo"] : row["storage_hi"]]["next"], []
    for _ in range(count):
        found.append(int(head))
        head = links[head]
    return found


def requests_in_transit(cluster: Cluster, row, param) -> list[int]:
    """Requests between a router and its replicas, and those that the router has not looked at."""
    if param["router_lo"] == param["router_hi"]:
        return []
    router = cluster.routers[param["router_lo"]]
    messages = cluster.messages[row["storage_lo"] : row["storage_hi"]]
    found = list(range(router["seen"], row["arrival_lo"]))
    for which, line in enumerate(router["lines"]):
        i = int(line["head"])
        for _ in range(line["count"]):
            if which != ANSWERS or messages[i]["refused"]:
                found.append(i)
            i = int(messages[i]["next"])
    return found


def requests_inside(cluster: Cluster, row, param, replicas, slots) -> list[int]:
    """All requests that wait or are executed."""
    queues = [row, *replicas[replicas["state"] != GONE]]
    waiting = [i for q in queues for i in requests_of(cluster, row, q["head"], q["waiting"])]
    waiting += requests_in_transit(cluster, row, param)
    return waiting + [
        i for e in slots[slots["size"] > 0] for i in requests_of(cluster, row, e["head"], e["size"])
    ]


def times_of(cluster: Cluster, row, places: list[int]) -> np.ndarray:
    return cluster.arrival_storage[row["storage_lo"] : row["storage_hi"]][places]


# --- 1: conservation ---------------------------------------------------------------------------------------
@laws
@given(cases())
def test_requests_are_conserved(case: Case) -> None:
    cluster = case.cluster()
    services = range(len(case.scenario.services))
    for now in case.orders:
        ticks, totals = cluster.advance(now), cluster.totals
        ended = sum(totals[name] for name in ("served", "rejected", "timed_out", "abandoned", "lost"))
        np.testing.assert_array_equal(totals["arrived"], ended + ticks["waiting"] + ticks["executing"])
        np.testing.assert_array_equal(cluster.histograms.sum(axis=-1), totals["served"])
        assert (totals["late"] <= totals["served"]).all()
        assert (ticks["peak_second"] <= ticks["arrived"]).all()
        for w, s, row, param, replicas, slots in rows_of(cluster):
            places = requests_inside(cluster, row, param, replicas, slots)
            assert len(places) == len(set(places)) == ticks["waiting"][w, s] + ticks["executing"][w, s]
            assert slots["size"].sum() == ticks["executing"][w, s]
            if case.scenario.services[s].on_failure == "retry":
                assert totals["lost"][w, s] == 0
    inside = cluster.ticks["waiting"] + cluster.ticks["executing"]
    before = cluster.totals.copy()
    cluster.finish()
    died = sum(cluster.totals[name] - before[name] for name in ("timed_out", "abandoned"))
    np.testing.assert_array_equal(cluster.ticks["waiting"] + cluster.ticks["executing"], inside - died)
    assert (cluster.totals["overdue"] <= inside - died).all()
    end_s = cluster.clock_s[0]
    for w in range(2):
        for s in services:
            assert cluster.totals["arrived"][w, s] == sum(t < end_s for t in case.times[w][s])


# --- 2: causality ------------------------------------------------------------------------------------------
@laws
@given(cases(worlds=1), cases(worlds=1), st.data())
def test_the_future_does_not_change_the_past(case: Case, other: Case, data: st.DataObject) -> None:
    """Neither later requests, nor later orders, nor the length of the run, nor how far traffic is read ahead."""
    cut = data.draw(st.integers(0, case.scenario.ticks - 1), label="ticks in common")
    cut_s = cut * case.scenario.tick_s
    longer = case.scenario.replace(horizon_h=case.scenario.horizon_h * data.draw(one_of(1.0, 3.0)))
    later = [cut_s + t for t in other.times[0][0]]
    changed = [[[*(t for t in times if t < cut_s), *later] for times in case.times[0]]]
    there = case._replace(scenario=longer, times=changed).cluster(read_ahead_s=0.0)
    here = case.cluster()
    for now in case.orders[:cut]:
        assert here.advance(now).tobytes() == there.advance(now).tobytes()
    assert here.histograms.tobytes() == there.histograms.tobytes()


@laws
@given(cases())
def test_nothing_is_served_before_it_arrives_or_by_what_is_not_ready(case: Case) -> None:
    cluster = case.cluster()
    pools = {pool.name: pool for pool in case.scenario.pools}
    for now in case.orders:
        start_s = cluster.clock_s.copy()
        ticks = cluster.advance(now)
        assert (ticks["busy_s"] <= ticks["ready_s"] + 1e-9).all()
        never = cluster.totals["ready_s"] == 0
        assert not cluster.totals["batches"][never].any()
        for w, s, row, param, replicas, slots in rows_of(cluster):
            inside = times_of(cluster, row, requests_inside(cluster, row, param, replicas, slots))
            assert (inside < cluster.clock_s[w]).all()
            idle = replicas["state"] <= STARTING
            assert not slots["size"][idle].any()
            assert not replicas["waiting"][replicas["state"] == STARTING].any()
            one = case.scenario.services[s]
            starting = replicas[replicas["state"] == STARTING]
            assert (starting["ready_s"] >= cluster.clock_s[w]).all()
            assert param["slots"] == one.server.batches_in_flight
        assert (cluster.clock_s > start_s).all()
    for w, s, *_ in rows_of(cluster):
        one = case.scenario.services[s]
        least = (
            math.inf
        )  # least possible latency: the fastest batch, the luckiest noise, the lightest request
        for variant in one.variants:
            for name in set(one.pools) & set(variant.latency):
                law = variant.latency[name]
                fixed, variable = law.batch_times_s(one.server.max_batch)
                lightest = (fixed + variable * one.demand.table()[0])[1:] * log_normal_table(law.noise_cv)[0]
                least = min(least, lightest.min() + pools[name].network_ms / 1e3)
        filled = np.flatnonzero(cluster.histograms[w, s])
        if len(filled):
            assert BUCKET_MIDPOINTS_S[filled[0]] >= least * (1 - 1 / 64)


# --- 3: work conservation and capacity ---------------------------------------------------------------------
@settings(max_examples=400, deadline=None)
@given(cases(max_services=2))
def test_no_slot_idles_while_a_batch_is_due(case: Case) -> None:
    cluster = case.cluster()
    for now in case.orders:
        cluster.advance(now)
        for w, s, row, _, replicas, slots in rows_of(cluster):
            server = case.scenario.services[s].server
            clock_s = cluster.clock_s[w]
            serving = np.isin(replicas["state"], (READY, DRAINING))
            if server.routing == "central":
                free = (slots[replicas["state"] == READY]["size"] == 0).any()
                queues = [row] if free else []
            else:
                queues = list(replicas[serving & (slots["size"] == 0).any(axis=1)])
                if server.routing != "ray-serve" and (replicas["state"] == READY).any():
                    assert row["waiting"] == 0, "the door is shut while a replica is ready"
            for queue in queues:
                waiting = requests_of(cluster, row, queue["head"], queue["waiting"])
                if server.former == "closed":
                    assert queue["closed"] == 0
                    assert queue["forming"] < row["max_batch"]
                    if queue["forming"]:
                        assert queue["forming_since_s"] + row["batch_wait_s"] >= clock_s
                elif len(waiting):
                    assert len(waiting) < row["max_batch"]
                    first_s = times_of(cluster, row, waiting[:1])[0]
                    assert first_s + row["batch_wait_s"] >= clock_s


@laws
@given(cases())
def test_capacity_is_never_exceeded(case: Case) -> None:
    cluster = case.cluster()
    most = [pool.max_nodes for pool in case.scenario.pools]
    for now in case.orders:
        ticks = cluster.advance(now)
        taken: dict[tuple[int, int], list] = {}
        for w, s, row, param, replicas, slots in rows_of(cluster):
            one = case.scenario.services[s]
            alive = replicas[replicas["state"] != GONE]
            for r in alive:
                assert cluster.nodes[w, r["node"]]["state"] != GONE
                assert case.scenario.pools[r["pool"]].name in one.pools
                taken.setdefault((w, int(r["node"])), []).append(
                    (s, one.variants[r["variant"] - param["variant_lo"]])
                )
            states = (STARTING,), (READY,), (DRAINING, LEAVING)
            counts = [np.isin(replicas["state"], state).sum() for state in states]
            shown = [ticks[name][w, s] for name in ("starting", "ready", "draining")]
            assert sum(counts) - sum(shown) in range(row["replacing"] + 1)
            assert slots["size"].max(initial=0) <= one.server.max_batch
            if one.server.routing == "ray-serve":
                in_hand = replicas["waiting"] + slots["size"].sum(axis=1)
                assert in_hand[replicas["state"] != GONE].max(initial=0) <= param["max_ongoing_requests"]
            elif one.on_failure == "lost":  # what goes back to a queue is not refused
                limit = one.server.queue_limit or math.inf
                assert row["waiting"] <= limit
                assert replicas["waiting"].max(initial=0) <= limit
            assert 1 <= row["max_batch"] <= param["batch_limit"]
        for (w, n), residents in taken.items():
            node = cluster.nodes[w, n]
            pool = case.scenario.pools[node["pool"]]
            assert node["replicas"] == len(residents)
            if pool.node is None or any(variant.resources is None for _, variant in residents):
                assert len(residents) == 1
                continue
            used = np.sum([variant.resources.vector for _, variant in residents], axis=0)
            assert (used <= np.array(pool.node.vector) + 1e-9).all()
            for s, one in enumerate(case.scenario.services):
                if one.max_per_node:  # draining ones do not count
                    rows = cluster.params.reshape(cluster.shape)[w, s]
                    mine = cluster.replicas[rows["replica_lo"] : rows["replica_hi"]]
                    here = (mine["node"] == n) & np.isin(mine["state"], (STARTING, READY))
                    assert here.sum() <= one.max_per_node
        for p, limit in enumerate(most):
            assert (
                ((cluster.nodes["state"] != GONE) & (cluster.nodes["pool"] == p)).sum(axis=1) <= limit
            ).all()
        assert (
            ticks["batched"] <= ticks["batches"] * cluster.params["batch_limit"].reshape(cluster.shape)
        ).all()


@laws
@given(cases(worlds=1, clusters=False))
def test_a_free_node_is_not_withheld(case: Case) -> None:
    """After a placement, a pending replica means that every pool it may go to was full."""
    cluster = case.cluster()
    mark_empty_places(cluster)
    most = np.array([pool.max_nodes for pool in case.scenario.pools])
    index = {pool.name: p for p, pool in enumerate(case.scenario.pools)}
    for now in case.orders:
        start_s = cluster.clock_s[0]
        cluster.advance(now)
        held = np.zeros(len(most), np.int64)  # at placement: what is there, and what has gone since
        for *_, replicas, _ in rows_of(cluster):
            gone = (replicas["ordinal"] >= 0) & (replicas["gone_s"] >= start_s)
            np.add.at(held, replicas["pool"][(replicas["state"] != GONE) | gone], 1)
        for _, s, row, *_ in rows_of(cluster):
            if row["pending"]:
                allowed = [index[name] for name in case.scenario.services[s].pools]
                open_to = [row["pool"]] if row["pool"] != ANY_POOL else allowed
                assert (held >= most)[open_to].all()


# --- 4: money ----------------------------------------------------------------------------------------------
def mark_empty_places(cluster: Cluster) -> None:
    """So that a place no replica ever took does not look like replica 0."""
    cluster.replicas["ordinal"][cluster.replicas["state"] == GONE] = -1


def lives(case: Case, cluster: Cluster) -> list[dict[int, tuple[int, float, float]]]:
    """Runs; for each row the life of each replica by ordinal: its pool, when it was ordered, when it went."""
    mark_empty_places(cluster)
    rows: list[dict[int, tuple[int, float, float]]] = [{} for _ in cluster.rows]

    def look(now_s: float) -> None:
        for known, (*_, replicas, _) in zip(rows, rows_of(cluster), strict=True):
            places = replicas[replicas["ordinal"] >= 0]
            for r in places:
                end_s = r["gone_s"] if r["state"] == GONE else now_s
                known[int(r["ordinal"])] = (int(r["pool"]), float(r["ordered_s"]), float(end_s))
            # one whose place was taken over was released when the tick began: what was known of it then stays

    look(0.0)
    for now in case.orders:
        cluster.advance(now)
        look(cluster.clock_s[0])
    return rows


@laws
@given(cases())
def test_services_pay_for_all_nodes_and_for_nothing_else(case: Case) -> None:
    # without a minimum: a node that comes and goes at one tick, and is billed for it, is never seen
    pools = tuple(pool.replace(billing_minimum_s=0.0) for pool in case.scenario.pools)
    cluster = case._replace(scenario=case.scenario.replace(pools=pools)).cluster()
    billed = [{} for _ in range(cluster.shape[0])]  # by the number of the node: pool, seconds billed

    def look() -> None:
        for known, nodes in zip(billed, cluster.nodes, strict=True):
            for node in nodes[nodes["state"] != GONE]:
                known[int(node["ordinal"])] = (int(node["pool"]), float(node["billed_s"]))

    look()
    for now in case.orders:
        cluster.advance(now)
        look()
    for w, known in enumerate(billed):
        seconds = sum(s for _, s in known.values())
        usd = sum(s * case.scenario.pools[p].price_usd_per_hour / 3600 for p, s in known.values())
        totals = cluster.totals[w]
        np.testing.assert_allclose(totals["node_s"].sum(), seconds, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(totals["node_usd"].sum(), usd, rtol=1e-9, atol=1e-9)


@laws
@given(cases(clusters=False))
def test_node_dollars_are_the_integral_of_the_nodes_lives(case: Case) -> None:
    cluster = case.cluster()
    for known, total in zip(lives(case, cluster), cluster.totals.reshape(-1), strict=True):
        assert sorted(known) == list(range(len(known)))
        usd = billed_s = lived_s = 0.0
        for p, ordered_s, gone_s in known.values():
            pool, life_s = case.scenario.pools[p], gone_s - ordered_s
            assert life_s >= 0
            bill_s = max(life_s, pool.billing_minimum_s)
            if pool.billing_granularity_s:
                bill_s = math.ceil(bill_s / pool.billing_granularity_s - 1e-9) * pool.billing_granularity_s
            usd += bill_s * pool.price_usd_per_hour / 3600
            billed_s += bill_s
            lived_s += life_s
        np.testing.assert_allclose(
            [total["node_usd"], total["node_s"], total["replica_s"]],
            [usd, billed_s, lived_s],
            rtol=1e-9,
            atol=1e-9,
        )


@laws
@given(cases())
def test_totals_are_sums_of_ticks_and_dollars_sums_of_items(case: Case) -> None:
    cluster = case.cluster()
    ticks = np.stack([cluster.advance(now).copy() for now in case.orders])
    for name in ("node_s", "node_usd", "replica_s", "ready_s", "busy_s", "inside_s", "latency_s", "wrong"):
        assert (ticks[name] >= -1e-9).all(), name
    before = cluster.totals.copy()
    for name in COUNTS:
        np.testing.assert_allclose(before[name], ticks[name].sum(axis=0), rtol=1e-9, atol=1e-9, err_msg=name)
    cluster.finish()
    total = cluster.totals
    for s, one in enumerate(case.scenario.services):
        prices = {name: getattr(one.economics, name) for name in ("late_usd", "dropped_usd", "error_usd")}
        mine = total[:, s]
        late, dropped = (
            mine["late"] + mine["overdue"],
            mine["rejected"] + mine["timed_out"] + mine["abandoned"] + mine["lost"],
        )
        items = dollars(mine["node_usd"], late, dropped, mine["wrong"], 0.0, prices)
        assert items.shape == (2, len(ITEMS))
        errors = [1 - variant.accuracy for variant in one.variants]
        assert (min(errors) * mine["served"] <= mine["wrong"] + 1e-9).all()
        assert (mine["wrong"] <= max(errors) * mine["served"] + 1e-9).all()
        asked = mine["node_usd"] + late * 0.01 + dropped * 0.02 + mine["wrong"] * 0.03
        np.testing.assert_allclose(items.sum(axis=-1), asked, rtol=1e-9, atol=1e-12)
        for w in range(2):
            finished = mine["served"][w] + dropped[w]
            share = attainment(mine["served"][w] - mine["late"][w], finished)
            assert 0 <= share <= 1


# --- 5: determinism ----------------------------------------------------------------------------------------
@laws
@given(cases(worlds=3))
def test_same_bytes_again(case: Case) -> None:
    """Twice; with threads; read ahead in small steps; restarted; and a world by itself."""
    cluster = case.cluster()
    first = run(cluster, case.orders)
    cluster.restart(range(3), cluster.worlds)
    assert run(cluster, case.orders) == first
    assert run(case.cluster(threads=2, read_ahead_s=0.0), case.orders) == first
    for w in range(3):
        alone = case._replace(times=case.times[w : w + 1], seeds=case.seeds[w : w + 1]).cluster()
        run(alone, case.orders[:, w : w + 1])
        assert alone.totals[0].tobytes() == cluster.totals[w].tobytes()
        assert alone.histograms[0].tobytes() == cluster.histograms[w].tobytes()


@laws
@given(cases(), st.data())
def test_a_copy_of_the_arrays_resumes_the_run(case: Case, data: st.DataObject) -> None:
    cluster = case.cluster(read_ahead_s=1e6)  # reads all its traffic at the first tick: no storage moves then
    cut = data.draw(st.integers(1, case.scenario.ticks), label="ticks before the copy")
    for now in case.orders[:cut]:
        cluster.advance(now)
    arrays = [value for value in vars(cluster).values() if isinstance(value, np.ndarray)] + list(
        cluster._state
    )
    copies = [value.copy() for value in arrays]
    straight = run(cluster, case.orders[cut:])
    for value, copy in zip(arrays, copies, strict=True):
        value[...] = copy
    assert run(cluster, case.orders[cut:]) == straight


@laws
@given(cases(), st.data())
def test_a_world_that_is_not_active_stands_still(case: Case, data: st.DataObject) -> None:
    """World 0 pauses for some ticks, world 1 runs on; then world 0 goes on as if nothing had been."""
    pause = data.draw(st.integers(0, case.scenario.ticks - 1), label="ticks before the pause")
    straight, pausing = case.cluster(), case.cluster()
    expected = [straight.advance(now).copy() for now in case.orders]
    for now in case.orders[:pause]:
        pausing.advance(now)
    pausing.active[0] = False
    frozen = pausing.ticks[0].tobytes(), pausing.totals[0].tobytes(), pausing.histograms[0].tobytes()
    for t in range(pause, case.scenario.ticks):
        assert pausing.advance(case.orders[t])[1].tobytes() == expected[t][1].tobytes()
    assert frozen == (
        pausing.ticks[0].tobytes(),
        pausing.totals[0].tobytes(),
        pausing.histograms[0].tobytes(),
    )
    pausing.active[:] = [True, False]
    for t in range(pause, case.scenario.ticks):
        assert pausing.advance(case.orders[t])[0].tobytes() == expected[t][0].tobytes()


@laws
@given(scenarios(), st.data())
def test_policies_meet_the_same_requests(the_scenario, data: st.DataObject) -> None:
    """Common random numbers: whatever is ordered, request k arrives at the same time and asks for the same."""
    seeds = data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True))
    services = [one.replace(traffic=Poisson(rate_rps=9.0)) for one in the_scenario.services]
    there = the_scenario.replace(services=tuple(services))
    alone = there.replace(services=there.services[-1:], interference=())
    last = len(services) - 1
    met = []
    for k in range(2):
        cluster = Cluster(there, [World(seed) for seed in seeds])
        known: dict[tuple[int, int, int], float] = {}
        for now in data.draw(orders(there, worlds=2), label=f"orders {k}"):
            cluster.advance(now)
            for w, s, row, param, replicas, slots in rows_of(cluster):
                places = requests_inside(cluster, row, param, replicas, slots)
                for i, at_s in zip(places, times_of(cluster, row, places), strict=True):
                    key = (w, s, int(row["first_number"]) + i)
                    assert known.setdefault(key, float(at_s)) == at_s
        met.append((known, cluster.totals["arrived"].copy(), cluster))
    (one, came, cluster), (other, came_too, _) = met
    np.testing.assert_array_equal(came, came_too)
    assert all(one[key] == other[key] for key in one.keys() & other.keys())
    for (w, s, number), time_s in one.items():
        assert cluster.arrivals(w, s)[number] == time_s
    # other services do not matter, other seeds do
    by_itself = Cluster(alone, [World(seeds[0])])
    assert by_itself.arrivals(0, 0).tobytes() == cluster.arrivals(0, last).tobytes()
    assert by_itself.seeds(0, 0) == cluster.seeds(0, last)
    streams = [seed for w in range(2) for s in range(last + 1) for seed in cluster.seeds(w, s).values()]
    assert len(set(streams)) == len(streams)


# --- 6: Little's law on the sample path --------------------------------------------------------------------
@laws
@given(cases())
def test_little(case: Case) -> None:
    """The integral of the number inside is the sum of all times inside: those of the served, of the dead (until
    they were noticed), and of those still inside."""
    patient = [
        one.replace(
            server=one.server.replace(
                request_timeout_s=None, patience_s=None, queue_limit=None, overhead_ms=0.0
            ),
            on_failure="retry",
        )
        for one in case.scenario.services
    ]
    case = case._replace(scenario=case.scenario.replace(services=tuple(patient)))
    pools = tuple(pool.replace(network_ms=0.0) for pool in case.scenario.pools)  # spent outside
    cluster = case._replace(scenario=case.scenario.replace(pools=pools)).cluster()
    for now in case.orders:
        cluster.advance(now)
    for w, s, row, param, replicas, slots in rows_of(cluster):
        inside = times_of(cluster, row, requests_inside(cluster, row, param, replicas, slots))
        unfinished = (cluster.clock_s[w] - inside).sum()
        total = cluster.totals[w, s]
        np.testing.assert_allclose(total["inside_s"], total["latency_s"] + unfinished, rtol=1e-9, atol=1e-9)


# --- storage -----------------------------------------------------------------------------------------------
def test_storage_grows_without_a_trace() -> None:
    """A surge outgrows the first arrays; services and worlds beside it notice nothing."""
    rng = np.random.default_rng(1)
    surge = np.sort(rng.uniform(3.0, 5.0, 30_000)).tolist()
    calm = np.sort(rng.uniform(0.0, 20.0, 150)).tolist()
    server = BatchServer(max_batch=16, request_timeout_s=6.0)
    services = [service(name, server=server, demand=LogNormal(cv=1.0)) for name in ("a", "b")]
    pool = Pool(name="cpu", price_usd_per_hour=1.0)
    here = scenario(services, [pool], 1.0, 20)
    no_orders = np.zeros((20, 2, 2), ORDER)
    no_orders["pool"] = ANY_POOL
    no_orders["variant"], no_orders["batch_wait_s"] = SAME_VARIANT, SAME_WAIT
    case = Case(here, [[surge, calm], [calm, calm]], no_orders, [4, 4])
    steps = [case.cluster(read_ahead_s=ahead) for ahead in (0.0, 2.5, 600.0)]
    assert len({run(cluster, no_orders) for cluster in steps}) == 1
    cluster = steps[0]
    assert cluster.totals["arrived"].tolist() == [[30_000, 150], [150, 150]]
    assert cluster.totals[0, 1].tobytes() == cluster.totals[1, 1].tobytes()
