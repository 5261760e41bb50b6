"""Many runs on a cluster: `python -m tools.sweep` plans all of Table I, 60 runs; with `--yes` it makes them.

Every run is a `python train.py` of its own, in a Ray task that holds its share of a GPU and of the CPUs. A run that
dies goes on from its last checkpoint, on any node. When all are done, each is evaluated on the cluster; their table
and curves are written to `<runs>-table.md` (Table I, II) and `<runs>-curves.png` and `.svg` (Fig. 5). Ctrl-C ends
every run with a checkpoint; the same command goes on, and skips what is finished. What a run prints is in its
`sweep.log`.

    python -m tools.sweep --yes                                       # Table I on this machine
    python -m tools.sweep --tasks finger_spin --methods mummi cvrl --seeds 0 1 2 --gpus-per-run 0.5
    python -m tools.sweep --tasks table_wiping --methods mummi mummi_b mssm_e        # Table II
    python -m tools.sweep --tasks toy --methods mummi --address auto --steps 3000    # on a cluster that runs

Any other option is one of `train.py`, for every run. Clusters: docs/cluster.md.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import tyro

import evaluate
from checkpoint import Fault, Stopped, StopSignals, create_folder, fail, say, write_config
from config import MAY_CHANGE, Config, check, check_comparable, load_config, parse
from methods import MODEL
from tools import output_files, plot

ROOT = Path(__file__).resolve().parent.parent
TABLE_I_TASKS = ("walker_run", "walker_walk", "walker_stand", "finger_spin", "cup_catch")
TABLE_I_METHODS = ("mummi", "mummi_b", "cvrl", "dreamer")
OWN = "--task --method --seed --name --resume".split()  # options of train.py that a sweep sets
GRACE = 120  # seconds that a run has for its last checkpoint when it is stopped


@dataclass
class Options:
    """What to run, and with how much of the cluster."""

    tasks: tuple[str, ...] = ()  # by default the five of Table I
    methods: tuple[str, ...] = ()  # by default the four of Table I
    seeds: tuple[int, ...] = ()  # by default 1 2 3
    runs: str = "runs"  # folder of the runs; all nodes must see it under this path (NFS, Lustre, EFS, ...)
    address: str = ""  # of a cluster, host:port, or auto on one of its nodes; by default one is started here
    gpus_per_run: float | None = None  # 0.5: two share a GPU, 0: on CPUs; by default 1, or 0 if there are none
    cpus_per_run: int | None = None  # booked, and threads of a run; by default its share of a GPU's node, else 1
    retries: int = 3  # of a run that dies, each from its last checkpoint
    episodes: int = 10  # of each run's evaluation at each missing rate
    yes: bool = False  # make the runs of all of Table I


# ---- 1. The plan ---------------------------------------------------------------------------------


def plan(options, rest):
    """{folder: Config} of every run. Raises ValueError where train.py would, or where a folder holds another run.

    rest  options of train.py
    """
    own = [argument for argument in rest if argument.split("=")[0] in OWN]
    if own:
        raise ValueError(f"{own[0]} is not for a sweep: choose runs with --tasks, --methods, --seeds and --runs")
    if options.retries < 0 or options.episodes < 1 or (options.cpus_per_run or 1) < 1:
        raise ValueError("--retries takes 0 or more, --episodes and --cpus-per-run 1 or more")
    if not 0 <= (options.gpus_per_run or 0) <= 1:
        raise ValueError(f"--gpus-per-run {options.gpus_per_run} is not allowed: give 0 to 1, a run uses one GPU")
    configs, runs = {}, Path(options.runs).resolve()
    for task in options.tasks or TABLE_I_TASKS:
        base = parse(["--task", task, "--name", "sweep.tmp", *rest])  # a name that no run has
        if base.backgrounds != "procedural":
            base.backgrounds = str(Path(base.backgrounds).resolve())
        for method, seed in itertools.product(options.methods or TABLE_I_METHODS, options.seeds or (1, 2, 3)):
            config = replace(base, method=method, seed=seed)
            check(config)
            folder = runs / f"{task}-{method}-{seed}"
            configs[folder] = replace(config, name="")
            if folder.exists():
                check_same(folder, configs[folder])
    return configs


def check_same(folder, config):
    """Raises ValueError where the folder holds another run than the one asked for."""
    was = load_config(folder)
    for name in (field.name for field in fields(config)):
        if name not in (*MAY_CHANGE, "name") and getattr(was, name) != getattr(config, name):
            raise ValueError(f"{folder} was trained with --{name.replace('_', '-')} {getattr(was, name)}, not "
                             f"{getattr(config, name)}: give the same options again, or another --runs")  # fmt: skip


def finished(folder, config):
    """Whether the run has done its last evaluation. Little of the checkpoint is read: tensors stay on disk."""
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        return state.get("evaluated", state["steps"]) >= config.steps
    except Exception:  # none, or a damaged one: train.py knows what to do
        return False


def hours(report, config):
    """Hours of one run, from a report of tools.benchmark at the paper's sizes; None if it holds no such time."""
    if "training" in report:
        return config.steps / report["training"]["steps_a_second"] / 3600
    auto = "bfloat16" if report["machine"]["gpu"] else "float32"
    size = f"50x50 {auto if config.precision == 'auto' else config.precision} "
    updates = [times["median"] for name, times in report.get("update", {}).items() if name.startswith(size)]
    due = config.first_updates + (config.steps - config.prefill) * config.updates_per_1000 / 1000
    return due * min(updates) / 3.6e6 if updates else None


