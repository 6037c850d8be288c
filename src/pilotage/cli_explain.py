"""The command `explain`: why a policy decided as it did, what else it could have done, and whether to believe that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.control.policy import Policy
    from pilotage.explain.account import Account, Study

app = typer.Typer()


@app.command()
def explain(
    policy: Annotated[
        str,
        typer.Argument(
            help="scaling policy, retraining policy, or canary rule, as elsewhere; folder of a training"
        ),
    ],
    env: Annotated[str, typer.Argument(help="a shipped environment or a scenario file")],
    tick: Annotated[
        int | None,
        typer.Option(
            "--tick", min=0, help="the decision to explain (default: the largest change; the first)"
        ),
    ] = None,
    worst: Annotated[
        bool, typer.Option("--worst", help="the scaling decision whose best alternative saves most")
    ] = False,
    why_not: Annotated[
        list[str] | None,
        typer.Option("--why-not", help="an alternative: +2, -1 or 0 replicas; repeatable"),
    ] = None,
    service: Annotated[str | None, typer.Option("--service", help="default: the scenario's first")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for explanation.json and figures")] = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0, help="length of the runs")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the run that is explained")] = 0,
    states: Annotated[int, typer.Option(min=8, help="states on which the explanation is checked")] = 60,
    futures: Annotated[int, typer.Option(min=2, help="rollouts per alternative")] = 32,
    data: Annotated[
        Path | None, typer.Option("--data", help="folder of traces (default: PILOTAGE_DATA)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Why a policy decided as it did, in one sentence, and whether that can be trusted (else exit code 3)."""
    import msgspec

    from pilotage.scenario import load

    scenario = load(env, data)
    if hours is not None:
        if not hours > 0:
            raise SpecError(f"--hours {hours}: must be a positive number")
        scenario = scenario.replace(horizon_h=hours)
    names = [one.name for one in scenario.services]
    if service is not None and service not in names:
        raise SpecError(f"--service {service!r}: does not exist; valid: {', '.join(names)}")
    which = 0 if service is None else names.index(service)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    kind, found = named_policy(policy)
    if kind != "scaling" and (worst or why_not):
        raise SpecError(f"--worst and --why-not are about scaling; {policy!r} is a {kind} policy")

    with _saying(as_json) as say:
        from pilotage.explain import decisions

        if kind == "retraining":
            say("following deployments")
            account, _, study = decisions.retraining(
                policy, found, scenario, tick=tick, states=states, futures=2 * futures, seed=seed
            )
        elif kind == "rollout":
            say("rehearsing canaries")
            account, _, study = decisions.rollout(policy, found, scenario, tick=tick, seed=seed)
        else:
            of = decisions.Scaling(found, scenario, service=which, states=states, seed=seed, say=say)
            study = of.study()
            account, _ = decisions.scaling(
                policy, of, study, tick=tick, worst=worst, why_not=[_change(one) for one in why_not or []],
                futures=futures,
            )  # fmt: skip
        if out is not None:
            say("drawing")
            write(out, account, study, found if kind == "scaling" else None)
    if as_json:
        print_json(msgspec.to_builtins(account) | {"trusted": account.trusted})
    else:
        _show(account)
        if out is not None:
            print(f"written: {out / 'explanation.json'} and figures in {out / 'figures'}")
    if not account.trusted:
        failed = ", ".join(one.name for one in account.trust if not one.passed)
        fail(f"this explanation cannot be trusted: {failed} failed", 3)


def named_policy(text: str) -> tuple[str, Any]:
    """What kind of policy an argument names, and the policy."""
    from pilotage.control import rollout
    from pilotage.control.learned import policy_from
    from pilotage.control.lifecycle import BY_NAME, SHIPPED, retraining_from

    name = text.partition(":")[0]
    if name in rollout.BY_NAME or name == rollout.SHIPPED or text.endswith("rollout.json"):
        return "rollout", rollout.rollout_from(text)
    if name in BY_NAME or text == SHIPPED or text.endswith("retraining.json"):
        return "retraining", retraining_from(text)
    return "scaling", policy_from(text)


def _change(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SpecError(
            f"--why-not {text!r}: not a change of replicas; valid: whole numbers, as +2, -1 or 0"
        ) from None


def write(out: Path, account: Account, study: Study, policy: Policy | None) -> None:
    """`explanation.json`, and in `figures` the beeswarm, the dependence and, of a tree, the tree."""
    import msgspec

    from pilotage.control.tree import Tree
    from pilotage.explain import drawings
    from pilotage.results import write_whole

    title = f"What moves {account.policy} on {account.env}"
    pictures = [drawings.beeswarm(study.explained, title), drawings.dependence(study.explained, title)]
    if isinstance(policy, Tree):
        pictures.append(drawings.tree(policy, f"What {account.policy} asks"))
    (out / "figures").mkdir(exist_ok=True)
    for picture in pictures:
        write_whole(out / "figures" / f"{picture.name}.svg", picture.desk)
    whole = msgspec.to_builtins(account) | {"trusted": account.trusted}
    write_whole(out / "explanation.json", msgspec.json.format(msgspec.json.encode(whole)).decode() + "\n")


class _saying:  # noqa: N801  (used as a function)
    """A spinner on stderr that says what is being done; silent with --json."""

    def __init__(self, silent: bool) -> None:
        from rich.console import Console

        self._status = None if silent else Console(stderr=True).status("")

    def __enter__(self) -> Any:
        if self._status is None:
            return lambda _: None
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def _show(account: Account) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    screen = Console()
    print(account.sentence)
    table = Table(
        title=f"chosen {account.outcome:.3g} {account.unit}, usually {account.usual:.3g} "
        f"(Shapley values, {account.method})",
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for name in ("input", "value", "usually", "contribution"):
        table.add_column(name, justify="left" if name == "input" else "right", no_wrap=True)
    for one in account.contributions:
        value, usual = ("–" if v is None else f"{v:.4g} {one.unit}" for v in (one.value, one.usual))
        table.add_row(one.input, value, usual, f"{one.contribution:+.3f}")
    screen.print(table)
    items = [
        item for item in account.options[0].usd if any(option.usd[item]["mean"] for option in account.options)
    ]
    bill = Table(
        title=f"expected dollars of the next {account.horizon_h or 0:.3g} h",
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for name in ("decision", *items, "more than decided (95 %)"):
        bill.add_column(name, justify="left" if name == "decision" else "right", no_wrap=True)
    for k, option in enumerate(account.options):
        more = option.more_usd["total"]
        shown = "" if k == 0 else f"{more['mean']:+.4f} ({more['low']:+.4f} – {more['high']:+.4f})"
        bill.add_row(option.decision, *(f"{option.usd[item]['mean']:.4f}" for item in items), shown)
    screen.print(bill)
    for check in account.trust:
        sure = "" if check.low is None else f" ({check.low:.3g} – {check.high:.3g})"
        measured = "does not apply" if check.measured is None else f"{check.measured:.3g}{sure}"
        print(
            f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {measured}, asked {check.asked}; {check.note}"
        )
