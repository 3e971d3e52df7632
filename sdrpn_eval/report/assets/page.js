"use strict";
// The gallery. All text comes from the embedded JSON and is set as textContent, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20, WIDTH = 320, CROP = 150;
const KINDS = { all: "all", fixed: "fixed", broken: "broken", wrong: "both wrong",
  right: "both right" };
const KEYS = { f: "fixed", b: "broken", w: "wrong", r: "right", a: "all" };
const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const state = { run: Math.min(1, data.runs.length - 1), task: "", kind: "all", outcome: "",
  pictured: false, search: "", page: 0, chosen: -1, map: true };
const find = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// What happened to a question between the first run and the chosen one.
function kindOf(question) {
  const before = question.scores[0], after = question.scores[state.run];
  if (before === null || after === null) return "unscored";
  if (after > before) return "fixed";
  if (after < before) return "broken";
  return after >= data.right ? "right" : "wrong";
}

function prepare() {
  for (const q of data.questions) {
    q.text = [q.id, q.prompt, q.target, ...q.answers].join("\n").toLowerCase();
  }
}

function matches(question, kind) {
  const look = question.looks[state.run];
  return (state.task === "" || question.task === Number(state.task))
    && (kind === "all" || kindOf(question) === kind)
    && (!state.outcome || (look && look.outcome === state.outcome))
    && (!state.pictured || question.picture !== null)
    && (!state.search || question.text.includes(state.search));
}

function draw() {
  const counts = {};
  let shown = [];
  for (const kind of Object.keys(KINDS)) {
    const found = data.questions.filter((q) => matches(q, kind));
    counts[kind] = found.length;
    if (kind === state.kind) shown = found;
  }
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const start = state.page * PAGE;
  for (const button of find("kinds").children) {
    const kind = button.dataset.kind;
    button.textContent = `${KINDS[kind]} ${counts[kind]}`;
    button.setAttribute("aria-pressed", String(kind === state.kind));
  }
  find("range").textContent = shown.length
    ? `${start + 1} to ${Math.min(start + PAGE, shown.length)} of ${shown.length}` : "none";
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page >= pages - 1;
  const cards = shown.slice(start, start + PAGE).map(card);
  find("cards").replaceChildren(...(cards.length ? cards
    : [make("p", "empty", "No question matches these filters.")]));
  state.chosen = -1;
}

function card(question) {
  const box = make("article", "card");
  box.dataset.id = question.id;
  const left = make("div");
  left.append(question.picture === null
    ? make("div", "none", "no picture in this page") : picture(question));
  const right = make("div");
  const top = make("div", "top");
  const kind = kindOf(question);
  const tone = { fixed: "better", broken: "worse" }[kind] || "same";
  top.append(make("span", `badge ${tone}`, KINDS[kind] || kind),
    make("span", "", `${data.tasks[question.task]} ${question.id}`));
  const target = make("p", "target", "target: ");
  target.append(make("b", "", question.target));
  const answers = make("div", "answers");
  const order = data.runs.map((_, i) => i).filter((i) => i === 0 || i === state.run);
  for (const i of [...order, ...data.runs.keys()].filter((v, n, all) => all.indexOf(v) === n)) {
    answers.append(answer(question, i));
  }
  right.append(top, make("div", "prompt", question.prompt), target, answers);
  box.append(left, right);
  return box;
}

function answer(question, run) {
  const box = make("div", "answer");
  box.style.borderColor = `var(--run${Math.min(run, 5)})`;
  const score = question.scores[run];
  const tone = score === null ? "" : score >= data.right ? "right" : "wrong";
  const who = make("div", "who", `${data.runs[run]} `);
  if (score !== null) who.append(make("span", tone, Number(score.toFixed(3)).toString()));
  box.append(who, make("div", "said", question.answers[run] || "(empty)"));
  const look = question.looks[run];
  if (look) {
    box.append(make("div", "saw", describe(question, look)));
    if (question.picture !== null) {
      look.boxes.forEach((region, i) => box.append(crop(question, look, region, i)));
    }
  }
  return box;
}

function describe(question, look) {
  if (!look.boxes.length) return look.why ? `no zoom: ${look.why}` : "no zoom";
  const said = { held: "; it holds the answer", missed: "; it misses the answer" };
  const area = look.boxes.reduce((sum, [x0, y0, x1, y1]) => sum + (x1 - x0) * (y1 - y0), 0);
  const share = question.size ? 100 * area / (question.size[0] * question.size[1]) : null;
  const where = share === null ? "looked again" : `looked at ${share.toPrecision(2)} % of the image`;
  const peak = look.peak ? `, map up to ${look.peak.toFixed(2)}` : "";
  return where + peak + (said[look.outcome] || "");
}

// Pictures: drawn when decoded, in the proportions of the original.
function load(index, then) {
  const image = new Image();
  image.onload = () => then(image);
  image.src = data.pictures[index];
}

function sized(width, height) {
  const canvas = make("canvas"), dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.getContext("2d").scale(dense, dense);
  return canvas;
}

