"""The documents keep their promises: what they cite exists, their commands parse, their examples run, components travel alone."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tyro

import config
from config import Config

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "tools").glob("*.py"))
CODE = "\n".join(path.read_text() for path in FILES)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPER = (ROOT / "docs" / "paper.md").read_text()
COMPONENTS = ("mssm.py", "mummi_loss.py", "agent.py", "envs.py", "replay.py")


def python(*arguments, folder, **environment):
    """Run Python in a folder; returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{arguments}\n{run.stdout}{run.stderr}"
    return run.stdout, run.stderr


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


# ---- 1. Coverage, in both directions: code, tests, docs/paper.md ----


def numbers(citations):
    """1, 19 of "1, 19"; 6 to 9 of "(6)-(9)"."""
    found = set()
    for first, last in re.findall(r"(\d+)\)?(?: ?- ?\(?(\d+))?", " ".join(citations)):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def equations(text):
    """Without those of other papers: "[Dreamer] Eq. (6)"."""
    return numbers(re.findall(r"(?<!\] )Eq\. (\(\d+\)(?:(?: ?- ?|, | and )\(\d+\))*)", text))


def figures(text):
    return numbers(re.findall(r"Fig\. (\d+(?:(?:-|, | and )\d+)*)", text))


def tables(text):
    return {len(numeral) for pair in re.findall(r"Tables? (II?)(?:(?:, | and )(II?))?", text) for numeral in pair if numeral}


def deviations(text):
    return numbers(re.findall(r"Dev\. (D\d+(?:(?:, | and )D\d+)*)", text))


