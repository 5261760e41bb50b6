"""Evaluate trained runs with sensors missing: `python evaluate.py runs/finger_spin-mummi-*`.

Every run acts for 10 episodes at each missing rate of the paper (None 0 %, Medium 37.5 %, High 75 %;
Table Wiping has no High) on backgrounds it has not seen, without exploration. Runs of one task and
method are pooled over their seeds. The table shows ours and, in brackets, the paper's. It is printed
and written to `<output>.md`, `.csv` (a line a seed) and `.json` (every episode).

    python evaluate.py runs/toy-mummi-1                         # Table I: the paper's three rates
    python evaluate.py runs/table_wiping-* --remove workspace   # Table II: all sensors, then without one
    python evaluate.py runs/* --sensors all --calibration       # every subset of the sensors, and why
"""

import csv
import itertools
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from train import fail, make_agent, run_episodes, seeds, to_device  # isort: skip (before torch, whose threads it quiets)

import numpy as np
import torch
import tyro

import envs as environments
import wiping
from config import make_config
from methods import METHODS
from pictures import write_video
from runs import load_checkpoint

RATES = {"None": 0.0, "Medium": 0.375, "High": 0.75}  # Table I
TABLE_II = ("Medium", "None")
PAPER = Path(__file__).parent / "results" / "paper.json"
MAY_DIFFER = set("task method seed name resume device deterministic cuda_graphs num_envs log_every eval_every "
                 "eval_episodes".split())


