"use strict";
// The page is whole without this script. It adds the choice of a noun, of k, of heat map or mask, and of one neuron's
// own map. `upsample` and `inside` repeat mmneurons.maths.regions step for step; a test compares them bit for bit.

const root = document.documentElement;
const PERCENTILE = 95;
const SHARP = 448; // a canvas has at least about this many pixels on its longer side
const NEAR = 400; // CSS pixels below the window within which an image is drawn

addEventListener("error", (event) => { root.dataset.error = event.message; });
addEventListener("securitypolicyviolation", (event) => { root.dataset.error = event.violatedDirective; });

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** The maps that an element carries, one per picture, null for none: "rows columns float32-numbers-in-base64;...". */
function gridsOf(element) {
  return element.dataset.map.split(";").map((map) => {
    if (!map) return null;
    const [rows, columns, numbers] = map.split(" ");
    return { rows: Number(rows), columns: Number(columns), values: new Float32Array(bytes(numbers).buffer) };
  });
}

/** Per pixel of one side: the patch at or before its centre, the one after, and the share of the latter. */
function neighbours(patches, pixels) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const centre = Math.min(Math.max((pixel + 0.5) * patches / pixels - 0.5, 0), patches - 1);
    const low = Math.floor(centre);
    return { low, high: Math.min(low + 1, patches - 1), share: centre - low };
  });
}

/** Bilinear, patch centres at (i + 0.5) * height / rows, edges continued. */
function upsample({ rows, columns, values }, width, height) {
  const across = neighbours(columns, width);
  const heat = new Float32Array(width * height);
  const line = new Float64Array(columns);
  neighbours(rows, height).forEach(({ low, high, share }, y) => {
    for (let column = 0; column < columns; column++) {
      const above = values[low * columns + column];
      line[column] = above + share * (values[high * columns + column] - above);
    }
    across.forEach((x, pixel) => {
      heat[y * width + pixel] = line[x.low] + x.share * (line[x.high] - line[x.low]);
    });
  });
  return heat;
}

/** Lowest and highest value, and the test that a value must pass to be in the mask. */
function inside(heat) {
  const sorted = heat.slice().sort();
  const low = sorted[0], high = sorted[sorted.length - 1];
  const cut = sorted[Math.floor(PERCENTILE / 100 * (sorted.length - 1))];
  const passes = cut < high ? (value) => value > cut : (value) => low < high && value >= high;
  return { low, high, passes };
}

/** Colours as one number each, in the byte order of the machine: a pixel is then one assignment. */
function packed(rgba) {
  return new Uint32Array(Uint8Array.from(rgba).buffer);
}

function paintHeat(pixels, heat, bound) {
  const colours = packed(bytes(root.dataset.colours));
  const zero = (colours.length - 1) / 2;
  heat.forEach((value, i) => {
    pixels[i] = colours[bound ? zero + Math.floor(value / bound * zero + 0.5) : zero];
  });
}

/** What lies outside is dimmed, the border drawn; the picture itself shows what lies inside. */
function paintMask(pixels, heat, width, height, passes) {
  const [clear, border, dim] = packed([0, 0, 0, 0, 255, 255, 255, 255, 12, 12, 16, 176]);
  const set = Uint8Array.from(heat, (value) => Number(passes(value)));
  const at = (x, y) => x < 0 || y < 0 || x >= width || y >= height ? 0 : set[y * width + x];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const deep = at(x - 2, y) && at(x + 2, y) && at(x, y - 2) && at(x, y + 2);
      pixels[y * width + x] = !at(x, y) ? dim : deep ? clear : border;
    }
  }
}

/** A map at the picture's own size, its largest value of either sign there and, for the mask, what lies inside. */
function measure(picture, grid, mode) {
  const [width, height] = [picture.getAttribute("width"), picture.getAttribute("height")].map(Number);
  const own = upsample(grid, width, height);
  const bound = own.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const { passes } = mode === "mask" ? inside(own) : { passes: () => false }; // sorting takes time
  const count = own.reduce((sum, value) => sum + Number(passes(value)), 0);
  return { grid, width, height, own, passes, count, bound };
}

