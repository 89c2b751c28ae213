"""constraints-oldest.txt names exactly the lower bounds of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_are_those_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    bounds = dict(match.groups() for one in asked if (match := re.match(r"([\w-]+)>=([\d.]+)", one)))
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    oldest = {name.replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert oldest.pop("jaxlib") == oldest["jax"]  # jax asks for the same
    library = {re.split(r"[><=\[]", one)[0] for one in project["dependencies"]} | {"chex", "hypothesis"}
    assert set(oldest) == library

    def numbers(version):
        return [*map(int, version.split(".")), 0, 0][:3]

    for name, version in oldest.items():
        assert numbers(version) == numbers(bounds[name]), name
