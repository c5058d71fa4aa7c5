"use strict";
// Each figure's JSON lies beside its place; the values never pass through HTML or JavaScript source.
for (const place of document.querySelectorAll(".figure")) {
  const figure = JSON.parse(document.getElementById(place.id + "-data").textContent);
  place.drawn = Plotly.newPlot(place, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    // Only buttons that are named: the default ones can upload the figure to Plotly's servers.
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
    toImageButtonOptions: { format: "svg", filename: place.id },
  });
}
