"""Decision-focused training: levels of replicas, learned from what every count of replicas would have cost.

Traffic does not depend on decisions. So once the engine has told, for every tick of a window, what would have been
missed with 0, 1, 2, ... replicas, the cost of *any* sequence of decisions is known, and so is its derivative
(`engine.hindsight`): no exploration, no noise, no value function. The network of `control.foresight` is trained by
that derivative through whole windows, which is how Madeka et al. (Deep Inventory Management, 2022) train purchase
orders. The loss is the logarithm of cost over the clairvoyant's, so that no window drowns another, plus a share of the
ratio itself, so that the worst are not forgotten. Prices vary from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import optuna
import torch

from pilotage.agents.tune import candidate_of, space
from pilotage.control.foresight import PRIOR, READOUT, Anticipate, Foresight, whole
from pilotage.control.network import Network
from pilotage.control.outlook import INPUTS, REFERENCES, Outlook
from pilotage.control.policy import INDEX, Situation, measure
from pilotage.engine import hindsight
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.engine.run import bill
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

CHUNK = 24  # windows that are simulated at once, which bounds memory,
TOGETHER = 4  # each with so many counts of replicas
_STAKE = INPUTS.index("stake")
_CLEAN_USD = 1e-9


@dataclass(frozen=True, slots=True)
class Table:
    """What is known of windows in hindsight; windows come first in every shape.

    `missed_usd[w, k, n]` is what was missed in tick k with n replicas all along (late, dropped or overdue requests, in
    dollars); beyond the last n it stays what it was. `references` and `inputs` are what a policy saw at the beginning
    of each tick. `price_usd` is that of a replica and tick, `lead` the ticks from an order to readiness, `low` and
    `high` the replicas that the service may have.
    """

    missed_usd: np.ndarray
    references: np.ndarray
    inputs: np.ndarray
    price_usd: np.ndarray
    lead: np.ndarray
    low: np.ndarray
    high: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.price_usd)


def look_back(
    scenario: Scenario,
    windows: Sequence[World],
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Table:
    """Simulates one service's windows with every count of replicas. Windows last as long as the scenario says."""
    if len(scenario.services) != 1:
        raise SpecError(
            f"scenario {scenario.name!r} has {len(scenario.services)} services; "
            "hindsight is taken of one service at a time"
        )
    parts = []
    for lo in range(0, len(windows), CHUNK):
        parts.append(_look_back(scenario, windows[lo : lo + CHUNK], threads))
        progress(min(lo + CHUNK, len(windows)))
    return joined(parts)


def _look_back(scenario: Scenario, windows: Sequence[World], threads: int) -> Table:
    service, pool = scenario.services[0], scenario.pool_by_name[scenario.services[0].pools[0]]
    drawn = recorded(scenario, windows)
    most = min(service.max_replicas, pool.max_nodes if pool.node is None else service.max_replicas)
    counts = np.unique(
        np.round(np.r_[np.arange(9), np.geomspace(10, max(10, most), 8)]).clip(0, most)
    ).astype(int)
    missed = np.zeros((len(counts), len(windows), scenario.ticks), np.float32)
    open_ = np.arange(len(windows))  # windows in which something is still missed
    for lo in range(1, len(counts), TOGETHER):
        held = counts[lo : lo + TOGETHER]
        ticks = _held(scenario, [drawn[w] for w in open_], held, threads)
        missed[lo : lo + len(held), open_] = np.moveaxis(
            bill(ticks, scenario)[..., 0, 1:3].sum(axis=-1), 0, 2
        )
        if lo == 1:
            arrived = ticks[:, 0, :, 0]
            missed[0] = arrived["arrived"].T * service.economics.dropped_usd
            seen = Outlook(_situations(scenario, drawn))
            references, inputs = _seen(seen, measure(arrived))
        open_ = open_[missed[lo + len(held) - 1, open_].sum(axis=1) > _CLEAN_USD]
        if len(open_) == 0:
            break
    n = np.arange(most + 1)
    at = np.clip(np.searchsorted(counts, n, side="right") - 1, 0, len(counts) - 2)
    share = ((n - counts[at]) / (counts[at + 1] - counts[at])).astype(np.float32)[:, None, None]
    whole = missed[at] * (1 - share) + missed[at + 1] * share
    one = np.ones(len(windows))
    return Table(
        missed_usd=np.ascontiguousarray(np.moveaxis(whole, 0, 2)),
        references=references,
        inputs=inputs,
        price_usd=one * pool.price_usd_per_hour * scenario.tick_s / 3600,
        lead=seen.lead,
        low=np.full(len(windows), service.min_replicas),
        high=one * most,
        start=one * service.initial_replicas,
    )


