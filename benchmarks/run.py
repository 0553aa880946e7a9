"""Every family's benchmark, each in a process of its own: `python -m benchmarks.run [--quick] [--output FOLDER]`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

FAMILIES = ("overhead", "positional", "rows", "int8", "attention", "decode")


def main(argv: Sequence[str] | None = None) -> int:
    """Passes the arguments on to each; the exit status says whether any failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = [[sys.executable, "-m", f"benchmarks.{name}", *arguments] for name in FAMILIES]
    return max(abs(subprocess.run(command).returncode) for command in commands)


if __name__ == "__main__":
    sys.exit(main())
