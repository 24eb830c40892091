// Starts a race, shows it, and stops it: by going away.

import { draw } from "./chart.js";
import { eventsOf } from "./events.js";

const NAMES = { ours: "django-async-smtp", django: "Django's backend" };
// With which a race's events end.
const LAST = ["end", "broken", "refused"];
// Seconds over which a rate is taken.
const WINDOW = 0.5;

const form = document.querySelector("[data-race]");
const start = form.querySelector("[data-start]");
const stop = form.querySelector("[data-stop]");
const said = document.querySelector("[data-said]");
const chart = document.querySelector("[data-chart]");
const distance = form.elements.round_trip;
let running = null;
let count = 0;
let history = [];

function showDistance() {
  form.querySelector("[data-value]").textContent = `${distance.value} ms`;
}

function showErrors(errors) {
  for (const place of form.querySelectorAll("[data-error]")) {
    const found = errors[place.dataset.error] ?? [];
    place.textContent = found.join(" ");
    place.hidden = found.length === 0;
    const input = form.elements[place.dataset.error];
    const help = `${input.id}_helptext`;
    if (found.length) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    input.setAttribute("aria-describedby", found.length ? `${place.id} ${help}` : help);
    if (found.length) input.focus();
  }
}

function show(name, sent) {
  document.querySelector(`[data-lane="${name}"]`).value = sent;
  document.querySelector(`[data-count="${name}"]`).textContent = `${sent} / ${count}`;
}

/** Return the rate of a racer at each moment, until it is through. */
function rates(name) {
  const line = [];
  let first = 0;
  for (const [index, now] of history.entries()) {
    while (now.seconds - history[first].seconds > WINDOW) first += 1;
    const before = history[Math.min(first, Math.max(index - 1, 0))];
    const passed = now.seconds - before.seconds;
    if (passed > 0) line.push([now.seconds, (now[name] - before[name]) / passed]);
    if (now[name] >= count) break;
  }
  return line;
}

function drawRates() {
  draw(chart, { ours: rates("ours"), django: rates("django") }, { least: 10 });
}

const handlers = {
  start({ messages }) {
    count = messages;
    history = [{ seconds: 0, ours: 0, django: 0 }];
    for (const name of Object.keys(NAMES)) {
      document.querySelector(`[data-lane="${name}"]`).max = count;
      show(name, 0);
    }
    said.textContent = "They run.";
  },
  progress(now) {
    history.push(now);
    for (const name of Object.keys(NAMES)) show(name, now[name]);
    drawRates();
  },
  refused({ why }) {
    said.textContent = why;
  },
  broken({ why }) {
    said.textContent = why;
  },
  end({ ours, django }) {
    const [winner, ratio] = ours < django ? ["ours", django / ours] : ["django", ours / django];
    for (const [name, seconds] of Object.entries({ ours, django })) {
      const rate = Math.round(count / seconds);
      document.querySelector(`[data-count="${name}"]`).textContent =
        `${seconds.toFixed(2)} s · ${rate}/s`;
    }
    said.textContent = `${NAMES[winner]} is ${ratio.toFixed(1)} times as fast.`;
    said.dataset.winner = winner;
  },
};

async function run() {
  const response = await fetch(form.action, {
    method: "POST",
    body: new FormData(form),
    signal: running.signal,
  });
  if (response.headers.get("Content-Type").startsWith("application/json")) {
    showErrors((await response.json()).errors);
    said.textContent = "Not started.";
    return;
  }
  let last = "";
  for await (const [name, data] of eventsOf(response)) {
    handlers[name](data);
    last = name;
  }
  // The server stops, or had no race to answer with.
  if (!LAST.includes(last)) said.textContent = "The race was broken off.";
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  start.disabled = true;
  stop.disabled = false;
  delete said.dataset.winner;
  said.textContent = "Starting four processes…";
  showErrors({});
  try {
    await run();
  } catch (error) {
    said.textContent = error.name === "AbortError" ? "Stopped." : "The connection broke.";
  }
  running = null;
  start.disabled = false;
  stop.disabled = true;
});

stop.addEventListener("click", () => running?.abort());
distance.addEventListener("input", showDistance);
new ResizeObserver(drawRates).observe(chart);
showDistance();
