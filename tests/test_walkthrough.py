"""The walkthrough names what exists, in the files it says, and leaves out no equation of a training step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_audit import equations
from test_readme import MODULES, assigned, names, resolves

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "walkthrough.md").read_text()
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]


def test_every_symbol_exists():
    arguments = set(re.findall(r"\w+", "\n".join((ROOT / f"{m.__name__}.py").read_text() for m in MODULES)))
    for name in names(TEXT):
        assert (ROOT / name).exists() or resolves(name) or ("." not in name and name in arguments), name


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_functions_are_in_the_file_of_their_section(section):
    """`Class.method` and functions of a section are of a file that it names, or of the model."""
    files = re.findall(r"`(\w+)\.py`", section) + ["mssm"]
    modules = [module for module in MODULES if module.__name__ in files]
    for name in re.findall(r"`([A-Z]\w+\.\w+|[a-z]+(?:_[a-z]+)+)`", section):
        owner, _, attribute = name.partition(".")
        if not attribute and not any(callable(getattr(module, owner, None)) for module in MODULES):
            continue  # an argument such as expert_mean
        held = [getattr(module, owner) for module in modules if hasattr(module, owner)]
        assert held, f"{name} is in none of {files}"
        assert not attribute or hasattr(held[0], attribute) or assigned(held[0], attribute), name


def test_every_equation_of_a_training_step_is_on_the_way():
    """All that the code holds: Eq. (1)-(3), (5) have none, and (13), (14) are steps of a proof."""
    assert equations(TEXT) >= {4, *range(6, 13), *range(15, 20)}


def test_the_steps_are_numbered_without_a_gap():
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", TEXT, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_diagrams_are_those_that_the_script_draws(tmp_path):
    """Every picture of the text is drawn by docs/diagrams.py, whose labels name methods that exist."""
    script = (ROOT / "docs" / "diagrams.py").read_text()
    (tmp_path / "diagrams.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "diagrams.py"], check=True, capture_output=True)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert set(re.findall(r"!\[.*\]\((.*)\)", TEXT)) == drawn
    labels = re.findall(r"MSSM\.\w+", script)
    assert len(labels) > 6 and all(resolves(label) for label in labels)
