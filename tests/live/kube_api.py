"""A stand-in for the Kubernetes API server over TLS, with the verbs, conflicts, validation and watch of the real one.

It proves shapes, verbs and what a client does about errors. There are no controllers, admission webhooks or schedulers
behind it. Deployments and Leases are checked against the types of the official client, InferenceServices against
KServe's own schema where PILOTAGE_DATA has it; an unknown field is refused, as with fieldValidation=Strict.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import jsonschema
from kubernetes import client as official

PATH = re.compile(
    r"/apis/(?P<group>[\w.-]+)/(?P<version>\w+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>\w+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>scale|status))?"
)
KINDS = {
    ("apps", "v1", "deployments"): ("Deployment", ["deploy"]),
    ("serving.kserve.io", "v1beta1", "inferenceservices"): ("InferenceService", ["isvc"]),
    ("coordination.k8s.io", "v1", "leases"): ("Lease", []),
}
MICRO_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)"
UNCONDITIONAL = {"deployments"}  # of which a PUT needs no resourceVersion


class Fault(NamedTuple):
    """What happens to a request instead of, or besides, what it asks for. With `applied` it is done all the same, and
    only the client does not hear of it."""

    status: int | None = None
    retry_after_s: int | None = None
    silence_s: float = 0.0
    applied: bool = False
    message: str = "injected"


class Refused(Exception):  # noqa: N818  (a Status, not a bug)
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class KubeApi:
    """Objects by (plural, namespace, name), and a log of (method, path) of everything that was asked.

    `fault(method, path)` may inject something into a request. `settle(object)` is the controller: it may change the
    status of an object after its spec has changed.
    """

    def __init__(
        self, folder: Path, token: str = "s3cr3t-of-the-cluster", schema: Path | None = None
    ) -> None:
        self.folder, self.tokens = folder, {token}
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.log: list[tuple[str, str]] = []
        self.events: list[tuple[int, str, tuple[str, str, str], dict[str, Any]]] = []
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.settle: Callable[[dict[str, Any]], None] = lambda one: None
        self.changed = threading.Condition(threading.RLock())
        self.clock = 100
        self.url = ""
        self.ca_file, self.key_file = folder / "ca.pem", folder / "key.pem"
        self.validator = None
        if schema is not None:
            self.validator = jsonschema.Draft202012Validator(json.loads(gzip.decompress(schema.read_bytes())))

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.log if method != "GET"]

    def add(self, one: dict[str, Any]) -> dict[str, Any]:
        """Creates an object as a client would."""
        group, _, version = one["apiVersion"].partition("/")
        plural = next(
            p for (g, v, p), (kind, _) in KINDS.items() if (g, v, kind) == (group, version, one["kind"])
        )
        return self.create(plural, one["metadata"].setdefault("namespace", "default"), deepcopy(one))

    # --- verbs -----------------------------------------------------------------------------------------------
    def create(self, plural: str, namespace: str, one: dict[str, Any], dry: bool = False) -> dict[str, Any]:
        with self.changed:
            metadata = one.setdefault("metadata", {})
            key = (plural, namespace, metadata.get("name", ""))
            if key in self.objects:
                raise Refused(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
            if plural == "deployments":
                one.get("spec", {}).setdefault("replicas", 1)
            self.check(plural, one)
            metadata |= {"namespace": namespace, "uid": str(uuid.uuid4()), "generation": 1}
            metadata["creationTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return self.store(key, one, "ADDED", dry)

    def replace(
        self, key: tuple[str, str, str], one: dict[str, Any], must_know: bool, dry: bool
    ) -> dict[str, Any]:
        with self.changed:
            now = self.get(key)
            given = one.get("metadata", {}).get("resourceVersion")
            if given is None and must_know:
                raise Refused(422, "Invalid", "metadata.resourceVersion: must be specified for an update")
            if given not in (None, now["metadata"]["resourceVersion"]):
                raise Refused(
                    409, "Conflict",
                    f'Operation cannot be fulfilled on {key[0]} "{key[2]}": the object has been modified; please apply '
                    "your changes to the latest version and try again",
                )  # fmt: skip
            one["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"]
            if one == now:
                return now
            self.check(key[0], one)
            one = canonical(one)
            if one == now:
                return now
            one["metadata"]["generation"] = now["metadata"]["generation"] + (
                one.get("spec") != now.get("spec")
            )
            return self.store(key, one, "MODIFIED", dry)

    def get(self, key: tuple[str, str, str]) -> dict[str, Any]:
        if key not in self.objects:
            raise Refused(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        return self.objects[key]

    def store(self, key: tuple[str, str, str], one: dict[str, Any], event: str, dry: bool) -> dict[str, Any]:
        one = canonical(one)
        if dry:
            return one
        self.clock += 1
        one["metadata"]["resourceVersion"] = str(self.clock)
        self.settle(one)
        self.objects[key] = one
        self.events.append((self.clock, event, key, one))
        self.changed.notify_all()
        return one

    def check(self, plural: str, one: dict[str, Any]) -> None:
        name = one.get("metadata", {}).get("name", "")
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
            raise Refused(422, "Invalid", f"metadata.name: Invalid value: {name!r}")
        if plural == "deployments":
            wrong = next(mistakes(one, "V1Deployment", ""), None)
            if wrong is None and one["spec"]["replicas"] < 0:
                wrong = "spec.replicas: Invalid value: must be greater than or equal to 0"
        elif plural == "leases":
            wrong = next(mistakes(one, "V1Lease", ""), None) or wrong_lease(one.get("spec") or {})
        elif self.validator is not None:
            found = next(self.validator.iter_errors(one), None)
            wrong = found and f"{'.'.join(map(str, found.absolute_path))}: {found.message[:300]}"
        else:
            wrong = None
        if plural == "inferenceservices" and wrong is None:  # what KServe's webhook checks beyond the schema
            predictor = one["spec"]["predictor"]
            low, high = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
            if not 0 <= predictor.get("canaryTrafficPercent", 0) <= 100:
                wrong = "canaryTrafficPercent: must be between 0 and 100"
            elif low < 0 or (high and low > high):
                wrong = f"MinReplicas ({low}) cannot exceed MaxReplicas ({high})"
        if wrong:
            raise Refused(422, "Invalid", f"{plural} {name!r} is invalid: {wrong}")


def wrong_lease(spec: dict[str, Any]) -> str | None:
    """What the API server's own validation of a Lease finds beyond its types."""
    duration, changes = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
    if duration is not None and duration <= 0:
        return "spec.leaseDurationSeconds: Invalid value: must be greater than 0"
    if changes is not None and changes < 0:
        return "spec.leaseTransitions: Invalid value: must be greater than or equal to 0"
    for name in ("acquireTime", "renewTime"):
        if spec.get(name) is not None and not re.fullmatch(MICRO_TIME, spec[name]):
            return f"spec.{name}: Invalid value: {spec[name]!r}: expected a MicroTime"
    return None


