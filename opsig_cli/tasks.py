"""What a person brings: a model, a dataset and per-sample losses; and how a name on the command line finds it.

A task is ordinary PyTorch, or what another backend takes (`opsig_jax.JaxBackend`). Nothing here imports torch or JAX;
the task's own module does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from opsig_cli.errors import OpsigError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

ENTRY_POINT_GROUP = "opsig.tasks"
FILES = {"path", "root", "text"}
"""Options of tasks that name files or folders."""
LARGE, LARGEST = 1_000_000, {"depth": 1000, "seed": 1 << 62}
"""The largest numbers that are taken from a file in a task's or a model's options."""

OURS = ("opsig_cli", "opsig_jax", "opsig_linalg", "opsig_torch", "opsig_zoo")

FORMS = {"torch": ("model", "dataset", "losses"), "jax": ("init", "data", "losses")}
"""Methods by which a task of a backend of ours is known."""
LOADED = 8
_loaded: list[tuple[Task, TaskSpec]] = []
"""The last tasks that were loaded, and what asked for them."""
_own_places: set[str] = set()
"""Files and folders of the code that a person named on the command line."""


@runtime_checkable
class Task(Protocol):
    """A training problem whose samples have a loss of their own. B is a batch's size, D a feature's, T the positions.

    `model()` is called on the CPU after seeding torch with the run's seed. `dataset()` is map-style, of fixed
    length, and returns the same item for the same index every time: the index is the sample's id.

    Optional members, used where present:
    `collate(items) -> batch`; `predictions(model, batch) -> (B,) integers`; `features(model, batch) -> (B, D)`,
    the input of the last linear layer; `render(i) -> PIL.Image | str`, what a person looks at;
    `label(i) -> str`; `smoothed_losses(model, batch, smoothing) -> (B,)`, for `branch`, the losses with labels smoothed
    by so much; `classes -> Sequence[str]`, the names behind the integers of `predictions`;
    `truth() -> (S,) integers`, planted sides; `loss_unit`, the unit of the losses, such as "squared error": without it
    they are said to be in nats where the task has `classes` or `predictions`, and in no unit elsewhere;
    and for `probe`: `picture_shape`, (H, W, C), `inputs(pixels) -> batch's first part`, for pixels (B, H, W, C) with
    white at 1, and `logits(model, batch) -> (B, classes)`.

    `positions`: how many samples an item has, T, as a sequence has tokens; 1 where it is not said. Sample i is then
    position i % T of item i // T. Losses and predictions are (B, T), the losses NaN where there is no target, by
    `masked_fill` or `where`, and features (B, T, D); `render`, `label` and `truth` go by sample.
    """

    def model(self) -> nn.Module: ...

    def dataset(self) -> Dataset: ...

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Unreduced loss of every sample in the batch, (B,), in `loss_unit`."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What the command line asked for: a task's name or place, its options, and the model's.

    `source` is the file a person's own task came from and `digest` its SHA-256; both are None for installed tasks.
    """

    name: str
    options: Mapping[str, str]
    model: str | None = None
    source: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def parse_spec(text: str, model: str | None = None) -> TaskSpec:
    """Split `NAME[:key=value,...]`, `file.py:Name[:...]` or `pkg.mod:Name[:...]` into its parts.

    Raises UsageError where an option is not of the form key=value.
    """
    name, _, rest = text.partition(":")
    if rest and "=" not in rest.split(":")[0]:
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    return TaskSpec(name, parse_options(rest, of=name), model)


def parse_options(text: str, of: str) -> dict[str, str]:
    """Split `key=value,key=value` into a dictionary; UsageError names what `of` them is malformed."""
    options: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{of}: '{part}' is not an option. Write {of}:key=value,key=value")
        options[key.strip()] = value.strip()
    return options


def build(factory: Any, options: Mapping[str, str], what: str) -> Any:
    """Call `factory` with options turned from text into the types that its signature states, or that its defaults have.

    `what` names it in errors. Raises UsageError for an unknown option (listing the known) or a value of the wrong type.
    """
    parameters = inspect.signature(factory).parameters
    hints = _type_hints(factory)
    free_form = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    values = {}
    for key, text in options.items():
        if key not in known and not free_form:
            listed = ", ".join(sorted(set(known) - {"model"})) or "none"
            raise UsageError(f"{what} has no option '{key}'. Known: {listed}")
        kind = hints.get(key) or _type_of_default(parameters.get(key))
        values[key] = _convert(text, kind, f"{what}: option {key}")
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in values]
    if missing:
        raise UsageError(f"{what} needs the option {missing[0]}. Write {what}:{missing[0]}=...")
    try:
        return factory(**values)
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error


