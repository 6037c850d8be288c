"""A Lease of Kubernetes as the right to write: taken, renewed, lost and passed on, against a strict stand-in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the official client is not installed: pip install 'pilotage[dev]'")

from kubernetes import client as official
from kubernetes.leaderelection import electionconfig, leaderelection
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock

from pilotage.live import kubernetes_lease
from pilotage.live.kubernetes import Kubernetes
from pilotage.live.kubernetes_lease import KubernetesLease
from pilotage.live.lease import FileLease, LeaseError, Leases, SharedLease
from pilotage.live.process import run
from pilotage.live.status import Log
from pilotage.live.steer_config import load
from pilotage.live.targets import ScaleOrder, TargetError
from pilotage.world.spec import SpecError, decode
from tests.live.kube_api import Fault, KubeApi, Refused, certify, deployment, serving
from tests.live.test_kubernetes import TOKEN
from tests.live.test_steer import entries

QUICK = SharedLease(duration_s=2, renew_within_s=1.5, retry_s=0.1)
KEY = ("leases", "models", "pilotage-steer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster")
    certify(path)
    (path / "token").write_text(TOKEN + "\n")
    return path


@pytest.fixture
def api(folder: Path) -> Iterator[KubeApi]:
    with serving(KubeApi(folder, TOKEN)) as one:
        yield one


def endpoint(api: KubeApi) -> Kubernetes:
    return Kubernetes(
        url=api.url, ca_file=str(api.ca_file), token_file=str(api.folder / "token"), namespace="models",
        timeout_s=1.0, budget_s=5.0,
    )  # fmt: skip


@pytest.fixture
def candidate(api: KubeApi) -> Iterator[Callable[..., KubernetesLease]]:
    made: list[KubernetesLease] = []

    def make(identity: str, spec: SharedLease = QUICK, **more: Any) -> KubernetesLease:
        made.append(KubernetesLease(spec, endpoint(api), "models", identity=identity, **more))
        return made[-1]

    yield make
    for one in made:
        one._stop.set()


def record(api: KubeApi) -> dict[str, Any]:
    return dict(api.objects[KEY]["spec"])


def cut_off(one: KubernetesLease) -> None:
    """The network between a candidate and the server is gone."""

    def ask(*_: object, **__: object) -> None:
        raise TargetError("no answer: unplugged")

    one._api.ask = ask  # type: ignore[method-assign,assignment]


def until(true: Callable[[], bool], within_s: float = 5.0) -> float:
    """Waits for something, and says when it was."""
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)
    return time.monotonic()


def holds(one: KubernetesLease) -> bool:
    try:
        one.check()
    except LeaseError:
        return False
    return True


# --- taken, renewed, given back ----------------------------------------------------------------------------------
def test_it_is_made_renewed_given_back_and_taken_by_the_next_at_once(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    one, two = candidate("one"), candidate("two")
    with pytest.raises(LeaseError, match="lease models/pilotage-steer is not held"):
        one.check()
    one.acquire()
    first = record(api)
    assert (first["holderIdentity"], first["leaseDurationSeconds"], first["leaseTransitions"]) == (
        "one",
        2,
        0,
    )
    until(lambda: record(api)["renewTime"] > first["renewTime"])
    assert {k: v for k, v in record(api).items() if k != "renewTime"} == {
        k: v for k, v in first.items() if k != "renewTime"
    }
    reads = [path for method, path in api.log if method == "GET"]
    assert len(reads) == 1, "a holder whom nobody disturbs has nothing to read"
    one.release()
    assert record(api).get("holderIdentity") is None
    with pytest.raises(LeaseError):
        one.check()
    began_s = time.monotonic()
    two.acquire()
    assert time.monotonic() - began_s < 0.5
    assert (record(api)["holderIdentity"], record(api)["leaseTransitions"]) == ("two", 1)


def test_what_others_keep_in_the_object_stays(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    api.add({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": {},
        "metadata": {"name": KEY[2], "namespace": "models", "labels": {"team": "ranking"}},
    })  # fmt: skip
    api.log.clear()
    candidate("one").acquire()
    assert api.objects[KEY]["metadata"]["labels"] == {"team": "ranking"}
    assert "POST" not in [method for method, _ in api.log], "the right to create is not needed then"


# --- passed on ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("said", ["1999-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"])
def test_a_dead_holder_is_followed_after_its_time_on_the_clock_of_who_waits(
    api: KubeApi, candidate: Callable[..., KubernetesLease], said: str
) -> None:
    api.add({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": KEY[2], "namespace": "models"},
        "spec": {
            "holderIdentity": "dead", "leaseDurationSeconds": 1, "acquireTime": said, "renewTime": said,
            "leaseTransitions": 4,
        },
    })  # fmt: skip
    told: list[str] = []
    began_s = time.monotonic()
    candidate("heir", tell=told.append).acquire()
    assert 1.0 <= time.monotonic() - began_s < 2.5
    assert record(api)["leaseTransitions"] == 5
    assert told == ["lease models/pilotage-steer is held by 'dead'; waiting"]


def test_who_is_cut_off_stops_before_anybody_follows(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    one, two = candidate("one"), candidate("two")
    one.acquire()
    followed_s: list[float] = []

    def follow() -> None:
        two.acquire()
        followed_s.append(time.monotonic())

    waiting = threading.Thread(target=follow, daemon=True)
    waiting.start()
    time.sleep(2.5)  # longer than the record lasts: it is renewed, so that nobody follows
    assert holds(one)
    assert not followed_s
    cut_off(one)
    stopped_s = until(lambda: not holds(one))
    waiting.join(5)
    assert stopped_s < followed_s[0]
    with pytest.raises(LeaseError, match="unplugged"):
        one.check()


def test_who_was_overtaken_stops_with_the_next_renewal(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    slow = SharedLease(duration_s=60, renew_within_s=40.0, retry_s=0.1)
    one = candidate("one", slow)
    one.acquire()
    with api.changed:  # as a person with kubectl may
        taken = json.loads(json.dumps(api.objects[KEY]))
        taken["spec"]["holderIdentity"] = "a person"
        api.replace(KEY, taken, True, False)
    until(lambda: not holds(one), 2.0)
    with pytest.raises(LeaseError, match="its holder is 'a person'"):
        one.check()
    assert record(api)["holderIdentity"] == "a person"


def test_of_two_who_write_at_once_one_is_told_that_it_came_too_late(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    one, two = candidate("one"), candidate("two")
    one.acquire()
    one.release()

    def between(method: str, path: str) -> None:
        if method == "PUT" and record(api).get("holderIdentity") is None:
            api.fault = lambda method, path: None
            assert two._try()  # what "one" has read is old by now

    api.fault = between
    late = candidate("late")
    assert not late._try()
    assert record(api)["holderIdentity"] == "two"
    assert holds(two)
    assert not holds(late)


def test_a_host_that_slept_knows_that_it_is_no_holder(
    api: KubeApi, candidate: Callable[..., KubernetesLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = candidate("one")
    one.acquire()
    now_s = kubernetes_lease._now_s
    monkeypatch.setattr(kubernetes_lease, "_now_s", lambda: now_s() + 3600)
    assert not holds(one)
    monkeypatch.undo()
    assert not holds(one), "what was lost is not found again"


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=429), Fault(), Fault(applied=True)],
    ids=["500", "429", "silence", "done, but not said"],
)
def test_a_server_that_stumbles_costs_no_lease(
    api: KubeApi, candidate: Callable[..., KubernetesLease], fault: Fault
) -> None:
    one = candidate("one", SharedLease(duration_s=5, renew_within_s=3.0, retry_s=0.1))
    one.acquire()
    count = iter(range(1000))
    api.fault = lambda method, path: fault if next(count) % 3 == 0 else None
    before = record(api)["renewTime"]
    time.sleep(1.0)
    assert holds(one)
    assert record(api)["renewTime"] > before
    assert record(api)["leaseTransitions"] == 0


def test_what_trying_again_does_not_mend_is_said(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    api.fault = lambda method, path: Fault(status=403, message="leases is forbidden")
    with pytest.raises(LeaseError, match=r"leases is forbidden; valid: a role with get and update"):
        candidate("one").acquire()


def test_the_stand_in_refuses_what_the_server_would(api: KubeApi) -> None:
    for spec, why in (
        ({"leaseDurationSeconds": 0}, "greater than 0"),
        ({"leaseDurationSeconds": 1.5}, "expected int"),
        ({"renewTime": "2026-01-01T00:00:00Z"}, "MicroTime"),
        ({"holder": "x"}, "unknown field"),
    ):
        with pytest.raises(Refused, match=why):
            api.add({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec,
                "metadata": {"name": "x", "namespace": "models"},
            })  # fmt: skip


# --- beside others -----------------------------------------------------------------------------------------------
def test_the_official_client_and_this_one_respect_each_other(
    api: KubeApi, candidate: Callable[..., KubernetesLease]
) -> None:
    configuration = official.Configuration()
    configuration.host, configuration.ssl_ca_cert = api.url, str(api.ca_file)
    configuration.api_key = {"authorization": f"Bearer {TOKEN}"}
    lock = LeaseLock(KEY[2], "models", "official")
    lock.api_instance = official.CoordinationV1Api(official.ApiClient(configuration))
    other = leaderelection.LeaderElection(
        electionconfig.Config(lock, 4, 3, 1, onstarted_leading=lambda: None, onstopped_leading=None)
    )
    one = candidate("one", SharedLease(duration_s=4, renew_within_s=3.0, retry_s=0.2))
    one.acquire()
    assert not other.try_acquire_or_renew()
    one.release()
    assert other.try_acquire_or_renew()
    assert record(api)["holderIdentity"] == "official"
    late = candidate("late")
    assert not late._try()
    assert "official" in late._holder


# --- steering with it --------------------------------------------------------------------------------------------
def test_without_it_a_target_writes_nothing(api: KubeApi, candidate: Callable[..., KubernetesLease]) -> None:
    api.add(deployment())
    one = candidate("one")
    one.acquire()
    target = endpoint(api).begin(one)
    order = ScaleOrder(service="ranker", replicas=5)
    assert "changed ranker" in str(target.scale([order])[0])
    cut_off(one)
    until(lambda: not holds(one))
    api.log.clear()
    (said,) = target.scale([ScaleOrder(service="ranker", replicas=9)])
    assert isinstance(said, TargetError)
    assert "not tried: lease models/pilotage-steer is lost" in str(said)
    assert api.writes == []
    assert target.counts(["ranker"]) == {"ranker": 5}


def configured(folder: Path, api: KubeApi, lease: str = "") -> Path:
    (folder / "seen.jsonl").write_text(
        "".join(
            json.dumps({
                "now_s": 100_000 + 15 * tick, "service": "ranker", "arrival_rate": 20, "utilization": 1.0,
                "replicas_ready": 2, "replicas_starting": 0, "replicas_pending": 0,
            }) + "\n"
            for tick in range(4)
        )
    )  # fmt: skip
    path = folder / "steer.toml"
    path.write_text(
        f"""scenario = "quickstart"