def mistakes(value: Any, kind: str, where: str) -> Iterator[str]:
    """What is wrong with a value of a type of the official client: unknown and missing fields, wrong types."""
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: Invalid type: expected a list"
            return
        for k, inner in enumerate(value):
            yield from mistakes(inner, found[1], f"{where}[{k}]")
    elif found := re.fullmatch(r"dict\((\w+), ?(.*)\)", kind):
        if not isinstance(value, dict):
            yield f"{where}: Invalid type: expected a map"
            return
        for key, inner in value.items():
            yield from mistakes(inner, found[2], f"{where}.{key}")
    elif hasattr(official, kind):
        model = getattr(official, kind)
        names = {there: here for here, there in model.attribute_map.items()}
        if not isinstance(value, dict):
            yield f"{where}: Invalid type: expected {kind}"
            return
        for key, inner in value.items():
            if key not in names:
                yield f'{where}: strict decoding error: unknown field "{key}"'
            elif inner is not None:
                yield from mistakes(inner, model.openapi_types[names[key]], f"{where}.{key}")
        if "metadata" not in where and where:
            try:  # its setters refuse None where a field is required
                model(**{names[key]: inner for key, inner in value.items() if key in names})
            except ValueError as error:
                yield f"{where}: Required value: {error}"
    elif kind in PLAIN and not isinstance(value, PLAIN[kind]):
        yield f"{where}: Invalid value: {value!r}: expected {kind}"


PLAIN: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def canonical(one: dict[str, Any]) -> dict[str, Any]:
    """With quantities as the server writes them: whole thousands of millis are units."""
    text = re.sub(r'("cpu": )"(\d+)000m"', r'\1"\2"', json.dumps(one))
    return json.loads(text)


