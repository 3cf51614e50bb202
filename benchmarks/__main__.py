"""`python -m benchmarks`. OpenMP reads its pinning when torch loads it, so it is set here, before that."""

from __future__ import annotations

import os
import sys

from benchmarks import command_line, commands, machine


def restart_pinned(argv: list[str]) -> None:
    """Replaces this process by the same command with pinning set; returns if nothing has to be set."""
    command, arguments = commands.split_command(argv)
    if command != "run":
        return
    chosen = command_line.run_parser().parse_args(arguments)
    if chosen.no_pin or chosen.list:
        return
    wanted = machine.missing_pinning(os.environ, chosen.threads)
    if wanted:
        settings = " ".join(f"{name}={value}" for name, value in wanted.items())
        print(f"restarting with {settings} (--no-pin: not)", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


if __name__ == "__main__":
    restart_pinned(sys.argv[1:])
    sys.exit(commands.main(sys.argv[1:]))
