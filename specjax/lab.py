"""What a notebook needs beside `specjax` itself: `from specjax import lab`."""

from specjax.corpus.answers import answer, distinct
from specjax.corpus.prompts import load_prompts
from specjax.corpus.seeds import seed_prompts
from specjax.corpus.texts import greedy_answers, per_category
from specjax.heads import init_heads
from specjax.loading.head_files import packaged_ranks
from specjax.ranks.measuring import Text, measure
from specjax.ranks.search import Limits, greedy_tree, joint_tree, sequoia_tree
from specjax.ranks.simulation import Simulation, accepted_lengths, drafted, reach, simulate, upper_bound
from specjax.ranks.table import RankTable
from specjax.ranks.validate import SEARCHES, search_trees
from specjax.report import decode_figures, rank_figures
from specjax.report.tree_figure import draw_tree
from specjax.studies.round_anatomy import RoundAnatomy, take_apart
from specjax.studies.round_time import RoundTimes, choose_tree, time_rounds
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, dataset
from specjax.training.run import train

__all__ = [
    "SEARCHES",
    "CachedMedusa",
    "CachedMedusaConfig",
    "Limits",
    "RankTable",
    "RoundAnatomy",
    "RoundTimes",
    "Simulation",
    "Text",
    "accepted_lengths",
    "answer",
    "choose_tree",
    "dataset",
    "decode_figures",
    "distinct",
    "drafted",
    "draw_tree",
    "greedy_answers",
    "greedy_tree",
    "init_heads",
    "joint_tree",
    "load_prompts",
    "measure",
    "packaged_ranks",
    "per_category",
    "rank_figures",
    "reach",
    "search_trees",
    "seed_prompts",
    "sequoia_tree",
    "simulate",
    "take_apart",
    "time_rounds",
    "train",
    "upper_bound",
]
