"""Decisions explained: of scaling, of retraining, and about a canary.

Each gives an `Account`, and what its checks and the global plots are made of, the explanations of many states of the
same policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from pilotage.control.canary import Rule
from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.retraining import Retraining
from pilotage.control.scaling import parse
from pilotage.engine.canary import Candidate, rehearse
from pilotage.engine.cluster import World
from pilotage.explain.account import (
    Account,
    Study,
    alternatives,
    contributions,
    labels,
    replayed,
    sentence,
)
from pilotage.explain.attribution import Attribution, attribute, relevant
from pilotage.explain.choice import (
    Choice,
    Recording,
    Replay,
    State,
    memory_of,
    record,
    visited,
    within_bounds,
    words,
)
from pilotage.explain.dollars import Weighed, changed_by, weigh
from pilotage.explain.nearest import Flip, nearest
from pilotage.explain.sight import chosen, relearned, sight_of
from pilotage.explain.trust import check
from pilotage.explain.versions import (
    VERDICTS,
    RolloutReplay,
    canaries,
    relearned_retraining,
    relearned_rollout,
    retraining_choices,
    rollout_words,
    weigh_retraining,
)
from pilotage.retraining_env import streams_of
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

BACKGROUND_SEED: Final = 7_000_000  # of runs that say what is usual; apart from those that are explained


# --- scaling -------------------------------------------------------------------------------------------------
class Scaling:
    """A scaling policy in a scenario: its runs, its background, its study. `states` are how many the checks see."""

    def __init__(
        self,
        policy: Policy,
        scenario: Scenario,
        *,
        service: int = 0,
        runs: int = 6,
        background: int = 30,
        states: int = 60,
        seed: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy, self.scenario, self.service, self.seed, self._say = policy, scenario, service, seed, say
        say("running the policy")
        worlds = [World(BACKGROUND_SEED + 1000 * seed + k) for k in range(runs)]
        self.runs = record(policy, scenario, worlds, service)
        first = min(scenario.ticks - 1, max(24, scenario.ticks // 8))
        probe = visited(self.runs, 24, first, seed, acting=True)
        self.replays = sight_of(policy) is None
        self.ticks, repeated = memory_of(policy, probe) if self.replays else (first, 1.0)
        self.repeated = repeated if self.replays else None
        if self.replays:
            background, states = min(background, 16), min(states, 40)
        self.background = visited(self.runs, background, max(first, self.ticks), seed + 1)
        self.states = visited(self.runs, states, max(first, self.ticks), seed + 2, acting=True)
        every = [self.choice(state) for state in self.states]
        self.players = relevant(every, seed, 48 if self.replays else 24)

    def choice(self, state: State) -> Choice:
        """The choice in a state, before the background of this study."""
        return chosen(self.policy, state, self.background, self.ticks)

    def study(self) -> Study:
        """The checks on all states."""
        self._say("explaining many states")
        explained = [attribute(self.choice(s), self.players, seed=self.seed) for s in self.states]
        self._say("checking whether explanations can be trusted")
        sight = sight_of(self.policy)
        weights = None
        if sight is not None:
            weights = relearned(sight, self.states[:: max(1, len(self.states) // 8)], self.background)
        checks = check(explained, self.players, relearned=weights, seed=self.seed)
        if self.repeated is not None:
            checks.append(replayed(self.repeated, f"a fresh controller is shown the last {self.ticks} ticks"))
        return Study(explained, self.players, checks, self.repeated)


def pick(run: Recording, first: int, weighed: Sequence[Weighed] = ()) -> int:
    """The tick to explain: of weighed ones that whose best alternative saves most, else the largest change."""
    if weighed:
        regret = [float(w.totals.mean(axis=1)[0] - w.totals.mean(axis=1).min()) for w in weighed]
        return weighed[int(np.argmax(regret))].tick
    changes = [abs(State(run, tick).change) for tick in range(first, len(run.seen))]
    return first + int(np.argmax(changes))


def scaling(
    name: str,
    of: Scaling,
    study: Study,
    *,
    tick: int | None = None,
    worst: bool = False,
    why_not: Sequence[int] = (),
    futures: int = 32,
    horizon_s: float = 600.0,
) -> tuple[Account, Attribution]:
    """The account of one decision of a run of its own, at a tick, the worst one, or where it changed most. `why_not`
    are alternatives, as changes of replicas; without any, one less and one more than what was decided, and no change.
    """
    policy, scenario, service = of.policy, of.scenario, of.service
    world = World(of.seed)
    (run,) = record(policy, scenario, [world], service)
    first = max(of.ticks if of.replays else 0, 1)
    if tick is None and worst:
        of._say("looking for the worst decision")
        every = np.unique(
            np.linspace(first, max(first, scenario.ticks - 1 - round(horizon_s / scenario.tick_s)), 24)
        )
        found = weigh(
            scenario,
            policy,
            run.world,
            every.astype(int).tolist(),
            service=service,
            futures=8,
            horizon_s=horizon_s,
        )
        tick = pick(run, first, list(found))
    elif tick is None:
        tick = pick(run, first)
    if not first <= tick < len(run.seen):
        raise SpecError(f"--tick {tick}: valid: {first} to {len(run.seen) - 1}")
    horizon_s = min(horizon_s, (scenario.ticks - tick) * scenario.tick_s)  # nobody knows what comes after
    state = State(run, tick)
    choice = of.choice(state)
    players = sorted({*of.players, *relevant([choice], of.seed, 12)})
    one = attribute(choice, players, seed=of.seed)
    of._say("weighing the alternatives")
    changes = list(dict.fromkeys([*why_not] if why_not else [state.change - 1, state.change + 1, 0]))
    changes = [change for change in changes if change != state.change]

    def options(seen: Any, decided: Any) -> list[Any]:
        return [decided, *(changed_by(decided, change, seen.replicas) for change in changes)]

    (weighed,) = weigh(
        scenario, policy, run.world, [tick], options, service=service, futures=futures, horizon_s=horizon_s,
        seed=of.seed,
    )  # fmt: skip
    of._say("looking for the nearest flip")
    flip = _flip(of, state)
    told = alternatives([_change_words(state.change), *map(_change_words, changes)], weighed.usd)
    hours = (state.seen.now_s % 86400) / 3600
    at = f"tick {tick}, {int(hours):02d}:{int(hours % 1 * 60):02d}"
    said = words(state)
    account = Account(
        env=scenario.name, policy=name, kind="scaling", subject=scenario.services[service].name, at=at,
        decision=said, sentence="", outcome=one.outcome, usual=one.usual, unit=one.choice.unit, method=one.method,
        contributions=contributions(one), horizon_h=weighed.horizon_s / 3600, options=told, flip=flip,
        repeated=of.repeated, trust=tuple(study.checks),
    )  # fmt: skip
    return account.replace(sentence=sentence(account)), one


def _flip(of: Scaling, state: State) -> Flip | None:
    """In what monitors measure, whatever the policy looks at, and put to the policy in a replay."""
    ticks = of.ticks if of.replays else min(state.tick, 24)
    background = [one for one in of.background if one.tick >= ticks]
    replay = Replay(of.policy, state, background, ticks)
    as_decided = replay.outcome(np.zeros((1, len(replay.names)), int))
    if within_bounds(state, as_decided[0]) != state.seen.replicas + state.change:
        return None  # the replay is too short for this state, so a flip of it would prove nothing
    players = of.players if of.replays else relevant([replay], of.seed, 12)
    one = Attribution(replay, np.zeros(len(replay.names)), float("nan"), float(as_decided[0]), "")
    return nearest(one, players)


def _change_words(change: int) -> str:
    return "no change" if change == 0 else f"{change:+d} replica{'s' if abs(change) > 1 else ''}"


# --- versions ------------------------------------------------------------------------------------------------
def retraining(
    name: str,
    policy: Retraining,
    scenario: Scenario,
    *,
    tick: int | None = None,
    deployments: int = 24,
    states: int = 40,
    background: int = 30,
    futures: int = 64,
    seed: int = 0,
) -> tuple[Account, Attribution, Study]:
    """The account of a retraining decision: `tick` is the how manieth of the explained batches (None: the first at
    which the model was retrained)."""
    streams = streams_of(scenario, BACKGROUND_SEED + seed, deployments)
    choices, batches = retraining_choices(policy, streams, states, background, seed)
    players = relevant(choices, seed)
    explained = [attribute(choice, players, seed=seed) for choice in choices]
    checks = check(explained, players, relearned=relearned_retraining(policy, choices[:8]), seed=seed)
    repeated = float(np.mean(np.equal(labels(explained), [batch.retrain for batch in batches])))
    checks.append(replayed(repeated, "the answer to what was seen, asked again"))
    which = next((k for k, b in enumerate(batches) if b.retrain), 0) if tick is None else tick
    if not 0 <= which < len(batches):
        raise SpecError(f"--tick {which}: valid: 0 to {len(batches) - 1}")
    batch, one = batches[which], explained[which]
    service = next(s for s in scenario.services if s.lifecycle)
    usd = weigh_retraining(policy, batch, service.economics.error_usd, futures, seed)
    decision = "retrained the model" if batch.retrain else "did not retrain the model"
    other = "retrained" if not batch.retrain else "not retrained"
    assert service.lifecycle is not None
    account = Account(
        env=scenario.name, policy=name, kind="retraining", subject=service.name,
        at=f"batch {batch.at}, {batch.seen.age} batches after training", decision=decision, sentence="",
        outcome=one.outcome, usual=one.usual, unit=one.choice.unit, method=one.method,
        contributions=contributions(one), horizon_h=service.lifecycle.batch_h * batch.seen.left,
        options=alternatives([decision, other], usd), flip=nearest(one, players), repeated=repeated,
        trust=tuple(checks),
    )  # fmt: skip
    return account.replace(sentence=sentence(account)), one, Study(explained, players, checks, repeated)


def rollout(
    name: str,
    rule: Rule,
    scenario: Scenario,
    *,
    scaling: str = "predictive",
    tick: int | None = None,
    candidates: Sequence[Candidate] = (
        Candidate(), Candidate(new_errors=0.015), Candidate(new_errors=0.05), Candidate(slowdown=1.5),
        Candidate(new_wrong=0.2),
    ),
    seed: int = 0,
    worlds: int = 6,
    background: int = 16,
) -> tuple[Account, Attribution, Study]:  # fmt: skip
    """The account of a verdict on a canary: `tick` is the how manieth canary (None: the first that was sent back). The
    dollars are those of the whole run, of the canary under this rule and of never trying it."""
    drawn = [World(BACKGROUND_SEED + 100 * seed + k) for k in range(worlds)]
    every = canaries(rule, scenario, parse(scaling), candidates, drawn)
    heard = [one for one in every if one.outcome.evidence]
    if len(heard) < 4:
        raise SpecError(
            f"{scenario.name}: only {len(heard)} canaries were ever judged; give a longer run (--hours)"
        )
    rng = np.random.default_rng(seed)
    others = [[heard[k] for k in rng.permutation(len(heard)) if heard[k] is not one] for one in heard]
    others = [some[:background] for some in others]
    choices = [RolloutReplay(rule, one, some) for one, some in zip(heard, others, strict=True)]
    players = relevant(choices, seed)
    explained = [attribute(choice, players, seed=seed) for choice in choices]
    checks = check(explained, players, relearned=relearned_rollout(rule, heard[::3], others[::3]), seed=seed)
    decided = [VERDICTS[one.outcome.decided] for one in heard]
    repeated = float(np.mean(np.equal(labels(explained), decided)))
    checks.append(replayed(repeated, "the verdict on what was seen, asked again"))
    which = (
        next((k for k, one in enumerate(heard) if one.outcome.decided == "abort"), 0)
        if tick is None
        else tick
    )
    if not 0 <= which < len(heard):
        raise SpecError(f"--tick {which}: valid: 0 to {len(heard) - 1}")
    one, canary = explained[which], heard[which]
    tried = np.array([o.outcome.usd for o in every if o.candidate == canary.candidate])
    without = rehearse(scenario, parse(scaling), canary.candidate, None, drawn, guard=Guard())
    never = np.array([o.usd for o in without])
    account = Account(
        env=scenario.name, policy=name, kind="rollout", subject=scenario.services[0].name,
        at=f"canary {which}, interval {len(canary.outcome.evidence)}", decision=rollout_words(canary), sentence="",
        outcome=one.outcome, usual=one.usual, unit=one.choice.unit, method=one.method,
        contributions=contributions(one), horizon_h=scenario.horizon_h,
        options=alternatives(["tried under this rule", "never tried"], np.stack([tried, never])),
        flip=nearest(one, players), repeated=repeated, trust=tuple(checks),
    )  # fmt: skip
    return account.replace(sentence=sentence(account)), one, Study(explained, players, checks, repeated)
