"""How busy the learner of a run is, and the memory of all its processes: `python busy.py PID [PID ...]`.

A line a minute until the runs end, {pid: {"learner": CPU seconds, "workers": CPU seconds, "gb": proportional set size}}.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def stat(pid):
    """Parent and CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look(root):
    """CPU seconds of the process `root` and of its descendants, and the memory of all; pages they share count once."""
    known, memory = {}, 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            known[int(process.name)] = stat(process.name)
    tree = {root}
    while new := {pid for pid, (parent, _) in known.items() if parent in tree} - tree:
        tree |= new
    for pid in tree:
        with suppress(OSError, IndexError):
            memory += int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    workers = sum(known[pid][1] for pid in tree - {root})
    return {"learner": known[root][1], "workers": round(workers, 2), "gb": round(memory / 1e6, 3)}


start, roots = time.monotonic(), [int(pid) for pid in sys.argv[1:]]
while any(Path(f"/proc/{pid}").exists() for pid in roots):
    with suppress(KeyError):
        print(json.dumps({"seconds": round(time.monotonic() - start)} | {pid: look(pid) for pid in roots if Path(f"/proc/{pid}").exists()}), flush=True)
    time.sleep(60)
