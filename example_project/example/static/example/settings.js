// Shows what is found of each mailer, as it is found.

import { follow } from "./events.js";

const SIGNS = { ok: "✓", skipped: "–", warning: "!", failed: "✗" };
const ORDER = ["ok", "skipped", "warning", "failed"];
const VERDICTS = { ok: "works", warning: "works, with a warning", failed: "fails" };
// Milliseconds that fill a bar at least; else the longest stage does.
const LEAST = 5;

const container = document.querySelector("[data-mailers]");
const template = document.querySelector("[data-stage]");
const again = document.querySelector("[data-again]");
const said = document.querySelector("[data-said]");
const cards = new Map(
  [...container.querySelectorAll("[data-mailer]")].map((card) => [card.dataset.mailer, card]),
);
const worst = new Map();

function setState(card, state, text) {
  const badge = card.querySelector("[data-state]");
  badge.className = `state ${state}`;
  badge.textContent = text;
}

/** Have all bars share one scale. */
function scale() {
  const bars = [...container.querySelectorAll("[data-milliseconds]")];
  const longest = Math.max(LEAST, ...bars.map((bar) => Number(bar.dataset.milliseconds)));
  for (const bar of bars) {
    bar.setAttribute("width", Math.max(1, (100 * bar.dataset.milliseconds) / longest));
  }
}

function add(report) {
  const card = cards.get(report.mailer);
  const row = template.content.cloneNode(true);
  const item = row.querySelector("li");
  item.className = report.state;
  const sign = row.querySelector("[data-sign]");
  sign.textContent = SIGNS[report.state];
  sign.setAttribute("aria-label", report.state);
  row.querySelector("[data-name]").textContent = report.stage;
  if (report.state !== "skipped") {
    row.querySelector("[data-time]").textContent = `${report.milliseconds} ms`;
    row.querySelector("[data-bar]").dataset.milliseconds = report.milliseconds;
  }
  const found = row.querySelector("[data-found]");
  for (const finding of report.findings) {
    const text = document.createElement("p");
    text.textContent = finding.text;
    found.append(text);
    if (finding.hint) {
      const hint = document.createElement("p");
      hint.className = "hint";
      hint.textContent = finding.hint;
      found.append(hint);
    }
  }
  card.querySelector("[data-stages]").append(row);
  scale();
  const before = worst.get(report.mailer) ?? "ok";
  if (ORDER.indexOf(report.state) > ORDER.indexOf(before)) worst.set(report.mailer, report.state);
  setState(card, "running", "checking");
}

function check() {
  again.disabled = true;
  said.textContent = "Checking…";
  worst.clear();
  for (const card of cards.values()) {
    card.querySelector("[data-stages]").replaceChildren();
    setState(card, "waiting", "waiting");
  }
  const stop = (text) => {
    source.close();
    again.disabled = false;
    said.textContent = text;
  };
  const source = follow(container.dataset.events, {
    stage: add,
    checked({ mailer }) {
      const state = worst.get(mailer) ?? "ok";
      const verdict = state === "skipped" ? "ok" : state;
      setState(cards.get(mailer), verdict, VERDICTS[verdict]);
    },
    end() {
      const failed = [...worst.values()].filter((state) => state === "failed").length;
      stop(`${cards.size} checked, ${failed} with a failure.`);
    },
  });
  source.addEventListener("error", () => stop("The check was broken off."));
}

again.addEventListener("click", check);
check();
