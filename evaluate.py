"""Evaluate trained runs with sensors missing: `python evaluate.py runs/finger_spin-mummi-*`.

Every run acts for 10 episodes at each missing rate of the paper (None 0 %, Medium 37.5 %, High 75 %;
Table Wiping has no High) on backgrounds it has not seen, without exploration. Runs of one task and
method are pooled over their seeds. The table shows ours and, in brackets, the paper's. It is printed
and written to `<output>.md`, `.csv` (each run and condition) and `.json` (every episode).

    python evaluate.py runs/toy-mummi-1                         # Table I: the paper's three rates
    python evaluate.py runs/toy-mummi-1 --video                 # and a film at each of them
    python evaluate.py runs/table_wiping-* --remove workspace   # Table II: all sensors, then without one
    python evaluate.py runs/* --sensors all --calibration       # every subset of the sensors; how experts agree
    python evaluate.py runs/* --faults all --trust              # sensors that lie, and what the rule of trust.py does
"""

import csv
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

import envs as environments
import wiping
from checkpoint import check_backgrounds, fail, load_checkpoint, only_runs, say
from config import check_comparable, make_config, sensing, to_act
from envs import seeds
from fast import restart_with_quiet_threads
from methods import METHODS, choose_device, make_agent
from pictures import SIDE, square, write_video
from trust import RATES as FALSE_ALARMS, Trust

RATES = {"None": 0.0, "Medium": 0.375, "High": 0.75}  # section V, Table I
TABLE_II = ("Medium", "None")
PAPER = Path(__file__).parent / "results" / "paper.json"


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
    output: str = ""  # file name without suffix; default: <run>/evaluation, ./<weights>-evaluation, or ./evaluation
    randomize: bool = False  # table_wiping with domain randomisation, as in training
    video: bool = False  # write <output>-<rate>.mp4, the first episode: world, sensors, actions, reward
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    label: tuple[str, ...] = ()  # options in which runs differ, told in the table, like free_nats
    act_by: str = ""  # mode or sample; by default the run's own.  Dev. D12
    missing_process: str = "exact"  # exact or released, see Dev. D7
    backgrounds: str = ""  # another path to the backgrounds; by default the run's own
    faults: tuple[str, ...] = ()  # that nobody flags: all, black (of each sensor in turn), camera=black,position=noise
    fault_rate: float = 0.5  # share of a faulty sensor's readings, in [0, 1)
    trust: bool = False  # repeat with the readings dropped that trust.py does not believe
    false_alarms: float = 0.005  # share of honest readings that each of its tests may drop


# ---- 1. Episodes ---------------------------------------------------------------------------------


def to_device(x, device):
    """NumPy arrays in nested dictionaries as tensors on the device."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    return torch.as_tensor(x).to(device)


def act(agent, memory, observation, first, explore):
    """`Agent.act` for a vector environment's observation; the action as a NumPy array (B, A)."""
    observation = to_device(observation, agent.device)
    present = observation.pop("present")
    action, memory = agent.act(memory, observation, present, to_device(first, agent.device), explore=explore)
    return action.float().cpu().numpy(), memory


def run_episodes(agent, envs, episode_seeds, check=lambda: None, film=False, trust=None):
    """One episode in each environment, from the seed given for it, without exploration or learning.

    check    called at every step: it may raise
    film     render the first environment at every step, if it can be rendered; changes nothing else
    trust    a `trust.Trust`: the agent is given only what it believes
    returns  returns (num_envs,), and what the agents saw, did and got, one dictionary of (num_envs, ...) a step,
             with the picture `rendered` of the first; with `lying`, and `trusted` and `suspicion` of each sensor
    """
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):  # training's generator stays
        torch.manual_seed(episode_seeds[0])
        observation, info = envs.reset(seed=episode_seeds)
        memory, total = agent.initial_memory(envs.num_envs), np.zeros(envs.num_envs)
        first, running = np.ones(envs.num_envs, bool), np.ones(envs.num_envs, bool)
        seen = []
        while running.any():
            check()
            seen.append({**observation, "lying": info.get("lying", 0 * observation["present"])})
            if trust:
                tensors = to_device(observation, agent.device)
                trusted = trust(memory, tensors, tensors.pop("present"), to_device(first, agent.device))
                observation["present"] = trusted.cpu().numpy().astype(np.int8)
                seen[-1] |= {"trusted": observation["present"], "suspicion": trust.suspicion.cpu().numpy()}
            action, memory = act(agent, memory, observation, first, explore=False)
            seen[-1]["action"] = action
            if film and (picture := envs.call("view", episode_seeds[0])[0]) is not None:
                seen[-1]["rendered"] = square(picture, SIDE)
            observation, reward, terminated, truncated, info = envs.step(action)
            seen[-1] |= {"reward": np.where(running, reward, np.nan), "continues": 1.0 - terminated}
            total += reward * running
            running &= ~(terminated | truncated)
            first = np.zeros(envs.num_envs, bool)
    return total, seen


