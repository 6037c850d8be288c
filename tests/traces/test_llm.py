"""The LLM engine against plain Python, bit for bit; against the reference cases; and small cases worked out by hand."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.policy import Decision
from pilotage.engine import llm
from pilotage.engine.cluster import Cluster, Recorded, World
from pilotage.engine.serving import (
    _served,
    engine_record,
    new_fleet,
    sequence_records,
    serve,
    serve_apart,
    server_record,
)
from pilotage.metrics import BUCKETS, bucket_of
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Poisson
from pilotage.world.llm import LLMServer
from pilotage.world.pools import Pool
from pilotage.world.servers import IterationLaw, Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError
from pilotage.world.tokens import RandomTokens, Requests, read_requests
from tests.traces import reference_llm
from tests.traces.reference_llm import Replica, Request

# Llama-2-70B on two A100; shared reference, section 4
LAW = IterationLaw(
    base_s=0.05355068894954333,
    prefill_s=0.00027417271363358445,
    sequence_s=0.0003009996818336978,
    context_s=7.19132184572144e-08,
    square_s=4.3106225688973725e-08,
)
SECOND = IterationLaw(base_s=1.0, prefill_s=0.0, sequence_s=0.0, context_s=0.0)
PREFIX = 8


@st.composite
def servers(draw, prefix: bool = True) -> LLMServer:
    block = draw(st.sampled_from([1, 2, 4]))
    return LLMServer(
        scheduler=draw(st.sampled_from(["prefill-first", "chunked"])),
        max_batch=draw(st.sampled_from([1, 2, 5, 32])),
        max_tokens=draw(st.sampled_from([40, 64, 200])),
        chunk_tokens=draw(st.sampled_from([1, 3, 16, 64])),
        block_tokens=block,
        kv_blocks=draw(st.integers(8, 60)),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.1])),
        prefix_block_tokens=draw(st.sampled_from([None, PREFIX])) if prefix else None,
        routing=draw(st.sampled_from(["round-robin", "least-outstanding", "kv-aware"])),
        overlap_weight=draw(st.sampled_from([0.0, 1.0, 3.0])),
        vidur=draw(st.booleans()),
    )


@st.composite
def workloads(draw) -> Requests:
    """Bursts of requests whose prompts share prefixes, as in a tree of conversations."""
    n = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.06, 0.3, 5.0]), min_size=n, max_size=n))
    prompts = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 30), min_size=n, max_size=n))
    conversation = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    ids = [[100 * c + j for j in range(-(-p // PREFIX))] for c, p in zip(conversation, prompts, strict=True)]
    return Requests(
        np.cumsum(gaps), np.array(prompts), np.array(outputs), np.concatenate(ids).astype(np.int64),
        np.cumsum([0, *map(len, ids)]), PREFIX,
    )  # fmt: skip


def as_reference(requests: Requests) -> list[Request]:
    lo, ids = requests.prefix_lo, requests.prefix_ids
    return [
        Request(
            float(requests.arrival_s[i]), int(requests.prompt_tokens[i]), int(requests.output_tokens[i]),
            () if ids is None else tuple(ids[lo[i] : lo[i + 1]].tolist()),
        )
        for i in range(len(requests))
    ]  # fmt: skip


def compare(found, wanted: list[Request], replicas: list[Replica], names=("served",)) -> None:
    """Every number that the engine reports is the reference's, bit for bit."""
    first = np.array([r.tokens[0] if r.tokens else math.nan for r in wanted])
    end = np.array([r.end for r in wanted])
    arrival = np.array([r.arrival for r in wanted])
    assert np.array_equal(found.ttft_s, first - arrival, equal_nan=True)
    assert np.array_equal(found.e2el_s, end - arrival, equal_nan=True)
    assert found.restarts.tolist() == [r.restarts for r in wanted]
    assert found.cached_tokens.tolist() == [r.cached for r in wanted]
    assert sum(found.rejected.values()) == sum(r.state.startswith(("longer", "larger")) for r in wanted)
    gaps = [np.diff(r.tokens) for r in wanted if r.tokens]
    counted = np.bincount(bucket_of(np.concatenate([*gaps, []])), minlength=BUCKETS)
    assert np.array_equal(found.itl, counted)
    for engine, replica in zip(found.engines, replicas, strict=True):
        assert engine["iterations"] == replica.iterations
        assert engine["prefilled"] == replica.prefilled
        assert engine["produced"] == replica.produced
        assert engine["free"] == replica.free == engine["kv_blocks"]
        assert engine["now_s"] == replica.now