def _type_of_default(parameter: inspect.Parameter | None) -> Any:
    """What a parameter without a stated type takes: a truth value or a number where its default is one; else text."""
    kind = str if parameter is None else type(parameter.default)
    return kind if kind in (bool, int, float) else str


def _type_hints(factory: Any) -> dict[str, Any]:
    while hasattr(factory, "func"):  # a partial's function
        factory = factory.func
    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):
        return {}


def _convert(text: str, kind: Any, what: str) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "on"):
            return True
        if text.lower() in ("false", "no", "0", "off"):
            return False
        raise UsageError(f"{what} is '{text}', which is neither true nor false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UsageError(
                f"{what} is '{text}', which is not {'an integer' if kind is int else 'a number'}"
            ) from None
    return text


def installed() -> list[str]:
    """Names of the tasks that installed distributions offer, sorted."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def is_own(spec: TaskSpec) -> bool:
    """Whether the task is a person's own code (a file or a module) rather than an installed one."""
    return ":" in spec.name


def check_recorded(spec: TaskSpec, path: str, samples: int) -> None:
    """Raise OpsigError where a file, and not the command line, names a task of absurd size, for a run of so many
    `samples`: a data file is no reason to fill the memory."""
    options = {**spec.options, **(parse_spec(spec.model).options if spec.model else {})}
    if "model" in options:
        options |= parse_spec(options["model"]).options
    for name, text in options.items():
        size = text.lstrip("+-")
        most = max(samples, LARGE) if name == "samples" else LARGEST.get(name, LARGE)
        if size.isdecimal() and (len(size) > 18 or int(size) > most):
            raise OpsigError(f"{path} names a task with {name} {text[:24]}, which is not this run's. Give --task")


def reads_files(spec: TaskSpec) -> bool:
    """Whether the task's options name files or folders to read."""
    return bool(FILES & spec.options.keys())


def load(spec: TaskSpec) -> tuple[Task, TaskSpec]:
    """Import the task and build it with its options; the returned spec says where its code came from.

    Raises OpsigError where the task cannot be found or imported, UsageError where an option is wrong.
    """
    if is_own(spec):
        factory, spec = _load_own(spec)
    elif spec.name.endswith(".py"):
        raise UsageError(f"--task {spec.name} names no class. Write --task {spec.name}:NAME, with a class of that file")
    else:
        factory = load_entry_point(ENTRY_POINT_GROUP, spec.name, "task", "--task file.py:Name loads your own.")
    options = dict(spec.options)
    if spec.model is not None:
        if "model" not in inspect.signature(factory).parameters:
            raise UsageError(f"task {spec.name} brings its own model. Leave --model out")
        options["model"] = spec.model
    task = build(factory, options, f"task {spec.name}")
    _loaded.append((task, spec))
    del _loaded[:-LOADED]
    return task, spec


def require_methods(task: Task, backend: str, *methods: str) -> None:
    """Raise OpsigError where a task lacks a method that the backend calls, and name the one that it is written for."""
    absent = next((name for name in methods if not callable(getattr(task, name, None))), None)
    if absent is None:
        return
    spec = origin_of(task)
    name = type(task).__name__ if spec is None else spec.name
    for other, own in FORMS.items():
        if other != backend and all(callable(getattr(task, each, None)) for each in own):
            raise OpsigError(f"task {name} is written for the {other} backend. Give --backend {other}")
    needed = ", ".join(methods[:-1]) + f" and {methods[-1]}"
    raise OpsigError(f"task {name} has no method {absent}(). A task needs {needed}")


def origin_of(task: Task) -> TaskSpec | None:
    """What a task was loaded from, so that another process can load it; None for an object from elsewhere."""
    return next((spec for loaded, spec in _loaded if loaded is task), None)


