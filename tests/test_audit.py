"""Coverage, in both directions: all 19 equations, 20 figures and 2 tables of the paper, and every deviation from it,
are in the code, in the tests and in the README, or the README says why not. Components run when copied alone.

Origins of defaults: `test_help.py`. Shapes: `test_shapes.py`. Symbols and commands of the README: `test_readme.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import sweep
import toy
from config import Config

ROOT = Path(__file__).parent.parent
COMPONENTS = ("mssm.py", "mummi_loss.py", "agent.py", "envs.py", "replay.py")
EQUATION = re.compile(r"(?<!\] )Eq\. (\(\d+\)(?:(?:-|, | and )\(\d+\))*)")  # not "[Dreamer] Eq. (6)"


def read(*names):
    return "\n".join((ROOT / name).read_text() for name in names)


def readme_rows(start):
    """Lines of the README's tables that start so. Skips while there is no README."""
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    return [line for line in read("README.md").splitlines() if re.match(start, line)]


def equations(text):
    """All n of "Eq. (n)", also of "Eq. (6)-(9)", "Eq. (12), (14)" and "Eq. (10) and (17)"."""
    found = set()
    for citation in EQUATION.findall(text):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", citation):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def figures(text):
    """All n of "Fig. 8", "Fig. 16, 17", "Fig. 7-11" and "Fig. 1, 19 and 20"."""
    found = set()
    for citation in re.findall(r"Fig\. (\d+(?:(?:-|, | and )\d+)*)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", citation):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def tables(text):
    """1 of "Table I", 2 of "Table II", both of "Table I, II" and "Tables I and II"."""
    numerals = re.findall(r"Tables? (II?)(?:(?:, | and )(II?))?", text)
    return {len(numeral) for pair in numerals for numeral in pair if numeral}


def deviations(text):
    return {int(n) for citation in re.findall(r"Dev\. (D\d+(?:, D\d+)*)", text) for n in re.findall(r"\d+", citation)}


def marked(kind):
    """All n of `@pytest.mark.<kind>(n)` in the tests."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    marks = re.findall(rf"mark\.{kind}\(([\d, ]+)\)", text)
    return {int(n) for mark in marks for n in mark.split(",")}


CODE = read(*(path.name for path in ROOT.glob("*.py")))
KINDS = {  # of the paper's numbered things: their rows in the README, how they are cited, how many there are
    "eq": (r"\| Eq\. \(", equations, 19),
    "fig": (r"\| Fig\. \d", figures, 20),
    "table": (r"\| Table I", tables, 2),
}
WHY_NOT = re.compile(r"no code of (its|their) own|not code|not built")  # what a row without a file says


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_has_every_equation_figure_and_table_once(kind):
    """Each in one row, which names the file, or says why there is none."""
    start, cited, count = KINDS[kind]
    rows = readme_rows(start)
    numbers = [n for row in rows for n in cited(row.split(" | ")[0].replace(" - ", "-"))]
    assert sorted(numbers) == list(range(1, count + 1))
    for row in rows:
        assert ".py" in row or WHY_NOT.search(row), f"say where, or why not: {row}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_code_cites_is_tested_and_in_the_readme_and_no_other(kind):
    """The same set three times: cited in the code, marked in the tests, not excused in the README."""
    start, cited, _ = KINDS[kind]
    rows = [row.split(" | ")[0].replace(" - ", "-") for row in readme_rows(start) if ".py" in row]
    assert cited(CODE) == marked(kind) == cited("\n".join(rows))


def test_every_deviation_in_the_code_is_tested_and_no_other():
    assert deviations(CODE) == marked("dev")


def test_the_readme_lists_the_deviations_of_the_code():
    rows = [int(re.match(r"\| D(\d+)", row)[1]) for row in readme_rows(r"\| D\d+ ")]
    assert len(rows) == len(set(rows)) and set(rows) == deviations(CODE)


def test_equations_are_cited_in_one_form():
    """Exactly `Eq. (7)`, so that it can be searched for."""
    assert re.findall(r".*\b(?:Eq\. \d|Eqs?\b(?!\. \()|[Ee]quation \(?\d).*", CODE) == []


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_copied_alone_runs(tmp_path, name):
    """In an empty folder, isolated from this one; its self-check prints shapes."""
    shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-I", name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"\((\d+,( \d+)*)?\)", run.stdout)


def test_continuous_integration_runs_the_readmes_test_line():
    block = read("README.md").split("```bash\n")[1].split("```")[0].splitlines()
    assert block[0].endswith("python train.py --task finger_spin") and block[1].endswith("python -m pytest")
    assert block[1] in read(".ci/run").splitlines()


def test_every_file_and_option_that_the_readme_names_exists_and_the_file_map_has_every_program():
    text = read("README.md")
    assert set(re.findall(r"^\| \[`(\w+\.py)`\]", text, re.MULTILINE)) == {path.name for path in ROOT.glob("*.py")}
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / name).exists(), name
    options = {"--" + field.replace("_", "-") for config in (Config, evaluate.Options, toy.Options, sweep.Options) for field in config.__dataclass_fields__}
    options |= {"--no-" + option[2:] for option in options}
    assert set(re.findall(r"--[a-z][\w-]+", text)) <= options | {"--help", "--logdir"}  # the last is TensorBoard's
