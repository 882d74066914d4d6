"""Show on this machine that mlxmm works on it: prints a report in Markdown, to paste into an issue.

    make prove
    python -m tools.prove
    python -m tools.prove --quick

Each claim is tried and gets a verdict: it holds, it does not hold, or it was not tried, and why. Exits with 0 only if
all that was tried holds. Nothing is downloaded. `--quick` takes seconds: its networks have the layout of the real
ones, but are narrow.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable

from mlxmm import diagnostics
from mlxmm.diagnostics import Row
from tools.proof_report import FAILS, Line, judged, markdown
from tools.prove_machine import full_fsync, limits
from tools.prove_numbers import parity, repeated_gradient
from tools.prove_training import kill_and_resume, real_size

CHECKS = (kill_and_resume, parity, real_size, limits, repeated_gradient, full_fsync)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrow networks: seconds, to try this tool")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    lines = [line for check in CHECKS for line in tried(check, quick)]
    print(markdown(machine(), lines))
    print(f"\nin {time.perf_counter() - start:.0f} s{' with --quick' if quick else ''}")
    sys.exit(any(line.verdict == FAILS for line in lines))


def tried(check: Callable[[bool], list[Line]], quick: bool) -> list[Line]:
    """The lines of a check. One that raises does not hold, and does not end the report."""
    name = check.__name__.replace("_", " ")
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        return check(quick)
    except Exception as error:
        return [judged(name, False, f"{type(error).__name__}: {error}")]


def machine() -> list[Row]:
    """The system, and what the doctor finds of versions, device and computing. No name, path or address."""
    system = Row("system", platform.platform())
    return [system, *diagnostics.versions(), *diagnostics.device(), *diagnostics.computing()]


if __name__ == "__main__":
    main()
