"""Kubernetes' own test cases for the HPA, by the names of the upstream tests (replica_calculator and horizontal)."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from pilotage.control.hpa import (
    DOWN,
    UP,
    Behavior,
    History,
    Hpa,
    NoMetricsError,
    Pod,
    Rate,
    from_average,
    from_pods,
    from_value,
    up_limit_without_behavior,
)
from pilotage.control.policy import FEATURES, INDEX, Observation
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import load


def cpu(*levels: int | None, requests: tuple[int, ...] = ()) -> list[Pod]:
    """Ready pods with these levels (None: no sample) and requests, both in milli-cores."""
    requests = requests or (1000,) * len(levels)
    return [Pod(usage=u, request=r) for u, r in zip(levels, requests, strict=True)]


def unready(*levels: int | None) -> list[Pod]:
    return [Pod(usage=u, state="unready") for u in levels]


def ignored(count: int) -> list[Pod]:
    return [Pod(usage=500, state="ignored")] * count


UNEVEN = {"requests": (900, 1000, 1100)}


@pytest.mark.parametrize(
    ("upstream", "current", "pods", "target", "tolerances", "expected"),
    [
        ("TestReplicaCalcScaleDown", 5, cpu(100, 300, 500, 250, 250), 50, {}, 3),
        ("TestReplicaCalcScaleUpHotCpuLessScale", 3, unready(300) + cpu(500, 700), 30, {}, 4),
        ("TestReplicaCalcScaleUpUnreadyNoScale", 3, unready(400, 700) + cpu(500), 30, {}, 3),
        ("TestReplicaCalcScaleUpIgnoresFailedPods", 2, cpu(500, 700) + ignored(2), 30, {}, 4),
        ("TestReplicaCalcScaleUpIgnoresDeletionPods", 2, cpu(500, 700) + ignored(2), 30, {}, 4),
        ("TestReplicaCalcScaleDownIncludeUnreadyPods", 5, cpu(100, 300, 500) + unready(250, 250), 50, {}, 2),
        (
            "TestReplicaCalcScaleDownExcludeUnscheduledPods",
            5,
            cpu(100) + unready(None, None, None, None),
            50,
            {},
            1,
        ),
        ("TestReplicaCalcTolerance", 3, cpu(1010, 1030, 1020, **UNEVEN), 100, {}, 3),
        ("TestReplicaCalcSuperfluousMetrics", 4, cpu(4000, 9500, 3000, 7000), 100, {}, 24),
        ("TestReplicaCalcMissingMetrics", 4, cpu(400, 95, None, None), 100, {}, 3),
        ("TestReplicaCalcMissingMetricsNoChangeGt", 2, cpu(1900, None), 100, {}, 2),
        ("TestReplicaCalcMissingMetricsNoChangeLt", 2, cpu(600, None), 100, {}, 2),
        ("TestReplicaCalcMissingMetricsUnreadyChange", 3, unready(100) + cpu(450, None), 50, {}, 3),
        ("TestReplicaCalcMissingMetricsUnreadyScaleUp", 3, unready(100) + cpu(2000, None), 50, {}, 4),
        ("TestReplicaCalcMissingMetricsUnreadyScaleDown", 4, unready(100) + cpu(100, 100, None), 50, {}, 3),
        (
            "TestConfigurableTolerance (up 0.01)",
            3,
            cpu(1010, 1030, 1020, **UNEVEN),
            100,
            {"tolerance_up": 0.01},
            4,
        ),
        ("TestConfigurableTolerance (down 0.9)", 3, cpu(300, 300, 300), 100, {"tolerance_down": 0.9}, 3),
    ],
)
def test_resource_metrics(upstream, current, pods, target, tolerances, expected) -> None:
    assert from_pods(current, pods, target, utilization=True, **tolerances) == expected


@pytest.mark.parametrize("current", [4], ids=["TestReplicaCalcEmptyMetrics"])
def test_empty_metrics_scale_nothing(current) -> None:
    with pytest.raises(NoMetricsError):
        from_pods(current, cpu(None, None, None, None), 100, utilization=True)


@pytest.mark.parametrize(
    ("upstream", "levels", "target", "expected"),
    [
        ("TestReplicaCalcScaleUpCM", (20_000, 10_000, 30_000), 15_000, 4),
        ("TestReplicaCalcScaleUpCMUnreadyHotCpuNoLessScale", (50_000, 10_000, 30_000), 15_000, 6),
    ],
)
def test_pods_metrics_ignore_readiness(upstream, levels, target, expected) -> None:
    assert from_pods(3, cpu(*levels), target, utilization=False) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(
            from_value(3, 50, 10, ready=1), 5, id="TestReplicaCalcScaleUpCMObjectIgnoresUnreadyPods"
        ),
        pytest.param(
            from_value(3, 8.6, 4.4, ready=1), 2, id="TestReplicaCalcScaleUpCMExternalIgnoresUnreadyPods"
        ),
        pytest.param(from_average(3, 8.6, 2.15), 4, id="TestReplicaCalcScaleUpPerPodCMExternal"),
        pytest.param(from_average(3, 8.6, 2.9), 3, id="TestReplicaCalcTolerancePerPodCMExternal"),
        pytest.param(from_average(5, 8.6, 2.867), 3, id="TestReplicaCalcScaleDownPerPodCMExternal"),
        pytest.param(from_value(0, 7, 3, ready=0), 3, id="from zero: no tolerance"),
    ],
)
def test_object_and_external_metrics(found, expected) -> None:
    assert found == expected


@pytest.mark.parametrize(
    ("history", "raw", "expected"),
    [
        ([], 5, 5),
        ([(120, 4), (60, 5)], 3, 5),
        ([(120, 1), (60, 2)], 3, 3),
        ([(600, 10), (540, 9)], 3, 3),
        ([(600, 10), (540, 9), (120, 5), (60, 4)], 3, 5),
    ],
    ids=[f"TestNormalizeDesiredReplicas {k}" for k in range(1, 6)],
)
def test_normalize_desired_replicas(history, raw, expected) -> None:
    log = History(recommendations=deque((1000.0 - age, n) for age, n in history))
    current = 1000  # so many running that what comes out is the highest of the window, as without behaviour
    assert log.stabilised(1000.0, raw, current, up_s=0.0, down_s=300.0) == expected
    assert log.recommendations[-1] == (1000.0, raw)
    assert all(t >= 700.0 for t, _ in log.recommendations)


def events(counts: tuple[int, ...], over_s: float = 120.0) -> deque[tuple[float, int]]:
    """Scale events spread evenly over the last two minutes."""
    return deque((1000.0 - over_s + over_s * (k + 0.5) / len(counts), n) for k, n in enumerate(counts))


def rates(*what: tuple[str, int, float], select: str = "max") -> Behavior:
    return Behavior(rates=tuple(Rate(type=t, value=v, period_s=p) for t, v, p in what), select=select)


@pytest.mark.parametrize(
    ("behavior", "current", "raw", "ups", "downs", "expected"),
    [
        (UP, 10, 50, (), (), 20),
        (rates(("pods", 100, 60), ("percent", 100, 60)), 10, 500, (), (), 110),
        (rates(("percent", 1, 60)), 3, 1000, (), (), 4),
        (rates(("pods", 150, 120)), 100, 500, (1, 5, 9), (), 235),
        (rates(("percent", 200, 120)), 100, 500, (1, 5, 9), (), 255),
        (rates(("pods", 5, 120)), 100, 500, (1, 5, 9), (), 100),
        (rates(("percent", 300, 300)), 6, 24, (4,), (2,), 16),
    ],
    ids=["TestConvertDesiredReplicasWithRules, up", *[f"TestScalingWithRules, up {k}" for k in range(1, 7)]],
)
def test_scaling_up_with_rules(behavior, current, raw, ups, downs, expected) -> None:
    log = History(ups=events(ups) if ups else deque(), downs=events(downs) if downs else deque())
    assert min(raw, log.up_limit(1000.0, current, behavior)) == expected


@pytest.mark.parametrize(
    ("behavior", "current", "raw", "ups", "downs", "expected"),
    [
        (rates(("pods", 20, 60), ("percent", 1, 60)), 100, 2, (), (), 80),
        (rates(("percent", 50, 120)), 100, 0, (), (2, 4, 6), 56),
        (rates(("pods", 5, 120)), 100, 2, (), (1, 5, 9), 100),
        (rates(("percent", 10, 120)), 100, 0, (), (10, 10, 10), 100),
        (rates(("percent", 50, 180)), 10, 1, (2,), (4,), 6),
        (DOWN, 10, 1, (), (), 1),
    ],
    ids=[f"TestScalingWithRules, down {k}" for k in range(1, 7)],
)
def test_scaling_down_with_rules(behavior, current, raw, ups, downs, expected) -> None:
    log = History(ups=events(ups) if ups else deque(), downs=events(downs) if downs else deque())
    assert max(raw, log.down_limit(1000.0, current, behavior)) == expected


SLOWEST = rates(("pods", 2, 60), ("percent", 50, 60), select="min")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(History().up_limit(0.0, 1, SLOWEST), 2, id="TestCalculateScaleUpLimitWithScalingRules"),
        pytest.param(History().down_limit(0.0, 5, SLOWEST), 3, id="TestCalculateScaleDownLimitWithBehaviors"),
        pytest.param(
            History().up_limit(0.0, 5, rates(("pods", 9, 60), select="disabled")), 5, id="up disabled"
        ),
        pytest.param(
            History().down_limit(0.0, 5, rates(("pods", 4, 60), select="disabled")), 5, id="down disabled"
        ),
    ],
)
def test_limits_select_a_change(found, expected) -> None:
    assert found == expected


@pytest.mark.parametrize(
    ("current", "raw", "high", "expected"),
    [(3, 1000, 2000, 6), (20, 1000, 10, 10)],
    ids=["TestConvertDesiredReplicas, ScaleUpLimit", "TestConvertDesiredReplicas, TooManyReplicas"],
)
def test_scaling_up_without_behavior(current, raw, high, expected) -> None:
    assert min(raw, up_limit_without_behavior(current), high) == expected


SCENARIO = load("quickstart")


def decide(hpa: Hpa, **values: float):
    """One decision of a fresh controller that sees these features."""
    seen = np.full(len(FEATURES), np.nan)
    for name, value in ({"replicas_starting": 0, "replicas_pending": 0} | values).items():
        seen[INDEX[name]] = value
    observation = Observation(0.0, seen, np.zeros(len(FEATURES)))
    cluster = Cluster(SCENARIO, [World(0)])
    decision = hpa.begin(cluster.situation(0, 0)).decide(observation)
    return observation.replicas + decision.order - decision.release


@pytest.mark.parametrize(
    ("current", "low", "high", "expected"),
    [(10, 1, 5, 5), (2, 3, 24, 3), (0, 3, 24, 0)],
    ids=["TestReplicaLimits, above", "TestReplicaLimits, below", "TestReplicaLimits, disabled"],
)
def test_replica_limits_bypass_metrics(current, low, high, expected) -> None:
    assert decide(Hpa(min_replicas=low, max_replicas=high), replicas_ready=current) == expected


@pytest.mark.parametrize("expected", [0], ids=["TestReplicaLimits, to zero"])
def test_zero_usage_scales_to_zero_where_that_is_allowed(expected) -> None:
    hpa = Hpa(min_replicas=0, stabilization_down_s=0.0)
    assert decide(hpa, replicas_ready=3, utilization=0.0) == expected


def test_the_policy_feeds_the_calculator_from_observations() -> None:
    assert decide(Hpa(target_utilization=0.5), replicas_ready=4, utilization=1.0) == 8
    assert decide(Hpa(target_utilization=0.5), replicas_ready=4, utilization=0.52) == 4
    # replicas that start count as idle when scaling up: 4 * 100 % over 6 is 66 %, so ceil(1.32 * 6)
    assert decide(Hpa(target_utilization=0.5), replicas_ready=4, replicas_starting=2, utilization=1.0) == 8
    assert decide(Hpa(), replicas_ready=4) == 4  # no sample, no scaling
    assert decide(Hpa(metric="concurrency", target_average=5.0), replicas_ready=2, concurrency=20.0) == 4


def test_down_scaling_waits_for_the_highest_recommendation_of_the_window() -> None:
    controller = Hpa(target_utilization=0.5).begin(Cluster(SCENARIO, [World(0)]).situation(0, 0))
    targets = []
    for tick in range(30):
        seen = np.full(len(FEATURES), np.nan)
        for name, value in {
            "replicas_ready": 8, "replicas_starting": 0, "replicas_pending": 0,
            "utilization": 0.5 if tick == 0 else 0.1,
        }.items():  # fmt: skip
            seen[INDEX[name]] = value
        decision = controller.decide(Observation(15.0 * tick, seen, np.zeros(len(FEATURES))))
        targets.append(8 - decision.release)
    assert targets[:20] == [8] * 20  # 300 s after the last recommendation of 8
    assert targets[21] == 2


def test_between_syncs_nothing_happens() -> None:
    controller = Hpa(sync_period_s=30.0, target_utilization=0.5).begin(
        Cluster(SCENARIO, [World(0)]).situation(0, 0)
    )
    seen = np.full(len(FEATURES), np.nan)
    for name, value in {
        "replicas_ready": 4,
        "replicas_starting": 0,
        "replicas_pending": 0,
        "utilization": 1.0,
    }.items():
        seen[INDEX[name]] = value
    orders = [
        controller.decide(Observation(t, seen, np.zeros(len(FEATURES)))).order for t in (0.0, 15.0, 30.0)
    ]
    assert orders[0] == 4
    assert orders[1] == 0
    assert orders[2] > 0


@pytest.mark.parametrize(
    "policy",
    [
        Hpa(),
        Hpa(target_utilization=0.6, tolerance_up=0.0, stabilization_up_s=60.0, stabilization_down_s=45.0),
        Hpa(metric="concurrency", target_average=3.0, min_replicas=0, stabilization_down_s=0.0),
        Hpa(metric="arrival_rate", target_average=7.0, sync_period_s=40.0, up=rates(("pods", 1, 40.0))),
        Hpa(up=SLOWEST, down=rates(("percent", 30, 90.0), ("pods", 1, 30.0))),
        Hpa(down=rates(("pods", 4, 60), select="disabled"), max_replicas=9),
        Hpa(sync_period_s=0.0, up=rates(("percent", 50, 45.0), ("pods", 2, 20.0))),
    ],
    ids=repr,
)
def test_services_together_are_decided_for_as_one_by_one(policy: Hpa) -> None:
    rng, rows, ticks = np.random.default_rng(5), 60, 120
    situation = Cluster(load("quickstart"), [World(0)]).situation(0, 0)
    alone = [policy.begin(situation) for _ in range(rows)]
    together = policy.begin_together([situation] * rows)
    assert together is not None
    ready, starting = rng.integers(0, 9, rows).astype(float), np.zeros(rows)
    reasons = set()
    for tick in range(ticks):
        values = rng.uniform(0, 40, (rows, len(FEATURES)))
        values[:, INDEX["utilization"]] = np.abs(rng.normal(0.8, 0.5, rows)) * (rng.random(rows) < 0.9)
        values[:, INDEX[policy.metric]][rng.random(rows) < 0.1] = np.nan
        values[:, INDEX["replicas_ready"]], values[:, INDEX["replicas_starting"]] = ready, starting
        values[:, INDEX["replicas_pending"]] = 0.0
        now_s = 15.0 * tick + (rng.uniform(-1, 1) if policy.sync_period_s == 40.0 else 0.0)
        seen = [Observation(now_s, row, np.zeros(len(FEATURES))) for row in values]
        said = [one.decide(row) for one, row in zip(alone, seen, strict=True)]
        assert list(together.decide(seen)) == said
        reasons |= {one.reason.partition(" ")[0] for one in said}
        order, release = (np.array([getattr(one, name) for one in said]) for name in ("order", "release"))
        started = rng.random(rows) < 0.5
        ready, starting = ready + started * starting, np.where(started, 0.0, starting) + order
        ready = np.maximum(ready - release, 0.0) + (rng.random(rows) < 0.02) * rng.integers(0, 20, rows)
    assert {policy.metric, "no"} <= reasons
