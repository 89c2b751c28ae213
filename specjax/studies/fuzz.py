"""Damaged and hostile files: every reader, given mutants of good files, gives a result or a `SpecJaxError`, soon."""

import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from specjax import run_settings
from specjax.corpus import manifest, shards
from specjax.corpus.chats import read_conversations, read_prompts
from specjax.corpus.prompts import load_prompts
from specjax.environment import environment
from specjax.errors import ConfigError, SpecJaxError
from specjax.heads import MedusaConfig, init_heads
from specjax.journal import Journal
from specjax.loading import torch_pickle
from specjax.loading.export import export_heads
from specjax.loading.gguf import load_gguf
from specjax.loading.head_files import heads_metadata, load_heads, save_heads
from specjax.loading.hf import load_hf, save_hf
from specjax.loading.load import Model, load_draft, save_draft
from specjax.loading.tokenizer import Tokenizer
from specjax.ranks.table import RankTable
from specjax.report.records import load_records
from specjax.stopping import Stopped, asked, reason
from specjax.studies.mutants import mutant
from specjax.studies.round_time import RoundTimes
from specjax.target import params
from specjax.target.config import ModelConfig
from specjax.tree import Tree

_CONFIG = ModelConfig("llama", 64, 16, 24, 2, 4, 2, 4, max_positions=64, eos_token_ids=(2,))
_TEMPLATE = (
    "{% for m in messages %}{{ '<|s|>' + m['role'] + '\n' + (m['content'] or '') + '<|e|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|s|>assistant\n' }}{% endif %}"
)
_CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 1}]}
_SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
_SETTINGS = {"training": {"learning_rate": 0.1}, "data": {"positions": 9}}
_SECONDS, _BYTES = 2.0, 500 << 20  # that a mutant may take; more is a find


