"""`python -m specjax.ops.build` builds the native products, with this machine's C++ compiler or the `ziglang` wheel."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from specjax.errors import ConfigError
from specjax.ops import native


def compilers() -> list[list[str]]:
    """Commands that may compile it, the best first: $CXX, the system's, Zig's."""
    named = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else []
    found = [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    # Zig compiles for this very machine unless it is told otherwise.
    zig = [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline", "-s"]
    return [*named, *found[:1], *([zig] if importlib.util.find_spec("ziglang") else [])]


def build() -> Path:
    """Compiles the library where it is not yet; gives where it is.

    Raises:
      ConfigError: no compiler, none that compiles it, or a folder that cannot be written.
    """
    target, failed = native.file(), []
    if target.exists():
        return target
    if not (commands := compilers()):
        raise ConfigError("there is no C++ compiler; install one, or `pip install ziglang`, and build again.")
    for command in commands:
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                call = [*command, *native.FLAGS, "-isystem", jax.ffi.include_dir(), str(native.SOURCE), "-o", str(made)]
                done = subprocess.run(call, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    made.replace(target)
                    break
                failed.append(f"{shlex.join(command)}: {done.stderr.strip()[-500:]}")
        except OSError as error:
            failed.append(f"{shlex.join(command)}: {error}")
    else:
        raise ConfigError(f"no C++ compiler made the library ({'; '.join(failed)}).")
    for old in target.parent.glob("native-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def main() -> None:
    """Builds, or says why XLA's products serve; neither is an error."""
    try:
        print(f"native products: {build()}")
    except ConfigError as error:
        print(f"XLA's products serve: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
