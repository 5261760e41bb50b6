"""Many runs on a cluster: `python -m tools.sweep` plans all of Table I, 60 runs; with `--yes` it makes them.

Each run is a `python train.py` and then a `python evaluate.py`, in a Ray task that holds its share of a GPU and of
the CPUs; what they print is in the run's `sweep.log`. A run that dies goes on from its last checkpoint, on any node.
In the end `<runs>-table.md` (Table I, II) and `<runs>-curves.png` and `.svg` (Fig. 5) are written. Ctrl-C ends every
run with a checkpoint; the same command goes on, and skips what is finished.

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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

import evaluate
from checkpoint import Fault, Stopped, StopSignals, check_backgrounds, create_folder, fail, say, write_config
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

    tasks: tuple[str, ...] = ()  # of train.py; by default the five of Table I
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
    gpus, cpus = options.gpus_per_run or 0, options.cpus_per_run or 1
    if options.retries < 0 or options.episodes < 1 or cpus < 1 or not 0 <= gpus <= 1:
        raise ValueError("--retries takes 0 or more, --episodes and --cpus-per-run 1 or more, --gpus-per-run 0 to 1")
    if options.address and not any(argument.startswith("--preset") for argument in rest):
        raise ValueError("--address also needs --preset paper or small: the nodes may have GPUs that are not here")
    configs, runs = {}, Path(options.runs).resolve()
    for task in options.tasks or TABLE_I_TASKS:
        base = parse(["--task", task, "--name", "sweep.tmp", *rest])  # a name that no run has
        if base.backgrounds != "procedural":
            base.backgrounds = str(Path(base.backgrounds).resolve())
        for method, seed in itertools.product(options.methods or TABLE_I_METHODS, options.seeds or (1, 2, 3)):
            config = replace(base, method=method, seed=seed)
            check(config)
            folder = runs / f"{task}-{method}-{seed}".replace("/", "-")
            configs[folder] = replace(config, name="")
            if folder.exists():
                check_same(folder, configs[folder])
                configs[folder].precision = load_config(folder).precision
    return configs


def check_same(folder, config):
    """Raises ValueError where the folder holds another run than the one asked for."""
    was = vars(load_config(folder))
    late = set() if config.precision == "auto" else {"precision"}
    if finished(folder, config):  # it would stay as it is
        late |= {"act_by", "steps"}
        check_backgrounds(folder, config.backgrounds)
    for name, value in vars(config).items():
        if name not in {*MAY_CHANGE, "name"} - late and was[name] != value:
            raise ValueError(f"{folder} was trained with --{name.replace('_', '-')} {was[name]}, not {value}: give the "
                             "same options again, or another --runs")  # fmt: skip


def finished(folder, config):
    """Whether the run has done its last evaluation. Little of the checkpoint is read: tensors stay on disk."""
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        return state.get("evaluated", state["steps"]) >= config.steps
    except Exception:  # none, or a damaged one: train.py knows what to do
        return False


def describe(configs, left):
    """The plan in words: how many runs there are, how many of them are `left`, and their hours if measured."""
    folder, size = next(iter(configs)).parent, [*MODEL, "batch_size", "batch_length", "horizon"]
    lines = [f"{len(configs)} runs in {folder}, of which {len(configs) - len(left)} are finished."]
    large = [configs[f] for f in left if all(getattr(configs[f], name) == getattr(Config(), name) for name in size)]
    if len(large) < len(left):
        lines.append(f"{len(left) - len(large)} to be made are not of the sizes of Table I: no estimate for them.")
    reports = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "results/benchmark").glob("*.json"))}
    reports = {name: report for name, report in reports.items() if "training" in report and large}
    gpus = {name: report for name, report in reports.items() if report["machine"]["gpu"]}
    if large and not gpus:
        lines.append("No GPU has been measured: `python -m tools.benchmark training --output results/benchmark/NAME` "
                     "measures yours, and the plan then says its hours.")  # fmt: skip
    for name, report in (gpus or reports).items():
        hours = sum(config.steps for config in large) / report["training"]["steps_a_second"] / 3600
        lines.append(f"{len(large)} to be made: {hours / len(large):,.1f} hours each, {hours:,.0f} in all, one at a "
                     f"time on {report['machine']['gpu'] or 'a CPU'} ({name}).")  # fmt: skip
    return "\n".join(lines)


# ---- 2. On a node --------------------------------------------------------------------------------


def execute(commands, folder, threads, attempt):
    """As a task of Ray's, run programs one after the other. Returns the last exit code and the last line printed.

    They end with this process at the latest. If the task is cancelled, they have time for a checkpoint.
    """
    import ray

    environment = {name: x for name, x in os.environ.items() if (name, x) != ("CUDA_VISIBLE_DEVICES", "")}
    environment |= {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60"}
    with open(folder / "sweep.log", "a+b") as log:
        node = ray.get_runtime_context().get_node_id()
        log.write(f"\n--- attempt {attempt} on {os.uname().nodename}, node {node}, worker {os.getpid()}\n".encode())
        log.flush()
        for command in commands:
            line = [sys.executable, "-m", "tools.launch", str(os.getpid()), folder, *command]
            process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                       cwd=ROOT, start_new_session=True)  # fmt: skip
            try:
                while process.poll() is None:
                    time.sleep(0.2)
            except KeyboardInterrupt:  # the sweep is stopped
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                raise
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and all that it started
                process.wait()
            if process.returncode != 0:
                break
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return process.returncode, next((line.strip() for line in reversed(lines) if line.strip()), "")


def probe(folder, root):
    """As a task of Ray's, leave a file in the folder of the runs. Returns the host, the file and a hash of its code."""
    import ray

    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))).hexdigest()
    mark = folder / f"probe-{ray.get_runtime_context().get_node_id()}"
    with suppress(OSError):
        mark.write_text("")
    return os.uname().nodename, mark, code


