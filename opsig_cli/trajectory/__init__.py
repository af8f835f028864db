"""The trajectory file: its contract, how it is read, written and kept whole. `file.py` is the way in.

Nothing here knows what a command wants; change `schema.py`, docs/trajectory.md and the schema's version together.
"""
