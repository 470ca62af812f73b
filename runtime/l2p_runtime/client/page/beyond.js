// Fields for images beyond the trained size: coarse to fine, positions and the trained grid. A server whose model does
// not take them has them hidden, and nothing of them is sent. `at` and `limits` are those of page.js.
"use strict";

const DIVISORS = [2, 4]; // of each side
const RENOISE = "More than 0 and less than 1.";

function offerBeyond() {
  at("beyond").hidden = !limits.beyond;
  for (const id of ["coarse", "positions"]) at(id).addEventListener("change", () => check(false));
}

// Sizes that fit the image; the choice stays where it can.
function offerCoarse(width, height) {
  const chosen = at("coarse").value;
  at("coarse").replaceChildren(new Option("Off", ""));
  for (const divisor of DIVISORS) {
    const size = coarseSize(width, height, divisor);
    if (size !== null) at("coarse").add(new Option(`First at ${size[0]} × ${size[1]}`, String(divisor)));
  }
  at("coarse").value = chosen;
  if (at("coarse").selectedIndex < 0) at("coarse").value = "";
  at("coarse-settings").hidden = at("coarse").value === "";
}

// A part of each side, rounded to what the model takes; null where that is no smaller image of about the same shape.
function coarseSize(width, height, divisor) {
  if (!width || !height) return null;
  const part = (side) => Math.max(1, Math.round(side / divisor / limits.multiple)) * limits.multiple;
  const [across, down] = [part(width), part(height)];
  const smaller = across <= width && down <= height && (across < width || down < height);
  const stretch = width / across / (height / down);
  return smaller && stretch > 0.8 && stretch < 1.25 ? [across, down] : null;
}

// What is wrong, by the field's name.
function beyondProblems(steps, whole) {
  const found = { renoise: "", "fine-steps": "", "fine-guidance": "", "base-grid": "" };
  if (!limits.beyond) return found;
  if (at("base-grid").value.trim() && baseGrid() === null) found["base-grid"] = "Rows and columns, as 64x64.";
  if (at("coarse").value === "") return found;
  const renoise = Number(at("renoise").value.trim() || NaN);
  if (!(renoise > 0 && renoise < 1)) found.renoise = RENOISE;
  const fine = whole("fine-steps");
  if (fine === null || fine < 1) found["fine-steps"] = "A whole number from 1.";
  else if (steps + fine > limits.steps) found["fine-steps"] = `With the steps above ${steps + fine}, up to ${limits.steps}.`;
  const guidance = Number(at("fine-guidance").value.trim() || NaN);
  if (!(guidance >= 0 && guidance <= GUIDANCE_MAX)) found["fine-guidance"] = `A number from 0 to ${GUIDANCE_MAX}.`;
  return found;
}

function baseGrid() {
  const sides = /^([1-9][0-9]{0,8})\s*[x×]\s*([1-9][0-9]{0,8})$/i.exec(at("base-grid").value.trim());
  return sides === null ? null : [Number(sides[1]), Number(sides[2])];
}

// What is sent; nothing for a field that is left as it was.
function beyondInputs(width, height) {
  const asked = {};
  if (!limits.beyond) return asked;
  // The model takes the name as its bytes.
  if (at("positions").value) asked.positions = [...new TextEncoder().encode(at("positions").value)];
  if (baseGrid() !== null) asked.base_grid = baseGrid();
  if (at("coarse").value) {
    [asked.coarse_width, asked.coarse_height] = coarseSize(width, height, Number(at("coarse").value));
    asked.renoise = Number(at("renoise").value);
    asked.fine_steps = Number(at("fine-steps").value);
    asked.fine_guidance = Number(at("fine-guidance").value);
  }
  return asked;
}
