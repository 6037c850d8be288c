"""A copy of a world goes on as the world itself does; with a seed of its own, it goes its own way."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.engine.cluster import World
from pilotage.engine.fork import Futures
from pilotage.engine.run import bill
from pilotage.scenario import load
from tests.strategies import cases


@given(cases(worlds=2), st.data())
@settings(max_examples=40, deadline=None)
def test_a_copy_goes_on_as_the_world_does(case, data):
    source = case.cluster()
    ticks = case.scenario.ticks
    at, world = data.draw(st.integers(1, ticks - 1)), data.draw(st.integers(0, 1))
    for t in range(at):
        source.advance(case.orders[t])
    now_s = source.clock_s[world]
    left = [np.array([t for t in times if t >= now_s - 1e-12]) for times in case.times[world]]
    row = source.rows[world * source.shape[1] : (world + 1) * source.shape[1]]
    # an arrival at the very tick may or may not have come: the row says
    left = [
        np.array(times)[int(r["first_number"] + r["arrival_lo"]) :]
        for times, r in zip(case.times[world], row, strict=True)
    ]
    futures = Futures(case.scenario, [None, None, 7])
    copies = futures.restart(source, world, [left] * 3)
    for t in range(at, ticks):
        expected = source.advance(case.orders[t])[world].copy()
        found = copies.advance(np.repeat(case.orders[t][world : world + 1], 3, axis=0))
        for k in range(2):
            for name in expected.dtype.names:
                np.testing.assert_array_equal(found[name][k], expected[name], err_msg=f"{name} at tick {t}")


def test_futures_differ_by_their_seeds_and_can_be_begun_again():
    scenario = load("quickstart").replace(horizon_h=0.2)
    from pilotage.engine.cluster import Cluster, recorded

    (world,) = recorded(scenario, [World(3)])
    source = Cluster(scenario, [world])
    for _ in range(20):
        source.advance(source.no_orders())
    times = source.arrivals(0, 0)
    left = times[times >= source.clock_s[0]]
    futures = Futures(scenario, [1, 2, 1])
    found = []
    for _ in range(2):
        copies = futures.restart(source, 0, [[left]] * 3)
        for _ in range(20):
            copies.advance(copies.no_orders())
        found.append(bill(copies.totals, scenario)[:, 0])
    np.testing.assert_array_equal(found[0], found[1])
    assert copies.totals["latency_s"][0, 0] == copies.totals["latency_s"][2, 0]
    assert copies.totals["latency_s"][0, 0] != copies.totals["latency_s"][1, 0]
