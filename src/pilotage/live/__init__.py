"""What touches the world outside: registries of model versions, the ledger of decisions, targets, and what they need.

Here belongs everything that talks to a live system or keeps its history. It loads neither the simulator nor the
trainers, and clients of outside systems are imported when one is used. Not here: how decisions are made (`control`)
or what they cost (`metrics`).
"""
