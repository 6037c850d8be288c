"""Plans: the cheapest deployment that meets what is asked, the manifests that say so, and what stands in the way."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pilotage.live.manifests import PLATFORMS, Artifact, Autoscaling, as_yaml, manifests
from pilotage.plan import search as searching
from pilotage.plan.advice import Plan, Refusal, advise
from pilotage.plan.requirements import Model, Requirements
from pilotage.plan.search import Search, pareto
from pilotage.plan.together import FleetPlan, plan_together
from pilotage.plan.trials import Trials, surely_below
from pilotage.world.arrivals import Diurnal, Poisson
from pilotage.world.faults import Hazard, Spot
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

NODE = Resources(cpu=8.0, memory_gib=32.0)
CPU = Pool(name="cpu", price_usd_per_hour=0.34, boot_s=45.0, max_nodes=20, node=NODE)
GPU = Pool(name="gpu", price_usd_per_hour=1.0, boot_s=60.0, max_nodes=20)
SPOT = Pool(
    name="spot", price_usd_per_hour=0.4, boot_s=60.0, max_nodes=20, spot=Spot(market=Hazard(per_hour=0.1))
)
FULL = Variant(
    name="full",
    accuracy=0.8,
    resources=Resources(cpu=2.0),
    latency={
        "cpu": Affine(base_ms=12.0, per_item_ms=28.0, noise_cv=0.1),
        "gpu": Affine(base_ms=6.0, per_item_ms=1.6, noise_cv=0.1),
    },
)
SMALL = Variant(
    name="small",
    accuracy=0.75,
    resources=Resources(cpu=1.0),
    latency={"cpu": Affine(base_ms=6.0, per_item_ms=12.0)},
)
MODEL = Model(
    name="ranker",
    variants=(FULL, SMALL),
    traffic=Poisson(rate_rps=80.0),
    slo_ms=100.0,
    server=BatchServer(max_batch=8),
    batch_waits_ms=(0.0, 10.0),
)


def asked(model: Model = MODEL, *pools: Pool, **more: Any) -> Requirements:
    return Requirements(pools=pools or (CPU, GPU), models=(model,), horizon_h=0.1, **more)


def planned(model: Model = MODEL, *pools: Pool, **more: Any) -> Plan:
    found = advise(asked(model, *pools, **more), model, alternatives=False)
    assert isinstance(found, Plan), found
    return found


def dearest_first_left(trials: Trials) -> float:
    """What simulating every size of every configuration finds: no formula, no bound, no order."""
    best = float("inf")
    for c in trials.configurations():
        if trials.variant(c).accuracy < trials.model.min_accuracy:
            continue
        for n in range(1, 13):
            o = trials.outcome(c, float(n))
            if surely_below(o.missed, 1 - trials.model.attainment):
                best = min(best, o.usd_per_hour)
    return best


@pytest.mark.parametrize("accuracy", [0.0, 0.78])
def test_the_search_finds_what_simulating_everything_finds(accuracy: float) -> None:
    model = MODEL.replace(
        traffic=Poisson(rate_rps=60.0), min_accuracy=accuracy, server=BatchServer(max_batch=4)
    )
    trials = Trials(asked(model, CPU, GPU), model, platform="kubernetes", runs=3)
    found = Search(trials, min_accuracy=accuracy).run().best[0]
    fresh = Trials(asked(model, CPU, GPU), model, platform="kubernetes", runs=3)
    assert found.usd_per_hour == pytest.approx(dearest_first_left(fresh))


def test_tpe_comes_close_where_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Search(Trials(asked(), MODEL, platform="kubernetes")).run().best[0]
    monkeypatch.setattr(searching, "EXHAUSTIVE", 0)
    found = Search(Trials(asked(), MODEL, platform="kubernetes")).run().best[0]
    assert found.usd_per_hour <= 1.03 * exact.usd_per_hour


def test_a_bound_is_never_above_what_meets_the_objective() -> None:
    trials = Trials(asked(), MODEL, platform="kubernetes")
    Search(trials).run()
    for (c, _), outcome in trials.known.items():
        if surely_below(outcome.missed, 0.01):
            assert trials.floor_usd(c) <= outcome.usd_per_hour * (1 + 1e-9)


def test_a_plan_holds_on_other_seeds_and_says_why() -> None:
    plan = planned()
    assert plan.verified["meets"]
    assert plan.chosen.configuration.variant == "small"
    assert plan.scaling.min_replicas == int(plan.chosen.size) < plan.scaling.max_replicas
    assert "cheapest of" in plan.reason
    lost = {(v.configuration.pool, v.configuration.variant): v.reason for v in plan.runners_up}
    assert "at least" in lost["gpu", "full"]
    json.dumps(plan.as_dict(), allow_nan=False, default=float)


def test_a_rhythm_is_carried_by_an_autoscaler() -> None:
    rhythm = Diurnal(rate_rps=40.0, day_amplitude=0.6, peak_hour=14.0)
    model = MODEL.replace(traffic=rhythm, variants=(SMALL,), attainment=0.98, batch_waits_ms=(0.0,))
    plan = advise(
        Requirements(pools=(CPU,), models=(model,), start_h=8.0, horizon_h=1.0), model, alternatives=False
    )
    assert isinstance(plan, Plan)
    assert 0 < plan.chosen.size <= 0.9
    assert plan.scaling.min_replicas == 1


def test_alternatives_trade_dollars_for_latency_and_accuracy() -> None:
    plan = advise(asked(), MODEL)
    assert isinstance(plan, Plan)
    rows = [(o.usd_per_hour, o.p99_ms, -o.accuracy) for o in plan.pareto]
    assert len(rows) > 1
    for a, b in itertools.permutations(rows, 2):
        assert any(x < y - 1e-12 for x, y in zip(a, b, strict=True)), (a, b)
    assert max(o.accuracy for o in plan.pareto) == 0.8
    assert {row["what_if"] for row in plan.sensitivity} == {"load + 50 %", "spot gone", "price of cpu + 20 %"}


def test_without_spot_the_next_best_is_named() -> None:
    on_gpus = FULL.replace(latency={"gpu": FULL.latency["gpu"], "spot": FULL.latency["gpu"]})
    model = MODEL.replace(variants=(on_gpus,))
    plan = advise(asked(model, GPU, SPOT), model)
    assert isinstance(plan, Plan)
    assert plan.chosen.configuration.pool == "spot"
    gone = next(row for row in plan.sensitivity if row["what_if"] == "spot gone")
    assert "on gpu" in gone["plan"]
    assert gone["usd_per_hour"] > plan.chosen.usd_per_hour
    assert any("interruptions" in note for note in plan.notes)


def refused(model: Model, **more: Any) -> Refusal:
    found = advise(asked(model, **more), model)
    assert isinstance(found, Refusal), found
    return found


def price_of(found: Refusal, constraint: str) -> float | None:
    return next(row["usd_per_hour"] for row in found.relaxations if row["constraint"] == constraint)


def test_an_objective_below_the_service_time_is_what_binds() -> None:
    found = refused(MODEL.replace(slo_ms=4.0))
    assert "one request alone takes" in found.obstacles[0][0]
    assert price_of(found, "slo_ms")
    assert not price_of(found, "max_replicas and max_nodes")


def test_accuracy_budget_and_environment_bind() -> None:
    accurate = refused(MODEL.replace(min_accuracy=0.9))
    assert price_of(accurate, "min_accuracy")
    assert not price_of(accurate, "slo_ms")
    poor = refused(MODEL.replace(usd_per_hour=0.01))
    assert price_of(poor, "usd_per_hour") == pytest.approx(planned().chosen.usd_per_hour)
    tiny = CPU.replace(name="edge", max_nodes=1, node=Resources(cpu=1.0))
    at_edge = SMALL.replace(latency={"edge": SMALL.latency["cpu"], "cpu": SMALL.latency["cpu"]})
    model = MODEL.replace(variants=(at_edge,), environments=("edge",), batch_waits_ms=(0.0,))
    narrow = advise(
        Requirements(pools=(tiny, CPU), models=(model,), environments={"edge": ("edge",)}, horizon_h=0.1),
        model,
    )
    assert isinstance(narrow, Refusal)
    assert price_of(narrow, "environments")
    assert price_of(narrow, "max_replicas and max_nodes")


def test_models_that_share_nodes_cost_less_than_apart() -> None:
    small = SMALL.replace(resources=Resources(cpu=2.5))
    models = tuple(
        MODEL.replace(name=name, variants=(small,), traffic=Poisson(rate_rps=30.0), batch_waits_ms=(0.0,))
        for name in ("ranker", "tagger")
    )
    found = plan_together(Requirements(pools=(CPU,), models=models, horizon_h=0.1))
    assert isinstance(found, FleetPlan)
    assert found.usd_per_hour < found.apart_usd_per_hour
    assert all(row["meets"] for row in found.verified)
    assert len(found.manifests) == 2
    more, spot, dearer = found.sensitivity
    assert more["usd_per_hour"] >= found.usd_per_hour
    assert re.search(r"as it is, [\d.]+ % of (ranker|tagger) would be in time", more["stays"])
    assert (spot["plan"], spot["stays"]) == ("the same", "not on spot")
    assert spot["usd_per_hour"] == pytest.approx(found.usd_per_hour)
    assert (dearer["what_if"], dearer["plan"]) == (
        "price of cpu + 20 %",
        "the same",
    )  # there is no other pool
    assert dearer["usd_per_hour"] == pytest.approx(1.2 * found.usd_per_hour)
    assert dearer["stays"] == f"as it is, {1.2 * found.usd_per_hour:.4g} $/h"


def test_models_that_share_spot_nodes_know_what_they_would_cost_without() -> None:
    spot = SPOT.replace(node=NODE, price_usd_per_hour=0.1)
    law = Affine(base_ms=6.0, per_item_ms=12.0)
    variant = SMALL.replace(resources=Resources(cpu=2.5), latency={"cpu": law, "spot": law})
    models = tuple(
        MODEL.replace(name=name, variants=(variant,), traffic=Poisson(rate_rps=30.0), batch_waits_ms=(0.0,))
        for name in ("ranker", "tagger")
    )
    found = plan_together(Requirements(pools=(CPU, spot), models=models, horizon_h=0.1))
    assert isinstance(found, FleetPlan)
    assert {o.configuration.pool for o in found.chosen} == {"spot"}
    without = {row["what_if"]: row for row in found.sensitivity}["spot gone"]
    assert "ranker: small on cpu" in without["plan"]
    assert "tagger: small on cpu" in without["plan"]
    assert without["usd_per_hour"] > found.usd_per_hour
    quiet = plan_together(Requirements(pools=(CPU, spot), models=models, horizon_h=0.1), alternatives=False)
    assert isinstance(quiet, FleetPlan)
    assert not quiet.sensitivity
    assert quiet.usd_per_hour == found.usd_per_hour


def test_pareto_keeps_one_of_equals() -> None:
    trials = Trials(asked(), MODEL, platform="kubernetes", runs=2)
    c = trials.configurations()[0]
    outcome = trials.outcome(c, 8.0)
    assert pareto([outcome, outcome]) == [outcome]


# --- bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("environments = ['clod']", "did you mean 'cloud'"),
        ("latency = {cpi = {kind = 'affine', base_ms = 1.0, per_item_ms = 1.0}}", "did you mean 'cpu'"),
        ("", "give --rate"),
        ("traffic = {kind = 'trace', path = 'x.csv'}", "whose rate is its own"),
    ],
)
def test_bad_files_say_what_would_be_valid(text: str, says: str, tmp_path: Path) -> None:
    latency = (
        text
        if text.startswith("latency")
        else "latency = {cpu = {kind = 'affine', base_ms = 1.0, per_item_ms = 1.0}}"
    )
    model = "" if text.startswith("latency") else text
    path = tmp_path / "model.toml"
    path.write_text(
        "[environments]\ncloud = ['cpu']\n[[pools]]\nname = 'cpu'\nprice_usd_per_hour = 1.0\n"
        f"[[models]]\nname = 'm'\nslo_ms = 10.0\n{model}\n[[models.variants]]\nname = 'v'\n{latency}\n"
    )
    with pytest.raises(SpecError, match=says):
        Requirements.load(path, 5.0 if "trace" in text else None)


# --- manifests ---------------------------------------------------------------------------------------------
SCALINGS = [
    Autoscaling(platform=platform, min_replicas=2, max_replicas=7, target_concurrency=target)
    for platform in PLATFORMS
    for target in (0.35, 4.2)
]


def written(scaling: Autoscaling, variant: Variant = FULL, max_batch: int = 8) -> list[dict[str, Any]]:
    service = Service(
        name="my.ranker",
        traffic=Poisson(rate_rps=1.0),
        slo_ms=100.0,
        pools=("cpu",),
        variants=(variant,),
        server=BatchServer(max_batch=max_batch, batch_wait_ms=5.0),
    )
    artifact = Artifact(uri="s3://models/ranker/{variant}", image="registry.example/ranker:{variant}")
    return manifests(service, variant, artifact, scaling)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.platform}-{s.target_concurrency}")
def test_manifests_are_what_their_schemas_allow(scaling: Autoscaling) -> None:
    for needs in (None, Resources(cpu=0.5, memory_gib=1.5), Resources(cpu=2.0, gpus=1.0)):
        for max_batch in (1, 8):
            check(written(scaling, FULL.replace(resources=needs), max_batch), scaling.platform)


def check(documents: list[dict[str, Any]], platform: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert list(yaml.safe_load_all(as_yaml(documents))) == documents
    if platform == "kserve":
        for error in kserve().iter_errors(documents[0]):
            raise error
    elif platform == "kubernetes":
        client = pytest.importorskip(
            "kubernetes.client", reason="the official client, generated from the OpenAPI"
        )
        kinds = {
            "Deployment": client.V1Deployment,
            "Service": client.V1Service,
            "HorizontalPodAutoscaler": client.V2HorizontalPodAutoscaler,
        }
        for document in documents:
            kinds[document["kind"]].model_validate(document)  # it allows no other key
    else:
        missing, schema = ray_serve()
        if missing:
            pytest.skip(missing)
        schema.model_validate(documents[0])


@functools.cache
def ray_serve() -> tuple[str, Any]:
    """Why Ray Serve's schema is not here, or the schema. Asked once: a failed import leaves halves behind."""
    try:
        from ray.serve.schema import ServeDeploySchema
    except ImportError as error:
        return f"Ray Serve is not installed: {error}", None
    return "", ServeDeploySchema


