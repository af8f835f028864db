"""`python -m opsig_cli`, as launchers of processes want it."""

from opsig_cli.main import run

run()