/** Draws a measured map; `bound` is the size of value that gets the strongest colour. */
function draw(canvas, { grid, width, height, own, passes }, bound, mode) {
  const times = Math.ceil(SHARP / Math.max(width, height));
  const heat = times > 1 ? upsample(grid, width * times, height * times) : own;
  canvas.width = width * times;
  canvas.height = height * times;
  const image = new ImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  // Between the picture's own pixels a map may pass the bound by a little.
  if (mode === "mask") paintMask(pixels, heat, canvas.width, canvas.height, passes);
  else paintHeat(pixels, heat.map((value) => Math.min(Math.max(value, -bound), bound)), bound);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function number(value) {
  return value.toPrecision(3).replace("-", "−");
}

/** In a frame, the page around it is told how high this one is, and what is chosen. */
function tell(message) {
  if (parent !== window) parent.postMessage({ mmneurons: message }, "*");
}

/** Everything that can be chosen for one prompt. */
function setUp(article) {
  const all = (selector) => [...article.querySelectorAll(selector)];
  const panels = all(".panel");
  if (!panels.length) return;
  const stages = all(".stage[data-picture]");
  const shown = article.querySelector(".shown");
  const legend = article.querySelector(".legend");
  let noun = panels[0].id, k = null, pinned = null, passing = null;
  let visible = article.getBoundingClientRect().top < innerHeight + NEAR;

  const kOf = (id) => all(`.choice[data-noun="${id}"] input`);

  function choose(id) {
    noun = id;
    pinned = passing = null;
    panels.forEach((panel) => { panel.hidden = panel.id !== id; });
    all("button[data-noun]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.noun === id));
    all(".choice[data-noun]").forEach((choice) => { choice.hidden = choice.dataset.noun !== id; });
    const same = kOf(id).find((input) => input.value === k);
    if (same) same.checked = true;
    refresh();
    tellChoice();
  }

  function tellChoice() {
    tell({
      word: panels.find((panel) => panel.id === noun).dataset.word,
      neuron: pinned?.querySelector(".name").textContent ?? "",
    });
  }

  function refresh() {
    all(".pin").forEach((pin) => pin.setAttribute("aria-pressed", pin.closest("tr") === pinned));
    if (!stages.length || !shown || !visible) return;
    const mode = article.querySelector("input[name$='-mode']:checked")?.value ?? "heat";
    const row = passing ?? pinned;
    const source = row ?? kOf(noun).find((input) => input.checked);
    const grids = source ? gridsOf(source) : [];
    const name = !source ? "" : row ? row.querySelector(".name").textContent : source.value;
    const maps = stages.map((stage) => {
      const grid = grids[stage.dataset.picture];
      stage.dataset.mode = grid ? mode : "plain";
      stage.dataset.shows = grid ? name : "";
      stage.querySelector("canvas").hidden = !grid || mode === "plain";
      return grid ? measure(stage.querySelector("img"), grid, mode) : null;
    });
    const drawn = maps.filter(Boolean);
    legend.hidden = !drawn.length || mode !== "heat";
    if (!drawn.length) { shown.textContent = "No map for this word."; return; }
    const bound = Math.max(...drawn.map((map) => map.bound)); // one scale of colours for all pictures
    stages.forEach((stage, i) => { if (maps[i]) draw(stage.querySelector("canvas"), maps[i], bound, mode); });
    const word = panels.find((panel) => panel.id === noun).dataset.word;
    const what = row ? `neuron ${name}` : `mean of the top ${name}`;
    const counts = drawn.map((map) => map.count).join(" + ");
    const said = { heat: "", mask: `: its strongest ${counts} pixels`, plain: ", not drawn" };
    shown.textContent = `“${word}”, ${what}${said[mode]}`;
    legend.querySelector("[data-legend=low]").textContent = number(-bound);
    legend.querySelector("[data-legend=high]").textContent = number(bound);
  }

  stages.forEach((stage) => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("aria-hidden", "true"); // what it shows is said in words by .shown
    canvas.hidden = true;
    stage.append(canvas);
  });
  all("button[data-noun]").forEach((button) => {
    button.addEventListener("click", () => choose(button.dataset.noun));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const group = [...button.closest("p, ul").querySelectorAll("button")];
      const next = group[(group.indexOf(button) + step + group.length) % group.length];
      event.preventDefault();
      next.focus();
      choose(next.dataset.noun);
    });
  });
  all(".choice input").forEach((input) => input.addEventListener("change", () => {
    if (input.dataset.map) { k = input.value; pinned = null; }
    refresh();
  }));
  all("tr[data-map]").forEach((row) => {
    const pass = (to) => () => { passing = to; refresh(); };
    row.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") pass(row)(); });
    row.addEventListener("pointerleave", pass(null));
    row.addEventListener("focusin", pass(row));
    row.addEventListener("focusout", pass(null));
    row.querySelector(".pin").addEventListener("click", () => {
      passing = pinned = pinned === row ? null : row;
      refresh();
      tellChoice();
    });
  });
  choose(noun);
  if (visible) return;
  // A page of many pictures draws each when it comes near.
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    visible = true;
    refresh();
  }, { rootMargin: `${NEAR}px` });
  near.observe(article);
}

root.classList.add("js");
document.querySelectorAll("article").forEach(setUp);
new ResizeObserver(() => tell({ height: document.body.offsetHeight })).observe(document.body);
root.dataset.ready = "true";
