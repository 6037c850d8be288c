"""The life of a model in service: how its versions decay, what is known of that, and what a retraining takes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pilotage.world.drift import Decay
from pilotage.world.pools import Pool, Resources
from pilotage.world.spec import Count, Name, NonNegative, Positive, Probability, Spec


class Training(Spec, frozen=True, kw_only=True):
    """A retraining: a job that needs `resources` on a node of `pool` for `hours` (without resources, a whole node),
    and costs `usd` besides, for labels and people. With probability `failure` nothing comes of it; with probability
    `worse` the version errs `worse_by` times as much as it should.
    """

    pool: Name
    hours: Positive
    usd: NonNegative = 0.0
    resources: Resources | None = None
    failure: Probability = 0.0
    worse: Probability = 0.0
    worse_by: Annotated[float, Meta(ge=1, le=100)] = 1.5

    def usd_on(self, pool: Pool) -> float:
        """What it costs with its share of a node of `pool`, that of the resource it needs most of."""
        share = 1.0
        if pool.node and self.resources:
            both = zip(self.resources.vector, pool.node.vector, strict=True)
            share = max(need / has for need, has in both if has > 0)
        return self.usd + self.hours * share * pool.price_usd_per_hour


class Lifecycle(Spec, frozen=True, kw_only=True):
    """How a service's model lives.

    Time runs in batches of `batch_h`; `decay.batch_size` answers of each are labelled, `label_delay_batches` late, or
    none ever (`labels`). Before the run there were `past_batches`, of which policies know what versions of that time
    would have made of them; the version deployed at the start was trained just before the run. Beside labels there is
    a score of how far the inputs have moved from what the deployed version was trained on: the share that it has lost
    of what it can lose, times `input_share`, plus Gaussian noise of `score_noise`.
    """

    decay: Decay
    training: Training
    batch_h: Positive = 1.0
    past_batches: Count = 40
    label_delay_batches: Count = 0
    labels: bool = True
    probe: bool = True
    input_share: Probability = 1.0
    score_noise: NonNegative = 0.05

    def price(self, pool: Pool, error_usd: float, rate_rps: float) -> float:
        """What a retraining on a node of `pool` costs in wrong answers among those that are labelled, where a wrong
        answer costs `error_usd` and so many are asked for."""
        asked = max(rate_rps * self.batch_h * 3600, 1.0)
        return max(self.training.usd_on(pool) / max(error_usd * asked / self.decay.batch_size, 1e-12), 1e-9)

    def batches(self, horizon_h: float) -> int:
        """Batches that begin in a run of that length."""
        return max(1, int(-(-horizon_h // self.batch_h)))
