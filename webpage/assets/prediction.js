// What the model expects at the place that is pointed at: its likeliest characters as bars.

const BARS = 10;

// What a prediction is of: the place whose logits made it, and the character that came, -1 where none has come yet.
function predictionAt(place) {
  const known = place > 0 && place <= reading().places.length;
  return known ? { place: place - 1, actual: place < live.tokens.length ? live.tokens[place] : -1 } : null;
}

function logProbabilitiesAt(one, place) {
  const found = one.places[place];
  return found && (found.losses ??= logProbabilities(found.logits));
}

function drawPrediction() {
  const place = pointed(), at = predictionAt(place), { vocabulary } = live.model.spec;
  const key = `${place} ${at?.actual} ${live.tokens.slice(Math.max(0, place - 8), place)} ${reading().places.length >= place} ${live.changes.length} ${live.plain.places.length >= place}`;
  const isWaiting = !at && place > 0;
  $("bars").classList.toggle("stale", isWaiting);  // the old ones stay until there are new ones
  if (isWaiting || ($("bars").dataset.key === key && !live.writing)) return;
  $("bars").dataset.key = live.changed && !live.plain.places[place - 1] ? "" : key;
  $("prediction-title").textContent = at && at.actual >= 0 ? `How “${visibleToken(vocabulary[at.actual])}” was predicted` : "What comes next";
  $("prediction-about").textContent = about(place, at);
  const now = at && logProbabilitiesAt(reading(), at.place), before = at && live.changed && logProbabilitiesAt(live.plain, at.place);
  const order = now ? Array.from(now.keys()).sort((a, b) => now[b] - now[a]).slice(0, BARS) : [];
  if (at && at.actual >= 0 && now && !order.includes(at.actual)) order[BARS - 1] = at.actual;
  const rows = order.map((token) => barOf(vocabulary[token], Math.exp(now[token]), before && Math.exp(before[token]), token === at.actual));
  $("bars").replaceChildren(...rows);
}

function about(place, at) {
  if (place === 0) return live.tokens.length ? "Nothing comes before the first character: it was not predicted." : "Type something, or press “Write on”.";
  const { vocabulary } = live.model.spec, before = live.tokens.slice(Math.max(0, place - 16), place).map((token) => vocabulary[token]).join("");
  return `After “${place > 16 ? "…" : ""}${visibleToken(before)}”.` + (live.changed ? " The mark is the model without the changes." : "");
}

function barOf(character, share, before, isActual) {
  const bar = element("span", { class: "bar-area" }, element("i", { class: "bar-fill", style: `width: ${(100 * share).toFixed(2)}%` }));
  if (before !== null && before !== undefined) bar.append(element("i", { class: "bar-mark", style: `left: ${(100 * before).toFixed(2)}%` }));
  return element("li", { class: isActual ? "actual" : null }, element("kbd", {}, visibleToken(character)), bar,
    element("span", { class: "bar-share" }, `${(100 * share).toFixed(1)} %`));
}

let speaking = 0;
function speakPrediction() {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const bars = [...$("bars").children].slice(0, 3).map((bar) => `${bar.querySelector("kbd").textContent} ${bar.querySelector(".bar-share").textContent}`);
    $("spoken").textContent = `${$("prediction-title").textContent}. ${$("prediction-about").textContent} ${bars.join(", ")}`;
  }, 250);
}
