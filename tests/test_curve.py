"""The curve of a circuit by its size."""

import math

import pandas as pd
import plotly.graph_objects as go
from drawn_circuits import make_curve

from sfc.pages.explorable import shown_sizes
from sfc.pages.proof import curve_figure


def traces_by_name(figure: go.Figure) -> dict[str, dict]:
    return {trace["name"]: trace for trace in figure.to_dict()["data"] if "name" in trace}


def test_curve_shows_its_columns_on_a_log_axis_with_values_out_of_sight_still_there():
    figure = curve_figure(make_curve(completeness=[0.9, 0.4, -0.2, -40.0]), 500)
    traces = traces_by_name(figure)
    assert traces["faithfulness"]["y"] == [0.1, 0.5, 0.9, 1.0]
    assert traces["by what the size was chosen, discovery split"]["line"]["dash"] == "dash"
    assert traces["completeness, as published"]["y"][-1] == -40
    layout = figure.to_dict()["layout"]
    assert layout["xaxis"]["type"] == "log" and layout["yaxis"]["range"] == [-0.5, 1.5]
    assert {shape["y0"] for shape in layout["shapes"] if shape["y0"] == shape["y1"]} == {0, 1}
    assert 500 in [shape["x0"] for shape in layout["shapes"]]
    assert any("500" in annotation["text"] for annotation in layout["annotations"])


def test_figures_that_are_not_measurable_are_gaps():
    figure = curve_figure(make_curve(faithfulness=[0.1, None, math.inf, 1.0], random_low=[0, None, 0.1, 0.2]), 50)
    assert traces_by_name(figure)["faithfulness"]["y"] == [0.1, None, None, 1.0]
    bands = [trace for trace in figure.to_dict()["data"] if trace.get("fill") == "toself"]
    assert [max(band["x"]) for band in bands] == [5, 5000, 5000], "two of random circuits, one of the interval"


def test_a_curve_without_any_measurable_figure_says_so():
    nothing = [None] * 4
    curve = pd.DataFrame({column: make_curve()["size"] if column == "size" else nothing for column in make_curve()})
    assert "Not measurable" in str(curve_figure(curve, 50).to_dict()["layout"]["annotations"])
    assert "Not measurable" not in str(curve_figure(make_curve(faithfulness=nothing), 50).to_dict()["layout"])
    assert "Not measurable" in str(curve_figure(curve.assign(size=[0, 0, 0, 0]), 0).to_dict()["layout"])


def test_the_slider_offers_the_sizes_of_the_curve_up_to_the_whole_graph():
    curve = make_curve(faithfulness=[None, 0.5, 0.9, 1.0])
    sizes = shown_sizes(curve, 120)
    assert [at["size"] for at in sizes] == [5, 50, 120]
    assert [at["faithfulness"] for at in sizes] == [None, 0.5, None]
    assert [at["size"] for at in shown_sizes(curve, 500)] == [5, 50, 500]
    assert shown_sizes(curve, 0) == []
