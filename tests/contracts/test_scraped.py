"""What a policy sees through a monitor that scrapes, as the prediction of the live loop has it."""

from __future__ import annotations

import numpy as np

from experiments.live_loop.scraped import BUSIEST, RATE, Scraped
from pilotage.control.policy import FEATURES, INDEX, Controller, Decision, Observation, Policy, Situation
from pilotage.scenario import load


class Watches(Policy, frozen=True, kw_only=True, tag="watches-in-a-test"):
    """Keeps what it sees."""

    def begin(self, situation: Situation) -> Controller:
        assert situation.tick_s == 5.0
        return _Watches()


class _Watches:
    seen: list[Observation] = []  # noqa: RUF012  (of one test)

    def decide(self, seen: Observation) -> Decision:
        self.seen.append(seen)
        return Decision(order=1)


def test_rates_are_a_window_that_ended_a_while_ago_and_counts_are_of_now() -> None:
    scenario = load("quickstart")
    situation = Situation(scenario.services[0], scenario.pool_by_name, 1.0, np.full(60, 9.0))
    controller = Scraped(policy=Watches(), tick_s=5.0, window_s=8.0, age_s=2.0).begin(situation)
    decisions = []
    for second in range(21):  # the rate of the second that has passed is its number
        values = np.full(len(FEATURES), np.nan)
        values[INDEX["replicas_ready"]] = second
        if second:
            values[RATE] = second
        decisions.append(controller.decide(Observation(float(second), values, np.zeros(len(FEATURES)))))
    assert [k for k, one in enumerate(decisions) if one.order] == [0, 5, 10, 15, 20]
    shown = [one.values[[RATE, BUSIEST, INDEX["replicas_ready"]]].tolist() for one in _Watches.seen]
    assert shown == [
        [0.0, 0.0, 0.0],
        [(1 + 2 + 3) / 8, (0 + 1 + 2 + 3) / 4, 5.0],  # before the first second nothing came
        [(1 + 8) / 2, (5 + 8) / 2, 10.0],
        [(6 + 13) / 2, (10 + 13) / 2, 15.0],
        [(11 + 18) / 2, (15 + 18) / 2, 20.0],
    ]