# ---- 3. The cluster ------------------------------------------------------------------------------


@contextmanager
def cluster(options):
    """Ray, connected to the cluster of the options, or to one of its own that ends with it. Raises ValueError."""
    try:
        import ray
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
    """Raises ValueError unless every node writes where the driver reads, and all have one version of the code."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    ask = ray.remote(num_cpus=0, max_retries=0)(probe)
    answers = ray.get([ask.options(scheduling_strategy=strategy(n, soft=False)).remote(runs, ROOT) for n in nodes])
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
    if len({code for _, _, code in answers}) > 1:
        raise ValueError(f"the nodes {', '.join(host for host, _, _ in answers)} differ in the code in {ROOT}: put one "
                         "version on all, best on the shared file system")  # fmt: skip


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


# ---- 4. Runs -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """Programs to run in the folder of a run."""

    folder: Path
    commands: list
    total: int  # environment steps
    steps: int = 0  # how many there are
    state: str = "waiting"  # for a place or for a retry, running, finished, failed
    attempt: int = 0
    due: float = 0.0  # not to be submitted before this, time.monotonic()
    log_size: int = 0  # of sweep.log when it was submitted


def commands(folder, config, options, device, references):
    """The programs that a run still needs: train.py, evaluate.py.

    references  evaluate.py also says what the random policy earns: one run of a task is enough
    """
    train, remove = not finished(folder, config), ["--remove", "workspace"] * (config.task == "table_wiping")
    with suppress(OSError, ValueError):
        asked = json.loads(json.dumps(asdict(evaluate.Options((), episodes=options.episodes, remove=(*remove[1:],)))))
        done = asked | json.loads((folder / "evaluation.json").read_text())["options"]  # an older one lacks new options
        free = "runs sensors calibration references output video device".split()  # add to what is asked, or tell where
        same = all(done[x] == asked[x] for x in asked if x not in free) and done["references"] >= references
        newer = (folder / "evaluation.json").stat().st_mtime >= (folder / "checkpoint.pt").stat().st_mtime
        if not train and newer and same:
            return []
    evaluation = [str(ROOT / "evaluate.py"), str(folder), "--episodes", str(options.episodes), "--device", device,
                  "--references" if references else "--no-references", *remove]  # fmt: skip
    return [[str(ROOT / "train.py"), "--resume", str(folder)]] * train + [evaluation]


def look(job):
    """See from a submitted job's files whether it runs, and how far it is."""
    log, metrics = job.folder / "sweep.log", job.folder / "metrics.jsonl"
    if job.attempt and job.state == "waiting" and log.exists() and log.stat().st_size > job.log_size:
        job.state = "running"
    if metrics.exists():
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - 16384))
            for line in file.read().splitlines():
                with suppress(ValueError):  # half a line
                    job.steps = json.loads(line)["steps"]