@settings(max_examples=300, deadline=None)
@given(servers(), workloads(), st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 3e-6]))
def test_the_engine_equals_plain_python_bit_for_bit(server, requests, count, stepwise, cross_s) -> None:
    wanted, law = as_reference(requests), LAW.replace(cross_s=cross_s)
    replicas = [Replica(server, law) for _ in range(count)]
    reference_llm.serve(server, law, wanted, replicas)
    compare(serve(server, law, requests, replicas=count, stepwise=stepwise), wanted, replicas)


@settings(max_examples=150, deadline=None)
@given(servers(), workloads(), st.integers(1, 2), st.integers(1, 2))
def test_prefill_and_decode_apart_equal_plain_python(server, requests, prefill, decode) -> None:
    wanted = as_reference(requests)
    first = [Replica(server, LAW, "prefill", (0.02, 0.001)) for _ in range(prefill)]
    second = [Replica(server, LAW, "decode") for _ in range(decode)]
    reference_llm.serve(server, LAW, wanted, first)
    passed = [r for r in wanted if r.state == "passed"]
    reference_llm.serve(server, LAW, sorted(passed, key=lambda r: r.here), second)
    found = serve_apart(
        server, LAW, requests, prefill=prefill, decode=decode, transfer_s=0.02, transfer_s_per_token=0.001
    )
    compare(found, wanted, first + second)


@settings(max_examples=150, deadline=None)
@given(
    servers(),
    workloads(),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from([0.05, 0.4, 3.0]), st.sampled_from([1, 2, 7, 30, 500])), max_size=6),
)
def test_another_budget_of_tokens_equals_plain_python(server, requests, count, orders) -> None:
    """What is ordered acts on the iterations that begin from then on; those in flight end as they are."""
    wanted = as_reference(requests)
    replicas = [Replica(server, LAW) for _ in range(count)]
    engines = np.tile(engine_record(server, LAW), count)
    fleet = new_fleet(
        server_record(server), engines, *sequence_records(requests, server.prefix_block_tokens is not None)
    )
    done, now_s = 0, 0.0
    for lasts_s, tokens in [*orders, (math.inf, 64)]:
        now_s += lasts_s
        upto = int(np.searchsorted(requests.arrival_s, now_s))
        llm.serve(fleet, done, upto, now_s)
        reference_llm.serve(server, LAW, wanted[done:upto], replicas, done, now_s)
        done = upto
        fleet.server["chunk"], fleet.engines["quiet_s"] = tokens, 0.0
        for replica in replicas:
            replica.s = server.replace(chunk_tokens=tokens)
    compare(_served(fleet, fleet.itl, fleet.engines), wanted, replicas)


# --- cases by hand: every iteration takes a second ------------------------------------------------------------
def one_by_one(*requests: tuple[float, int, int]) -> Requests:
    arrival, prompt, output = zip(*requests, strict=True)
    return Requests(np.array(arrival), np.array(prompt), np.array(output))


def test_prefills_make_decodes_wait() -> None:
    # 0: prefilled by 1; decodes by 2. 1 comes at 1.5, is prefilled from 2 to 3; then both decode by 4
    server = LLMServer(scheduler="prefill-first", kv_blocks=100)
    found = serve(server, SECOND, one_by_one((0.0, 10, 3), (1.5, 10, 2)))
    assert found.ttft_s.tolist() == [1.0, 1.5]
    assert found.e2el_s.tolist() == [4.0, 2.5]
    assert found.tpot_s.tolist() == [1.5, 1.0]


