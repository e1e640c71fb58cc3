"""Faults that tests must notice; mutations.json lists them as [file, text, text in its place, pytest target].

    python tests/mutations.py                    # all, in clones of the last commit; takes an hour or two
    python tests/mutations.py ppo.py model.py    # those of these files

Prints each mutation that its tests miss, and exits with their number. Run by hand, not by pytest."""
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(mutation):
    """→ whether the target fails with the mutation, and the last line that pytest prints"""
    file, text, other, target = mutation
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        path = Path(folder, file)
        source = path.read_text()
        if source.count(text) != 1:
            return False, f"the text occurs {source.count(text)} times in {file}"
        path.write_text(source.replace(text, other))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(target)],
            cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode == 1, (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]


def main():
    mutations = json.loads(Path(__file__).with_suffix(".json").read_text())
    mutations = [m for m in mutations if m[0] in sys.argv[1:] or not sys.argv[1:]]
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, (caught, line) in zip(mutations, pool.map(run, mutations)):
            missed += not caught
            if not caught:
                print("missed:", *mutation, line, sep="\n    ", flush=True)
    print(f"{len(mutations) - missed} of {len(mutations)} mutations are noticed")
    sys.exit(min(missed, 99))


if __name__ == "__main__":
    main()
