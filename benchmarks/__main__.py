"""`python -m benchmarks`. OpenMP reads its pinning when torch loads it, so it is set here, before that."""

from __future__ import annotations

import os
import sys

from benchmarks import cli, machine


def restart_pinned(argv: list[str]) -> None:
    """Replaces this process by the same command with pinning set; returns if nothing has to be set."""
    command, arguments = cli.split_command(argv)
    if command != "run":
        return
    options = cli.run_parser().parse_args(arguments)
    if options.no_pin or options.list:
        return
    wanted = machine.missing_pinning(os.environ, options.threads)
    if wanted:
        settings = " ".join(f"{name}={value}" for name, value in wanted.items())
        print(f"restarting with {settings} (--no-pin: not)", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


if __name__ == "__main__":
    restart_pinned(sys.argv[1:])
    sys.exit(cli.main(sys.argv[1:]))
