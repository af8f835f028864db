"""Several processes that measure together: how they meet, what they tell each other, and how sums keep their order.

The first process runs the command and tells the others what to do; these answer. R processes, P parameters.

What is told is JSON with arrays beside it, never pickled. Everything that all do together begins with word from each
whether it is well, so that a failure of one is an error of all, and none waits for what will not come.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from opsig_cli.backends import State
from opsig_cli.errors import OpsigError

MEETING = timedelta(minutes=5)
"""For how long processes wait for each other to start."""
SILENCE = timedelta(hours=12)
"""For how long one may hear nothing: what the first does alone may take long, and a dead one is noticed at once."""
WORDS = 600
"""Bytes of what each says to all."""
FAILURE, MEMORY = "!", "?"
"""The first letter of a failure's words, and of a shortage of memory."""
KEPT_BYTES = 1 << 30
"""Bound on the terms that a process keeps until it is their turn in a sum; beyond it, it adds its own up first."""
LOST = "another of the {size} processes ended. Every finished step is kept: run the same command again"


class Lost(OpsigError):
    """Another process is gone."""


class Elsewhere(OpsigError):
    """Another process failed, and all know."""


class Group:
    """This process among others."""

    def __init__(self, rank: int, size: int, store: Any):
        self.rank, self.size = rank, size
        self._store = store
        self.sessions = 0
        """How many sessions these processes have opened."""
        self.held: WeakValueDictionary[int, Any] = WeakValueDictionary()
        """Those that the first process has not let go of, by number."""
        self._left = False  # the others, who wait for what will not come: nothing more can be told

    @property
    def leads(self) -> bool:
        """Whether this is the process that runs the command."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's own of `count` things in a row; the first process has some wherever there are any."""
        first, last = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    # -- from the first to the others

    def tell(self, *values: Any) -> None:
        """Send values to the others, who `hear` them; nothing once this process left them."""
        if not self._left:
            with self.together():
                _parted(list(values), lambda part: dist.broadcast(part, 0), self._reached)

    def hear(self) -> list[Any]:
        """What the first process tells."""
        return _put_together(lambda part: dist.broadcast(part, 0), self._reached)

    # -- among all

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside, all do. Whoever is interrupted there leaves the others, who learn of it as it ends."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Lost) or not isinstance(error, Exception):
                self._left = True
            raise

    def agree(self, error: Exception | None = None) -> None:
        """Learn whether all are well so far. Raises the `error` that is given, or Elsewhere with another's words."""
        words = "" if error is None else " ".join(str(error).split()) or type(error).__name__
        kind = "" if error is None else MEMORY if isinstance(error, MemoryError) else FAILURE
        everybody = self.said(kind + words)
        if error is not None:
            error.__dict__["told"] = True
            raise error
        for said in everybody:
            if said:
                raise MemoryError(said[1:]) if said[0] == MEMORY else Elsewhere(said[1:])

    def said(self, words: str) -> list[str]:
        """What every process says, in their order, at all of them; WORDS bytes at most."""
        mine = torch.zeros(WORDS, dtype=torch.uint8)
        text = words.encode()[:WORDS]
        if text:
            mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(everybody, mine)
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in everybody]

    def collected(self, value: Any) -> list[Any]:
        """Everybody's value at the first process, in order of process; none at the others."""
        if not self.leads:
            self._send(value)
            return []
        return [value, *(self._receive(rank) for rank in range(1, self.size))]

    def done(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives at each process, in their order, at the first, and nothing at the others. Raises as
        `agree` where one fails."""
        with self.together():
            try:
                value = work()
            except Exception as error:  # whatever it is, nobody may wait for what this process will not send
                if not _is_told(error):
                    self.agree(error)
                raise
            self.agree()
            return self.collected(value)

    def total(self, terms: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's terms, (P,), in order of process: the bits of one process that adds up all of them.

        The terms are made at the same time. Then the sum goes from process to process, each adding its own in turn, and
        at last to the first; at the others it is not whole. Terms of more than KEPT_BYTES are added up beforehand, out
        of order.
        """
        total = torch.zeros_like(like)
        kept: list[torch.Tensor] = []
        try:
            for term in terms:
                if self.leads:
                    total += term
                    continue
                if (len(kept) + 1) * term.nbytes > KEPT_BYTES and kept:
                    kept[-1] += term
                else:
                    kept.append(term)
        except Exception as error:
            if not _is_told(error):
                self.agree(error)
            raise
        self.agree()
        if self.size == 1:
            return total
        with self._reached():
            if not self.leads:
                dist.recv(total, self.rank - 1)
                for term in kept:
                    total += term
            dist.send(total, (self.rank + 1) % self.size)
            if self.leads:
                dist.recv(total, self.size - 1)
        return total

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor in everybody's, which it gives back."""
        with self._reached():
            dist.broadcast(tensor, 0)
        return tensor

    def close(self) -> None:
        """Tell the others to end, as far as they are there."""
        try:
            if self.leads:
                self.tell("end")
            if not self._left:
                dist.destroy_process_group()
        except (RuntimeError, OpsigError):
            pass

    def speaks(self) -> bool:
        """Whether this process is to tell a person that another is gone: the first that is left."""
        if self.leads:
            return True
        try:
            self._store.set(f"left/{self.rank}", "1")
            return not any(self._store.check([f"left/{rank}"]) for rank in range(self.rank))
        except Exception:  # the store went with the process that kept it
            return self.rank == 1

    def _send(self, value: Any) -> None:
        """Give the first process a value, which it will `_receive`."""
        _parted(value, lambda part: dist.send(part, 0), self._reached)

    def _receive(self, rank: int) -> Any:
        """What another process sends."""
        return _put_together(lambda part: dist.recv(part, rank), self._reached)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Lost(LOST.format(size=self.size)) from error


Move = Callable[[torch.Tensor], Any]
"""Sends a tensor to another process, or receives one in its place."""
Reached = Callable[[], AbstractContextManager[None]]


def _parted(value: Any, move: Move, reached: Reached) -> None:
    """Send a value: the length of its text, its text, and the arrays beside it."""
    arrays: list[np.ndarray] = []
    text = np.frombuffer(json.dumps(_packed(value, arrays)).encode(), np.uint8)
    with reached():
        move(torch.tensor([len(text)]))
        move(torch.from_numpy(text.copy()))
        for array in arrays:
            if array.size:
                move(torch.from_numpy(array.reshape(-1).view(np.uint8)))


def _put_together(move: Move, reached: Reached) -> Any:
    """The value that another process sends in parts."""
    with reached():
        length = torch.tensor([0])
        move(length)
        text = torch.empty(int(length), dtype=torch.uint8)
        move(text)
        packed = json.loads(bytes(text.numpy()))
        arrays = [np.empty(shape, dtype) for dtype, shape in _arrays_in(packed)]
        for array in arrays:
            if array.size:
                move(torch.from_numpy(array.reshape(-1).view(np.uint8)))
    return _unpacked(packed, arrays)


def _is_told(error: Exception) -> bool:
    """Whether all processes know of a failure, or none can be told."""
    return isinstance(error, (Lost, Elsewhere)) or "told" in error.__dict__


def _packed(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value as JSON, its arrays put aside in the order in which they are met."""
    if isinstance(value, np.ndarray):
        if value.flags.writeable is False or not value.flags.c_contiguous:
            value = value.copy()
        arrays.append(value)
        return {"array": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, State):
        return {"state": _packed([value.step, value.params, value.buffers, value.optimizer, value.frozen], arrays)}
    if isinstance(value, (list, tuple)):
        return [_packed(item, arrays) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {key: _packed(item, arrays) for key, item in value.items()}}
    return value.item() if isinstance(value, np.generic) else value


def _arrays_in(packed: Any) -> Iterator[tuple[str, list[int]]]:
    if isinstance(packed, list):
        for item in packed:
            yield from _arrays_in(item)
    elif isinstance(packed, dict):
        if "array" in packed:
            yield packed["array"], packed["shape"]
        else:
            for item in packed.values():
                yield from _arrays_in(item)


def _unpacked(packed: Any, arrays: list[np.ndarray]) -> Any:
    """The inverse of `_packed`; takes the arrays in their order."""
    if isinstance(packed, list):
        return [_unpacked(item, arrays) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "array" in packed:
        return arrays.pop(0)
    if "state" in packed:
        return State(*_unpacked(packed["state"], arrays))
    return {key: _unpacked(item, arrays) for key, item in packed["dict"].items()}


_current: Group | None = None


def current() -> Group | None:
    """The group that this process is in, or None."""
    return _current


@contextmanager
def meeting(rank: int, size: int) -> Iterator[Group]:
    """The group of processes that the environment tells of, for the time inside.

    Raises OpsigError where the others do not come.
    """
    global _current
    signal.signal(signal.SIGTERM, ended)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():  # elsewhere the launcher shows a process its own GPU alone, as number 0
        torch.cuda.set_device(local)
    try:
        store = next(rendezvous("env://", rank, size, timeout=MEETING))[0]
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(size)], MEETING)
        devices = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(devices, store=store, rank=rank, world_size=size, timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpsigError(f"the {size} processes did not meet: {reason}") from error
    _current = Group(rank, size, store)
    try:
        yield _current
    finally:
        _current.close()
        _current = None


def ended(_: int, __: Any) -> NoReturn:
    """What SIGTERM becomes: a launcher sends it to those that are left when a process died."""
    raise Lost(
        "ended by SIGTERM, as when another process died. Every finished step is kept: run the same command again"
    )
