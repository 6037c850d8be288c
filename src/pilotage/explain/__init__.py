"""Why a policy decides as it does, and whether the explanation can be trusted.

Here belongs what looks at decisions from outside: `choice` shows any decision (scaling, retraining, rollout) as one
function of its inputs, `attribution` computes Shapley values of it, `trust` says whether they can be believed,
`dollars` what the decision and its alternatives are expected to cost, `nearest` what would have to be different for
another decision, `decisions` puts all of it into an `account`, `distil` makes a small tree of a policy, `models`
explains the models that are served. Not here: how decisions are made (`control`), what anything costs (`metrics`,
`engine`).
"""