def describe(configs, left):
    """The plan in words: how many runs, and how long they take if that was measured.

    left  folders of the runs that are not finished
    """
    folder = next(iter(configs)).parent
    lines = [f"{len(configs)} runs in {folder}, of which {len(configs) - len(left)} are finished."]
    size, paper = [*MODEL, "batch_size", "batch_length", "horizon"], Config()
    large = [configs[f] for f in left if all(getattr(configs[f], name) == getattr(paper, name) for name in size)]
    if len(large) < len(left):
        lines.append(f"{len(left) - len(large)} to be made are not of the sizes of Table I: no estimate for them.")
    paths = sorted((ROOT / "results" / "benchmark").glob("*.json"))
    reports = {path.name: json.loads(path.read_text()) for path in paths} if large else {}
    reports = {name: report for name, report in reports.items() if hours(report, paper) is not None}
    gpus = {name: report for name, report in reports.items() if report["machine"]["gpu"]}
    if large and not gpus:
        lines.append("No GPU has been measured: `python -m tools.benchmark training --output results/benchmark/NAME.json` "
                     "measures yours, and the plan then says its hours.")  # fmt: skip
    for name, report in (gpus or reports).items():
        total, device = sum(hours(report, config) for config in large), report["machine"]["gpu"] or "a CPU"
        lines.append(f"{len(large)} to be made: {total / len(large):,.1f} hours each, {total:,.0f} in all, one at a "
                     f"time on {device} ({name}).")  # fmt: skip
    return "\n".join(lines)


# ---- 2. On a node --------------------------------------------------------------------------------

def execute(command, folder, threads, attempt):
    """As a task of Ray's, run one program, which ends with the task at the latest. Returns its exit code, last line."""
    import ray

    environment = {name: x for name, x in os.environ.items() if (name, x) != ("CUDA_VISIBLE_DEVICES", "")}
    environment |= {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60"}
    with open(folder / "sweep.log", "a+b") as log:
        node = ray.get_runtime_context().get_node_id()
        log.write(f"\n--- attempt {attempt} on {os.uname().nodename}, node {node}, worker {os.getpid()}\n".encode())
        log.flush()
        line = [sys.executable, "-m", "tools.launch", str(os.getpid()), folder, *command]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.2)
        except KeyboardInterrupt:  # the sweep is stopped
            process.terminate()  # train.py writes a checkpoint
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
            process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return process.returncode, next((line.strip() for line in reversed(lines) if line.strip()), "")


