// The page at /: ask the model something, see its answer and where the time went, and watch the load.
"use strict";

const $ = (id) => document.getElementById(id);
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"].map((name) => `var(${name})`);
// Where a request's time goes, in the order in which it passes.
const PARTS = ["receive", "decode", "queue", "copy", "compute", "encode"];
const WATCH_MS = 1000;
const KEPT = 120;
let model = null;
// The model that the address of this page names, and nothing where it names none.
const named = new URLSearchParams(location.search).get("model");
const about = (address) => (named === null ? address : `${address}?model=${encodeURIComponent(named)}`);

function element(kind, text = "", className = "") {
  const made = document.createElement(kind);
  // Always as text: a label or an error is nobody's markup.
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function start() {
  try {
    const response = await fetch(about("./ui/model.json"));
    const document_ = await response.json();
    if (response.status === 404 && named !== null) {
      $("about").textContent = document_.error;
      return;
    }
    if (!response.ok) throw new Error(document_.error);
    model = document_;
  } catch (error) {
    $("about").textContent = `not ready: ${error.message}; trying again`;
    setTimeout(start, 1000);
    return;
  }
  document.title = `${model.title} · dlops`;
  $("title").textContent = model.title;
  $("about").textContent = `version ${model.version} · ${model.task} · ${model.provider} on ${model.device}, `
    + `${model.precision} · ${model.instances} instance${model.instances === 1 ? "" : "s"}, up to ${model.max_batch} rows a run`;
  if (model.input === null) {
    $("no-predict").hidden = false;
    $("no-predict").textContent = `This model takes several tensors: send them to v2/models/${model.name}/infer.`;
  } else {
    $(`${model.input}-input`).hidden = false;
    $("shape").textContent = `of shape [${model.shape.join(", ")}]`;
    for (let number = 0; number < model.samples; number += 1) addSample(number);
  }
  showModels();
  const asked = new URLSearchParams(location.search).get("sample");
  if (asked !== null) askSample(Number(asked));
}

function showModels() {
  $("models-block").hidden = model.models.length < 2;
  for (const name of model.models) {
    const option = element("option", name);
    option.value = name;
    option.selected = name === model.name;
    $("models").append(option);
  }
}

function addSample(number) {
  const button = element("button", model.input === "image" ? "" : `sample ${number}`);
  button.type = "button";
  button.title = `ask about sample ${number}`;
  if (model.input === "image") {
    const picture = element("img");
    picture.src = about(`./ui/samples/${number}`);
    picture.alt = `sample ${number}`;
    button.append(picture);
  } else {
    button.className = "text";
  }
  button.addEventListener("click", () => askSample(number));
  $("samples").append(button);
  $("samples-block").hidden = false;
}

async function askSample(number) {
  const response = await fetch(about(`./ui/samples/${number}`));
  if (!response.ok) return show({ error: `sample ${number}: ${(await response.json()).error}` });
  if (model.input === "image") {
    const from = `curl -s${bearer()} ${quoted(response.url)} | `;
    return ask(await response.blob(), response.headers.get("Content-Type"), "--data-binary @-", from);
  }
  if (model.input === "text") {
    $("text").value = await response.text();
    return askText();
  }
  $("numbers").value = JSON.stringify(await response.json());
  return askNumbers();
}

function askImage(file, name) {
  const kind = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  return ask(file, kind, `--data-binary @${quoted(name || "image.png")}`);
}

async function askNumbers() {
  const text = $("numbers").value;
  try {
    JSON.parse(text);
  } catch (error) {
    return show({ error: `this is no JSON: ${error.message}` });
  }
  const body = `{"inputs": [${text}]}`;
  return ask(body, "application/json", `-d ${quoted(body)}`);
}

function askText() {
  const text = $("text").value;
  return ask(text, "text/plain", `--data-raw ${quoted(text)}`);
}

// The server's token is in nobody's page: whoever copies the line has it in a variable.
const bearer = () => (model.token ? ' -H "Authorization: Bearer $DLOPS_TOKEN"' : "");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// data: how curl is told what to send. from: what comes before it in the shell.
async function ask(body, kind, data, from = "") {
  // What a browser cannot show the model may still read.
  const picture = body instanceof Blob ? await createImageBitmap(body).catch(() => null) : null;
  const predict = model.models.length < 2 ? "./predict" : `./models/${encodeURIComponent(model.name)}/predict`;
  const curl = `${from}curl${bearer()} ${data} -H ${quoted(`Content-Type: ${kind}`)} ${new URL(predict, location.href).href}`;
  let response;
  try {
    response = await fetch(predict, { method: "POST", body, headers: { "Content-Type": kind, "X-Server-Timing": "1" } });
  } catch {
    return show({ error: "the server does not answer" });
  }
  const text = await response.text();
  const answer = JSON.parse(text);
  const error = response.ok ? null : `${response.status}: ${answer.error}`;
  return show({ error, prediction: response.ok ? answer.predictions[0] : null, picture, curl, text,
    timing: response.headers.get("Server-Timing") });
}

function show({ error = null, prediction = null, picture = null, curl = null, text = null, timing = null }) {
  $("nothing").hidden = true;
  $("error").hidden = error === null;
  $("error").textContent = error || "";
  $("result").replaceChildren();
  $("picture").hidden = picture === null;
  if (picture !== null) draw(picture, prediction);
  if (prediction !== null) describe(prediction);
  showTiming(timing);
  $("curl-block").hidden = curl === null;
  $("curl").textContent = curl || "";
  $("raw-block").hidden = text === null;
  $("raw").textContent = text === null ? "" : pretty(text);
}

function pretty(text) {
  const short = JSON.stringify(JSON.parse(text), null, 2);
  return short.length > 20000 ? `${short.slice(0, 20000)}\n… ${short.length - 20000} characters more` : short;
}

function describe(prediction) {
  if (prediction.top) {
    prediction.top.forEach((one, place) => addBar(one.label, one.probability, place === 0 ? "first" : ""));
  } else if (prediction.detections) {
    if (prediction.detections.length === 0) $("result").append(element("p", "nothing was found"));
    prediction.detections.slice(0, 50).forEach((one) => addBar(one.label, one.score, "", colourOf(one.label)));
  } else if (prediction.classes) {
    prediction.classes.forEach((one) => addBar(one.label, one.share, "", maskColour(one.class)));
  } else if (prediction.image) {
    const picture = element("img", "", "generated");
    picture.src = `data:image/png;base64,${prediction.image}`;
    picture.alt = "what the model made";
    $("result").append(picture);
  } else {
    const values = prediction.values;
    const named = Array.isArray(values) ? values.map((value, place) => [String(place), value]) : Object.entries(values);
    named.slice(0, 100).forEach(([name, value]) => {
      const row = element("div", "", "label");
      row.append(element("span", name), element("b", typeof value === "number" ? value.toPrecision(4) : "…"));
      $("result").append(row);
    });
  }
}

function addBar(label, share, className, colour = null) {
  const row = element("div", "", `label ${className}`);
  const bar = element("i");
  bar.style.setProperty("--share", `${(100 * share).toFixed(2)}%`);
  if (colour) bar.style.setProperty("--colour", colour);
  row.append(element("span", label), element("b", `${(100 * share).toFixed(1)} %`), bar);
  $("result").append(row);
}

function colourOf(label) {
  let sum = 0;
  for (const letter of label) sum = (31 * sum + letter.codePointAt(0)) % 9973;
  return COLOURS[sum % COLOURS.length];
}

const maskColour = (index) => `hsl(${(index * 67) % 360} 70% 50%)`;

async function draw(picture, prediction) {
  const canvas = $("canvas");
  // A small picture is drawn large, so that a person sees its pixels.
  const zoom = Math.max(1, Math.floor(200 / Math.max(picture.width, picture.height)));
  canvas.width = picture.width * zoom;
  canvas.height = picture.height * zoom;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = zoom === 1;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (prediction?.mask) {
    const bytes = Uint8Array.from(atob(prediction.mask), (letter) => letter.charCodeAt(0));
    const mask = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    context.globalAlpha = 0.5;
    context.imageSmoothingEnabled = false;
    const [left, top, right, bottom] = prediction.area.map((edge) => edge * zoom);
    context.drawImage(coloured(mask), left, top, right - left, bottom - top);
    context.globalAlpha = 1;
  }
  const style = getComputedStyle(document.documentElement);
  for (const one of (prediction?.detections || []).slice(0, 50)) {
    const [left, top, right, bottom] = one.box.map((edge) => edge * zoom);
    const colour = style.getPropertyValue(colourOf(one.label).slice(4, -1)).trim();
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = Math.max(2, canvas.width / 250);
    context.strokeRect(left, top, right - left, bottom - top);
    const size = Math.max(12, canvas.width / 40);
    const caption = `${one.label} ${(100 * one.score).toFixed(0)} %`;
    context.font = `600 ${size}px system-ui, sans-serif`;
    const above = Math.max(0, top - 1.4 * size);
    context.fillRect(left - context.lineWidth / 2, above, context.measureText(caption).width + 8, 1.4 * size);
    // The plots' colours are dark on a light page and light on a dark one.
    context.fillStyle = style.getPropertyValue("--card").trim();
    context.fillText(caption, left + 3, above + 1.05 * size);
  }
}

function coloured(mask) {
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, mask.width, mask.height);
  const colours = new Map();
  for (let place = 0; place < pixels.data.length; place += 4) {
    const index = pixels.data[place];
    if (!colours.has(index)) {
      context.fillStyle = maskColour(index);
      context.fillRect(0, 0, 1, 1);
      colours.set(index, context.getImageData(0, 0, 1, 1).data);
    }
    pixels.data.set(colours.get(index), place);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function showTiming(header) {
  $("timing-block").hidden = header === null;
  $("timing").replaceChildren();
  $("timing-legend").replaceChildren();
  if (header === null) return;
  const times = Object.fromEntries(header.split(",").map((part) => {
    const [name, ms] = part.trim().split(";dur=");
    return [name, Number(ms)];
  }));
  PARTS.forEach((part, place) => {
    const bar = element("i");
    bar.style.background = COLOURS[place];
    bar.style.flexGrow = String(times[part]);
    bar.title = `${part} ${times[part]} ms`;
    $("timing").append(bar);
    const entry = element("span");
    const mark = element("i");
    mark.style.background = COLOURS[place];
    entry.append(mark, `${part} ${times[part].toFixed(2)}`);
    $("timing-legend").append(entry);
  });
  $("timing-legend").append(element("span", `in all ${times.total.toFixed(2)} inside the server`));
}

// The load, a point a second.
const history = [];
let before = null;

async function watch() {
  try {
    const now = await (await fetch("./ui/live.json")).json();
    now.at = performance.now();
    if (before !== null) history.push(between(before, now));
    if (history.length > KEPT) history.shift();
    before = now;
    plot();
  } catch {
    $("queue-text").textContent = "the server does not answer";
  }
  setTimeout(watch, WATCH_MS);
}

function between(first, second) {
  const counts = second.counts.map((count, place) => count - (first.counts[place] ?? 0));
  const seconds = (second.at - first.at) / 1000;
  return { rows: second.queue_rows, busy: second.busy_instances, rate: (second.requests - first.requests) / seconds,
    p50: quantile(second.bounds_ms, counts, 0.5), p99: quantile(second.bounds_ms, counts, 0.99) };
}

// From counts in buckets: within one, as if they lay evenly in it.
function quantile(bounds, counts, q) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total <= 0) return null;
  let below = 0;
  for (let place = 0; place < counts.length; place += 1) {
    if (below + counts[place] >= q * total && counts[place] > 0) {
      const low = place === 0 ? 0 : bounds[place - 1];
      const high = bounds[place] ?? low;
      return low + ((q * total - below) / counts[place]) * (high - low);
    }
    below += counts[place];
  }
  return bounds.at(-1);
}

