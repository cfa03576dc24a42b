"use strict";

const SIDE = 28, N = SIDE * SIDE;
const INK = [20, 33, 61], PAPER = [255, 255, 255], GIVEN_INK = [43, 92, 158], GIVEN_PAPER = [207, 224, 245];
const HIDDEN = [[150, 156, 168], [176, 182, 192]];
const $ = (id) => document.getElementById(id);
const kept = JSON.parse(sessionStorage.getItem("genmodels") || "{}");
const keep = (key, value) => { kept[key] = value; sessionStorage.setItem("genmodels", JSON.stringify(kept)); };

// Asking the server.

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the app does not answer; is it still running?");
  }
  const body = await response.json();
  if (response.status >= 400) throw new Error(body.error);
  return [response.status, body];
}

// The result of a use of a model; `progress` hears how many are ahead and what share is done. `wanted` ends the waiting.
async function use(name, options, progress = () => {}, wanted = () => true) {
  const [, { job }] = await answer(`/api/${name}`, { method: "POST", body: JSON.stringify(options) });
  while (wanted()) {
    const [status, body] = await answer(`/api/jobs/${job}`);
    if (status === 200) return body;
    progress(body);
  }
  return null;
}

// The latest call alone shows what it found; each has a number.
const calls = {};
function latest(place) {
  const mine = calls[place] = (calls[place] || 0) + 1;
  return () => calls[place] === mine;
}

// Two at a time, so that visitors take turns.
async function inTurn(items, work) {
  const rest = [...items];
  const worker = async () => { while (rest.length) await work(rest.shift()); };
  await Promise.all([worker(), worker()]);
}

// A use whose waiting and failing are shown in a box.
async function shown(box, name, options, wanted) {
  const bar = element("progress", { max: 1, value: 0 }), text = element("span");
  box.replaceChildren(bar, " ", text);
  try {
    const result = await use(name, options, ({ ahead, share }) => {
      bar.value = share;
      text.textContent = ahead ? `${ahead} ahead of you` : "";
    }, wanted);
    if (wanted()) box.replaceChildren();
    return wanted() ? result : null;
  } catch (error) {
    if (wanted()) box.replaceChildren(element("span", { className: "failed", textContent: error.message }));
    return null;
  }
}

