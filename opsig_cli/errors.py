"""The one exception that a person may see."""


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
