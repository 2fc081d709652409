// The token viewer. A step is inflated when it is shown; every text of a model is set by textContent, never as markup.
"use strict";
const COLOURS = [
  ["region", "region"], ["weight", "weight"], ["logp", "log-prob"], ["entropy", "entropy"], ["advantage", "advantage"],
  ["mismatch", "mismatch of sampler and trainer"],
];
const FILTERS = [
  ["", "everything"], ["format", "failed format"], ["spurious", "spurious call"], ["weight", "largest weight"],
  ["mismatch", "largest mismatch"], ["best", "best of a group"], ["worst", "worst of a group"],
];
const MOST_FOUND = 200;
const KEYS = "← → step · ↑ ↓ prompt · 1 to 9 one completion alone, 0 all · c colour · f what to find, n and p next and previous of it · " +
  "t light or dark · Tab into a completion, then ← → from token to token, Esc out of it · ? this line";
const view = { run: 0, step: 0, prompt: 0, alone: null, colour: "region", filter: "", found: [], hit: -1, data: null };

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const tokensOf = () => DATA.runs[view.run].tokens;

function option(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => { const made = make("option", text); made.value = value; return made; }));
}

// The largest value of each kind over the completions shown: the end of the colour scale.
function scales(prompt) {
  const most = { weight: 0, logp: 0, entropy: 0, mismatch: 0, advantage: 0 };
  for (const one of prompt.completions) {
    most.advantage = Math.max(most.advantage, Math.abs(one.advantage ?? 0));
    for (const kind of ["weight", "logp", "entropy", "mismatch"]) {
      for (const x of one.tokens[kind] ?? []) most[kind] = Math.max(most[kind], Math.abs(x ?? 0));
    }
  }
  return most;
}

// Colour and lines of a region; undefined: of none.
function paintRegion(node, name) {
  if (!name) return;
  node.style.background = rgba(regionColours()[name], Number(style("--alpha")));
  node.style.textDecoration = DATA.marks[name][1];
}

function background(one, i, most) {
  const alpha = Number(style("--alpha")), kind = view.colour;
  const value = kind === "advantage" ? one.advantage : one.tokens[kind]?.[i];
  if (value === undefined || value === null || !most[kind]) return "transparent";
  const signed = kind === "advantage" || kind === "mismatch";
  return rgba(signed && value < 0 ? "#D55E00" : "#0072B2", (alpha + 0.35) * Math.sqrt(Math.abs(value) / most[kind]));
}

function tipText(one, i) {
  const t = one.tokens, lines = [JSON.stringify(t.text[i]), `token ${i} of ${one.length}, id ${t.id[i]}`];
  const add = (name, value, unit = "") => lines.push(`${name}: ${value === null || value === undefined ? "–" : short(value)}${unit}`);
  lines.push(`region: ${DATA.region_names[t.region[i] - 1] ?? "none"}`);
  add("weight", t.weight[i]);
  add("log-prob", t.logp[i], t.logp[i] === null ? "" : ` (probability ${short(Math.exp(t.logp[i]))})`);
  add("entropy", t.entropy[i], " nats");
  add("advantage", one.advantage);
  if (t.mismatch) add("trainer's log-prob less the sampler's", t.mismatch[i]);
  return visible(lines.join("\n")).replace(/⟨000A⟩/g, "\n");
}

