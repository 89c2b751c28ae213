"""Runs an experiment over and over in processes that it kills, and compares every result with an undisturbed one.

    python tests/kill_job.py NAME CHECKPOINT FOLDER KILLS

Children are forked, so that each begins with everything imported and dies as a process does. JAX has not started in the
parent: only then may one fork.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from test_stopping import KILLED, QUIET, read, same_always, shards

from specjax.studies.runner import run_config


def run(name: str, checkpoint: Path, folder: Path) -> int:
    """Forks a child that runs the experiment in `folder`; gives its number."""
    child = os.fork()
    if child:
        return child
    try:
        code = 0
        if not (folder / "out" / "result.json").exists():  # the kill came after it, which is the end
            code = run_config(KILLED[name](checkpoint, folder), folder / "out", QUIET)
        what = same_always(read(folder / "out"), folder / "out")
        if name == "text":
            what = shards(folder / "shards")
        what.get("config", {}).clear()  # which names the folder
        np.save(folder / "done.npy", np.array([what], object), allow_pickle=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(code)


def wait(child: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Exits with 1 where a child failed of itself, or a result differs."""
    name, checkpoint, folder, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    begin = time.monotonic()
    (folder / "whole").mkdir()
    assert wait(run(name, checkpoint, folder / "whole")) == 0
    lasts = time.monotonic() - begin
    expected = np.load(folder / "whole" / "done.npy", allow_pickle=True)[0]
    rng, killed, finished = random.Random(0), 0, 0
    for number in itertools.count():
        place = folder / str(number)
        place.mkdir()
        while True:
            child = run(name, checkpoint, place)
            if killed < kills:
                time.sleep(rng.uniform(0, 1.1 * lasts))
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"run {number} failed of itself"
            killed += 1
        np.testing.assert_equal(np.load(place / "done.npy", allow_pickle=True)[0], expected)
        assert not list(place.rglob("*.tmp"))
        shutil.rmtree(place)
        finished += 1
        if killed == kills and finished > 1:
            break
    print(json.dumps({"kills": killed, "finished": finished, "seconds": round(lasts, 2)}))


if __name__ == "__main__":
    main()
