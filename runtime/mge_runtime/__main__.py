"""`python -m mge_runtime` is `mge-run`."""

from mge_runtime.cli.run import main

main(prog_name="mge-run")
