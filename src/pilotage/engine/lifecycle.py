"""The lives of models in a simulated cluster: versions decay, labels come, retraining jobs run on the cluster's
nodes.

A retraining job is a pod like any other: `with_jobs` gives every service whose model decays a service of its own
without traffic, one replica of which is the job. It is placed by the scenario's rule, waits if nothing is free, takes
room that serving may need, dies with its node and then begins anew. `Lives` decides when jobs are ordered, as the
retraining policies say, and counts wrong answers as the deployed version makes them. How versions would err is drawn
per seed and service, whatever a policy does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from pilotage.control.policy import Decision, Observation
from pilotage.control.retraining import Past, Retrainer, Retraining, Seen, Stakes
from pilotage.control.steer import Helm
from pilotage.engine.cluster import Cluster, Recorded, World, stream
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Poisson
from pilotage.world.lifecycle import Lifecycle
from pilotage.world.servers import Affine, Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

_NOTHING = np.zeros(0)
_DAY_S = 86400.0


def with_jobs(scenario: Scenario) -> Scenario:
    """The scenario with one more service, `<name>.training`, for every service whose model decays."""
    jobs = [_job(service, service.lifecycle) for service in scenario.services if service.lifecycle]
    return scenario.replace(services=(*scenario.services, *jobs))


def with_silence(scenario: Scenario, worlds: Sequence[World]) -> list[World]:
    """The worlds for `with_jobs(scenario)`: jobs have no traffic."""
    jobs = (Recorded(_NOTHING),) * sum(service.lifecycle is not None for service in scenario.services)
    own = tuple(service.traffic for service in scenario.services)
    return [world._replace(traffic=(world.traffic or own) + jobs) for world in worlds]


def _job(service: Service, life: Lifecycle) -> Service:
    training = life.training
    return Service(
        name=f"{service.name[:50]}.training",
        traffic=Poisson(rate_rps=1e-6),  # never drawn: see `with_silence`
        slo_ms=1e9,
        pools=(training.pool,),
        variants=(
            Variant(
                name="job",
                latency={training.pool: Affine(base_ms=1.0, per_item_ms=0.0)},
                resources=training.resources,
            ),
        ),
        min_replicas=0,
        max_replicas=1,
        initial_replicas=0,
    )


@dataclass(slots=True)
class _Life:
    """One service's model in one world; versions and batches count from the beginning of the past."""

    life: Lifecycle
    row: int  # of the service, and of its jobs
    job_row: int
    error_usd: float
    share: np.ndarray  # wrong answers by version and batch; luck of its retraining included
    errors: np.ndarray  # of those that are labelled
    probe: np.ndarray
    drift: np.ndarray  # input-drift scores
    fails: np.ndarray  # whether a retraining before a batch fails
    version: int
    since: int  # the first batch that the version serves whole
    retrainer: Retrainer | None = None
    at: int = -1  # the batch for which the policy has been asked
    training: int = -1  # the version in training; -1: none
    trained_s: float = 0.0
    retrained: list[float] = field(default_factory=list)  # when versions came into service


