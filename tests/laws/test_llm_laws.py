"""Laws of LLM services: conservation of requests and tokens, causality, capacity, money, determinism, and the fleet's
equality with an LLM service by itself where nothing happens to replicas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import ORDER
from pilotage.engine.llm_layout import DOOR
from pilotage.engine.serving import serve, serve_apart
from pilotage.scenario import Scenario, folder, load
from pilotage.world.arrivals import Handover, Poisson
from pilotage.world.llm import KvMemory, LLMServer, Objectives, shipped_profiles
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, IterationLaw, Profiled, Variant
from pilotage.world.services import Economics, Service
from pilotage.world.spec import SpecError
from pilotage.world.tokens import RandomTokens, Requests, Sessions
from tests.strategies import Times
from tests.traces.test_llm import LAW, servers, workloads

SLOW = IterationLaw(base_s=0.05, prefill_s=3e-4, sequence_s=3e-4, context_s=1e-7, square_s=4e-8)
TICK_S = 5.0


# --- by itself -----------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(servers(), workloads(), st.integers(1, 3))
def test_requests_and_tokens_are_conserved(server, requests, replicas) -> None:
    server = server.replace(vidur=False)
    found = serve(server, LAW, requests, replicas=replicas)
    done = ~np.isnan(found.e2el_s)
    assert done.sum() + sum(found.rejected.values()) == len(requests)
    assert found.engines["produced"].sum() == requests.output_tokens[done].sum()
    computed = found.engines["prefilled"].sum() + found.cached_tokens.sum()
    if found.restarts.sum() == 0:
        assert computed == requests.prompt_tokens[done].sum()
    else:  # what is computed anew
        assert computed > requests.prompt_tokens[done].sum()
    gaps = (requests.output_tokens - 1)[done].sum()
    assert found.itl.sum() == gaps


@settings(max_examples=100, deadline=None)
@given(servers(), workloads())
def test_no_token_before_its_time_and_the_future_changes_nothing(server, requests) -> None:
    found = serve(server, LAW, requests)
    done = ~np.isnan(found.e2el_s)
    least = LAW.seconds(1.0, 0.0, 0.0, 1.0)
    assert (found.ttft_s[done] >= least - 1e-9).all()  # differences of times are rounded
    later = found.e2el_s[done] - found.ttft_s[done]
    assert (later >= (requests.output_tokens[done] - 1) * LAW.base_s - 1e-9).all()
    cut = len(requests) // 2
    past = Requests(
        requests.arrival_s[:cut], requests.prompt_tokens[:cut], requests.output_tokens[:cut],
        requests.prefix_ids[: requests.prefix_lo[cut]], requests.prefix_lo[: cut + 1], requests.prefix_block_tokens,
    )  # fmt: skip
    if cut == 0:
        return
    alone = serve(server, LAW, past)
    known = (alone.arrival_s + alone.e2el_s)[~np.isnan(alone.e2el_s)]
    before = known < requests.arrival_s[cut]
    same = (found.arrival_s + found.e2el_s)[:cut][~np.isnan(alone.e2el_s)]
    assert np.array_equal(known[before], same[before])


# --- in a fleet ----------------------------------------------------------------------------------------------
def llm_service(**changes) -> Service:
    fields = {
        "name": "chat",
        "traffic": Poisson(rate_rps=1.0),
        "slo_ms": 2000.0,
        "pools": ("gpu",),
        "variants": (Variant(name="v", latency={"gpu": SLOW}, load_s=7.0, resources=Resources(gpus=1.0)),),
        "llm": LLMServer(kv_blocks=300, max_batch=16, chunk_tokens=256, objectives=Objectives(tpot_ms=100.0)),
        "tokens": RandomTokens(prompt_mean=300, output_mean=40, max_tokens=2000),
        "economics": Economics(late_usd=0.01, dropped_usd=0.02),
        "max_replicas": 4,
        "initial_replicas": 2,
    }
    return Service(**(fields | changes))


def apart(service: Service) -> tuple[Service, Service]:
    """The same service in two halves."""
    assert service.llm is not None
    prefill = service.replace(llm=service.llm.replace(role="prefill", objectives=Objectives()))
    return prefill, service.replace(
        name="decode",
        slo_ms=100.0,
        traffic=Handover(service=service.name, transfer_ms=40.0, transfer_us_per_token=100.0),
        llm=service.llm.replace(role="decode", objectives=Objectives()),
    )


def batch_service() -> Service:
    return Service(
        name="ranker", traffic=Poisson(rate_rps=3.0), slo_ms=500.0, pools=("gpu",), max_replicas=3,
        variants=(
            Variant(
                name="r", latency={"gpu": Affine(base_ms=50, per_item_ms=20)}, load_s=3.0,
                resources=Resources(gpus=1.0),
            ),
        ),
        server=BatchServer(max_batch=4),
    )  # fmt: skip


def fleet(*services: Service, **pool) -> Scenario:
    gpu = Pool(
        name="gpu", price_usd_per_hour=4.0, boot_s=6.0, boot_cv=0.3, max_nodes=6, node=Resources(gpus=2.0), **pool
    )  # fmt: skip
    return Scenario(title="t", pools=(gpu,), services=services, tick_s=TICK_S, horizon_h=0.1)


@st.composite
def cases(draw):
    crashing = draw(st.booleans())
    service = llm_service(
        llm=LLMServer(
            kv_blocks=draw(st.sampled_from([60, 300])), max_batch=draw(st.sampled_from([2, 16])),
            scheduler=draw(st.sampled_from(["prefill-first", "chunked"])), max_tokens=4096, chunk_tokens=256,
            routing=draw(st.sampled_from(["round-robin", "least-outstanding", "kv-aware"])),
            prefix_block_tokens=draw(st.sampled_from([None, 64])), objectives=Objectives(tpot_ms=100.0),
        ),
        tokens=draw(
            st.sampled_from(
                [
                    RandomTokens(prompt_mean=300, output_mean=40, max_tokens=2000),
                    Sessions(live=5, turns=4, system_tokens=130, turn_tokens=90, output_mean=20, max_tokens=1500),
                ]
            )
        ),
        traffic=Poisson(rate_rps=draw(st.sampled_from([0.5, 3.0]))),
        on_failure=draw(st.sampled_from(["retry", "lost"])),
        crashes_per_hour=200.0 if crashing else 0.0,
        initial_replicas=draw(st.integers(0, 3)), min_replicas=0,
    )  # fmt: skip
    others = {"alone": (service,), "mixed": (batch_service(), service), "apart": apart(service)}
    scenario = fleet(
        *others[draw(st.sampled_from(sorted(others)))], crashes_per_hour=100.0 if crashing else 0.0
    )
    ticks = draw(st.integers(5, 25))
    orders = np.zeros((ticks, 1, len(scenario.services)), ORDER)
    orders["pool"], orders["variant"] = -1, -1
    n = orders.size
    orders["order"].reshape(-1)[:] = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=n, max_size=n))
    orders["release"].reshape(-1)[:] = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=n, max_size=n))
    orders["max_batch"].reshape(-1)[:] = draw(st.lists(st.sampled_from([0, 0, 1, 8]), min_size=n, max_size=n))
    chunks = st.sampled_from([0, 0, 0, 1, 20, 700])
    orders["chunk_tokens"].reshape(-1)[:] = draw(st.lists(chunks, min_size=n, max_size=n))
    return scenario, orders, draw(st.integers(0, 1000))


def run(scenario, orders, seed: int) -> bytes:
    cluster = Cluster(scenario, [World(seed)])
    seen = [cluster.advance(now).tobytes() for now in orders]
    cluster.finish()
    return b"".join([*seen, cluster.totals.tobytes(), cluster.histograms.tobytes()])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_fleet_with_llm_services_conserves_requests_blocks_and_money(case) -> None:
    scenario, orders, seed = case
    cluster = Cluster(scenario, [World(seed)])
    node_usd = 0.0
    for now in orders:
        ticks = cluster.advance(now)[0]
        total = cluster.totals[0]
        inside = ticks["waiting"] + ticks["executing"]
        gone = sum(total[n] for n in ("served", "rejected", "lost", "timed_out", "abandoned"))
        assert np.array_equal(total["arrived"], gone + inside)
        assert (ticks["busy_s"] <= ticks["ready_s"] + 1e-9).all()
        assert (ticks["busy_s"] >= -1e-9).all()
        assert (ticks["inside_s"] >= -1e-6).all()
        assert (ticks["kv_used"] <= ticks["kv_blocks"]).all()
        assert (total["late"] <= total["served"]).all()
        node_usd += float(ticks["node_usd"].sum())
        for r, row in cluster._llm.rows.items():
            engines, q = row.fleet.engines, row.fleet.sequences
            assert (engines["free"] >= 0).all()
            assert (engines["holders"] <= scenario.services[r].llm.max_batch).all()
            here = int((engines["queued"] + engines["running"] + engines["flying"]).sum()) + int(
                row.fleet.desk[DOOR]
            )
            assert here == inside[r] == int(np.isin(q["state"], (0, 1, 2)).sum())
    assert math.isclose(node_usd, float(cluster.totals["node_usd"].sum()), rel_tol=1e-9, abs_tol=1e-12)
    if scenario.services[-1].name == "decode":  # what was handed over has arrived, or is on its way
        on_their_way = len(cluster._llm.rows[1]._on_their_way)
        assert cluster.totals[0, 1]["arrived"] + on_their_way <= cluster.totals[0, 0]["served"]
        assert cluster.totals[0, 0]["tpots"] == 0
    cluster.finish()
    assert (cluster.totals["overdue"][0] <= inside).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 1, 5, 40, 700]), min_size=8, max_size=40), st.integers(0, 100))
def test_whatever_budget_is_ordered_no_iteration_exceeds_it_and_no_token_is_lost(chunks, seed) -> None:
    server = LLMServer(kv_blocks=3000, max_batch=16, chunk_tokens=256)
    service = llm_service(llm=server, tokens=RandomTokens(prompt_mean=60, output_mean=10, max_tokens=500))
    scenario = fleet(service).replace(tick_s=0.125)
    times = np.sort(np.random.default_rng(seed).uniform(0, 0.125 * len(chunks), 30))
    cluster = Cluster(scenario, [World(seed, traffic=(Times(times),))])
    f, orders, in_force = cluster._llm.rows[0].fleet, cluster.no_orders(), server.chunk_tokens
    limits = np.zeros(len(f.engines))
    for chunk in [*chunks, 256, *[0] * 400]:
        orders["chunk_tokens"], begun = chunk, f.engines["iterations"].copy()
        cluster.advance(orders)
        f, in_force = cluster._llm.rows[0].fleet, chunk or in_force
        limits[f.engines["iterations"] > begun] = in_force  # what is in flight has begun in this tick
        for k in np.flatnonzero(f.engines["flying"] > 0):
            members, tokens = (a[k, : f.engines["flying"][k]] for a in (f.batch, f.scheduled))
            decodes = int((f.sequences["complete"][members] == 1).sum())
            assert tokens.sum() <= max(limits[k], decodes)
    total = cluster.totals[0, 0]
    lengths = service.tokens.begin(None, None).of(int(cluster.params["seed_demand"][0]), np.arange(30))
    assert total["served"] == total["arrived"] == 30
    assert total["prompt_tokens"] == lengths.prompt.sum()
    assert total["output_tokens"] == lengths.output.sum()


@settings(max_examples=15, deadline=None)
@given(cases())
def test_the_same_seed_gives_the_same_bytes(case) -> None:
    assert run(*case) == run(*case)


@pytest.mark.parametrize("routing", ["round-robin", "least-outstanding", "kv-aware"])
@pytest.mark.parametrize("prefix", [None, 64])
def test_a_fleet_whose_replicas_stay_equals_the_service_by_itself(routing: str, prefix: int | None) -> None:
    rng = np.random.default_rng(4)
    times = np.cumsum(rng.exponential(0.4, 300))
    server = LLMServer(
        kv_blocks=300, max_batch=16, chunk_tokens=256, routing=routing, prefix_block_tokens=prefix
    )
    tokens = Sessions(live=7, turns=5, system_tokens=150, turn_tokens=80, output_mean=30, max_tokens=1500)
    service = llm_service(llm=server, tokens=tokens, max_replicas=2)
    scenario = fleet(service)
    cluster = Cluster(scenario, [World(3, traffic=(Times(times),))])
    for _ in range(scenario.ticks):
        cluster.advance(cluster.no_orders())
    source = tokens.begin(None, prefix)
    lengths = source.of(int(cluster.params["seed_demand"][0]), np.arange(len(times)))
    ids = (
        [source.ids[lo : lo + n] for lo, n in zip(lengths.lo, lengths.blocks, strict=True)]
        if prefix
        else None
    )
    requests = (
        Requests(
            times, lengths.prompt, lengths.output, np.concatenate(ids), np.cumsum([0, *map(len, ids)]), prefix
        )
        if ids
        else Requests(times, lengths.prompt, lengths.output)
    )
    alone = serve(server, SLOW, requests, replicas=2)
    total = cluster.totals[0, 0]
    assert total["served"] == len(times) == (~np.isnan(alone.e2el_s)).sum()
    assert math.isclose(total["latency_s"], float(alone.ttft_s.sum()), rel_tol=1e-12)
    assert math.isclose(total["tpot_s"], float(np.nansum(alone.tpot_s)), rel_tol=1e-9)
    assert total["output_tokens"] == lengths.output.sum()
    assert total["hit_tokens"] == alone.engines["hit"].sum()
    assert total["preempted"] == alone.restarts.sum()
    assert np.array_equal(cluster._llm.rows[0].fleet.itl, alone.itl)
    if prefix:
        assert total["hit_tokens"] > 0


def test_a_fleet_of_two_halves_equals_the_halves_by_themselves() -> None:
    rng = np.random.default_rng(4)
    times = np.cumsum(rng.exponential(0.4, 300))
    tokens = RandomTokens(prompt_mean=300, output_mean=40, max_tokens=2000)
    server = LLMServer(kv_blocks=300, max_batch=16, chunk_tokens=256)
    first, second = apart(llm_service(llm=server, tokens=tokens, max_replicas=2))
    scenario = fleet(first, second)
    cluster = Cluster(scenario, [World(3, traffic=(Times(times), second.traffic))])
    for _ in range(scenario.ticks):
        cluster.advance(cluster.no_orders())
    lengths = tokens.begin(None, None).of(int(cluster.params["seed_demand"][0]), np.arange(len(times)))
    alone = serve_apart(
        server, SLOW, Requests(times, lengths.prompt, lengths.output), prefill=2, decode=2,
        transfer_s=0.04, transfer_s_per_token=1e-4,
    )  # fmt: skip
    prefill, decode = cluster.totals[0]
    assert prefill["served"] == len(times) == (~np.isnan(alone.e2el_s)).sum()
    assert decode["served"] == decode["tpots"] == (lengths.output > 1).sum()
    assert math.isclose(prefill["latency_s"], float(alone.ttft_s.sum()), rel_tol=1e-12)
    assert math.isclose(decode["latency_s"], float(np.nansum(alone.tpot_s)), rel_tol=1e-9)
    assert decode["late"] == (alone.tpot_s > 0.1).sum() > 0
    assert prefill["output_tokens"] + decode["output_tokens"] == lengths.output.sum()


def test_halves_that_do_not_fit_together_are_refused() -> None:
    first, second = apart(llm_service())
    for services, message in (
        ((second, first), "prefill service before it"),
        ((first,), "no service has traffic of kind 'handover' from it"),
        ((first, second, second.replace(name="third")), "from which no other takes over"),
        ((first, second.replace(tokens=RandomTokens(prompt_mean=9, output_mean=9))), "they must be the same"),
    ):
        with pytest.raises(SpecError, match=message):
            fleet(*services)
    with pytest.raises(SpecError, match="belong together"):
        second.replace(traffic=Poisson(rate_rps=1.0))
    with pytest.raises(SpecError, match=r"objectives\.tpot_ms"):
        first.replace(llm=first.llm.replace(objectives=Objectives(tpot_ms=9.0)))


def test_ticks_make_no_difference() -> None:
    served = []
    for tick_s in (1.0, 5.0, 60.0):
        scenario = fleet(llm_service(name="whole"), *apart(llm_service())).replace(tick_s=tick_s)
        cluster = Cluster(scenario, [World(1)])
        for _ in range(scenario.ticks):
            cluster.advance(cluster.no_orders())
        totals = cluster.totals[0][["served", "late", "output_tokens"]].tolist()
        served.append((totals, cluster.totals["latency_s"].round(6).tolist()))
    assert served[0] == served[1] == served[2]


# --- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "without tokens"),
        ({"llm": None}, "without llm"),
        ({"variants": (Variant(name="v", latency={"gpu": Affine(base_ms=1, per_item_ms=1)}),)}, "iteration"),
        ({"server": BatchServer(max_batch=3)}, "no other server"),
        ({"llm": LLMServer(kv_blocks=300, objectives=Objectives(ttft_ms=100.0))}, "slo_ms"),
    ],
)
def test_an_llm_service_that_makes_no_sense_is_refused(changes, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        llm_service(**changes)


def test_servers_and_requests_that_make_no_sense_are_refused() -> None:
    for bad, message in (
        (lambda: LLMServer(), "either kv_blocks or memory"),
        (lambda: LLMServer(kv_blocks=10, watermark=1.0), "can ever be admitted"),
        (lambda: LLMServer(kv_blocks=10, prefix_block_tokens=20), "multiple"),
        (lambda: KvMemory(gpu_gib=80, weights_gib=140, kv_bytes_per_token=1e5).blocks(16), "leaves no room"),
        (lambda: IterationLaw(base_s=0, prefill_s=1, sequence_s=0, context_s=0), "no time"),
        (lambda: Requests(np.zeros(2), np.array([1, 0]), np.array([1, 1])), "request 1: 0 prompt tokens"),
        (lambda: Requests(np.zeros(1), np.array([1]), np.array([10**9])), "output tokens; valid"),
        (lambda: Requests(np.array([1.0, 0.5]), np.ones(2, int), np.ones(2, int)), "ascending"),
        (
            lambda: Requests(np.zeros(1), np.array([9]), np.array([1]), np.array([5]), np.array([0, 1]), 4),
            "1 block ids for a prompt of 9 tokens; valid: 3",
        ),
    ):
        with pytest.raises(SpecError, match=message):
            bad()


def test_a_model_larger_than_its_gpus_is_refused_at_load(tmp_path) -> None:
    text = (folder() / "llm-mixed.toml").read_text()
    path = tmp_path / "large.toml"
    path.write_text(text.replace("weights_gib = 15.0", "weights_gib = 145.0"))
    with pytest.raises(SpecError, match=r"(?s)large\.toml.*145 GiB of weights.*services\[0\]\.llm"):
        load(path)
    path.write_text(text.replace('kind = "iteration"', 'kind = "profile"\nname = "llama-9000"', 1))
    with pytest.raises(SpecError, match="profile 'llama-9000' does not exist; "):
        load(path)


def test_a_fleet_rejects_what_can_never_fit_and_serves_the_rest() -> None:
    tokens = RandomTokens(prompt_mean=4000, prompt_cv=1.0, output_mean=20, max_tokens=100_000)
    server = LLMServer(kv_blocks=300, max_batch=16, chunk_tokens=256)  # 16 tokens each
    scenario = fleet(llm_service(llm=server, tokens=tokens, traffic=Poisson(rate_rps=0.2)))
    cluster = Cluster(scenario, [World(5)])
    for _ in range(scenario.ticks):
        cluster.advance(cluster.no_orders())
    total = cluster.totals[0, 0]
    lengths = tokens.begin(None, None).of(
        int(cluster.params["seed_demand"][0]), np.arange(int(total["arrived"]))
    )
    needed = -(-(lengths.prompt + lengths.output - 1) // server.block_tokens)
    assert total["rejected"] == (needed > server.blocks - server.watermark_blocks).sum() > 0
    assert total["served"] > 0


def test_a_profile_is_a_law_by_name() -> None:
    profiles = shipped_profiles()
    assert {p.source.split()[0] for p in profiles.values()} >= {"aisimulate", "Mutinifni/splitwise-sim"}
    for name, profile in profiles.items():
        law = Profiled(name=name)
        assert law.vector == profile.law.vector
        assert law.decode == profile.law.decode
        assert min(law.vector) >= 0
        assert profile.errors["mape"] < 0.3
        assert ("fails" in profile.caveat) == (profile.errors["p95"] > 0.3)
    name = next(iter(profiles))
    by_name = llm_service(
        variants=(Variant(name="v", latency={"gpu": Profiled(name=name)}, resources=Resources(gpus=1.0)),)
    )
    by_hand = by_name.variants[0].latency["gpu"]
    assert by_name.batch_times_s(by_hand)[0].tolist() == by_name.batch_times_s(profiles[name].law)[0].tolist()