@dataclass
class Options:
    """What to evaluate, and on what."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs; a shell's glob gives many
    episodes: int = 10  # of each run at each missing rate
    rates: tuple[str, ...] = ()  # among None, Medium, High; by default those of the task's table
    remove: tuple[str, ...] = ()  # repeat with these sensors gone for good
    sensors: str = ""  # "all": repeat with every non-empty subset of the sensors
    calibration: bool = False  # also say how far the experts agree
    references: bool = True  # also what the random and the scripted policy earn
    seed: int = 1000  # of the episodes, the same for every run
    output: str = ""  # file name without suffix; by default <run>/evaluation, for several runs ./evaluation
    randomize: bool = False  # table_wiping with domain randomisation, as in training
    video: bool = False  # write <output>-<rate>.mp4, the first episode: sensors, actions, reward
    device: str = "auto"  # auto, cpu or cuda


# ---- 1. Episodes ---------------------------------------------------------------------------------


def sensor_subsets(options, sensors):
    """The sets of sensors to keep, each a tuple of names. Raises ValueError where none is left."""
    unknown = set(options.remove) - set(sensors)
    kept = tuple(name for name in sensors if name not in options.remove)
    if unknown or not kept:
        raise ValueError(f"--remove {' '.join(options.remove)}: choose some of {', '.join(sensors)}, but not all")
    if options.sensors != "all":
        return [tuple(sensors), kept] if options.remove else [kept]
    return [s for size in range(len(kept), 0, -1) for s in itertools.combinations(kept, size)]


def evaluate_run(folder, config, agent, steps, options):
    """Episodes of one run. Returns records, a dictionary for each missing rate and set of sensors.

    steps  environment steps that the agent was trained for
    """
    space = environments.make_env(config.task).observation_space
    sensors = [name for name in space if name != "present"]
    rates, records = options.rates or (TABLE_II if config.task == "table_wiping" else tuple(RATES)), []
    episode_seeds = seeds(options.seed, count=options.episodes)
    for kept, rate in itertools.product(sensor_subsets(options, sensors), rates):
        torch.manual_seed(options.seed)
        returns, seen = np.empty(0), None
        while len(returns) < options.episodes:  # ten at a time: each has a process of its own
            ten = episode_seeds[len(returns) :][:10]
            envs = environments.make_vector_env(
                config.task, len(ten), missing_rate=RATES[rate],
                backgrounds=config.backgrounds, split="eval", randomize=options.randomize,
                remove=tuple(set(sensors) - set(kept)),
            )  # fmt: skip
            more, what = run_episodes(agent, envs, ten)
            returns, seen = np.append(returns, more), seen or what
            envs.close()
        records.append({
            "run": str(folder), "task": config.task, "method": config.method, "seed": config.seed, "steps": steps,
            "missing": rate, "sensors": "+".join(kept), "returns": returns.tolist(),
        })  # fmt: skip
        if options.calibration and config.method in ("mummi", "mummi_b", "mssm_e") and len(kept) > 1:
            records[-1]["calibration"] = calibration(agent, seen, kept)
        if options.video:
            path = output_path(options)
            which = [rate] if len(kept) == len(sensors) else [rate, *kept]
            if len(options.runs) > 1:
                which.insert(0, Path(folder).name)
            write_video(path.with_name("-".join([path.name, *which]) + ".mp4"), seen)
    return records


@torch.no_grad()
def calibration(agent, seen, kept):
    """How far the experts agree over evaluation episodes: why a method is robust, or is not.

    seen     observations, one dictionary of (B, ...) a step
    returns  {"log_std": {sensor: mean log standard deviation of its expert},
              "share": {sensor: its weight in the product where all are present},
              "rank": {"a -> b": median rank of the matching step, by distance between the means},
              "steps": how many have all sensors}; None if none has
    """
    stacked = {name: np.stack([step[name] for step in seen]) for name in seen[0]}
    stacked = {name: x[:, : max(1, 2500 // len(seen))] for name, x in stacked.items()}  # about 2,500 steps
    observation = to_device(stacked, agent.device)
    present = observation.pop("present").movedim(-1, 0).bool()  # (M, T, B)
    model = agent.model
    fused = model.fuse(model.encode(observation), present)
    names = list(model.modalities)
    every = present[[names.index(name) for name in kept]].all(0)  # (T, B)
    if not every.any():
        return None
    precision = fused.expert_std.pow(-model.expert_power).mean(-1) * present  # (M, T, B)
    share = (precision / precision.sum(0).clamp(min=1e-9))[:, every].mean(1)
    mean = {name: fused.expert_mean[names.index(name)][every] for name in kept}  # (N, D_f)
    return {
        "log_std": {n: float(fused.expert_std[names.index(n)][present[names.index(n)]].log().mean()) for n in kept},
        "share": {n: float(share[names.index(n)]) for n in kept},
        "rank": {f"{a} -> {b}": matching_rank(mean[a], mean[b]) for a, b in itertools.permutations(kept, 2)},
        "steps": int(every.sum()),
    }  # fmt: skip


def matching_rank(mean_a, mean_b):
    """Median rank of the same step among all steps, by distance from a's mean to b's: 1 is best.

    mean_a, mean_b  (N, D_f)
    """
    distance = torch.cdist(mean_a, mean_b, compute_mode="donot_use_mm_for_euclid_dist")  # exact, also on a GPU
    return float((distance <= distance.diagonal().unsqueeze(1)).sum(1).median())


def reference_returns(task, episodes, seed):
    """Returns of the random and, where there is one, of the scripted policy, episodes each."""
    policies = {"random": lambda env, info, rng: rng.uniform(-1, 1, env.action_space.shape)}
    if task in environments.TOY:
        policies["scripted"] = lambda env, info, rng: environments.scripted_toy_action(info["position"])
    if task == "table_wiping":
        policies["scripted"] = lambda env, info, rng: wiping.scripted_action(info)
    env, returns = environments.make_env(task, split="eval"), defaultdict(list)
    for name, policy in policies.items():
        rng = np.random.default_rng(seed)
        for episode_seed in seeds(seed, count=episodes):
            env.reset(seed=episode_seed)
            world, total = env.world, 0.0  # stepped by itself: neither policy looks, so nothing is to be drawn
            for _ in range(env.episode_steps):
                total += world.step(policy(env, world.info, rng).astype(np.float32))
                if world.terminated:
                    break
            returns[name].append(total)
    env.close()
    return dict(returns)


# ---- 2. Tables -----------------------------------------------------------------------------------


def check_comparable(configs):
    """Raises ValueError where two runs of a task differ in more than method and seed, or not even in these.

    configs  {folder: Config}
    """
    first, seen = {}, {}
    for folder, config in configs.items():
        other = first.setdefault(config.task, folder)
        for name, value in asdict(config).items():
            expected = getattr(configs[other], name)
            if name not in MAY_DIFFER and value != expected:
                raise ValueError(f"{other} and {folder} differ in {name}, {expected} and {value}: evaluate them apart")
        run = config.task, config.method, config.seed
        if run in seen:
            raise ValueError(f"{seen[run]} and {folder} are both {run[0]}, {run[1]}, seed {run[2]}: leave one out")
        seen[run] = folder


def pool(records):
    """Records pooled over runs: {(task, sensors, missing): {method: {mean, std, episodes, seeds, steps}}}."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["task"], record["sensors"], record["missing"]][record["method"]].append(record)
    cells = {}
    for row, methods in groups.items():
        cells[row] = {}
        for method, group in methods.items():
            returns = np.concatenate([record["returns"] for record in group])
            cells[row][method] = {
                "mean": float(returns.mean()), "std": float(returns.std()), "episodes": len(returns),
                "seeds": len({record["seed"] for record in group}), "steps": {record["steps"] for record in group},
            }  # fmt: skip
    return cells


