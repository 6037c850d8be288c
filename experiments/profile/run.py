"""Does the law that `pilotage profile` measures predict latency at loads that it was not fitted on?

An ONNX model (a perceptron) is served over the V2 protocol, either by MLServer (`--mlserver PYTHON`: an interpreter
that has it) or by the small server in this file, on ONNX Runtime, one request at a time. Each run profiles it from
outside, sends Poisson requests, open loop, at shares of the measured capacity that the law is not fitted to, in turns
with those that it is fitted to (`pilotage.live.openloop.SHARES`), so that a drift of the machine falls on both alike,
and sets the simulator's 95th percentile beside the measured one. Beside it stands what the law says that is measured
back to back, without idling and stalls. Run it on a quiet machine: what else runs there is in the measurement, not in
the law.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from pilotage.live.profile import Profile, profile
from pilotage.live.profiled import ProfileError, open_model
from pilotage.predicted import beside, holds
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.servers import Affine

SHARES = (0.2, 0.45, 0.7)  # of the capacity; the law is fitted to others
COLUMNS, HIDDEN, LAYERS = 64, 2048, 4  # a few milliseconds a request on one core


def write_model(path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    sizes = [COLUMNS] + [HIDDEN] * LAYERS + [1]
    nodes, weights, last = [], [], "x"
    for k in range(len(sizes) - 1):
        matrix = (rng.standard_normal((sizes[k], sizes[k + 1])) / np.sqrt(sizes[k])).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{k}"], [f"h{k}"]))
        nodes.append(helper.make_node("Relu", [f"h{k}"], [f"a{k}"]))
        last = f"a{k}"
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "mlp", [tensor("x", TensorProto.FLOAT, ["n", COLUMNS])], [tensor(last, TensorProto.FLOAT, ["n", 1])],
        weights,
    )  # fmt: skip
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
    )


MLSERVER = """
import numpy, onnxruntime
from mlserver import MLModel
from mlserver.types import InferenceResponse, MetadataModelResponse, MetadataTensor, ResponseOutput

class Perceptron(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
        return True
    async def metadata(self):
        return MetadataModelResponse(name=self.name, platform="onnx",
            inputs=[MetadataTensor(name="x", datatype="FP32", shape=[-1, %d])], outputs=[])
    async def predict(self, payload):
        one = payload.inputs[0]
        x = numpy.array(one.data, dtype=numpy.float32).reshape(one.shape)
        y = self.session.run(None, {"x": x})[0]
        return InferenceResponse(model_name=self.name,
            outputs=[ResponseOutput(name="y", datatype="FP32", shape=list(y.shape), data=y.ravel().tolist())])
"""


@contextmanager
def served(mlserver: str | None, cpu: int | None) -> Iterator[str]:
    """The URL of the model behind a fresh server, pinned to one CPU."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_model(home / "model.onnx")
        ports = []
        for _ in range(3):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if mlserver:
            (home / "perceptron.py").write_text(MLSERVER % COLUMNS)
            own = {"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
                   "parallel_workers": 0}  # fmt: skip
            (home / "settings.json").write_text(json.dumps(own))
            (home / "model-settings.json").write_text(
                json.dumps({"name": "m", "implementation": "perceptron.Perceptron"})
            )
            command = [mlserver, "-m", "mlserver", "start", folder]
            # its module has no __main__ in every version: the console script stands beside the interpreter
            script = Path(mlserver).with_name("mlserver")
            command = [str(script), "start", folder] if script.is_file() else command
        else:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--serve",
                str(ports[0]),
                "--model",
                str(home / "model.onnx"),
            ]
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(
                command,
                cwd=home if mlserver else None,
                env=environment,
                stdout=log,
                stderr=log,
                process_group=0,
            )
            try:
                if cpu is not None:
                    os.sched_setaffinity(server.pid, {cpu})
                url = f"http://127.0.0.1:{ports[0]}/v2/models/m"
                deadline = time.monotonic() + 120
                while True:
                    try:
                        open_model(url).infer(1)
                        break
                    except ProfileError:
                        if server.poll() is not None or time.monotonic() > deadline:
                            raise RuntimeError((home / "log").read_text()[-2000:]) from None
                        time.sleep(0.2)
                yield url
            finally:
                if server.poll() is None:
                    os.killpg(server.pid, 15)
                server.wait(20)


