"""Decisions about versions as choices: whether to retrain, and whether a canary goes out or back.

*Retraining.* A state is a batch of a deployment (`engine.lifetimes.Stream`). Of the learned policy, what its network
sees is exchanged; of a rule, what it is told of the deployed version, taken from versions of the same age in other
deployments: the first batch's errors, those in between, the last three, the probe's, and how long the deployment lasts.

*Rollout.* A state is an interval of a canary in the simulated cluster (`engine.canary.rehearse`). Exchanged are, over
all its intervals, the rates of errors, slow requests and wrong answers of each arm, and the traffic; counts are made of
rates again. Of a rule that says the canary's share itself, requests follow the shares that it says in the replay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np

from pilotage.control.canary import ABORT, CONTINUE, METRICS, PROMOTE, Arm, Evidence, Rule
from pilotage.control.guard import Guard
from pilotage.control.learned_retraining import FEATURES, LearnedRetraining
from pilotage.control.learned_rollout import BEGINS, SHARES, LearnedRollout
from pilotage.control.network import Forward, Network
from pilotage.control.policy import Policy
from pilotage.control.retraining import Past, Retrainer, Retraining, Seen
from pilotage.engine.canary import Candidate, Outcome, Trial, rehearse
from pilotage.engine.cluster import World
from pilotage.engine.lifetimes import Stream
from pilotage.explain.choice import Choice, Remembering, Vector
from pilotage.explain.sight import shuffled
from pilotage.explain.trust import Relearned
from pilotage.metrics import ITEMS
from pilotage.scenario import Scenario

# --- retraining ----------------------------------------------------------------------------------------------
_LAST: Final = 3
_GROUPS: Final = {
    "price_and_time_left": ("price", "left", "label_delay", "noise"),
    "age": ("age", "seen"),
    "usual_error_rate": ("level", "probed"),
    "excess_of_the_last_batches": ("last", "recent_3", "recent_10"),
    "excess_since_training": ("excess", "excess_own", "evidence", "surge"),
    "excess_to_come": ("at_stake", "at_stake_10", "at_stake_all"),
    "rise": ("rise",),
    "earlier_retrainings": ("retrained", "gain"),
    "past_versions": tuple(name for name in FEATURES if name.startswith("past_")),
}


class Batch(NamedTuple):
    """What a retraining policy is told before a batch, and what it said; `before` is its memory as it was asked."""

    stream: Stream
    deployed: int
    at: int
    seen: Seen
    retrain: bool
    before: Retrainer


def deployments(policy: Retraining, streams: Sequence[Stream]) -> list[list[Batch]]:
    """Every decision of a policy in every deployment."""
    return [_deployment(policy, stream) for stream in streams]


def _deployment(policy: Retraining, stream: Stream) -> list[Batch]:
    retrainer, deployed, out = policy.begin(stream.stakes, past_of(stream)), 0, []
    for t in range(stream.stakes.batches):
        seen = _seen(stream, stream.errors, deployed, t)
        before = copy.deepcopy(retrainer)
        retrain = retrainer.decide(seen) and t > deployed
        out.append(Batch(stream, deployed, t, seen, retrain, before))
        deployed = t if retrain else deployed
    return out


def past_of(stream: Stream) -> Past:
    """What was recorded before a deployment, as a policy is told."""
    return stream.past if stream.probed else Past(stream.past.errors)


def _seen(stream: Stream, errors: np.ndarray, deployed: int, t: int) -> Seen:
    known = slice(deployed, max(t - stream.stakes.label_delay, deployed))
    probe = stream.probe[known] if stream.probed else stream.probe[:0]
    return Seen(errors[deployed, known], t - deployed, stream.stakes.batches - t, probe)


class RuleReplay(Remembering):
    """A rule's answer, 1 to retrain and 0 not to, to a version's errors batch by batch, from its training on."""

    names = ("first_batch", "batches_between", "last_3_batches", "probe", "batches_left")
    units = ("wrong answers", "wrong answers", "wrong answers", "wrong answers", "batches")
    unit = "probability to retrain"

    def __init__(self, policy: Retraining, explained: Batch, background: Sequence[Batch]) -> None:
        self._policy, self._stakes, self._age = policy, explained.stream.stakes, explained.seen.age
        self._past = past_of(explained.stream)
        lives = [explained, *background]
        n = len(explained.seen.errors)
        short = [len(one.seen.errors) for one in background if len(one.seen.errors) < n]
        if short:
            raise ValueError(
                f"a version of {min(short)} known batches beside one of {n}; give versions as old"
            )
        self._errors = np.stack([one.seen.errors[:n] for one in lives])
        self._probe = np.stack([one.seen.probe[:n] for one in lives])
        self._left = np.array([one.seen.left for one in lives])
        last = self._errors[:, -_LAST:].mean(axis=1) if n else np.full(len(lives), np.nan)
        between = self._errors[:, 1:-_LAST].mean(axis=1) if n > _LAST + 1 else np.full(len(lives), np.nan)
        first = self._errors[:, 0] if n else np.full(len(lives), np.nan)
        probe = self._probe[:, -_LAST:].mean(axis=1) if self._probe.shape[1] else np.full(len(lives), np.nan)
        self.shown = np.column_stack([first, between, last, probe, self._left])

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        return np.array([self._answer(row, blend) for row in picks])

    def _answer(self, picks: np.ndarray, blend: float) -> float:
        n = self._errors.shape[1]
        source = np.full(n, picks[1])
        source[-_LAST:] = picks[2]
        source[:1] = picks[0]
        errors = _blended(self._errors[0], self._errors[source, np.arange(n)], blend)
        probe = _blended(self._probe[0], self._probe[picks[3]], blend)
        left = round(float(_blended(self._left[0], self._left[picks[4]], blend)))
        retrainer, delay = self._policy.begin(self._stakes, self._past), self._age - n
        answer = False
        for age in range(self._age + 1):
            known = max(0, age - delay)
            told = Seen(errors[:known], age, left + self._age - age, probe[:known])
            answer = retrainer.decide(told)
        return float(answer)


def _blended(own: Any, other: Any, blend: float) -> Any:
    return own + blend * (other - own)


def retraining_choices(
    policy: Retraining, streams: Sequence[Stream], count: int, background: int, seed: int = 0
) -> tuple[list[Choice], list[Batch]]:
    """Choices in `count` batches of deployments, half of them where it retrained (as far as there are), with those
    batches; background: batches of the other deployments, of versions of the same age where it is a rule."""
    rng = np.random.default_rng(seed)
    lives = deployments(policy, streams)
    known = [batch for life in lives for batch in life if len(batch.seen.errors) > 0]
    if not known:
        raise ValueError("no labels ever come in these deployments; nothing can be explained from them")
    acting = [batch for batch in known if batch.retrain]
    resting = [batch for batch in known if not batch.retrain]
    some = [
        part[k]
        for part, n in ((acting, count // 2), (resting, count - min(len(acting), count // 2)))
        for k in rng.permutation(len(part))[:n]
    ]
    if isinstance(policy, LearnedRetraining):
        return _learned(policy, some, known, background, rng), some
    told = []
    for batch in some:
        n = len(batch.seen.errors)
        lives_of_others = [life for life in lives if life[0].stream is not batch.stream]
        drawn = [lives_of_others[k] for k in rng.integers(len(lives_of_others), size=background)]
        others = [_as_old(life, n, batch.seen.age, rng) for life in drawn]
        if all(others):
            told.append((batch, others))
    if not told:
        raise ValueError("no other deployment lasts as long as these versions; give more, or longer ones")
    choices: list[Choice] = [RuleReplay(policy, batch, others) for batch, others in told]
    return choices, [batch for batch, _ in told]


def _as_old(life: list[Batch], n: int, age: int, rng: np.random.Generator) -> Any:
    """A version of another deployment at that age: any that could have been trained there."""
    stream = life[0].stream
    latest = stream.stakes.batches - age
    if latest < 1:
        return None
    s = int(rng.integers(latest))
    probe = stream.probe[s : s + n] if stream.probed else stream.probe[:0]
    seen = Seen(stream.errors[s, s : s + n], age, stream.stakes.batches - s - age, probe)
    return Batch(stream, s, s + age, seen, False, life[0].before)


def _learned(
    policy: LearnedRetraining,
    some: list[Batch],
    known: list[Batch],
    background: int,
    rng: np.random.Generator,
) -> list[Choice]:
    """Choices of the network: what it saw before a batch, and before batches of other deployments."""
    forward = Forward(policy.network)
    at = {name: k for k, name in enumerate(FEATURES)}
    groups = {name: [at[one] for one in members] for name, members in _GROUPS.items()}
    others = [known[k] for k in rng.permutation(len(known))]
    choices: list[Choice] = []
    for batch in some:
        rest = [one for one in others if one.stream is not batch.stream][:background]
        values = np.stack([_view(one) for one in [batch, *rest]])
        choices.append(
            Vector(
                lambda vectors: forward(vectors)[:, 0], values, groups, "logit to retrain", {},
                label=lambda logits: (logits > 0).astype(int),
            )
        )  # fmt: skip
    return choices


def _view(batch: Batch) -> np.ndarray:
    """What the network saw before a batch."""
    seen: np.ndarray = copy.deepcopy(batch.before).look(batch.seen)  # type: ignore[attr-defined]
    return seen.copy()


def relearned_retraining(policy: Retraining, choices: Sequence[Choice]) -> Relearned | None:
    """For the check with random weights, of choices of that policy; None of a rule."""
    if not isinstance(policy, LearnedRetraining):
        return None

    def fresh(seed: int) -> list[Choice]:
        forward = Forward(shuffled(policy.network, seed))
        return [cast("Vector", choice).reading(lambda vectors: forward(vectors)[:, 0]) for choice in choices]

    return Relearned(choices, fresh)


def weigh_retraining(
    policy: Retraining, batch: Batch, error_usd: float, futures: int = 64, seed: int = 0
) -> np.ndarray:
    """Dollars from a batch to the end of the deployment, of what was decided and of the opposite, with the policy going
    on; shape (2, futures, ITEMS). Future wrong answers are drawn again, binomial about what they were."""
    stream, size = batch.stream, batch.stream.stakes.batch_size
    usd = np.zeros((2, futures, len(ITEMS)))
    for k in range(futures):
        rng = np.random.default_rng([seed, k])
        errors = stream.errors.copy()
        share = np.clip(errors[:, batch.at :] / size, 0, 1)
        errors[:, batch.at :] = rng.binomial(size, share)
        for option in range(2):
            wrong, retrained = _continued(batch, errors, batch.retrain == (option == 0))
            usd[option, k, ITEMS.index("errors")] = wrong * error_usd
            usd[option, k, ITEMS.index("retraining")] = retrained * stream.stakes.price * error_usd
    return usd


def _continued(batch: Batch, errors: np.ndarray, now: bool) -> tuple[float, int]:
    """Wrong answers and retrainings from a batch on, if the model is retrained before it, or not."""
    retrainer, deployed, stream = copy.deepcopy(batch.before), batch.deployed, batch.stream
    wrong, count = 0.0, 0
    for t in range(batch.at, stream.stakes.batches):
        retrain = retrainer.decide(_seen(stream, errors, deployed, t)) and t > deployed
        if t == batch.at:
            retrain = now and t > deployed
        if retrain:
            deployed, count = t, count + 1
        wrong += float(errors[deployed, t])
    return wrong, count


# --- rollout -------------------------------------------------------------------------------------------------
class Heard(NamedTuple):
    """A canary, and what a rule saw of it and decided."""

    candidate: Candidate
    outcome: Outcome


def canaries(
    rule: Rule, scenario: Scenario, scaling: Policy, candidates: Sequence[Candidate], worlds: Sequence[World],
    trial: Trial | None = None,
) -> list[Heard]:  # fmt: skip
    """Every candidate in every world."""
    return [
        Heard(candidate, outcome)
        for candidate in candidates
        for outcome in rehearse(scenario, scaling, candidate, rule, worlds, trial=trial, guard=Guard())
    ]


VERDICTS: Final = {"promote": 1, "abort": -1, "": 0}


class RolloutReplay(Remembering):
    """A rule's verdict after some intervals: 1 promote, -1 abort, 0 neither. `most` is the most of the traffic that the
    canary may have."""

    unit = "verdict (1 promote, -1 abort)"
    names = (*(f"{arm}_{metric}" for metric in METRICS for arm in ("champion", "canary")), "traffic")
    units = (*("share",) * 2 * len(METRICS), "requests per interval")

    def __init__(
        self, rule: Rule, explained: Heard, background: Sequence[Heard], most: float = Trial().most
    ) -> None:
        n = len(explained.outcome.evidence)
        self._rule, self._most, self._delay = rule, most, explained.candidate.label_delay
        heard = [one.outcome for one in (explained, *background)]
        # of a shorter canary, the last interval goes on
        at = [np.minimum(np.arange(n), len(one.evidence) - 1) for one in heard]
        self._shares = np.array([np.array(one.shares)[k] for one, k in zip(heard, at, strict=True)])
        arms = [[(one.evidence[k].champion, one.evidence[k].canary) for k in ks.tolist()]
                for one, ks in zip(heard, at, strict=True)]  # fmt: skip
        of = {name: np.array([[[getattr(a, name) for a in pair] for pair in line] for line in arms], float)
              for name in ("requests", "labelled", *METRICS)}  # fmt: skip
        self._of = {base: of[base] for base in ("requests", "labelled")}
        self._rates = {
            metric: np.divide(of[metric], of[base], out=np.zeros_like(of[metric]), where=of[base] > 0)
            for metric, base in METRICS.items()
        }
        columns = [
            of[metric][:, :, arm].sum(axis=1) / np.maximum(of[METRICS[metric]][:, :, arm].sum(axis=1), 1)
            for metric in METRICS
            for arm in range(2)
        ]
        self.shown = np.column_stack([*columns, of["requests"].sum(axis=2).mean(axis=1)])

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        judge, verdict = self._rule.begin(), np.full(len(picks), CONTINUE)
        says = getattr(judge, "weight", None)
        shares = _blended(self._shares[0], self._shares[picks[:, -1]], blend)
        more: list[np.ndarray] = []  # traffic of an arm over what was recorded, by interval
        share = None if says is None else says(None)
        for t in range(self._shares.shape[1]):
            more.append(
                np.ones(len(picks)) if share is None else np.minimum(share, self._most) / shares[:, t]
            )
            scale = {"requests": more[t], "labelled": more[max(0, t - self._delay)]}
            exposed = {
                base: np.round(_blended(of[0, t], of[picks[:, -1], t], blend) * scale[base][:, None]).astype(
                    int
                )
                for base, of in self._of.items()
            }
            arms = []
            for arm in range(2):
                counts = {}
                for m, (metric, base) in enumerate(METRICS.items()):
                    rates = self._rates[metric][:, t, arm]
                    rates = _blended(rates[0], rates[picks[:, 2 * m + arm]], blend)
                    counts[metric] = np.round(rates * exposed[base][:, arm]).astype(int)
                arms.append(Arm(**{base: of[:, arm] for base, of in exposed.items()}, **counts))
            seen = Evidence(*arms)
            said = judge.step(seen)
            verdict = np.where((verdict == PROMOTE) | (verdict == ABORT), verdict, said)
            share = None if says is None else says(seen)
        return np.select([verdict == PROMOTE, verdict == ABORT], [1.0, -1.0], 0.0)


class _Beyond(Choice):
    """What the verdicts of a rule say beyond those of another one."""

    def __init__(self, own: RolloutReplay, base: RolloutReplay) -> None:
        self._own, self._base, self.unit = own, base, own.unit
        self.names, self.units, self.shown = own.names, own.units, own.shown

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        return self._own.outcome(picks, blend) - self._base.outcome(picks, blend)


def relearned_rollout(
    rule: Rule, heard: Sequence[Heard], background: Sequence[Sequence[Heard]]
) -> Relearned | None:
    """For the check with random weights, of canaries with their backgrounds; None of a rule. What was learned is what a
    verdict is beyond that of the tests alone, under a network that always goes on at the first share."""
    if not isinstance(rule, LearnedRollout):
        return None
    network = rule.network
    still = network.replace(
        weights=tuple(tuple((0.0,) * len(row) for row in weight) for weight in network.weights),
        biases=(*network.biases[:-1], (*(float(share == BEGINS) for share in SHARES), 0.0, 0.0)),
    )

    def of(network: Network) -> list[RolloutReplay]:
        replaced = rule.replace(network=network)
        return [RolloutReplay(replaced, one, others) for one, others in zip(heard, background, strict=True)]

    base = of(still)

    def beyond(network: Network) -> list[Choice]:
        return [_Beyond(own, tests) for own, tests in zip(of(network), base, strict=True)]

    return Relearned(beyond(network), lambda seed: beyond(shuffled(network, seed)))


def rollout_words(heard: Heard) -> str:
    """The verdict in words."""
    words = {
        "promote": "the new version goes out",
        "abort": "the new version goes back",
        "": "no verdict yet",
    }
    outcome = heard.outcome
    return f"{words[outcome.decided]} after {len(outcome.evidence)} intervals: {outcome.reason}"