def sensor_subsets(options, sensors):
    """The sets of sensors to keep, each a tuple of names. Raises ValueError where none is left."""
    unknown = set(options.remove) - set(sensors)
    kept = tuple(name for name in sensors if name not in options.remove)
    if unknown or not kept:
        raise ValueError(f"--remove {' '.join(options.remove)}: choose some of {', '.join(sensors)}, but not all")
    if options.sensors != "all":
        return [tuple(sensors), kept] if options.remove else [kept]
    return [s for size in range(len(kept), 0, -1) for s in itertools.combinations(kept, size)]


def faults_to_try(options, modalities):
    """List the faults to try, each {sensor: fault}, none first. modalities {name: shape}. ValueError if impossible."""
    faults, every = [{}], [(name, fault) for name in modalities for fault in environments.FAULTS]
    every = [(name, fault) for name, fault in every if fault != "occluded" or len(modalities[name]) == 3]
    for text in options.faults:
        alone = [{name: fault} for name, fault in every if text in ("all", fault)]
        pairs = [tuple(pair.split("=")) for pair in text.split(",")]
        if not alone and not set(pairs) <= set(every):
            raise ValueError(f"--faults {text}: give all, one of {', '.join(environments.FAULTS)}, or some like "
                             f"{'='.join(every[0])}; sensors are {', '.join(modalities)}, and vectors have no "
                             "occluded")  # fmt: skip
        faults += alone or [dict(pairs)]
    return [fault for i, fault in enumerate(faults) if fault not in faults[:i]]


def evaluate_run(folder, config, agent, steps, options, usual=None):
    """Episodes of one run. Returns records, a dictionary for each missing rate, set of sensors, fault, trust.

    steps  environment steps that the agent was trained for
    usual  from `trust.measure`: repeat each condition with `Trust`
    """
    sensors, records = list(agent.model.modalities), []
    rates = options.rates or (TABLE_II if config.task == "table_wiping" else ("None",) if options.faults else RATES)
    conditions = itertools.product(sensor_subsets(options, sensors), rates,
                                   faults_to_try(options, agent.model.modalities), (False, True))  # fmt: skip
    for kept, rate, faults, trusting in conditions:
        if trusting and not usual or not set(faults) <= set(kept):
            continue
        trust = Trust(agent.model, usual, options.false_alarms) if trusting else None
        returns, seen = evaluate_condition(config, agent, options, kept, rate, faults, trust)
        records.append({
            "run": str(folder), "task": config.task, "method": config.method, "seed": config.seed, "steps": steps,
            "missing": rate, "sensors": "+".join(kept), "returns": returns.tolist(),
            "fault": ",".join(map("=".join, faults.items())), "trust": trusting,
        })  # fmt: skip
        if trusting:
            records[-1]["detection"] = {name: detection(seen, sensors.index(name)) for name in faults or kept}
        if options.calibration and agent.model.fusion == "product" and len(kept) > 1:
            records[-1]["calibration"] = calibration(agent, seen[0], kept)
        if options.video:
            path = output_path(options)
            which = [Path(folder).name, rate] if len(options.runs) > 1 else [rate]
            which += [*map("=".join, faults.items()), *kept * (len(kept) < len(sensors)), *["trust"] * trusting]
            write_video(path.with_name("-".join([path.name, *which]) + ".mp4"), seen[0])
    return records


