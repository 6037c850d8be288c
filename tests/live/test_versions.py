"""Every registry, behind the ledger: one contract, faults, concurrent writers, and death at every step."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pilotage.live.entries import Actor
from pilotage.live.ledger import Ledger
from pilotage.live.mlflow_server import MlflowServer
from pilotage.live.registries import (
    Code,
    ConflictError,
    Data,
    DeniedError,
    Folder,
    Measure,
    MissingError,
    Registry,
    UnavailableError,
    Version,
)
from pilotage.live.targets import TargetError
from pilotage.live.versions import RefusedError, Versions
from pilotage.world.spec import SpecError
from tests.live.conftest import Server, proxy

ANN = Actor(kind="human", name="ann")
WHY = {"actor": ANN, "reason": "a test"}


class Member:
    """A registry, and what somebody can do to it behind our back."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.service = registry, f"fraud-{uuid.uuid4().hex[:8]}"

    def draft(self, accuracy: float = 0.9) -> Version:
        return Version(
            service=self.service,
            parents=("7",),
            code=Code(revision="0f1e", dirty=True, diff_digest="aa"),
            data=(Data(name="train.csv", digest="ab" * 32, rows=3, columns={"x": "float64"}),),
            parameters={"depth": 3, "rate": 0.1, "name": "a/b 'c'", "none": None},
            metrics={"accuracy": Measure(value=accuracy, n=1000), "latency_p95_ms": Measure(value=12.5)},
            slices={"sex=1": {"accuracy": Measure(value=0.91, n=600)}},
            environment={"python": "3"},
            artifact="models/m.onnx",
            artifact_digest="cd" * 32,
        )  # fmt: skip

    def move(self, alias: str, to: str | None) -> None:
        if isinstance(self.registry, Folder):
            with sqlite3.connect(Path(self.registry.path) / "registry.db") as db:
                db.execute("UPDATE aliases SET version = ? WHERE service = ?", (to and int(to), self.service))
        elif to is None:
            self._client().delete_registered_model_alias(self.service, alias)
        else:
            self._client().set_registered_model_alias(self.service, alias, to)

    def delete(self, version: str) -> None:
        if isinstance(self.registry, Folder):
            with sqlite3.connect(Path(self.registry.path) / "registry.db") as db:
                db.execute("DELETE FROM versions WHERE service = ? AND version = ?", (self.service, version))
        else:
            self._client().delete_model_version(self.service, version)

    def _client(self) -> Any:
        from mlflow import MlflowClient

        assert isinstance(self.registry, MlflowServer)
        return MlflowClient(self.registry.url)


@pytest.fixture(params=["folder", "mlflow"])
def member(request: pytest.FixtureRequest, tmp_path: Path) -> Member:
    if request.param == "folder":
        return Member(Folder(path=str(tmp_path / "registry")))
    return Member(MlflowServer(url=request.getfixturevalue("mlflow_server").url, timeout_s=30))


@pytest.fixture
def versions(member: Member, tmp_path: Path) -> Versions:
    return Versions(Ledger(tmp_path), member.registry, FileTarget(tmp_path / "running.json"))