def load_entry_point(group: str, name: str, kind: str, hint: str = "") -> Any:
    """Load the one installed plugin called `name`; errors list what there is, or name a broken one's distribution."""
    found = [entry for entry in entry_points(group=group) if entry.name == name]
    if not found:
        known = ", ".join(sorted({entry.name for entry in entry_points(group=group)})) or "none"
        raise UsageError(f"no {kind} is called '{name}'. Installed: {known}. {hint}".strip())
    if len({entry.value for entry in found}) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in found))
        raise OpsigError(f"{kind} '{name}' is offered by {owners}. Uninstall one of them")
    try:
        return found[0].load()
    except Exception as error:
        raise OpsigError(f"{kind} '{name}' of {_owner(found[0])} cannot be loaded: {_one_line(error)}") from error


def _owner(entry: Any) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"


def _load_own(spec: TaskSpec) -> tuple[Any, TaskSpec]:
    place, _, attribute = spec.name.rpartition(":")
    try:
        if place.endswith(".py"):
            module, path = _import_file(place), place
        else:
            module = _import_module(place)
            path = module.__file__
    except OpsigError:
        raise
    except Exception as error:
        raise OpsigError(f"task {spec.name} cannot be imported: {_one_line(error)}") from error
    if not hasattr(module, attribute):
        raise OpsigError(f"{place} has no '{attribute}'. Write --task {place}:NAME with a class that it defines")
    digest = None
    if path:
        _own_places.add(_own_place(module, place))
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
    return getattr(module, attribute), dataclasses.replace(
        spec, source=os.path.abspath(path) if path else None, digest=digest
    )


def digest_of(spec: TaskSpec) -> str | None:
    """The SHA-256 of the file that a task is in, without importing it; None for one that is named by its module."""
    place = spec.name.rpartition(":")[0]
    if not place.endswith(".py") or not os.path.isfile(place):
        return None
    with open(place, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _import_module(place: str) -> types.ModuleType:
    """A module by its name, first from the current folder, as `python -m` does; that stays last on the path, for what
    the module imports later."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _import_file(path: str) -> types.ModuleType:
    if not os.path.isfile(path):
        raise OpsigError(f"{path} does not exist. --task takes file.py:Name, or one of: {', '.join(installed())}")
    name = f"opsig_task_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OpsigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # its neighbours are importable, as in a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an exception passed through a person's own task and its neighbours, the outermost first."""
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    frames = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = os.path.abspath(frame.f_code.co_filename)
        places = [place for place in _own_places if path == place or path.startswith(place + os.sep)]
        closer = [library for library in libraries if path.startswith(library + os.sep)]
        ours = str(frame.f_globals.get("__name__")).split(".")[0] in OURS
        if places and not ours and len(max(places, key=len)) >= max(map(len, closer), default=0):
            frames.append(traceback.FrameSummary(path, line, frame.f_code.co_name))
    return frames


def _own_place(module: types.ModuleType, place: str) -> str:
    """A task's file with its neighbours, or the package or the lone module that it is imported from."""
    if place.endswith(".py"):
        return os.path.dirname(os.path.abspath(place))
    top = sys.modules[module.__name__.split(".")[0]]
    return os.path.abspath(next(iter(getattr(top, "__path__", ())), module.__file__ or ""))


def positions_of(task: Task) -> int:
    """How many samples an item of the task has. Raises OpsigError where that is no count."""
    count = getattr(task, "positions", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise OpsigError(f"the task's positions is {count!r}. It must be how many samples an item has, at least 1")
    return count


def loss_unit(task: Task) -> str | None:
    """The unit of the task's losses as it states it; nats of classes, whose losses are log-likelihoods; else None."""
    stated = getattr(task, "loss_unit", None)
    if stated is None:
        return "nat" if hasattr(task, "classes") or hasattr(task, "predictions") else None
    if not isinstance(stated, str) or not 0 < len(stated) <= 40 or not stated.isprintable():
        raise OpsigError(f"the task's loss_unit is {stated!r:.60}. It is a short text, such as 'nat'")
    return stated


def labels(task: Task, count: int) -> Sequence[str] | None:
    """The label of every sample as text, or None where the task has no labels."""
    label = getattr(task, "label", None)
    return None if label is None else [str(label(i)) for i in range(count)]
