"""What searches for policies: the clairvoyant bound, Bayesian optimisation, reinforcement learning.

Here belongs whatever needs the simulator many times over. Not here: running what was found (`control`).
"""
