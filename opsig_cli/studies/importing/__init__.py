"""Existing runs -> trajectory: checkpoints that a training script of one's own saved, and series of losses.

`checkpoints` opens files and folders: `torch_files` those of torch.save, whose `pickles` are made of `stand_ins` and
run nothing, `array_files` safetensors and npz, `distributed` and `partitions` what several processes wrote,
`msgpack_files` and `orbax_folders` flax's and orbax's, whose trees `pytrees` makes flat, `unnamed` equinox's. What is
inside is `content`: `entries` that are read when they are asked for. `steps` says at which step each was taken, `names`
fits its tensors to the task's model, with the `conversion` of the library that it is from; `optimizers` reads optimizer
state, `doubles` finds one twice, `referring` where its numbers lie. `series` and `trainer_logs` read losses and
scalars; `flow` puts all of them into the file, `settling` finds how the run was trained; `entry` is what the command
calls.
"""
