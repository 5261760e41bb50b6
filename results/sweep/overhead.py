"""Seconds of two runs and their evaluations, started by hand and then by tools.sweep, as JSON.

    python results/sweep/overhead.py <options of train.py>...       # as root, Linux with control groups (version 1)

Each way is in a control group of its own, which counts the CPU time of all that it starts: Ray's own processes, the
environments, the driver. One thread a run, on a machine that does nothing else.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUPS = Path("/sys/fs/cgroup/cpuacct")


def seconds(name, lines, folder):
    """CPU and wall seconds of shell lines, in a new control group and a folder."""
    group = GROUPS / f"{name}-{os.getpid()}"
    group.mkdir()
    lines = [f"echo $$ > {group}/cgroup.procs", *lines]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    begin = time.time()
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=folder, env=environment, check=True)
    wall = round(time.time() - begin)
    time.sleep(5)
    cpu = round(int((group / "cpuacct.usage").read_text()) / 1e9, 1)
    group.rmdir()
    return {"cpu": cpu, "wall": wall}


def main(options):
    """Both ways, one after the other."""
    rest = shlex.join(options)
    bare = [f"(python {ROOT}/train.py --task toy --seed {seed} {rest}; python {ROOT}/evaluate.py runs/toy-mummi-{seed}) &"
            for seed in (1, 2)]  # fmt: skip
    swept = [f"PYTHONPATH={ROOT} python -m tools.sweep --tasks toy --methods mummi --seeds 1 2 --runs swept {rest}"]
    with tempfile.TemporaryDirectory() as folder:
        ways = {"bare": seconds("bare", [*bare, "wait"], folder), "sweep": seconds("sweep", swept, folder)}
    overhead = {kind: round(100 * (ways["sweep"][kind] / ways["bare"][kind] - 1), 1) for kind in ("cpu", "wall")}
    report = {"options": options, "load": os.getloadavg(), "seconds": ways, "overhead_percent": overhead}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