def probe(folder, root):
    """As a task of Ray's, leave a file in the folder of the runs. Returns the host, the file and a hash of the code."""
    import ray

    mark, host = folder / f"probe-{ray.get_runtime_context().get_node_id()}", os.uname().nodename
    with suppress(OSError):
        mark.write_text(host)
    code = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    return host, mark, hashlib.sha256(code).hexdigest()


# ---- 3. The cluster ------------------------------------------------------------------------------


@contextmanager
def cluster(options):
    """Ray, connected to the cluster of the options, or to one of its own that ends with it. Raises ValueError."""
    try:
        import ray
        import rich  # noqa: F401  of the table
    except ImportError as error:
        raise ValueError(f"{error}: pip install -r requirements-sweep.txt") from None
    os.environ.setdefault("RAY_worker_niceness", "0")  # runs are no background work, which Ray takes them for
    # Nothing goes through the object store; the dashboard is not needed.
    here = {} if options.address else {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(options.address or "local", log_to_driver=False, logging_level="ERROR", **here)
    except ConnectionError as error:
        raise ValueError(f"--address {options.address}: no cluster answers there; start one, or leave it out to start "
                         f"one here ({' '.join(str(error).split())[:200]})") from error  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def check_nodes(ray, runs):
    """Raises ValueError unless every node writes where the driver reads, and has this code."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    ask = ray.remote(num_cpus=0, max_retries=0)(probe)
    answers = ray.get([ask.options(scheduling_strategy=strategy(n, soft=False)).remote(runs, ROOT) for n in nodes])
    own = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))).hexdigest()
    for _ in range(30):  # a network's file system may be seconds late
        unseen = [host for host, mark, _ in answers if not mark.exists()]
        if not unseen:
            break
        time.sleep(0.2)
    for _, mark, _ in answers:
        mark.unlink(missing_ok=True)
    if unseen:
        raise ValueError(f"what node {unseen[0]} writes to {runs} is not seen here: give --runs a folder that all "
                         f"{len(nodes)} nodes share under the same path (NFS, Lustre, EFS, ...)")  # fmt: skip
    for host, _, code in answers:
        if code != own:
            raise ValueError(f"node {host} has another version of this code in {ROOT}, or none: put it on all nodes, "
                             "best on the shared file system")  # fmt: skip


def share(nodes, options):
    """GPUs and CPUs of one run. Raises ValueError where no node has as many.

    nodes  the resources of each, like {"CPU": 16, "GPU": 1}
    """
    gpus, cpus = options.gpus_per_run, options.cpus_per_run
    if gpus is None:
        gpus = float(any(node.get("GPU") for node in nodes))
    if cpus is None:
        shares = [int(node.get("CPU", 0) * gpus / node["GPU"]) for node in nodes if gpus and node.get("GPU")]
        cpus = max(1, min(shares, default=1))
    if not any(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= cpus for node in nodes):
        have = "; ".join(f"{node.get('GPU', 0):g} and {node.get('CPU', 0):g}" for node in nodes)
        raise ValueError(f"a run asks for {gpus:g} GPUs and {cpus} CPUs, and the nodes have {have}: lower "
                         "--gpus-per-run or --cpus-per-run")  # fmt: skip
    return gpus, cpus


# ---- 4. Runs and their table ---------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """One program to run in a folder, and its row of the table."""

    folder: Path
    command: list
    total: int = 0  # environment steps; 0 for an evaluation
    state: str = "waiting"  # for a place or for a retry, running, finished, failed
    attempt: int = 0
    due: float = 0.0  # not to be submitted before this, time.monotonic()
    log_size: int = 0  # of sweep.log when it was submitted
    reached: float | None = None  # the last return
    first: tuple = ()  # (time, steps) when this attempt was first seen to learn,
    last: tuple = ()  # and when it was last seen to have moved


def look(job):
    """See from a submitted job's files whether it runs, and how far it is."""
    log, metrics = job.folder / "sweep.log", job.folder / "metrics.jsonl"
    if job.attempt and job.state == "waiting" and log.exists() and log.stat().st_size > job.log_size:
        job.state, job.first, job.last = "running", (), ()
    if not (job.total and metrics.exists()) or job.state == "waiting":
        return
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 16384))
        lines, now = file.read().splitlines(), None
    for line in lines:
        with suppress(ValueError):  # the first may be half a line
            values = json.loads(line)
            job.reached = values.get("eval_return", values.get("train_return", job.reached))
            now = time.monotonic(), values["steps"]
    if now and (not job.first or now[1] < job.first[1]):
        job.first = job.last = now
    elif now and now[1] != job.last[1]:
        job.last = now


