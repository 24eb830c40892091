// Server-sent events, of a GET that goes on for ever, and of a POST that ends.

/** Call a handler for each named event. */
export function follow(url, handlers) {
  const source = new EventSource(url);
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
  return source;
}

/**
 * Follow while the page is to be seen, and say on it whether it is live.
 *
 * A browser has six connections to a site: pages in other tabs must not hold them.
 */
export function followWhileSeen(url, handlers, live) {
  const say = (text, isLive) => {
    live.textContent = text;
    live.classList.toggle("is-live", isLive);
  };
  let source = null;
  const update = () => {
    source?.close();
    say("connecting", false);
    if (document.hidden) return;
    source = follow(url, handlers);
    source.addEventListener("open", () => say("live", true));
    source.addEventListener("error", () => say("not connected", false));
  };
  document.addEventListener("visibilitychange", update);
  update();
}

/** Yield the events of a response's body, as [name, data]. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(
        block.split("\n").map((line) => line.split(/: (.*)/s, 2)),
      );
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

/** Fill the elements of a clone, by an attribute, with text. */
export function fill(root, attribute, values) {
  for (const element of root.querySelectorAll(`[data-${attribute}]`)) {
    const value = values[element.dataset[attribute]];
    if (value !== undefined) element.textContent = value;
  }
}

/** Show the time of an element as the clock on this wall has it. */
export function localize(time, iso = time.dateTime) {
  time.dateTime = iso;
  time.textContent = new Date(iso).toLocaleTimeString();
}
