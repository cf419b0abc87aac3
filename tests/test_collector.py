"""The garbage collector in commands and workers: it does not go through the libraries' modules again and again."""

import subprocess
import sys

from conftest import REPOSITORY

COUNTS = """
import atexit, gc, runpy, sys
atexit.register(lambda: print("collections", *(one["collections"] for one in gc.get_stats()), file=sys.stderr))
sys.argv = ["main.py", "training_configs/tiny/quickstart.yaml", "context_length=4"]
runpy.run_path("main.py", run_name="__main__")
"""


def test_a_command_imports_its_libraries_with_few_collections():
    done = subprocess.run([sys.executable, "-c", COUNTS], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "context_length 4" in done.stderr, done.stderr
    young, _, whole = map(int, done.stderr.split("collections")[1].split())
    assert 0 < young < 100 and whole == 0
