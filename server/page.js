"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const HEALTH_MS = 2000; // how often the state of the server is asked for
const CAMERA_MS = 100; // at least between two pictures of the camera
const CHART = 120; // answers in the chart
const WITHOUT_PROMPTS = ["frozen", "finetune"]; // learners
let model = null;
let stream = null;
let last = null; // the picture shown, to ask again about
const times = [];

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function problem(id, text) {
  $(id).hidden = !text;
  $(id).textContent = text || "";
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const document_ = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok && !document_.model) {
    const error = new Error(document_.error);
    error.status = response.status;
    throw error;
  }
  return document_;
}

const milliseconds = (value) => (value === null || value === undefined ? "–" : `${value < 10 ? value.toFixed(2) : value.toFixed(1)} ms`);

const counted = (n) => (n ? (n === 1 ? "1 answer" : `the last ${n} answers`) : "no answers");

function percentile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
}

// -- state of the server ---------------------------------------------------------------------------------------------

async function state() {
  try {
    const health = await ask("/health");
    const changed = !model || model.version !== health.model.version;
    model = health.model;
    $("health").textContent = health.status === "ok" ? "healthy" : health.status;
    $("health").title = health.reason || "";
    $("health").className = `badge ${health.status === "ok" ? "good" : "warn"}`;
    $("name").textContent = model.name;
    document.title = `${model.name} · cdl-edge`;
    $("model").textContent =
      `${model.learner || "student"}, ${model.classes} classes in ${model.tasks} task${model.tasks === 1 ? "" : "s"} · ${model.runner.backend}, ` +
      `${model.runner.precision}, ${model.runner.threads} thread${model.runner.threads === 1 ? "" : "s"} · version ${model.version}`;
    $("p50").textContent = milliseconds(health.latency.p50_ms);
    $("p99").textContent = milliseconds(health.latency.p99_ms);
    $("p-n").textContent = counted(health.latency.n);
    $("queue").textContent = health.in_flight;
    $("capacity").textContent = health.capacity;
    if (changed) {
      const chosen = $("task").value;
      $("task").replaceChildren(element("option", { value: "", textContent: "any" }));
      for (let i = 0; i < model.tasks; i++) $("task").append(element("option", { value: i, textContent: i + 1 }));
      $("task").value = chosen < model.tasks ? chosen : "";
      classes();
      packs();
    }
  } catch (error) {
    $("health").textContent = "no connection";
    $("health").className = "badge warn";
  }
}

async function classes() {
  const found = await ask("/classes").catch(() => ({ tasks: [] }));
  $("known").replaceChildren(...found.tasks.flatMap((task) => [
    element("dt", { textContent: `Task ${task.task + 1}` }),
    element("dd", { textContent: task.classes.join(", ") }),
  ]));
}

// -- pictures and answers --------------------------------------------------------------------------------------------

async function classify(picture, type) {
  const begin = performance.now();
  const query = new URLSearchParams({ top: $("top").value });
  if ($("task").value !== "") query.set("task", $("task").value);
  try {
    const answer = await ask(`/predict?${query}`, { method: "POST", body: picture, headers: { "Content-Type": type } });
    problem("problem", "");
    show(answer, performance.now() - begin);
    return true;
  } catch (error) {
    problem("problem", error.message);
    $("label").replaceChildren(element("span", { className: "note", textContent: "No answer." }));
    $("classes").replaceChildren();
    $("prompts").replaceChildren();
    return false;
  }
}

function show(answer, took) {
  const found = answer.predictions[0];
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const task = `task ${found.task + 1} (${percent(found.task_posterior[found.task])})`;
  const sure = element("span", { className: "note", textContent: `confidence ${percent(found.confidence)} · ${task}` });
  $("label").replaceChildren(found.label, " ", sure);
  if (found.unknown) {
    const doubt = element("span", { className: "badge warn", textContent: "looks like none of the classes" });
    $("label").append(" ", doubt);
  }
  const top = found.top || [found];
  $("classes").replaceChildren(...top.map((c) => bar(c.label, c.probability, percent(c.probability))));
  prompts(found.prompts);
  times.push(took);
  if (times.length > CHART) times.shift();
  $("page-p50").textContent = milliseconds(percentile(times, 0.5));
  $("page-n").textContent = counted(times.length);
  chart();
  $("timing").textContent =
    `Here and back ${milliseconds(took)}, of which ${milliseconds(answer.ms.waited)} in the queue and ` +
    `${milliseconds(answer.ms.computed)} decoding and computing · p50 ${milliseconds(percentile(times, 0.5))}, ` +
    `p99 ${milliseconds(percentile(times, 0.99))} · answered by version ${answer.version}`;
}

function bar(name, share, text) {
  const graph = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  const rectangle = drawn("rect", { x: 0, y: 0, height: 10, width: Math.min(100, 100 * Math.abs(share)) });
  if (share < 0) rectangle.setAttribute("class", "negative");
  graph.append(rectangle);
  return element(
    "li", {},
    element("span", { className: "name", textContent: name, title: name }), graph,
    element("span", { className: "value", textContent: text }),
  );
}

