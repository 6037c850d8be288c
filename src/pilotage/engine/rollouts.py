"""Many rollouts at once, as counts alone: what a policy for canaries costs beside one that knows the version.

A `Cases` is a lane each: how much traffic, how often the champion errs, how many times as often the new version does,
when labels come, and what everything is worth. No queue and no replica is simulated, which `engine.canary` does; here
thousands of rollouts take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pilotage.control.canary import ABORT, METRICS, PROMOTE, Arm, Evidence, Judge
from pilotage.control.learned_rollout import Prices

LATEST = 60  # intervals that labels come late, at most


@dataclass(frozen=True, slots=True)
class Cases(Prices):
    """One rollout per lane, arrays of shape (lanes,); `rates` and `ratios` have shape (3, lanes), by METRICS.

    `requests` per interval swing by `swing` over `period` intervals; with a `fresh` baseline it is that which the
    canary is compared to, with as much traffic, else all other traffic is. Prices as in `LearnedRollout`; `gain_usd`
    counts where nothing is worse.
    """

    requests: np.ndarray
    swing: np.ndarray
    period: np.ndarray
    phase: np.ndarray
    fresh: np.ndarray
    rates: np.ndarray
    ratios: np.ndarray
    labelled: np.ndarray
    label_delay: np.ndarray
    error_usd: np.ndarray
    slow_usd: np.ndarray
    wrong_usd: np.ndarray
    gain_usd: np.ndarray
    trial_usd: np.ndarray
    prior_bad: np.ndarray
    horizon: np.ndarray
    alpha: float = 0.02

    def __len__(self) -> int:
        return len(self.requests)

    def at(self, lanes: Any) -> Cases:
        """Some of the lanes."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Cases(**{k: v if k == "alpha" else v[..., lanes] for k, v in parts.items()})

    @property
    def worth(self) -> np.ndarray:
        """What a request is worth more under the new version, dollars; below 0 for a bad one."""
        prices = np.stack([self.by_metric[metric] for metric in METRICS])
        rise = (np.minimum(self.rates * self.ratios, 1.0) - self.rates) * prices
        return np.where(self.ratios.max(axis=0) <= 1, self.gain_usd, 0.0) - rise.sum(axis=0)

    @property
    def stakes_usd(self) -> np.ndarray:
        """What bad outcomes of the champion and the gain are worth until the horizon: the scale of what can be lost."""
        prices = np.stack([self.by_metric[metric] for metric in METRICS])
        each = self.gain_usd + (self.rates * prices).sum(axis=0)
        return np.asarray(self.requests * self.horizon * each)


def cases_at_random(rng: np.random.Generator, count: int) -> Cases:
    """Rollouts of all kinds: what policies are trained on."""

    def log_uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), shape or (count,)))

    rates = np.stack([log_uniform(0.0005, 0.05), log_uniform(0.0005, 0.1), log_uniform(0.01, 0.4)])
    prior = rng.uniform(0.05, 0.5, count)
    bad = rng.random(count) < prior
    which = rng.random((3, count)) < 0.25
    which[rng.integers(0, 3, count), np.arange(count)] = True
    worse = which & bad
    ratios = np.where(worse, log_uniform(1.15, 10.0, 3, count), 1.0)
    # a good version is no worse anywhere, and half of them are better in their answers
    better = np.where(rng.random(count) < 0.5, rng.uniform(0.6, 1.0, count), 1.0)
    ratios[2] = np.where(bad, ratios[2], better)
    ratios = np.minimum(ratios, np.maximum(0.9 / rates, 1.0))
    prices = np.stack([log_uniform(1e-3, 1.0) for _ in METRICS])  # relative to each other
    prices[1] = np.where(rng.random(count) < 0.3, 0.0, prices[1])
    each = (rates * prices).sum(axis=0)
    requests = log_uniform(20, 5000)
    trial = np.where(rng.random(count) < 0.5, 0.0, log_uniform(1e-3, 1.0)) * each * requests
    return Cases(
        requests=requests, swing=rng.uniform(0, 0.9, count), period=log_uniform(60, 1440),
        phase=rng.uniform(0, 2 * np.pi, count), fresh=rng.random(count) < 0.5, rates=rates, ratios=ratios,
        labelled=np.where(rng.random(count) < 0.15, 0.0, log_uniform(0.02, 1.0)),
        label_delay=np.where(rng.random(count) < 0.3, 0, rng.integers(1, LATEST + 1, count)),
        error_usd=prices[0], slow_usd=prices[1], wrong_usd=prices[2], gain_usd=each * log_uniform(0.01, 1.0),
        trial_usd=trial, prior_bad=prior, horizon=np.round(log_uniform(60, 480)),
    )  # fmt: skip