def serve(port: int, model: Path) -> None:
    """A V2 server of one model on ONNX Runtime; one request at a time."""
    import threading

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    one = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self, status: int, body: Any) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, COLUMNS]}]
            self.answer(200, {"name": "m", "platform": "onnx", "inputs": inputs, "outputs": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("/infer"):
                self.answer(404, {"error": "no repository"})
                return
            given = body["inputs"][0]
            x = np.array(given["data"], dtype=np.float32).reshape(given["shape"])
            with one:
                y = session.run(None, {"x": x})[0]
            output = {"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}
            self.answer(200, {"model_name": "m", "outputs": [output]})

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def judged(run: int, found: Profile) -> list[dict[str, Any]]:
    """What the law says at loads that it was not fitted to, beside what was measured."""
    if not found.held_out:
        raise RuntimeError(f"no loads were measured: {'; '.join(found.notes)}")
    alone, law = found.points[0], found.law
    plain = replace(
        found, law=Affine(base_ms=alone.mean_ms - found.overhead_ms, per_item_ms=0.0, noise_cv=alone.cv)
    )
    idle = law.idle.seconds if law.idle else (0.0, 0.0, 0.0)
    known = {
        "service_ms": f"{found.base_ms[0] + found.per_item_ms[0]:.4g}", "overhead_ms": f"{found.overhead_ms:.4g}",
        "idle_ms": f"{1e3 * idle[0]:.4g}", "cooling_ms": f"{1e3 * idle[1]:.4g}", "warming_ms": f"{1e3 * idle[2]:.4g}",
        "noise_cv": f"{law.noise_cv:.4g}", "stalls_per_s": f"{law.stalls.per_s if law.stalls else 0:.4g}",
        "stall_ms": f"{law.stalls.mean_ms if law.stalls else 0:.4g}", "holds": holds(beside(found, found.loads)),
        "load_average": f"{os.getloadavg()[0]:.1f}",
    }  # fmt: skip
    rates = dict(sorted(found.held_out.items()))
    rows = []
    for share, row, back_to_back in zip(SHARES, beside(found, rates), beside(plain, rates), strict=True):
        measured, said = row["measured_ms"], row["predicted_ms"]
        rows.append(
            {"run": run, "share": share, "rate_rps": f"{row['rate_rps']:.4g}", "measured_p95_ms": f"{measured:.5g}",
             "predicted_p95_ms": f"{said:.5g}", "error": f"{said / measured - 1:.4f}",
             "error_back_to_back": f"{back_to_back['predicted_ms'] / measured - 1:.4f}",
             "generator_kept_up": all(load.trustworthy for load in rates[row["rate_rps"]]), **known}
        )  # fmt: skip
    return rows


def accepted(where: str, errors: np.ndarray) -> dict[str, Any]:
    """A line of acceptance.csv, of an error in each run; low and high are the least and the greatest."""
    median = float(np.median(errors))
    return {
        "line": f"relative error of p95 at loads not fitted on: {where}, median over runs", "asked": "<= 0.1",
        "measured": f"{median:.4g}", "low": f"{errors.min():.4g}", "high": f"{errors.max():.4g}",
        "met": bool(median <= 0.1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/profile"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument(
        "--mlserver", help="a Python interpreter that has MLServer (default: the small server here)"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model)
        return
    runs, seconds = (2, 3.0) if options.quick else (options.runs, options.seconds)
    started, rows, lasted = datetime.now(UTC), [], {}
    options.out.mkdir(parents=True, exist_ok=True)
    cpus = sorted(os.sched_getaffinity(0))
    for run in range(runs):
        began = time.perf_counter()
        with served(options.mlserver, cpus[-1] if len(cpus) > 1 else None) as url:
            if len(cpus) > 1:
                os.sched_setaffinity(0, set(cpus[:-1]))
            target = open_model(url)
            found = profile(
                target, url, max_batch=4, seconds=seconds, seed=options.seed + run, held_out=SHARES,
                held_out_s=1.5 * seconds,
            )  # fmt: skip
        os.sched_setaffinity(0, set(cpus))
        rows += judged(run, found)
        of_run = [float(row["error"]) for row in rows if row["run"] == run]
        print(f"run {run}: {found.law}, load average {os.getloadavg()[0]:.1f}")
        print(f"run {run}: errors of p95 at {SHARES} of capacity: {of_run}", flush=True)
        lasted[f"run {run}"] = round(time.perf_counter() - began, 1)
    errors = np.abs(np.array([float(row["error"]) for row in rows]).reshape(runs, len(SHARES)))
    acceptance = [
        accepted("at the worst load of a run", errors.max(axis=1)),
        *(accepted(f"at {share:g} of capacity", errors[:, k]) for k, share in enumerate(SHARES)),
    ]
    print(*acceptance, sep="\n")
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("profile", sys.argv, started, lasted)
    server = "own V2 server on onnxruntime"
    if options.mlserver:
        asked = [options.mlserver, "-c", "from importlib.metadata import version; print(version('mlserver'))"]
        server = (
            "mlserver " + subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        )
    record |= {"server": server, "seed": options.seed, "seconds": seconds, "runs": runs}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