@dataclass(frozen=True)
class Reader:
    """One reader with good files.

    Attributes:
      write: puts good files into a folder.
      read: reads them; the folder is all that it is given.
      mutated: names of the files that are mutated.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    mutated: tuple[str, ...]


def _model() -> Model:
    return Model(params.init(jax.random.key(0), _CONFIG), _CONFIG, None)


def _save_model(folder: Path) -> None:
    save_hf(folder, _model().params, _CONFIG)


def _save_shards(folder: Path) -> None:
    _save_model(folder)
    found = _tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    from safetensors.numpy import save_file

    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: found[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(file)


def _save_gguf(folder: Path) -> None:
    _save_model(folder)
    stored = _tensors(folder / "model.safetensors")
    from specjax.target.families import FAMILIES

    family = FAMILIES[0]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(_CONFIG.num_layers)
    writer.add_context_length(_CONFIG.max_positions)
    writer.add_embedding_length(_CONFIG.hidden_size)
    writer.add_feed_forward_length(_CONFIG.intermediate_size)
    writer.add_head_count(_CONFIG.num_heads)
    writer.add_head_count_kv(_CONFIG.num_kv_heads)
    writer.add_key_length(_CONFIG.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_CONFIG.vocab_size)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_chat_template(_TEMPLATE)
    tokens = ["a", "b", "<|e|>", "ab", *(f"t{i}" for i in range(4, 64))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i == 2 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges(["a b"])
    for role, name in family.hf_names.items():
        for layer in range(_CONFIG.num_layers):
            if (tensor := stored.get(name.format(layer))) is not None and ("{}" in name or layer == 0):
                writer.add_tensor(family.gguf_names[role].format(layer), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _backend() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|s|>", "<|e|>"])
    return backend


def _save_tokenizer(folder: Path) -> None:
    Tokenizer(_backend(), chat_template=_TEMPLATE, special_tokens={"eos_token": "<|e|>"}).save(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|s|>"]}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|s|>": 256, "<|e|>": 257}))


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_hf(folder, (257,))
    if tokenizer is not None:
        tokenizer.turn_end()
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "x": 1}]
        )
        tokenizer.decode(tokenizer.encode("Hé <|s|> x"))


def _save_template(folder: Path) -> None:
    _save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _heads(layout: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        model = _model()
        heads = init_heads(MedusaConfig(2, 16, 64), model.params)
        if layout == "native":
            save_heads(folder / "heads.safetensors", heads, {"hits": [[0.5, 0.1], [0.3, 0.1]]})
        elif layout == "pickle":
            export_heads(folder / "x", heads, model, "medusa", base_model="m")
            (file,) = (folder / "x").glob("medusa_lm_head.*")
            found = torch_pickle.scan(file) if file.suffix == ".pt" else None
            arrays = {n: torch_pickle.read(t) for n, t in found.items()} if found is not None else _tensors(file)
            torch_pickle.write(folder / "medusa_lm_head.pt", arrays)
            shutil.rmtree(folder / "x")
        else:
            export_heads(folder, heads, model, layout, base_model="m")

    return write


def _read_heads(folder: Path) -> None:
    load_heads(folder, _CONFIG)
    heads_metadata(folder)


def _save_ranks(folder: Path) -> None:
    n = 12
    columns = {"confidence": np.ones((n, 2), np.float32), "log_p": np.zeros(n, np.float32)}
    columns |= {"entropy": np.zeros(n, np.float32), "tokens": np.arange(n, dtype=np.int32)}
    ranks = (np.arange(2 * n).reshape(n, 2) % 3).astype(np.int16)
    lengths = np.array([5, 7])
    RankTable(ranks, lengths=lengths, categories=("a", "b"), cap=8, manifest={"dtype": "float32"}, **columns).save(
        folder / "ranks.npz"
    )


def _save_shard(folder: Path) -> None:
    arrays = {"tokens": np.arange(7, dtype=np.int32), "lengths": np.array([3, 4]), "prompts": np.arange(5)}
    np.savez(folder / "shard_00000.npz", **arrays, prompt_lengths=np.array([2, 3]))  # type: ignore[arg-type]
    made = manifest.Manifest("m", "name", "t", {"source": "model"}, {"seed": 0}, 2, False)
    made.save(folder, {"shards": 1, "conversations": 2, "answer_tokens": 7})


def _read_shard(folder: Path) -> None:
    shards.read_shards([folder / "shard_00000.npz"])
    manifest.load(folder)


def _lines(*records: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))

    return write


def _save_tree(folder: Path) -> None:
    Tree.cartesian((2, 2)).save(folder / "tree.json")


def _read_chats(folder: Path) -> None:
    tokenizer = Tokenizer(_backend(), chat_template=_TEMPLATE, eos_token_ids=(257,))
    read_conversations(folder / "lines.jsonl", tokenizer, max_tokens=500)
    read_prompts(folder / "lines.jsonl")


def _save_results(folder: Path) -> None:
    rows = [{"nodes": n, "milliseconds": {"median": 1.0 + n, "min": 1.0, "max": 9.0}} for n in (1, 2, 4)]
    result = {"experiment": "bench", "config": {"dtype": "float32"}, "environment": environment(), "rows": rows}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "settings.json").write_text(json.dumps(_SETTINGS))


def _read_results(folder: Path) -> None:
    from specjax.report.records import table

    records = load_records(folder)
    if records:
        table(records)
    RoundTimes.from_result(json.loads((folder / "result.json").read_text()))


def _save_token_map(folder: Path) -> None:
    save_draft(folder, _model().params, _CONFIG, np.arange(64))


READERS: Mapping[str, Reader] = {
    "safetensors": Reader(_save_model, lambda f: load_hf(f, np.float32), ("model.safetensors",)),
    "index": Reader(_save_shards, lambda f: load_hf(f, np.float32), ("model.safetensors.index.json",)),
    "config": Reader(_save_model, lambda f: load_hf(f, np.float32), ("config.json",)),
    "gguf": Reader(
        _save_gguf, lambda f: Tokenizer.from_gguf(load_gguf(f / "model.gguf", np.float32)[2], ()), ("model.gguf",)
    ),
    "tokenizer": Reader(_save_tokenizer, _read_tokenizer, ("tokenizer.json",)),
    "special tokens": Reader(
        _save_tokenizer, _read_tokenizer, ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    ),
    "template": Reader(_save_template, _read_tokenizer, ("chat_template.jinja",)),
    "heads, native": Reader(_heads("native"), _read_heads, ("heads.safetensors",)),
    "heads, pickle": Reader(_heads("pickle"), _read_heads, ("medusa_lm_head.pt",)),
    "heads, vllm": Reader(_heads("vllm"), _read_heads, ("model.safetensors", "config.json")),
    "heads, bundled": Reader(_heads("bundled"), _read_heads, ("model.safetensors", "config.json")),
    "token map": Reader(_save_token_map, lambda f: load_draft(f), ("token_map.npy",)),
    "rank table": Reader(_save_ranks, lambda f: RankTable.load(f / "ranks.npz"), ("ranks.npz",)),
    "tree": Reader(_save_tree, lambda f: Tree.load(f / "tree.json"), ("tree.json",)),
    "prompts": Reader(
        _lines(*[{"question_id": i, "category": "c", "turns": ["a", "b"]} for i in range(3)]),
        lambda f: load_prompts(f / "lines.jsonl"),
        ("lines.jsonl",),
    ),
    "chats": Reader(_lines(_CHAT, _SHAREGPT), _read_chats, ("lines.jsonl",)),
    "shards": Reader(_save_shard, _read_shard, ("shard_00000.npz", "manifest.json")),
    "results": Reader(_save_results, _read_results, ("result.json",)),
    "settings of a run": Reader(
        _save_results, lambda f: run_settings.check(f / "settings.json", _SETTINGS), ("settings.json",)
    ),
}  # fmt: skip


class _TooLongError(BaseException):
    """So that no `except Exception` swallows it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise _TooLongError


