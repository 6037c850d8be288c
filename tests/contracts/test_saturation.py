"""Rules for LLM services. llm-d's saturation rule, by hand: thresholds 0.8 and 5, triggers 0.1 and 3, as upstream's
documentation has them; the HPA on KV usage; and what policies may count on of a replica."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pilotage.control.hpa import Hpa
from pilotage.control.outlook import INPUTS, Outlook
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.control.saturation import Saturation, wanted
from pilotage.scenario import load

DEFAULTS = {"kv_threshold": 0.8, "queue_threshold": 5.0, "kv_spare": 0.1, "queue_spare": 3.0}


@pytest.mark.parametrize(
    ("ready", "kv", "queue", "change"),
    [
        (3, 0.5, 0.0, 0),  # 0.75 each on two leaves 0.05
        (3, 0.4, 0.0, -1),
        (4, 0.5, 1.0, -1),
        (3, 0.71, 0.0, 1),  # spare 0.09 < 0.1
        (3, 0.69, 0.0, 0),
        (3, 0.1, 2.1, 1),  # spare 2.9 < 3
        (3, 0.1, 1.9, 0),  # 2.85 each on two leaves 2.15
        (1, 0.0, 0.0, 0),
        (2, 0.34, 0.0, -1),
        (2, 0.36, 0.0, 0),  # 0.72 on one
    ],
)
def test_by_hand(ready: int, kv: float, queue: float, change: int) -> None:
    assert wanted(ready, kv, queue, **DEFAULTS) == change


def seen(now_s: float, **values: float) -> Observation:
    row = np.full(len(FEATURES), math.nan)
    for name, value in ({"replicas_starting": 0, "replicas_pending": 0} | values).items():
        row[INDEX[name]] = value
    return Observation(now_s, row, np.zeros(len(FEATURES)))


def controller():
    scenario = load("quickstart")
    return Saturation().begin(Situation(scenario.services[0], scenario.pool_by_name, 15.0, np.zeros(0)))


def test_it_looks_once_a_minute_at_the_peak_and_waits_for_what_is_on_its_way() -> None:
    c = controller()
    assert c.decide(seen(0.0, replicas_ready=2, kv_usage=0.6, queue_length=0.0)).order == 0
    assert c.decide(seen(15.0, replicas_ready=2, kv_usage=0.75, queue_length=0.0)).order == 0
    for at in (30.0, 45.0):
        c.decide(seen(at, replicas_ready=2, kv_usage=0.5, queue_length=0.0))
    assert c.decide(seen(60.0, replicas_ready=2, kv_usage=0.5, queue_length=0.0)).order == 1
    for at in (75.0, 90.0, 105.0):
        c.decide(seen(at, replicas_ready=2, replicas_starting=1, kv_usage=0.9, queue_length=30.0))
    held = c.decide(seen(120.0, replicas_ready=2, replicas_starting=1, kv_usage=0.9, queue_length=30.0))
    assert (held.order, held.release) == (0, 0)


def test_without_metrics_it_holds_and_without_kv_the_queue_decides() -> None:
    c = controller()
    assert c.decide(seen(0.0, replicas_ready=2)).reason == "no metrics"
    assert c.decide(seen(15.0, replicas_ready=2, queue_length=20.0)).order == 1
    assert controller().decide(seen(0.0, replicas_ready=0, queue_length=0.0)).order == 1


def test_the_hpa_goes_by_kv_usage_where_there_is_a_kv_cache() -> None:
    hpa, scenario = Hpa(metric="kv_usage", target_utilization=0.5), load("llm-mixed")
    chat, search = (
        hpa.begin(Situation(scenario.services[k], scenario.pool_by_name, 15.0, np.zeros(0))) for k in (0, 1)
    )
    now = seen(0.0, replicas_ready=2, kv_usage=0.9, utilization=0.5)
    assert chat.decide(now).order == 2  # ceil(2 x 0.9 / 0.5)
    assert search.decide(now).order == 0
    assert chat.decide(seen(15.0, replicas_ready=4, utilization=0.9)).reason == "no metrics"


def inputs_of(env: str, service: int) -> dict[str, float]:
    scenario = load(env)
    outlook = Outlook([Situation(scenario.services[service], scenario.pool_by_name, 15.0, np.full(40, 10.0))])
    return dict(zip(INPUTS, outlook.view()[1][0].tolist(), strict=True))


def test_policies_count_on_the_objective_of_what_an_llm_replica_does() -> None:
    # two iterations of 6.28 ms and 256 sequences at context 1260.5, and two prompts' prefill, which is 85 ms beside the
    # objective of 1 s; 256 at once are through in 9.83 s, or 46.6 ms a token, which is within 50: nothing is left free
    chat = inputs_of("llm-mixed", 0)
    assert chat["patience"] == pytest.approx(math.log(2 * 1.0 / 0.08487), abs=1e-3)
    assert chat["usable"] == 0.0
    # prefill: 256 prompts take 5.46 s, and 22 of them the 0.5 s of the objective; one by one is nearly as fast
    assert inputs_of("llm-disaggregated", 0)["usable"] == pytest.approx(0.0, abs=0.05)
    # decode: 256 at once take 22.9 ms a token, within the objective of 30
    decode = inputs_of("llm-disaggregated", 1)
    assert decode["usable"] == 0.0
    assert decode["patience"] == pytest.approx(math.log(2 * 30 / 22.89), abs=1e-3)
