"""Programs around MuMMI, run from the repository's root: `python -m tools.plot runs/toy-*`."""

import tempfile
from pathlib import Path

import tyro

from checkpoint import fail


def run(name, main, description, options=None):
    """Call `main` with the options of the command line, a dataclass or its own; an expected failure is one line."""
    try:
        given = tyro.cli(options or main, prog=f"python -m tools.{name}", description=description)
        if options:
            main(given)
    except (Exception, KeyboardInterrupt) as error:
        fail(f"tools.{name}", error)


def output_files(output, *suffixes):
    """A file of each suffix, in a folder that is there and can be written; `output` may end with one of them.

    Raises ValueError where nothing can be written.
    """
    path = Path(output)
    path = path.with_suffix("") if path.suffix in suffixes else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror}): give another folder") from error
    return [path.with_name(path.name + suffix) for suffix in suffixes]