def test_chunks_share_an_iteration_with_decodes() -> None:
    # 10 tokens each, 6 an iteration: 0 by 2; then 1 decode and 5 tokens of 1; 1 decode and the other 5
    server = LLMServer(chunk_tokens=6, kv_blocks=100)
    found = serve(server, SECOND, one_by_one((0.0, 10, 3), (1.5, 10, 1)))
    assert found.ttft_s.tolist() == [2.0, 2.5]
    assert found.e2el_s.tolist() == [4.0, 2.5]


def test_a_decision_changes_the_tokens_of_the_iterations_that_begin_after_it() -> None:
    # A second an iteration, of 6 tokens: a prompt of 24 has 6 by 1 and 6 by 2. 9 are ordered at 1.5: 9 by 3, and the
    # other 3 by 4, with the first of 4 tokens. The second prompt comes at 3.5 and has 8 beside a decode by 5, and by 6.
    # At 6 it is 1: the last decode by 7, and then the other 8 one by one; the second first token is there at 15
    service = Service(
        name="chat", slo_ms=5000.0, pools=("gpu",), initial_replicas=1, traffic=Poisson(rate_rps=1.0),
        variants=(Variant(name="v", latency={"gpu": SECOND}),), llm=LLMServer(chunk_tokens=6, kv_blocks=100),
        tokens=RandomTokens(prompt_mean=24, prompt_cv=0.0, output_mean=4, output_cv=0.0),
    )  # fmt: skip
    gpu = Pool(name="gpu", price_usd_per_hour=1.0)
    scenario = Scenario(title="t", pools=(gpu,), services=(service,), tick_s=0.5, horizon_h=20 / 3600)
    cluster = Cluster(scenario, [World(0, 0.0, (Recorded(np.array([0.0, 3.5])),))])
    tokens = {}
    for k in range(scenario.ticks):
        cluster.apply([Decision(chunk_tokens={3: 9, 12: 1}.get(k))])
        cluster.wait()
        if now := int(cluster.ticks["prompt_tokens"][0, 0]):
            tokens[(k + 1) / 2] = now
    assert tokens == {1: 6, 2: 6, 3: 9, 4: 3, 5: 8, 6: 8, **dict.fromkeys(range(8, 16), 1)}
    assert cluster.totals["latency_s"][0, 0] == 4 + 11.5
    assert cluster.totals["late"][0, 0] == 1
    cluster.restart([0], [World(0, 0.0, (Recorded(np.array([0.0])),))])
    cluster.advance(cluster.no_orders())
    cluster.advance(cluster.no_orders())
    assert cluster.ticks["prompt_tokens"][0, 0] == 6  # a new run begins as the service is deployed


def test_an_arrival_at_the_end_of_an_iteration_is_in_the_next() -> None:
    found = serve(LLMServer(kv_blocks=100), SECOND, one_by_one((0.0, 4, 1), (1.0, 4, 1)))
    assert found.e2el_s.tolist() == [1.0, 1.0]


def test_the_last_to_come_is_preempted_and_computed_anew() -> None:
    # 5 blocks of 2 tokens. Both prefilled by 1 with 2 blocks each, both want a third at the next step: the first
    # takes the last free one, the second finds none and restarts with 5 tokens; it needs 3 of 2 blocks until 0 is
    # through at 3; prefilled by 4, and that is its third token
    server = LLMServer(scheduler="prefill-first", kv_blocks=5, block_tokens=2, watermark=0.0)
    found = serve(server, SECOND, one_by_one((0.0, 4, 3), (0.0, 4, 3)))
    assert found.restarts.tolist() == [0, 1]
    assert found.e2el_s.tolist() == [3.0, 5.0]


def test_a_prefix_is_computed_once() -> None:
    requests = Requests(
        np.array([0.0, 5.0]), np.array([20, 20]), np.array([1, 1]), np.array([1, 2, 3, 1, 2, 4]), np.array([0, 3, 6]), 8
    )  # fmt: skip
    token = IterationLaw(base_s=0.0, prefill_s=1.0, sequence_s=1.0, context_s=0.0)
    found = serve(LLMServer(kv_blocks=100, block_tokens=8, prefix_block_tokens=8), token, requests)
    assert found.cached_tokens.tolist() == [0, 16]
    assert found.ttft_s.tolist() == [20.0, 19.0]  # it comes at 5, starts at 20 and computes 4 tokens
    assert found.summary(LLMServer(kv_blocks=9))["prefix_hit_rate"] == 16 / 40


