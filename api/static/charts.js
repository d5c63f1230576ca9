// Draws every <div class="chart" data-chart="URL">: fetches the figure, puts the page's colours in, lets plotly draw it.
//
// - "@name" in a figure is the CSS variable --name, so light and dark have their own colours.
// - a point whose customdata is a link opens it; with data-zoom, zooming along x asks the server for more detail.
// - a chart is fetched when it comes near the window, and drawn again when the colour scheme changes.
let plotly = null;

// plotly writes some styles as attributes, which the policy forbids. Set through the CSSOM they do the same.
const setAttribute = Element.prototype.setAttribute;
Element.prototype.setAttribute = function (name, value) {
  if (name === "style") this.style.cssText = value;
  else setAttribute.call(this, name, value);
};

function loadPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.querySelector("meta[name=plotly]").content;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      plotly = null;
      reject(new Error("the chart library could not be loaded"));
    };
    document.head.append(script);
  });
  return plotly;
}

export function drawCharts(root) {
  const charts = root.querySelectorAll(".chart[data-chart]");
  if (charts.length === 0) return;
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        show(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  for (const chart of charts) {
    chart.style.minHeight = `${chart.dataset.height}px`; // nothing jumps when it is drawn
    near.observe(chart);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of charts) if (chart.figure) draw(chart);
  });
}

async function show(chart, url = chart.dataset.chart) {
  say(chart, "Loading the chart\u2026");
  try {
    const reply = await fetch(url, { headers: { Accept: "application/json" } });
    if (!reply.ok) throw new Error(await reason(reply));
    chart.figure = await reply.json();
    await draw(chart);
  } catch (error) {
    say(chart, `The chart could not be drawn: ${error.message}.`, () => show(chart, url));
  }
}

async function reason(reply) {
  if (reply.status === 401) return "the service wants a token; load the page again to give it";
  try {
    return (await reply.json()).detail;
  } catch {
    return `the service answered ${reply.status}`;
  }
}

function say(chart, text, again) {
  const line = document.createElement("p");
  line.className = again ? "chart-state failed" : "chart-state";
  line.setAttribute("role", again ? "alert" : "status");
  line.append(text);
  if (again) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Try again";
    button.addEventListener("click", again);
    line.append(" ", button);
  }
  if (window.Plotly && chart.plot) window.Plotly.purge(chart.plot);
  chart.plot = null;
  chart.replaceChildren(line);
}

// One after another: a change of the window's width must not meet a drawing that is not done.
function draw(chart) {
  chart.work = (chart.work ?? Promise.resolve()).catch(() => {}).then(() => paint(chart));
  return chart.work;
}

async function paint(chart) {
  const library = await loadPlotly();
  const style = getComputedStyle(chart);
  const figure = coloured(structuredClone(chart.figure), style);
  const layout = { ...base(style), ...figure.layout };
  layout.legend = { ...base(style).legend, ...figure.layout.legend };
  for (const axis of ["xaxis", "yaxis"]) layout[axis] = { ...lines(style), ...figure.layout[axis] };
  layout.width = chart.drawnWidth = chart.clientWidth;
  const first = !chart.plot;
  if (first) {
    chart.plot = document.createElement("div");
    chart.replaceChildren(chart.plot);
    if (chart.dataset.zoom !== undefined) chart.append(resetButton(chart));
  }
  // without a mode bar, a double click shows all again
  await library.react(chart.plot, figure.data, layout, { displayModeBar: false, scrollZoom: false });
  if (!first) return;
  chart.plot.on("plotly_click", ({ points: [point] }) => {
    const link = point.customdata;
    if (typeof link === "string" && link.startsWith("/")) location.assign(link);
    else if (typeof link === "string" && link.startsWith("#")) location.hash = link;
  });
  if (chart.dataset.zoom !== undefined) chart.plot.on("plotly_relayout", (change) => zoomed(chart, change));
  if (chart.watched) return;
  chart.watched = new ResizeObserver(() => {
    if (chart.plot && chart.clientWidth !== chart.drawnWidth) draw(chart);
  });
  chart.watched.observe(chart);
}

// The server aggregates what is far too much to draw; of a stretch it shows every point.
async function zoomed(chart, change) {
  const from = change["xaxis.range[0]"];
  const to = change["xaxis.range[1]"];
  const all = change["xaxis.autorange"];
  if (from === undefined && !all) return;
  const url = new URL(chart.dataset.chart, location.href);
  if (!all) {
    url.searchParams.set("from", Math.floor(from));
    url.searchParams.set("to", Math.ceil(to));
  }
  const reply = await fetch(url, { headers: { Accept: "application/json" } }).catch(() => null);
  if (!reply?.ok) return; // what is drawn is zoomed all the same, without more detail
  chart.figure = await reply.json();
  chart.querySelector(".chart-reset").hidden = Boolean(all);
  await draw(chart);
}

function resetButton(chart) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "chart-reset";
  button.textContent = "Show all";
  button.hidden = true;
  button.addEventListener("click", () => zoomed(chart, { "xaxis.autorange": true }));
  return button;
}

function coloured(value, style) {
  if (typeof value === "string" && value.startsWith("@")) {
    return style.getPropertyValue(`--${value.slice(1)}`).trim() || style.color;
  }
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  if (value && typeof value === "object") {
    for (const name of Object.keys(value)) value[name] = coloured(value[name], style);
  }
  return value;
}

function base(style) {
  const ink = style.getPropertyValue("--text").trim();
  return {
    autosize: false,
    margin: { l: 12, r: 24, t: 12, b: 12 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style.fontFamily, size: 12.5, color: style.getPropertyValue("--quiet").trim() },
    hoverlabel: {
      bgcolor: style.getPropertyValue("--card").trim(),
      bordercolor: style.getPropertyValue("--quiet").trim(),
      font: { family: style.fontFamily, size: 13, color: ink },
      align: "left",
    },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
    hovermode: "closest",
    dragmode: "zoom",
    bargap: 0.35,
  };
}

function lines(style) {
  const line = style.getPropertyValue("--line").trim();
  return { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line };
}