def marked(kind):
    """All n of `@pytest.mark.<kind>(n)` in the tests."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    return numbers(re.findall(rf"mark\.{kind}\(([\d, ]+)\)", text))


@pytest.mark.parametrize(("kind", "start", "cited", "count"), [
    ("eq", r"\| Eq\. \(", equations, 19), ("fig", r"\| Fig\. \d", figures, 20), ("table", r"\| Table I", tables, 2),
])  # fmt: skip
def test_every_equation_figure_and_table_is_in_code_tests_and_paper_md(kind, start, cited, count):
    """Each in one row of paper.md, which names its file or says why there is none; what has a file is cited and tested."""
    rows = [line.split(" | ", 1) for line in PAPER.splitlines() if re.match(start, line)]
    assert sorted(n for what, _ in rows for n in cited(what)) == list(range(1, count + 1))
    assert all(".py" in where or re.search("no code of their own|not code", where) for _, where in rows)
    in_code = {n for what, where in rows if ".py" in where for n in cited(what)}
    assert cited(CODE) == in_code == marked(kind)


def test_every_deviation_is_in_code_tests_and_paper_md():
    rows = [int(n) for n in re.findall(r"^\| D(\d+) \|", PAPER, re.MULTILINE)]
    assert rows == sorted(set(rows)) and set(rows) == deviations(CODE) == marked("dev")


def test_equations_are_cited_in_one_form():
    """Exactly `Eq. (7)`, so that it can be searched for."""
    assert re.findall(r".*\b(?:Eq\. \d|Eqs?\b(?!\. \()|[Ee]quation \(?\d).*", CODE) == []


def resolves(name):
    """Whether a dotted name is a thing of the code: `MSSM.g`, `collect`, `Agent.update`."""
    owner, _, attribute = name.partition(".")
    for path in FILES:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        held = getattr(module, owner, None)
        if held is not None and (not attribute or hasattr(held, attribute) or
                                 inspect.isclass(held) and re.search(rf"self\.{attribute}\b.*=", inspect.getsource(held))):  # fmt: skip
            return True
    return False


def test_what_paper_md_and_the_walkthrough_name_exists():
    names = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?|[a-z]+(?:_[a-z]+)+)`", PAPER + (ROOT / "docs/walkthrough.md").read_text()))
    assert len(names) > 50
    arguments = set(re.findall(r"\w+", CODE))  # such as expert_mean
    assert [name for name in sorted(names) if not resolves(name) and ("." in name or name not in arguments)] == []


# ---- 2. Options and their origins ----

HELP = dict(re.findall(r"^    (\w+): [^=\n]+ = .*?  # (.*)", (ROOT / "config.py").read_text(), re.MULTILINE))
ORIGIN = re.compile(r"\[((?:(?:section V|Appendix [AB]|Table I(?:, II)?|Eq\. \(\d+\)|code|CVRL|Dreamer|ours)(?:: [^;\]]+)?(?:; )?)+)\]$")


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_every_default_has_its_value_in_the_paper_or_the_released_code(field):
    """And is one of them, or a deviation. "ours" stands alone."""
    origin = ORIGIN.search(HELP[field.name])
    assert origin, f"{field.name}: end its help with an origin such as [Appendix B: 200] or [ours]"
    values = [part.partition(": ")[2] for part in origin[1].split("; ")]
    assert "ours" not in origin[1] or origin[1] == "ours"
    if any(values) and "Dev. D" not in HELP[field.name]:
        assert len(values) == 1, f"{field.name}: paper and released code differ, but no deviation is named"
        assert float(values[0]) == getattr(Config(), field.name)


def test_every_option_of_a_deviation_names_it_and_the_other_way_round():
    cells = dict(re.findall(r"^\| D(\d+) \|.*\| ([^|]+) \|$", PAPER, re.MULTILINE))
    in_paper_md = {(int(n), option) for n, cell in cells.items() for option in re.findall(r"--(?:no-)?([a-z][\w-]+)", cell)}
    in_help = {(int(n), name.replace("_", "-")) for name, text in HELP.items() for n in deviations(text)}
    assert in_help == in_paper_md


# ---- 3. Commands ----


def options(program):
    """The options of a program: the dataclass that tyro reads."""
    return Config if program == "train" else importlib.import_module(program).Options


def commands():
    """Every command of the documents and of --help, in bash blocks or in `python ...`, as (document, command)."""
    for path in DOCUMENTS:
        text = re.sub(r"python -c '.*?'\n", "", path.read_text(), flags=re.DOTALL)  # section 4 runs it
        lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
        for line in lines + re.findall(r"`((?:\w+=\S+ )?python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            yield path.name, line.partition("  #")[0].strip()
    for line in config.EXAMPLES.splitlines()[1:]:
        yield "--help", re.split("  +", line.strip())[0]


@pytest.mark.parametrize(("document", "command"), sorted(set(commands())))
def test_commands_are_understood(document, command):
    """Parsed, not run."""
    for placeholder, value in (("METHOD", "mummi"), ("SEED", "1")):
        command = command.replace(placeholder, value)
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "pip":
        files = [after for word, after in zip(words, words[1:]) if word == "-r"]
        assert words[1] == "install" and all((ROOT / file).exists() for file in files)
        return
    assert words[0] == "python", f"{document}: {command}"
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    arguments = words[3:] if words[1] == "-m" else words[2:]
    if module == "pytest" or module + ".py" in COMPONENTS or module.startswith("results/"):
        assert not arguments and (module == "pytest" or (ROOT / f"{module}.py").exists())
    elif module == "tools.sweep":  # the rest goes to train.py
        _, rest = tyro.cli(options(module), args=arguments, return_unknown_args=True)
        config.command_line(rest, Config())
    elif module != "train":
        importlib.import_module(module)
        assert not arguments or tyro.cli(options(module), args=arguments)
    elif "--help" not in arguments:
        config.command_line(arguments, Config())


def test_options_that_documents_name_exist():
    """Those at the beginning of `--option ...`; --exclusive is SLURM's."""
    programs = ["train", "evaluate", *(f"tools.{name}" for name in ("toy", "plot", "sweep", "benchmark"))]
    known = {"exclusive"} | {field.name.replace("_", "-") for program in programs for field in dataclasses.fields(options(program))}
    for path in DOCUMENTS:
        for option in re.findall(r"`--(?:no-)?([a-z][\w-]*)", path.read_text()):
            assert option in known, f"{path.name}: --{option}"