class FileTarget:
    """Runs versions in a file, so that what runs outlives a process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def running(self, service: str) -> str | None:
        return json.loads(self._path.read_text()).get(service) if self._path.exists() else None

    def deploy(self, service: str, version: Version) -> str:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({service: version.version}))
        part.replace(self._path)
        return f"runs version {version.version}"


def outcomes(versions: Versions, service: str) -> list[tuple[str, str]]:
    return [(entry.kind, entry.outcome) for entry in versions.ledger.entries(service)]


def agree(versions: Versions, service: str) -> str | None:
    """What registry, ledger and target say in one voice; the ledger is intact and nothing is left open."""
    alias = versions.registry.aliases(service).get("champion")
    assert versions.live_at(service, "9999").version == alias
    assert versions.target is not None
    assert versions.target.running(service) == alias
    anchors, _ = versions.anchors(service)
    assert anchors
    verification = versions.ledger.verify(anchors)
    assert verification.problem is None
    assert not [note for note in verification.notes if "without a result" in note]
    return alias


# --- the contract ------------------------------------------------------------------------------------------
def test_a_version_is_kept_whole_promoted_and_rolled_back(member: Member, versions: Versions) -> None:
    service = member.service
    assert member.registry.aliases(service) == {}
    assert member.registry.versions(service) == []
    assert versions.earlier(service) == []
    for number in ("1", "2", "3"):
        assert versions.add(member.draft(0.9 + int(number) / 100), **WHY) == number
        versions.promote(service, number, evidence={"accuracy": 0.9}, **WHY)
        assert agree(versions, service) == number
    kept = member.registry.version(service, "2")
    assert kept.stored == member.draft(0.92).stored
    assert kept.created.startswith("20")
    assert [v.version for v in member.registry.versions(service)] == ["1", "2", "3"]

    done = versions.rollback(service, actor=ANN, reason="worse on Sundays")
    assert (agree(versions, service), done.expected_version, done.new_version) == ("2", "3", "2")
    assert versions.ledger.entry(done.reverts or 0).new_version == "3"
    assert "2" in done.response["target"]
    versions.rollback(service, **WHY)
    assert agree(versions, service) == "1"
    with pytest.raises(SpecError, match="no earlier version"):
        versions.rollback(service, **WHY)
    versions.promote(service, "3", **WHY)
    versions.promote(service, "2", alias="challenger", **WHY)
    assert member.registry.aliases(service) == {"champion": "3", "challenger": "2"}
    assert agree(versions, service) == "3"
    versions.rollback(service, "2", **WHY)
    assert agree(versions, service) == "2"


def test_it_is_known_what_was_live_at_any_time_and_why(member: Member, versions: Versions) -> None:
    service, live = member.service, [(versions.ledger.entries(last=1), None, None)]
    before = "2020-01-01T00:00:00.000000Z"
    assert versions.live_at(service, before).version is None
    for number, reason in (("1", "first"), ("2", "more accurate"), ("3", "cheaper")):
        versions.add(member.draft(), **WHY)
        versions.promote(service, number, actor=ANN, reason=reason)
        live.append((versions.ledger.entries(last=1), number, reason))
    versions.rollback(service, actor=ANN, reason="errors")
    live.append((versions.ledger.entries(last=1), "2", "errors"))
    for entries, version, reason in live:
        found = versions.live_at(service, entries[0].time if entries else before)
        assert (found.version, found.reason) == (version, reason)
        assert found.entry == (entries[0].id if entries else None)
        assert found.in_doubt is None


def test_what_somebody_else_moves_is_recorded_and_not_overwritten(member: Member, versions: Versions) -> None:
    service = member.service
    for _ in range(3):
        versions.add(member.draft(), **WHY)
    versions.promote(service, "1", **WHY)
    versions.promote(service, "2", **WHY)
    member.move("champion", "3")
    with pytest.raises(RefusedError, match="at version 3, not 2"):
        versions.promote(service, "1", **WHY)
    assert outcomes(versions, service)[-2:] == [("external_change", "observed"), ("promote", "refused")]
    assert versions.live_at(service, "9999").version == "3"
    versions.rollback(service, **WHY)  # from what is there now to what was there before
    assert agree(versions, service) == "2"
    member.move("champion", None)  # the alias is missing
    changes = versions.reconcile(service)
    assert [(e.kind, e.new_version) for e in changes] == [("external_change", None)]
    versions.rollback(service, **WHY)
    assert agree(versions, service) == "2"


def test_a_new_ledger_adopts_what_is_there_and_a_slower_writer_is_kept_out(
    member: Member, versions: Versions, tmp_path: Path
) -> None:
    service = member.service
    for _ in range(2):
        versions.add(member.draft(), **WHY)
    versions.promote(service, "1", **WHY)
    other = Versions(Ledger(tmp_path / "other"), member.registry)
    other.promote(service, "2", **WHY)
    assert outcomes(other, service)[0] == ("external_change", "observed")
    with pytest.raises(RefusedError):
        versions.promote(service, "1", **WHY)  # decided before it knew of the other
    versions.promote(service, "1", **WHY)
    assert agree(versions, service) == "1"
    with pytest.raises(ConflictError, match="came after"):
        member.registry.move(service, "champion", "1", "2", fence=1, key="0:" + "0" * 64)
    with pytest.raises(ConflictError, match="not 2"):
        member.registry.move(service, "champion", "2", "1" + "0", fence=2**60, key="0:" + "0" * 64)
    assert agree(versions, service) == "1"


def test_versions_that_are_gone_retired_or_unknown_are_refused(member: Member, versions: Versions) -> None:
    service = member.service
    for number in ("1", "2", "3", "4"):
        versions.add(member.draft(), **WHY)
        if number != "4":
            versions.promote(service, number, **WHY)
    with pytest.raises(RefusedError, match="rollback would restore"):
        versions.retire(service, "2", **WHY)
    with pytest.raises(RefusedError, match="champion"):
        versions.retire(service, "3", **WHY)
    versions.retire(service, "4", actor=ANN, reason="leaks errors")
    assert member.registry.version(service, "4").retired == "leaks errors"
    with pytest.raises(RefusedError, match="leaks errors"):
        versions.promote(service, "4", **WHY)
    member.delete("2")
    with pytest.raises(RefusedError, match="valid: 1, 3"):
        versions.rollback(service, **WHY)
    with pytest.raises(MissingError):
        member.registry.version(service, "2")
    versions.rollback(service, "1", **WHY)
    assert agree(versions, service) == "1"
    for unknown in ("99", "one", "-1"):
        with pytest.raises(RefusedError):
            versions.promote(service, unknown, **WHY)
    with pytest.raises(SpecError, match="alias"):
        versions.promote(service, "1", alias="latest", **WHY)
    assert agree(versions, service) == "1"


def test_of_two_writers_one_wins_and_the_other_is_recorded_as_refused(
    member: Member, versions: Versions
) -> None:
    service = member.service
    for _ in range(4):
        versions.add(member.draft(), **WHY)
    versions.promote(service, "1", **WHY)
    start, results = threading.Barrier(3), {}

    def promote(number: str) -> None:
        mine = Versions(Ledger(versions.ledger.folder), member.registry, versions.target, wait_s=60)
        start.wait()
        try:
            results[number] = mine.promote(service, number, expected="1", **WHY).outcome
        except RefusedError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=promote, args=(number,)) for number in ("2", "3", "4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [number for number, said in results.items() if said == "applied"]
    assert len(won) == 1, results
    assert agree(versions, service) == won[0]
    assert outcomes(versions, service).count(("promote", "refused")) == 2
    assert all(f"at version {won[0]}, not 1" in said for n, said in results.items() if n not in won)


def test_a_writer_that_waits_too_long_is_refused(member: Member, versions: Versions) -> None:
    service = member.service
    versions.add(member.draft(), **WHY)
    hasty = Versions(versions.ledger, member.registry, versions.target, wait_s=0.05)
    with versions.ledger.alone(service), pytest.raises(RefusedError, match="another writer"):
        hasty.promote(service, "1", **WHY)
    assert outcomes(versions, service)[-1] == ("promote", "refused")


def test_a_target_that_fails_takes_the_alias_back(member: Member, versions: Versions) -> None:
    service = member.service
    for _ in range(2):
        versions.add(member.draft(), **WHY)
    versions.promote(service, "1", **WHY)

    class Broken(FileTarget):
        def deploy(self, service: str, version: Version) -> str:
            raise TargetError("no room")

    broken = Versions(versions.ledger, member.registry, Broken(versions.ledger.folder / "running.json"))
    with pytest.raises(TargetError, match="no room"):
        broken.promote(service, "2", **WHY)
    assert agree(versions, service) == "1"
    assert outcomes(versions, service)[-1] == ("promote", "failed")


# --- death -------------------------------------------------------------------------------------------------
class Around:
    """An object whose named methods say `step()` before and after they do what they do."""

    def __init__(self, inner: Any, step: Callable[[], None], *names: str) -> None:
        self._inner, self._step, self._names = inner, step, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return stepping(found, self._step) if name in self._names else found


def stepping(do: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    def stepped(*arguments: Any, **named: Any) -> Any:
        step()
        result = do(*arguments, **named)
        step()
        return result

    return stepped


def killed_at(deadly: int, versions: Versions, work: Callable[[Versions], Any], inside: bool) -> bool:
    """Runs work in a process of its own that is killed at a step; False if it was done before.

    Steps: before and after every append, registry write and deployment; `inside`: and every synchronisation within
    an append, and every request that writes.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

        with suppress(BaseException):
            if isinstance(versions.registry, MlflowServer):
                from mlflow import MlflowClient

                for name in (
                    "set_registered_model_tag",
                    "set_model_version_tag",
                    "set_registered_model_alias",
                ):
                    setattr(MlflowClient, name, stepping(getattr(MlflowClient, name), step))
            if inside:
                os.fsync = stepping(os.fsync, step)
            dying = Versions(
                Around(versions.ledger, step, "append"),
                Around(versions.registry, step, "add", "move", "tag"),
                Around(versions.target, step, "deploy"),
            )
            work(dying)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_death_at_every_step_of_a_promotion_leaves_all_in_agreement(
    member: Member, versions: Versions
) -> None:
    service, step = member.service, 1
    for _ in range(2):
        versions.add(member.draft(), **WHY)
    versions.promote(service, "1", **WHY)
    seen = set()
    while True:
        again = Versions(Ledger(versions.ledger.folder), member.registry, versions.target)
        inside = isinstance(member.registry, Folder)
        if not killed_at(step, again, lambda v: v.promote(service, "2", **WHY), inside):
            break
        again.reconcile(service)
        found = agree(again, service)
        assert found in ("1", "2")
        seen.add(found)
        moves = [e for e in again.ledger.entries(service, moves_of="champion") if e.new_version == "2"]
        again.promote(service, "2", **WHY)  # what the dead one wanted, once more
        assert agree(again, service) == "2"
        after = [e for e in again.ledger.entries(service, moves_of="champion") if e.new_version == "2"]
        assert len(after) - len(moves) == (found == "1")  # every change has exactly one record
        again.rollback(service, **WHY)
        assert agree(again, service) == "1"
        step += 1
    assert step > 10
    assert seen == {"1", "2"}


