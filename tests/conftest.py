"""Shared models and drafters; the two tiers, and how the tests are shared out among the workers."""

import dataclasses
import importlib.util
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import specjax as sj
from specjax import ops
from specjax.heads import init_heads
from specjax.loading.head_files import save_heads
from specjax.loading.hf import save_hf
from specjax.loading.tokenizer import Tokenizer
from specjax.proposal import Proposal
from specjax.target import params

REAL = Path(__file__).parent / "real"

# Parity needs torch, whose CPU build exists for Python 3.11 only; the Makefile says so when it leaves it out.
collect_ignore = [] if importlib.util.find_spec("transformers") else ["parity"]


def pytest_addoption(parser):
    """`--fast`: the tier of `make test`. Without it everything runs, as in `make test-full`."""
    parser.addoption("--fast", action="store_true", help="leave out the tests marked `full`, and draw fewer samples")


def pytest_configure(config):
    """Shares the CPUs among the workers, and chooses how programs are compiled."""
    share_cpus()
    choose_optimisation(config)


def pytest_collection_modifyitems(config, items):
    """Chooses the tier."""
    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hands out what `piece_of_work` names, whatever `--dist` says. (pytest 9.2 does not heed xdist's loadgroup.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return piece_of_work(nodeid, config.getoption("--fast"))

    return Pieces(config, log)


def piece_of_work(nodeid: str, fast: bool) -> str:
    """What one worker runs in one go: a file, whose tests share compiled programs and fixtures.

    The cases of test_laws.py share nothing, and SmolLM2's greedy answers take longer than all else: they are cut. The
    smallest pieces are handed out last, and fill the gap that the files leave.
    """
    file = nodeid.split("::")[0]
    if file.endswith("drafters/test_laws.py"):
        return nodeid
    if file.endswith("real/test_greedy.py") and "draft" in nodeid.removeprefix(file) and not fast:
        return f"{file}, with a draft model"
    return file


@pytest.fixture(scope="session")
def fast(pytestconfig) -> bool:
    """Whether this is the tier of `make test`, where a test may draw fewer samples or take fewer prompts."""
    return pytestconfig.getoption("--fast")


def share_cpus():
    """Keeps every worker on CPUs of its own, before XLA counts them.

    Each would otherwise start as many threads as there are CPUs. Two batches of SmolLM2 side by side take 31 to 33 s,
    34 to 39 without, and a part of the other tests 221 s, 235 without (2 cores of a Zen 3; the latter one run each).
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(count)]
        if mine:  # with more workers than CPUs the last ones have none
            os.sched_setaffinity(0, mine)


def choose_optimisation(config):
    """Compiles cheaply where the models are tiny and most of the time is compilation: 2.5 times as fast.

    The products of a model are library calls, whatever the level, but the rest is slower: real weights (`tests/real`)
    run as a user's would. XLA reads the flags when it first compiles, once in a process.
    """
    asked = [Path(config.invocation_params.dir, arg.split("::")[0]) for arg in config.args]
    if all(path.is_relative_to(REAL) for path in asked):
        return
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__[:2] == (0, 10):  # XLA ends a process that gives it a flag it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()


@pytest.fixture(autouse=True)
def room_for_executables():
    """Drops compiled code before the process runs out of memory mappings.

    XLA:CPU maps every executable in many pieces, and Linux allows 65,530 of them (vm.max_map_count): beyond that, the
    compiler aborts the process. The suite compiles more than that.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


def tiered(essential, *axes, ids=str):
    """Every combination of `axes`, a parameter each; those that are not `essential` are for the full tier alone."""
    return [
        pytest.param(*case, marks=() if essential(*case) else pytest.mark.full, id="-".join(map(ids, case)))
        for case in itertools.product(*axes)
    ]


def tiny_config(vocab: int = 61, **changes) -> sj.ModelConfig:
    """Two layers, grouped-query attention; every field can be overridden."""
    shape = {
        "family": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 512,
    }  # fmt: skip
    return sj.ModelConfig(**(shape | changes))


def tiny_model(seed: int = 0, stddev: float = 0.5, **changes) -> sj.Model:
    """Random weights, large enough that the next token depends on the context."""
    config = tiny_config(**changes)
    return sj.Model(params.init(jax.random.key(seed), config, stddev=stddev), config, None)


@pytest.fixture(scope="session")
def model() -> sj.Model:
    """A tiny Llama."""
    return tiny_model()


@pytest.fixture(scope="session")
def smollm2() -> sj.Model:
    """SmolLM2-135M-Instruct, float32."""
    return sj.load_model("smollm2-135m-instruct")


@pytest.fixture
def xla_products():
    """XLA's products on a CPU, for which rows are padded and the cache is read in blocks."""
    with ops.cpu_products("xla"):
        yield


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
HITS = [[0.5, 0.2, 0.1, 0.05], [0.3, 0.2, 0.1, 0.1]]


def byte_tokenizer(template: str, special: tuple[str, ...] = (), eos: str | None = None) -> Tokenizer:
    """A token for every byte and for each of `special`, whose ids follow."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    stops = () if eos is None else (backend.token_to_id(eos),)
    return Tokenizer(backend, chat_template=template, eos_token_ids=stops)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory with a tiny Llama, a byte-level tokenizer with a chat template, and heads beside it."""
    directory = tmp_path_factory.mktemp("model")
    config = tiny_config(vocab=256, max_positions=2048)
    weights = params.init(jax.random.key(0), config, stddev=0.5)
    save_hf(directory, weights, config)
    byte_tokenizer(TEMPLATE).backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    heads = init_heads(sj.MedusaConfig(2, 16, 256, projection="shared"), weights)
    save_heads(directory / "heads" / "heads.safetensors", heads, {"hits": HITS})
    return directory


def save_chat_model(directory: Path) -> Path:
    """Writes a model whose next token depends on the last one alone, and a tokenizer with a training template."""
    config = tiny_config(vocab=256, hidden_size=32, num_layers=1, max_positions=1024)
    weights = params.init(jax.random.key(5), config, stddev=0.5)
    layer = dataclasses.replace(weights.layers[0], out=jnp.zeros_like(weights.layers[0].out))
    save_hf(directory, dataclasses.replace(weights, layers=(layer,)), config)
    template = TEMPLATE.replace("<a>", "<assistant>")
    byte_tokenizer(template).backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def followed_by(function, then):
    """`function`, and `then()` right after it."""

    def both(*args, **kwargs):
        result = function(*args, **kwargs)
        then()
        return result

    return both


def noisy_heads(model: sj.Model, heads: int, seed: int = 1) -> sj.Heads:
    """Heads that start from the LM head and are disturbed: sometimes right."""
    made = init_heads(sj.MedusaConfig(heads, model.config.hidden_size, model.config.vocab_size), model.params)
    keys = jax.random.split(jax.random.key(seed), len(made.params))
    noisy = {
        n: v + 0.3 * jax.random.normal(k, v.shape, v.dtype) for k, (n, v) in zip(keys, made.params.items(), strict=True)
    }
    return dataclasses.replace(made, params=noisy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScriptedDrafter:
    """Knows the whole sequence in advance. A node of rank r at depth d holds the true token plus shift[d - 1, r].

    Shift 0 makes it an oracle; no zero anywhere makes it always wrong. Shifts are data, so that all kinds of
    drafters share one compilation.
    """

    future: jax.Array  # [S]
    shift: jax.Array  # [depth, ranks]
    vocab: jax.Array
    tree: sj.Tree = field(metadata={"static": True})

    max_positions = None
    subtrees = ()

    def check(self, config):
        """Fits every target."""

    def prepare(self, target):
        """Nothing to prepare."""
        return self

    def init(self, target, context):
        """No state."""

    def propose(self, target, state, context, key):
        """True tokens, shifted."""
        depths, ranks = self.tree.depths, np.asarray(self.tree.ranks)
        true = jnp.take(self.future, context.length - 1 + depths, mode="clip")
        shifted = (true + self.shift[np.maximum(depths - 1, 0), ranks]) % self.vocab
        return Proposal(jnp.where(depths == 0, context.root, shifted))

    def update(self, state, context, verdict, longest):
        """No state."""


def scripted(model: sj.Model, prompt, tree: sj.Tree, kind: str, length: int = 96, seed: int = 0) -> ScriptedDrafter:
    """An `oracle`, `wrong` or `random` drafter for what the model would say autoregressively."""
    told = sj.generate(model, prompt, max_new_tokens=length, eos_token_ids=(), capacity=256).tokens
    future = np.concatenate([prompt, told])
    ranks, vocab = max(tree.ranks) + 1, model.config.vocab_size
    rng = np.random.default_rng(seed)
    depth = max(tree.max_depth, 1)
    shift = {
        "oracle": np.zeros((depth, ranks), int),  # every rank is right, so that the deepest path is, whatever its ranks
        "wrong": 1 + np.arange(ranks)[None].repeat(depth, 0),
        "random": np.stack([rng.permutation(ranks + 1)[:ranks] for _ in range(depth)]),
    }[kind]
    return ScriptedDrafter(jnp.asarray(future, jnp.int32), jnp.asarray(shift), jnp.int32(vocab), tree)
