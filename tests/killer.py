"""Kill a small run over and over, then let it finish; print what was seen as JSON. Other tests use `without_pictures`.

    python tests/killer.py <seed> <kills> <options of train.py>...

A process of its own, which has everything imported: a run is forked from it in milliseconds, and its worker
processes are, too.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import av  # noqa: F401  imported once, here, as is what follows
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import checkpoint as runs
import train
from evaluate import run_episodes


def without_pictures(setattr=setattr):
    """Pictures and films are four fifths of a small run's time, and test_pictures.py has them."""
    setattr(train, "run_episodes", lambda *args, film: run_episodes(*args))
    setattr(train, "write_video", lambda *args: None)
    setattr(train, "of_evaluation", lambda *args: {})
    setattr(train, "gif", lambda *args: None)
    setattr(runs.Log, "show_pictures", lambda *args: None)


def slow_down():
    """Writing takes long, so that a kill falls into it: of checkpoints and metrics, rows, and file names."""
    write, pwrite, replace = os.write, os.pwrite, os.replace

    def slow_write(file, data):
        if len(data) < 4096:
            return write(file, data)
        time.sleep(0.02)
        return write(file, data[: max(1, len(data) // 4)])

    def slow_pwrite(file, data, offset):
        time.sleep(0.002)
        return pwrite(file, data[: max(1, len(data) // 2)], offset)

    def slow_replace(source, target):
        time.sleep(0.02)
        replace(source, target)
        time.sleep(0.02)

    os.write, os.pwrite, os.replace = slow_write, slow_pwrite, slow_replace


def start(options, slow):
    """Fork a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            if slow:
                slow_down()
            train.main(train.parse(options))
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def progress(folder):
    """[steps, updates] of the newest intact checkpoint."""
    with contextlib.redirect_stderr(None):
        _, state = runs.newest_checkpoint(folder)
    return [state["steps"], state["updates"]] if state else [0, 0]


def main(seed, kills, options):
    draw, longest = random.Random(seed), 1.0
    folder = Path("runs") / options[options.index("--name") + 1]
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # imports a second's worth
    without_pictures()
    seen = []
    for kill in range(kills + 1):
        new = [*options] if not folder.exists() else ["--resume", str(folder)]
        pid = start(new, slow=kill % 2 == 0 and kill < kills)
        if kill == kills:
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(draw.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        tail = (folder / "metrics.jsonl").read_bytes().splitlines()[-1:] if (folder / "metrics.jsonl").exists() else []
        seen.append({
            "killed": os.WIFSIGNALED(status), "progress": progress(folder), "exists": folder.exists(),
            "files": sorted(path.name for path in folder.glob("checkpoint*")), "tail": [json.loads(x) for x in tail],
        })  # fmt: skip
        # On any machine, some kills come before the next checkpoint and some after it.
        longest *= 0.6 if len(seen) > 1 and seen[-1]["progress"] > seen[-2]["progress"] else 1.15
    print(json.dumps({"kills": seen, "status": status}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
