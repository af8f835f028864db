"""What a command found and what to do next, a line each: the last thing that a person reads.

Functions of the records that the command prints. `run` is the trajectory's path as it was given.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.studies.clustering.forking import alternates_from, fork_of
from opsig_cli.studies.clustering.records import by_strength, established
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.filled import targets_of
from opsig_cli.studies.numbers import percent, short, with_unit
from opsig_cli.trajectory.file import Trajectory

if TYPE_CHECKING:
    from opsig_cli.studies.clustering.finding import Found

Record = Mapping[str, Any]
TOLD = 4
"""Established pairs that the answer names."""
TOLD_ROWS = 12
"""Rows of a batch that it names."""
MOST = 0.9
"""Part of a batch's excess that the rows named are to carry."""


@dataclass(frozen=True)
class Answer:
    """What was found, in a sentence, and the command to go on with, or None."""

    found: str
    next: str | None = None


def command(name: str, run: str, *more: str, task: str | None = None) -> str:
    """A command line of ours; `task`: as it was given, for runs of a task of one's own.

    >>> command("cluster", "my run.h5", "--by", "loss")
    "opsig cluster 'my run.h5' --by loss"
    """
    return shlex.join(["opsig", name, run, *(["--task", task] if task else []), *more])


def resuming(run: str, task: str | None) -> str:
    """The command that goes on with an interrupted run.

    >>> resuming("run.h5", "mytask.py:MyTask")
    'opsig train -o run.h5 --resume --task mytask.py:MyTask'
    """
    return shlex.join(["opsig", "train", "-o", run, "--resume", *(["--task", task] if task else [])])


def opened(path: object, follow: str | None) -> str:
    """What to do with a page that was written, and what comes after it."""
    open_it = f"open {path} in a browser"
    return open_it if follow is None or follow.startswith("opsig report") else f"{open_it}, or: {follow}"


def task_of(run: Trajectory, given: str | None) -> str | None:
    """The task that the next command must be given again: a person's own, as it was given now or when the run was made;
    it is text to show, and never a reason to import anything."""
    recorded = run.attributes.get("task")
    if given is not None or not isinstance(recorded, str):
        return given
    if ".py:" in recorded:
        return _from_here(recorded, run.path)
    return recorded if re.match(r"[\w.]+:[A-Za-z_]\w*(:|$)", recorded) else None


def _from_here(task: str, run: str) -> str:
    """A task in a file as it is named from the current folder, where the file is found above the run; else as it was
    named when the run was made."""
    file, _, rest = task.partition(".py:")
    if os.path.exists(f"{file}.py"):
        return task
    above = (folder / f"{file}.py" for folder in Path(run).resolve().parents)
    found = next((path for path in above if path.exists()), None)
    return task if found is None else f"{os.path.relpath(found)}:{rest}"


def mined(
    records: Sequence[Record], run: str, unit: str, task: str | None = None, step: int | None = None,
    alone: bool = False,
) -> Answer:  # fmt: skip
    """Of `mine`: who moves most, and how far; at one `step`, which is then to be taken apart, or over a window.

    `alone`: it is the run's only sample, which nobody can be grouped with.
    """
    movers = [r for r in records if r.get("kind") != "not_finite"]
    broken = [r for r in records if r.get("kind") == "not_finite"]
    said = []
    if broken:
        more = f" and of {len(broken) - 1} more" if len(broken) > 1 else ""
        when = f"at step {broken[0]['step']}" if broken[0].get("recovers") else f"from step {broken[0]['step']} on"
        said.append(f"the loss of sample {broken[0]['sample']} is not finite {when}{more}")
    if not any(r["score"] for r in movers):
        return Answer("; ".join([*said, "no sample moves"]))
    first = movers[0]
    labels = Counter(r["label"] for r in movers if r["label"] is not None)
    mostly = ", ".join(f"{count} x {short(label)}" for label, count in labels.most_common(3))
    who = f"{len(movers)} sample{'s' * (len(movers) > 1)}" + (
        f", mostly {mostly}" if len(movers) > labels.total() / 2 and mostly else ""
    )
    change = with_unit(f"{first['loss_before']:.3g} -> {first['loss_after']:.3g}", unit)
    named = f" ({short(first['name'])})" if "name" in first else ""
    said.append(f"{who}; sample {first['sample']}{named} moves most, {change} at step {first['step']}")
    apart = () if step is None else ("--explain", str(step))
    return Answer("; ".join(said), None if alone else command("cluster", run, *apart, task=task))


