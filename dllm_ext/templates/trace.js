"use strict";
// Draws the data of one generation. A state k is the canvas after k steps; step i (from 0) leads from state i to i + 1.
const data = JSON.parse(document.getElementById("data").textContent);
const steps = data.steps;
const stepCount = steps.rows.length, length = data.token_ids.length, promptLength = data.prompt_length;
const $ = (id) => document.getElementById(id);
const NEVER = Infinity;

// Ten points of two palettes in which lightness rises evenly, so that they can be told apart without seeing colours.
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

function mix(palette, t) {
  const x = Math.min(Math.max(t, 0), 1) * (palette.length - 1), i = Math.min(Math.floor(x), palette.length - 2);
  const channel = (color, c) => parseInt(color.slice(1 + 2 * c, 3 + 2 * c), 16);
  const rgb = [0, 1, 2].map((c) => Math.round(channel(palette[i], c) * (1 - x + i) + channel(palette[i + 1], c) * (x - i)));
  const light = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255;
  return { back: `rgb(${rgb})`, text: light > 0.5 ? "#111" : "#fff" };
}

// --- Colours ---------------------------------------------------------------------------------------------------------------

const known = data.confidences.filter((c) => c !== null);
const low = Math.min(0, ...known), high = low < 0 ? Math.max(0, ...known) : Math.max(1, ...known);
const CONFIDENCE_NAMES = {
  low_confidence: "confidence: probability of the token", origin: "probability of the token", random: "random number",
  topk_margin: "confidence: margin to the second token", entropy: "confidence: negative entropy, nats",
};
const number = (x) => String(Number(x.toPrecision(4)));
const modes = {
  step: {
    palette: VIRIDIS, low: "1", high: String(stepCount), name: "committed by step",
    at: (p) => (stepCount > 1 ? data.commit_steps[p] / (stepCount - 1) : 0),
  },
  confidence: {
    palette: CIVIDIS, low: number(low), high: number(high), name: CONFIDENCE_NAMES[data.config.remasking],
    at: (p) => (data.confidences[p] - low) / (high - low),
  },
};
let mode = "step";
const colors = {}; // mode -> per position its colour, or null
for (const name in modes)
  colors[name] = data.commit_steps.map((s, p) => (s < 0 ? null : mix(modes[name].palette, modes[name].at(p))));

// --- Tokens ----------------------------------------------------------------------------------------------------------------

// Positions that the generation decides, or would have: all but the given ones of the prompt.
const isEditable = (p) => p >= promptLength || data.commit_steps[p] >= 0;
const committedAt = (p) => (!isEditable(p) ? 0 : data.commit_steps[p] < 0 ? NEVER : data.commit_steps[p] + 1);
const isStop = (p) => p >= promptLength && data.stop_ids.includes(data.token_ids[p]);

// A character may be made of several tokens; its text stands at the last of them and shows once all are there.
const lastOf = Array.from({ length }, (_, p) => p);
const readyAt = lastOf.map((p) => committedAt(p));
for (let p = 0, begin = 0; p < length; ++p) {
  if (data.pieces[p] === "" && p - begin < 3 && p + 1 < length) continue;
  const ready = Math.max(...readyAt.slice(begin, p + 1));
  for (; begin <= p; ++begin) [lastOf[begin], readyAt[begin]] = [p, ready];
}

