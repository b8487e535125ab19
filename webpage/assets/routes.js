// The splines that a prediction went through, as cards with the activation as a dot; and changes made to them.

const ROUTES = 12;
const routes = { means: null, of: null, list: [], cards: [] };

function startRoutes() {
  $("change-layer").append(...live.model.splines.map(({ name }, k) => element("option", { value: k }, capital(name))));
  $("change").addEventListener("submit", (event) => { event.preventDefault(); changeByNumber(event.submitter?.value ?? "off"); });
  $("undo").addEventListener("click", () => change([]));
  $("hold").addEventListener("change", () => { if (!$("hold").checked) findRoutes(); });
}

// Begins to look for the splines behind what is pointed at, in small jobs between frames.
function findRoutes() {
  if (live.writing) return;  // when it stops, this is called again
  if (!reading().isDone) { resting = setTimeout(findRoutes, REST_MS); return; }
  const at = predictionAt(pointed());
  if (!at) return;
  if ($("hold").checked && routes.list.length) return;
  const one = reading(), target = at.actual >= 0 ? at.actual : likeliest(one, at.place);
  const of = `${at.place} ${target} ${live.tokens.slice(0, at.place + 1)} ${live.changes.map((each) => JSON.stringify(each))}`;
  if (routes.of === of) return;
  routes.of = of;
  const list = [], isCurrent = () => one === reading() && routes.of === of;
  live.jobs = [() => {
    routes.means ??= live.model.splines.map((layer, number) => splineMeans(layer, live.uses[number]));
    const found = routeCandidates(one, at.place, target, routes.means);
    live.jobs.push(...found.map((route) => () => {
      if (isCurrent()) list.push({ ...route, effect: contribution(one, at.place, target, route) });
    }), () => { if (isCurrent()) showRoutes(list, target); });
  }];
  schedule();
}

function likeliest(one, place) {
  const { logits } = one.places[place];
  return logits.indexOf(Math.max(...logits));
}

function showRoutes(list, target) {
  routes.list = list.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, ROUTES);
  routes.target = target;
  drawRoutes();
}

function drawRoutes() {
  $("routes-title").textContent = `Splines that “${visibleToken(live.model.spec.vocabulary[routes.target])}” went through`;
  routes.cards = routes.list.map(routeCard);
  $("routes").replaceChildren(...routes.cards.map(({ item }) => item));
  moveDots();
}

function routeCard(route) {
  const layer = reading().splines[route.layer], { name } = layer, edge = `${route.input} → ${route.output}`;
  const points = splinePoints(layer, route.input, route.output), picture = svg("svg", { viewBox: "0 0 150 84", "aria-hidden": "true" });
  const original = splinePoints(live.model.splines[route.layer], route.input, route.output);
  const farthest = VISIBLE * layer.width, x = Math.min(Math.max(route.x, -farthest), farthest);
  const limit = niceLimit(Math.max(...original.map(Math.abs), Math.abs(splineValue(original, layer.width, x))));
  const { X, Y, end } = drawSpline(picture, { points, width: layer.width, histogram: recordedHistogram(layer, route), limit },
    { left: 0, top: 0, right: 150, bottom: 84, small: true });
  const dot = svg("circle", { class: "reading", r: 4 });
  picture.append(dot);
  const item = element("li", { class: "card route" }, picture, labelOf(route, edge),
    element("span", { class: `card-measure ${route.effect > 0 ? "raises" : "lowers"}` }, `${route.effect > 0 ? "+" : ""}${number(route.effect, 2)}`),
    element("span", { class: "card-layer" }, capital(name)));
  for (const [mode, label] of [["off", "Off"], ["straight", "Straight"]]) {
    const made = live.changes.find((each) => sameSplines(each, route) && each.mode === mode);
    const button = element("button", { type: "button", "aria-pressed": Boolean(made), "aria-label": `${label}: ${name}, ${edge}` }, label);
    button.addEventListener("click", () => toggleChange({ layer: route.layer, input: route.input, output: route.output, mode }, label));
    item.append(button);
  }
  return { item, dot, route, move(x) {
    const shown = Math.min(Math.max(x, -end), end), within = (value, most) => Math.min(Math.max(value, 4), most - 4);
    dot.setAttribute("cx", within(X(shown), 150));
    dot.setAttribute("cy", within(Y(splineValue(points, layer.width, shown)), 84));
  } };
}

// Names the spline; leads to it in the explorer below where that has it.
function labelOf(route, edge) {
  const { shared, name } = live.model.splines[route.layer];
  if (!shared) return element("span", { class: "card-label" }, edge);
  const button = element("button", { type: "button", class: "card-label link", "aria-label": `${capital(name)}, ${edge}: show it among all splines` }, edge);
  button.addEventListener("click", () => showSpline(route.layer, route.input, route.output));
  return button;
}

function recordedHistogram(layer, route) { return layer.shared ? histogramOf(recordedLayers()[route.layer], route.input) : null; }

// To the activation at the place that is pointed at.
function moveDots() {
  if (!routes.cards.length) return;
  const at = predictionAt(pointed());
  for (const { dot, route, move } of routes.cards) {
    dot.style.display = at ? "" : "none";
    if (at) move(reading().places[at.place].inputs[route.layer][route.input]);
  }
}

function toggleChange(wanted, label) {
  const others = live.changes.filter((each) => !sameSplines(each, wanted));
  const isThere = live.changes.some((each) => sameSplines(each, wanted) && each.mode === wanted.mode);
  change(isThere ? others : [...others, wanted]);
  for (const { item, route } of routes.cards)
    if (sameSplines(route, wanted)) [...item.querySelectorAll("button")].find((button) => button.textContent === label).focus();
}

function changeByNumber(mode) {
  const layer = Number($("change-layer").value), { I, O } = live.model.splines[layer];
  const read = (id, count) => $(id).value === "" ? null : Number.isInteger(Number($(id).value)) && $(id).value >= 0 && $(id).value < count ? Number($(id).value) : NaN;
  const input = read("change-input", I), output = read("change-output", O);
  $("change-error").textContent = Number.isNaN(input) || Number.isNaN(output) ? `This layer has inputs 0 to ${I - 1} and outputs 0 to ${O - 1}; leave a box empty for all.` : "";
  if ($("change-error").textContent) return;
  const wanted = { layer, input, output, mode };
  change([...live.changes.filter((each) => !sameSplines(each, wanted)), wanted]);
}

// The cards stay as they are, but for their curves: who switched a spline off may want it back.
function change(changes) {
  takeChanges(changes);
  $("undo").disabled = !changes.length;
  $("changes").replaceChildren(...changes.map((each) => {
    const button = element("button", { type: "button", "aria-label": `Undo: ${changeName(live.model, each)}` }, `${changeName(live.model, each)} ×`);
    button.addEventListener("click", () => { change(live.changes.filter((other) => other !== each)); $("undo").focus(); });
    return element("li", {}, button);
  }));
  if (routes.list.length) drawRoutes();
}
