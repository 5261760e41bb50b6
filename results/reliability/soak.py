"""Train finger_spin on the CPU, look at the processes every 30 seconds, then kill them: does anything grow?

    python results/reliability/soak.py --minutes 30

writes soak.csv beside itself, a line a sample: resident memory, open files and threads of the main process, and of
its workers together. All until the third evaluation is warm-up. Ends with SIGKILL and reads metrics.jsonl.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
OPTIONS = ("--task finger_spin --device cpu --num-envs 2 --eval-episodes 2 --prefill 1000 --eval-every 1000 "
           "--updates-per-1000 20 --first-updates 20 --log-every 10 --batch-size 8 --batch-length 16 --channels 8 "
           "--units 100 --hidden 100 --d-f 256 --horizon 8 --capacity 5000 --steps 1000000 --model-updates 0 --prefill-hold 0").split()  # fmt: skip


def sample(pid):
    """Resident MB, open files and threads of a process."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def main(minutes):
    """Run it for so long, write soak.csv and print how much grew."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    with tempfile.TemporaryDirectory() as folder, open(HERE / "soak.csv", "w", newline="") as file:
        command = [sys.executable, HERE.parent.parent / "train.py", *OPTIONS, "--name", "soak"]
        with open(Path(folder) / "log", "w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        writer, rows, started = csv.writer(file), [], time.monotonic()
        names = "seconds evaluations updates main_mb main_files main_threads workers_mb workers_files workers_threads"
        writer.writerow(names.split())
        metrics = Path(folder) / "runs" / "soak" / "metrics.jsonl"
        while time.monotonic() < started + 60 * minutes and process.poll() is None:
            time.sleep(30)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            updates = max((json.loads(line).get("updates", 0) for line in lines), default=0)
            together = [sum(values) for values in zip(*map(sample, workers))] or [0, 0, 0]
            evaluations = sum("eval_return" in line for line in lines)
            rows.append([time.monotonic() - started, evaluations, updates, *sample(process.pid), *together])
            writer.writerow([round(x, 1) for x in rows[-1]])
            file.flush()
        process.kill()
        process.wait()
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        warm = [row for row in rows if row[1] >= 3]
        growth = {"main": warm[-1][3] / warm[0][3] - 1, "workers": warm[-1][6] / warm[0][6] - 1}
        print(f"{len(lines)} lines of metrics.jsonl are whole; {sum('eval_return' in line for line in lines)} evaluations")
        print("growth of resident memory after warm-up:", {name: f"{100 * x:.2f} %" for name, x in growth.items()})
        print("open files, threads:", {(row[4], row[5], row[7], row[8]) for row in warm})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    main(parser.parse_args().minutes)
