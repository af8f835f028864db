"""What if: a run trained again from a checkpoint with one thing changed, beside the same stretch with nothing changed.

`changes`: what may change; `naming`: which samples a name means; `fork`: the point where branches begin; `controls`:
random samples left out instead; `futures`: training each future once; `effects`: records; `flow`: all of it in order.
"""
