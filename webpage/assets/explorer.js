// The explorer: what is chosen (layer, step, spline, search), the film over checkpoints, the cards, the address.
// map.js draws the map, function.js the function that is shown.

const explorer = {
  layer: 0, step: 0, row: 0, column: 0, order: "alike", color: "rise", family: null, search: "curved", fixedScale: false,
  hovered: null, playing: null, found: null,
};
const CARDS = 12;
const $ = (id) => document.getElementById(id);

function startExplorer() {
  const { steps, layers } = DATA.splines;
  explorer.step = steps.length - 1;
  fillSegments($("layers"), layers.map((layer, k) => [String(k), layer.name]), "0", (value) => chooseLayer(Number(value)));
  fillSegments($("searches"), Object.entries(SEARCHES).map(([key, { label }]) => [key, label]), "curved", chooseSearch);
  const slider = $("step");
  slider.max = steps.length - 1;
  slider.addEventListener("input", () => { stopFilm(); chooseStep(Number(slider.value)); });
  $("play").addEventListener("click", toggleFilm);
  $("play").disabled = slider.disabled = steps.length < 2;
  $("order").addEventListener("change", () => { explorer.order = $("order").value; keepShown(reorder); drawMap(); drawCursor(); });
  $("color").addEventListener("change", () => { explorer.color = $("color").value; drawMap(); drawFamilies(); });
  $("scale").addEventListener("change", () => { explorer.fixedScale = $("scale").checked; drawFunction(); });
  for (const name of ["input", "output"]) $(name).addEventListener("change", chooseByNumber);
  startMap();
  readHash();
  chooseLayer(explorer.layer, false);
  document.addEventListener("themechange", () => { drawMap(); drawCursor(); });
  new ResizeObserver(() => { drawMap(); drawCursor(); }).observe($("map").parentElement);
  new ResizeObserver(drawFunction).observe($("function"));
}

function fillSegments(fieldset, options, chosen, choose) {
  for (const [value, label] of options) {
    const input = element("input", { type: "radio", name: fieldset.id, value, id: `${fieldset.id}-${value}` });
    input.checked = value === chosen;
    input.addEventListener("change", () => choose(value));
    fieldset.append(input, element("label", { for: input.id }, label));
  }
}

const currentLayer = () => layersAt(explorer.step)[explorer.layer];
const names = () => DATA.splines.layers[explorer.layer];
const currentStep = () => DATA.splines.steps[explorer.step].step;

function chooseLayer(number, pickBest = true) {
  explorer.layer = number;
  $(`layers-${number}`).checked = true;
  explorer.hovered = explorer.family = null;
  reorder();
  runSearch();
  if (pickBest && explorer.found.first.length) select(explorer.found.first[0]);
  const { inputs, outputs, in_features, out_features } = names();
  for (const [id, list] of [["input", inputs], ["output", outputs]]) { $(id).min = list[0]; $(id).max = list[list.length - 1]; }
  const shown = inputs.length * outputs.length, all = in_features * out_features;
  $("map-caption").textContent = shown === all
    ? `${number_(all)} splines: input features down, output features across.`
    : `${number_(shown)} of ${number_(all)} splines: the ${inputs.length} × ${outputs.length} features that matter most.`;
  drawAll();
}
const number_ = (value) => value.toLocaleString("en-US");

function chooseStep(k) {
  explorer.step = k;
  runSearch();
  drawAll();
}

function chooseSearch(name) {
  explorer.search = name;
  runSearch();
  if (explorer.found.first.length) select(explorer.found.first[0]);
  drawAll();
}

function runSearch() { explorer.found = search(currentLayer(), explorer.search, CARDS); }

function drawAll() {
  $("step").value = explorer.step;
  $("step-label").textContent = `step ${number_(currentStep())}`;
  $("step").setAttribute("aria-valuetext", `step ${currentStep()}`);
  drawMap(); drawCursor(); drawFunction(); drawFamilies(); drawCards(); writeHash();
}

// Features have no order of their own. By what they do at the last step, so that the film does not jump.
function reorder() {
  const last = lastLayer(), { I, O } = last;
  explorer.rows = Array.from({ length: I }, (_, i) => i);
  explorer.columns = Array.from({ length: O }, (_, o) => o);
  if (explorer.order === "alike") Object.assign(explorer, last.seriation ??= seriation(last));
  if (explorer.order !== "curved") return;
  const { importance } = measured(last), rows = new Float64Array(I), columns = new Float64Array(O);
  for (let k = 0; k < I * O; k++) { rows[Math.floor(k / O)] += importance[k]; columns[k % O] += importance[k]; }
  explorer.rows.sort((a, b) => rows[b] - rows[a]);
  explorer.columns.sort((a, b) => columns[b] - columns[a]);
}

const lastLayer = () => layersAt(DATA.splines.steps.length - 1)[explorer.layer];

