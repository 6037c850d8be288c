"""Queueing formulae for staffing: Erlang C, waiting-time quantiles, and the square-root rule.

Sources: Erlang (1917) in the recursion of Cooper, Introduction to Queueing Theory (1981), ch. 3; Halfin & Whitt,
Operations Research 29 (1981). Offered load R = arrival rate x service time, in busy servers.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def erlang_c(servers: int, offered_load: float) -> float:
    """Probability that a request waits in M/M/c; 1 where the load is not below the servers."""
    if offered_load <= 0:
        return 0.0
    if offered_load >= servers:
        return 1.0
    blocking = 1.0
    for j in range(1, servers + 1):
        blocking = offered_load * blocking / (j + offered_load * blocking)
    return blocking / (1 - offered_load / servers * (1 - blocking))


def mean_wait(servers: int, offered_load: float) -> float:
    """Mean wait in M/M/c in units of the service time."""
    if offered_load >= servers:
        return math.inf
    return erlang_c(servers, offered_load) / (servers - offered_load)


def wait_quantile(servers: int, offered_load: float, probability: float) -> float:
    """Quantile of the wait in M/M/c in units of the service time; 0 where that many do not wait."""
    if offered_load >= servers:
        return math.inf
    waits = erlang_c(servers, offered_load)
    if waits <= 1 - probability:
        return 0.0
    return math.log(waits / (1 - probability)) / (servers - offered_load)


def staffing(offered_load: float, delay_probability: float) -> int:
    """The least number of servers at which at most `delay_probability` of the requests wait (0 without load)."""
    servers = math.floor(offered_load) + 1 if offered_load > 0 else 0
    while erlang_c(servers, offered_load) > delay_probability:
        servers += 1
    return servers


def square_root_staffing(offered_load: float, beta: float) -> int:
    """ceil(R + beta sqrt(R))."""
    return math.ceil(offered_load + beta * math.sqrt(offered_load) - 1e-9)


def halfin_whitt(delay_probability: float) -> float:
    """The beta at which the probability of waiting tends to `delay_probability`: 1 / (1 + b Phi(b) / phi(b))."""
    normal = NormalDist()
    low, high = 0.0, 10.0
    for _ in range(100):
        beta = (low + high) / 2
        waits = 1 / (1 + beta * normal.cdf(beta) / normal.pdf(beta))
        low, high = (beta, high) if waits > delay_probability else (low, beta)
    return low