def sighted(
    records: Sequence[Record], run: str, step: int | None, grouped: bool, task: str | None = None
) -> Answer:  # fmt: skip
    """Of `mine` on sightings: at `step` which rows carry the batch's excess, else at which step most of them are.

    `grouped`: the run has two checkpoints, by which they can be grouped.
    """
    movers = [r for r in records if r.get("kind") != "not_finite"]
    if not movers:
        return Answer("no sample was seen often enough to be held against what was expected of it")
    follow = command("cluster", run, task=task) if grouped else None
    if step is None:
        who = f"{len(movers)} sample{'s' * (len(movers) > 1)}"
        if not any((record["change"] or 0) > 0 for record in movers):
            found = f"of {who} none exceeds what was to be expected of it"
            return Answer(found, command("mine", run, "--direction", "up"))
        excess: dict[int, float] = {}
        for record in movers:
            excess[record["step"]] = excess.get(record["step"], 0) + max(0, record["change"] or 0)
        most = max(excess, key=excess.__getitem__)
        count = sum(r["step"] == most and (r["change"] or 0) > 0 for r in movers)
        found = (
            f"of {who} {count} exceed{'s' * (count == 1)} the expected at step {most}, by more than at any other step"
        )
        return Answer(found, command("mine", run, "--step", str(most)))
    if sum(record["change"] or 0 for record in movers) < 0:
        return Answer(f"these {len(movers)} rows of step {step} do not exceed what was to be expected of them", follow)
    carried, rows = 0.0, []
    for record in sorted(movers, key=lambda r: -(r["share"] or 0)):
        if carried >= MOST:
            break
        carried, rows = carried + (record["share"] or 0), [*rows, str(record.get("name", record["sample"]))]
    named = ", ".join(rows[:TOLD_ROWS]) + (f" and {len(rows) - TOLD_ROWS} more" if len(rows) > TOLD_ROWS else "")
    part = f"{carried:.0%}" if carried < 0.995 else "all"  # others lie below the expected
    verb = "rows carry" if len(rows) > 1 else "row carries"
    return Answer(f"{len(rows)} {verb} {part} of what step {step} exceeds the expected: {named}", follow)


def clustered(
    records: Sequence[Record],
    run: str,
    task: str | None,
    since: int | None,
    fork: tuple[int, int] | None,
    output: str = "branch.h5",
    top: int | None = None,
) -> Answer:
    """Of `cluster`: which pairs are established, which is the strongest, and since when losses alternate.

    `fork`: a checkpoint and a number of steps with which the strongest pair can be left out, where the run can be
    trained on; `output`: a file for that. `top`: how many samples to look at where no pair was found; None where there
    are no more.
    """
    for record in records:
        if record["kind"] == "sample":  # that is what was asked
            drawn = ("--sample", str(record["sample"]), "--figure", f"sample-{record['sample']}.png")
            return Answer(record["sentence"], command("cluster", run, *drawn, task=task))
    pairs = by_strength(r for r in records if r["kind"] == "pair")
    held = established(pairs)
    started = f"; losses alternate from step {since} on" if since is not None else ""
    if not pairs:
        groups = sum(r["kind"] == "group" for r in records)
        alone = f", and {groups} group{'s' * (groups > 1)} that nothing opposes" if groups else ""
        more = (
            command("report", run, task=task) if top is None else command("cluster", run, "--top", str(top), task=task)
        )
        return Answer(f"no opposing pair{alone}{started}", more)
    best = pairs[0]
    if held:
        found = f"{len(held)} of {len(pairs)} pairs {'is' if len(held) == 1 else 'are'} established: "
        found += "; ".join(_told(pair) for pair in held[:TOLD])
        found += f"; and {len(held) - TOLD} more" if len(held) > TOLD else ""
        found += started
    else:
        found = (
            f"no pair is established of {len(pairs)}: pair {best['pair']}, {_sides(best)}, is {best['verdict']}, as "
        )
        found += f"{best['reason']}{started}"
    if fork is not None and best["by"] != "loss":
        name, drop = "branch", ("--drop", f"pair:{best['pair']}", "-o", output)
        return Answer(found, command(name, run, "--from", str(fork[0]), "--steps", str(fork[1]), *drop, task=task))
    return Answer(found, command("report", run, task=task))