class Terminal:
    """stderr for rich: a lost terminal, a closed pipe or an ASCII one costs the text and nothing else."""

    encoding, isatty = getattr(sys.stderr, "encoding", "ascii"), getattr(sys.stderr, "isatty", bool)

    def write(self, text):
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: stderr is closed, None
            sys.stderr.write(text)

    def flush(self):
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()


def table(jobs, title):
    """A table of rich's: every job's state, steps, return, steps a second, and hours left."""
    from rich.table import Table

    counts = Counter(job.state for job in jobs)
    states = ["running", "failed", "waiting", "finished"]
    head = title + ": " + ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
    shown = Table("run", "state", *(["steps", "return", "steps/s", "left"] if jobs[0].total else []), title=head)
    for job in sorted(jobs, key=lambda job: states.index(job.state)):
        row = [job.folder.name, job.state + (f", attempt {job.attempt}" if job.attempt > 1 else "")]
        if job.last:
            seconds, steps = job.last[0] - job.first[0], job.last[1] - job.first[1]
            row += [f"{job.last[1]:,} of {job.total:,}", "" if job.reached is None else f"{job.reached:.1f}"]
            if steps > 0 and job.state == "running":
                row += [f"{steps / seconds:.1f}", f"{max(0, job.total - job.last[1]) * seconds / steps / 3600:.1f} h"]
        shown.add_row(*row)
    return shown


