// Draws on a Triton server that `l2p-export triton` wrote the models of: asks the model what it takes, checks the form by
// that, and shows the picture while it is drawn. Everything comes from where this page comes from.
"use strict";

const MODEL = "/v2/models/l2p_stream";
const SEED_MAX = 2n ** 64n - 1n;
const GUIDANCE_MAX = 100;
const CUSTOM = "own";
const SMALL_PX = 384; // pictures below this are shown larger than they are
const RATIOS = [["square", 1, 1], ["landscape 3:2", 3, 2], ["landscape 16:9", 16, 9], ["portrait 2:3", 2, 3],
  ["portrait 9:16", 9, 16]];

const at = (id) => document.getElementById(id);
const count = (number) => Math.round(number).toLocaleString("en");

let limits = null; // what the model states; null before it is known
let drawing = null; // the AbortController of the picture being drawn
let shownUrl = ""; // of the picture in the frame, to be given back
let finished = false; // whether that is a whole picture, which stays until another begins to show

start();

async function start() {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  for (const id of ["prompt", "negative"]) {
    at(id).addEventListener("keydown", (event) => {
      // While an input method composes a letter, Enter is its own.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      at("form").requestSubmit();
    });
  }
  at("fields").addEventListener("input", () => check(false));
  at("size").addEventListener("change", chooseSize);
  at("another-seed").addEventListener("click", () => {
    at("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    check(false);
  });
  at("stop").addEventListener("click", () => drawing?.abort());
  try {
    const reply = await fetch(`${MODEL}/config`);
    const config = await reply.json();
    if (!reply.ok) throw new Error(`${config.error}; load this page again when it is up`);
    limits = readLimits(config);
  } catch (error) {
    at("server").textContent = "No server to draw on.";
    refuse("Nothing can be drawn now", words(error));
    return;
  }
  offer();
}

// What went wrong; a TypeError is how `fetch` says that nothing answers.
function words(error) {
  return error instanceof TypeError ? "this page's own server does not answer" : error.message;
}

// The model's configuration as numbers; models that were written before they stated these are refused.
function readLimits(config) {
  const said = (name) => {
    const value = config.parameters?.[name]?.string_value;
    if (value === undefined) throw new Error(`the server's model does not state ${name}: write its repository again`);
    return value;
  };
  const number = (name) => Number(said(name));
  const takes = new Set((config.input ?? []).map((input) => input.name));
  if (!takes.has("prompt")) {
    throw new Error("the bundle on this server has no text encoder, so it takes no prompts");
  }
  return {
    negative: takes.has("negative_prompt"),
    beyond: takes.has("coarse_height"),
    multiple: number("size_multiple_px"),
    longest: number("size_max_px"),
    pixels: number("max_pixels"),
    steps: number("max_steps"),
    promptBytes: number("max_prompt_bytes"),
    width: number("default_width"),
    height: number("default_height"),
    defaultSteps: number("default_steps"),
    guidance: number("default_guidance"),
    trained: said("trained") === "true",
    bundle: said("bundle_digest").slice(0, 12),
  };
}

// Fill the form with what the model takes and what it would do if not told.
function offer() {
  at("server").textContent = `Bundle ${limits.bundle}, images of up to ${count(limits.pixels)} pixels.`;
  at("untrained").hidden = limits.trained;
  at("negative-field").hidden = !limits.negative;
  for (const [width, height, name] of sizes()) {
    at("size").add(new Option(`${width} × ${height}, ${name}`, `${width}x${height}`));
  }
  at("size").add(new Option("Other …", CUSTOM));
  for (const id of ["width", "height"]) {
    at(id).min = at(id).step = limits.multiple;
    at(id).max = limits.longest;
  }
  at("width").value = limits.width;
  at("height").value = limits.height;
  at("size-hint").textContent = `Multiples of ${limits.multiple} px, up to ${count(limits.pixels)} pixels in all.`;
  at("steps").max = limits.steps;
  at("steps").value = limits.defaultSteps;
  at("steps-hint").textContent = `1 to ${limits.steps}.`;
  at("guidance").value = limits.guidance;
  offerBeyond();
  at("fields").disabled = at("draw").disabled = false;
  chooseSize();
  show("idle");
  at("prompt").focus();
}

// Sizes of about as many pixels as the default, and of a quarter of them, that the limits let through.
function sizes() {
  const found = new Map([[`${limits.width}x${limits.height}`, [limits.width, limits.height, "preferred"]]]);
  for (const share of [1, 0.25]) {
    for (const [name, across, down] of RATIOS) {
      const scale = Math.sqrt((limits.width * limits.height * share) / (across * down));
      const [width, height] = [across, down].map((part) =>
        Math.max(1, Math.round((part * scale) / limits.multiple)) * limits.multiple);
      const fits = width * height <= limits.pixels && Math.max(width, height) <= limits.longest;
      // Small grids round a ratio to another one.
      const near = Math.abs(Math.log((width / height) * (down / across))) < 0.2;
      if (fits && near && !found.has(`${width}x${height}`)) found.set(`${width}x${height}`, [width, height, name]);
    }
  }
  return [...found.values()];
}

function chooseSize() {
  const own = at("size").value === CUSTOM;
  at("own-size").hidden = at("size-hint").hidden = !own;
  if (!own) [at("width").value, at("height").value] = at("size").value.split("x");
  check(false);
}

// What is wrong with a field, or nothing. `asked` says whether an empty prompt counts: not before something is asked for.
function check(asked) {
  if (limits === null) return false;
  const whole = (id) => (/^[0-9]{1,9}$/.test(at(id).value.trim()) ? Number(at(id).value) : null);
  const bytes = (id) => new TextEncoder().encode(at(id).value).length;
  const long = (id) => (bytes(id) > limits.promptBytes
    ? `${count(bytes(id))} bytes; the server takes up to ${count(limits.promptBytes)}.` : "");
  const [width, height, steps] = ["width", "height", "steps"].map(whole);
  const seed = at("seed").value.trim();
  const guidance = at("guidance").value.trim();
  offerCoarse(width, height);
  const neutral = Number(guidance) === 1;
  at("negative-hint").textContent = neutral && at("negative").value ? "Has no effect while guidance is 1." : "";
  const found = {
    prompt: long("prompt") || (asked && !at("prompt").value.trim() ? "Say what to draw." : ""),
    negative: limits.negative ? long("negative") : "",
    size: sizeProblem(width, height),
    steps: steps === null || steps < 1 || steps > limits.steps ? `A whole number from 1 to ${limits.steps}.` : "",
    guidance: guidance === "" || !(Number(guidance) >= 0 && Number(guidance) <= GUIDANCE_MAX)
      ? `A number from 0 to ${GUIDANCE_MAX}.` : "",
    seed: /^[0-9]{1,20}$/.test(seed) && BigInt(seed) <= SEED_MAX ? "" : `A whole number from 0 to ${SEED_MAX}.`,
    ...beyondProblems(steps, whole),
  };
  let first = null;
  for (const [name, text] of Object.entries(found)) {
    at(`${name}-problem`).textContent = text;
    for (const id of name === "size" ? ["width", "height"] : [name]) {
      at(id).setAttribute("aria-invalid", String(text !== ""));
      if (text && first === null) first = at(id);
    }
  }
  if (asked && first !== null) {
    // What is folded away takes no focus.
    if (first.closest("details") !== null) first.closest("details").open = true;
    first.focus();
  }
  return first === null;
}

function sizeProblem(width, height) {
  for (const size of [width, height]) {
    if (size === null || size < limits.multiple || size > limits.longest) {
      return `Whole numbers from ${limits.multiple} to ${count(limits.longest)}.`;
    }
    if (size % limits.multiple) {
      const low = Math.max(limits.multiple, Math.floor(size / limits.multiple) * limits.multiple);
      return `${size} does not divide by ${limits.multiple}; ${low} and ${low + limits.multiple} do.`;
    }
  }
  if (width * height > limits.pixels) {
    return `${count(width * height)} pixels; the server draws up to ${count(limits.pixels)}.`;
  }
  return "";
}

async function draw() {
  if (drawing !== null) return;
  if (!check(true)) {
    show("idle");
    return;
  }
  const asked = {
    prompt: at("prompt").value.trim(),
    width: Number(at("width").value),
    height: Number(at("height").value),
    steps: Number(at("steps").value),
    guidance: Number(at("guidance").value),
    png: true,
  };
  Object.assign(asked, beyondInputs(asked.width, asked.height));
  if (limits.negative && at("negative").value.trim()) asked.negative_prompt = at("negative").value.trim();
  const seed = BigInt(at("seed").value.trim());
  // A seed has 64 bits, a number of JavaScript 53.
  const body = `${JSON.stringify(asked).slice(0, -1)},"seed":${seed}}`;
  const stop = (drawing = new AbortController());
  const began = performance.now();
  const tick = () => { at("status").textContent = `${progressText()} ${clock(performance.now() - began)}`; };
  let steps = null;
  const progressText = () => (steps ? `Step ${steps[0]} of ${steps[1]},` : "Waiting for the server,");
  show("waiting");
  tick();
  const timer = setInterval(tick, 1000);
  let last = null;
  try {
    for await (const event of events(body, stop.signal)) {
      if (event.error !== undefined) throw new Error(event.error);
      if (event.preview_png !== undefined) {
        steps = event.step;
        finished = false;
        paint(event.preview_png, asked);
        at("progress").max = steps[1];
        at("progress").value = steps[0];
        show("drawing");
        tick();
      }
      if (event.image_png !== undefined) last = event;
    }
    if (last === null) throw new Error("the server ended without a picture");
    finish(last, asked, seed, performance.now() - began);
  } catch (error) {
    if (stop.signal.aborted) {
      at("status").textContent = "Stopped.";
      show("stopped");
    } else {
      refuse(error.refused ? "The server refuses this" : "There is no picture", words(error));
    }
  } finally {
    clearInterval(timer);
    drawing = null;
  }
}

// The server's events, parsed; one holds a whole picture, so pieces are joined once and not at each piece.
async function* events(body, signal) {
  const reply = await fetch(`${MODEL}/generate_stream`,
    { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  if (!reply.ok) {
    const said = await reply.json().catch(() => ({}));
    const error = new Error(said.error ?? `status ${reply.status}`);
    error.refused = reply.status === 400;
    throw error;
  }
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (value ?? "\n").split("\n");
    pieces.push(lines[0]);
    for (const next of lines.slice(1)) {
      const line = pieces.join("");
      pieces = [next];
      const event = line.startsWith("data:") ? parsed(line.slice(5)) : null;
      if (event !== null) yield event;
    }
    if (done) return;
  }
}

// An event that was cut is none.
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function finish(event, asked, seed, milliseconds) {
  const blob = paint(event.image_png, asked);
  finished = true;
  const report = JSON.parse(new TextDecoder().decode(new Uint8Array(event.report)));
  at("picture").alt = asked.prompt;
  at("download").href = shownUrl;
  at("download").download = `${fileName(asked.prompt)}-${seed}.png`;
  at("status").textContent = `Done in ${clock(milliseconds)}`;
  const facts = {
    Size: `${report.width} × ${report.height} px, ${count(blob.size / 1024)} KiB`,
    Seed: String(seed),
    Sampling: `${report.steps} ${report.steps === 1 ? "step" : "steps"}, guidance ${report.guidance}`,
    ...(report.coarse === undefined ? {} : { "Coarse to fine": `from ${report.coarse.width} × ${report.coarse.height}, `
      + `renoise ${report.coarse.renoise}, ${report.coarse.steps} fine steps` }),
    "Drawn in": `${report.seconds.draw.toFixed(2)} s on the server`,
    Bundle: `${report.bundle.slice(0, 12)}, plan ${report.plan}`,
  };
  at("facts").replaceChildren(...Object.entries(facts).flatMap(([name, text]) =>
    [["dt", name], ["dd", text]].map(([tag, content]) => Object.assign(document.createElement(tag),
      { textContent: content }))));
  show("done");
}

// Put a PNG file in base64 into the frame.
function paint(base64, asked) {
  const bytes = Uint8Array.fromBase64?.(base64) ?? Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const blob = new Blob([bytes], { type: "image/png" });
  const before = shownUrl;
  shownUrl = URL.createObjectURL(blob);
  const picture = at("picture");
  picture.src = shownUrl;
  picture.alt = `preview of: ${asked.prompt}`;
  // A preview has fewer pixels than the picture: both take the same place on the page.
  picture.style.aspectRatio = `${asked.width} / ${asked.height}`;
  picture.style.width = `min(100%, ${Math.max(asked.width, SMALL_PX)}px, ${(70 * asked.width) / asked.height}vh)`;
  if (before) URL.revokeObjectURL(before);
  return blob;
}

function refuse(title, text) {
  at("refusal-title").textContent = title;
  at("refusal-text").textContent = text ? text[0].toUpperCase() + text.slice(1) : "";
  at("status").textContent = "";
  show("refused");
}

function show(state) {
  const busy = state === "waiting" || state === "drawing";
  at("page").dataset.state = state;
  at("refusal").hidden = state !== "refused";
  at("picture").hidden = !(state === "drawing" || finished);
  at("empty").hidden = !at("picture").hidden;
  at("empty").textContent = state === "waiting" ? "…" : "The picture appears here.";
  at("progress").hidden = !busy;
  if (state === "waiting") at("progress").removeAttribute("value");
  at("download").hidden = at("facts").hidden = !finished;
  if (!busy && document.activeElement === at("stop")) at("draw").focus();
  at("stop").hidden = !busy;
  // Not disabled: it would lose the focus of who came to it with the keyboard.
  at("draw").setAttribute("aria-disabled", String(busy));
  at("draw").textContent = busy ? "Drawing …" : "Draw";
}

function clock(milliseconds) {
  const seconds = milliseconds / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 60 ? `${Math.floor(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

function fileName(prompt) {
  const words = prompt.normalize("NFKD").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  return words.slice(0, 48).replace(/-$/, "") || "picture";
}