def _situations(scenario: Scenario, windows: Sequence[World]) -> list[Situation]:
    cluster = Cluster(scenario, windows)
    return [cluster.situation(w, 0) for w in range(len(windows))]


def _held(scenario: Scenario, windows: Sequence[World], counts: np.ndarray, threads: int) -> np.ndarray:
    """Counters of windows in which a count of replicas is held; shape (ticks, counts, windows, 1)."""
    most = int(counts.max())
    service = scenario.services[0].replace(initial_replicas=most, min_replicas=0, max_replicas=max(most, 1))
    scenario = scenario.replace(services=(service,), history_h=0.0)
    cluster = Cluster(scenario, [world for _ in counts for world in windows], threads=threads)
    orders, none = cluster.no_orders(), cluster.no_orders()
    orders["release"][:, 0] = np.repeat(most - counts, len(windows))
    ticks = [cluster.advance(orders if k == 0 else none).copy() for k in range(scenario.ticks)]
    return np.stack(ticks).reshape(scenario.ticks, len(counts), len(windows), 1)


def _seen(outlook: Outlook, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """References and inputs at the beginning of every tick, from what was measured in each: (ticks, windows, ...)."""
    shown = []
    for rate, peak in zip(
        values[..., INDEX["arrival_rate"]], values[..., INDEX["arrival_peak"]], strict=True
    ):
        shown.append(outlook.view())
        outlook.update(rate, peak)
    references, inputs = (np.stack(x, axis=1).astype(np.float32) for x in zip(*shown, strict=True))
    return references, inputs


def joined(tables: Sequence[Table]) -> Table:
    """Several tables of windows of the same length as one."""
    top = max(t.missed_usd.shape[2] for t in tables)
    wide = [
        np.concatenate(
            [t.missed_usd, np.repeat(t.missed_usd[:, :, -1:], top - t.missed_usd.shape[2], axis=2)], axis=2
        )
        for t in tables
    ]
    rest = {
        name: np.concatenate([getattr(t, name) for t in tables])
        for name in ("references", "inputs", "price_usd", "lead", "low", "high", "start")
    }
    return Table(missed_usd=np.concatenate(wide), **rest)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; the defaults are those of the shipped policy."""

    epochs: int = 40
    windows_per_batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    hidden: tuple[int, ...] = (128, 128)
    dropout: float = 0.1  # of inputs and of hidden units
    ticks: int = 480  # a batch sees so long a part of its windows
    tail: float = 0.3  # weight of the ratio beside its logarithm
    price_spread: float = 0.7  # standard deviation of the logarithm of prices' factors
    seed: int = 0


class _Cost(torch.autograd.Function):
    """`engine.hindsight.follow` with its derivative."""

    @staticmethod
    def forward(ctx: Any, order_to: torch.Tensor, keep_to: torch.Tensor, *run: np.ndarray) -> torch.Tensor:
        order, keep = order_to.detach().numpy(), keep_to.detach().numpy()
        missed_usd, start, price_usd, lead = run
        held = np.zeros(order.shape)
        why, least_at = np.zeros(order.shape, np.int8), np.zeros(order.shape, np.int64)
        cost = hindsight.follow(order, keep, missed_usd, start, price_usd, lead, held, why, least_at)
        ctx.run = (missed_usd, price_usd, held, why, least_at)
        return torch.from_numpy(cost)

    @staticmethod
    def backward(ctx: Any, *weight: torch.Tensor) -> tuple[Any, ...]:
        by_order, by_keep = np.zeros(ctx.run[2].shape, np.float32), np.zeros(ctx.run[2].shape, np.float32)
        hindsight.trace_back(weight[0].numpy(), *ctx.run, by_order, by_keep)
        return torch.from_numpy(by_order), torch.from_numpy(by_keep), None, None, None, None


class Reader(torch.nn.Module):
    """The network of `control.foresight` in torch, normalisation and levels included."""

    def __init__(self, inputs: np.ndarray, hidden: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        flat = inputs.reshape(-1, len(INPUTS)).astype(np.float64)
        self.mean = torch.from_numpy(flat.mean(axis=0)).float()
        self.scale = torch.from_numpy(flat.std(axis=0) + 0.05).float()
        self.clip = 5.0
        sizes = [len(INPUTS), *hidden]
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = torch.nn.Linear(sizes[-1], READOUT)
        self.dropout = torch.nn.Dropout(dropout)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)
        self.prior = torch.from_numpy(PRIOR).float()

    def forward(self, inputs: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.dropout(torch.clamp((inputs - self.mean) / self.scale, -self.clip, self.clip))
        for layer in self.hidden:
            x = self.dropout(torch.tanh(layer(x)))
        z = self.out(x) + self.prior
        n, softplus = len(REFERENCES), torch.nn.functional.softplus

        def level(logits: torch.Tensor, scale: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
            mixed = (torch.softmax(logits, -1) * references).sum(-1)
            return mixed * torch.exp(scale) + softplus(margin)

        order = level(z[..., :n], z[..., 2 * n], z[..., 2 * n + 1])
        keep = level(z[..., n : 2 * n], z[..., 2 * n + 2], z[..., 2 * n + 3])
        return order, torch.maximum(order, keep) + softplus(z[..., 2 * n + 4])

    def network(self) -> Network:
        """The same as plain numbers."""
        layers = [*self.hidden, self.out]

        def plain(values: torch.Tensor) -> tuple[float, ...]:
            return tuple(
                float(f"{v:.6g}") for v in values.detach().tolist()
            )  # what float32 holds, and no more

        return Network(
            mean=plain(self.mean),
            scale=plain(self.scale),
            clip=self.clip,
            weights=tuple(tuple(map(plain, m.weight)) for m in layers),
            biases=tuple(plain(m.bias) for m in layers),
        )


def train(
    table: Table,
    validation: Table,
    settings: Settings,
    *,
    start: Network | None = None,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> tuple[Foresight, list[float]]:
    """Trains on one table and keeps what is best on the other; returns the policy and validation after each epoch.

    Validation is the geometric mean of cost over the clairvoyant's, in whole replicas. With `start` a network that has
    been trained before is trained further: fine-tuning.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    reader = Reader(table.inputs, settings.hidden, settings.dropout)
    if start is not None:
        _load(reader, start)
    optimiser = torch.optim.AdamW(
        reader.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    size = min(settings.windows_per_batch, len(table))
    batches = len(table) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * batches + 1
    )
    best, curve = reader.network(), [_typical_ratio(reader, validation)]
    for epoch in range(settings.epochs):
        order = rng.permutation(len(table))
        for k in range(batches):
            loss = _loss(reader, table, np.sort(order[k * size : (k + 1) * size]), settings, rng)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        curve.append(_typical_ratio(reader, validation))
        if curve[-1] <= min(curve):
            best = reader.network()
        progress(epoch + 1, curve[-1])
    return Foresight(network=best), curve


def _loss(
    reader: Reader, table: Table, chosen: np.ndarray, settings: Settings, rng: np.random.Generator
) -> torch.Tensor:
    ticks = table.inputs.shape[1]
    length = min(settings.ticks, ticks)
    lo = int(rng.integers(0, ticks - length + 1))
    part = slice(lo, lo + length)
    factor = np.exp(settings.price_spread * rng.standard_normal(len(chosen)))
    inputs = table.inputs[chosen, part].copy()
    inputs[:, :, _STAKE] -= np.log(factor)[:, None]
    missed_usd = np.ascontiguousarray(table.missed_usd[chosen, part])
    price_usd, lead = table.price_usd[chosen] * factor, table.lead[chosen]
    order, keep = _bounded(reader, inputs, table.references[chosen, part], table, chosen)
    start = order.detach().numpy()[:, 0] + rng.integers(-1, 4, len(chosen))
    start = np.clip(start, table.low[chosen], table.high[chosen])
    cost = _Cost.apply(order, keep, missed_usd, start, price_usd, lead)
    floor = hindsight.least(missed_usd, price_usd, lead, table.low[chosen]) + 0.05 * price_usd * length
    ratio = cost / torch.from_numpy(floor)
    return (torch.log(ratio) + settings.tail * ratio).mean()


def _bounded(
    reader: Reader, inputs: np.ndarray, references: np.ndarray, table: Table, chosen: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels within what the services may have."""
    low = torch.from_numpy(table.low[chosen]).float()[:, None]
    high = torch.from_numpy(table.high[chosen]).float()[:, None]
    order, keep = reader(torch.from_numpy(inputs), torch.from_numpy(references))
    return torch.clamp(order, low, high), torch.clamp(keep, low, high)


def costs_usd(policy: Foresight | Anticipate, table: Table) -> np.ndarray:
    """What a policy of two levels would have cost in every window, in whole replicas; shape (windows,)."""
    read, out = policy.reader(), []
    for lo in range(0, len(table), CHUNK):
        part = slice(lo, lo + CHUNK)
        shape = table.references[part].shape[:2]
        seen = (x[part].reshape(-1, x.shape[2]) for x in (table.references, table.inputs))
        low, high = table.low[part, None], table.high[part, None]
        order_to, keep_to = whole(*(np.clip(x.reshape(shape), low, high) for x in read(*seen)))
        held, why, least_at = np.zeros(shape), np.zeros(shape, np.int8), np.zeros(shape, np.int64)
        run = (x[part] for x in (table.missed_usd, table.start, table.price_usd, table.lead))
        out.append(hindsight.follow(order_to, keep_to, *run, held, why, least_at))
    return np.concatenate(out)


def ratios(policy: Foresight | Anticipate, table: Table) -> np.ndarray:
    """The same over the least cost of any plan that knew the window; shape (windows,)."""
    least_usd = hindsight.least(table.missed_usd, table.price_usd, table.lead, table.low)
    return costs_usd(policy, table) / np.maximum(least_usd, 1e-12)


def _typical_ratio(reader: Reader, table: Table) -> float:
    return float(np.exp(np.log(ratios(Foresight(network=reader.network()), table)).mean()))


def search(
    policy: Foresight | Anticipate, table: Table, *, trials: int, seed: int = 0
) -> tuple[Foresight | Anticipate, list[float]]:
    """The policy with the parameters that would have cost least over the table's windows, by Bayesian optimisation.

    The first trial is the policy as given. Returns it with the geometric mean ratio of every trial.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = space(policy)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial({name: getattr(policy, name) for name in distributions})
    for _ in range(trials):
        trial = study.ask(distributions)
        study.tell(trial, float(np.log(ratios(policy.replace(**trial.params), table)).mean()))
    found = candidate_of(policy, study.best_params)
    assert isinstance(found, Foresight | Anticipate)
    return found, [float(np.exp(t.value)) for t in study.trials if t.value is not None]


def _load(reader: Reader, network: Network) -> None:
    reader.mean, reader.scale = torch.tensor(network.mean), torch.tensor(network.scale)
    with torch.no_grad():
        for layer, weight, bias in zip(
            [*reader.hidden, reader.out], network.weights, network.biases, strict=True
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