@functools.cache
def kserve() -> Any:
    """The validator of KServe's InferenceService."""
    jsonschema = pytest.importorskip("jsonschema")
    data = os.environ.get("PILOTAGE_DATA")
    schema = Path(data or ".") / "schemas" / "kserve-inferenceservice-v1beta1.strict.schema.json.gz"
    if not data or not schema.is_file():
        pytest.skip("PILOTAGE_DATA does not name a folder with KServe's schema")
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress(schema.read_bytes())))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_schemas_refuse_what_is_wrong(platform: str) -> None:
    scaling = next(s for s in SCALINGS if s.platform == platform)
    documents = written(scaling)
    check(documents, platform)  # skips where there is no schema
    if platform == "kserve":
        documents[0]["spec"]["predictor"]["minReplica"] = 1
    elif platform == "kubernetes":
        documents[2]["spec"]["minReplica"] = 1
    else:
        del documents[0]["applications"][0]["deployments"][0]["autoscaling_config"]
        documents[0]["applications"][0]["deployments"][0]["num_replicas"] = -1
    with pytest.raises(Exception, match=r"minReplica|num_replicas"):
        check(documents, platform)


def test_what_webhooks_would_refuse_is_refused_here() -> None:
    with pytest.raises(SpecError, match="exceeds"):
        Autoscaling(min_replicas=3, max_replicas=2)
    with pytest.raises(SpecError, match="whole GPUs"):
        written(SCALINGS[0], FULL.replace(resources=Resources(gpus=0.5)))