@pytest.mark.parametrize("change", ["add", "rollback", "retire", "withdraw"])
def test_death_at_every_step_of_other_changes(change: str, member: Member, versions: Versions) -> None:
    service, step = member.service, 1
    inside = isinstance(member.registry, Folder)
    for number in ("1", "2"):
        versions.add(member.draft(), **WHY)
        versions.promote(service, number, **WHY)
    while True:
        if change == "retire":
            number = versions.add(member.draft(), **WHY)
        versions.promote(service, "2", **WHY)
        if change == "withdraw":
            versions.promote(service, "1", alias="challenger", **WHY)
        work = {
            "add": lambda v: v.add(member.draft(), **WHY),
            "rollback": lambda v: v.rollback(service, **WHY),
            "retire": lambda v, n=number: v.retire(service, n, **WHY),
            "withdraw": lambda v: v.withdraw(service, "challenger", **WHY),
        }[change]
        if not killed_at(step, versions, work, inside):
            break
        versions.reconcile(service)
        assert agree(versions, service) in (("1", "2") if change == "rollback" else ("2",))
        kept = {v.version: v.retired for v in member.registry.versions(service)}
        entries = [e for e in versions.ledger.entries(service) if e.outcome == "applied"]
        challenger = versions.ledger.entries(service, moves_of="challenger", last=1)
        assert member.registry.aliases(service).get("challenger") == (
            challenger[0].new_version if challenger else None
        )
        assert set(kept) == {e.new_version for e in entries if e.kind == "register"}
        assert {n for n, why in kept.items() if why} == {e.new_version for e in entries if e.kind == "retire"}
        step += 1
    assert step > 5


