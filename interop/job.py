"""The command line of what is asked for in one file of JSON and answered in another."""

import argparse
import json
from pathlib import Path


def answer(main, about):
    """Writes what `main` comes to, given what `--job` asks for, to `--output`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    measured = main(json.loads(Path(arguments.job).read_text()))
    Path(arguments.output).write_text(json.dumps(measured))