# --- the command -------------------------------------------------------------------------------------------
FILE = """
[[pools]]
name = "cpu"
price_usd_per_hour = 0.34
max_nodes = 4
[[models]]
name = "ranker"
server = {max_batch = 4}
batch_waits_ms = [0.0]
[[models.variants]]
name = "int8"
latency.cpu = {kind = "affine", base_ms = 6.0, per_item_ms = 12.0}
"""


def test_the_command_writes_manifests_and_says_what_binds(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pilotage.cli import app

    path = tmp_path / "model.toml"
    path.write_text(FILE)
    command = ["plan", str(path), "--rate", "40", "--slo-ms"]
    done = CliRunner().invoke(
        app, [*command, "100", "--platform", "kserve", "--out", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["choice"]["pool"] == "cpu"
    assert plan["verified"]["meets"]
    yaml = pytest.importorskip("yaml")
    [written_out] = yaml.safe_load_all((tmp_path / "out" / "ranker.yaml").read_text())
    assert written_out["spec"]["predictor"]["minReplicas"] == plan["choice"]["replicas"]
    done = CliRunner().invoke(app, [*command, "10", "--json"])
    assert done.exit_code == 1
    refused = json.loads(done.stdout)
    assert refused["choice"] is None
    assert any(row["constraint"] == "slo_ms" and row["usd_per_hour"] for row in refused["relaxations"])
