"""Queueing formulae for staffing: Little's law, Erlang C, waiting-time quantiles, and the square-root rule.

Sources: Little, Operations Research 9 (1961); Erlang (1917) in the recursion of Cooper, Introduction to Queueing
Theory (1981), ch. 3; Allen, Probability, Statistics and Queueing Theory (1978); Halfin & Whitt, Operations Research
29 (1981). Offered load R = arrival rate x service time, in busy servers.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def little(offered_load: float, utilization: float, concurrency: int = 1) -> int:
    """Replicas of so many servers each at which the mean utilisation is at most the wanted one."""
    return math.ceil(offered_load / (utilization * concurrency) - 1e-9)


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


def allen_cunneen(servers: int, offered_load: float, ca2: float, cs2: float) -> float:
    """Mean wait in G/G/c, in units of the service time, from the squared coefficients of variation of the gaps
    between arrivals and of the service times (M/D/c: 1 and 0)."""
    return mean_wait(servers, offered_load) * (ca2 + cs2) / 2


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


def staffing_for_wait(offered_load: float, probability: float, longest: float) -> int:
    """The least number of servers whose wait's quantile is at most `longest` service times (0 without load)."""
    servers = math.floor(offered_load) + 1 if offered_load > 0 else 0
    while servers and wait_quantile(servers, offered_load, probability) > longest:
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