def test_a_time_within_an_unfinished_move_is_in_doubt(tmp_path: Path) -> None:
    member = Member(Folder(path=str(tmp_path)))
    versions = Versions(Ledger(tmp_path), member.registry)
    for _ in range(2):
        versions.add(member.draft(), **WHY)
    versions.promote(member.service, "1", **WHY)

    class Dies(Exception):  # noqa: N818
        pass

    class Dying(Around):
        def move(self, *arguments: Any, **named: Any) -> None:
            self._inner.move(*arguments, **named)
            raise Dies

    with pytest.raises(Dies):
        Versions(versions.ledger, Dying(member.registry, lambda: None)).promote(member.service, "2", **WHY)
    between = versions.ledger.entries(last=1)[0].time
    versions.reconcile(member.service)
    assert versions.live_at(member.service, "9999").version == "2"
    found = versions.live_at(member.service, between)
    assert (found.version, found.in_doubt) == ("1", "2")


# --- a bad network in front of MLflow ----------------------------------------------------------------------
@contextmanager
def behind(
    server: Server, tmp_path: Path, timeout_s: float = 30
) -> Iterator[tuple[Member, Versions, list[Callable[[str, str], Any]]]]:
    """Two versions, the first live, and a list whose last item says what becomes of requests."""
    faults: list[Callable[[str, str], Any]] = [lambda method, path: None]
    with proxy(server.port, lambda method, path: faults[-1](method, path)) as url:
        member = Member(MlflowServer(url=url, timeout_s=timeout_s))
        versions = Versions(Ledger(tmp_path), member.registry, FileTarget(tmp_path / "running.json"))
        direct = Versions(versions.ledger, MlflowServer(url=server.url, timeout_s=30), versions.target)
        for _ in range(2):
            direct.add(member.draft(), **WHY)
        direct.promote(member.service, "1", **WHY)
        yield member, versions, faults


