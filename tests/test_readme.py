"""The README and CONTRIBUTING keep their promises: every command runs, every example works, every name exists."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import test_train

import agent
import config
import envs
import evaluate
import methods
import mssm
import mummi_loss
import pictures
import plot
import replay
import runs
import sweep
import toy
import train
import wiping

ROOT = Path(__file__).parent.parent
MODULES = (mssm, mummi_loss, agent, envs, wiping, replay, methods, config, runs, pictures, train, evaluate, toy, plot, sweep)
EPISODE = "action_repeat, episode_steps = 2, 500"  # of the control suite, and of Table Wiping
HAVE_RUN = set()  # commands that two documents give are run once
SMALL = {  # what makes a command of each program small
    "train.py": [*test_train.SMALL[2:], "--steps", "400"],
    "evaluate.py": ["--episodes", "1", "--rates", "High"],
    "toy.py": ["--updates", "2"],
    "benchmark.py": None,  # its smallest section instead
    "sweep.py": [*"--tasks toy --methods mummi --seeds 1 --runs swept --gpus-per-run 0 --episodes 1".split(),
                 *test_train.SMALL[2:], "--steps", "400"],
}  # fmt: skip


def commands(document):
    """Every command line of a document: of its bash blocks and in its text, without comments and installations."""
    text = (ROOT / document).read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = blocks.splitlines() + re.findall(r"`(python \w+\.py[^`]*)`", prose)
    lines = [line.partition("  #")[0].rpartition("&& ")[2].strip() for line in lines]
    return list(filter(None, dict.fromkeys(lines)))


def reduced(command):
    """The command with small sizes."""
    program, *options = shlex.split(command)[1:]
    small = SMALL.get(program, [])
    if small is None:
        options, small = ["replay"], []
    for name in small[::2]:  # an option that the command gives already, with one value or several
        if name in options and name != "--name":
            start = options.index(name)
            end = next((i for i in range(start + 1, len(options)) if options[i].startswith("--")), len(options))
            del options[start:end]
    return " ".join(["python", program, *options, *small])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what a user has, to run commands in; an episode of MuJoCo is of 20 decisions."""
    folder = tmp_path_factory.mktemp("copy")
    for path in [*ROOT.glob("*.py"), ROOT / "results" / "paper.json"]:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    for name in ("envs.py", "wiping.py"):
        source = (folder / name).read_text()
        assert source.count(EPISODE) == 1, f"write the short episodes anew: {EPISODE!r} is not once in {name}"
        (folder / name).write_text(source.replace(EPISODE, EPISODE.replace("500", "20")))
    return folder


def run(command, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    line = ["bash", "-c", command]
    process = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, f"{command}\n{process.stderr}"
    return process


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_command_runs(document, copy):
    """Two at a time; those that read a run when those that make one are through."""
    shutil.rmtree(copy / "runs", ignore_errors=True)
    programs, making, reading = set(), [], []
    for command in commands(document):
        if command.startswith("python -m pytest") or command.startswith("tensorboard"):
            continue  # this, and a server
        if "wiping" in command and "sweep" not in command and importlib.util.find_spec("robosuite") is None:
            continue
        if "sweep.py" in command and importlib.util.find_spec("ray") is None:
            continue
        assert re.match(r"python \w+\.py( |$)", command), f"{command}: is it to be run?"
        programs.add(command.split()[1])
        command = reduced(command)
        if command not in HAVE_RUN:
            (reading if "runs/" in command else making).append(command)
        HAVE_RUN.add(command)
    for lines in (making, reading):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(run, folder=copy), lines))
    assert programs >= {"train.py", "evaluate.py"}


def test_the_example_of_ones_own_robot_runs_with_two_files_alone(tmp_path):
    """And its loss reaches every parameter of the model."""
    for name in ("mssm.py", "mummi_loss.py"):
        shutil.copy(ROOT / name, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2 and len(re.findall(r"^\w", blocks[1], re.MULTILINE)) == 5, "five statements"
    check = """
loss.backward()
assert loss.isfinite() and latent.shape == (T * B, 230)
assert len(x) == 4 and 0.3 < present[..., 2].float().mean() < 0.7
assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
"""
    (tmp_path / "robot.py").write_text(blocks[0] + blocks[1] + check)
    run("python robot.py", tmp_path)


def resolves(name):
    """Whether a dotted name is one of a module, a class, an option or an argument of the code."""
    first, *rest = name.split(".")
    if first in ("model", "agent") and rest:
        first = {"model": "MSSM", "agent": "Agent"}[first]
    for module in MODULES:
        thing = module if module.__name__ == first else getattr(module, first, None)
        for part in rest:
            thing = getattr(thing, part, None) or (part if assigned(thing, part) else None)
        if thing is not None:
            return True
    return False


def assigned(thing, name):
    """Whether a class assigns `self.<name>`."""
    import inspect

    return inspect.isclass(thing) and bool(re.search(rf"self\.{name}\b.*=", inspect.getsource(thing)))


def names(text):
    """All of `name`, `Class.name` and `function()` in a text, without commands, paths and options."""
    return {name.removesuffix("()") for name in re.findall(r"`([A-Za-z_][\w.]*(?:\(\))?)`", text)}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_symbol_exists(document):
    source = "\n".join((ROOT / f"{module.__name__}.py").read_text() for module in MODULES)
    words = set(re.findall(r"\w+", source))
    for name in names((ROOT / document).read_text()):
        exists = (ROOT / name).exists() or resolves(name) or ("." not in name and name in words)
        assert exists or name in ("mypy", "config.json", "metrics.jsonl", "checkpoint.pt"), name


def test_the_paper_to_code_table_names_things_where_they_are():
    """`file` `thing`: the thing is in that file."""
    rows = re.findall(r"^\| (?:Eq\.|Fig\.|Table) .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    found = 0
    for file, things in re.findall(r"`(\w+)\.py` (`[\w.]+`(?:, `[A-Za-z_]+(?:\.(?!py)\w+)?`)*)", "\n".join(rows)):
        module = next(module for module in MODULES if module.__name__ == file)
        for thing in re.findall(r"`([\w.]+)`", things):
            owner, _, attribute = thing.partition(".")
            assert hasattr(module, owner), f"{file}.py has no {owner}"
            held = getattr(module, owner)
            assert not attribute or hasattr(held, attribute) or assigned(held, attribute), f"{owner} has no {attribute}"
            found += 1
    assert found > 20


def test_the_citation_file_names_the_paper():
    """Valid enough for a reference manager: the required keys, the title as in the README."""
    text = (ROOT / "CITATION.cff").read_text()
    assert all(re.search(rf"^{key}:", text, re.MULTILINE) for key in ("cff-version", "message", "title", "authors"))
    title = re.search(r"title     = \{(.*)\}", (ROOT / "README.md").read_text())[1]
    assert f"title: {title}" in text and "arXiv:2107.02339" in text