def _sides(pair: Record) -> str:
    return " against ".join(
        f"G{group} ({describe(mix, size)})"
        for group, mix, size in zip(pair["groups"], pair["labels"], pair["sizes"], strict=True)
    )


def _told(pair: Record) -> str:
    """A pair with the step at which it swings most."""
    text = f"pair {pair['pair']}, {_sides(pair)}"
    if pair["apart_step"] is None:
        return text
    return f"{text}, {percent(pair['apart_movement'])} of all movement at step {pair['apart_step']}"


def of_clusters(run: Trajectory, found: Found, records: Sequence[Record], task: str | None) -> Answer:
    """Of the records of `cluster`, from the run that they are of, which is open, and what was found in it."""
    looked, there = len(found.clusters.position), int(targets_of(run).sum())
    top = min(2 * looked, there) if looked < there else None
    since, fork = alternates_from(run, found), fork_of(run, found, records)
    return clustered(records, run.path, task, since, fork, unused("branch.h5"), top)


def unused(path: str) -> str:
    """A path of which there is no file yet, by a number behind its name, so that a command to write it runs."""
    stem, suffix = os.path.splitext(path)
    numbered = (f"{stem}-{number}{suffix}" for number in itertools.count(2))
    return path if not os.path.exists(path) else next(each for each in numbered if not os.path.exists(each))


def sharp(
    records: Sequence[Record], run: str, task: str | None, rates: Mapping[int, float], batch: str | None = None
) -> Answer:
    """Of `sharpness`: whether the learning rate is above the threshold, and since when; or what the metrics show.

    `rates`: the learning rate by step; `batch`: what the run's minibatches are, None where its batches are full.
    """
    if not records:
        return Answer("nothing was measured")
    first = records[0]
    if "losses" in first:
        return Answer(_slice(records), command("cluster", run, task=task))
    if first.get("kind") == "eigenvector":
        return Answer(records[0]["sentence"], command("cluster", run, "--by", "slope", task=task))
    if "eigenvalue" in first:
        return _against_threshold([r for r in records if r["rank"] == 1], run, task, rates, batch)
    if "sample" in first:
        return Answer(_metrics(records), command("cluster", run, task=task))
    last = records[-1]
    parts = [f"{name.replace('_', ' ')} {last[name]:.3g}" for name in ("trace", "critical_sharpness") if name in last]
    against = last.get("threshold")
    if "critical_sharpness" in last and against is not None and math.isfinite(against):
        parts[-1] += f" against 2 / learning rate = {against:.3g}"
    return Answer(f"at step {last['step']} {', '.join(parts)}", command("sharpness", run, task=task))


