"""Sets a project up from nothing: ``sync.py PROJECT CACHE UV [ARGUMENT ...]``.

For each line with a number on standard input: removes all but ``pyproject.toml`` from the project, the cache too where
the number is 0, runs the command, and prints the nanoseconds that it took.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time


def main() -> None:
    project, cache, *command = sys.argv[1:]
    for line in sys.stdin:
        shutil.rmtree(os.path.join(project, ".venv"), ignore_errors=True)
        if os.path.exists(os.path.join(project, "uv.lock")):
            os.unlink(os.path.join(project, "uv.lock"))
        if int(line) == 0:
            shutil.rmtree(cache, ignore_errors=True)
        start = time.monotonic_ns()
        done = subprocess.run(
            command, check=False, cwd=project, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        elapsed = time.monotonic_ns() - start
        if done.returncode:
            raise SystemExit(f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}")
        print(elapsed, flush=True)


if __name__ == "__main__":
    main()