// Text as one line, with signs for what cannot be seen.
function visible(text) {
  return text.replace(/[\u0000-\u001f\u007f]/g, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : String.fromCharCode(c === "\u007f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
}

function finalText(p) {
  if (isStop(p)) return "▪";
  return data.pieces[p] === "" && lastOf[p] === p ? "\ufffd" : visible(data.pieces[p]);
}

// From the step that committed the stop on, nothing behind it is decoded. After the last step it holds EOS.
const stopsAt = data.filled_from < length ? committedAt(data.filled_from - 1) : NEVER;

const tokens = [];
function makeTokens() {
  for (let p = 0; p < length; ++p) {
    const token = document.createElement("span");
    token.dataset.position = p;
    token.textContent = finalText(p);
    token.className = isEditable(p) ? "token" : "token given";
    const parent = $(p < promptLength ? "prompt" : "answer");
    parent.append(token);
    const lines = p < data.filled_from ? data.pieces[p].split("\n").length - 1 : 0;
    for (let i = 0; i < Math.min(lines, 2); ++i) parent.append(document.createElement("br"));
    tokens.push({ element: token, shown: token.textContent, look: token.className, color: null });
  }
  // A masked position is as wide as the token that it becomes, so that nothing moves while the canvas fills in.
  const widths = tokens.map((t) => t.element.getBoundingClientRect().width);
  tokens.forEach((t, p) => {
    if (isEditable(p)) t.element.style.minWidth = `${Math.max(widths[p], 7).toFixed(1)}px`;
  });
}

function showTokens(k) {
  const computed = new Uint8Array(length);
  const runs = k > 0 ? steps.computed[k - 1] : [];
  for (let i = 0; i < runs.length; i += 2) computed.fill(1, runs[i], runs[i + 1]);
  for (let p = 0; p < length; ++p) {
    const t = tokens[p], at = committedAt(p);
    let text = finalText(p), look = "token", color = null;
    if (!isEditable(p)) look += " given";
    else if (k === stepCount && p >= data.filled_from) [text, look] = ["▪", "token fill"];
    else if (k < at) [text, look] = ["", "token masked"];
    else {
      look += " known";
      color = colors[mode][p];
      if (k === at) look += " fresh";
      if (k < readyAt[p]) text = "\ufffd";
    }
    if (p >= data.filled_from && k >= stopsAt && k < stepCount) look += " out";
    if (computed[p]) look += " computed";
    if (t.shown !== text) t.element.textContent = t.shown = text;
    if (t.look !== look) t.element.className = t.look = look;
    if (t.color !== color) {
      t.color = color;
      t.element.style.backgroundColor = color ? color.back : "";
      t.element.style.color = color ? color.text : "";
    }
  }
}

function describeToken(p) {
  const lines = [], at = data.commit_steps[p], quoted = JSON.stringify(data.pieces[p]);
  const place = p < promptLength ? `prompt, position ${p}` : `position ${p} (${p - promptLength + 1} of the answer)`;
  lines.push(`${data.pieces[p] === "" && lastOf[p] > p ? `part of ${JSON.stringify(data.pieces[lastOf[p]])}` : quoted}   id ${data.token_ids[p]}`);
  lines.push(place);
  if (!isEditable(p)) lines.push("given");
  else if (at < 0) lines[0] = "never decoded: it lies behind the end of the text";
  else {
    lines.push(`${at < state ? "committed by" : "still masked; committed by"} step ${at + 1} of ${stepCount}, block ${steps.block[at] + 1}`);
    lines.push(`${CONFIDENCE_NAMES[data.config.remasking]} ${number(data.confidences[p])}`);
    if (p >= data.filled_from) lines.push("behind the end of the text: replaced by EOS");
  }
  if (state > 0 && tokens[p].look.includes("computed")) lines.push(`computed by step ${state}`);
  return lines.join("\n");
}

function describeStep(i) {
  const full = steps.full[i] ? " (full step)" : "";
  return `step ${i + 1} of ${stepCount} · block ${steps.block[i] + 1} · ${steps.rows[i]} of ${length} rows computed${full} · ` +
    `${steps.commits[i]} committed · ${steps.ms[i].toPrecision(3)} ms`;
}

// --- The timeline ------------------------------------------------------------------------------------------------------------

// Columns are steps, all panels alike. A column is at most this wide, so that a short generation does not look like a flag.
const MOST_PIXELS = 90;
const columnWidth = () => Math.min($("map").clientWidth / Math.max(stepCount, 1), MOST_PIXELS);

// [left, width] of a step's column, on whole pixels: what is drawn side by side has no seams.
function column(i) {
  const w = columnWidth(), left = Math.round(i * w);
  return [left, Math.max(Math.round((i + 1) * w) - left - (w > 6 ? 1 : 0), 1)];
}

function prepare(canvas) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round(canvas.clientHeight * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return context;
}

function drawMap(theme) {
  const c = prepare($("map")), w = columnWidth(), height = $("map").clientHeight, y = (p) => (p / length) * height;
  steps.computed.forEach((runs, i) => {
    const [left, wide] = column(i);
    c.fillStyle = steps.full[i] ? theme.full : theme.partial;
    for (let r = 0; r < runs.length; r += 2) c.fillRect(left, y(runs[r]), wide, Math.max(y(runs[r + 1]) - y(runs[r]), 1));
  });
  c.fillStyle = theme.line;
  for (let p = promptLength; p < length; p += data.config.block_length) c.fillRect(0, Math.round(y(p)), w * stepCount, 1);
  c.fillStyle = theme.dot;
  data.commit_steps.forEach((s, p) => {
    if (s < 0) return;
    const [left, wide] = column(s), inset = w > 12 ? 3 : 0, tall = Math.max(y(1) - (y(1) > 4 ? 1 : 0), 1.5);
    c.fillRect(left + inset, y(p) + (y(1) - tall) / 2, Math.max(wide - 2 * inset, 1.5), tall);
  });
}

function drawBars(id, values, color) {
  const canvas = $(id), c = prepare(canvas), top = id === "rows" ? 9 : 2; // room for the marks of full steps
  const most = Math.max(...values, 1e-9), height = canvas.clientHeight;
  values.forEach((v, i) => {
    const [left, wide] = column(i), h = v === 0 ? 0 : Math.max(((height - top) * v) / most, 1);
    c.fillStyle = color(i);
    c.fillRect(left, height - h, wide, h);
  });
  return c;
}

function drawAxis(theme) {
  const c = prepare($("axis")), w = columnWidth();
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((n) => n * w >= 46) || 10000;
  c.fillStyle = theme.dim;
  c.font = "12px system-ui, sans-serif";
  c.textAlign = "center";
  for (let i = 0; i < stepCount; ++i)
    if (i === 0 || (i + 1) % every === 0) c.fillText(String(i + 1), Math.min(Math.max((i + 0.5) * w, 5), $("axis").clientWidth - 14), 13);
}

function drawTimeline() {
  const style = getComputedStyle(document.documentElement), theme = {};
  for (const name of ["partial", "full", "line", "dot", "dim", "commits", "ms"]) theme[name] = style.getPropertyValue(`--${name}`);
  drawMap(theme);
  const rows = drawBars("rows", steps.rows, (i) => (steps.full[i] ? theme.full : theme.partial));
  const w = columnWidth();
  rows.fillStyle = theme.full; // full steps also have a mark, for who does not see the colour
  steps.full.forEach((full, i) => {
    const x = (i + 0.5) * w;
    if (full) rows.fill(new Path2D(`M${x - 4} 0 L${x + 4} 0 L${x} 6 Z`));
  });
  drawBars("commits", steps.commits, () => theme.commits);
  drawBars("ms", steps.ms, () => theme.ms);
  drawAxis(theme);
  moveCursor();
}

function moveCursor() {
  const w = columnWidth(), left = $("map").offsetLeft;
  $("cursor").style.width = `${Math.max(w, 3)}px`;
  $("cursor").style.transform = `translateX(${left + (state - 1) * w}px)`;
  $("cursor").hidden = state === 0;
}

// --- The player --------------------------------------------------------------------------------------------------------------

let state = stepCount, playing = false, due = 0;

function go(k) {
  state = Math.min(Math.max(k, 0), stepCount);
  $("slider").value = state;
  $("answer").parentElement.classList.toggle("full-step", state > 0 && steps.full[state - 1] === 1);
  $("status").textContent = state > 0 ? describeStep(state - 1) : `before the first of ${stepCount} steps`;
  showTokens(state);
  moveCursor();
}

// Milliseconds until step i is shown.
function pause(i) {
  const speed = $("speed").value;
  return speed === "real" ? steps.ms[i] : 1000 / Number(speed);
}

function setPlaying(on) {
  playing = on;
  $("play-shape").setAttribute("d", on ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 2v12l9-6z");
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  if (!on) return;
  if (state === stepCount) go(0);
  due = performance.now() + (state < stepCount ? pause(state) : 0);
  requestAnimationFrame(tick);
}

function tick(now) {
  if (!playing) return;
  let k = state;
  while (k < stepCount && now >= due) if (++k < stepCount) due += pause(k);
  if (k !== state) go(k);
  if (k === stepCount) setPlaying(false);
  else requestAnimationFrame(tick);
}

function setMode(name) {
  mode = name;
  const m = modes[mode];
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  [$("low").textContent, $("high").textContent, $("mode-name").textContent] = [m.low, m.high, m.name];
  $("gradient").style.background = `linear-gradient(to right, ${m.palette})`;
  showTokens(state);
  drawTimeline();
}

function jump(k) {
  setPlaying(false);
  go(k);
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const on = event.target instanceof Element ? event.target : document.body;
  if (on.closest("select, input[type=radio]") && event.key !== "c") return; // these keys are theirs
  if (on.closest("button, summary") && event.key === " ") return;
  const actions = {
    " ": () => setPlaying(!playing), c: () => setMode(mode === "step" ? "confidence" : "step"),
    ArrowLeft: () => jump(state - 1), ArrowRight: () => jump(state + 1), PageUp: () => jump(state - 10),
    PageDown: () => jump(state + 10), Home: () => jump(0), End: () => jump(stepCount),
  };
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

// --- Tooltips and clicks -------------------------------------------------------------------------------------------------------

function showTip(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18, y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below;
  tip.style.transform = `translate(${Math.max(x, 0)}px, ${Math.max(y, 0)}px)`;
}

const tokenUnder = (event) => event.target.closest("[data-position]");
const stepUnder = (event) => {
  const i = Math.floor((event.clientX - $("map").getBoundingClientRect().left) / columnWidth());
  return i >= 0 && i < stepCount ? i : -1;
};

function connect() {
  $("first").onclick = () => jump(0);
  $("back").onclick = () => jump(state - 1);
  $("play").onclick = () => setPlaying(!playing);
  $("next").onclick = () => jump(state + 1);
  $("last").onclick = () => jump(stepCount);
  $("slider").oninput = () => jump(Number($("slider").value));
  $("speed").onchange = () => playing && setPlaying(true);
  $("modes").onchange = (event) => setMode(event.target.value);
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointermove", (event) => {
    const token = tokenUnder(event), step = event.target.closest("#timeline canvas") ? stepUnder(event) : -1;
    if (token) showTip(event, describeToken(Number(token.dataset.position)));
    else if (step >= 0) showTip(event, describeStep(step).replaceAll(" · ", "\n"));
    else $("tip").hidden = true;
  });
  const timeline = $("timeline");
  const scrub = (event) => {
    const i = stepUnder(event);
    if (event.buttons === 1 && i >= 0) jump(i + 1);
  };
  timeline.addEventListener("pointerdown", scrub);
  timeline.addEventListener("pointermove", scrub);
  new ResizeObserver(drawTimeline).observe($("map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTimeline);
  addEventListener("hashchange", fromHash);
}

// trace.html#12 opens after step 12.
function fromHash() {
  const k = Number.parseInt(location.hash.slice(1), 10);
  if (Number.isInteger(k)) jump(k);
}

// --- The head of the page --------------------------------------------------------------------------------------------------------

function fact(list, name, value) {
  const item = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
  [dt.textContent, dd.textContent] = [name, value];
  item.append(dt, dd);
  $(list).append(item);
}

function describe() {
  const sum = (list) => list.reduce((a, b) => a + b, 0), rows = sum(steps.rows), all = length * stepCount;
  $("model").textContent = data.model;
  document.title = `dllm trace: ${data.model}`;
  fact("facts", "tokens", data.tokens);
  fact("facts", "evaluations (NFE)", data.nfe);
  fact("facts", "tokens per forward", data.tokens_per_forward.toFixed(2));
  fact("facts", "tokens/s", number(data.tokens_per_second));
  fact("facts", "seconds", number(data.seconds));
  fact("facts", "rows computed", `${rows} of ${all}` + (all ? ` (${((100 * rows) / all).toFixed(0)} %)` : ""));
  fact("facts", "device", data.device);
  fact("facts", "precision", data.quantization ? `${data.dtype}, ${data.quantization}` : data.dtype);
  const config = data.config, rules = ["steps", "threshold", "factor", "gamma", "num_transfer_tokens"];
  const rule = rules.filter((name) => name in config).map((name) => `${name} ${config[name]}`);
  const short = [`cache ${config.cache}`, ...rule, `gen_length ${config.gen_length}`, `block_length ${config.block_length}`];
  $("settings-short").textContent = short.join(" · ");
  for (const name in config) fact("settings", name, String(config[name]));

  const committed = data.commit_steps.filter((s) => s >= 0).length;
  $("prompt-title").textContent = `prompt, ${promptLength} tokens`;
  $("prompt-part").hidden = promptLength === 0;
  $("prompt-part").open = promptLength <= 160 || data.commit_steps.slice(0, promptLength).some((s) => s >= 0);
  $("map-note").textContent = `prompt: ${promptLength}, on top\ngenerated: ${length - promptLength}`;
  $("rows-note").textContent = `at most ${Math.max(0, ...steps.rows)} of ${length}`;
  $("commits-note").textContent = `at most ${Math.max(0, ...steps.commits)}, ${committed} in all`;
  $("ms-note").textContent = `at most ${number(Math.max(0, ...steps.ms))}`;

  const speeds = [2, 5, 10, 30, 60];
  for (const s of speeds) $("speed").append(new Option(`${s} steps/s`, s));
  $("speed").append(new Option("as it was", "real"));
  $("speed").value = speeds.find((s) => stepCount / s <= 12) || 60;
  $("slider").max = stepCount;
}

describe();
makeTokens();
connect();
setMode("step");
go(stepCount);
fromHash();
