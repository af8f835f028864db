"""The page as one file: templates filled in, style and script inside, and nothing to load from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.figures.canvas import typeset, visible
from opsig_cli.studies.clustering.sentences import describe

MAKER = "Made by opsig"
"""How the page begins to say what made it; a file that says so may be replaced by a newer one."""
HEAD = 4096
"""Bytes of a file in which that stands."""


def render(content: Mapping[str, Any], command: str) -> str:
    """The whole page, from what `content.gather` found; `command` is the one that made it.

    Every text is escaped, and characters that steer a terminal or the direction of writing are replaced. The policy in
    its head lets a browser run only the script that it comes with, and load nothing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("opsig_cli.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip
    style, script = (Markup(environment.get_template(f"report.{kind}").render()) for kind in ("css", "js"))
    return environment.get_template("report.html").render(
        content, command=command, describe=describe, typeset=typeset, generator=f"{MAKER} {version('opsig')}",
        style=style, script=script, policy=policy(style, script),
    )  # fmt: skip


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy of a page with this style and script and with pictures inside of it."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def check_output(path: Path, run: str, replace: bool) -> None:
    """Raise OpsigError where a page cannot be written here, or a file that is no report of ours would be lost."""
    if not path.parent.is_dir():
        raise OpsigError(f"-o {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OpsigError(f"-o {path} is a folder. Name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise OpsigError(f"-o {path}: the folder {path.parent} cannot be written")
    if not path.exists():
        return
    if os.path.samefile(path, run):
        raise OpsigError(f"-o {path} is the run itself. Name another file")
    with path.open("rb") as file:
        ours = f'content="{MAKER} '.encode() in file.read(HEAD)
    if not ours and not replace:
        raise OpsigError(
            f"{path} exists and is no report of opsig's. Name another file, or overwrite it with --replace"
        )


def write(path: Path, html: str) -> int:
    """Write the page so that it is there whole or not at all; its size in bytes."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            count = file.write(html.encode())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise OpsigError(f"-o {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return count
