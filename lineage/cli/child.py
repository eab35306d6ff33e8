"""`python -m lineage.cli.child ARGUMENTS`: a `lineage` command that ends with its parent.

The parent holds the other end of standard input. When that is closed, however the parent ended,
the command is asked to stop, saves, and ends. The sentence about a fault is the last line of
standard output, too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the command; returns its exit code."""
    try:
        from lineage.cli import main as command
        from lineage.errors import say

        def tell(sentence: object) -> None:
            say(sentence)
            print(sentence, flush=True)

        threading.Thread(target=_end_with_parent, daemon=True).start()
        return command(sys.argv[1:], tell)
    except KeyboardInterrupt:  # PyTorch takes two seconds to import
        return 130


if __name__ == "__main__":
    sys.exit(main())
