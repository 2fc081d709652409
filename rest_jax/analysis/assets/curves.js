// The tables and curves of the runs. DATA is what `analysis/page.py` embedded; text reaches the page as textContent alone.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
// What is set, not measured: nothing to smooth.
const SET = ["curriculum/nu", "update/learning_rate"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
// At some points of the curves of runs that have the colour, or the dashes, of an earlier one.
const SYMBOLS = [null, "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon"];

// Control characters, and those without width or that turn the direction of text, are named; a line end is marked and kept.
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => `⟨${c.codePointAt(0).toString(16).padStart(4, "0").toUpperCase()}⟩`);
}

function make(tag, text, ...classes) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = visible(text);
  node.classList.add(...classes);
  return node;
}

function table(rows, ...classes) {
  const made = make("table", undefined, ...classes);
  rows.forEach((row, i) => {
    const line = made.appendChild(make("tr"));
    for (const cell of row) {
      const number = typeof cell === "number";
      line.appendChild(make(i ? "td" : "th", number ? short(cell) : cell ?? "–", ...(number ? ["number"] : [])));
    }
  });
  return made;
}

function short(x) {
  return Number.isInteger(x) ? String(x) : String(Number(x.toPrecision(4)));
}

// Exponential moving average without the bias of its start; `factor` 0 changes nothing.
function smooth(values, factor) {
  let sum = 0, weight = 0;
  return values.map((x) => {
    sum = factor * sum + (1 - factor) * x;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

function rgba(hex, alpha) {
  const part = (i) => parseInt(hex.slice(i, i + 2), 16);
  return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${alpha})`;
}

// Plotly reads tags and entities in labels.
const plain = (text) => visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// The colours of the regions in the theme that is shown.
const regionColours = () => DATA.regions[document.documentElement.dataset.theme];

// How run `r` of several differs from the others: by its colour, in panels of regions by its dashes; where there are more runs than
// these, by symbols besides.
function look(r, ofRegions) {
  const kinds = ofRegions ? DASHES : DATA.palette, symbol = SYMBOLS[Math.floor(r / kinds.length) % SYMBOLS.length];
  return { kind: kinds[r % kinds.length], symbol: DATA.runs.length > 1 ? symbol : null };
}

// The lines of a panel: one run has a colour for each metric, several runs have a colour each; regions keep theirs. The dashes of
// one run tell the regions; those of several the metrics, or the runs where the colours tell the regions. The legend of
// several runs names the runs and the metrics once each, not every pair of them.
function traces(panel) {
  const smoothing = Number(byId("smoothing").value), many = DATA.runs.length > 1, found = [];
  const metrics = Object.entries(panel.metrics), colours = regionColours();
  DATA.runs.forEach((run, r) => metrics.forEach(([metric, label], m) => {
    const series = run.series[metric];
    if (!series) return;
    const [steps, values] = series, region = colours[label];
    const own = look(r, Boolean(region));
    const colour = region ?? (many ? own.kind : DATA.palette[m % DATA.palette.length]);
    const dash = many ? (region ? own.kind : DASHES[m % DASHES.length]) : region ? DATA.marks[label][0] : "solid";
    const held = metric.startsWith("eval/"), ends = run.ends[metric], factor = held || SET.includes(metric) ? 0 : smoothing;
    const name = plain(many ? `${run.name}: ${label}` : label), group = many ? `run ${r}` : name;
    const line = { color: colour, width: 2, dash };
    const trace = { x: steps, y: smooth(values, factor), name, line, legendgroup: group, mode: "lines", type: "scatter",
      showlegend: !many, hovertemplate: "%{y:.4g}", connectgaps: true };
    if (held || steps.length < 3 || own.symbol) {
      const marker = { color: colour, size: own.symbol ? 8 : 6, symbol: own.symbol ?? "circle", maxdisplayed: held ? 0 : 12 };
      Object.assign(trace, { mode: "lines+markers", marker });
    }
    if (held && ends) {
      trace.error_y = { type: "data", symmetric: false, thickness: 1, width: 3, color: colour,
        array: ends[1].map((x, i) => x - values[i]), arrayminus: ends[0].map((x, i) => values[i] - x) };
    } else if (ends) {
      const quiet = { x: steps, line: { width: 0 }, mode: "lines", type: "scatter", hoverinfo: "skip", showlegend: false, legendgroup: group };
      found.push({ ...quiet, y: smooth(ends[0], factor) });
      found.push({ ...quiet, y: smooth(ends[1], factor), fill: "tonexty", fillcolor: rgba(colour, 0.18) });
    }
    if (factor > 0 && steps.length > 2) {
      found.push({ x: steps, y: values, line: { color: rgba(colour, 0.3), width: 1 }, mode: "lines", type: "scatter", hoverinfo: "skip",
        showlegend: false, legendgroup: group });
    }
    found.push(trace);
  }));
  showCovered(found.filter((trace) => trace.name), panel.log);
  if (!many) return found;
  const key = (name, legendgroup, line, symbol) => found.push({ x: [null], y: [null], name: plain(name), legendgroup,
    line: { width: 2, ...line }, mode: symbol ? "lines+markers" : "lines", marker: { symbol: symbol ?? "circle", size: 8 }, type: "scatter" });
  const regions = metrics.every(([, label]) => colours[label]), grey = style("--soft");
  DATA.runs.forEach((run, r) => {
    const { kind, symbol } = look(r, regions);
    key(run.name, `run ${r}`, regions ? { color: grey, dash: kind } : { color: kind }, symbol);
  });
  metrics.forEach(([, label], m) => {
    if (metrics.length > 1) key(label, `metric ${m}`, regions ? { color: colours[label] } : { color: grey, dash: DASHES[m % DASHES.length] });
  });
  return found;
}

// Makes each curve paler, and broader by a margin for every later one that lies on it at most of its steps, so that it shows on
// both sides of theirs, also where runs share the colour of a region. Some fifty steps of a curve are looked at: sliders redraw the page.
function showCovered(curves, log) {
  const at = log ? Math.log10 : (y) => y;
  const values = curves.map((curve) => new Map(curve.x.map((x, i) => [x, at(curve.y[i])])));
  let low = Infinity, high = -Infinity;
  for (const own of values) for (const y of own.values()) if (Number.isFinite(y)) [low, high] = [Math.min(low, y), Math.max(high, y)];
  const near = (y, other) => y === other || Math.abs(y - other) <= 0.005 * (high - low);
  curves.forEach((curve, i) => {
    const every = Math.ceil(curve.x.length / 50), seen = curve.x.filter((_, j) => j % every === 0);
    const covers = (other) => seen.filter((x) => near(values[i].get(x), other.get(x))).length > seen.length / 2;
    const covering = values.slice(i + 1).filter(covers).length;
    if (covering) Object.assign(curve.line, { width: curve.line.width + 3 * covering, color: rgba(curve.line.color, 0.5) });
  });
}

function layout(panel) {
  const ink = style("--ink"), grid = style("--line");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  const y = { ...axis, title: { text: panel.unit, font: { size: 11 } } };
  y.exponentformat = "power";
  if (panel.log) y.type = "log";
  const size = printWidth === null ? { autosize: true } : { width: printWidth, autosize: false };
  return { ...size, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 11 }, margin: { l: 50, r: 12, t: 26, b: 34 },
    xaxis: { ...axis, title: { text: "step", font: { size: 11 }, standoff: 4 } }, yaxis: y, hovermode: "x unified",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: ink },
    hoverlabel: { bgcolor: style("--box"), bordercolor: grid, font: { color: ink } },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 10.5 }, itemwidth: 35 }, showlegend: true };
}

const PANELS = [];
// of a plot on paper, where two are side by side; on a screen a plot is as wide as its panel
let printWidth = null;

function addPanel(grid, panel) {
  const box = grid.appendChild(make("div", undefined, "panel"));
  const title = box.appendChild(make("h3", panel.title));
  title.title = Object.keys(panel.metrics).map((name) => `${name}: ${DATA.metrics[name]?.[1] ?? ""}`).join("\n");
  const plot = box.appendChild(make("div", undefined, "plot"));
  PANELS.push([plot, panel]);
  return plot;
}

// No button that would send a chart to a server: the policy of the page forbids it, too.
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, toImageButtonOptions: { format: "png", scale: 3 },
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function draw() {
  for (const [plot, panel] of PANELS) Plotly.react(plot, traces(panel), layout(panel), CONFIG);
  byId("smoothed").textContent = Number(byId("smoothing").value).toFixed(2);
}

function section(id, title) {
  const made = make("section");
  made.id = id;
  made.appendChild(make("h2", title));
  return made;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "light" : "dark";
  draw();
  document.dispatchEvent(new Event("theme"));
}

function begin() {
  const runs = byId("runs");
  if (DATA.runs.length > 1) {
    runs.appendChild(make("p", DATA.differences.length ? "Where the configs differ:" : "The configs are the same.", "note"));
    if (DATA.differences.length) runs.appendChild(table([["key", ...DATA.runs.map((run) => run.name)], ...DATA.differences]));
  }
  runs.appendChild(table([["run", "folder", "steps"], ...DATA.runs.map((run) => [run.name, run.folder, run.steps])]));
  runs.appendChild(table(DATA.summary));
  DATA.sections.forEach((each, i) => {
    const made = byId("curves").appendChild(section(`section-${i}`, each.title));
    if (each.note) made.appendChild(make("p", each.note, "note"));
    if (each.table.length) made.appendChild(table(each.table, "benchmarks"));
    const grid = made.appendChild(make("div", undefined, "grid"));
    for (const panel of each.panels) addPanel(grid, panel);
  });
  // any metric that the runs have
  const any = byId("curves").appendChild(section("any", "Any metric"));
  const choice = any.appendChild(make("select"));
  const names = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.series)))].sort();
  for (const name of names) choice.appendChild(make("option", name));
  if (names.includes(remembered("metric"))) choice.value = remembered("metric");
  const chosen = { title: names[0], unit: "", metrics: {} };
  const plot = addPanel(any.appendChild(make("div", undefined, "grid")), chosen);
  const choose = () => {
    chosen.metrics = { [choice.value]: choice.value };
    chosen.unit = DATA.metrics[choice.value]?.[0] ?? "";
    plot.previousSibling.textContent = DATA.metrics[choice.value]?.[1] ?? choice.value;
  };
  choice.addEventListener("change", () => { remember("metric", choice.value); choose(); Plotly.react(plot, traces(chosen), layout(chosen), CONFIG); });
  choose();
  for (const each of document.querySelectorAll("section")) {
    const link = document.querySelector("nav").appendChild(make("a", each.querySelector("h2").textContent));
    link.href = `#${each.id}`;
    link.addEventListener("click", (event) => { event.preventDefault(); each.scrollIntoView(); });
  }
  const smoothing = byId("smoothing"), most = Number(smoothing.max), told = Number.parseFloat(remembered("smoothing"));
  if (told >= 0 && told <= most) smoothing.value = told;
  smoothing.addEventListener("input", draw);
  smoothing.addEventListener("change", () => remember("smoothing", smoothing.value));
  const other = () => (document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  byId("theme").addEventListener("click", () => { remember("theme", other()); setTheme(other()); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "t" && !modified(event) && !typing(event)) { byId("theme").click(); event.preventDefault(); }
  });
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    printWidth = 320;
    setTheme("light");
  });
  window.addEventListener("afterprint", () => { printWidth = null; setTheme(before); });
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(remembered("theme") ?? (dark ? "dark" : "light"));
}

// Whether a key goes to the browser, or to a field.
const modified = (event) => event.ctrlKey || event.altKey || event.metaKey;
const typing = (event) => event.target.closest("input, select, textarea") !== null;

// What the page remembers is in its address, so that a reload (--watch) and a copied link show the same.
function remembered(key) {
  return new URLSearchParams(location.hash.slice(1)).get(key);
}

function remember(key, value) {
  const all = new URLSearchParams(location.hash.slice(1));
  if (value === null) all.delete(key);
  else all.set(key, value);
  history.replaceState(null, "", `#${all}`);
}

begin();
if (DATA.refresh) {
  window.addEventListener("load", () => window.scrollTo(0, Number(remembered("at") ?? 0)));
  setTimeout(() => { remember("at", Math.round(window.scrollY)); location.reload(); }, DATA.refresh * 1000);
}
