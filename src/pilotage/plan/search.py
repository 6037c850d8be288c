"""The cheapest deployment that meets what is asked: branch and bound with the simulator, Optuna where there is much.

A configuration says how every replica runs; its sizes go from cheap to dear, and what a size meets, a dearer one
meets, so that the cheapest size that does is found by bisection, from a queueing formula's guess or, of an
autoscaler's utilisations, the cheapest. Configurations are
taken in the order of their guessed cost, and left out where even full batches at no wait would cost more than what has
been found: so the result is what simulating every size of every configuration would find, as long as misses fall with
size. Where more than EXHAUSTIVE configurations could be cheapest, Optuna's TPE chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pilotage.plan.trials import Configuration, Outcome, Trials, surely_below

EXHAUSTIVE: Final = 150
TPE_TRIALS: Final = 60
TPE_FIRST: Final = 20  # the best by the formula, which TPE starts from


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a configuration: its cheapest size that meets the objective, and why it was not chosen."""

    configuration: Configuration
    floor_usd: float
    outcome: Outcome | None
    reason: str


@dataclass(slots=True)
class Search:
    """The cheapest deployment under some conditions; what was found stands in `best` (cheapest first) and `verdicts`.

    `slo_s` may be another objective than the model's; `pools` (None: all that are allowed) and `min_accuracy` narrow
    what is searched; `price` multiplies the prices of pools; `keep` deployments are found; with `shared`, a replica
    pays for its share of a node only.
    """

    trials: Trials
    slo_s: float | None = None
    pools: Collection[str] | None = None
    min_accuracy: float = 0.0
    price: Mapping[str, float] = field(default_factory=dict)
    keep: int = 1
    shared: bool = False
    best: list[Outcome] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def run(self) -> Search:
        """Searches, and returns itself."""
        open_: list[tuple[float, Configuration]] = []
        for c in self.trials.configurations():
            if why := self._excluded(c):
                self.verdicts.append(Verdict(c, math.inf, None, why))
            else:
                guessed = self.trials.fixed_usd(c, self.trials.guess(c), self.shared) * self._price(c)
                open_.append((guessed, c))
        # of equal cost first the more accurate, then the smaller batch: it is faster
        open_.sort(key=lambda pair: (pair[0], -self.trials.variant(pair[1]).accuracy, pair[1].max_batch))
        if len(open_) <= EXHAUSTIVE:
            for _, c in open_:
                self._judge(c)
        else:
            self._tpe(open_)
        return self

    def _excluded(self, c: Configuration) -> str:
        if self.pools is not None and c.pool not in self.pools:
            return "pool left out"
        accuracy = self.trials.variant(c).accuracy
        if accuracy < self.min_accuracy:
            return f"accuracy {accuracy:g} is below {self.min_accuracy:g}"
        return self.trials.obstacle(c)

    def _price(self, c: Configuration) -> float:
        return self.price.get(c.pool, 1.0)

    def floor_usd(self, c: Configuration) -> float:
        return self.trials.floor_usd(c, self.shared) * self._price(c)

    def cost(self, outcome: Outcome) -> float:
        """Dollars per hour under the search's prices."""
        c = outcome.configuration
        if self.shared:
            return self.trials.fixed_usd(c, math.ceil(outcome.replicas - 1e-6), True) * self._price(c)
        return outcome.usd_per_hour * self._price(c)

    def meets(self, outcome: Outcome) -> bool:
        """Whether the objective is met, with 95 % confidence over the runs."""
        missed = outcome.missed if self.slo_s is None else outcome.missed_at(self.slo_s)
        return surely_below(missed, 1 - self.trials.model.attainment)

    @property
    def limit_usd(self) -> float:
        """What a deployment must cost less than to be of interest (or as much, if it is more accurate)."""
        budget = self.trials.model.usd_per_hour or math.inf
        return min(budget, self.cost(self.best[self.keep - 1])) if len(self.best) >= self.keep else budget

    def _beaten(self, c: Configuration, usd: float) -> bool:
        if len(self.best) < self.keep:
            return usd > self.limit_usd * (1 + 1e-9)
        level = usd >= self.limit_usd * (1 - 1e-9)
        better = self.trials.variant(c).accuracy > self.best[self.keep - 1].accuracy
        return usd > self.limit_usd * (1 + 1e-9) or (level and not better)

    def _judge(self, c: Configuration) -> float:
        """Finds the cheapest size of a configuration, if it may beat what has been found; its cost, or infinity."""
        floor = self.floor_usd(c)
        if self._beaten(c, floor):
            self.verdicts.append(
                Verdict(c, floor, None, f"costs at least {floor:.4g} $/h, even at full batches")
            )
            return floor
        outcome, why = self._smallest(c)
        if outcome is None:
            self.verdicts.append(Verdict(c, floor, None, why))
            return math.inf
        usd = self.cost(outcome)
        if self._beaten(c, usd):
            self.verdicts.append(Verdict(c, floor, outcome, f"meets the objective at {usd:.4g} $/h"))
            return usd
        self.verdicts.append(Verdict(c, floor, outcome, ""))
        self.best.append(outcome)
        self.best.sort(key=lambda o: (round(self.cost(o), 9), -o.accuracy, o.p99_ms))
        del self.best[self.keep :]
        return usd

    def _smallest(self, c: Configuration) -> tuple[Outcome | None, str]:
        """The cheapest size that meets the objective, or none and why."""
        sizes = self.trials.sizes(c)
        low, high = -1, len(sizes)  # what fails, what meets
        found: Outcome | None = None
        at = sizes.index(float(self.trials.guess(c))) if self.trials.model.steady else 0
        step = 1
        while high - low > 1:
            tried = self.trials.outcome(c, sizes[at])
            if self.meets(tried):
                high, found = at, tried
                at = max(low + 1, at - step) if low < 0 else (low + high) // 2
            else:
                low = at
                if self._beaten(c, self.cost(tried)):
                    share = 100 * (1 - float(tried.missed.mean()))
                    return None, f"only {share:.4g} % in time at {self.cost(tried):.4g} $/h"
                at = min(high - 1, at + step) if high == len(sizes) else (low + high) // 2
            step *= 2
        if found is None:
            share = 100 * (1 - float(tried.missed.mean()))
            size = (
                f"{sizes[-1]:g} replicas" if self.trials.model.steady else f"a utilisation of {sizes[-1]:g}"
            )
            return None, f"misses the objective at any size: {share:.4g} % in time with {size}"
        return found, ""

    def _tpe(self, open_: list[tuple[float, Configuration]]) -> None:
        """Optuna's TPE over pool and variant, batch and wait; a configuration that is left out says its floor."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = {c: guessed for guessed, c in open_}
        builds = sorted({(c.pool, c.variant) for c in known})
        batches, waits = sorted({c.max_batch for c in known}), sorted({c.batch_wait_ms for c in known})
        values: dict[Configuration, float] = {}
        worst = 10 * max(known.values())

        def value(trial: Any) -> float:
            pool, variant = builds[trial.suggest_categorical("build", range(len(builds)))]
            batch = batches[trial.suggest_int("batch", 0, len(batches) - 1)]
            wait = waits[trial.suggest_int("wait", 0, len(waits) - 1)]
            c = Configuration(pool, variant, batch, wait if batch > 1 else waits[0])
            if c not in known:
                return worst
            if c not in values:
                values[c] = min(worst, self._judge(c))
            return values[c]

        sampler = optuna.samplers.TPESampler(seed=self.trials.seed, multivariate=True, n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        for _, c in open_[:TPE_FIRST]:
            place = {"build": builds.index((c.pool, c.variant)), "batch": batches.index(c.max_batch)}
            study.enqueue_trial(place | {"wait": waits.index(c.batch_wait_ms)})
        study.optimize(value, n_trials=TPE_TRIALS)
        for _, c in open_:
            if c not in values:
                floor = self.floor_usd(c)
                beaten = self._beaten(c, floor)
                why = (
                    f"costs at least {floor:.4g} $/h, even at full batches"
                    if beaten
                    else "not tried: TPE did not choose it"
                )
                self.verdicts.append(Verdict(c, floor, None, why))


def pareto(outcomes: Collection[Outcome]) -> list[Outcome]:
    """Those that no other beats in dollars, 99th percentile and accuracy at once, cheapest first."""
    rows = list({(o.configuration, o.size): o for o in outcomes}.values())
    if not rows:
        return []
    values = np.array([(o.usd_per_hour, o.p99_ms, -o.accuracy) for o in rows])
    kept: list[Outcome] = []
    for k, row in enumerate(values):
        no_worse = (values <= row + 1e-9).all(axis=1)
        better = (values < row - 1e-9).any(axis=1)
        if not (no_worse & better).any():
            same = (np.abs(values[:k] - row) < 1e-9).all(axis=1)
            if not same.any():
                kept.append(rows[k])
    return sorted(kept, key=lambda o: (o.usd_per_hour, o.p99_ms))