function plot() {
  const last = history.at(-1);
  if (!last) return;
  lines($("latency"), [["p50", "var(--c0)"], ["p99", "var(--c1)"]], "ms");
  lines($("queue"), [["rows", "var(--c2)"]], "rows");
  const seen = history.findLast((point) => point.p50 !== null);
  $("latency-text").textContent = seen
    ? `p50 ${number(seen.p50)} ms, p99 ${number(seen.p99)} ms (from buckets) · ${last.rate.toFixed(last.rate < 10 ? 1 : 0)} requests/s`
    : "no requests yet";
  $("queue-text").textContent = `${last.rows} rows wait · ${last.busy} instance${last.busy === 1 ? "" : "s"} busy`;
}

const number = (value) => (Number.isInteger(value) || value >= 10 ? value.toFixed(0) : value.toFixed(2));

function lines(svg, series, unit) {
  const [width, height, left, bottom, top] = [480, 170, 44, 20, 10];
  const all = history.flatMap((point) => series.map(([name]) => point[name])).filter((value) => value !== null);
  // One row, or a thousandth of a millisecond: an empty plot has a scale too.
  const most = Math.max(unit === "rows" ? 1 : 1e-3, ...all);
  const x = (place) => left + ((KEPT - history.length + place) / (KEPT - 1)) * (width - left - 6);
  const y = (value) => height - bottom - (value / most) * (height - bottom - top);
  svg.replaceChildren();
  const add = (kind, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    svg.append(made);
    return made;
  };
  add("line", { class: "axis", x1: left, x2: width - 6, y1: y(0), y2: y(0) });
  add("line", { class: "axis", x1: left, x2: width - 6, y1: y(most), y2: y(most) });
  add("text", { x: left - 5, y: y(0) + 4, "text-anchor": "end" }, "0");
  add("text", { x: left - 5, y: y(most) + 4, "text-anchor": "end" }, number(most));
  add("text", { x: left, y: height - 4 }, `${unit}, last two minutes`);
  series.forEach(([name, colour], row) => {
    let path = "";
    let drawing = false;
    history.forEach((point, place) => {
      if (point[name] === null) { drawing = false; return; }
      path += `${drawing ? "L" : "M"}${x(place).toFixed(1)} ${y(point[name]).toFixed(1)} `;
      drawing = true;
    });
    // A point alone has no line: it is drawn as a short one.
    add("path", { class: "line", d: path.replace(/M([\d.]+) ([\d.]+) (?=M|$)/g, "M$1 $2 h1 "), style: `stroke: ${colour}` });
    if (series.length > 1) {
      add("text", { x: width - 8 - 40 * (series.length - 1 - row), y: height - 4, "text-anchor": "end", style: `fill: ${colour}` }, name);
    }
  });
}

$("models").addEventListener("change", (event) => {
  location.search = new URLSearchParams({ model: event.target.value });
});
$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) askImage(file, file.name);
});
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) askImage(file, file.name);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && model?.input === "image") askImage(file, file.name);
});
$("text-input").addEventListener("submit", (event) => { event.preventDefault(); askText(); });
$("numbers-input").addEventListener("submit", (event) => { event.preventDefault(); askNumbers(); });
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("curl").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});

start();
watch();
