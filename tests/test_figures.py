"""Figures that can be read: nothing is printed over anything, and none grows wide with the number of methods."""

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import specjax as sj
from specjax.ranks.table import RankTable
from specjax.report import decode_figures, rank_figures, training_figures
from specjax.report.headline import DRAFTERS, SEARCHES, headline
from specjax.report.records import Record
from specjax.report.style import drafter_kind, drafter_style, series
from specjax.report.tree_figure import draw_tree
from specjax.studies.tree_search import packaged_ranks

RECORDS = Path(__file__).parents[1] / "experiments" / "records"
LONG = "a draft model of five million parameters beside n-grams of up to seven tokens and Medusa"


def result(name):
    return json.loads((RECORDS / name).read_text())


def drawn(figure):
    """The renderer after a first drawing, by which layouts are settled."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def texts(figure, renderer):
    """Boxes of all texts that are seen, but those that belong to one another's legend entry."""
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found]


def overlapping(figure):
    """Pairs of texts that are printed over each other by more than a pixel."""
    boxes = texts(figure, drawn(figure))
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def many(name):
    """A result with four times the methods, of long names."""
    found = result(name)
    more = [{**m, "name": f"{LONG} {i}"} for i in range(3) for m in found["methods"]]
    return {**found, "methods": [*found["methods"], *more]}


RESULTS = {
    "demo": lambda: result("smollm2_medusa/xeon-2026-11-30.json"),
    "comparison": lambda: result("compare_drafters_smollm2/zen3-2026-11-27.json"),
    "long names": lambda: many("smollm2_medusa/xeon-2026-11-30.json"),
    "one method": lambda: {"methods": result("smollm2_medusa/xeon-2026-11-30.json")["methods"][:2]},
}
FIGURES = [decode_figures.tokens_per_round, decode_figures.acceptance_by_depth, decode_figures.speed]


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", RESULTS)
def test_nothing_is_printed_over_anything(name, draw):
    figure = draw(RESULTS[name]())
    assert overlapping(figure) == []
    assert figure.get_figwidth() * 130 <= 1600
    assert_legends_are_outside(figure)


def assert_legends_are_outside(figure):
    renderer = drawn(figure)
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        for axes in figure.axes:
            area = axes.get_window_extent(renderer)
            assert min(box.x1, area.x1) <= max(box.x0, area.x0) or min(box.y1, area.y1) <= max(box.y0, area.y0)


def test_the_headline():
    read = [Record(path.stem, result(path)) for path in (DRAFTERS, *SEARCHES)]
    assert overlapping(headline(read[0], read[1:])) == []


@pytest.mark.parametrize(
    "tree", [sj.Tree.chain(4), sj.Tree.cartesian((3, 2, 1)), sj.Tree.preset("mc_sim_7b_63")], ids=str
)
def test_trees_scale_their_colours_to_the_data(tree):
    rates = [0.0] + [0.3 / (1 + tree.ranks[node]) for node in range(1, tree.size)]
    axes = draw_tree(tree, edge_values=rates)
    drawn(axes.figure)
    (bar,) = [other for other in axes.figure.axes if other is not axes]
    assert bar.get_ylim()[1] == pytest.approx(max(rates))
    for line in axes.lines:  # dark enough to be seen on white
        assert sum(line.get_color()[:3]) / 3 < 0.75


def test_drafters_and_dtypes_stay_apart_in_grey():
    greys = {}
    for name, nodes in (("autoregressive", 1), ("ngram", 8), ("draft tree", 7), ("medusa", 4), ("ngram+medusa", 8)):
        colour = drafter_style(name, nodes, "float32")["color"].lstrip("#")
        red, green, blue = (int(colour[i : i + 2], 16) for i in (0, 2, 4))
        greys[drafter_kind(name, nodes)] = 0.299 * red + 0.587 * green + 0.114 * blue
    assert len(greys) == 5
    assert min(abs(a - b) for a, b in itertools.combinations(greys.values(), 2)) > 12
    assert drafter_style("medusa", 4, "float32")["hatch"] != drafter_style("medusa", 4, "bfloat16")["hatch"]
    assert drafter_kind("vanilla", 3) == "draft"


def test_training_curves_have_whole_steps():
    log = [
        {"step": step, "eval": {"losses": [3.0, 4.0], "accuracy": {"top1": [0.1, 0.2], "top3": [0.2, 0.3]}}}
        for step in range(3)
    ]
    for figure in (training_figures.loss_per_head(log), training_figures.accuracy_per_head(log)):
        assert overlapping(figure) == []
        ticks = [tick for tick in figure.axes[0].get_xticks() if 0 <= tick <= 2]
        assert ticks == [int(tick) for tick in ticks]


def test_rank_figures():
    table = RankTable.load(packaged_ranks("smollm2-135m-instruct"))
    curves = {f"the curve of number {i}": [(n, i + n) for n in (2, 4, 8)] for i in range(5)}
    figures = [
        rank_figures.accuracy_by_head(table),
        rank_figures.accuracy_by_category(table),
        rank_figures.accuracy_by_entropy(table),
        rank_figures.calibration(table),
        rank_figures.tokens_against_nodes(curves),
        rank_figures.speedup_against_nodes(curves),
        rank_figures.speed_against_nodes(curves, 3.0),
        rank_figures.predicted_against_measured(curves, "Tokens per round"),
    ]
    for figure in figures:
        assert overlapping(figure) == []
        assert figure.legends
        assert not figure.axes[0].get_legend()
        assert_legends_are_outside(figure)


def test_numbered_curves_stay_apart_in_grey():
    looks = [series(number) for number in range(5)]
    rgb = [[int(look["color"][i : i + 2], 16) for i in (1, 3, 5)] for look in looks]
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in rgb]
    assert min(abs(a - b) for a, b in itertools.combinations(greys, 2)) > 12
    assert len({look["marker"] for look in looks}) == 5
