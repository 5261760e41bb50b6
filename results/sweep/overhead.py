"""CPU seconds of two runs and their evaluations, started by hand and by sweep.py, as JSON.

    python results/sweep/overhead.py <options of train.py>...       # as root, Linux with control groups (version 1)

CPU time, for another process on the machine stretches wall time but not this. Each way is in a control group of its own,
which counts all that it starts: Ray's own processes, the environments, the driver. Both ways run at the same time, one
thread a run.
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


def start(name, lines, folder):
    """Shell lines in a new control group, in a folder."""
    (GROUPS / name).mkdir()
    lines = [f"echo $$ > {GROUPS / name}/cgroup.procs", *lines]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", "-ec", "\n".join(lines)], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def main(options):
    """Both at the same time, then the seconds of CPU that each took, as JSON."""
    rest = shlex.join(options)
    with tempfile.TemporaryDirectory() as folder:
        bare = [f"(python {ROOT}/train.py --task toy --seed {seed} {rest}; python {ROOT}/evaluate.py runs/toy-mummi-{seed}) &"
                for seed in (1, 2)]  # fmt: skip
        swept = [f"python {ROOT}/sweep.py --tasks toy --methods mummi --seeds 1 2 --runs swept {rest}"]
        begin, seconds, wall = time.time(), {}, {}
        processes = {name: start(f"{name}-{os.getpid()}", lines, folder)
                     for name, lines in {"bare": [*bare, "wait"], "sweep": swept}.items()}  # fmt: skip
        while len(wall) < 2:
            time.sleep(1)
            for name, process in processes.items():
                if name not in wall and process.poll() is not None:
                    assert process.returncode == 0, name
                    wall[name] = round(time.time() - begin)
        time.sleep(5)
        for name in processes:
            group = GROUPS / f"{name}-{os.getpid()}"
            seconds[name] = round(int((group / "cpuacct.usage").read_text()) / 1e9, 1)
            group.rmdir()
    overhead = round(100 * (seconds["sweep"] / seconds["bare"] - 1), 1)
    print(json.dumps({"options": options, "load": os.getloadavg(), "cpu_seconds": seconds, "wall_seconds": wall,
                      "overhead_percent": overhead}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
