"""Existing runs -> trajectory: checkpoints that a training script of one's own saved, and series of losses.

`checkpoints` reads files, `torch_files` those of torch.save without running what they name; `steps` says at which step
each was taken; `names` fits its tensors to the task's model; `optimizers` reads optimizer state; `series` reads losses
and scalars; `flow` puts them together; `entry` is what the command calls.
"""