def attack(name: str, mutants: int, seed: int) -> dict[str, Any]:
    """Reads that many mutants; gives how they ended, and the finds: what ended otherwise, or took too much."""
    import faulthandler
    import warnings

    faulthandler.enable()
    warnings.simplefilter("ignore")
    reader, rng = READERS[name], np.random.default_rng([seed, zlib.crc32(name.encode())])
    ends: Counter[str] = Counter()
    finds: list[dict[str, Any]] = []
    slowest = 0.0
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as root:
        good, folder = Path(root) / "good", Path(root) / "bad"
        good.mkdir()
        reader.write(good)
        reader.read(good)  # compiles what it compiles
        contents = {file: (good / file).read_bytes() for file in reader.mutated}
        shutil.copytree(good, folder)
        peak = _peak()
        for number in range(mutants):
            file = reader.mutated[number % len(reader.mutated)]
            made = mutant(contents[file], file, rng)
            (folder / file).write_bytes(made)
            begin = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, 5 * _SECONDS)
            try:
                reader.read(folder)
                end = "read"
            except SpecJaxError as error:
                end = type(error).__name__
            except BaseException as error:  # the finds
                end = f"{type(error).__name__}: {str(error)[:200]}"
            signal.setitimer(signal.ITIMER_REAL, 0)
            took, grown = time.perf_counter() - begin, _peak() - peak
            (folder / file).write_bytes(contents[file])
            slowest, peak = max(slowest, took), max(peak, _peak())
            if took > _SECONDS:
                end = f"took {took:.1f} s, then {end}"
            elif grown > _BYTES:
                end = f"took {grown >> 20} MB, then {end}"
            known = end == "read" or end in {kind.__name__ for kind in SpecJaxError.__subclasses__()}
            ends[end if known else "find"] += 1
            if not known and len(finds) < 20:
                finds.append({"number": number, "file": file, "end": end})
    return {"reader": name, "mutants": mutants, "seed": seed, "ends": dict(ends), "finds": finds, "slowest": slowest}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Fuzz:
    """Mutants of good files for every reader, each in a process of its own."""

    name: str
    mutants: int = 20_000
    seed: int = 0
    readers: tuple[str, ...] = tuple(READERS)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints how they ended, and gives the counts and every find."""
        if unknown := set(self.readers) - READERS.keys():
            raise ConfigError(f"there is no reader {min(unknown)!r}; expected some of {', '.join(READERS)}.")
        begin = time.perf_counter()
        journal = Journal.of(self, output_dir, commit=environment()["git_commit"])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = list(pool.map(functools.partial(self._kept, journal), self.readers))
        rows = [row for row in found if row is not None]
        partial = None if len(rows) == len(found) else reason(f"{len(rows)} of {len(found)} readers")
        if not rows:
            raise Stopped(f"{partial}")
        view = Table("reader", "mutants", "read", "refused", "finds", "slowest, s")
        for row in rows:
            ends = row["ends"]
            refused = sum(ends.values()) - ends.get("read", 0) - ends.get("find", 0)
            cells = (row["mutants"], ends.get("read", 0), refused, ends.get("find", 0), f"{row['slowest']:.2f}")
            view.add_row(row["reader"], *map(str, cells))
            for find in row["finds"]:
                console.print(f"{row['reader']}: {find}")
        console.print(view)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "seconds": time.perf_counter() - begin,
            "rows": [{**row, **row["ends"]} for row in rows],
            "partial": partial,
        }

    def _kept(self, journal: Journal, reader: str) -> dict[str, Any] | None:
        try:
            return dict(journal.once(reader, functools.partial(self._attacked, reader)))
        except Stopped:
            return None

    def _attacked(self, reader: str) -> dict[str, Any]:
        # A process each: a crash of a library ends it, and is a find.
        of = f"{reader!r}, {self.mutants}, {self.seed}"
        call = f"import json; from specjax.studies.fuzz import attack; print(json.dumps(attack({of})))"
        quiet = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", call]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # In a session of its own: a terminal's Ctrl-C would reach it too.
        with subprocess.Popen(command, **pipes, env=quiet, start_new_session=True) as process:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    if asked() is not None:
                        process.kill()
                        raise Stopped(reader) from None
        try:
            return dict(json.loads(stdout.splitlines()[-1]))
        except (IndexError, ValueError):
            end = f"the process ended with {process.returncode}: {stderr[-500:]}"
            return {
                "reader": reader, "mutants": self.mutants, "seed": self.seed, "ends": {"find": 1},
                "finds": [{"number": -1, "file": "", "end": end}], "slowest": math.nan,
            }  # fmt: skip