// Drawing.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function paint(canvas, colour, side = SIDE) {
  const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
  for (let i = 0; i < side * side; i++) pixels.data.set([...colour(i), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
}

function thumbnail(colour, label, text = "") {
  const canvas = element("canvas", { width: SIDE, height: SIDE, title: label });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  canvas.dataset.pixels = text;
  paint(canvas, colour);
  return canvas;
}

const mix = (one, two, share) => one.map((value, c) => Math.round(value + (two[c] - value) * share));
const binary = (text) => (i) => (text[i] === "1" ? INK : PAPER);
const grey = (text) => (i) => mix(PAPER, INK, (text.charCodeAt(i) - 97) / 25);
function heat(nats) {
  const share = Math.min(nats / 3, 1);
  return share < 0.5 ? mix(PAPER, [242, 177, 52], 2 * share) : mix([242, 177, 52], [179, 0, 27], 2 * share - 1);
}

// A sheet of 28x28 pixels, each ink or paper, each given or hidden.
class Pad {
  static radius = { ink: 1.1, paper: 1.6, hide: 2.2 };

  constructor(place, digits) {
    this.name = place.dataset.pad;
    this.undone = [];
    this.canvas = element("canvas", { width: SIDE, height: SIDE });
    this.canvas.setAttribute("aria-label", "a sheet to draw on");
    const before = kept[this.name];
    this.ink = before ? [...before.ink] : [...digits[0]];
    this.hidden = before ? [...before.hidden] : Array(N).fill("0");
    const hides = place.dataset.brushes.includes("hide");
    if (!before && hides) this.hidden = this.half((row) => row >= SIDE / 2);
    const brushes = place.dataset.brushes.split(" ").map((brush) => {
      const button = element("button", { textContent: brush, onclick: () => this.take(brush) });
      button.dataset.brush = brush;
      return button;
    });
    const action = (text, work) => element("button", { textContent: text, onclick: () => { this.note(); work(); this.show(); } });
    const hide = (text, rule) => action(text, () => { this.hidden = this.half(rule); });
    const undo = element("button", { textContent: "undo", onclick: () => this.undo() });
    const clear = action("clear", () => { this.ink.fill("0"); this.hidden.fill("0"); });
    const halves = hides ? [
      hide("hide the bottom half", (row) => row >= SIDE / 2), hide("hide the top half", (row) => row < SIDE / 2),
      hide("hide the right half", (row, column) => column >= SIDE / 2), hide("hide nothing", () => false),
    ] : [
      action("noise", () => { this.ink = this.ink.map((value) => (Math.random() < 0.05 ? String(1 - value) : value)); }),
      action("shifted", () => { this.ink = this.ink.map((_, i) => (i % SIDE < 4 ? "0" : this.ink[i - 4])); }),
      action("inverted", () => { this.ink = this.ink.map((value) => String(1 - value)); }),
    ];
    const chooser = element("div", { className: "digits" }, ...digits.map((digit) => element("button", {
      title: "start from this digit",
      onclick: () => { this.note(); this.ink = [...digit]; this.show(); },
    }, thumbnail(binary(digit), "a test digit"))));
    const tools = (...buttons) => element("div", { className: "tools" }, ...buttons);
    place.append(this.canvas, tools(...brushes, undo, clear), tools(...halves), "Start from a digit:", chooser);
    this.brushes = brushes;
    this.take("ink");
    this.listen();
    this.show();
  }

  half(rule) {
    return Array.from({ length: N }, (_, i) => (rule(Math.floor(i / SIDE), i % SIDE) ? "1" : "0"));
  }

  take(brush) {
    this.brush = brush;
    for (const button of this.brushes) button.setAttribute("aria-pressed", button.dataset.brush === brush);
  }

  note() {
    this.undone.push([[...this.ink], [...this.hidden]]);
    if (this.undone.length > 60) this.undone.shift();
  }

  undo() {
    if (!this.undone.length) return;
    [this.ink, this.hidden] = this.undone.pop();
    this.show();
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * SIDE, (event.clientY - box.top) / box.height * SIDE];
    };
    const stroke = (event) => {
      const point = at(event), steps = Math.ceil(2 * Math.hypot(point[0] - last[0], point[1] - last[1])) || 1;
      for (let step = 1; step <= steps; step++) this.dab(...last.map((value, c) => value + (point[c] - value) * step / steps));
      last = point;
    };
    this.canvas.onpointerdown = (event) => {
      event.preventDefault();
      this.canvas.setPointerCapture(event.pointerId);
      this.note();
      last = at(event);
      stroke(event);
      this.show();
    };
    this.canvas.onpointermove = (event) => {
      if (!last) return;
      for (const one of event.getCoalescedEvents?.() || []) stroke(one);
      stroke(event);
      this.show();
    };
    this.canvas.onpointerup = this.canvas.onpointercancel = () => { last = null; };
  }

  dab(x, y) {
    const radius = Pad.radius[this.brush];
    for (let i = 0; i < N; i++) {
      if (Math.hypot(i % SIDE + 0.5 - x, Math.floor(i / SIDE) + 0.5 - y) > radius) continue;
      this.hidden[i] = this.brush === "hide" ? "1" : "0";
      if (this.brush !== "hide") this.ink[i] = this.brush === "ink" ? "1" : "0";
    }
  }

  get image() { return this.ink.map((value, i) => (this.hidden[i] === "1" ? "0" : value)).join(""); }
  get observed() { return this.hidden.map((value) => (value === "1" ? "0" : "1")).join(""); }

  show() {
    paint(this.canvas, (i) => (this.hidden[i] === "1" ? HIDDEN[(i + Math.floor(i / SIDE)) % 2] : this.ink[i] === "1" ? INK : PAPER));
    this.canvas.dataset.image = this.image;
    this.canvas.dataset.observed = this.observed;
    keep(this.name, { ink: this.ink.join(""), hidden: this.hidden.join("") });
  }
}

// The tabs.

function open(tab) {
  for (const button of document.querySelectorAll("nav button")) {
    const chosen = button.dataset.tab === tab;
    button.setAttribute("aria-selected", chosen);
    $(button.dataset.tab).hidden = !chosen;
  }
  keep("tab", tab);
}

const label = (model) => (model.default ? model.model : model.name);