def work(ray, jobs, gpus, cpus, retries, title):
    """Do all jobs, each with so many retries. Returns those that failed. Raises Stopped after a signal to stop."""
    from rich.console import Console
    from rich.live import Live

    task = ray.remote(execute).options(num_gpus=gpus, num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")
    console, tasks = Console(file=Terminal(), highlight=False, markup=False), {}
    with ExitStack() as last, Live(console=console, auto_refresh=False) as live, StopSignals() as stop:
        last.callback(console.print)  # the end of the table's last line
        try:
            while any(job.state in ("waiting", "running") for job in jobs):
                for job in jobs:
                    if job.state == "waiting" and job not in tasks.values() and time.monotonic() >= job.due:
                        submit(job, task, cpus, tasks)
                ready = []
                if tasks:
                    ready = ray.wait([*tasks], timeout=1)[0]
                else:  # all wait for their retries
                    time.sleep(1)
                for job in tasks.values():
                    look(job)
                for ref in ready:
                    console.print(settle(ray, tasks.pop(ref), ref, retries), soft_wrap=True)
                live.update(table(jobs, title), refresh=True)
                stop.check()
        except Stopped as error:
            for ref in tasks:
                ray.cancel(ref)
            ray.wait([*tasks], num_returns=len(tasks), timeout=GRACE + 30)
            error.args = (f"stopped by {signal.Signals(error.number).name}; go on with the same command",)
            raise
    return [job for job in jobs if job.state == "failed"]


def submit(job, task, cpus, tasks):
    """Hand a job to Ray, which starts it as soon as there is a place for it."""
    log = job.folder / "sweep.log"
    job.attempt, job.log_size = job.attempt + 1, log.stat().st_size if log.exists() else 0
    tasks[task.remote(job.command, job.folder, cpus, job.attempt)] = job


def settle(ray, job, ref, retries):
    """Note how a job's task ended: finished, failed for good, or waiting for a retry. Returns a line that says so."""
    try:
        code, said = ray.get(ref)
        reason = f"exit code {code}, {said}"
    except ray.exceptions.RayError as error:  # its worker or node died, or memory was short
        code, reason = -1, (str(getattr(error, "cause", None) or error).splitlines() or [type(error).__name__])[0]
    if code == 0:
        job.state = "finished"
        return f"{job.folder.name}: finished"
    job.state = "failed" if job.attempt > retries else "waiting"
    job.due = time.monotonic() + min(2.0**job.attempt, 60)
    what = "given up" if job.state == "failed" else f"attempt {job.attempt + 1} of {retries + 1} follows"
    return f"{job.folder.name}: {reason}; {what}"


# ---- 5. The command ------------------------------------------------------------------------------


def evaluation(folder, config, options, device, references):
    """The job that evaluates a run; None if that has been done since its last checkpoint.

    references  whether it also says what the random policy earns: one run of a task is enough
    """
    remove = ["workspace"] if config.task == "table_wiping" else []  # Table II
    with suppress(OSError, ValueError):
        done = json.loads((folder / "evaluation.json").read_text())["options"]
        newer = (folder / "evaluation.json").stat().st_mtime >= (folder / "checkpoint.pt").stat().st_mtime
        if newer and (done["episodes"], done["remove"]) == (options.episodes, remove):
            return None
    arguments = ["--episodes", str(options.episodes), "--device", device]
    arguments += ["--remove", *remove] if remove else []
    arguments += ["--references" if references else "--no-references"]
    return Job(folder, [str(ROOT / "evaluate.py"), str(folder), *arguments])


def write_results(configs, folder):
    """Table I (or II) and Fig. 5 of the runs, by evaluate.py and tools.plot, beside their folder."""
    reports = [json.loads((run / "evaluation.json").read_text()) for run in configs]
    records = [record for report in reports for record in report["records"]]
    references = {task: returns for report in reports for task, returns in report["references"].items()}
    text = evaluate.markdown(evaluate.pool(records), references)
    Path(f"{folder}-table.md").write_text(text)
    say(text)
    plot.main(plot.Options(runs=tuple(map(str, configs)), panels=True, output=f"{folder}-curves"))
    say(f"{folder}-table.md: {len(configs)} runs")


def main(options, rest):
    """Make all runs of the plan, evaluate them and write the table. Raises Fault where some failed."""
    configs = plan(options, rest)
    check_comparable(configs)
    left = [folder for folder, config in configs.items() if not finished(folder, config)]
    say(describe(configs, left))
    if not (options.yes or options.tasks or options.methods or options.seeds):
        return say("This is the whole of Table I: add --yes to make it, or choose --tasks, --methods or --seeds.")
    runs = Path(options.runs).resolve()
    output_files(f"{runs}-table", ".md")
    runs.mkdir(exist_ok=True)
    with cluster(options) as ray:
        check_nodes(ray, runs)
        gpus, cpus = share([node["Resources"] for node in ray.nodes() if node["Alive"]], options)
        device = "auto" if gpus else "cpu"
        for folder in left:
            config = configs[folder] if gpus else replace(configs[folder], device=device)
            (write_config if folder.exists() else create_folder)(folder, config)
        jobs = [Job(f, [str(ROOT / "train.py"), "--resume", str(f)], configs[f].steps) for f in left]
        failed = work(ray, jobs, gpus, cpus, options.retries, "training") if jobs else []
        trained = {folder: c for folder, c in configs.items() if folder not in [job.folder for job in failed]}
        first = {config.task: folder for folder, config in reversed(trained.items())}
        jobs = [evaluation(f, c, options, device, references=f == first[c.task]) for f, c in trained.items()]
        jobs = list(filter(None, jobs))
        failed += work(ray, jobs, gpus, cpus, options.retries, "evaluation") if jobs else []
    good = {folder: c for folder, c in trained.items() if folder not in [job.folder for job in failed]}
    if good:
        write_results(good, runs)
    if failed:
        names = ", ".join(job.folder.name for job in failed)
        raise Fault(f"{len(failed)} of {len(configs)} runs failed: {names}; each says why in its sweep.log, and the "
                    "same command tries again")  # fmt: skip
    return None


if __name__ == "__main__":
    try:
        main(*tyro.cli(Options, prog="python -m tools.sweep", description=__doc__, return_unknown_args=True))
    except (Exception, KeyboardInterrupt) as error:
        fail("tools.sweep", error)