function prompts({ selected, weights }) {
  const selection = model ? model.selection : { kind: "none" };
  if (!selected.length) {
    const none = model && WITHOUT_PROMPTS.includes(model.learner) ? "This student has no prompts." : "All prompts, for every picture.";
    $("prompts-note").textContent = "";
    $("prompts").replaceChildren(element("p", { className: "note", textContent: none }));
    return;
  }
  const byBlock = selection.kind === "top-k";
  $("prompts-note").textContent = byBlock ? "· similarity of the picture and the key" : "· strongest components, mean weight over the blocks";
  const largest = Math.max(...weights.map(Math.abs), 1e-9);
  const scale = byBlock ? Math.max(1, largest) : largest;
  const groups = byBlock ? selection.blocks.map((_, i) => i) : [0];
  const each = byBlock ? selection.k : selected.length;
  const order = weights.map((_, i) => i);
  if (!byBlock) order.sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a])); // they come in the order of the mean |weight|
  $("prompts").replaceChildren(...groups.flatMap((group) => {
    const rows = [];
    for (const i of order.slice(group * each, (group + 1) * each)) {
      rows.push(bar(`prompt ${selected[i]}`, weights[i] / scale, weights[i].toFixed(3)));
    }
    const list = element("ul", { className: "bars prompts" }, ...rows);
    return groups.length > 1 ? [element("p", { className: "block", textContent: `Block ${selection.blocks[group]}` }), list] : [list];
  }));
}

function chart() {
  const high = Math.max(...times);
  const step = 600 / (Math.max(times.length, 20) - 1);
  const height = (t) => (78 - (t / high) * 74).toFixed(1);
  const points = times.map((t, i) => `${i ? "L" : "M"}${(i * step).toFixed(1)} ${height(t)}`);
  if (points.length === 1) points.push(`L6 ${height(times[0])}`);
  const floor = drawn("line", { x1: 0, x2: 600, y1: 79, y2: 79 });
  $("chart-note").textContent = `· ${counted(times.length)} on this page, up to ${milliseconds(high)}`;
  $("chart").replaceChildren(floor, drawn("path", { d: points.join(" ") }));
  $("chart").setAttribute("aria-label", `Latency of ${counted(times.length)}: p50 ${milliseconds(percentile(times, 0.5))}, p99 ${milliseconds(percentile(times, 0.99))}`);
}

function take(file) {
  if (!file) return;
  stop();
  last = file;
  if ($("shown").src) URL.revokeObjectURL($("shown").src);
  $("shown").src = URL.createObjectURL(file);
  $("shown").alt = file.name;
  $("shown").hidden = false;
  $("hint").hidden = true;
  $("drop").classList.add("full");
  classify(file, file.type.startsWith("image/") ? file.type : "application/octet-stream");
}

function again() {
  if (last && !stream) classify(last, last.type.startsWith("image/") ? last.type : "application/octet-stream");
}

$("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
$("shown").addEventListener("error", () => { $("shown").hidden = true; $("hint").hidden = false; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
$("top").addEventListener("change", again);
$("task").addEventListener("change", again);

// -- camera ----------------------------------------------------------------------------------------------------------

// The stream of the camera; null where there is none, and `place` says why.
async function openCamera(place) {
  if (!navigator.mediaDevices) {
    problem(place, "The browser gives a camera only to pages from this machine or over https.");
    return null;
  }
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 640 } } });
  } catch (error) {
    problem(place, `No camera: ${error.message}`);
    return null;
  }
}

async function start() {
  stream = await openCamera("problem");
  if (!stream) return;
  $("video").srcObject = stream;
  await $("video").play();
  $("video").hidden = false;
  $("shown").hidden = $("hint").hidden = true;
  $("drop").classList.add("full");
  $("camera").textContent = "Stop the camera";
  $("camera").setAttribute("aria-pressed", "true");
  const canvas = document.createElement("canvas");
  while (stream) {
    const begin = performance.now();
    canvas.width = $("video").videoWidth;
    canvas.height = $("video").videoHeight;
    canvas.getContext("2d").drawImage($("video"), 0, 0);
    const picture = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9));
    const good = picture && stream && await classify(picture, "image/jpeg");
    await new Promise((done) => setTimeout(done, good ? Math.max(0, CAMERA_MS - (performance.now() - begin)) : 1000));
  }
}

function stop() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = null;
  $("video").hidden = true;
  $("hint").hidden = false;
  $("drop").classList.remove("full");
  $("camera").textContent = "Use the camera";
  $("camera").setAttribute("aria-pressed", "false");
}

$("camera").addEventListener("click", () => (stream ? stop() : start()));

// -- packs -----------------------------------------------------------------------------------------------------------

async function packs() {
  const row = (...cells) => element("tr", {}, ...cells);
  const cell = (content, className = "") => element("td", { className }, content);
  try {
    const found = await ask("/packs");
    $("packs").replaceChildren(...found.packs.map((pack) => {
      let state_ = element("span", { className: "badge good", textContent: "answers" });
      if (pack.version !== found.version) {
        state_ = element("button", { type: "button", textContent: "Use this version", ariaLabel: `Use version ${pack.version}` });
        state_.addEventListener("click", () => change(`/packs/rollback?to=${pack.version}`, null, `Changing to ${pack.version} …`));
      }
      const made = (pack.created || "–").slice(0, 16).replace("T", " ");
      return row(cell(pack.version, "mono"), cell(pack.classes, "num"), cell(pack.tasks, "num"), cell(made), cell(state_));
    }));
  } catch (error) {
    $("packs").replaceChildren(row(element("td", { colSpan: 5, className: "note", textContent: error.message })));
  }
}

async function change(path, body, doing) {
  problem("pack-problem", "");
  $("pack-state").textContent = doing;
  const headers = { "Content-Type": "application/octet-stream" };
  if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
  try {
    const done = await ask(path, { method: "POST", body, headers });
    $("pack-state").textContent = `Version ${done.version} answers now, after ${done.seconds} s; before it was ${done.previous}.`;
    await state();
    await packs();
    again();
  } catch (error) {
    $("pack-state").textContent = "";
    if (error.status === 401) $("token").focus();
    problem("pack-problem", error.message);
  }
}

$("pack").addEventListener("change", () => {
  const file = $("pack").files[0];
  if (file) change("/packs", file, `Installing ${file.name} …`);
  $("pack").value = "";
});

state();
setInterval(state, HEALTH_MS);
