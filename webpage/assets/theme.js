// Light, dark, or what the system says; remembered where the browser lets a file remember.

const THEMES = ["auto", "light", "dark"];

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[name];
  button.setAttribute("aria-label", `Colours: ${name}. Press to change`);
  button.dataset.value = name;
  try { localStorage.setItem("splinegpt-theme", name); } catch { /* a file may not remember */ }
  document.dispatchEvent(new Event("themechange"));
}

function startTheme() {
  let saved = null;
  try { saved = localStorage.getItem("splinegpt-theme"); } catch { /* see above */ }
  setTheme(THEMES.includes(saved) ? saved : "auto");
  const button = document.getElementById("theme");
  button.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(button.dataset.value) + 1) % THEMES.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
}

const themeColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const movesReduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