def evaluate_condition(config, agent, options, kept, rate, faults, trust):
    """Returns (episodes,) of one condition, and what was seen, a list of steps for each ten episodes."""
    episode_seeds, returns, seen = seeds(options.seed, count=options.episodes), np.empty(0), []
    shared = sensing(config) | {"missing_rate": RATES[rate], "missing_process": options.missing_process}
    shared |= {"backgrounds": options.backgrounds} if options.backgrounds else {}
    while len(returns) < options.episodes:  # ten at a time: each has a process of its own
        ten = episode_seeds[len(returns) :][:10]
        envs = environments.make_vector_env(
            config.task, len(ten), split="eval", randomize=options.randomize, faults=faults,
            fault_rate=options.fault_rate, remove=tuple(set(agent.model.modalities) - set(kept)), **shared,
        )  # fmt: skip
        more, what = run_episodes(agent, envs, ten, film=options.video and not seen, trust=trust)
        returns, seen = np.append(returns, more), [*seen, what]
        envs.close()
    return returns, seen


def detection(seen, m):
    """How well the lies of sensor m were found: seen as for `evaluate_condition`, with a `Trust`.

    returns  {"lies": share dropped, "honest": share dropped, "delay": mean steps to the first drop of a segment
              in which there is one, "found": share of these, "area": under the ROC curve of the suspicion,
              "roc": [[honest readings above a threshold, lies above it], ...]}; NaN where there are none
    """
    told, segments = [], []  # (suspicion, trusted, lying) of a reading; [trusted, ...] of a segment of lies
    for steps in seen:
        for b in range(len(steps[0]["reward"])):
            here = [step for step in steps if step["present"][b, m] and not np.isnan(step["reward"][b])]
            readings = [(step["suspicion"][b, m], step["trusted"][b, m], bool(step["lying"][b, m])) for step in here]
            for lying, segment in itertools.groupby(readings, lambda reading: reading[2]):
                segments += [[trusted for _, trusted, _ in segment]] if lying else []
            told += readings
    suspicion, trusted, lying = np.reshape(told, (-1, 3)).T
    lies, honest, lying = suspicion[lying > 0], suspicion[lying == 0], lying > 0
    delays = [segment.index(0) for segment in segments if 0 in segment]
    share = lambda x: float(np.mean(x)) if len(x) else math.nan  # noqa: E731
    edges = np.unique(np.quantile(suspicion, np.linspace(0, 1, 101), method="lower"))[::-1] if told else []
    roc = [[share(honest >= edge), share(lies >= edge)] for edge in edges]
    ranks = np.searchsorted(np.sort(honest), lies, "left") + np.searchsorted(np.sort(honest), lies, "right")
    return {
        "lies": share(trusted[lying] == 0), "honest": share(trusted[~lying] == 0), "delay": share(delays),
        "found": len(delays) / len(segments) if segments else math.nan,
        "area": share(ranks / (2 * max(1, len(honest)))), "roc": roc,
    }  # fmt: skip