def _against_threshold(
    top: Sequence[Record], run: str, task: str | None, rates: Mapping[int, float], batch: str | None
) -> Answer:
    known = [r for r in top if r["threshold"] is not None and math.isfinite(r["threshold"]) and r["threshold"] > 0]
    last = top[-1]
    if not known:
        return Answer(f"sharpness {last['eigenvalue']:.4g} at step {last['step']}, with no threshold known")
    above = [r for r in known if r["eigenvalue"] >= r["threshold"]]
    if not above:
        most = max(known, key=lambda r: r["eigenvalue"] / r["threshold"])
        found = f"the learning rate is below the stability threshold at {_measured(len(known))}: sharpness at "
        found += f"most {most['eigenvalue']:.3g} against {most['threshold']:.3g}, at step {most['step']}"
        found += f". The threshold is that of full batches: {batch} can be unstable below it" if batch else ""
        return Answer(found, command("mine", run))
    since = above[0]
    rate = rates.get(since["step"])
    found = f"the learning rate{'' if rate is None else f' {rate:g}'} is first above the stability threshold at "
    found += (
        f"step {since['step']}, sharpness {since['eigenvalue']:.3g} against {since['threshold']:.3g}, and above it "
    )
    found += "at " + (_measured(1) if len(known) == 1 else f"{len(above)} of the {len(known)} steps measured")
    return Answer(found, command("sharpness", run, "--name", task=task))


def _measured(steps: int) -> str:
    return f"all {steps} steps measured" if steps > 1 else "the one step measured"


def _metrics(records: Sequence[Record]) -> str:
    from opsig_cli.studies.curvature import SAMPLE_METRICS

    step = records[-1]["step"]
    at = [r for r in records if r["step"] == step]
    parts = []
    for metric in (name for name in records[0] if name in SAMPLE_METRICS):
        medians = {s: float(np.median([r[metric] for r in at if r["set"] == s])) for s in {r["set"] for r in at}}
        words = ", ".join(f"{value:.3g} of {name} samples" for name, value in sorted(medians.items()))
        parts.append(f"{metric.replace('_', ' ')} {words}")
    return f"medians at step {step}: {'; '.join(parts)}"


def _slice(records: Sequence[Record]) -> str:
    middle = len(records) // 2
    before, after = records[max(0, middle - 1)]["losses"], records[min(len(records) - 1, middle + 1)]["losses"]
    ways = {name: "rises" if after[name] > before[name] else "falls" for name in after}
    return f"along the top eigenvector at step {records[0]['step']} the loss of " + ", of ".join(
        f"{name} {way}" for name, way in ways.items()
    )


def probed(records: Sequence[Record], run: str) -> Answer:
    """Of `probe`: what every input was last taken for, or how often iterates turn back."""
    if not records:
        return Answer("nothing was measured")
    if "reversals" in records[0] or records[0].get("kind") == "iterate":
        summaries = [r for r in records if r["kind"] == "summary"]
        parts = [
            f"{r['trajectory']} turns back in {percent(r['reversals'])} of its steps" if r["reversals"] is not None
            else f"how often {r['trajectory']} turns back is not known"
            for r in summaries
        ]  # fmt: skip
        return Answer("along the eigenvector " + ", ".join(parts), command("sharpness", run))
    last = {r["input"]: r for r in records}
    swings = Counter(r["input"] for r in records if r.get("oscillating"))
    parts = [
        f"{name} is taken for {r['predicted']} ({r['probability']:.2f})"
        + (f" and swings at {swings[name]} steps" if swings[name] else "")
        for name, r in last.items()
    ]
    return Answer(f"at step {records[-1]['step']} " + ", ".join(parts), command("cluster", run))


def branched(records: Sequence[Record], run: str) -> Answer:
    """Of `branch`: what each change did."""
    own = [r for r in records if r["kind"] == "branch" and r["control"] is None]
    paths = list(dict.fromkeys(r["trajectory"] for r in own))
    found = "; ".join(f"from step {r['from_step']}, {r['sentence']}" for r in own if r.get("sentence"))
    follow = shlex.join(["opsig", "compare", run, *paths, "--figure", "compared.png"])
    return Answer(found or "nothing was changed", follow if paths and paths != [run] else command("info", run))


