"""Profiling: laws from times, targets that misbehave, files that are refused, and load that is not omitted."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilotage.live.openloop import Load, coldness, fit_served, open_loop
from pilotage.live.profile import fit_law, load_times, measure_batches, point_of, profile, without_outliers
from pilotage.live.profiled import ProfileError, open_model
from pilotage.world.servers import Affine, Table
from pilotage.world.spec import SpecError
from tests.live.v2 import Replica, serving


def points(base: float, per_item: float, curve: float = 0.0, cv: float = 0.05, seed: int = 3) -> list[Any]:
    rng = np.random.default_rng(seed)
    out = []
    for n in (1, 2, 4, 8, 16):
        mean = base + per_item * n + curve * n * n
        out.append(point_of(n, mean * (1 + cv * rng.standard_normal(200)), rng))
    return out


def test_an_affine_law_is_found_and_its_intervals_cover() -> None:
    covered = 0
    for seed in range(20):
        law, base, per_item, misfit = fit_law(points(10.0, 3.0, seed=seed), seed)
        assert isinstance(law, Affine)
        assert misfit < 0.05
        assert law.noise_cv == pytest.approx(0.05, rel=0.2)
        covered += (base[1] <= 10.0 <= base[2]) + (per_item[1] <= 3.0 <= per_item[2])
    assert covered >= 32  # of 40, where 38 are expected: fewer has probability 1e-3


def test_a_curved_law_becomes_a_table_that_passes_through_the_means() -> None:
    measured = points(2.0, 1.0, curve=0.2)
    law, _, _, misfit = fit_law(measured)
    assert isinstance(law, Table)
    assert misfit > 0.05
    assert len(law.batch_ms) == 16
    for p in measured:
        assert law.batch_ms[p.batch - 1] == pytest.approx(p.mean_ms, rel=1e-3)


# --- laws under load ---------------------------------------------------------------------------------------
def observed(
    rate_rps: float,
    rng: np.random.Generator,
    *,
    extra_ms: float = 0.0,
    stalls_per_s: float = 0.0,
    seconds: float = 30.0,
) -> Load:
    """What an open loop sees of one server: 4 ms a request, 1 ms on the way, up to `extra_ms` more when it is cold (it
    cools in 20 ms, and warms in 10), 5 % of noise. While it stalls, for 60 ms, it is three times as slow."""
    due_ms = np.cumsum(rng.exponential(1e3 / rate_rps, int(rate_rps * seconds)))
    stalls_ms = np.sort(rng.uniform(0, due_ms[-1], rng.poisson(stalls_per_s * due_ms[-1] / 1e3)))
    free, cold, done = -math.inf, 1.0, np.zeros(len(due_ms))
    for k, due in enumerate(due_ms.tolist()):
        began = max(due, free)
        cold = 1 - (1 - cold) * math.exp((free - began) / 20.0)
        took = (4.0 + extra_ms * cold) * (1 + 0.05 * rng.standard_normal())
        for at in stalls_ms[(stalls_ms > began - 60.0) & (stalls_ms < began + took)].tolist():
            took += max(0.0, min(2 * (took - max(at - began, 0.0)), 2 / 3 * (at + 60.0 - max(at, began))))
        cold *= math.exp(-took / 10.0)
        free = began + took
        done[k] = free + 1.0
    return Load(due_ms / 1e3, (done - due_ms) / 1e3, np.zeros(len(due_ms)), 0, 0)


def test_what_idling_costs_is_found_at_loads_from_idle_to_busy() -> None:
    rng = np.random.default_rng(5)
    found = fit_served([observed(rate, rng, extra_ms=4.0) for rate in (20.0, 60.0, 110.0, 160.0)])
    assert found.warm_ms[0] == pytest.approx(4.0, rel=0.04)
    assert found.warm_ms[1] <= found.warm_ms[0] <= found.warm_ms[2]
    assert found.overhead_ms == pytest.approx(1.0, abs=0.3)
    assert found.noise_cv == pytest.approx(0.05, abs=0.015)
    assert found.stalls is None
    assert found.unordered == 0.0
    assert found.idle is not None
    for idle_ms, worked_ms in (
        (5.0, 30.0),
        (20.0, 10.0),
        (100.0, 5.0),
    ):  # after so much work, and so much idling
        given = math.exp(-worked_ms / 10.0)
        given = 4.0 * (1 - (1 - given) * math.exp(-idle_ms / 20.0))
        cold = math.exp(-worked_ms / found.idle.warming_ms)
        cold = 1 - (1 - cold) * math.exp(-idle_ms / found.idle.cooling_ms)
        assert found.idle.extra_ms * cold == pytest.approx(given, abs=0.5)


def test_a_server_that_idling_does_not_slow_has_no_such_term_and_its_stalls_are_counted_by_the_stall() -> (
    None
):
    rng = np.random.default_rng(6)
    plain = fit_served([observed(rate, rng) for rate in (20.0, 60.0, 110.0, 160.0)])
    assert plain.idle is None
    assert plain.warm_ms[0] == pytest.approx(4.0, rel=0.02)
    stalling = fit_served([observed(rate, rng, stalls_per_s=1.0) for rate in (20.0, 60.0, 110.0, 160.0)])
    assert stalling.stalls is not None
    assert stalling.stalls.per_s == pytest.approx(1.0, rel=0.3)  # of about 70
    assert stalling.stalls.mean_ms == pytest.approx(40.0, rel=0.3)
    assert stalling.warm_ms[0] == pytest.approx(4.0, rel=0.03)
    with pytest.raises(ProfileError, match="fewer than 50 requests"):
        fit_served([observed(20.0, rng, seconds=1.0)])


def test_a_law_fitted_to_some_loads_predicts_another_and_says_when_it_does_not_hold() -> None:
    """The law back to back is a quarter off; the one that knows of idling is not. Servers side by side are found
    out: the law of one of them does not give back what was fitted."""
    from dataclasses import replace

    from pilotage.live.profile import Profile, under_load
    from pilotage.predicted import beside, holds, predict_ms

    rng = np.random.default_rng(7)
    loads = {rate: [observed(rate, rng, extra_ms=4.0)] for rate in (20.0, 60.0, 110.0, 160.0)}
    served = fit_served([load for (load,) in loads.values()])
    value = (4.0, 4.0, 4.0)
    law = under_load(Affine(base_ms=3.0, per_item_ms=1.0), served)
    assert law.per_item_ms == 1.0
    found = Profile(
        "m",
        points(3.0, 1.0),
        law,
        value,
        value,
        0.0,
        None,
        0.0,
        None,
        served.overhead_ms,
        1,
        [],
        loads,
    )
    assert holds(beside(found, found.loads))
    judged = observed(85.0, rng, extra_ms=4.0, seconds=60.0)
    measured_ms = judged.quantile_ms(0.95)
    assert predict_ms(found, judged.due_s, (0.95,))[0] == pytest.approx(measured_ms, rel=0.1)
    plain = replace(found, law=Affine(base_ms=4.0, per_item_ms=0.0, noise_cv=0.05))
    assert predict_ms(plain, judged.due_s, (0.95,))[0] < 0.8 * measured_ms
    assert not holds(beside(plain, plain.loads))


def test_coldness_is_that_of_the_law() -> None:
    cold = coldness(
        np.array([np.inf, 0.0, 20.0]), np.array([5.0, 6.0, 7.0]), np.array([20.0]), np.array([10.0])
    )
    second = math.exp(-0.5)
    third = 1 - (1 - second * math.exp(-0.6)) * math.exp(-1.0)
    np.testing.assert_allclose(cold, [[1.0, second, third]])


def test_outliers_are_counted_and_left_out() -> None:
    times = np.r_[np.full(97, 10.0) + np.random.default_rng(0).normal(0, 0.2, 97), 500.0, 600.0, 700.0]
    assert len(without_outliers(times)) == 97
    point = point_of(1, times, np.random.default_rng(0))
    assert point.mean_ms == pytest.approx(10.0, abs=0.1)
    assert point.outliers == pytest.approx(0.03)
    assert len(without_outliers(np.full(20, 5.0))) == 20


def test_a_server_is_measured_through_http() -> None:
    replica = Replica(base_s=0.004, per_row_s=0.002, cold_batches=3, load_s=0.1)
    with serving(replica) as url:
        target = open_model(url)
        found = profile(target, url, max_batch=4, seconds=1.5, held_out=(0.2,), held_out_s=0.5)
    # sleeps and HTTP only add; on a busy machine they add more
    assert 1.3 < found.per_item_ms[0] < 4.0
    assert 3.5 < found.base_ms[0] + found.overhead_ms < 12.0
    assert found.slots == 1
    assert len(found.loads) == 4
    assert [round(rate / min(found.loads), 6) for rate in sorted(found.held_out)] == [2.0]  # 0.2, beside 0.1
    assert not set(found.held_out) & set(found.loads)
    assert found.load_s is not None
    assert found.load_s >= 0.1
    variant = found.variant("cpu", accuracy=0.9)
    assert variant.latency["cpu"] == found.law
    assert any("resources" in note for note in found.notes)


def test_no_repository_and_a_fixed_number_of_rows_are_said() -> None:
    with serving(Replica(base_s=0.001, repository=False, rows=1)) as url:
        target = open_model(url)
        measured, notes = measure_batches(target, max_batch=8, seconds=0.2)
        assert load_times(target) == (None, 0.0)
    assert [p.batch for p in measured] == [1]
    assert "one row at a time" in notes[0]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"fail_every": 2}, "requests failed; the last: .*HTTP 500"),
        ({"throttle_every": 3}, "throttles: .* lift its limit"),
        ({"never_rests": True}, "still warming up"),
    ],
)
def test_a_target_that_misbehaves_is_given_up_on(knobs: dict[str, Any], says: str) -> None:
    with serving(Replica(base_s=0.001, per_row_s=0.0005, **knobs)) as url:
        target = open_model(url)
        with pytest.raises(ProfileError, match=says):
            measure_batches(target, max_batch=2, seconds=0.2, warm_up_s=0.5)


def test_a_few_refusals_are_waited_out_and_said() -> None:
    with serving(Replica(base_s=0.001, per_row_s=0.0005, throttle_every=15)) as url:
        _, notes = measure_batches(open_model(url), max_batch=2, seconds=0.3)
    assert any("throttled" in note for note in notes)


def test_a_stall_is_not_hidden_by_waiting_for_answers() -> None:
    """100 requests a second for 1.5 s, and a stall of half a second: a third of the requests is due while it lasts or
    is worked off, so the 90th percentile shows it; a loop that waits for answers would see it once in a hundred."""
    replica = Replica(base_s=0.001, per_row_s=0.0, stall=(50, 0.5))
    with serving(replica) as url:
        load = open_loop(open_model(url), 100.0, 1.5, seed=1)
    assert load.failed == load.throttled == 0
    assert load.quantile_ms(0.9) > 150.0
    assert load.quantile_ms(0.5) < 150.0


def test_nobody_there_is_one_clear_error() -> None:
    with pytest.raises(ProfileError, match=r"127\.0\.0\.1:9"):
        open_model("http://127.0.0.1:9/v2/models/m")
    with serving(Replica()) as url:
        with pytest.raises(ProfileError, match="HTTP 404"):
            open_model(url.removesuffix("/v2/models/m"), model="other")
        with pytest.raises(SpecError, match="--model"):
            open_model(url.removesuffix("/v2/models/m"))


# --- files -------------------------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("/tmp/pilotage-was-here"),))  # type: ignore[return-value]


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SpecError, match=r"valid are \.onnx"):
        open_model(str(path))
    assert not Path("/tmp/pilotage-was-here").exists()
    with pytest.raises(SpecError, match="does not exist"):
        open_model(str(tmp_path / "none.onnx"))


def test_an_onnx_model_is_measured(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "mlp.onnx"
    path.write_bytes(dense(onnx, 64, 256).SerializeToString())
    target = open_model(str(path))
    ballast = np.ones(2**27)  # 1 GiB of this process, which is none of the model's
    found = profile(target, str(path), max_batch=8, seconds=0.3)
    assert ballast.nbytes == 2**30
    assert [p.batch for p in found.points] == [1, 2, 3, 4, 6, 8]
    assert found.load_s is not None
    assert found.load_s > 0
    assert found.memory_gib is not None
    assert 0.02 < found.memory_gib < 0.8
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(SpecError, match="cannot load it"):
        open_model(str(tmp_path / "broken.onnx"))


def dense(onnx: Any, columns: int, hidden: int) -> Any:
    """A graph of one dense layer with an open number of rows."""
    weights = np.random.default_rng(0).random((columns, hidden), np.float32)
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "dense",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", columns])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", hidden])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_an_estimator_of_scikit_learn_is_measured(tmp_path: Path) -> None:
    skops = pytest.importorskip("skops.io")
    linear = pytest.importorskip("sklearn.linear_model")
    path = tmp_path / "fraud.skops"
    rng = np.random.default_rng(0)
    skops.dump(linear.LogisticRegression().fit(rng.random((50, 3)), rng.integers(0, 2, 50)), path)
    measured, _ = measure_batches(open_model(str(path)), max_batch=2, seconds=0.1)
    assert all(p.mean_ms > 0 for p in measured)
    began = time.perf_counter()
    assert load_times(open_model(str(path)), 2)[0] is not None
    assert time.perf_counter() - began < 30


def test_what_is_written_is_a_variant_and_the_simulator_predicts_from_it(tmp_path: Path) -> None:
    """M/D/1 in theory: at half load the mean wait is half a service time; the command's file decodes as a variant."""
    import tomllib

    from pilotage.live.profile import Profile
    from pilotage.predicted import as_toml, draw_fit, predict_ms
    from pilotage.world.servers import Variant
    from pilotage.world.spec import decode

    law = Affine(base_ms=10.0, per_item_ms=0.0)
    value = (10.0, 9.9, 10.1)
    found = Profile(
        "m", points(10.0, 0.0), law, value, (0.0, 0.0, 0.0), 0.01, 2.0, 0.1, 0.5, 1.0, 1, ["a note"]
    )
    block = tomllib.loads(as_toml(found, "cpu", 0.9))["services"]["variants"][0]
    assert decode(block, Variant, "written") == found.variant("cpu", 0.9).replace(latency={"cpu": law})
    draw_fit(found, tmp_path / "fit.svg")
    assert "<svg" in (tmp_path / "fit.svg").read_text()
    rng = np.random.default_rng(0)
    due = np.cumsum(rng.exponential(0.02, 20_000))
    done = np.zeros(len(due))
    free = 0.0
    for k, at in enumerate(due.tolist()):  # Lindley's recursion
        free = max(free, at) + 0.01
        done[k] = free
    exact = 1e3 * np.quantile(done - due, 0.95) + 1.0
    assert predict_ms(found, due, (0.95,))[0] == pytest.approx(exact, rel=0.02)
