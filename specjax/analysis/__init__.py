"""Measuring and drawing what drafters and trees do: `import specjax.analysis as lab` has what a researcher needs."""

from specjax.analysis import plots, rank_plots
from specjax.analysis.anatomy import RoundAnatomy, take_apart
from specjax.analysis.ranks import Text, measure
from specjax.analysis.round_time import RoundTimes, choose_tree, time_rounds
from specjax.analysis.search import Limits, greedy_tree, joint_tree, sequoia_tree
from specjax.analysis.simulate import Simulation, accepted_lengths, drafted, reach, simulate, upper_bound
from specjax.analysis.table import RankTable
from specjax.analysis.texts import greedy_answers, per_category
from specjax.analysis.tree_plot import draw_tree
from specjax.analysis.validate import SEARCHES, search_trees
from specjax.loading.heads import packaged_ranks
from specjax.prompts import load_prompts

__all__ = [
    "SEARCHES",
    "Limits",
    "RankTable",
    "RoundAnatomy",
    "RoundTimes",
    "Simulation",
    "Text",
    "accepted_lengths",
    "choose_tree",
    "drafted",
    "draw_tree",
    "greedy_answers",
    "greedy_tree",
    "joint_tree",
    "load_prompts",
    "measure",
    "packaged_ranks",
    "per_category",
    "plots",
    "rank_plots",
    "reach",
    "search_trees",
    "sequoia_tree",
    "simulate",
    "take_apart",
    "time_rounds",
    "upper_bound",
]
