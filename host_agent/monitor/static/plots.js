// Rates and latencies over time, drawn by uPlot, which is served from here.
import { element } from "./tables.js";

const MOST = 600; // points; the monitor keeps as many
const COLORS = ["--line-1", "--line-2", "--line-3"];

// Places in a point: 0 time, then host_agent/monitor/series.py's NAMES.
const PLOTS = [
  { title: "Commands a second", lines: [["started", 1], ["ended", 2], ["failed", 3]] },
  { title: "From asking to running, seconds", lines: [["median", 5], ["95 %", 6]] },
  { title: "Bytes copied a second", lines: [["bytes", 4]] },
  { title: "Messages in brokers", lines: [["messages", 7]] },
];

export class Plots {
  constructor(place) {
    this.points = [];
    this.place = place;
    this.charts = PLOTS.map((plot) => {
      const box = element("figure", { class: "plot" }, element("figcaption", {}, plot.title));
      const said = element("p", { class: "said" });
      place.append(box);
      box.append(said);
      return { ...plot, box, said, chart: null };
    });
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(place);
    this.rebuild();
  }

  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  width() {
    return Math.max(200, this.charts[0].box.clientWidth - 16);
  }

  rebuild() {
    const grid = { stroke: this.color("--grid"), width: 1 };
    const ink = this.color("--ink");
    for (const plot of this.charts) {
      plot.chart?.destroy();
      plot.chart = new uPlot(
        {
          width: this.width(),
          height: 140,
          cursor: { show: false },
          legend: { show: false },
          scales: { x: { time: true }, y: { range: (u, low, high) => [0, Math.max(high || 0, 0.001) * 1.1] } },
          axes: [
            { stroke: ink, grid, ticks: grid, values: (u, all) => all.map(hour) },
            { stroke: ink, grid, ticks: grid, size: 60, values: (u, all) => all.map(short) },
          ],
          series: [
            {},
            ...plot.lines.map(([label], index) => ({
              label,
              stroke: this.color(COLORS[index]),
              width: 1.5,
              dash: index === 1 ? [6, 3] : index === 2 ? [2, 2] : undefined,
              points: { show: false },
            })),
          ],
        },
        this.data(plot),
        plot.box,
      );
      plot.box.querySelector(".uplot").setAttribute("aria-hidden", "true");
    }
    this.say();
  }

  data(plot) {
    return [this.points.map((point) => point[0]), ...plot.lines.map(([, at]) => this.points.map((p) => p[at]))];
  }

  // For those who do not see the picture, and for everybody who wants the number.
  say() {
    const last = this.points.at(-1);
    for (const plot of this.charts) {
      const values = plot.lines.map(([label, at]) => `${label} ${last && last[at] !== null ? short(last[at]) : "unknown"}`);
      plot.said.textContent = `now: ${values.join(", ")}`;
    }
  }

  resize() {
    for (const plot of this.charts) plot.chart.setSize({ width: this.width(), height: 140 });
  }

  reset(points) {
    this.points = points;
    this.draw();
  }

  add(point) {
    this.points.push(point);
    if (this.points.length > MOST) this.points.shift();
    if (!document.hidden) this.draw();
  }

  draw() {
    for (const plot of this.charts) plot.chart.setData(this.data(plot));
    this.say();
  }
}

const hour = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });

export function short(value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const units = [[1e9, " G"], [1e6, " M"], [1e3, " k"]];
  for (const [size, unit] of units) if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)}${unit}`;
  if (Math.abs(value) < 0.001) return value.toExponential(0);
  return Math.abs(value) < 1 ? value.toPrecision(2) : `${Math.round(value * 100) / 100}`;
}
