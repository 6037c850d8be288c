"""What must hold of models that decay in a simulated cluster, and of the jobs that retrain them."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.guard import Guard
from pilotage.control.lifecycle import BY_NAME, OffPeak, Triggered, retraining_from
from pilotage.control.retraining import Never, Periodic, Seen, Stakes
from pilotage.control.scaling import Hpa, Static
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.metrics import ITEMS
from pilotage.scenario import Scenario, load
from pilotage.world.lifecycle import Training
from pilotage.world.spec import SpecError, decode

ERRORS, RETRAINING = ITEMS.index("errors"), ITEMS.index("retraining")


def small(**changes) -> Scenario:
    """A day of one service, batches of an hour, retrainings of half an hour."""
    scenario = load("drift-sudden").replace(horizon_h=24.0)
    service = scenario.services[0]
    training = service.lifecycle.training.replace(hours=0.5, usd=3.0)
    life = service.lifecycle.replace(**{"batch_h": 1.0, "training": training} | changes)
    return scenario.replace(services=(service.replace(lifecycle=life),))


WORLDS = (World(1), World(2))


def run(scenario, retraining, worlds=WORLDS, **options):
    return simulate(scenario, [Hpa()] * len(worlds), worlds, retraining=retraining, guard=Guard(), **options)


def test_a_retraining_by_hand() -> None:
    # asked at 1 h, the first batch that ends; the node boots about a minute, loads nothing, trains half an hour
    scenario = small()
    tick_s = scenario.tick_s
    (one,) = run(scenario, Periodic(every_batches=1), (World(3),), keep_timeline=True)
    first_s = one.retrained_s[0][0]
    assert 3600 + 1800 < first_s <= 3600 + 1800 + 60 * 2 + 2 * tick_s
    # it serves whole batches from 2 h on, so the next job may be ordered at 3 h
    assert 3 * 3600 + 1800 < one.retrained_s[0][1] <= 3 * 3600 + 1800 + 60 * 2 + 2 * tick_s
    jobs = len(one.retrained_s[0])
    price = scenario.pools[0].price_usd_per_hour
    node_hours = (one.usd[0, RETRAINING] - 3.0 * jobs) / price
    assert 0.5 * jobs <= node_hours <= (0.5 + 0.06) * (jobs + 1)


def test_wrong_answers_are_those_of_the_version_deployed() -> None:
    scenario = small()
    runs = run(scenario, Never(), keep_timeline=True)
    for one in runs:
        served, wrong = (one.timeline[name][:, 0] for name in ("served", "wrong"))
        assert one.totals["wrong"][0] == pytest.approx(wrong.sum())
        by_hour = wrong.reshape(24, -1).sum(axis=1) / served.reshape(24, -1).sum(axis=1)
        life = scenario.services[0].lifecycle
        assert life.decay.base_error * 0.5 < by_hour[0] < life.decay.worst_error * 1.5
        error_usd = scenario.services[0].economics.error_usd
        assert one.usd[0, ERRORS] == pytest.approx(one.totals["wrong"][0] * error_usd)
        assert one.usd[0, RETRAINING] == 0
        assert one.retrained_s == [[]]


def test_the_policy_changes_neither_traffic_nor_how_versions_would_err() -> None:
    scenario = small()
    kept, renewed = run(scenario, Never()), run(scenario, Periodic(every_batches=6))
    for a, b in zip(kept, renewed, strict=True):
        assert a.totals["arrived"][0] == b.totals["arrived"][0]
    again = run(scenario, Periodic(every_batches=6))
    for a, b in zip(renewed, again, strict=True):
        np.testing.assert_array_equal(a.usd, b.usd)
    # until the first retraining both worlds are the same
    (a,) = run(scenario, Never(), (World(5),), keep_timeline=True)
    (b,) = run(scenario, Periodic(every_batches=6), (World(5),), keep_timeline=True)
    until = int(b.retrained_s[0][0] / scenario.tick_s) - 1
    np.testing.assert_array_equal(a.timeline["wrong"][:until], b.timeline["wrong"][:until])


def test_retrainings_that_fail_cost_and_change_nothing() -> None:
    hopeless = small(training=Training(pool="gpu", hours=0.5, usd=3.0, failure=1.0))
    (one,), (kept,) = (
        run(hopeless, Periodic(every_batches=6), (World(4),)),
        run(hopeless, Never(), (World(4),)),
    )
    assert one.retrained_s == [[]]
    assert one.usd[0, RETRAINING] > 3.0
    assert one.totals["wrong"][0] == pytest.approx(kept.totals["wrong"][0], rel=0.02)


def test_without_labels_only_inputs_and_the_clock_can_tell() -> None:
    blind = small(labels=False)
    assert all(not r.retrained_s[0] for r in run(blind, retraining_from("ski-rental")))
    assert all(r.retrained_s[0] for r in run(blind, Periodic(every_batches=6)))


def test_several_policies_side_by_side_and_one_per_service() -> None:
    fleet = load("fleet-lifecycle").replace(horizon_h=8.0)
    never, often = run(fleet, [Never(), [Periodic(every_batches=1)] + [Never()] * 5])
    assert never.retrained_s == [[]] * 6
    assert often.retrained_s[0]
    assert often.retrained_s[1:] == [[]] * 5
    with pytest.raises(SpecError, match="2 retraining policies for 6"):
        run(fleet, [[Never()] * 2, Never()])


def test_a_job_waits_for_quiet_hours_but_not_for_ever() -> None:
    one = OffPeak(policy="periodic:every_batches=3", load=0.8, patience_batches=2).begin(
        Stakes(price=1, batch_size=10, batches=20)
    )
    errors = np.zeros(3, int)

    def ask(age: int, load: float) -> bool:
        return one.decide(Seen(errors[:age], age, 20 - age, load=load))

    assert [ask(2, 0.5), ask(3, 1.2), ask(4, 1.2), ask(5, 1.2)] == [False, False, False, True]
    assert ask(3, 0.7)
    assert ask(3, float("nan"))


def test_room_is_made_for_a_job_that_finds_no_node() -> None:
    scenario = small()
    full = scenario.replace(pools=(scenario.pools[0].replace(max_nodes=3),))
    worlds, hoards = (World(1),), Static(replicas=3)
    plain = simulate(full, [hoards], worlds, retraining=Periodic(every_batches=6))
    assert plain[0].retrained_s == [[]]  # serving has all three nodes, and keeps them
    polite = OffPeak(policy="periodic:every_batches=6", load=2.0)
    (one,) = simulate(full, [hoards], worlds, retraining=polite)
    assert one.retrained_s[0]
    (rude,) = simulate(full, [hoards], worlds, retraining=polite.replace(make_room=False))
    assert rude.retrained_s == [[]]


def test_a_detector_begins_anew_with_every_version() -> None:
    one = Triggered().begin(Stakes(price=1, batch_size=400, batches=40))
    quiet, loud = [40] * 12, [160] * 2
    series = np.array(quiet + loud)
    said = [one.decide(Seen(series[:k], k, 40 - k)) for k in range(1, 15)]
    assert said == [False] * 12 + [True] + said[13:]
    assert not one.decide(Seen(series[12:13], 1, 20))  # a new version: four in ten may be what is usual of it


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pool": "tpu"}, r"training wants pool 'tpu'"),
        ({"hours": -1.0}, "hours"),
    ],
)
def test_training_that_cannot_be(changes, says) -> None:
    import tomllib

    from pilotage.scenario import folder

    raw = tomllib.loads((folder() / "drift-none.toml").read_text())
    raw["services"][0]["lifecycle"]["training"] |= changes
    with pytest.raises(SpecError, match=says):
        decode(raw, Scenario, "x.toml")


def test_labels_later_than_the_horizon_do_not_come_and_names_must_exist() -> None:
    late = small(label_delay_batches=30)
    assert all(not r.retrained_s[0] for r in run(late, retraining_from("ski-rental:factor=0.1")))
    with pytest.raises(SpecError, match="ski-rental"):
        retraining_from("ski-rentel")
    with pytest.raises(SpecError, match="factor"):
        retraining_from("ski-rental:factor=-1")
    with pytest.raises(SpecError, match=r"absent\.json: cannot be read"):
        retraining_from("absent.json")
    assert set(BY_NAME) >= {"never", "periodic", "triggered", "off-peak"}