class Simulation:
    """Rollouts on their way: shares in, evidence out, and what was lost in the interval."""

    def __init__(self, cases: Cases, seed: int) -> None:
        self._cases, self._rng = cases, np.random.default_rng(seed)
        self.t = np.zeros(len(cases), int)
        self._late = np.zeros((int(cases.label_delay.max(initial=0)) + 1, 4, len(cases)), int)
        self._worth = cases.worth

    def begin(self, lanes: np.ndarray, cases: Cases) -> None:
        """Starts other rollouts in some lanes; labels may come no later than those of the first ones."""
        for f in fields(Cases):
            if f.name != "alpha":
                getattr(self._cases, f.name)[..., lanes] = getattr(cases, f.name)
        self.t[lanes], self._late[:, :, lanes] = 0, 0
        self._worth[lanes] = cases.worth

    def step(self, share: np.ndarray) -> tuple[Evidence, np.ndarray]:
        """Evidence of one more interval, and what was lost in it beside knowing the version, dollars."""
        cases, rng = self._cases, self._rng
        load = cases.requests * (1 + cases.swing * np.sin(2 * np.pi * self.t / cases.period + cases.phase))
        n = np.stack([load * np.where(cases.fresh, share, 1 - share), load * share])
        n = rng.poisson(n)
        common = 1 + 0.4 * np.sin(self.t / 10 + cases.phase)
        ratios = np.stack([np.ones_like(cases.ratios), cases.ratios], axis=1)
        rates = np.minimum((cases.rates * common)[:, None] * ratios, 1.0)
        labelled = rng.binomial(n, cases.labelled)
        bad = rng.binomial(np.stack([n, n, labelled]), rates)
        slot, lanes = self.t % len(self._late), np.arange(len(cases))
        self._late[slot, :, lanes] = np.concatenate([labelled, bad[2]]).T
        due = (self.t - cases.label_delay) % len(self._late)
        known = self._late[due, :, lanes].T * (self.t >= cases.label_delay)
        arms = [
            Arm(requests=n[k], errors=bad[0, k], slow=bad[1, k], labelled=known[k], wrong=known[2 + k])
            for k in (0, 1)
        ]
        self.t += 1
        lost = load * (share * np.maximum(-self._worth, 0) + (1 - share) * np.maximum(self._worth, 0))
        return Evidence(*arms), lost + cases.trial_usd

    def rest(self, outcome: np.ndarray) -> np.ndarray:
        """What is lost from now on until the horizon by outcomes (indices of OUTCOMES), dollars."""
        cases = self._cases
        left = np.maximum(cases.horizon - self.t, 0) * cases.requests
        wrong = np.select(
            [outcome == PROMOTE, outcome == ABORT],
            [np.maximum(-self._worth, 0), np.maximum(self._worth, 0)],
            0.0,
        )
        return np.asarray(left * wrong)


def followed(cases: Cases, judge: Judge, weights: Any, seed: int) -> dict[str, np.ndarray]:
    """What rollouts lose beside knowing the version, under what judges them and what says their share (see
    `control.rollout.begun`): `usd`, `outcome` (index of OUTCOMES; continue: none until the horizon) and `minutes` until
    then, by lane."""
    simulation = Simulation(cases.at(np.arange(len(cases))), seed)
    usd, outcome = np.zeros(len(cases)), np.zeros(len(cases), int)
    minutes, seen = cases.horizon.astype(float), None
    for t in range(int(cases.horizon.max())):
        share = np.broadcast_to(weights.weight(seen), len(cases))
        going = (outcome == 0) & (t < cases.horizon)
        seen, lost = simulation.step(share)
        usd += np.where(going, lost, 0.0)
        found = np.broadcast_to(judge.step(seen), len(cases))
        over = going & ((found == PROMOTE) | (found == ABORT))
        usd += np.where(over, simulation.rest(found), 0.0)
        outcome[over], minutes[over] = found[over], t + 1
        if not going.any():
            break
    return {"usd": usd, "outcome": outcome, "minutes": minutes}
