"""What a result depends on beside its config: versions, the machine, the date, the source's commit."""

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from specjax import ops

# What decides how fast products run; the rest of a CPU's flags does not help a reader.
_FLAGS = (
    "fma", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd",
    "sve", "bf16", "i8mm",
)  # fmt: skip
# (vendor, family, models, name): virtual machines often call a CPU by its maker alone.
_MICROARCHITECTURES = (
    ("AuthenticAMD", 23, range(0x30, 0x100), "Zen 2"),
    ("AuthenticAMD", 23, range(0x30), "Zen"),
    ("AuthenticAMD", 25, [*range(0x10), *range(0x20, 0x60)], "Zen 3"),
    ("AuthenticAMD", 25, [*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)], "Zen 4"),
    ("AuthenticAMD", 26, range(0x100), "Zen 5"),
    ("GenuineIntel", 6, [63, 79], "Haswell or Broadwell"),
    ("GenuineIntel", 6, [85], "Skylake or Cascade Lake"),
    ("GenuineIntel", 6, [106, 108], "Ice Lake"),
    ("GenuineIntel", 6, [143], "Sapphire Rapids"),
    ("GenuineIntel", 6, [207], "Emerald Rapids"),
    ("GenuineIntel", 6, [173, 174], "Granite Rapids"),
)


def environment() -> dict[str, Any]:
    """What every result records."""
    return {
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "specjax")},
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "cpu": cpu(),
        "cpu_products": ops.cpu_products_here(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_revision(),
    }


def cpu(info: str | None = None) -> dict[str, Any]:
    """The CPU: `model` as it calls itself, `microarchitecture` where that is known, and the `flags` that matter.

    Args:
      info: the content of /proc/cpuinfo; None: this machine's. Where there is none, what the system says.
    """
    if info is None:
        path = Path("/proc/cpuinfo")
        info = path.read_text(errors="replace") if path.exists() else ""
    fields: dict[str, str] = {}
    for line in info.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    given = set((fields.get("flags") or fields.get("features") or "").split())
    return {
        "model": fields.get("model name") or _asked_of_the_system() or platform.processor() or platform.machine(),
        "microarchitecture": _microarchitecture(fields),
        "flags": [flag for flag in _FLAGS if flag in given],
    }


def machine(recorded: Mapping[str, Any]) -> str:
    """The CPU of an `environment` in words, such as "AMD EPYC Zen 4" or "Intel Xeon Sapphire Rapids with AMX"; as it
    was said beside the record where the run did not write it down; "not said"."""
    found = recorded.get("cpu")
    if not isinstance(found, Mapping):
        return str((recorded.get("machine") or {}).get("name") or "not said")
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\b\d+-Core\b", "", found.get("model") or "")
    known = found.get("microarchitecture")
    words = [*model.split(), *([known] if known and known not in model else [])]
    if "Intel" in words:
        words.append("with AMX" if "amx_bf16" in found.get("flags", ()) else "without AMX")
    return " ".join(words) or "not said"


def machine_name(recorded: Mapping[str, Any]) -> str:
    """`machine` short, for names of files: "zen4", "xeon-sapphire-rapids-amx"."""
    words = machine(recorded).lower().replace("not said", "unnamed")
    words = re.sub(r"^(amd epyc (?=zen)|amd |intel )|without amx$|with (?=amx$)", "", words)
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\bzen (\d)", r"zen\1", words)).strip("-")


def _microarchitecture(fields: Mapping[str, str]) -> str | None:
    try:
        family, model = int(fields["cpu family"]), int(fields["model"])
    except (KeyError, ValueError):
        return None
    vendor = fields.get("vendor_id")
    return next((n for v, f, models, n in _MICROARCHITECTURES if (v, f) == (vendor, family) and model in models), None)


def _asked_of_the_system() -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _revision() -> dict[str, Any]:
    """This source's commit, and whether files differ from it. Installed as a wheel there is none."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
    except OSError:  # no git on this machine
        top = ""
    if not top or Path(top).resolve() != root.resolve():  # not a surrounding repository's
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(git("status", "--porcelain"))}
