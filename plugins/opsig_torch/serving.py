"""How processes come to have a task together, and what all but the first do: serve its calls until it ends."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from opsig_cli.errors import OpsigError
from opsig_cli.tasks import TaskSpec, load, origin_of
from opsig_torch.group import Elsewhere, Group, Lost
from opsig_torch.memory import bound_of
from opsig_torch.shared import Options, SharedSession


def opened(group: Group, task: Any, options: Options) -> SharedSession:
    """A session of the first process, which the others open as well."""
    spec = origin_of(task)
    if spec is None:
        raise OpsigError("several processes share tasks that the command line names. Run this on one process")
    group.sessions += 1
    number = group.sessions
    gc.collect()  # sessions that nobody has any more, which the others then let go of, too
    group.tell(number, "open", spec.name, dict(spec.options), spec.model, list(options), sorted(group.held))
    session = _built(group, number, lambda: task, options)
    group.held[number] = session
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(group.size)))
    session.divide(bound_of(session.device) // (here if session.device == "cpu" else 1))
    return session


def serve(group: Group) -> None:
    """Do what the first process tells until it ends. Where one is gone, the first that is left raises Lost."""
    try:
        _serve(group)
    except Lost:
        if group.speaks():
            raise
        raise SystemExit(1) from None


def _serve(group: Group) -> None:
    sessions: dict[int, SharedSession] = {}
    while (message := group.hear()) != ["end"]:
        number, name, *arguments = message
        try:
            if name == "open":
                task, options, model, how, held = arguments
                sessions = {each: session for each, session in sessions.items() if each in held}
                spec = TaskSpec(task, options, model)
                sessions[number] = _built(group, number, lambda spec=spec: load(spec)[0], tuple(how))
            else:
                sessions[number].serve(name, arguments)
        except Lost:
            raise
        except (Elsewhere, Exception):
            continue


def _built(group: Group, number: int, task: Callable[[], Any], options: Options) -> SharedSession:
    """The session, once every process has it."""
    try:
        session = SharedSession(group, number, task(), options)
    except Exception as error:
        group.agree(error)
        raise
    group.agree()
    if session.device == "cuda":
        require_own_gpu(group)
    return session


def require_own_gpu(group: Group) -> None:
    """Raise OpsigError, at every process, where two of them have the same GPU, which NCCL refuses."""
    gpus = group.said(f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    if len(set(gpus)) < len(gpus):
        second = next(rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank])
        raise OpsigError(
            f"processes {gpus.index(gpus[second])} and {second} have the same GPU. Start as many processes on a "
            "machine as it has GPUs, or use --device cpu"
        )