ledger = "ledger"
mode = "act"
[monitor]
kind = "recording"
path = "seen.jsonl"
[target]
kind = "kubernetes"
url = "{api.url}"
ca_file = "{api.ca_file}"
token_file = "{api.folder / "token"}"
namespace = "models"
{lease}
"""
    )
    return path


LEASE = "[lease]\nduration_s = 2\nrenew_within_s = 1.5\nretry_s = 0.1\n"


def test_a_process_waits_for_it_holds_it_while_it_steers_and_gives_it_back(
    api: KubeApi, tmp_path: Path, candidate: Callable[..., KubernetesLease]
) -> None:
    api.add(deployment())
    path = configured(tmp_path, api, LEASE)
    before = candidate("before")
    before.acquire()
    log, ended = StringIO(), threading.Event()
    steering = threading.Thread(target=lambda: (run(path, log=Log(log)), ended.set()), daemon=True)
    steering.start()
    until(lambda: "is held by 'before'; waiting" in log.getvalue())
    with pytest.raises(LeaseError, match="another process steers with this ledger"):
        FileLease(tmp_path / "ledger" / "steer.lock").acquire()
    assert not [path for _, path in api.writes if "deployments" in path]
    before.release()
    assert ended.wait(10)
    assert {e["outcome"] for e in entries(tmp_path)} == {"intent", "applied"}
    assert record(api).get("holderIdentity") is None
    assert record(api)["leaseTransitions"] == 1
    FileLease(tmp_path / "ledger" / "steer.lock").acquire()


def test_a_process_that_loses_it_stops_at_once_and_says_so(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.add(deployment())
    path = configured(tmp_path, api, LEASE)

    def acquired(one: KubernetesLease) -> None:
        real(one)
        cut_off(one)
        until(lambda: not holds(one))

    real = KubernetesLease.acquire
    monkeypatch.setattr(KubernetesLease, "acquire", acquired)
    with pytest.raises(LeaseError, match="is lost"):
        run(path, log=Log(StringIO()))
    assert not [path for _, path in api.writes if "deployments" in path]
    assert [e["outcome"] for e in entries(tmp_path)] == ["refused"]
    assert entries(tmp_path)[0]["response"] == {"target": "the lease was lost"}


def test_of_several_leases_all_are_held_or_none(tmp_path: Path) -> None:
    one, two = FileLease(tmp_path / "one"), FileLease(tmp_path / "two")
    two.acquire()
    both = Leases(one, FileLease(tmp_path / "two"))
    with pytest.raises(LeaseError):
        both.acquire()
    two.release()
    both.acquire()
    both.check()
    (tmp_path / "two").unlink()
    with pytest.raises(LeaseError, match="removed or replaced"):
        both.check()
    both.release()
    with pytest.raises(LeaseError, match="not held"):
        one.check()


def test_bad_configurations_are_refused(api: KubeApi, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="each more than the next"):
        decode({"duration_s": 10, "renew_within_s": 10.0}, SharedLease, "lease")
    path = configured(tmp_path, api, LEASE)
    assert load(path).config.lease == QUICK
    text = path.read_text()
    path.write_text(text[: text.index("[target]")] + LEASE)
    with pytest.raises(SpecError, match="lease: the target is 'dry-run'; valid with 'kubernetes' only"):
        load(path)
