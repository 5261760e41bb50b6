"""Start a program of a run in this process, which then ends with the process that asked for it: `tools.sweep`.

    python -m tools.launch PARENT FOLDER train.py --resume FOLDER
"""

import runpy
import signal
import sys
import time
from pathlib import Path

from checkpoint import open_locked
from envs import die_with_parent


def wait_until_free(folder, seconds=180):
    """Wait while a lost node's process still holds the run, or the file system its lock."""
    for _ in range(seconds):
        try:
            return open_locked(Path(folder) / "metrics.jsonl").close()
        except ValueError:
            time.sleep(1)


if __name__ == "__main__":
    parent, folder, *sys.argv = sys.argv[1:]
    die_with_parent(int(parent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it
    wait_until_free(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
