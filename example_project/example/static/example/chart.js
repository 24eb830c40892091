// Lines over time in an inline SVG.

const SVG = "http://www.w3.org/2000/svg";

/** Return the next round number that is not below a value, and has round quarters. */
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  const steps = [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10];
  return steps.map((step) => step * power).find((step) => step >= value);
}

/** Return times from zero to an end, some six of them. */
function ticks(end) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100].find((size) => end / size <= 6) ?? 200;
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, number) => number * step);
}

function add(parent, name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
}

/**
 * Draw points [x, y] as a line each.
 *
 * @param svg has a polyline with data-line for each name; with data-grid, a grid.
 * @param lines the points by name; x from `from` to `to`, or further.
 * @param least how high the y axis goes at least.
 */
export function draw(svg, lines, { from = 0, to = 1, least = 1 } = {}) {
  // Its own size in pixels, so that text is as large as any other.
  const { clientWidth: width, clientHeight: height } = svg;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const grid = svg.querySelector("[data-grid]");
  const [left, right, top, bottom] = grid ? [44, 16, 12, 26] : [0, 0, 10, 8];
  const points = Object.values(lines).flat();
  const high = rounded(Math.max(least, ...points.map(([, y]) => y)));
  const end = Math.max(to, ...points.map(([x]) => x));
  const px = (x) => left + ((x - from) / (end - from)) * (width - left - right);
  const py = (y) => height - bottom - (y / high) * (height - bottom - top);
  for (const [name, line] of Object.entries(lines)) {
    const text = line.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
    svg.querySelector(`[data-line="${name}"]`).setAttribute("points", text);
  }
  if (!grid) return;
  grid.replaceChildren();
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const y = py(high * part);
    add(grid, "line", { x1: left, x2: width - right, y1: y, y2: y });
    add(grid, "text", { x: left - 10, y: y + 4, "text-anchor": "end" }, `${Number((high * part).toFixed(1))}`);
  }
  for (const time of ticks(end)) {
    const label = `${Number(time.toFixed(1))} s`;
    add(grid, "text", { x: px(time), y: height - 6, "text-anchor": "middle" }, label);
  }
}
