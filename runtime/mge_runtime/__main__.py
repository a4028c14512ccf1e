"""`python -m mge_runtime` is `mge-run`."""

from mge_runtime.cli.run import main

if __name__ == "__main__":
    main(prog_name="mge-run")
