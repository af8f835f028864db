"""The one exception that a person may see."""

import re


class OpsigError(Exception):
    """A mistake or a state that one line can explain: what, where, and what to do next.

    Raised anywhere; `opsig_cli.main` prints it as a single line on stderr and exits with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(OpsigError):
    """A command line that cannot be carried out as written (exit code 2)."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


_NO_VALUE = r"(?:and|or|is|are|was|with|without|takes?|needs?|has|gives?|for|to|of|in|on|as|exclude|choose)\b"
_OPTION = re.compile(rf"--([a-z][a-z-]*)(?: (?!{_NO_VALUE})('[^']*'|[A-Za-z0-9_:.=/]*[A-Za-z0-9_]))?")


def in_python(message: str) -> str:
    """A message that speaks of options, as a caller of the functions has them: as arguments. Command lines in it stay.

    >>> in_python("--step and --window exclude each other"), in_python("Use --by loss")
    ('step and window exclude each other', 'Use by=loss')
    >>> in_python("run.h5 lacks losses. Run: opsig track run.h5 --task X")
    'run.h5 lacks losses. Run: opsig track run.h5 --task X'
    """
    words, opsig, command = message.partition("opsig ")
    said = _OPTION.sub(lambda m: m[1].replace("-", "_") + (f"={m[2]}" if m[2] else ""), words)
    return said + opsig + command