function picture(question) {
  const [width, height] = question.size;
  const scale = Math.min(WIDTH / width, 1.25 * WIDTH / height);
  const canvas = sized(width * scale, height * scale);
  load(question.picture, (image) => {
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, width * scale, height * scale);
    if (state.map) heat(context, question, scale);
    // The chosen run's boxes last, on top.
    const runs = [...question.looks.keys()].sort((a, b) => (a === state.run) - (b === state.run));
    for (const run of runs) {
      for (const box of question.looks[run] ? question.looks[run].boxes : []) {
        outline(context, box, scale, colour(`--run${Math.min(run, 5)}`), run === state.run);
      }
    }
    if (question.truth) outline(context, question.truth, scale, "#2fe05a", true);
  });
  return canvas;
}

function outline(context, [x0, y0, x1, y1], scale, stroke, strong) {
  const place = [x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale];
  context.lineWidth = strong ? 4 : 2;
  context.strokeStyle = "rgba(0, 0, 0, .55)";
  context.strokeRect(...place);
  context.lineWidth = strong ? 2.5 : 1.2;
  context.strokeStyle = stroke;
  context.strokeRect(...place);
}

// The map lies on what the model saw: the image padded to a square, its central square, or all of it.
function heat(context, question, scale) {
  const look = question.looks[state.run];
  if (!look || !look.map) return;
  const [rows, columns] = look.grid, [width, height] = question.size;
  const padding = data.padding[state.run];
  const side = padding === "crop" ? Math.min(width, height) : Math.max(width, height);
  const [across, down] = padding === "none" ? [width, height] : [side, side];
  const cells = Uint8Array.from(atob(look.map), (c) => c.charCodeAt(0));
  const top = Math.max(1, ...cells), small = make("canvas");
  small.width = columns;
  small.height = rows;
  const pixels = small.getContext("2d").createImageData(columns, rows);
  cells.forEach((cell, i) => {
    const value = cell / top, at = Math.min(value * 4, 3.999), low = Math.floor(at);
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = HEAT[low][c] + (at - low) * (HEAT[low + 1][c] - HEAT[low][c]);
    }
    pixels.data[4 * i + 3] = 165 * value;
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.drawImage(small, (width - across) / 2 * scale, (height - down) / 2 * scale,
    across * scale, down * scale);
}

function crop(question, look, [x0, y0, x1, y1], index) {
  const scale = CROP / Math.max(x1 - x0, y1 - y0);
  const canvas = sized((x1 - x0) * scale, (y1 - y0) * scale);
  const own = look.crops ? look.crops[index] : null;
  load(own === null ? question.picture : own, (image) => {
    const ratio = image.naturalWidth / question.size[0];
    const from = own === null
      ? [x0 * ratio, y0 * ratio, (x1 - x0) * ratio, (y1 - y0) * ratio]
      : [0, 0, image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, ...from, 0, 0, (x1 - x0) * scale, (y1 - y0) * scale);
  });
  return canvas;
}

// Filters, pages, keys.
function set(changes) {
  Object.assign(state, { page: 0 }, changes);
  draw();
}

function choose(step) {
  const cards = [...document.querySelectorAll(".card")];
  if (!cards.length) return;
  if (state.chosen >= 0) cards[state.chosen].classList.remove("chosen");
  state.chosen = Math.min(Math.max(state.chosen + step, 0), cards.length - 1);
  cards[state.chosen].classList.add("chosen");
  cards[state.chosen].scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (KEYS[event.key]) set({ kind: KEYS[event.key] });
  else if (event.key === "ArrowRight") set({ page: state.page + 1 });
  else if (event.key === "ArrowLeft") set({ page: state.page - 1 });
  else if (event.key === "ArrowDown") choose(1);
  else if (event.key === "ArrowUp") choose(-1);
  else if (event.key === "m") set({ map: !state.map, page: state.page });
  else if (event.key === "/") find("search").focus();
  else return;
  event.preventDefault();
}

function option(select, value, text) {
  const element = make("option", "", text);
  element.value = value;
  select.append(element);
}

function start() {
  prepare();
  data.runs.slice(1).forEach((name, i) => option(find("run"), i + 1, `${name} against ${data.runs[0]}`));
  option(find("task"), "", "all");
  data.tasks.forEach((name, i) => option(find("task"), i, name));
  for (const kind of Object.keys(KINDS)) {
    const button = make("button");
    button.type = "button";
    button.dataset.kind = kind;
    button.addEventListener("click", () => set({ kind }));
    find("kinds").append(button, " ");
  }
  find("outcome").parentElement.hidden = !data.questions.some((q) => q.truth);
  find("run").addEventListener("change", (e) => set({ run: Number(e.target.value) }));
  find("task").addEventListener("change", (e) => set({ task: e.target.value }));
  find("outcome").addEventListener("change", (e) => set({ outcome: e.target.value }));
  find("pictured").addEventListener("change", (e) => set({ pictured: e.target.checked }));
  let waiting;
  find("search").addEventListener("input", (e) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => set({ search: e.target.value.trim().toLowerCase() }), 150);
  });
  find("filters").addEventListener("submit", (e) => e.preventDefault());
  find("previous").addEventListener("click", () => set({ page: state.page - 1 }));
  find("next").addEventListener("click", () => set({ page: state.page + 1 }));
  document.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

start();