function completeTab(models, digits) {
  const pad = new Pad(document.querySelector("[data-pad=complete]"), digits);
  const able = models.filter((model) => model.completes);
  const chosen = new Set(kept.chosen || able.filter((m) => m.default && ["eonade", "nade", "pixelsnail", "vae"].includes(m.model)).map((m) => m.name));
  $("complete-models").append(...able.map((model) => {
    const box = element("input", { type: "checkbox", value: model.name, checked: chosen.has(model.name) });
    box.onchange = () => { chosen[box.checked ? "add" : "delete"](model.name); keep("chosen", [...chosen]); };
    return element("label", { title: model.idea }, box, ` ${label(model)}`);
  }));
  $("complete-go").onclick = async () => {
    const wanted = latest("complete"), seed = Math.floor(Math.random() * 2 ** 31);
    const image = pad.image, observed = pad.observed, draws = Number($("draws").value);
    const given = (text) => (i) => {
      if (observed[i] === "0") return binary(text)(i);
      return text[i] === "1" ? GIVEN_INK : GIVEN_PAPER;
    };
    const cards = able.filter((model) => chosen.has(model.name)).map((model) => {
      const state = element("div"), badge = element("span", { className: "badge" }), images = element("div", { className: "grid" });
      const card = element("div", { className: "card" }, element("strong", { textContent: label(model) }), badge,
        element("div", { className: "idea", textContent: model.idea }), state, images);
      card.dataset.model = model.name;
      return { model, card, state, badge, images };
    });
    $("complete-results").replaceChildren(...cards.map(({ card }) => card));
    if (!cards.length) $("complete-results").textContent = "Choose a model first.";
    await inTurn(cards, async ({ model, state, badge, images }) => {
      if (!wanted()) return;
      const result = await shown(state, "complete", { name: model.name, image, observed, draws, seed }, wanted);
      if (!result) return;
      badge.className = `badge ${result.badge}`;
      badge.textContent = result.note;
      images.replaceChildren(...result.images.map((text) => thumbnail(given(text), `a guess of ${label(model)}`, text)));
    });
  };
}

function scoreTab(models, digits) {
  const pad = new Pad(document.querySelector("[data-pad=score]"), digits);
  const able = models.filter((model) => model.nats !== null).sort((one, two) => one.nats - two.nats);
  $("score-go").onclick = async () => {
    const wanted = latest("score"), image = pad.image;
    const rows = able.map((model) => {
      const cells = Array.from({ length: 3 }, () => element("td"));
      const row = element("tr", {}, element("td", { textContent: label(model), title: model.idea }), ...cells);
      row.dataset.model = model.name;
      return { model, row, cells };
    });
    document.querySelector("#score-results tbody").replaceChildren(...rows.map(({ row }) => row));
    await inTurn(rows, async ({ model, row, cells: [nats, percentile, map] }) => {
      if (!wanted()) return;
      const result = await shown(nats, "score", { name: model.name, image }, wanted);
      if (!result) return;
      row.dataset.nats = result.nats;
      nats.textContent = `${result.is_bound ? "at most " : ""}${result.nats.toFixed(1)} nats`;
      nats.title = `${result.estimator}; the median test digit: ${result.typical}`;
      percentile.textContent = `${result.percentile} % of digits`;
      map.append(thumbnail((i) => heat(result.surprise[i]), result.map));
    });
  };
}

