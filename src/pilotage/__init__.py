"""pilotage learns, proves and ships deployment policies for fleets of machine-learning models.

What belongs in which package, and which may import which, is drawn in `docs/architecture.md`. Importing
`pilotage.env` registers the shipped environments with Gymnasium; nothing else happens at import.
"""

__version__ = "0.1.0"