function showTip(node, text) {
  const tip = byId("tip"), box = node.getBoundingClientRect();
  tip.textContent = text;
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  const below = box.bottom + 6 + own.height < window.innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - own.height - 6)}px`;
}

const hideTip = () => { byId("tip").hidden = true; };

function tokenNodes(one, most) {
  const box = make("div", undefined, "tokens");
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "tokens of the completion; arrow keys move");
  one.tokens.text.forEach((text, i) => {
    const node = box.appendChild(make("span", undefined, "token"));
    if (!text) node.classList.add("empty");
    const parts = visible(text).split("\n");
    parts.forEach((part, n) => {
      if (n) { node.appendChild(make("i", "↵", "mark")); node.appendChild(document.createTextNode("\n")); }
      node.appendChild(document.createTextNode(part));
    });
    if (view.colour === "region") paintRegion(node, DATA.region_names[one.tokens.region[i] - 1]);
    else node.style.background = background(one, i, most);
    node.addEventListener("mouseenter", () => showTip(node, tipText(one, i)));
    node.addEventListener("mouseleave", hideTip);
  });
  if (one.length > one.tokens.text.length) {
    box.appendChild(make("i", ` … ${one.length - one.tokens.text.length} more tokens are not in the file`, "mark"));
  }
  let at = -1;
  const go = (to) => {
    const nodes = box.querySelectorAll(".token");
    if (!nodes.length) return;
    nodes[at]?.classList.remove("at");
    at = Math.max(0, Math.min(nodes.length - 1, to));
    nodes[at].classList.add("at");
    nodes[at].scrollIntoView({ block: "nearest" });
    showTip(nodes[at], tipText(one, at));
  };
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: one.tokens.text.length - 1 }[event.key];
    if (event.key === "Escape") box.blur();
    else if (to === undefined) return;
    else { go(to); event.preventDefault(); }
    event.stopPropagation();
  });
  box.addEventListener("blur", () => { box.querySelector(".at")?.classList.remove("at"); at = -1; hideTip(); });
  return box;
}

const signed = (x) => (x === null ? "–" : `${x < 0 ? "−" : "+"}${short(Math.abs(x))}`);
const term = (x) => `${x < 0 ? "−" : "+"} ${short(Math.abs(x))}`;
const bounds = ([low, high]) => `[${short(low)}, ${short(high)}]`;

function rewardNode(one) {
  const s = one.score, list = make("dl", undefined, "reward"), step = view.data;
  const add = (name, text, ...classes) => { list.appendChild(make("dt", name)); list.appendChild(make("dd", text, ...classes)); };
  const length = s.reward - s.format_part - s.correctness_part - (s.plugin_part || 0);
  const extra = (Math.abs(length) > 1e-9 ? ` ${term(length)} (length)` : "")
    + ("plugin_parts" in s ? ` ${term(s.plugin_part)} (plug-in)` : "");
  add("reward", `${short(s.reward)} = ${short(s.format_part)} (format) ${term(s.correctness_part)} (correctness)${extra}`);
  if (s.plugin_fault) add("plug-in", `failed: ${s.plugin_fault}`, "bad");
  else if ("plugin_parts" in s)
    add("plug-in", Object.entries(s.plugin_parts).map(([name, x]) => `${name} ${short(x)}`).join(", "));
  // where the part is not the score on these bounds, by rule or without the builtin reward, they say nothing of it
  const on = (score, part, ends) => (Math.abs(ends[0] + (ends[1] - ends[0]) * score - part) < 1e-6 ? ` on ${bounds(ends)}` : "");
  add("format", `${s.format_score ? "right" : "failed"}: S_format ${short(s.format_score)}${on(s.format_score, s.format_part, step.format_bounds)}`,
    s.format_score ? "good" : "bad");
  const parameters = one.calls.reduce((n, row) => n + row.parameters.filter((p) => p[1] !== null).length, 0);
  let sum = "";
  if (one.matched) {
    const gained = one.names + one.matched.reduce((a, b) => a + b, 0), possible = 1 + one.matched.length + parameters;
    const parts = `(names ${short(one.names)} + calls ${one.matched.map(short).join(" + ")}) / ${possible}`;
    const superfluous = one.calls.some((row) => row.predicted !== null && !row.right) || one.broken_calls > 0;
    if (Math.abs(gained / possible - s.accuracy) < 1e-3) sum = ` = ${parts}`;
    else if (superfluous && s.accuracy < gained / possible) sum = ` = ${parts}, less what superfluous calls cost,`;
  }
  add("correctness", `S_acc ${short(s.accuracy)}${sum}${on(s.accuracy, s.correctness_part, step.correctness_bounds)}`,
    s.accuracy === 1 ? "good" : "bad");
  add("exact", s.exact ? "yes" : "no", s.exact ? "good" : "bad");
  if (s.spurious) add("spurious call", "yes: the gold answer has no call", "bad");
  if (one.broken_calls) add("unreadable calls", String(one.broken_calls), "bad");
  add("blocks", one.blocks.join(", ") || "none");
  return list;
}

function callsNode(one, prompt) {
  if (!one.calls.length) return make("p", prompt.gold_calls ? "" : "No readable call, neither gold nor predicted.", "note");
  const made = make("table", undefined, "calls");
  const line = (cells, right, ...classes) => {
    const row = made.appendChild(make("tr", undefined, ...classes));
    cells.forEach((cell, i) => row.appendChild(make("td", cell ?? "–", ...(i ? [] : ["key"]))));
    row.appendChild(make("td", right ? "✓" : "✗", "mark-cell", right ? "good" : "bad")).title = right ? "right" : "wrong";
    if (!right) row.children[2].classList.add("bad");
  };
  const head = made.appendChild(make("tr"));
  for (const text of ["", "gold", "predicted"]) head.appendChild(make("th", text, ...(text ? [] : ["key"])));
  head.appendChild(make("th", "", "mark-cell"));
  for (const call of one.calls) {
    line(["call", call.gold, call.predicted], call.right, "name");
    for (const [name, gold, predicted, right] of call.parameters) line([name, gold, predicted], right);
  }
  return made;
}

function completionNode(prompt, j, most) {
  const one = prompt.completions[j], box = make("article", undefined, "completion");
  box.id = `completion-${j}`;
  const head = box.appendChild(make("h3"));
  const alone = head.appendChild(make("button", String(j + 1)));
  alone.type = "button";
  alone.title = view.alone === null ? "this one alone" : "all of the group";
  alone.addEventListener("click", () => { view.alone = view.alone === null ? j : null; show(); });
  head.appendChild(make("span", `reward ${short(one.score.reward)}`));
  head.appendChild(make("span", `advantage ${signed(one.advantage)}`));
  head.appendChild(make("span", `${one.length} tokens${one.truncated ? ", not ended" : ""}`, ...(one.truncated ? ["bad"] : [])));
  if (one.score.exact) head.appendChild(make("span", "exact", "good"));
  const hit = view.found[view.hit];
  if (hit && hit[0] === view.step && hit[1] === view.prompt && hit[2] === j) box.classList.add("current");
  box.appendChild(tokenNodes(one, most));
  box.appendChild(rewardNode(one));
  box.appendChild(callsNode(one, prompt));
  return box;
}

// Turns of a chat begin at their control token.
function promptNodes(text) {
  const box = byId("v-prompt-text");
  box.replaceChildren();
  let turn = box;
  for (const part of text.split(/(<\|[^|<>\s]{1,40}\|>)/)) {
    if (/^<\|(im_start|start_header_id)\|>$/.test(part)) turn = box.appendChild(make("div", undefined, "turn"));
    if (part) turn.appendChild(make("span", part, ...(/^<\|[^|]+\|>$/.test(part) ? ["control"] : [])));
  }
}

function legend(most) {
  const box = byId("v-legend");
  box.replaceChildren(make("span", "colour:"));
  if (view.colour === "region") {
    for (const name of DATA.region_names) paintRegion(box.appendChild(make("span", name, "token")), name);
    return;
  }
  const top = Number(style("--alpha")) + 0.35, sided = view.colour === "advantage" || view.colour === "mismatch";
  if (view.colour === "mismatch" && !most.mismatch) {
    box.appendChild(make("span", "no mismatch of tokens: the trainer's log-probs are written with rollout.recompute_logprobs=true"));
    return;
  }
  const bar = make("span", undefined, "scale"), low = sided ? rgba("#D55E00", top) : "transparent";
  bar.style.background = `linear-gradient(to right, ${low}, transparent, ${rgba("#0072B2", top)})`;
  if (!sided) bar.style.background = `linear-gradient(to right, transparent, ${rgba("#0072B2", top)})`;
  const end = most[view.colour], start = sided ? -end : 0;
  const sign = view.colour === "logp" ? -1 : 1;
  box.append(make("span", short(start)), bar, make("span", short(sign * end)));
  box.appendChild(make("span", "(square-root scale, ends: the largest of the group)"));
}

function draws() {
  const prompt = view.data?.prompts[view.prompt];
  if (!prompt) return;
  const most = scales(prompt), group = byId("v-group");
  const shown = prompt.completions.map((_, j) => j).filter((j) => view.alone === null || view.alone === j);
  hideTip();
  legend(most);
  byId("v-prompt-box").querySelector("summary").textContent =
    `prompt ${visible(prompt.id)} (${prompt.prompt_tokens} tokens)${prompt.gold_response === null ? "" : " and gold response"}`;
  promptNodes(prompt.prompt);
  if (prompt.gold_response !== null) {
    const gold = byId("v-prompt-text").appendChild(make("div", undefined, "turn"));
    gold.append(make("span", "gold response\n", "control"), make("span", prompt.gold_response));
  }
  group.classList.toggle("solo", view.alone !== null);
  group.replaceChildren(...shown.map((j) => completionNode(prompt, j, most)));
}

let newest = 0;
async function show() {
  const tokens = tokensOf(), number = ++newest;
  view.step = Math.max(0, Math.min(view.step, tokens.steps.length - 1));
  const data = await inflate(tokens.data[view.step]);
  if (number !== newest) return;
  view.data = data;
  view.prompt = Math.max(0, Math.min(view.prompt, data.prompts.length - 1));
  if (view.alone !== null && view.alone >= data.prompts[view.prompt].completions.length) view.alone = null;
  byId("v-step").max = tokens.steps.length - 1;
  byId("v-step").value = view.step;
  byId("v-step-is").textContent = `${tokens.steps[view.step]} of ${tokens.steps.at(-1)}`;
  option(byId("v-prompt"), data.prompts.map((p, i) => [i, `${i + 1}: ${p.id}`]));
  byId("v-prompt").value = view.prompt;
  byId("v-colour").value = view.colour;
  draws();
  const kept = { run: view.run, step: tokens.steps[view.step], prompt: view.prompt, colour: view.colour,
    alone: view.alone === null ? null : view.alone + 1 };
  for (const [key, value] of Object.entries(kept)) remember(key, value);
  markFound();
  document.documentElement.dataset.ready = "true";
}

// The groups of completions whose rewards differ, as rows of the index.
function unequal() {
  const groups = new Map();
  for (const row of tokensOf().index) {
    const key = `${row[0]}/${row[1]}`;
    groups.set(key, [...(groups.get(key) ?? []), row]);
  }
  return [...groups.values()].filter((g) => new Set(g.map((row) => row[3])).size > 1);
}

// [step, prompt] of the first group of the newest step that has one whose rewards differ; where none has, of the last step.
function opening() {
  const groups = unequal(), newest = groups.at(-1)?.[0][0];
  return groups.find((g) => g[0][0] === newest)?.[0] ?? [tokensOf().steps.length - 1, 0];
}

// Completions [step, prompt, completion, reward, format, spurious, weight, mismatch] that the filter takes, best first.
function find() {
  const all = tokensOf().index;
  const extreme = (sign) => unequal().map((g) => g.reduce((a, b) => (sign * b[3] > sign * a[3] ? b : a)));
  const by = (column) => all.filter((row) => row[column] !== null).sort((a, b) => b[column] - a[column]);
  const rules = { "": () => [], format: () => all.filter((row) => !row[4]), spurious: () => all.filter((row) => row[5]),
    weight: () => by(6), mismatch: () => by(7), best: () => extreme(1), worst: () => extreme(-1) };
  const found = rules[view.filter]();
  view.found = found.slice(0, MOST_FOUND);
  view.hit = -1;
  const cut = found.length > MOST_FOUND ? `, ${MOST_FOUND} shown` : "";
  byId("v-hits").textContent = view.filter ? `${found.length} completions${cut}` : "";
  const box = byId("v-found");
  box.hidden = !view.found.length;
  const column = { weight: 6, mismatch: 7 }[view.filter] ?? 3;
  box.replaceChildren(...view.found.map((row, i) => {
    const made = make("button", `step ${tokensOf().steps[row[0]]}, ${row[1] + 1}.${row[2] + 1}: ${short(row[column])}`);
    made.type = "button";
    made.addEventListener("click", () => goHit(i));
    return made;
  }));
}

function markFound() {
  byId("v-found").querySelectorAll("button").forEach((node, i) => {
    node.setAttribute("aria-current", String(i === view.hit));
    if (i === view.hit) node.scrollIntoView({ block: "nearest" });
  });
}

async function goHit(i) {
  if (!view.found.length) return;
  view.hit = (i + view.found.length) % view.found.length;
  [view.step, view.prompt] = view.found[view.hit];
  if (view.alone !== null) view.alone = view.found[view.hit][2];
  await show();
  byId(`completion-${view.found[view.hit][2]}`)?.scrollIntoView({ block: "nearest" });
}

function setFilter(name) {
  view.filter = byId("v-filter").value = name;
  remember("find", name);
  find();
  if (view.found.length) goHit(0);
  else show();
}

function setColour(name) {
  view.colour = name;
  show();
}

function nextOf(pairs, value) {
  const names = pairs.map((pair) => pair[0]);
  return names[(names.indexOf(value) + 1) % names.length];
}

function setRun(run) {
  Object.assign(view, { run, alone: null });
  enterRun();
}

// What of the page is of the run that is shown.
function enterRun() {
  byId("v-run").value = view.run;
  const leftOut = tokensOf().left_out, note = byId("v-left-out");
  note.hidden = !leftOut;
  note.textContent = `${leftOut} of the steps written are left out, evenly, to keep the page small.`;
  find();
  view.hit = view.found.findIndex(([step, prompt, j]) =>
    step === view.step && prompt === view.prompt && (view.alone === null || view.alone === j));
  show();
}

function keyed(event) {
  if (modified(event)) return;
  // no choice of the filter begins with these
  const passes = event.target === byId("v-filter") && ["n", "p"].includes(event.key);
  if (typing(event) && !passes) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const move = (field, by) => () => { view[field] += by; show(); };
  const actions = { ArrowLeft: move("step", -1), ArrowRight: move("step", 1), ArrowUp: move("prompt", -1), ArrowDown: move("prompt", 1),
    c: () => setColour(nextOf(COLOURS, view.colour)), f: () => byId("v-filter").focus(), n: () => goHit(view.hit + 1),
    p: () => goHit(view.hit < 0 ? -1 : view.hit - 1), 0: () => { view.alone = null; show(); },
    Escape: () => { view.alone = null; show(); }, "?": () => { byId("v-help").hidden = !byId("v-help").hidden; } };
  // arrows scroll the page until the viewer is on the screen
  const box = byId("tokens").getBoundingClientRect();
  if (event.key.startsWith("Arrow") && (box.top > window.innerHeight * 0.8 || box.bottom < 0)) return;
  if (/^[1-9]$/.test(event.key)) {
    const count = view.data.prompts[view.prompt].completions.length;
    if (Number(event.key) <= count) { view.alone = Number(event.key) - 1; show(); }
  } else if (actions[event.key]) {
    actions[event.key]();
    event.preventDefault();
  }
}

function beginViewer() {
  const having = DATA.runs.map((run, i) => [i, run.name]).filter(([i]) => DATA.runs[i].tokens.steps.length);
  if (!having.length) {
    byId("tokens-none").hidden = false;
    byId("tokens-none").textContent = "The runs have written no tokens (train.samples_per_step; supervised runs have none).";
    return;
  }
  byId("viewer").hidden = false;
  option(byId("v-run"), having);
  option(byId("v-colour"), COLOURS);
  option(byId("v-filter"), FILTERS);
  byId("v-help").textContent = KEYS;
  byId("v-help-button").addEventListener("click", () => { byId("v-help").hidden = !byId("v-help").hidden; });
  byId("v-run").addEventListener("change", (e) => setRun(Number(e.target.value)));
  byId("v-step").addEventListener("input", (e) => { view.step = Number(e.target.value); show(); });
  byId("v-prompt").addEventListener("change", (e) => { view.prompt = Number(e.target.value); show(); });
  byId("v-colour").addEventListener("change", (e) => setColour(e.target.value));
  byId("v-filter").addEventListener("change", (e) => setFilter(e.target.value));
  document.addEventListener("keydown", keyed);
  document.addEventListener("theme", draws);
  const known = (pairs, value, otherwise) => (pairs.some((pair) => String(pair[0]) === value) ? value : otherwise);
  view.run = Number(known(having, remembered("run"), having[0][0]));
  view.colour = known(COLOURS, remembered("colour"), "region");
  view.filter = byId("v-filter").value = known(FILTERS, remembered("find"), "");
  const tokens = tokensOf(), step = tokens.steps.indexOf(Number(remembered("step")));
  [view.step, view.prompt] = step >= 0 ? [step, Number(remembered("prompt") ?? 0) || 0] : opening();
  view.alone = step >= 0 && /^[1-9][0-9]*$/.test(remembered("alone")) ? Number(remembered("alone")) - 1 : null;
  enterRun();
}

beginViewer();