def status(jobs, start):
    """One line: how many jobs are in which state, how many steps they have, and how long the rest takes.

    start  the moment and the steps when this began
    """
    counts, steps, total = Counter(job.state for job in jobs), sum(j.steps for j in jobs), sum(j.total for j in jobs)
    hours = (time.monotonic() - start[0]) / 3600 / max(steps - start[1], 1) * (total - steps)
    return (", ".join(f"{count} {state}" for state, count in sorted(counts.items())) +
            f"; {steps:,} of {total:,} environment steps" + f", {hours:.1f} h left" * (steps > start[1]))  # fmt: skip


def work(ray, jobs, gpus, cpus, retries):
    """Do all jobs, each with so many retries. Returns those that failed. Raises Stopped after a signal to stop."""
    task = ray.remote(execute).options(num_gpus=gpus, num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")
    for job in jobs:
        look(job)
    tasks, said, start = {}, 0.0, (time.monotonic(), sum(job.steps for job in jobs))
    with StopSignals() as stop:
        try:
            while any(job.state in ("waiting", "running") for job in jobs):
                for job in jobs:
                    if job.state == "waiting" and job not in tasks.values() and time.monotonic() >= job.due:
                        log = job.folder / "sweep.log"
                        job.attempt, job.log_size = job.attempt + 1, log.stat().st_size if log.exists() else 0
                        tasks[task.remote(job.commands, job.folder, cpus, job.attempt)] = job
                if not tasks:  # all wait for their retries
                    time.sleep(1)
                ready = ray.wait([*tasks], timeout=1)[0] if tasks else []
                for job in tasks.values():
                    look(job)
                for ref in ready:
                    say(settle(ray, tasks.pop(ref), ref, retries))
                if time.monotonic() > said + 60:
                    say(status(jobs, start))
                    said = time.monotonic()
                stop.check()
        except Stopped as error:
            for ref in tasks:
                ray.cancel(ref)
            ray.wait([*tasks], num_returns=len(tasks), timeout=GRACE + 30)
            error.args = (f"stopped by {signal.Signals(error.number).name}; go on with the same command",)
            raise
    return [job.folder for job in jobs if job.state == "failed"]


def settle(ray, job, ref, retries):
    """Note how a job's task ended: finished, failed for good, or waiting for a retry. Returns a line that says so."""
    try:
        code, last = ray.get(ref)
        reason = f"exit code {code}, {last}"
    except ray.exceptions.RayError as error:  # its worker or node died, or memory was short
        code, reason = -1, (str(getattr(error, "cause", None) or error).splitlines() or [type(error).__name__])[0]
    job.state = "finished" if code == 0 else "failed" if job.attempt > retries else "waiting"
    job.due = time.monotonic() + min(2.0**job.attempt, 60)
    then = {"finished": "finished", "failed": f"{reason}; given up",
            "waiting": f"{reason}; attempt {job.attempt + 1} of {retries + 1} follows"}  # fmt: skip
    return f"{job.folder.name}: {then[job.state]}"


# ---- 5. The command ------------------------------------------------------------------------------


def write_results(configs, folder):
    """Table I (or II) and Fig. 5 of the runs, by evaluate.py and tools.plot, beside their folder."""
    reports = [json.loads((run / "evaluation.json").read_text()) for run in configs]
    records = [record for report in reports for record in report["records"]]
    references = {task: returns for report in reports for task, returns in report["references"].items()}
    text = evaluate.markdown(evaluate.pool(records), references)
    Path(f"{folder}-table.md").write_text(text)
    say(text)
    plot.main(plot.Options(runs=tuple(map(str, configs)), output=f"{folder}-curves"))
    say(f"{folder}-table.md, {folder}-curves.png and .svg: {len(configs)} runs; next: tensorboard --logdir {folder}")


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
        first = {config.task: folder for folder, config in reversed(configs.items())}.values()
        jobs = [Job(f, commands(f, c, options, device, f in first), c.steps) for f, c in configs.items()]
        failed = work(ray, [job for job in jobs if job.commands], gpus, cpus, options.retries)
    if len(failed) < len(configs):
        write_results({folder: config for folder, config in configs.items() if folder not in failed}, runs)
    if failed:
        raise Fault(f"{len(failed)} of {len(configs)} runs failed: {', '.join(folder.name for folder in failed)}; each "
                    "says why in its sweep.log, and the same command tries again")  # fmt: skip
    return None


if __name__ == "__main__":
    try:
        main(*tyro.cli(Options, prog="python -m tools.sweep", description=__doc__, return_unknown_args=True))
    except (Exception, KeyboardInterrupt) as error:
        fail("tools.sweep", error)