// Runs `change`, which moves rows and columns, and selects the same spline as before.
function keepShown(change) {
  const [i, o] = [explorer.rows[explorer.row], explorer.columns[explorer.column]];
  change();
  select(i * currentLayer().O + o);
}

function select(k) {
  const { O } = currentLayer();
  explorer.row = explorer.rows.indexOf(Math.floor(k / O));
  explorer.column = explorer.columns.indexOf(k % O);
  explorer.hovered = null;
}

// The spline that is shown: under the pointer, else the selected one. Places in the layer, not on the map.
function shown() {
  const { row, column } = explorer.hovered ?? explorer;
  return [explorer.rows[row], explorer.columns[column]];
}

// A spline of the newest step, by its place in its layer, brought into view.
function showSpline(layer, i, o) {
  stopFilm();
  explorer.step = DATA.splines.steps.length - 1;
  explorer.layer = layer;
  reorder();
  select(i * currentLayer().O + o);
  chooseLayer(layer, false);
  announce();
  $("function-title").scrollIntoView({ block: "center", behavior: movesReduced() ? "auto" : "smooth" });
  document.querySelector(".map").focus({ preventScroll: true });
}

function chooseByNumber() {
  const i = names().inputs.indexOf(Number($("input").value)), o = names().outputs.indexOf(Number($("output").value));
  const known = i >= 0 && o >= 0;
  $("number-error").textContent = known ? "" : "There is no such feature on this map.";
  if (!known) return;
  select(i * currentLayer().O + o);
  settle();
}

function toggleFilm() {
  if (explorer.playing) { stopFilm(); return; }
  if (explorer.step === DATA.splines.steps.length - 1) chooseStep(0);
  $("play").textContent = "Pause";
  explorer.playing = setInterval(() => {
    if (explorer.step + 1 >= DATA.splines.steps.length) stopFilm();
    else chooseStep(explorer.step + 1);
  }, movesReduced() ? 1600 : 700);
}

function stopFilm() {
  clearInterval(explorer.playing);
  explorer.playing = null;
  $("play").textContent = "Play";
}

function drawCards() {
  const layer = currentLayer(), m = measured(layer), { found } = explorer, all = layer.I * layer.O;
  const { about } = SEARCHES[explorer.search];
  const share = explorer.search === "curved" ? "" : `${number_(found.count)} of ${number_(all)} splines (${percent(found.count / all)}). `;
  $("search-about").textContent = share + about;
  const limit = niceLimit(Math.max(0, ...found.first.flatMap((k) => splinePoints(layer, Math.floor(k / layer.O), k % layer.O).map(Math.abs))));
  $("cards").replaceChildren(...found.first.map((k) => {
    const i = Math.floor(k / layer.O), o = k % layer.O;
    const picture = svg("svg", { viewBox: "0 0 150 96", "aria-hidden": "true" });
    drawSpline(picture, { points: splinePoints(layer, i, o), width: layer.width, histogram: histogramOf(layer, i), limit },
      { left: 0, top: 0, right: 150, bottom: 96, small: true });
    const label = `${names().inputs[i]} → ${names().outputs[o]}`;
    const measure = explorer.search === "outside" ? percent(layer.outside[i]) : explorer.search === "curved" ? number(m.importance[k], 2)
      : number(Math.sqrt(m.total[k]), 2);
    const button = element("button", { type: "button", class: "card", "aria-label": describe(i, o) }, picture,
      element("span", { class: "card-label" }, label), element("span", { class: "card-measure" }, measure));
    button.addEventListener("click", () => { select(k); settle(); $("function-title").scrollIntoView({ block: "nearest", behavior: movesReduced() ? "auto" : "smooth" }); });
    return element("li", {}, button);
  }));
  if (!found.first.length) $("cards").append(element("li", { class: "none" }, "No spline of this layer at this step."));
}

function writeHash() {
  const [i, o] = [explorer.rows[explorer.row], explorer.columns[explorer.column]];
  const hash = `#layer=${explorer.layer}&input=${names().inputs[i]}&output=${names().outputs[o]}&step=${currentStep()}&search=${explorer.search}`;
  if (explorer.started && !explorer.playing) try { history.replaceState(null, "", hash); } catch { /* some viewers refuse */ }
  explorer.started = true;
}

function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1)), layer = Number(asked.get("layer"));
  if (!asked.has("layer") || !DATA.splines.layers[layer]) { chooseLayer(0); return; }
  explorer.layer = layer;
  const step = DATA.splines.steps.findIndex((at) => at.step === Number(asked.get("step")));
  if (step >= 0 && !DATA.live) explorer.step = step;
  if (SEARCHES[asked.get("search")]) { explorer.search = asked.get("search"); $(`searches-${explorer.search}`).checked = true; }
  reorder();
  const i = names().inputs.indexOf(Number(asked.get("input"))), o = names().outputs.indexOf(Number(asked.get("output")));
  if (i >= 0 && o >= 0) select(i * currentLayer().O + o);
}
