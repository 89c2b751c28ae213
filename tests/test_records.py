"""Records are data: every file says where and when it was made, tables are what the data gives, prose stays short."""

import ast
import json
from pathlib import Path

import pytest

import specjax as sj
from specjax.environment import cpu, environment, machine, machine_name
from specjax.report.records import add, load_records, pages

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def test_committed_tables_are_what_the_records_give():
    for path, text in pages(ROOT).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is not up to date: run `make records`"


def test_every_record_names_its_machine_and_date():
    found = [
        record
        for folder in (ROOT / "experiments" / "records").iterdir()
        if folder.is_dir()
        for record in load_records(folder)
    ]
    assert len(found) >= 34
    for record in found:
        assert record.date in record.name
        assert record.machine != "None"


def test_a_record_without_a_machine_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"environment": {"date": "2026-01-01"}}))
    with pytest.raises(sj.DataError, match="when and on which machine"):
        load_records(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(sj.DataError, match="no JSON"):
        load_records(tmp_path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_docstrings_have_at_most_twelve_lines(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()) <= 12
    assert f"experiments/{path.name}" in docstring


def test_the_changelog_has_at_most_sixty_lines():
    assert len((ROOT / "CHANGELOG.md").read_text().splitlines()) <= 60


ZEN3 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu fma avx2 sse"""
RAPIDS = """vendor_id: GenuineIntel
cpu family: 6
model: 143
model name: Intel(R) Xeon(R)
flags: avx2 avx512f amx_bf16 fma"""
GRAVITON = "processor: 0\nFeatures: fp asimd bf16 sve\nCPU part: 0xd40"


@pytest.mark.parametrize(
    ("info", "known", "flags", "name"),
    [
        (ZEN3, "Zen 3", ["fma", "avx2"], "zen3"),
        (RAPIDS, "Sapphire Rapids", ["fma", "avx2", "avx512f", "amx_bf16"], "xeon-sapphire-rapids-amx"),
        (GRAVITON, None, ["asimd", "sve", "bf16"], None),
        ("", None, [], None),
    ],
)
def test_the_cpu_is_named(info, known, flags, name):
    found = cpu(info + "\n\nprocessor: 1\nmodel: 99\n")
    assert (found["microarchitecture"], found["flags"]) == (known, flags)
    assert found["model"]
    if name is not None:
        assert machine_name({"cpu": found}) == name


def test_machines_have_one_name_each():
    """In tables and in names of files, whether a run wrote its CPU down or somebody said it."""
    rapids, plain = cpu(RAPIDS), cpu(RAPIDS.replace("amx_bf16", ""))
    assert machine({"cpu": cpu(ZEN3)}) == machine({"machine": {"name": "AMD EPYC Zen 3"}}) == "AMD EPYC Zen 3"
    assert machine({"cpu": rapids}) == "Intel Xeon Sapphire Rapids with AMX"
    assert machine_name({"cpu": plain}) == "xeon-sapphire-rapids"
    for said, name in (
        ("AMD EPYC Zen 4", "zen4"),
        ("Intel Xeon with AMX", "xeon-amx"),
        ("Intel Xeon without AMX", "xeon"),
        (None, "unnamed"),
    ):
        assert machine_name({"machine": {"name": said}}) == name
    named = cpu(ZEN3.replace("AMD EPYC", "AMD EPYC 7763 64-Core Processor"))
    assert machine_name({"cpu": named}) == "epyc-7763-zen3"


def test_records_are_named_by_what_they_say():
    for folder in (ROOT / "experiments" / "records").iterdir():
        for record in load_records(folder) if folder.is_dir() else ():
            assert record.name.startswith(f"{machine_name(record.result['environment'])}-{record.date}")


def test_a_result_is_added(tmp_path):
    result = {"experiment": "mine", "environment": {"date": "2026-12-01T10:00:00+00:00", "cpu": cpu(ZEN3)}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    names = [add(tmp_path / "result.json", tmp_path).relative_to(tmp_path / "experiments" / "records") for _ in "ab"]
    assert list(map(str, names)) == ["mine/zen3-2026-12-01.json", "mine/zen3-2026-12-01-2.json"]
    assert json.loads((tmp_path / "experiments/records/mine/zen3-2026-12-01-2.json").read_text()) == result
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(sj.DataError, match=r"is no result\.json of an experiment"):
        add(tmp_path / "result.json", tmp_path)


def test_the_environment_says_where_and_when():
    found = environment()
    assert found["cpu"]["model"]
    assert found["date"].startswith("20")
    assert machine_name(found)
