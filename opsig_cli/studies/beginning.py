"""How a training begins: anew, from the last checkpoint of its own run, or from the initial state of another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from opsig_cli import tasks
from opsig_cli.backends import Session, State, load_backend
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies import tracking, training
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import check_new, cut_off_at_birth, open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.states import check_trained, in_order_of, read_state

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The options of `opsig train`. `given`: settings by name, None where the person said nothing; `like`: another run;
    `budget`: the part of the time that recording losses may take."""

    output: str
    task: str | None
    given: Mapping[str, Any]
    resume: bool
    like: str | None
    replace: bool
    budget: float | None
    device: str | None
    commit_every: int
    allow_changed_data: bool


@dataclass(frozen=True)
class Begun:
    """A training that can go on from `start`. `own_task`: the task's name where only a person can give it."""

    recorder: Recorder
    session: Session
    settings: Settings
    start: State
    own_task: str | None


@contextmanager
def begun(request: Request, say: Say, warn: Say) -> Iterator[Begun]:
    """The training that is asked for, whose file is open while inside; `warn` is told what must not be missed.

    Raises OpsigError or UsageError, before a new file is made, where options contradict each other or the run.
    """
    _check(request)
    if request.resume and cut_off_at_birth(request.output):
        say(f"{request.output} was cut off before it had its name: beginning with the options of this command")
        request = replace(request, resume=False)
    settings, initial, count = _settings_of(request)
    if not request.resume:
        check_new(request.output, request.replace)
    task, spec = _task_of(request, settings, count)
    session = load_backend(settings.backend).open(task, request.device, settings.chunk_size, settings.statistics)
    session.tell = say
    say(f"device: {session.device_name}")
    if request.like is not None:
        with open_trajectory(request.like) as run:
            tracking.check_model(run, session)
            in_order_of(run, session)
    if request.budget is not None:
        settings = settings.budgeted(request.budget, session.samples)
        say(f"losses are recorded every {settings.track_every} steps")
    start = session.initial(settings.seed)
    if settings.batch_size is None and getattr(session, "drops_out", False):
        say("note: full-batch training leaves the model's dropout out. With --batch-size it is on")
    if initial is not None:
        start = State(0, initial.params, initial.buffers, frozen=initial.frozen)
    if request.resume:
        recorder = training.resumed_recorder(request.output, session, request.commit_every)
    else:
        training.check_optimizer(settings.optimizer, session)
        recorder = training.new_recorder(
            request.output, settings, session, task, spec, request.replace, request.commit_every
        )
        if request.like is not None:  # what a seed does not tell, for a run that is killed before its first checkpoint
            recorder.record(0, state=start)
    with recorder:
        if request.resume:
            check_trained(recorder.run, session.layout)
            without_damage(
                lambda: tracking.check_data(recorder.run, session, say, request.allow_changed_data),
                lambda words: warn(f"note: {words}"),
            )
            start = training.resume_point(recorder, session, task, settings, warn)
            say(f"resuming at step {start.step} of {settings.steps}")
        yield Begun(recorder, session, settings, start, request.task if tasks.is_own(spec) else None)


def _check(request: Request) -> None:
    if request.resume and request.replace:
        raise UsageError("--resume continues a run and --replace overwrites it. Give one of them")
    if request.budget is not None and (request.resume or request.given.get("track_every")):
        raise UsageError(
            "--track-budget says how often losses are recorded. Leave --track, --track-every, --resume out"
        )
    if request.resume and request.like is not None:
        raise UsageError("--resume continues a run and --like begins another. Give one of them")


def _settings_of(request: Request) -> tuple[Settings, State | None, int | None]:
    """The settings, and of a run that is resumed or taken after the number of samples; of the latter the initial state.

    Raises OpsigError where a run is past the steps that are asked for.
    """
    if request.resume:
        with open_trajectory(request.output) as run:
            settings = Settings.stored(run.attributes, request.output).resumed(request.given, request.output)
            reached = max(run.steps("checkpoints"), default=0)
            if reached > settings.steps:
                raise OpsigError(
                    f"{request.output} is at step {reached} already, past --steps {settings.steps}. Give more steps"
                )
            return settings, None, len(run.samples)
    if request.like is not None:
        with open_trajectory(request.like) as run:
            settings = Settings.stored(run.attributes, request.like).varied(request.given)
            return settings, read_state(run, 0), len(run.samples)
    return Settings.of(request.given), None, None


def _task_of(request: Request, settings: Settings, count: int | None) -> tuple[tasks.Task, tasks.TaskSpec]:
    """The task, loaded. Raises OpsigError where a run names code or files that the person does not, or where it has
    another number of samples than `count`."""
    given, origin = request.task, request.output if request.resume else request.like
    spec = tasks.parse_spec(given or settings.task, settings.model)
    if given is None and tasks.is_own(spec):  # a file is never a reason to run code that the command does not name
        raise OpsigError(f"{origin} was trained with a task of your own. Give it again: --task {settings.task}")
    if given is None and request.like is not None and tasks.reads_files(spec):  # what they hold would go into the run
        raise OpsigError(f"{origin} was trained on files that it names: {settings.task}. Give the task again: --task")
    if origin is not None and count is not None:
        tasks.check_recorded(spec if given is None else replace(spec, options={}), origin, count)
    return tasks.load(spec)
