"""Learned configurations: candidates, what the network sees of them, and decisions that the engine carries out."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from pilotage.agents.configuring import deployment_at_random, llm_deployment_at_random
from pilotage.agents.tune import space
from pilotage.control.configuring import (
    FEATURES,
    LLM_FEATURES,
    Configuration,
    Configured,
    as_if,
    candidates,
    deployed,
    features,
)
from pilotage.control.foresight import Foresight
from pilotage.control.guard import Guard
from pilotage.control.network import Memory, Network
from pilotage.control.policy import INDEX, Decision, Observation, Situation
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import Scenario
from pilotage.world.llm import LLMServer, Objectives
from pilotage.world.servers import BatchServer, IterationLaw
from pilotage.world.spec import SpecError
from pilotage.world.tokens import MAX_TOKENS, RandomTokens


def scorer(**weights: float) -> Network:
    """A network that adds up features; without any, all candidates are alike."""
    n = len(FEATURES)
    row = tuple(weights.get(name, 0.0) for name in FEATURES)
    return Network(mean=(0.0,) * n, scale=(1.0,) * n, clip=100.0, weights=((row,),), biases=((0.0,),))


def deployment(seed: int) -> Scenario:
    """One with several pools and variants that batches."""
    rng = np.random.default_rng(seed)
    while True:
        found = deployment_at_random(rng, 0.2)
        service = found.services[0]
        if len(service.pools) > 1 and len(service.variants) > 1 and service.server.max_batch > 4:
            return found


def situation_of(scenario: Scenario) -> Situation:
    return Cluster(scenario, [World(1)]).situation(0, 0)


SCENARIO = deployment(3)


def test_candidates_are_what_the_service_may_have_as_it_is_deployed_first() -> None:
    situation = situation_of(SCENARIO)
    service, found = situation.service, candidates(situation)
    assert found[0] == deployed(situation)
    assert found[0][2:] == (service.server.max_batch, service.server.batch_wait_ms / 1e3, None)
    assert len(set(found)) == len(found)
    assert {one.pool for one in found} == set(service.pools)
    assert {one.variant for one in found} == {v.name for v in service.variants}
    assert all(1 <= one.max_batch <= service.server.max_batch for one in found)
    assert sum(one.max_batch == 1 for one in found) == len(service.pools) * len(service.variants)


def test_a_variant_without_a_law_for_a_pool_is_no_candidate_there() -> None:
    service = SCENARIO.services[0]
    pool, second = service.pools[-1], service.variants[1]
    bare = second.replace(latency={k: v for k, v in second.latency.items() if k != pool})
    scenario = SCENARIO.replace(services=(service.replace(variants=(service.variants[0], bare)),))
    assert not any(one[:2] == (pool, second.name) for one in candidates(situation_of(scenario)))


def test_what_the_network_sees_does_not_depend_on_the_currency() -> None:
    situation = situation_of(SCENARIO)
    service = situation.service
    usd = {name: 7 * getattr(service.economics, name) for name in ("late_usd", "dropped_usd", "error_usd")}
    pools = {k: p.replace(price_usd_per_hour=7 * p.price_usd_per_hour) for k, p in situation.pools.items()}
    dearer = replace(
        situation, service=service.replace(economics=service.economics.replace(**usd)), pools=pools
    )
    options = candidates(situation)
    np.testing.assert_allclose(features(situation, options), features(dearer, options), atol=1e-9)
    assert np.isfinite(features(replace(situation, history_rps=np.zeros(0)), options)).all()
    assert np.isfinite(features(replace(situation, history_rps=np.zeros(40)), options)).all()


def test_the_policy_of_replicas_sees_the_service_with_nothing_but_what_was_chosen() -> None:
    situation = situation_of(SCENARIO)
    service = situation.service
    chosen = Configuration(service.pools[1], service.variants[1].name, 2, 0.01)
    one = as_if(situation, chosen)
    fixed, variable = service.variants[1].latency[chosen.pool].batch_times_s(2)
    assert one.capacity_rps() == pytest.approx(max(n / (fixed[n] + variable[n]) for n in (1, 2)))
    assert one.service.server.batch_wait_ms == pytest.approx(10)
    assert one.start_up_s == situation.pools[chosen.pool].boot_s + service.variants[1].start_up_s


def test_without_a_preference_a_service_stays_as_it_is_deployed() -> None:
    situation = situation_of(SCENARIO)
    policy = Configured(network=scorer(), replicas=Foresight())
    assert policy.choose(situation, candidates(situation)) == deployed(situation)


def test_the_engine_carries_out_what_was_chosen() -> None:
    """New replicas are in the pool and of the variant; batch limit and wait are in force."""
    service = SCENARIO.services[0].replace(initial_replicas=0)
    scenario = SCENARIO.replace(services=(service,))
    policy = Configured(network=scorer(rent=1.0, errors=0.1, wait=-1.0), replicas=Foresight())
    cluster = Cluster(scenario, [World(5)])
    situation = cluster.situation(0, 0)
    chosen = policy.choose(situation, candidates(situation))
    assert chosen.batch_wait_s > 0
    said: list[Decision] = []
    helm = Helm([policy], [situation], Guard())
    steer(cluster, helm, scenario.ticks, lambda _, __, decisions: said.extend(decisions))
    assert {(d.pool, d.variant) for d in said} == {chosen[:2]}
    there = [r for r in cluster.replicas if r["state"] > 0]
    assert there
    assert {scenario.pools[r["pool"]].name for r in there} == {chosen.pool}
    assert {service.variants[r["variant"]].name for r in there} == {chosen.variant}
    assert cluster.rows["max_batch"][0] == said[-1].max_batch
    assert cluster.rows["batch_wait_s"][0] == said[-1].batch_wait_s
    cluster.restart([0], [World(6)])
    assert cluster.rows["batch_wait_s"][0] == service.server.batch_wait_ms / 1e3


def test_batches_are_chosen_anew_as_the_load_changes() -> None:
    """A network that wants large batches that fill at once: none on a quiet service, the largest under a flood."""
    situation = situation_of(SCENARIO)
    policy = Configured(network=scorer(filling=1.0, limit=-0.5), replicas=Foresight(), period_min=1.0)
    quiet = replace(situation, history_rps=np.full(240, 1e-3 * situation.capacity_rps()))
    controller, said = policy.begin(quiet), []
    for k in range(60):
        values = np.zeros(len(INDEX))
        values[INDEX["arrival_rate"]] = values[INDEX["arrival_peak"]] = 1e6 * situation.capacity_rps()
        values[INDEX["replicas_ready"]] = 1.0
        said.append(controller.decide(Observation(15.0 * k, values, np.zeros(len(INDEX)))))
    assert said[0].max_batch == 1
    assert said[-1].max_batch == situation.service.server.max_batch
    assert len({(d.pool, d.variant) for d in said}) == 1
    changes = [k for k in range(1, 60) if said[k].max_batch != said[k - 1].max_batch]
    assert all(k % 4 == 0 for k in changes)  # at the policy's own pace


@pytest.mark.parametrize("wait_s", [-0.1, float("nan"), 1e6])
def test_the_guard_holds_a_wait_that_makes_no_sense(wait_s: float) -> None:
    class Waits:
        def decide(self, seen: Observation) -> Decision:
            return Decision(batch_wait_s=wait_s)

    cluster = Cluster(SCENARIO, [World(1)])
    said = Guard().begin(Waits(), cluster.situation(0, 0)).decide(cluster.read()[0])
    assert said.batch_wait_s is None
    assert "batch_wait_s" in said.reason


# --- LLM services ----------------------------------------------------------------------------------------------
def llm_deployment(seed: int, **llm) -> Scenario:
    """One with several pools and variants."""
    rng = np.random.default_rng(seed)
    while True:
        found = llm_deployment_at_random(rng, 0.2)
        service = found.services[0]
        if len(service.pools) > 1 and len(service.variants) > 1:
            return found.replace(
                services=(service.replace(llm=service.llm.replace(**llm), server=BatchServer()),)
            )


def llm_scorer(**weights: float) -> Network:
    n = len(LLM_FEATURES)
    row = tuple(weights.get(name, 0.0) for name in LLM_FEATURES)
    return Network(mean=(0.0,) * n, scale=(1.0,) * n, clip=100.0, weights=((row,),), biases=((0.0,),))


LLM = llm_deployment(5, max_batch=64, chunk_tokens=2000)


def test_candidates_of_an_llm_service_are_limits_and_budgets_of_tokens() -> None:
    situation = situation_of(LLM)
    service, found = situation.service, candidates(situation)
    assert found[0] == Configuration(service.pools[0], service.variants[0].name, 64, 0.0, 2000)
    assert {one.max_batch for one in found} == {8, 16, 32, 48, 64}
    assert {one.chunk_tokens for one in found} == {500, 1000, 1500, 2000, 3000, 4000, 8000}
    assert len(set(found)) == len(found) == 35 * len(service.pools) * len(service.variants)
    whole = situation_of(llm_deployment(5, scheduler="prefill-first"))
    assert {one.chunk_tokens for one in candidates(whole)} == {None}
    assert np.isfinite(features(whole, candidates(whole))).all()
    edge = situation_of(llm_deployment(5, chunk_tokens=MAX_TOKENS))
    assert max(one.chunk_tokens for one in candidates(edge)) == MAX_TOKENS


def test_what_the_network_sees_of_an_llm_service_by_hand() -> None:
    """One variant, one pool, no objective but that for the first token: two candidates side by side."""
    law = IterationLaw(base_s=0.01, prefill_s=1e-5, sequence_s=1e-5, context_s=0.0)
    service = LLM.services[0]
    pool = LLM.pool_by_name[service.pools[0]].replace(network_ms=0.0)
    server = LLMServer(kv_blocks=4000, max_batch=40, chunk_tokens=1000, objectives=Objectives(tpot_ms=40.0))
    service = service.replace(
        variants=(service.variants[0].replace(latency={pool.name: law}),), pools=(pool.name,), llm=server,
        tokens=RandomTokens(prompt_mean=800, output_mean=200), server=BatchServer(), slo_ms=1000.0,
    )  # fmt: skip
    situation = Situation(service, {pool.name: pool}, 15.0, np.zeros(0))
    options = [
        Configuration(pool.name, service.variants[0].name, n, 0.0, c) for n, c in ((40, 1000), (40, 100))
    ]
    full, short = (dict(zip(LLM_FEATURES, row, strict=True)) for row in features(situation, options))
    # 40 at once: 960 tokens beside 40 decodes take 10 + 9.6 + 0.4 ms, and serve 1.2 prompts while 0.2 end
    assert full["mixed_full"] == pytest.approx(np.log(20 / 40))
    assert full["supply_full"] == pytest.approx(np.log(1.2 / 0.2))
    assert full["token_full"] == pytest.approx(np.log(10.4 / 40))
    assert full["memory"] == pytest.approx(np.log(64_000 / (40 * 900)))
    # the iteration in flight and its own, of 10.4 ms, and 1.2 prompts of 8 ms
    assert full["full"] == pytest.approx(np.log(2 * 10.4 + 1.2 * 8) - np.log(1000))
    # of 100 tokens, 20 decodes leave 80, as many as a tenth of a prompt, and a tenth of a request ends meanwhile
    assert short["supply_full"] == pytest.approx(0.0)
    assert short["chunk"] == pytest.approx(np.log(1 / 8))
    assert short["chunk_share"] == pytest.approx(np.log(1 / 10))
    assert short["rent"] > full["rent"] == 0.0


def test_the_engine_carries_out_the_budget_that_was_chosen() -> None:
    scenario = LLM.replace(services=(LLM.services[0].replace(initial_replicas=0),))
    policy = Configured(llm_network=llm_scorer(chunk_share=-1.0, limit=1.0), replicas=Foresight())
    cluster = Cluster(scenario, [World(5)])
    said: list[Decision] = []
    helm = Helm([policy], [cluster.situation(0, 0)], Guard())
    steer(cluster, helm, scenario.ticks, lambda _, __, decisions: said.extend(decisions))
    assert {(one.max_batch, one.chunk_tokens) for one in said} == {(8, 8000)}
    assert all("held" not in one.reason for one in said)
    assert cluster._llm.rows[0].fleet.server["chunk"] == 8000
    assert cluster._llm.rows[0].fleet.server["max_batch"] == 8


def test_a_choice_is_adapted_to_a_service_within_what_it_may_have() -> None:
    policy = Configured(limit_scale=0.3, chunk_scale=1.1)
    assert set(space(policy)) == {"period_min", "limit_scale", "chunk_scale"}
    situation = situation_of(LLM)
    said = policy.begin(situation).decide(Cluster(LLM, [World(1)]).read()[0])
    assert (said.max_batch, said.chunk_tokens) == (19, 2200)
    whole = Configured(limit_scale=4.0, chunk_scale=4.0).adapted(situation, deployed(situation))
    assert whole[2:] == (64, 0.0, 8000)
    batching = situation_of(SCENARIO)
    least = policy.adapted(batching, Configuration("any", "any", 1, 0.0))
    assert least == Configuration("any", "any", 1, 0.0)


def test_a_kind_of_server_without_a_network_stays_as_it_is_deployed() -> None:
    for scenario, policy in ((LLM, Configured(network=scorer(rent=1.0))), (SCENARIO, Configured())):
        situation = situation_of(scenario)
        assert policy.choose(situation, candidates(situation)) == deployed(situation)


@pytest.mark.parametrize(
    ("scenario", "tokens", "why"),
    [
        (SCENARIO, 512, "whose scheduler is chunked"),
        (llm_deployment(5, scheduler="prefill-first"), 512, "whose scheduler is chunked"),
        (LLM, 0, "whole number within 1 and"),
        (LLM, MAX_TOKENS + 1, "whole number within 1 and"),
        (LLM, 99.5, "whole number within 1 and"),
    ],
)
def test_the_guard_holds_a_budget_that_makes_no_sense(scenario: Scenario, tokens: float, why: str) -> None:
    class Orders:
        def decide(self, seen: Observation) -> Decision:
            return Decision(chunk_tokens=tokens)

    cluster = Cluster(scenario, [World(1)])
    guarded = Guard().begin(Orders(), cluster.situation(0, 0))
    said = guarded.decide(cluster.read()[0])
    assert said.chunk_tokens is None
    assert "chunk_tokens" in said.reason
    assert why in said.reason


def test_a_network_of_another_shape_is_refused_and_a_policy_is_kept_as_json() -> None:
    network = scorer(rent=1.0)
    with pytest.raises(SpecError, match="valid"):
        Configured(network=network.replace(mean=(0.0,), scale=(1.0,), weights=(((1.0,),),)))
    memory = Memory(inputs=((0.0,) * len(FEATURES),) * 4, recurrent=((0.0,),) * 4, bias=(0.0,) * 4)
    with pytest.raises(SpecError, match="memory"):
        Configured(network=network.replace(memory=memory, weights=(((1.0,),),)))
    policy = Configured(network=network)
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Configured) == policy
