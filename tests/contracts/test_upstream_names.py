"""Which tests of the upstream projects are among ours, by name. Printed by `pytest -s` on this file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

UPSTREAM = {
    "hpa": """
        TestReplicaCalcScaleDown TestReplicaCalcScaleUpHotCpuLessScale TestReplicaCalcScaleUpUnreadyNoScale
        TestReplicaCalcScaleUpIgnoresFailedPods TestReplicaCalcScaleUpIgnoresDeletionPods
        TestReplicaCalcScaleDownIncludeUnreadyPods TestReplicaCalcScaleDownExcludeUnscheduledPods
        TestReplicaCalcTolerance TestReplicaCalcSuperfluousMetrics TestReplicaCalcMissingMetrics
        TestReplicaCalcMissingMetricsNoChangeGt TestReplicaCalcMissingMetricsNoChangeLt
        TestReplicaCalcMissingMetricsUnreadyChange TestReplicaCalcMissingMetricsUnreadyScaleUp
        TestReplicaCalcMissingMetricsUnreadyScaleDown TestReplicaCalcEmptyMetrics TestReplicaCalcScaleUpCM
        TestReplicaCalcScaleUpCMUnreadyHotCpuNoLessScale TestReplicaCalcScaleUpCMObjectIgnoresUnreadyPods
        TestReplicaCalcScaleUpCMExternalIgnoresUnreadyPods TestReplicaCalcScaleUpPerPodCMExternal
        TestReplicaCalcTolerancePerPodCMExternal TestReplicaCalcScaleDownPerPodCMExternal
        TestNormalizeDesiredReplicas TestScalingWithRules TestConvertDesiredReplicas
        TestConvertDesiredReplicasWithRules TestCalculateScaleUpLimitWithScalingRules
        TestCalculateScaleDownLimitWithBehaviors TestConfigurableTolerance TestReplicaLimits
    """,
    "kpa": """
        TestAutoscalerStableModeIncreaseWithConcurrencyDefault TestAutoscalerStableModeDecrease
        TestAutoscalerStableModeNoTrafficScaleToZero TestAutoscalerActivationScale
        TestAutoscalerPanicModeDoublePodCount TestAutoscalerUnpanicAfterSlowIncrease
        TestAutoscalerExtendPanicWindow TestAutoscalerPanicThenUnPanicScaleDown TestAutoscalerRateLimitScaleUp
        TestAutoscalerRateLimitScaleDown TestAutoscalerPanicStableLargerThanPanic
        TestAutoscalerPanicStableLessThanPanic TestAutoscalerStableModeIncreaseWithSmallScaleUpRate
        TestAutoscalerStableModeDecreaseWithSmallScaleDownRate TestAutoscalerStableModeDecreaseNonReachable
        TestAutoscalerUseOnePodAsMinimumIfEndpointsNotFound TestAutoscalerScaleDownDelay
        TestAutoscalerPanicModeExponentialTrackAndStabilize TestStartInPanicMode TestAutoscalerNoDataNoAutoscale
    """,
    "keda": """
        TestScaleToMinReplicasWhenNotActive TestScaleToMinReplicasFromLowerInitialReplicaCount
        TestScaleFromMinReplicasWhenActive TestScaleToIdleReplicasWhenNotActive
        TestScaleFromIdleToMinReplicasWhenActive
    """,
    "ray_serve": """
        test_single_replica_receives_all_requests test_scaling_factor_scale_up_from_0_replicas
        test_scaling_factor_scale_down_to_0_replicas test_apply_scaling_factors_upscale
        test_apply_scaling_factors_downscale test_apply_scaling_factors_stuck_downscale
        test_replicas_delayed_startup test_fluctuating_ongoing_requests test_apply_delay_logic_upscale
        test_apply_delay_logic_downscale test_upscale_delay_respected_with_slow_loop_steps
    """,
}


def names(module: ModuleType) -> Iterator[str]:
    """The names of a module's tests and the ids of their cases."""
    for name, test in vars(module).items():
        if name.startswith("test_"):
            yield name
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize":
                    ids = mark.kwargs.get("ids")
                    yield from map(str, () if callable(ids) else ids or ())
                    for case in mark.args[1]:
                        yield str(getattr(case, "id", None) or (case[0] if isinstance(case, tuple) else case))


@pytest.mark.parametrize("baseline", UPSTREAM)
def test_upstream_cases_are_covered_by_name(baseline: str) -> None:
    module = importlib.import_module(f"tests.contracts.test_{baseline}_conformance")
    ours = {name.split(",")[0].split(" ")[0] for name in names(module)}
    wanted = UPSTREAM[baseline].split()
    print(f"\n{baseline}: {len(wanted)} upstream tests", *sorted(wanted), sep="\n  ")
    assert not set(wanted) - ours