def test_help_ends_with_its_examples_and_an_unknown_option_with_code_2(tmp_path, capsys):
    page, _ = python(ROOT / "train.py", "--help", folder=tmp_path, COLUMNS="100", PYTHONIOENCODING="utf-8")
    assert page.endswith(config.EXAMPLES) and max(map(len, page.splitlines())) <= 100
    with pytest.raises(SystemExit) as stop:
        config.parse(["--tusk", "toy"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "--tusk" in said.err and said.out == ""


def test_continuous_integration_runs_the_readmes_test_command():
    test = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert test in "".join(blocks("README.md", "bash")).splitlines()


# ---- 4. Examples ----

SMALL = ("--task toy --device cpu --num-envs 2 --eval-episodes 1 --steps 200 --prefill 200 --first-updates 2 --eval-every 200 "
         "--batch-size 3 --batch-length 6 --horizon 3 --capacity 2000").split()  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/toy-mummi-1, hardly trained."""
    folder = tmp_path_factory.mktemp("trained")
    python(ROOT / "train.py", *SMALL, folder=folder)
    return folder


def save_examples(texts, folder):
    """Write code blocks to example.py, with few updates; one that begins with `# name.py` to a file of that name."""
    script = []
    for text in texts:
        name = re.match(r"# (\w+\.py)\n", text)
        if name:
            (folder / name[1]).write_text(text)
        else:
            script.append(text.replace("UPDATES = 2000", "UPDATES = 2"))
    (folder / "example.py").write_text("\n".join(script))


def test_the_readmes_examples_run(trained):
    [script] = [block for block in blocks("README.md", "bash") if block.startswith("python -c")]
    command, option, code = shlex.split(script, comments=False)
    shown, _ = python(option, code, folder=trained, PYTHONPATH=str(ROOT))
    sensors, *actions = shown.splitlines()
    assert command == "python" and len(code.strip().splitlines()) == 5
    assert "'camera': (64, 64, 3)" in sensors and len(actions) == 2 and actions[0] != actions[1]


def test_the_examples_of_own_robot_run(trained):
    """Down to "Your own recordings"; and an agent is trained on the environment of one's own."""
    texts = (ROOT / "docs/own_robot.md").read_text().split("## Your own recordings")[0]
    save_examples(re.findall(r"```python\n(.*?)```", texts, re.DOTALL), trained)
    shown, _ = python("example.py", folder=trained, PYTHONPATH=f"{ROOT}:{trained}")
    assert "'camera': (64, 64, 3), 'range': (2,), 'present': (2,)" in shown
    task = next(line for line in texts.splitlines() if "reach:" in line and line.startswith("python"))
    command = [*shlex.split(task)[2:], *SMALL[2:], "--d-f", "8", "--channels", "1", "--name", "reach"]
    python(ROOT / "train.py", *command, folder=trained, PYTHONPATH=str(trained))


def test_own_recordings_need_three_files_alone(tmp_path):
    for name in ("mssm.py", "mummi_loss.py", "replay.py"):
        shutil.copy(ROOT / name, tmp_path)
    texts = (ROOT / "docs/own_robot.md").read_text().split("## Your own recordings")[1]
    save_examples(["import sys\nsys.path.insert(0, '.')", *re.findall(r"```python\n(.*?)```", texts, re.DOTALL)], tmp_path)
    shown, _ = python("-I", "example.py", folder=tmp_path)
    assert "information_camera" in shown and "(1, 1024)" in shown.replace("torch.Size([1, 1024])", "(1, 1024)")


# What each component's usage example is given, and what must hold after it.
EXAMPLES = {
    "mssm.py": ("""
rgb, touch = torch.randint(0, 256, (6, 3, 64, 64, 3), dtype=torch.uint8), torch.rand(6, 3, 2)
present, action = torch.rand(6, 3, 2) > 0.4, torch.rand(6, 3, 4)
""", "assert reward.shape == (6, 3) and latent.shape == (6, 3, 230)"),
    "mummi_loss.py": ("""
from types import SimpleNamespace as Has
g_z, expert_mean, present = torch.randn(10, 4), torch.randn(10, 4), torch.rand(10) > 0.4
mean, std, prior_mean, prior_std = torch.rand(4, 10, 5) + 0.1
log_reward = torch.randn(10)
model = Has(latent=lambda h, s_c: s_c, reward=lambda z: z.sum(-1), g=lambda z: z, modalities={"rgb": (4,)})
fused = Has(mean=torch.zeros(5, 2, 4), expert_mean=torch.randn(5, 2, 1, 4))
filtered = Has(h=0, s_c=torch.randn(5, 2, 4), present=torch.ones(5, 2, 1).bool(), fused=fused, mean=torch.zeros(5, 2, 4),
               std=torch.ones(5, 2, 4), prior_mean=torch.zeros(5, 2, 4), prior_std=torch.ones(5, 2, 4))
batch = {"reward": torch.rand(5, 2)}
""", "assert loss.isfinite() and bound.shape == (10,) and log_f.shape == (10, 10) and 'information_rgb' in metrics"),
    "agent.py": ("""
class World(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3))
    def initial_state(self, batch_size, device=None):
        return Memory(torch.zeros(batch_size, 3), torch.zeros(batch_size, 4))
    def observe(self, observation, present, action, state=None, first=None):
        return observation["x"] + self.offset
    def state(self, filtered):
        return Memory(filtered.flatten(0, 1).detach(), torch.zeros(filtered.flatten(0, 1).shape[0], 4))
    def latent(self, x, last):
        return x
    def imagine_step(self, state, action):
        return Memory(state.state + action[:, :3], action)
    def reward(self, latent):
        return -latent.square().sum(-1)

model, objective = World(), lambda model, filtered, batch: ((model.offset - 1).square().sum(), {})
batch = {"observation": {"x": torch.rand(5, 2, 3)}, "present": torch.ones(5, 2, 1), "action": torch.zeros(5, 2, 4)}
num_envs, observation, present, first = 2, {"x": torch.rand(2, 3)}, torch.ones(2, 1), torch.ones(2).bool()
""", "assert action.shape == (2, 4) and model.offset.abs().min() > 0 and 'actor_loss' in metrics"),
    "envs.py": ("", "assert set(observation) == {'rgb', 'depth', 'touch', 'present'}; envs.reset(); envs.close()"),
    "replay.py": ("rgb, reward = np.ones((60, 64, 64, 3), np.uint8), np.arange(60, dtype=np.float32)",
                  "assert batch['rgb'].shape == (50, 50, 64, 64, 3) and (np.diff(batch['reward'], axis=0) == 1).all()"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_copied_alone_checks_itself(tmp_path, name):
    """In an empty folder, isolated from this one, without a warning; it prints shapes."""
    shutil.copy(ROOT / name, tmp_path)
    shown, warned = python("-I", "-W", "error", name, folder=tmp_path)
    assert re.search(r"\((\d+,( \d+)*)?\)", shown) and warned == ""


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_usage_example_of_a_component_copied_alone_runs(tmp_path, name):
    """The indented lines of the module's docstring that are code."""
    shutil.copy(ROOT / name, tmp_path)
    indented = re.findall(r"(?:^    .*\n)+", (ROOT / name).read_text().split('"""')[1], re.MULTILINE)
    (example,) = [block for block in indented if re.search(r"^    \w.* = \w+\(", block, re.MULTILINE)]
    given, check = EXAMPLES[name]
    body = textwrap.indent(f"{given}\n{textwrap.dedent(example)}\n{check}\n", "    ")
    # Worker processes may import the script again.
    script = f"import sys\nsys.path.insert(0, '.')\nfrom {name[:-3]} import *\nif __name__ == '__main__':\n{body}"
    (tmp_path / "example.py").write_text(script)
    python("-I", "example.py", folder=tmp_path)


# ---- 5. Links, sizes, lint ----


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert (path.parent / file).exists(), target
            headings = re.findall(r"^#+ (.*)", (path.parent / file).read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_the_readmes_file_table_has_every_file():
    rows = re.findall(r"^\| \[`([\w.]+)`\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {row for row in rows if row.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}


def test_sizes():
    """Of README, of the files that hold the paper, and of all."""
    lines = {path: len(path.read_text().splitlines()) for path in [*FILES, ROOT / "README.md"]}
    assert lines[ROOT / "README.md"] < 220
    root = {path.name: n for path, n in lines.items() if path.parent == ROOT and path.suffix == ".py"}
    most = {"mssm.py": 420, "mummi_loss.py": 240, "agent.py": 400, "methods.py": 165, "train.py": 250, "envs.py": 940}
    assert {name: n for name, n in root.items() if n > most.get(name, 520)} == {}
    assert len(root) <= 15 and sum(root.values()) <= 5335 and sum(lines.values()) - lines[ROOT / "README.md"] <= 7040


@pytest.mark.parametrize("command", ["ruff check --no-cache .", "mypy --no-incremental"])
def test_lint(command):
    """By the rules of ruff.toml and mypy.ini."""
    pytest.importorskip(command.split()[0], reason="pip install -r requirements-dev.txt")
    python("-m", *command.split(), folder=ROOT)


def test_the_citation_names_the_paper():
    title = re.search(r"title     = \{(.*)\}", (ROOT / "README.md").read_text())[1]
    text = (ROOT / "CITATION.cff").read_text()
    assert f"title: {title}" in text and all(re.search(rf"^{key}:", text, re.MULTILINE) for key in ("cff-version", "message", "authors"))
