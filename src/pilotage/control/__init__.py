"""How decisions are made: observations, policies, guards, and the loop that applies them.

Here belongs everything that a live adapter and a simulated cluster share. It imports neither the simulator
nor the trainers, so that a process which only steers stays small. Not here: how a number is measured
(`engine`, `live`) or what it costs (`metrics`).
"""
