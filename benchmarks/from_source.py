"""Run opsig from a source tree that is not installed: what an installation would add to it, in a folder.

    python benchmarks/from_source.py FOLDER

prints the PYTHONPATH with which `python -m opsig_cli` and the benchmarks then find backends and tasks.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python_path(folder: Path) -> str:
    """A PYTHONPATH for processes that run this source tree; where it is not installed, the folder names its plugins and
    leads to its data."""
    found = [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    if not entry_points(group="opsig.backends"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        about = folder / f"opsig-{project['version']}.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: opsig\nVersion: {project['version']}\n")
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
        (about / "entry_points.txt").write_text("\n".join(lines))
        data = folder / "opsig_sample_data"
        if not data.exists():
            data.symlink_to(ROOT / "sample_data")
        found.insert(0, str(folder))
    return os.pathsep.join(filter(None, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(python_path(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    main()