function sampleTab(models) {
  const select = $("sample-model");
  select.append(...models.map((model) => element("option", { value: model.name, textContent: label(model) })));
  select.value = models.some((m) => m.name === kept.sample) ? kept.sample : models.find((m) => m.model === "vae" && m.default).name;
  $("seed").value = kept.seed ?? 0;
  const model = () => models.find((one) => one.name === select.value);
  const seed = () => { keep("seed", $("seed").value); return Number($("seed").value); };
  const refresh = () => {
    ["sample", "watch", "codes", "slider"].forEach(latest);
    const figure = model().nats === null ? "" : ` Test digits take it ${model().nats} nats (${model().estimator}).`;
    $("sample-idea").textContent = `${model().idea} ${model().parameters.toLocaleString("en")} parameters.${figure}`;
    $("watch").hidden = !model().draws;
    $("codes").hidden = !model().codes;
    $("codes-view").hidden = true;
    for (const id of ["sample-results", "sample-state", "watch-state", "codes-state"]) $(id).replaceChildren();
    for (const id of ["watch-image", "watch-chance"]) paint($(id), () => PAPER);
    $("watch-count").textContent = "";
    keep("sample", select.value);
  };
  select.onchange = refresh;
  refresh();

  $("sample-go").onclick = async () => {
    const result = await shown($("sample-state"), "sample", { name: select.value, count: 16, seed: seed() }, latest("sample"));
    if (result) $("sample-results").replaceChildren(...result.images.map((text) => thumbnail(binary(text), "a sample", text)));
  };
  $("sample-next").onclick = () => { $("seed").value = Number($("seed").value) + 1; $("sample-go").click(); };

  $("watch-go").onclick = async () => {
    const wanted = latest("watch");
    const result = await shown($("watch-state"), "draw", { name: select.value, seed: seed() }, wanted);
    if (!result) return;
    const turn = Array(N);
    result.order.forEach((pixel, index) => { turn[pixel] = index; });
    let done = 0;
    const step = () => {
      if (!wanted()) return;
      done = Math.min(N, done + Number($("speed").value) / 4);
      paint($("watch-image"), (i) => (turn[i] >= done ? HIDDEN[0] : binary(result.image)(i)));
      paint($("watch-chance"), (i) => (turn[i] >= done ? HIDDEN[0] : mix(PAPER, INK, result.probability[i])));
      $("watch-count").textContent = `${Math.floor(done)} of ${N} pixels`;
      $("watch-image").dataset.pixels = done === N ? result.image : "";
      if (done < N) requestAnimationFrame(step);
    };
    step();
  };

  $("codes-go").onclick = async () => {
    const wanted = latest("codes"), name = select.value;
    const corners = await shown($("codes-state"), "corners", { name, seed: seed() }, wanted);
    const plane = corners && await shown($("codes-state"), "plane", { name, codes: corners.codes }, wanted);
    if (!plane) return;
    $("codes-view").hidden = false;
    showPlane(plane);
    showSliders(name, corners);
  };
}

function showPlane({ size, greys }) {
  const canvas = $("plane"), side = size * SIDE;
  canvas.width = canvas.height = side;
  paint(canvas, (i) => {
    const row = Math.floor(i / side), column = i % side;
    const picture = Math.floor(row / SIDE) * size + Math.floor(column / SIDE);
    return grey(greys[picture])(row % SIDE * SIDE + column % SIDE);
  }, side);
  const point = (index) => { paint($("plane-point"), grey(greys[index])); $("plane-point").dataset.pixels = greys[index]; };
  point(0);
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const box = canvas.getBoundingClientRect();
    const cell = (value, length) => Math.max(0, Math.min(size - 1, Math.floor(value / length * size)));
    point(cell(event.clientY - box.top, box.height) * size + cell(event.clientX - box.left, box.width));
  };
  const diagonal = Array.from({ length: size }, (_, i) => greys[i * size + i]);
  $("line").replaceChildren(...diagonal.map((text) => thumbnail(grey(text), "between two digits", text)));
}

function showSliders(name, { codes, sliders, spread }) {
  const code = [...codes[0]];
  const decode = async () => {
    const wanted = latest("slider");
    await new Promise((done) => { setTimeout(done, 60); });
    if (!wanted()) return;
    const result = await use("decode", { name, code }, () => {}, wanted).catch(() => null);
    if (!result || !wanted()) return;
    paint($("slider-image"), grey(result.grey));
    $("slider-image").dataset.pixels = result.grey;
  };
  $("sliders").replaceChildren(...sliders.map((index, k) => {
    const range = element("input", { type: "range", min: -3, max: 3, step: 0.1, value: code[index] / spread[k] });
    range.oninput = () => { code[index] = range.value * spread[k]; decode(); };
    return element("label", {}, `number ${index + 1}`, range);
  }));
  decode();
}

async function start() {
  for (const button of document.querySelectorAll("nav button")) button.onclick = () => open(button.dataset.tab);
  open(kept.tab || "complete");
  try {
    const [, { digits, models }] = await answer("/api/models");
    $("count").textContent = models.length;
    completeTab(models, digits);
    scoreTab(models, digits);
    sampleTab(models);
    document.body.dataset.ready = "yes";
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

start();