def test_rejections_have_a_reason() -> None:
    found = serve(
        LLMServer(scheduler="prefill-first", max_tokens=64, kv_blocks=3),
        SECOND,
        one_by_one((0.0, 100, 1), (0.0, 40, 2), (0.0, 16, 1)),
    )
    assert found.rejected == {"longer than max_tokens": 1, "larger than the KV cache": 1}
    assert np.isnan(found.e2el_s).tolist() == [True, True, False]


def test_clients_of_a_closed_loop_wait_for_their_answer() -> None:
    found = serve(LLMServer(kv_blocks=100), SECOND, one_by_one(*[(0.0, 4, 2)] * 6), concurrency=2)
    assert found.arrival_s.tolist() == [0.0, 0.0, 2.0, 2.0, 4.0, 4.0]
    assert found.e2el_s.tolist() == [2.0] * 6


# --- the reference cases --------------------------------------------------------------------------------------
CASES = {
    "vllm-uniform-q1.0": ("prefill-first", 3328, 128, 4096, 11_037),
    "sarathi-uniform-q1.0": ("chunked", 3328, 128, 512, 11_530),
    "vllm-restart": ("prefill-first", 400, 128, 4096, 5_588),
    "sarathi-restart": ("chunked", 400, 128, 512, 5_563),
    "vllm-caps": ("prefill-first", 400, 8, 2048, 5_641),
}


@pytest.mark.parametrize("stem", CASES)
def test_the_reference_cases_bit_for_bit(stem: str) -> None:
    folder = os.environ.get("PILOTAGE_DATA")
    if not folder:
        pytest.skip("needs PILOTAGE_DATA, the folder of the reference cases")
    import pandas

    scheduler, blocks, cap, tokens, iterations = CASES[stem]
    table = pandas.read_csv(Path(folder) / "llm-reference" / f"{stem}.analytical.csv.gz")
    requests = Requests(*(table[c].to_numpy() for c in ("arrival_s", "prompt_tokens", "output_tokens")))
    server = LLMServer(
        scheduler=scheduler,
        kv_blocks=blocks,
        max_batch=cap,
        max_tokens=tokens,
        chunk_tokens=tokens,
        vidur=True,
    )
    found = serve(server, LAW, requests)
    assert np.array_equal(found.ttft_s, table["ttft_s"])
    assert np.array_equal(found.e2el_s, table["e2e_s"])
    assert np.array_equal(found.restarts, table["n_restarts"])
    assert found.iterations == iterations


def test_traces_with_block_ids_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,input_tokens,output_tokens,ids\n5,10,2,7;8\n6,8,1,7\n6,3,1,9\n"
    )
    requests = read_requests("t.csv", tmp_path, ids="ids", prefix_block_tokens=8)
    assert requests.arrival_s.tolist() == [0.0, 1.0, 1.0]
    assert requests.prefix_ids.tolist() == [7, 8, 7, 9]
    assert requests.prefix_lo.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("6,8,1,7;8", "t.csv': request 1: 2 block ids for a prompt of 8 tokens; valid: 1"),
        ("6,0,1,7", "t.csv': request 1: 0 prompt tokens"),
        ("6,8,0,7", "t.csv': request 1: 0 output tokens"),
        ("6,99999999,1,7", "99999999 prompt tokens; valid: whole numbers from 1 to 10000000"),
        ("6,8,1,x", "t.csv:3: 'x'; valid: whole numbers joined by semicolons"),
    ],
)
def test_traces_that_make_no_sense_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"arrival_s,input_tokens,output_tokens,ids\n5,10,2,7;8\n{row}\n")
    with pytest.raises(SpecError, match=re.escape(message)):
        read_requests("t.csv", tmp_path, ids="ids", prefix_block_tokens=8)
