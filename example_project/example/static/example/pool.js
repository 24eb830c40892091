// Shows the pool's figures as they change.

import { draw } from "./chart.js";
import { fill, followWhileSeen, localize } from "./events.js";

// Seconds that the chart shows, and between two points.
const SHOWN = 30;
const STEP = 0.25;

const container = document.querySelector("[data-servers]");
const empty = document.querySelector("[data-empty]");
const list = document.querySelector("[data-errors]");
const none = document.querySelector("[data-no-errors]");
const send = document.querySelector("[data-send]");
const cards = new Map();
let shownErrors = "[]";

function cardOf(server) {
  if (!cards.has(server)) {
    const template = document.querySelector("template[data-server]");
    container.append(template.content.cloneNode(true));
    const card = container.lastElementChild;
    card.querySelector("[data-name]").textContent = server;
    cards.set(server, { card, history: [], now: null });
  }
  return cards.get(server);
}

function note(entry) {
  const at = performance.now() / 1000;
  entry.history.push([at, entry.now.in_use, entry.now.waiting]);
  while (entry.history[0][0] < at - SHOWN) entry.history.shift();
  const line = (index) => entry.history.map((point) => [point[0] - at, point[index]]);
  draw(
    entry.card.querySelector("svg"),
    { in_use: line(1), waiting: line(2) },
    { from: -SHOWN, to: 0, least: 5 },
  );
}

function show({ servers, errors }) {
  empty.hidden = Object.keys(servers).length > 0;
  for (const [server, stats] of Object.entries(servers)) {
    const entry = cardOf(server);
    entry.now = stats;
    const closed = Object.entries(stats.closed).map(([why, times]) => `${times} ${why}`);
    fill(entry.card, "figure", { ...stats, closed: closed.join(", ") || "none" });
    note(entry);
  }
  showErrors(errors);
}

function showErrors(errors) {
  // What is live is read out whenever it changes.
  const text = JSON.stringify(errors);
  if (text === shownErrors) return;
  shownErrors = text;
  none.hidden = errors.length > 0;
  list.replaceChildren(
    ...errors.map((error) => {
      const row = document.querySelector("template[data-error]").content.cloneNode(true);
      fill(row, "field", error);
      localize(row.querySelector("time"), error.at);
      return row;
    }),
  );
}

send.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = send.querySelector("button");
  button.disabled = true;
  await fetch(send.action, { method: "POST", body: new FormData(send) }).catch(() => {});
  button.disabled = false;
});

followWhileSeen(container.dataset.events, { pool: show }, document.querySelector("[data-live]"));
setInterval(() => cards.forEach(note), STEP * 1000);
