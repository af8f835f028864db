"""Run the commands of docs/paper.md, one after the other, in a folder.

python docs/paper.py OUT                        everything, half an hour at most on two cores
python docs/paper.py OUT --only fig-5           the sections whose name begins so, after those that they need
python docs/paper.py OUT --pictures docs/paper  and keep the pictures, made small, beside the document
python docs/paper.py --list                     say what would run

What a command prints is kept in OUT/SECTION.jsonl. A command that writes a run that is there already is passed over, so
that a stopped script goes on where it was. Blocks marked `sh` are run; blocks marked `sh gpu` are those of the paper's
scale, and are not.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).with_name("paper.md")
WIDTH, HEIGHT = 1000, 1060
"""Pixels of the pictures in the document."""


@dataclass(frozen=True)
class Command:
    """One line of the document: the section it is in, the line, and whether it is run here."""

    section: str
    line: str
    runs: bool

    @property
    def output(self) -> str | None:
        """The run that it writes, or None."""
        found = re.search(r"opsig (?:train|simulate) [^|]*-o (\S+)", self.line)
        return found[1] if found else None


def commands(text: str) -> Iterator[Command]:
    r"""All command lines of a document, in its order; a line that ends with a backslash goes on in the next.

    >>> list(commands("## Fig. 1\n```sh\nopsig info \\\n  x.h5\n```\n```sh gpu\nopsig info y.h5\n```\n"))[1].line
    'opsig info y.h5'
    """
    section, fence = "", None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            section = re.sub(r"[^a-z0-9]+", "-", line.lower().lstrip("# ").split(":")[0]).strip("-")
        elif line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
        elif fence in ("sh", "sh gpu") and line.strip():
            yield Command(section, " ".join(line.split()), fence == "sh")


def run(chosen: list[Command], folder: Path) -> None:
    """Run commands in the folder; what a section prints goes to its file. Ends with the first that fails."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    begun: set[str] = set()
    for command in chosen:
        if command.output and (folder / command.output).exists():
            continue
        print(f"{command.section}: {command.line}", flush=True)
        start = time.monotonic()
        with open(folder / f"{command.section}.jsonl", "a" if command.section in begun else "w") as out:
            line = ["bash", "-o", "pipefail", "-c", command.line]
            done = subprocess.run(line, cwd=folder, env=environment, stdout=out, check=False)
        begun.add(command.section)
        if done.returncode:
            sys.exit(f"failed with {done.returncode}: {command.line}")
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


def shrink(folder: Path, pictures: Path) -> None:
    """Keep the pictures that the document shows, in few colours, and of a size that suits a page; long ones are cut."""
    from PIL import Image

    pictures.mkdir(parents=True, exist_ok=True)
    for name in re.findall(r"\]\(paper/([^)]*)\)", DOCUMENT.read_text()):
        path = folder / name
        if not path.exists():
            continue
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
            small = small.crop((0, 0, small.width, min(small.height, HEIGHT)))
            small.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                pictures / path.name, optimize=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", metavar="NAME", help="sections whose name begins so")
    parser.add_argument("--pictures", type=Path, help="keep the pictures, made small, here")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    options = parser.parse_args()
    chosen = [c for c in commands(DOCUMENT.read_text()) if c.runs and c.section.startswith(options.only or "")]
    if options.list or options.folder is None:
        print(*(f"{command.section}: {command.line}" for command in chosen), sep="\n")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    run(chosen, options.folder)
    if options.pictures:
        shrink(options.folder, options.pictures)


if __name__ == "__main__":
    main()