@torch.no_grad()
def calibration(agent, seen, kept):
    """How far the experts agree over evaluation episodes: why a method is robust, or is not.

    seen     observations, one dictionary of (B, ...) a step
    returns  {"log_std": {sensor: mean log standard deviation of its expert},
              "share": {sensor: its weight in the product where all are present},
              "rank": {"a -> b": median rank of the matching step, by distance between the means},
              "steps": how many have all sensors}; None if none has
    """
    stacked = {name: np.stack([step[name] for step in seen]) for name in seen[0] if name != "rendered"}
    stacked = {name: x[:, : max(1, 2500 // len(seen))] for name, x in stacked.items()}  # about 2,500 steps
    observation = to_device(stacked, agent.device)
    present, model = observation.pop("present").bool(), agent.model  # (T, B, M)
    fused = model.fuse(model.encode(observation, present), present)
    column = {name: m for m, name in enumerate(model.modalities)}
    every = present[..., [column[name] for name in kept]].all(-1)  # (T, B)
    if not every.any():
        return None
    share = model.expert_shares(fused, present)[every].mean(0)  # (M,)
    mean = {name: fused.expert_mean[..., column[name], :][every] for name in kept}  # (N, D_f)
    log_std = fused.expert_std.log().mean(-1)  # (T, B, M)
    return {
        "log_std": {n: float(log_std[..., column[n]][present[..., column[n]]].mean()) for n in kept},
        "share": {n: float(share[column[n]]) for n in kept},
        "rank": {f"{a} -> {b}": matching_rank(mean[a], mean[b]) for a, b in itertools.permutations(kept, 2)},
        "steps": int(every.sum()),
    }  # fmt: skip


def matching_rank(mean_a, mean_b):
    """Median rank of the same step among all steps, by distance from a's mean to b's: 1 is best.

    mean_a, mean_b  (N, D_f)
    """
    distance = torch.cdist(mean_a, mean_b, compute_mode="donot_use_mm_for_euclid_dist")  # exact, also on a GPU
    return float((distance <= distance.diagonal().unsqueeze(1)).sum(1).median())


def reference_returns(config, episodes, seed):
    """Returns of the random and, where there is one, of the scripted policy on a run's task, episodes each."""
    task, task_kwargs = config.task, sensing(config).get("task_kwargs")
    policies = {"random": lambda env, info, rng: rng.uniform(-1, 1, env.action_space.shape)}
    if task in environments.TOY:
        policies["scripted"] = lambda env, info, rng: environments.scripted_toy_action(info["position"])
    if task == "table_wiping":
        policies["scripted"] = lambda env, info, rng: wiping.scripted_action(info)
    env, returns = environments.make_env(task, split="eval", task_kwargs=task_kwargs).env, defaultdict(list)
    env.wanted = ()  # neither policy looks, so nothing is rendered
    for name, policy in policies.items():
        rng = np.random.default_rng(seed)
        for episode_seed in seeds(seed, count=episodes):
            (_, info), total, over = env.reset(seed=episode_seed), 0.0, False
            while not over:
                _, reward, terminated, truncated, info = env.step(policy(env, info, rng).astype(np.float32))
                total, over = total + reward, terminated or truncated
            returns[name].append(float(total))
    env.close()
    return dict(returns)


# ---- 2. Tables -----------------------------------------------------------------------------------


def pool(records):
    """Records pooled over runs: {(task, sensors, missing): {column: {mean, std, episodes, seeds, ...}}}.

    A column is a method, and what --label says of its runs.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        trust = "trust" if record.get("trust") else ""
        column = ", ".join(filter(None, (record["method"], record.get("label"), trust)))
        missing = ", ".join(filter(None, (record["missing"], record.get("fault"))))
        groups[record["task"], record["sensors"], missing][column].append(record)
    cells = {}
    for row, methods in groups.items():
        cells[row] = {}
        for method, group in methods.items():
            returns = np.concatenate([record["returns"] for record in group])
            cells[row][method] = {
                "mean": float(returns.mean()), "std": float(returns.std()), "episodes": len(returns),
                "seeds": {record["seed"]: float(np.mean(record["returns"])) for record in group},  # {seed: its mean}
                "steps": {record["steps"] for record in group}, "parameters": group[0].get("parameters"),
            }  # fmt: skip
    return cells


def paper_cell(task, sensors, missing, method):
    """[mean, std] of Table I, or of Table II for table_wiping; None where the paper has none."""
    paper = json.loads(PAPER.read_text())
    of_table_i = paper["Table I"].get(task, {}) if sensors == "rgb+depth+touch" else {}  # which has all sensors
    rows = paper["Table II"].get(sensors, {}) if task == "table_wiping" else of_table_i
    return rows.get(missing, {}).get(method)


def markdown(cells, references, made_with=None):
    """The pooled records as a Markdown table, one column a method; `made_with` {option: value} is told below it."""
    order = list(METHODS)  # the paper's
    methods = sorted({c for row in cells.values() for c in row}, key=lambda c: (order.index(c.split(",")[0]), c))
    lines = ["| task | sensors | missing | " + " | ".join(methods) + " |", "|---|---|---|" + "---|" * len(methods)]
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
    counts = {(len(c["seeds"]), c["episodes"]) for row in cells.values() for c in row.values()}
    counted = "; ".join(f"{s} seed{'s' * (s > 1)}, {e} episodes" for s, e in sorted(counts))
    steps = sorted(set().union(*(cell["steps"] for row in cells.values() for cell in row.values())))
    trained = " or ".join(f"{s:,}" for s in steps) + " environment steps of training."
    trained += " Made with " + " ".join(f"{name} {x}" for name, x in made_with.items()) + "." if made_with else ""
    lines += ["", f"Mean ± standard deviation over episodes; the paper's in brackets. {counted} per cell. {trained}"]
    for task, policies in references.items():
        for name, returns in policies.items():
            lines.append(f"The {name} policy earns {np.mean(returns):.1f} ± {np.std(returns):.1f} on {task}.")
    lines += ["", "Mean of every seed, in order of the seeds; below, parameters of the world model.", "", *lines[:2]]
    for row, columns in cells.items():
        means = ([m for _, m in sorted(columns[c]["seeds"].items())] if c in columns else [] for c in methods)
        lines.append("| " + " | ".join([*row, *(", ".join(f"{m:.1f}" for m in group) for group in means)]) + " |")
    sizes = [sorted({row[c].get("parameters") or 0 for row in cells.values() if c in row}) for c in methods]
    lines.append("| parameters | | | " + " | ".join(" or ".join(f"{n:,}" for n in of) for of in sizes) + " |")
    return "\n".join(lines) + "\n"


def detection_markdown(records):
    """One line a record and faulty sensor that `Trust` watched."""
    lines = ["", "| run | missing | fault | sensor | ROC area | lies dropped | honest dropped | segments | delay |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        for name, d in record.get("detection", {}).items():
            lines.append(f"| {record['run']} | {record['missing']} | {record['fault'] or 'none'} | {name} | "
                         f"{d['area']:.3f} | {d['lies']:.1%} | {d['honest']:.1%} | {d['found']:.0%} | "
                         f"{d['delay']:.1f} |")  # fmt: skip
    return "\n".join(lines).replace(" nan% |", " |").replace(" nan |", " |") + "\n" if len(lines) > 3 else ""


def calibration_markdown(records):
    """One line a record that was calibrated."""
    lines = ["", "| run | missing | sensors | mean log std | share of the precision | rank of the matching step |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        if c := record.get("calibration"):
            texts = [", ".join(f"{name} {value:.2f}" for name, value in c[key].items()) for key in ("log_std", "share")]
            ranks = (f"{name} {r:.0f} ({r / c['steps']:.1%})" for name, r in c["rank"].items())
            texts.append(", ".join(ranks) + f" of {c['steps']}")
            lines.append(f"| {record['run']} | {record['missing']} | {record['sensors']} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def output_path(options):
    """Where the tables go, without suffix."""
    run, several = Path(options.runs[0]), len(options.runs) > 1  # not in runs/: runs/* are runs
    own = "evaluation" if several else f"{run.stem}-evaluation" if run.is_file() else run / "evaluation"
    output = Path(options.output or own)
    return output.with_suffix("") if output.suffix in (".md", ".csv", ".json") else output


# ---- 3. The command ------------------------------------------------------------------------------


def check(options):
    """Raises ValueError on bad input, before anything runs."""
    if options.episodes < 1:
        raise ValueError(f"--episodes {options.episodes} is not allowed: give at least 1")
    if not set(options.rates) <= set(RATES) or len(set(options.rates)) < len(options.rates):
        raise ValueError(f"--rates {' '.join(options.rates)}: choose among {', '.join(RATES)}, each once")
    choices = {"sensors": ("", "all"), "act_by": ("", "mode", "sample"), "missing_process": environments.SCHEDULES,
               "false_alarms": FALSE_ALARMS}  # fmt: skip
    for name, allowed in choices.items():
        if (given := getattr(options, name)) not in allowed:
            known = " or ".join(str(x) for x in allowed if x)
            raise ValueError(f"--{name.replace('_', '-')} {given} is unknown: give {known}, or leave it out")
    if not 0 <= options.fault_rate < 1:
        raise ValueError(f"--fault-rate {options.fault_rate} is not allowed: give a number in [0, 1)")
    for name, needs in {"fault_rate": "faults", "false_alarms": "trust"}.items():
        if getattr(options, name) != getattr(Options, name) and not getattr(options, needs):
            raise ValueError(f"--{name.replace('_', '-')} changes nothing without --{needs}: give both, or neither")
    if options.video and len({Path(run).name for run in options.runs}) < len(options.runs):
        raise ValueError("--video: runs of one name would have films of one name: evaluate them one at a time")
    choose_device(options.device)


def main(options):
    """Evaluate all runs, write the table and print it. Raises ValueError on bad input."""
    options = replace(options, runs=tuple(only_runs(options.runs)))
    check(options)
    checkpoints = {folder: load_checkpoint(folder) for folder in options.runs}
    configs = {folder: make_config(state["config"], folder) for folder, state in checkpoints.items()}
    if (options.trust or options.calibration) and not any(METHODS[c.method][0] == "product" for c in configs.values()):
        raise ValueError("--trust and --calibration compare experts, which only mummi, mummi_b and mssm_e have")
    labels, path = check_comparable(configs, options.label), output_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: {path.parent} cannot be written: give another")
    for (folder, config), state in zip(configs.items(), checkpoints.values()):
        sensor_subsets(options, state["modalities"]), faults_to_try(options, state["modalities"])  # or ValueError
        if not options.backgrounds and not Path(folder).is_file():
            check_backgrounds(folder, config.backgrounds)
        if options.trust and "usual" not in state and METHODS[config.method][0] == "product":
            raise ValueError(f"--trust: {folder} has no usual distances: train it to its end, or leave --trust out")

    records = []
    for (folder, config), state in zip(configs.items(), checkpoints.values()):
        space = {name: SimpleNamespace(shape=tuple(shape)) for name, shape in state["modalities"].items()}
        config.act_by = options.act_by or config.act_by
        agent = make_agent(to_act(config, options.device), space, state["action_size"])
        agent.load_state_dict(state["agent"])
        say(f"{folder}: step {state['steps']}", sys.stderr)
        parameters = sum(p.numel() for p in agent.model.parameters())
        usual = state.get("usual") if options.trust else None
        for record in evaluate_run(folder, config, agent, state["steps"], options, usual):
            records.append(record | {"parameters": parameters, "label": ", ".join(labels[folder])})
    tasks = {config.task: config for config in configs.values()} if options.references else {}
    references = {task: reference_returns(config, options.episodes, options.seed) for task, config in tasks.items()}

    free = "seed randomize act_by missing_process backgrounds fault_rate false_alarms".split()
    made_with = {f"--{x.replace('_', '-')}": y for x in free if (y := getattr(options, x)) != getattr(Options, x)}
    table = markdown(pool(records), references, made_with) + detection_markdown(records) + calibration_markdown(records)
    path.with_name(path.name + ".md").write_text(table)
    records = json.loads(json.dumps(records), parse_constant=lambda nan: None)  # which is no JSON
    report = {"options": asdict(options), "records": records, "references": references}
    path.with_name(path.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    with open(path.with_name(path.name + ".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("task method seed label steps sensors missing fault trust mean std episodes".split())
        for r in records:
            returns = np.array(r["returns"])
            row = [r[key] for key in "task method seed label steps sensors missing fault trust".split()]
            writer.writerow([*row, round(returns.mean(), 2), round(returns.std(), 2), len(returns)])
    say(table.rstrip("\n"))
    films, runs = f" and films {path}-*.mp4" * options.video, " ".join(options.runs)
    then = f"evaluate.py {runs} --{'sensors all' if films else 'video'}"
    if all(map(os.path.isdir, options.runs)) and (films or len(options.runs) > 1):  # weights have no curve
        then = " ".join(["-m tools.plot", runs, *["--label"] * bool(options.label), *options.label])
    say(f"{path}.md, .json, .csv{films} written; next: python {then}", sys.stderr)


if __name__ == "__main__":
    restart_with_quiet_threads()
    try:
        main(tyro.cli(Options, description=__doc__))
    except (Exception, KeyboardInterrupt) as error:
        fail("evaluate.py", error)