def compared(records: Sequence[Record], own: Mapping[str, str | None] | None = None) -> Answer:
    """Of `compare`: the lowest loss, and who is above the threshold."""
    known = [r for r in records if r["loss"] is not None]
    parts = []
    if known:
        best = min(known, key=lambda r: r["loss"])
        parts.append(f"{best['trajectory']} has the lowest loss, {best['loss']:.4g} at step {best['steps']}")
    at_edge = [r["trajectory"] for r in records if r["sharpness"] is not None and r["sharpness"] >= 1]
    if at_edge:
        parts.append(f"sharpness is above the threshold in {', '.join(at_edge)}")
    missing = [r["trajectory"] for r in records if r["sharpness"] is None]
    run, own = (missing or [records[0]["trajectory"]])[0], own or {}
    follow = command("sharpness" if missing else "cluster", run, task=own.get(run))
    return Answer("; ".join(parts) or "none of the runs has a loss", follow)


def trained(records: Iterable[Record], run: str, task: str | None, samples: int, tracked: bool) -> Answer:
    """Of `train`: how the loss went."""
    losses = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    if not losses:
        return Answer(f"{run} has no more steps than it had", command("info", run))
    (first, before), (last, after) = losses[0], losses[-1]
    found = f"loss {before:.4g} at step {first} -> {after:.4g} at step {last}"
    found += f", with the losses of {samples:,} samples" if tracked else ""
    return Answer(found, command("analyse" if tracked else "track", run, task=task))


def described(record: Record, task: str | None = None) -> Answer:
    """Of `info`: what the file is good for."""
    run, groups = record["trajectory"], record["groups"]
    has = [name for name in ("losses", "checkpoints", "sharpness", "floor", "slopes") if name in groups]
    state = record["state"] or "of no stated state"
    count, last = record["samples"], record["steps"]
    found = f"a run of {count:,} sample{'s' * (count != 1)}{'' if last is None else f' to step {last}'}, {state}"
    seen = record.get("sightings")
    if seen:
        has.insert(0, f"{seen:,} sightings of samples' losses")
    found += f", with {', '.join(has)}" if has else ", with neither losses nor checkpoints"
    if seen and "losses" not in groups:
        return Answer(found, command("mine", run))
    if "losses" in groups:
        return Answer(found, command("analyse", run, task=task))
    return Answer(found, command("track", run, task=task) if "checkpoints" in groups else None)


def simulated(record: Record, what: str, path: str | None) -> Answer:
    """Of `simulate`: how the sharpness went, and whether the theorems' conclusions hold."""
    follow = command("cluster", path) if path else shlex.join(["opsig", "simulate", what, "-o", unused(f"{what}.h5")])
    if record.get("diverged_at") is not None:
        return Answer(f"descent diverges at step {record['diverged_at']}", follow)
    crossing = record["crossing_step"]
    above = "sharpness never crosses 2 / learning rate"
    if crossing is not None:
        above = f"sharpness crosses 2 / learning rate at step {crossing}"
    if what == "valley":
        spike = f", and the losses spike at step {record['peak_step']}" if crossing is not None else ""
        return Answer(f"{above}{spike}", follow)
    at = "step" if record["dynamics"] != "flow" else "time"
    found = f"sharpness falls from {record['sharpness_initial']:.4g} to {record['sharpness_min']:.4g} at {at} "
    found += f"{record['time_of_min']:.4g} and ends at {record['sharpness_final']:.4g}"
    found += f"; {above}" if at == "step" else ""
    for theorem in ("theorem_3_1", "theorem_3_2"):
        parts = [held for name, held in (record.get(theorem) or {}).items() if not name.startswith("assumption")]
        if parts:
            found += f"; {theorem.replace('_', ' ', 1).replace('_', '.')}: {sum(map(bool, parts))} of {len(parts)} "
            found += "conclusions hold"
    return Answer(found, follow)
