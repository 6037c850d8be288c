"""A network and its ONNX file are one thing: they say the same, and no other file passes for one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.network import Forward, Network
from pilotage.control.onnx_network import FEW_ROWS, decode, encode
from pilotage.world.spec import SpecError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@st.composite
def networks(draw: st.DrawFn) -> Network:
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = list(pairwise(sizes))
    return Network(
        mean=tuple(rng.normal(0, 3, sizes[0]).tolist()),
        scale=tuple(rng.uniform(0.01, 3, sizes[0]).tolist()),
        clip=draw(st.sampled_from([0.5, 5.0, 10.0])),
        weights=tuple(tuple(map(tuple, rng.normal(0, 1, (b, a)).tolist())) for a, b in pairs),
        biases=tuple(tuple(rng.normal(0, 1, b).tolist()) for _, b in pairs),
        squashed=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(network=networks(), seed=st.integers(0, 1000))
def test_the_file_says_what_the_network_says(network: Network, seed: int) -> None:
    model = encode(network)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    assert onnx.load_from_string(model).SerializeToString() == model  # as the onnx package writes it
    forward, inputs = (
        decode(model).forward(),
        np.random.default_rng(seed).normal(0, 5, (32, len(network.mean))),
    )
    exact = Forward(network)(inputs)
    assert len(inputs) > FEW_ROWS
    assert forward.session is not None
    np.testing.assert_allclose(forward(inputs), exact, atol=1e-5)  # by ONNX Runtime
    np.testing.assert_allclose(forward.by_numpy(inputs), exact, atol=1e-5)
    assert forward(inputs[:1]).dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(network=networks())
def test_reading_and_writing_undo_each_other(network: Network) -> None:
    model = encode(network)
    found = decode(model)
    assert encode(found) == model
    assert (found.mean, found.scale, found.clip, found.squashed) == (
        network.mean, network.scale, network.clip, network.squashed,
    )  # fmt: skip
    assert found.biases == tuple(tuple(np.float32(b).astype(float).tolist()) for b in network.biases)


@settings(max_examples=300, deadline=None)
@given(network=networks(), data=st.data())
def test_no_other_file_is_read(network: Network, data: st.DataObject) -> None:
    """Whatever one does to the bytes, what is read is a network of which these are the bytes, or nothing."""
    model = bytearray(encode(network))
    at = data.draw(st.integers(0, len(model) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "insert"]))
    if how == "change":
        model[at] = data.draw(st.integers(0, 255))
    elif how == "cut":
        del model[at:]
    else:
        model[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    try:
        found = decode(bytes(model))
    except SpecError:
        return
    assert encode(found) == bytes(model)


def test_other_onnx_files_are_refused() -> None:
    helper, proto = onnx.helper, onnx.TensorProto
    value = [helper.make_tensor_value_info(n, proto.FLOAT, ["rows", 1]) for n in ("observation", "action")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["observation"], ["action"])], "policy", *([v] for v in value)
    )
    with pytest.raises(SpecError, match="not a network as pilotage writes it"):
        decode(helper.make_model(graph).SerializeToString())
    sound = onnx.load_from_string(
        encode(Network(mean=(0.0,), scale=(1.0,), clip=5.0, weights=(((1.0,),),), biases=((0.0,),)))
    )
    sound.graph.initializer[-1].external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(SpecError, match="other operators, names or fields"):
        decode(sound.SerializeToString())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e39])
def test_weights_must_be_finite_in_single_precision(wrong: float) -> None:
    with pytest.raises(SpecError, match="not finite"):
        encode(Network(mean=(0.0,), scale=(1.0,), clip=5.0, weights=(((wrong,),),), biases=((0.0,),)))
