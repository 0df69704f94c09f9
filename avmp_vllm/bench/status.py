"""How a benchmark that can be resumed ends: one line for the user, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from avmp_vllm.demo.run import termination_as_interrupt


def exit_status(
    benchmark: str,
    work: Callable[[], int],
    *,
    bad_input: tuple[type[Exception], ...],
    failures: tuple[type[Exception], ...] = (),
    interrupted: str,
) -> int:
    """Run a benchmark; 2 for bad input, 1 for a failure, 130 for an interruption, else its own.

    Args:
        benchmark: Its name on the command line.
        work: The benchmark.
        bad_input: Errors that are the user's to mend.
        failures: Errors of what was measured.
        interrupted: What to say after Ctrl-C or SIGTERM.
    """
    try:
        with termination_as_interrupt():
            return work()
    except bad_input as error:
        status, message = 2, f"error: {error}"
    except failures as error:
        status, message = 1, f"error: {error}"
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status, message = 130, f"interrupted; {interrupted}"
    print(f"avmp bench {benchmark}: {message}", file=sys.stderr)
    return status