class Lives:
    """What happens to the models of a cluster of `with_jobs(scenario)`; `policies` has one per service that decays,
    or one for all."""

    def __init__(
        self, scenario: Scenario, cluster: Cluster, policies: Sequence[Retraining | Sequence[Retraining]]
    ) -> None:
        self._scenario, self._cluster = scenario, cluster
        services, rows = len(scenario.services), cluster.shape[1]
        decaying = [s for s, service in enumerate(scenario.services) if service.lifecycle]
        self._policies: list[Retraining] = []
        self._lives: list[_Life] = []
        for w, policy in enumerate(policies):
            per_service = [policy] * len(decaying) if isinstance(policy, Retraining) else list(policy)
            if len(per_service) != len(decaying):
                raise SpecError(
                    f"{len(per_service)} retraining policies for {len(decaying)} services that decay; "
                    "give one for all, or one per service"
                )
            for k, s in enumerate(decaying):
                self._lives.append(_draw(scenario, w, s, w * rows + services + k, w * rows + s, cluster))
                self._policies.append(per_service[k])
        self._mean_rps = np.array(
            [
                sum(
                    float(np.mean(past)) if len(past := cluster.situation(w, s).history_rps) else math.nan
                    for s in range(services)
                )
                for w in range(cluster.shape[0])
            ]
        )
        self._memory = 1 - math.exp(-scenario.tick_s / _DAY_S)
        self.usd = np.zeros((cluster.shape[0], services))
        self.short: set[int] = set()  # worlds in which a job waits for a node that serving is to give up

    @property
    def shape(self) -> tuple[int, int]:
        """Worlds and services of the cluster, jobs included."""
        return self._cluster.shape

    # --- decisions -------------------------------------------------------------------------------------
    def decide(self, seen: Sequence[Observation]) -> dict[int, Decision]:
        """Orders of jobs, by the cluster's rows, for the tick that begins."""
        rows = self._cluster.shape[1]
        rate = np.array([one["arrival_rate"] for one in seen]).reshape(-1, rows)
        rate = np.nansum(rate[:, : len(self._scenario.services)], axis=1)
        unknown = np.isnan(self._mean_rps)
        self._mean_rps = np.where(unknown, rate, self._mean_rps + self._memory * (rate - self._mean_rps))
        out = {}
        self.short.clear()
        for life, policy in zip(self._lives, self._policies, strict=True):
            w, job = life.row // rows, seen[life.job_row]
            clock_h = float(self._cluster.clock_s[w]) / 3600
            batch = life.life.past_batches + int(clock_h / life.life.batch_h + 1e-9)
            if life.training >= 0:
                out[life.job_row] = self._advance(life, job, batch, w)
                if policy.makes_room and job["replicas_pending"] >= 1:
                    self.short.add(w)
            elif batch > life.at:
                life.at = batch
                load = float(rate[w] / self._mean_rps[w]) if self._mean_rps[w] > 0 else math.nan
                if batch > life.since and self._wants(life, policy, batch, w, load):
                    life.training, life.trained_s = batch, 0.0
                    out[life.job_row] = Decision(order=1, reason="retraining")
        return out

    def _wants(self, life: _Life, policy: Retraining, batch: int, w: int, load: float) -> bool:
        """Whether the policy orders a retraining before a batch."""
        end = len(life.probe)
        known = max(life.since, batch - life.life.label_delay_batches if life.life.labels else 0)
        if life.retrainer is None:
            past = life.life.past_batches
            shadow = Past(life.errors[:past, :past], life.probe[:past] if life.life.probe else life.probe[:0])
            life.retrainer = policy.begin(self._stakes(life, w, end - past), shadow)
        mine = slice(life.since, known)
        probe = life.probe[mine] if life.life.probe else life.probe[:0]
        drift = life.drift[life.version, life.since : batch]
        errors = life.errors[life.version, mine]
        return life.retrainer.decide(Seen(errors, batch - life.since, end - batch, probe, drift, load))

    def _stakes(self, life: _Life, w: int, batches: int) -> Stakes:
        """What a retraining costs in wrong answers among those that are labelled, at the rate of the last day."""
        service = life.row % self._cluster.shape[1]
        past = self._cluster.situation(w, service).history_rps
        rate_rps = float(np.mean(past)) if len(past) else float(
            self._cluster.totals["arrived"][w, service]
        ) / max(float(self._cluster.clock_s[w]), 1.0)  # fmt: skip
        pool = self._scenario.pool_by_name[life.life.training.pool]
        return Stakes(
            price=life.life.price(pool, life.error_usd, rate_rps),
            batch_size=life.life.decay.batch_size,
            batches=batches,
            label_delay=min(life.life.label_delay_batches, batches - 1),
        )

    def _advance(self, life: _Life, job: Observation, batch: int, w: int) -> Decision:
        """What the job in training does in the tick that begins."""
        ready = job["replicas_ready"] >= 1
        life.trained_s = life.trained_s + self._scenario.tick_s if ready else 0.0
        if job.replicas == 0:  # its node died
            return Decision(order=1, reason="retraining, again")
        if life.trained_s < life.life.training.hours * 3600:
            return Decision()
        version, life.training = life.training, -1
        self.usd[w, life.row % self._cluster.shape[1]] += life.life.training.usd
        if not life.fails[version]:
            life.version, life.since = version, batch + 1
            life.retrained.append(float(self._cluster.clock_s[w]))
        return Decision(release=1, reason="trained")

    # --- accounts --------------------------------------------------------------------------------------
    def account(self) -> None:
        """Adds what the deployed versions got wrong in the tick that has passed."""
        rows, ticks, totals = self._cluster.shape[1], self._cluster.ticks, self._cluster.totals
        for life in self._lives:
            w, s = divmod(life.row, rows)
            middle_h = (float(self._cluster.clock_s[w]) - self._scenario.tick_s / 2) / 3600
            batch = min(life.life.past_batches + int(middle_h / life.life.batch_h), life.share.shape[1] - 1)
            right = float(ticks["served"][w, s]) - float(ticks["wrong"][w, s])
            extra = right * life.share[life.version, batch]
            ticks["wrong"][w, s] += extra
            totals["wrong"][w, s] += extra

    def retraining_usd(self) -> np.ndarray:
        """What retraining has cost, jobs' nodes included; shape (worlds, services)."""
        out = self.usd.copy()
        rows = self._cluster.shape[1]
        for life in self._lives:
            w, job = divmod(life.job_row, rows)
            out[w, life.row % rows] += float(self._cluster.totals["node_usd"][w, job])
        return out

    @property
    def retrained_s(self) -> list[list[list[float]]]:
        """When versions came into service, in seconds since the start, per world and service that decays."""
        each = len(self._lives) // self._cluster.shape[0]
        found = [life.retrained for life in self._lives]
        return [found[w * each : (w + 1) * each] for w in range(self._cluster.shape[0])]