def merge(one: Any, patch: Any) -> Any:
    """RFC 7396, written anew here so that a mistake in ours would show."""
    if not isinstance(patch, dict):
        return patch
    target = dict(one) if isinstance(one, dict) else {}
    for key in patch:
        if patch[key] is None:
            target.pop(key, None)
        else:
            target[key] = merge(target.get(key), patch[key])
    return target


def scale_of(one: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        k: one["metadata"][k] for k in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    }
    count = one["spec"]["replicas"]
    return {
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": {"replicas": count},
        "status": {"replicas": one.get("status", {}).get("replicas", 0), "selector": ""},
    }  # fmt: skip


def certify(folder: Path) -> None:
    """Makes ca.pem and key.pem of a server on loopback."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "30", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "ca.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


@contextmanager
def serving(api: KubeApi) -> Iterator[KubeApi]:
    """The API on a free port of loopback, with the certificate in its folder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            path, query = unquote(parts.path), {k: v[-1] for k, v in parse_qs(parts.query).items()}
            api.log.append((self.command, self.path))
            fault = api.fault(self.command, path)
            try:
                if self.headers.get("Authorization", "").removeprefix("Bearer ") not in api.tokens:
                    raise Refused(401, "Unauthorized", "Unauthorized")
                if fault is not None and not fault.applied:
                    time.sleep(fault.silence_s)
                    if fault.status is None:
                        self.close_connection = True
                        return
                    raise Refused(fault.status, "Injected", fault.message)
                if query.get("watch") in ("1", "true"):
                    self.watch(path, query)
                    return
                code, answer = self.answer(path, query, json.loads(body) if body else None)
            except Refused as error:
                code = error.code
                answer = {
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": str(error),
                    "reason": error.reason, "code": code,
                }  # fmt: skip
            if fault is not None and fault.applied:
                time.sleep(fault.silence_s)
                self.close_connection = True
                return
            self.send(code, answer, fault)

        def answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
            found = discovery(path)
            if found is not None:
                return 200, found
            match = PATH.fullmatch(path)
            if match is None or (match["group"], match["version"], match["plural"]) not in KINDS:
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            plural, key = match["plural"], (match["plural"], match["namespace"] or "", match["name"] or "")
            dry = query.get("dryRun") == "All"
            with api.changed:
                if not match["name"]:
                    if self.command == "POST":
                        return 201, api.create(plural, key[1], body, dry)
                    return 200, self.list(match, query)
                if match["sub"] == "scale":
                    return 200, self.scale(key, body, dry)
                now = api.get(key)
                if self.command == "GET":
                    return 200, now
                if self.command == "PUT":
                    return 200, api.replace(key, body, plural not in UNCONDITIONAL, dry)
                if self.command == "PATCH":
                    return 200, api.replace(key, self.patched(now, body), False, dry)
                if self.command == "DELETE":
                    del api.objects[key]
                    api.clock += 1
                    api.events.append((api.clock, "DELETED", key, now))
                    api.changed.notify_all()
                    return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            raise Refused(405, "MethodNotAllowed", self.command)

        def patched(self, now: dict[str, Any], body: Any) -> dict[str, Any]:
            content = self.headers.get("Content-Type", "").partition(";")[0]
            if content != "application/merge-patch+json":
                raise Refused(415, "UnsupportedMediaType", f"{content} is not understood here")
            return merge(now, body)

        def scale(self, key: tuple[str, str, str], body: Any, dry: bool) -> dict[str, Any]:
            now = api.get(key)
            if self.command == "GET":
                return scale_of(now)
            wanted = self.patched(scale_of(now), body) if self.command == "PATCH" else body
            count = wanted.get("spec", {}).get("replicas")
            if type(count) is not int or count < 0:
                raise Refused(422, "Invalid", f"spec.replicas: Invalid value: {count!r}")
            one = deepcopy(now)
            one["spec"]["replicas"] = count
            one["metadata"]["resourceVersion"] = wanted["metadata"].get("resourceVersion")
            return scale_of(api.replace(key, one, False, dry))

        def list(self, match: re.Match[str], query: dict[str, str]) -> dict[str, Any]:
            keys = sorted(
                key for key in api.objects
                if key[0] == match["plural"] and match["namespace"] in (None, key[1])
                and key[2] > query.get("continue", "")
            )  # fmt: skip
            limit = int(query.get("limit", len(keys) + 1))
            more = {"continue": keys[limit - 1][2]} if len(keys) > limit else {}
            kind = KINDS[match["group"], match["version"], match["plural"]][0]
            return {
                "kind": f"{kind}List", "apiVersion": f"{match['group']}/{match['version']}",
                "metadata": {"resourceVersion": str(api.clock)} | more, "items": [api.objects[k] for k in keys[:limit]],
            }  # fmt: skip

        def watch(self, path: str, query: dict[str, str]) -> None:
            match = PATH.fullmatch(path)
            assert match is not None
            since, end = (
                int(query.get("resourceVersion") or 0),
                time.monotonic() + float(query.get("timeoutSeconds", 30)),
            )
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while time.monotonic() < end:
                with api.changed:
                    fresh = [
                        e
                        for e in api.events
                        if e[0] > since and e[2][:2] == (match["plural"], match["namespace"])
                    ]
                    if not fresh:
                        api.changed.wait(0.2)
                for at, what, _, one in fresh:
                    since = at
                    line = json.dumps({"type": what, "object": one}).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

        def send(self, code: int, answer: Any, fault: Fault | None) -> None:
            payload = json.dumps(answer).encode()
            try:
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                if fault is not None and fault.retry_after_s is not None:
                    self.send_header("Retry-After", str(fault.retry_after_s))
                self.end_headers()
                self.wfile.write(payload)
            except OSError:  # the client did not wait
                pass

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(api.ca_file, api.key_file)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, address: Any) -> None:
            with suppress(OSError):  # the handshake is made in the thread of the request
                super().finish_request(context.wrap_socket(request, server_side=True), address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    api.url = f"https://127.0.0.1:{server.server_port}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()


def discovery(path: str) -> dict[str, Any] | None:
    """What kubectl asks before it does anything."""
    groups = {(group, version) for group, version, _ in KINDS}
    if path.rstrip("/") == "/version":
        return {"major": "1", "minor": "35", "gitVersion": "v1.35.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/api/v1":
        return {"kind": "APIResourceList", "groupVersion": "v1", "resources": []}
    if path == "/apis":
        named = [{"groupVersion": f"{g}/{v}", "version": v} for g, v in sorted(groups)]
        return {
            "kind": "APIGroupList", "apiVersion": "v1",
            "groups": [
                {"name": n["groupVersion"].partition("/")[0], "versions": [n], "preferredVersion": n} for n in named
            ],
        }  # fmt: skip
    for group, version in groups:
        if path == f"/apis/{group}/{version}":
            resources = []
            for (g, _, plural), (kind, short) in KINDS.items():
                if g == group:
                    verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
                    resources.append({
                        "name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs,
                        "shortNames": short,
                    })  # fmt: skip
                    if plural == "deployments":
                        resources.append({
                            "name": "deployments/scale", "singularName": "", "namespaced": True, "kind": "Scale",
                            "group": "autoscaling", "version": "v1", "verbs": ["get", "update", "patch"],
                        })  # fmt: skip
            return {"kind": "APIResourceList", "groupVersion": f"{group}/{version}", "resources": resources}
    return None


def kserve_schema() -> Path | None:
    """KServe's schema in the project's data, if that is there."""
    data = os.environ.get("PILOTAGE_DATA")
    path = Path(data or ".") / "schemas" / "kserve-inferenceservice-v1beta1.strict.schema.json.gz"
    return path if data and path.exists() else None


def deployment(name: str = "ranker", replicas: int = 2, **pod: Any) -> dict[str, Any]:
    """A Deployment with a side car before and after the container that serves."""
    containers = [
        {"name": "proxy", "image": "registry/proxy:1"},
        {
            "name": "server", "image": "registry/ranker:7",
            "env": [{"name": "MAX_BATCH", "value": "8"}, {"name": "MODEL_URI", "value": "s3://models/ranker/7"}],
            "resources": {"requests": {"cpu": "1500m", "memory": "2Gi"}},
        },
        {"name": "logs", "image": "registry/logs:1"},
    ]  # fmt: skip
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "models"},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers} | pod},
        },
    }  # fmt: skip


def inference_service(name: str = "fraud", **predictor: Any) -> dict[str, Any]:
    model = {
        "modelFormat": {"name": "onnx"}, "storageUri": "s3://models/fraud/1",
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
    }  # fmt: skip
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "models"},
        "spec": {"predictor": {"minReplicas": 1, "maxReplicas": 3, "model": model} | predictor},
    }  # fmt: skip
