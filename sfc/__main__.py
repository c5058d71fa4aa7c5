"""`python -m sfc`, the command `sfc` and the scripts: Ctrl-C ends them with one line and status 130 at any moment.

That includes the second in which modules are imported and the moment in which the interpreter takes them down again,
when nothing could catch an exception.
"""

import os
import signal
import sys
from types import FrameType

from sfc.core.errors import INTERRUPTED, INTERRUPTED_LINE


def main() -> None:
    """Run the command line with the process's arguments."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore Ctrl-C
    if is_ours:
        signal.signal(signal.SIGINT, _end_now)
    from sfc.cli import main as run

    try:
        if is_ours:
            signal.signal(signal.SIGINT, _interrupt)
        run()
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _end_now)


def run_script(command: str, *options: str) -> None:
    """What a script in `scripts/` does: `sfc COMMAND` with these options and then the script's arguments."""
    sys.argv = [sys.argv[0], command, *options, *sys.argv[1:]]
    main()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """What is under way cleans up; a second Ctrl-C does not wait for that."""
    signal.signal(signal.SIGINT, _end_now)
    raise KeyboardInterrupt


def _end_now(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, f"\n{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
