"""Coverage: equations and deviations in code, tests and README are the same sets; files work when copied alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import train

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


def deviations(text):
    return {int(n) for citation in re.findall(r"Dev\. (D\d+(?:, D\d+)*)", text) for n in re.findall(r"\d+", citation)}


def marked(kind):
    """All n of `@pytest.mark.<kind>(n)` in the tests."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    marks = re.findall(rf"mark\.{kind}\(([\d, ]+)\)", text)
    return {int(n) for mark in marks for n in mark.split(",")}


CODE = read(*COMPONENTS, "wiping.py", "methods.py", "train.py")


def test_every_equation_in_the_code_is_tested_and_no_other():
    assert equations(CODE) == marked("eq")


def test_every_deviation_in_the_code_is_tested_and_no_other():
    assert deviations(CODE) == marked("dev")


def test_the_readme_lists_the_equations_of_the_code():
    """Rows of the paper-to-code table that name a file."""
    assert equations("\n".join(row for row in readme_rows(r"\| Eq\. \(") if ".py" in row)) == equations(CODE)


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


def test_every_file_and_option_that_the_readme_names_exists():
    text = read("README.md")
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / name).exists(), name
    options = {"--" + field.replace("_", "-") for config in (train.Config, evaluate.Options) for field in config.__dataclass_fields__}
    options |= {"--no-" + option[2:] for option in options}
    assert set(re.findall(r"--[a-z][\w-]+", text)) <= options | {"--help"}
