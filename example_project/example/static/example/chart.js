// Lines over time in an inline SVG.

const SVG = "http://www.w3.org/2000/svg";

/** Return the next of 1, 2, 5, 10, 20 … that is not below a value. */
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
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
 * @param ends how far the x axis goes at least, and where it begins.
 */
export function draw(svg, lines, { from = 0, to = 1, unit = "s", least = 1 } = {}) {
  const { width, height } = svg.viewBox.baseVal;
  const grid = svg.querySelector("[data-grid]");
  const [left, bottom] = grid ? [44, 26] : [4, 6];
  const top = grid ? 12 : 6;
  const points = Object.values(lines).flat();
  const high = rounded(Math.max(least, ...points.map(([, y]) => y)));
  const end = Math.max(to, ...points.map(([x]) => x));
  const px = (x) => left + ((x - from) / (end - from)) * (width - left - 12);
  const py = (y) => height - bottom - (y / high) * (height - bottom - top);
  for (const [name, line] of Object.entries(lines)) {
    const text = line.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
    svg.querySelector(`[data-line="${name}"]`).setAttribute("points", text);
  }
  if (!grid) return;
  grid.replaceChildren();
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const y = py(high * part);
    add(grid, "line", { x1: left, x2: width - 12, y1: y, y2: y });
    add(grid, "text", { x: left - 8, y: y + 4, "text-anchor": "end" }, `${high * part}`);
    const x = left + part * (width - left - 12);
    const time = from + part * (end - from);
    const anchor = part === 1 ? "end" : part === 0 ? "start" : "middle";
    add(grid, "text", { x, y: height - 6, "text-anchor": anchor }, `${Number(time.toFixed(1))} ${unit}`);
  }
}