def on_alias(what: Any) -> Callable[[str, str], Any]:
    return lambda method, path: (
        what if method == "POST" and path.endswith("registered-models/alias") else None
    )


def test_what_is_not_allowed_fails_and_says_so(mlflow_server: Server, tmp_path: Path) -> None:
    with behind(mlflow_server, tmp_path) as (member, versions, faults):
        for answer in (
            (401, b"You are not authenticated."),
            (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
            (403, b"Permission denied"),
        ):
            faults.append(on_alias(answer))
            with pytest.raises(DeniedError, match="MLFLOW_TRACKING_USERNAME"):
                versions.promote(member.service, "2", **WHY)
            assert outcomes(versions, member.service)[-1] == ("promote", "failed")
        assert agree(versions, member.service) == "1"


def test_server_errors_silence_and_absence(mlflow_server: Server, tmp_path: Path) -> None:
    with behind(mlflow_server, tmp_path, timeout_s=5) as (member, versions, faults):
        service = member.service
        failures = iter([(500, b"oops")])
        faults.append(lambda m, p: next(failures, None) if on_alias(1)(m, p) else None)
        assert versions.promote(service, "2", **WHY).outcome == "applied"  # the second try
        assert agree(versions, service) == "2"

        late = iter(
            [7.0]
        )  # done, but the answer comes after the client has given up: it looks, and finds it done
        faults.append(lambda m, p: next(late, None) if on_alias(1)(m, p) else None)
        assert versions.promote(service, "1", **WHY).outcome == "applied"
        versions.promote(service, "2", **WHY)
        assert agree(versions, service) == "2"

        faults.append(on_alias((503, b"busy")))
        with pytest.raises(UnavailableError, match="not done"):
            versions.promote(service, "1", **WHY)
        assert outcomes(versions, service)[-1] == ("promote", "abandoned")
        assert agree(versions, service) == "2"

        down = False

        def dies_at_alias(method: str, path: str) -> Any:
            nonlocal down
            down = down or on_alias(True)(method, path) is True
            return (502, b"<html>bad gateway</html>") if down else None

        faults.append(dies_at_alias)
        with pytest.raises(UnavailableError):
            versions.promote(service, "1", **WHY)
        assert outcomes(versions, service)[-1] == ("promote", "intent")  # nobody knows yet
        assert versions.live_at(service, "9999").in_doubt == "1"
        faults.append(lambda method, path: None)  # it is back
        versions.reconcile(service)
        assert agree(versions, service) == "2"

    gone = Versions(versions.ledger, member.registry, versions.target)  # nothing listens any more
    with pytest.raises(UnavailableError):
        gone.promote(service, "1", **WHY)


@pytest.mark.full
def test_a_server_that_is_started_again_has_kept_everything(mlflow_server: Server, tmp_path: Path) -> None:
    with behind(mlflow_server, tmp_path) as (member, versions, _):
        mlflow_server.stop()
        try:
            with pytest.raises(UnavailableError):
                versions.promote(member.service, "2", **WHY)
        finally:
            mlflow_server.start()
        versions.reconcile(member.service)
        assert agree(versions, member.service) == "1"
        versions.promote(member.service, "2", **WHY)
        assert agree(versions, member.service) == "2"


def test_a_version_that_others_registered_is_read_from_its_run(mlflow_server: Server, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client, service = MlflowClient(mlflow_server.url), f"other-{uuid.uuid4().hex[:8]}"
    run = client.create_run(client.create_experiment(service))
    client.log_param(run.info.run_id, "depth", 3)
    client.log_metric(run.info.run_id, "accuracy", 0.8)
    client.create_registered_model(service)
    client.create_model_version(service, f"runs:/{run.info.run_id}/model", run.info.run_id)
    found = MlflowServer(url=mlflow_server.url, timeout_s=30).version(service, "1")
    assert found.parameters == {"depth": "3"}
    assert found.metrics == {"accuracy": Measure(value=0.8)}
