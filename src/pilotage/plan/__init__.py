"""Automated deployment: from what models need, a load and an objective to pools, variants, batches and replicas.

Here belongs the choice of a deployment before it exists: `requirements` says what is asked, `trials` what the
simulator answers to one deployment, `search` finds the cheapest that meets what is asked, `advice` makes a plan of it
(alternatives, reasons, sensitivity, what to relax), and `together` places several models on shared pools. Not here: how
a plan is written down for a platform (`live.manifests`), or who changes replicas later (`control`).
"""