class FleetHelm:
    """The controllers of serving and those of retraining, at the cluster of `with_jobs`."""

    def __init__(self, serving: Helm, lives: Lives, services: int) -> None:
        self._serving, self._lives = serving, lives
        w, s = lives.shape
        self._rows = np.arange(w * s).reshape(w, s)[:, :services].reshape(-1).tolist()

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        out = [Decision()] * len(seen)
        wanted = self._serving.decide([seen[row] for row in self._rows])
        jobs = self._lives.decide(seen)
        for row, decision in zip(self._rows, wanted, strict=True):
            out[row] = decision
        rows, services = self._lives.shape[1], len(self._rows) // self._lives.shape[0]
        for w in self._lives.short:
            mine = slice(w * rows, w * rows + services)
            out[mine] = self._yielding(seen[mine], out[mine])
        for row, decision in jobs.items():
            out[row] = decision
        return out

    @staticmethod
    def _yielding(seen: Sequence[Observation], wanted: Sequence[Decision]) -> list[Decision]:
        """What the services of a world do while a job waits for a node: no orders, what is pending goes, and the one
        with most replicas gives one up unless another is on its way out."""
        most = max(range(len(seen)), key=lambda s: seen[s]["replicas_ready"])
        give = seen[most]["replicas_ready"] > 1 and not any(one["replicas_draining"] > 0 for one in seen)
        out = []
        for s, (one, decision) in enumerate(zip(seen, wanted, strict=True)):
            release = max(decision.release, int(one["replicas_pending"]) + int(give and s == most))
            out.append(replace(decision, order=0, release=release, reason="makes room for a training job"))
        return out


def _draw(scenario: Scenario, w: int, s: int, job_row: int, row: int, cluster: Cluster) -> _Life:
    """The model of one service in one world, as its seed says."""
    service = scenario.services[s]
    life = service.lifecycle
    assert life is not None
    rng = stream(cluster.worlds[w].seed, f"{service.name}/quality")
    total = life.past_batches + life.batches(scenario.horizon_h)
    share, probe, lost = life.decay.shares(rng, total, life.label_delay_batches)
    training = life.training
    bad = rng.random(total) < training.worse
    bad[: life.past_batches + 1] = False
    share = np.clip(share * np.where(bad, training.worse_by, 1.0)[:, None], 0.0, 1.0)
    errors, probes = life.decay.counts(rng, share, probe)
    score = life.input_share * lost + life.score_noise * rng.standard_normal(lost.shape)
    return _Life(
        life=life,
        row=row,
        job_row=job_row,
        error_usd=service.economics.error_usd,
        share=share,
        errors=errors,
        probe=probes,
        drift=np.clip(score, 0.0, 1.0),
        fails=rng.random(total) < training.failure,
        version=life.past_batches,
        since=life.past_batches,
    )