def paper_cell(task, sensors, missing, method):
    """[mean, std] of Table I, or of Table II for table_wiping; None where the paper has none."""
    paper = json.loads(PAPER.read_text())
    if task == "table_wiping":
        return paper["Table II"].get(sensors, {}).get(missing, {}).get(method)
    if sensors != "rgb+depth+touch":  # Table I removes none
        return None
    return paper["Table I"].get(task, {}).get(missing, {}).get(method)


def markdown(cells, references):
    """The pooled records as a Markdown table, one column a method, the best of a row in bold."""
    methods = [method for method in METHODS if any(method in row for row in cells.values())]  # the paper's order
    lines = [
        "| task | sensors | missing | " + " | ".join(methods) + " |",
        "|---|---|---|" + "---|" * len(methods),
    ]
    for (task, sensors, missing), row in cells.items():
        best = max(cell["mean"] for cell in row.values())
        texts = []
        for method in methods:
            if method not in row:
                texts.append("")
                continue
            text = f"{row[method]['mean']:.1f} ± {row[method]['std']:.1f}"
            text = f"**{text}**" if row[method]["mean"] == best and len(row) > 1 else text
            paper = paper_cell(task, sensors, missing, method)
            texts.append(text + (f" [{paper[0]} ± {paper[1]}]" if paper else ""))
        lines.append(f"| {task} | {sensors} | {missing} | " + " | ".join(texts) + " |")
    counts = {(c["seeds"], c["episodes"]) for row in cells.values() for c in row.values()}
    counted = "; ".join(f"{s} seed{'s' * (s > 1)}, {e} episodes" for s, e in sorted(counts))
    steps = sorted(set().union(*(cell["steps"] for row in cells.values() for cell in row.values())))
    trained = " or ".join(f"{s:,}" for s in steps) + " environment steps of training."
    lines += ["", f"Mean ± standard deviation over episodes; the paper's in brackets. {counted} per cell. {trained}"]
    for task, policies in references.items():
        for name, returns in policies.items():
            lines.append(f"The {name} policy earns {np.mean(returns):.1f} ± {np.std(returns):.1f} on {task}.")
    return "\n".join(lines) + "\n"


def calibration_markdown(records):
    """One line a record that was calibrated."""
    lines = ["", "| run | missing | sensors | mean log std | share of the precision | rank of the matching step |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        if c := record.get("calibration"):
            texts = [", ".join(f"{name} {value:.2f}" for name, value in c[key].items()) for key in ("log_std", "share")]
            texts.append(", ".join(f"{name} {value:.0f}" for name, value in c["rank"].items()) + f" of {c['steps']}")
            lines.append(f"| {record['run']} | {record['missing']} | {record['sensors']} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def output_path(options):
    """Where the tables go, without suffix."""
    return Path(options.output or (Path(options.runs[0]) / "evaluation" if len(options.runs) == 1 else "evaluation"))


# ---- 3. The command ------------------------------------------------------------------------------


def main(options):
    """Evaluate all runs, print the table and write it. Raises ValueError on bad input."""
    if options.episodes < 1:
        raise ValueError(f"--episodes {options.episodes} is not allowed: give at least 1")
    if not set(options.rates) <= set(RATES):
        raise ValueError(f"--rates {' '.join(options.rates)}: choose among {', '.join(RATES)}")
    if options.sensors not in ("", "all"):
        raise ValueError(f"--sensors {options.sensors} is unknown: give all, or leave it out")
    checkpoints = {folder: load_checkpoint(folder) for folder in options.runs}
    configs = {folder: make_config(state["config"], folder) for folder, state in checkpoints.items()}
    check_comparable(configs)

    records = []
    for folder, config in configs.items():
        env = environments.make_env(config.task)
        agent = make_agent(replace(config, device=options.device), env.observation_space, env.action_space.shape[0])
        agent.load_state_dict(checkpoints[folder]["agent"])
        steps = checkpoints[folder]["steps"]
        print(f"{folder}: step {steps}", file=sys.stderr)
        records += evaluate_run(folder, config, agent, steps, options)
    tasks = dict.fromkeys(config.task for config in configs.values()) if options.references else {}
    references = {task: reference_returns(task, options.episodes, options.seed) for task in tasks}

    cells = pool(records)
    table = markdown(cells, references) + calibration_markdown(records)
    print(table, end="")
    path = output_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".md").write_text(table)
    report = {"options": asdict(options), "records": records, "references": references}
    path.with_name(path.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    with open(path.with_name(path.name + ".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("task method seed steps sensors missing mean std episodes".split())
        for r in records:
            returns = np.array(r["returns"])
            row = [r["task"], r["method"], r["seed"], r["steps"], r["sensors"], r["missing"]]
            writer.writerow([*row, round(returns.mean(), 2), round(returns.std(), 2), len(returns)])


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (Exception, KeyboardInterrupt) as error:
        fail("evaluate.py", error)
