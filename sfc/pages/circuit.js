"use strict";
// The graph of a circuit's page, explored: its size, filters, search, and the card of the selected node.
// All text comes from prompts and vocabularies, and is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("circuit-cards").textContent);
  const graph = document.getElementById("circuit");
  const curve = document.getElementById("curve");
  const card = document.getElementById("card");
  const control = (name) => document.getElementById(name);
  const names = Object.keys(data.nodes);
  const neighbours = new Map(names.map((name) => [name, new Set()]));
  for (const [source, target] of data.edges) {
    neighbours.get(source).add(target);
    neighbours.get(target).add(source);
  }
  const FADED = 0.12;
  const LISTED = 8;
  let selected = null;

  // ---- which nodes are shown, and which stand out -------------------------------------------------

  const searchable = new Map(names.map((name) => [name, words(name).join("\n").toLowerCase()]));

  function words(name) {
    const node = data.nodes[name];
    const contexts = node.card ? node.card.contexts.map((context) => context.tokens.join("")) : [];
    return [node.text, ...(node.card ? [node.card.label, node.card.explanation] : []), ...node.raises, ...node.lowers, ...contexts];
  }

  function size() {
    return data.sizes[Number(control("size").value)];
  }

  function shownNodes() {
    const filters = [...document.querySelectorAll("select.filter")].filter((filter) => filter.value !== "");
    const limit = size() ? size().size : Infinity;
    return new Set(
      names.filter((name) => {
        const node = data.nodes[name];
        const inSize = node.rank === undefined || node.rank < limit;
        return inSize && filters.every((filter) => String(node[filter.id]) === filter.value);
      }),
    );
  }

  function outstanding(shown) {
    const query = control("search").value.trim().toLowerCase();
    if (selected !== null && shown.has(selected)) {
      return new Set([selected, ...neighbours.get(selected)].filter((name) => shown.has(name)));
    }
    return query ? new Set([...shown].filter((name) => searchable.get(name).includes(query))) : shown;
  }

  // ---- the graph ----------------------------------------------------------------------------------

  // What the traces hold when everything is shown; `customdata` says which nodes each point belongs to.
  const traces = graph.data
    .map((trace, number) => ({ number, trace, part: trace.meta && trace.meta.part }))
    .filter(({ part }) => part)
    .map(({ number, trace, part }) => ({ number, part, of: trace.customdata, x: [...trace.x], y: [...trace.y] }));
  const positions = new Map();
  for (const { part, of, x, y } of traces) {
    if (part === "nodes") of.forEach((name, i) => positions.set(name, [x[i], y[i]]));
  }

  function draw() {
    const shown = shownNodes();
    const bright = outstanding(shown);
    const isSelective = bright !== shown;
    const edgeShown = (source, target) => {
      if (!shown.has(source) || !shown.has(target)) return false;
      if (selected !== null && bright.has(selected)) return source === selected || target === selected;
      return !isSelective || bright.has(source) || bright.has(target);
    };
    const keeps = {
      nodes: (of, i) => shown.has(of[i]),
      rings: (of, i) => shown.has(of[i]),
      labels: (of, i) => bright.has(of[i]),
      edges: (of, i) => of[i - (i % 3)] !== undefined && edgeShown(of[i - (i % 3)], of[i - (i % 3) + 1]),
      "edge hovers": (of, i) => edgeShown(of[i][0], of[i][1]),
    };
    const kept = (values, { part, of }) => values.map((value, i) => (keeps[part](of, i) ? value : null));
    const all = traces.map(({ number }) => number);
    Plotly.restyle(graph, { x: traces.map((t) => kept(t.x, t)), y: traces.map((t) => kept(t.y, t)) }, all);
    const ofNodes = traces.filter(({ part }) => part === "nodes");
    Plotly.restyle(
      graph,
      {
        "marker.opacity": ofNodes.map(({ of }) => of.map((name) => (bright.has(name) ? 1 : FADED))),
        "marker.line.width": ofNodes.map(({ of }) => of.map((name) => (name === selected ? 3 : 1))),
        "marker.line.color": ofNodes.map(({ of }) => of.map((name) => (name === selected ? "#000000" : "#ffffff"))),
      },
      ofNodes.map(({ number }) => number),
    );
    const edges = data.edges.filter(([source, target]) => edgeShown(source, target)).length;
    control("shown").textContent = `${shown.size} of ${names.length} nodes and ${edges} edges shown` +
      (isSelective ? `; ${bright.size} stand out` : "");
    listMatches(isSelective && selected === null ? bright : new Set());
  }

  function listMatches(bright) {
    const best = [...bright].sort((a, b) => Math.abs(data.nodes[b].effect) - Math.abs(data.nodes[a].effect));
    const items = best.slice(0, LISTED).map((name) => element("li", {}, nodeButton(name, caption(name))));
    control("matches").replaceChildren(...items);
  }

  function moveMarker() {
    const at = size();
    if (!at) return;
    const figure = (name, value) => `${name} ${number(value)}`;
    control("size-figures").textContent =
      `${at.size} nodes: ${figure("faithfulness", at.faithfulness)} · ` +
      `${figure("completeness, normalised", at.completeness_normalised)} · ` +
      figure("random circuits", at.random_faithfulness);
    const marker = curve.data.findIndex((trace) => trace.meta && trace.meta.part === "shown");
    const [low, , high] = curve.data[marker].y;
    const x = [at.size, at.size, at.size];
    Plotly.restyle(curve, { x: [x], y: [[low, at.faithfulness, high]] }, [marker]);
  }

  // ---- the card -----------------------------------------------------------------------------------

  function select(name) {
    selected = name;
    card.hidden = name === null;
    if (name !== null) {
      card.replaceChildren(...cardOf(name));
      card.scrollTop = 0;
      // Beside the node, not over it.
      card.classList.toggle("left", positions.get(name)[0] > (graph.layout.xaxis.tickvals.length - 1) / 2);
    }
    draw();
  }

  function cardOf(name) {
    const node = data.nodes[name];
    const close = element("button", { type: "button", className: "close" }, "close");
    close.addEventListener("click", () => select(null));
    const dot = element("span", { className: "dot" });
    dot.style.background = data.colours[node.group];
    const parts = [
      close,
      element("h2", {}, caption(name)),
      element("p", {}, dot, `${data.words[node.group]} · `, element("code", {}, node.text)),
      facts(node),
    ];
    if (node.card && node.card.explanation) parts.push(element("p", {}, node.card.explanation));
    if (node.card && node.card.neuronpedia) {
      const link = element("a", { href: node.card.neuronpedia, rel: "noreferrer", target: "_blank" });
      link.textContent = "this feature at Neuronpedia";
      parts.push(element("p", {}, link));
    }
    parts.push(...tokens("raises", node.raises), ...tokens("lowers", node.lowers));
    if (node.card) parts.push(...meaning(node.card));
    parts.push(...edgesOf(name, 1, "gets from"), ...edgesOf(name, 0, "passes on to"));
    return parts;
  }

  function facts(node) {
    const rows = [
      ["layer", String(node.layer)],
      ["effect", `${number(node.effect)} ${data.unit}: ${node.sign_words}`],
      ["mean |effect|", number(node.absolute_effect)],
      ["rank", node.rank === undefined ? "none" : String(node.rank + 1)],
    ];
    if (node.effect_low !== undefined) {
      rows.splice(2, 0, ["95 % interval", `${number(node.effect_low)} to ${number(node.effect_high)}`]);
    }
    const titles = [["stability", "share of draws that keep it"], ["mask", "mask"], ["p_value", "p"], ["q_value", "q"]];
    for (const [key, title] of titles) {
      if (node[key] !== undefined) rows.push([title, number(node[key])]);
    }
    const most = Object.entries(node.by_role).filter(([, value]) => value !== 0);
    most.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    for (const [key, value] of most.slice(0, 2)) rows.push([`at ${data.roles[key]}`, number(value)]);
    return table(rows);
  }

  function tokens(title, list) {
    if (!list.length) return [];
    return [element("h3", {}, title), element("p", {}, ...list.map((token) => element("span", { className: "token" }, token)))];
  }

  function meaning(of) {
    const parts = [element("h3", {}, "fires most on")];
    for (const context of of.contexts) {
      const spans = context.tokens.map((token, i) => {
        const span = element("span", { title: number(context.values[i]) }, token);
        const share = of.max > 0 ? context.values[i] / of.max : 0;
        if (share > 0) span.style.background = `rgba(230, 159, 0, ${(0.15 + 0.75 * share).toFixed(2)})`;
        if (i === context.peak) span.className = "peak";
        return span;
      });
      const origin = element("small", {}, `${context.population} · ${context.category}`);
      parts.push(element("p", { className: "context" }, origin, ...spans));
    }
    parts.push(element("h3", {}, `active at ${(100 * of.density).toPrecision(2)} % of tokens`), histogram(of));
    parts.push(element("h3", {}, "share of prompts on which it fires"), firing(of));
    parts.push(element("h3", {}, "nearest decoder directions"));
    const near = of.neighbours.map(({ node, cosine }) => [nodeName(node), `cosine ${number(cosine)}`]);
    parts.push(table(near));
    return parts;
  }

  function histogram({ histogram }) {
    const { counts, from } = histogram;
    const most = Math.max(1, ...counts);
    const bars = counts.map((count, i) => {
      const low = from * 2 ** (i / 2);
      const bar = element("span", { title: `${number(low)} to ${number(low * Math.SQRT2)}: ${count} tokens` });
      bar.style.height = `${Math.max(2, (44 * count) / most)}px`;
      return bar;
    });
    const range = counts.length ? `${number(from)} to ${number(from * 2 ** (counts.length / 2))}, in half octaves` : "";
    return element("div", {}, element("div", { className: "histogram" }, ...bars), element("small", {}, range));
  }

  function firing(of) {
    const populations = [...new Set(data.groups.map((group) => group.population))];
    const categories = [...new Set(data.groups.map((group) => group.category))].sort();
    const share = (population, category) => {
      const i = data.groups.findIndex((group) => group.population === population && group.category === category);
      const cell = element("td", { className: "number" }, i < 0 ? "" : `${Math.round(100 * of.firing[i])} %`);
      if (i >= 0) cell.style.background = `rgba(0, 114, 178, ${(0.45 * of.firing[i]).toFixed(2)})`;
      return cell;
    };
    const head = element("tr", {}, element("th"), ...populations.map((p) => element("th", { className: "number" }, p)));
    const rows = categories.map((c) => element("tr", {}, element("td", {}, c), ...populations.map((p) => share(p, c))));
    return element("table", {}, head, ...rows);
  }

  function edgesOf(name, end, title) {
    const edges = data.edges.filter((edge) => edge[end] === name);
    if (!edges.length) return [];
    edges.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    const rows = edges.slice(0, LISTED).map((edge) => [nodeName(edge[1 - end]), number(edge[2])]);
    const unit = data.edge_unit ? ` (${data.edge_unit})` : "";
    return [element("h3", {}, `${title}, ${rows.length} of ${edges.length}${unit}`), table(rows)];
  }

  // ---- small things -------------------------------------------------------------------------------

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function table(rows) {
    const cell = (content) => element("td", {}, content);
    return element("table", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))));
  }

  function caption(name) {
    const node = data.nodes[name];
    return node.card ? node.card.label : node.kind === "error" ? "what the SAE misses" : node.text;
  }

  // A node's name; a button where the page has it.
  function nodeName(name) {
    if (!(name in data.nodes)) return element("code", {}, name);
    const node = data.nodes[name];
    return element("span", {}, nodeButton(name, node.text), node.card ? ` ${node.card.label}` : "");
  }

  function nodeButton(name, text) {
    const button = element("button", { type: "button", className: "node" }, text);
    button.addEventListener("click", () => choose(name));
    return button;
  }

  // From a list: a node that the filters hide is shown again.
  function choose(name) {
    if (!shownNodes().has(name)) showAll();
    select(name);
    card.focus();
  }

  function number(value) {
    if (value === null || value === undefined) return "not measurable";
    const text = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 5e-4)
      ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace("-", "−");
  }

  function showAll() {
    for (const filter of document.querySelectorAll("select.filter")) filter.value = "";
    control("search").value = "";
    control("size").value = control("size").max;
    moveMarker();
  }

  // Up and down within a column, left and right to the nearest node of the next column that has any.
  function step(key) {
    const shown = [...shownNodes()];
    if (selected === null || !shown.includes(selected)) {
      return shown.sort((a, b) => Math.abs(data.nodes[b].effect) - Math.abs(data.nodes[a].effect))[0] ?? null;
    }
    const [x, y] = positions.get(selected);
    const isVertical = key === "ArrowUp" || key === "ArrowDown";
    const direction = key === "ArrowUp" || key === "ArrowRight" ? 1 : -1;
    const column = (name) => Math.round(positions.get(name)[0]);
    const away = (name) => {
      const [toX, toY] = positions.get(name);
      return isVertical ? direction * (toY - y) || (toX > x ? 1e-6 : -1) : 1e4 * direction * (column(name) - Math.round(x)) + Math.abs(toY - y);
    };
    const there = shown.filter((name) =>
      isVertical ? column(name) === Math.round(x) && name !== selected && away(name) > 0
        : direction * (column(name) - Math.round(x)) > 0);
    return there.sort((a, b) => away(a) - away(b))[0] ?? selected;
  }

  // ---- what the reader does -----------------------------------------------------------------------

  control("size").addEventListener("input", () => { moveMarker(); draw(); });
  control("search").addEventListener("input", () => select(null));
  for (const filter of document.querySelectorAll("select.filter")) filter.addEventListener("change", draw);
  control("reset").addEventListener("click", () => { showAll(); select(null); });
  for (const format of ["svg", "png"]) {
    control(`save-${format}`).addEventListener("click", () =>
      Plotly.downloadImage(graph, { format, filename: "circuit", width: graph.clientWidth, height: graph.clientHeight, scale: format === "png" ? 2 : 1 }));
  }
  for (const row of document.querySelectorAll("[data-node]")) {
    if (row.dataset.node in data.nodes) row.replaceChildren(nodeButton(row.dataset.node, row.textContent));
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") select(null); });
  graph.tabIndex = 0;
  graph.setAttribute("aria-label", "graph of the circuit: arrow keys go from node to node, Escape closes the card");
  graph.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    select(step(event.key));
  });
  graph.drawn.then(() => {
    graph.on("plotly_click", ({ points }) => { if (points[0].id in data.nodes) select(points[0].id); });
    moveMarker();
    draw();
  });
})();
