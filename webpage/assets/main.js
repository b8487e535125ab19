// The page comes to life: theme, curves, explorer, samples, buttons that copy.

function startSamples() {
  const list = $("sample-steps");
  if (!list) return;
  const samples = DATA.runs.flatMap((run) => run.samples.map((sample) => ({ ...sample, run: run.name })));
  const show = (k) => { $("sample").textContent = samples[k].text; $("sample-caption").textContent = sampleName(samples[k]); };
  const sampleName = ({ run, step }) => (DATA.runs.length > 1 ? `${run}, ` : "") + `step ${number_(step)}`;
  samples.forEach((sample, k) => list.append(element("option", { value: k }, sampleName(sample))));
  const last = DATA.runs[0].samples.length - 1;
  list.value = last;
  list.addEventListener("change", () => show(Number(list.value)));
  show(last);
}

function startCopying() {
  for (const button of document.querySelectorAll("button.copy"))
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(code); button.textContent = "Press Ctrl+C"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
}

// An open page of a run that still trains shows the newest file, while nobody is pointing at it.
function startFollowing() {
  if (!DATA.live) return;
  setInterval(() => { if (!document.hidden && !explorer.hovered && !explorer.playing) location.reload(); }, 15000);
}

startTheme();
startCurves();
startSamples();
startCopying();
startFollowing();
if (DATA.splines) startExplorer();
if (DATA.maps) startMaps();
if (DATA.model) requestAnimationFrame(() => setTimeout(startLive));  // after the first paint
document.documentElement.dataset.ready = "true";
