// Draw the charts of the page with plotly.js when they come into view, and sort tables by a click on a column's name.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const drawn = new Map(); // element of a panel -> function that draws it again
  let library;

  // plotly.js lies in the page as base64 of gzip, which has a third of its size.
  function plotly() {
    library ??= (async () => {
      const packed = atob(document.getElementById("plotly").textContent.trim());
      const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
      const script = document.createElement("script");
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      script.textContent = await new Response(stream).text();
      document.head.append(script);
    })();
    return library;
  }

  function element(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(["ink", "quiet", "line", "paper", "tint"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }

  // Replace the color names "ink" and "paper" by the colors of the page.
  function painted(value, colors) {
    if (value === "ink" || value === "paper") return colors[value];
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((each) => painted(each, colors));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, key === "text" ? each : painted(each, colors)]));
  }

  const short = (number) => (number === null || number === undefined ? "–" : String(Number.isInteger(number) ? number : Number(number.toPrecision(6))));

  // The value at a place of an axis: the name of its nearest tick, if the place is nearer to it than to the next tick.
  function placed(axis, place) {
    if (!axis.ticktext || axis.type === "log") return short(place);
    const distances = axis.tickvals.map((tick) => Math.abs(tick - place));
    const nearest = distances.indexOf(Math.min(...distances));
    const gaps = axis.tickvals.slice(1).map((tick, i) => Math.abs(tick - axis.tickvals[i]));
    return distances[nearest] * 2 < Math.min(Infinity, ...gaps) ? axis.ticktext[nearest] : short(place);
  }

  function trace(mark, panel) {
    const { interval_x: across, interval_y: along, shown_x: xs = mark.x, shown_y: ys = mark.y, text, missing, ...rest } = mark;
    if (mark.hoverinfo === "skip") return rest;
    const range = (ends, i) => (ends && ends[i][0] !== null && ends[i][0] !== ends[i][1] ? ` [${short(ends[i][0])}, ${short(ends[i][1])}]` : "");
    if (mark.type === "heatmap") {
      const place = (axis, start, step, i) => placed(axis, start + step * i);
      const texts = mark.text.map((row, j) => row.map((value, i) =>
        [`${panel.y.title} ${place(panel.y, mark.y0, mark.dy, j)}`, `${panel.x.title} ${place(panel.x, mark.x0, mark.dx, i)}`, value].join("<br>")));
      return { ...rest, text: texts, hovertemplate: "%{text}<extra></extra>" };
    }
    const named = (axis, value) => `${axis.title && `${axis.title}: `}${axis === panel.x && mark.shown_x ? short(value) : placed(axis, value)}`;
    const lines = xs.map((x, i) => [
      mark.name && `<b>${wrapped(mark.name, 44)}</b>`,
      text?.[i] && wrapped(text[i], 44),
      wrapped(named(panel.x, x) + range(across, i), 44),
      wrapped(named(panel.y, ys[i]) + range(along, i), 44),
    ].filter(Boolean).join("<br>"));
    return { ...rest, hovertext: lines, hovertemplate: "%{hovertext}<extra></extra>" };
  }

  // plotly.js reads some HTML in its texts; what comes from runs is to be shown as it is.
  const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  function axis(description, colors, vertical, image) {
    const { title, ...rest } = description;
    return {
      ...rest, automargin: true, zeroline: false, gridcolor: colors.line, linecolor: colors.quiet, ticks: "outside",
      tickcolor: colors.line, title: { text: wrapped(title, vertical ? 34 : innerWidth < 640 ? 24 : 60), font: { size: 12 }, standoff: 8 },
      showgrid: !image, ticktext: rest.ticktext?.map(escaped), tickfont: { color: colors.ink }, exponentformat: "power",
      ...(rest.type === "log" ? { nticks: 3, tickformat: "~g" } : { nticks: vertical ? 8 : 7 }), // log: 0.02 and not a small 2
    };
  }

  // Break a long label into lines.
  function wrapped(text, width) {
    const lines = [""];
    for (const word of escaped(text).split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length > width) lines.push("");
      lines.push(`${lines.pop()} ${word}`.trim());
    }
    return lines.join("<br>");
  }

  function draw(place, panel, hidden) {
    const colors = theme();
    const narrow = place.clientWidth < 480;
    const image = panel.data.find((mark) => mark.type === "heatmap");
    const x = axis(panel.x, colors, false, image);
    const y = axis(panel.y, colors, true, image);
    const longest = Math.max(0, ...(panel.y.ticktext ?? []).map((text) => text.length));
    const above = longest * 6 > place.clientWidth / 2; // long names stand above their marks
    if (above) Object.assign(y, { showticklabels: false, ticks: "", automargin: false });
    const names = above ? panel.y.tickvals.map((value, i) => ({
      text: wrapped(panel.y.ticktext[i], Math.floor(place.clientWidth / 6.5)), x: 0, xref: "x domain", y: value, yref: "y", xanchor: "left",
      yanchor: "bottom", yshift: 6, align: "left", showarrow: false, bgcolor: colors.paper, borderpad: 0,
    })) : [];
    const lines = names.reduce((count, name) => count + name.text.split("<br>").length, 0);
    const height = Math.max(panel.height, above ? 90 + 24 * names.length + 15 * lines : 0);
    place.style.minHeight = `${height}px`;
    const layout = {
      height, margin: { l: above ? 12 : 48, r: 10, t: touch ? 10 : 28, b: 44 }, showlegend: false,
      hovermode: "closest", dragmode: touch ? false : "zoom", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: image?.missing ?? "rgba(0,0,0,0)", // seen where a cell has no value
      font: { color: colors.ink, size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily }, bargap: 0.2,
      barmode: "overlay", hoverlabel: { bgcolor: colors.tint, bordercolor: colors.quiet, font: { color: colors.ink }, align: "left", namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colors.quiet, activecolor: colors.ink },
      xaxis: x, yaxis: y, shapes: painted(panel.shapes, colors), annotations: [...painted(panel.annotations, colors).map((note) => ({ ...note, text: escaped(note.text) })), ...names],
    };
    const data = panel.data.map((mark) => ({ ...trace(painted(mark, colors), panel), visible: !hidden.has(mark.name) }));
    const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    return Plotly.react(place, data, layout, config);
  }

  function swatch(entry) {
    const size = { class: "swatch", width: 28, height: 12, viewBox: "0 0 28 12" };
    const svg = (name, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      return made;
    };
    const color = entry.color === "ink" || entry.color === "paper" ? `var(--${entry.color})` : entry.color;
    const dashes = { dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" };
    const picture = svg("svg", size);
    if (entry.dash) picture.append(svg("line", { x1: 0, x2: 28, y1: 6, y2: 6, stroke: color, "stroke-width": 2.5, "stroke-dasharray": dashes[entry.dash] ?? "" }));
    const shapes = {
      square: () => svg("rect", { x: 9.5, y: 1.5, width: 9, height: 9, fill: color }),
      diamond: () => svg("path", { d: "M14 0L20 6L14 12L8 6Z", fill: color }),
      "triangle-up": () => svg("path", { d: "M14 1L20 11L8 11Z", fill: color }),
      "line-ew-open": () => svg("line", { x1: 8, x2: 20, y1: 6, y2: 6, stroke: color, "stroke-width": 2.5 }),
      circle: () => svg("circle", { cx: 14, cy: 6, r: 5, fill: color }),
    };
    if (entry.symbol) picture.append((shapes[entry.symbol] ?? shapes.circle)());
    return picture;
  }

  // What the colors of images mean: a strip of the colors, with values below it.
  function scaleOf({ name, colors, places, texts, missing }) {
    const strip = element("div", { className: "strip" });
    strip.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
    const marks = element("div", { className: "marks" }, ...texts.map((text, i) => {
      const mark = element("span", { textContent: text });
      mark.style.left = `${100 * places[i]}%`;
      return mark;
    }));
    const box = element("div", { className: "scale" }, element("span", { textContent: name }), element("div", {}, strip, marks));
    if (missing) {
      const square = element("span", { className: "square" });
      square.style.background = missing;
      box.append(element("span", {}, square, " no value"));
    }
    return box;
  }

  function tableOf(rows) {
    const [head, ...body] = rows;
    const cells = (names, row) => element("tr", {}, ...row.map((text) => element(names, { textContent: text })));
    return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...body.map((row) => cells("td", row)))));
  }

  // Build the panels and the legend of a figure. A panel is drawn when it comes into view.
  function build(figure) {
    const { panels, legend, scales, notes } = JSON.parse(figure.querySelector("script").textContent);
    const hidden = new Set();
    const places = [];
    const grid = element("div", { className: panels.length > 1 ? "panels several" : "panels" });
    for (const panel of panels) {
      const box = element("div", { className: "panel" });
      if (panel.title) box.append(element("p", { className: "panel-title", textContent: panel.title }));
      if (panel.table) box.append(tableOf(panel.table));
      else if (panel.text) box.append(element("p", { className: "panel-text", textContent: panel.text }));
      else {
        const place = element("div", { className: "plot" });
        place.style.minHeight = `${panel.height}px`;
        place.redraw = () => draw(place, panel, hidden).then(() => drawn.set(place, place.redraw));
        box.append(place);
        places.push(place);
        seen.observe(place);
      }
      grid.append(box);
    }
    const keys = legend.map((entry) => {
      const key = element("button", { type: "button", ariaPressed: "true" }, swatch(entry), element("span", { textContent: entry.name }));
      key.addEventListener("click", () => {
        hidden.delete(entry.name) || hidden.add(entry.name);
        key.ariaPressed = String(!hidden.has(entry.name));
        places.filter((place) => drawn.has(place)).forEach((place) => place.redraw());
      });
      return key;
    });
    figure.prepend(grid, element("div", { className: "legend" }, ...keys), ...scales.map(scaleOf), ...notes.map((note) => element("p", { className: "note", textContent: note })));
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      plotly().then(target.redraw);
    }
  }, { rootMargin: "400px" });

  dark.addEventListener("change", () => drawn.forEach((redraw) => redraw()));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    drawn.forEach((redraw) => redraw());
  });

  // A link to something inside a closed part of the page opens that part.
  function reveal() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);

  function sortable(table) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const down = head.ariaSort === "ascending";
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.ariaSort = down ? "descending" : "ascending";
        const shown = (cell) => cell.dataset.value ?? cell.textContent.trim().replace("−", "-");
        const text = (row) => shown(row.cells[column]);
        const rows = [...table.tBodies[0].rows];
        const order = new Intl.Collator("en", { numeric: true });
        const compare = (a, b) => {
          const [left, right] = [parseFloat(a), parseFloat(b)];
          return Number.isNaN(left) || Number.isNaN(right) ? order.compare(a, b) : left - right;
        };
        rows.sort((a, b) => {
          const [left, right] = [text(a), text(b)];
          if (left === "–" || right === "–") return (left === "–") - (right === "–"); // values that are missing come last
          return down ? compare(right, left) : compare(left, right);
        });
        table.tBodies[0].append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), sort()));
    });
  }

  document.querySelectorAll("figure.chart").forEach(build);
  document.querySelectorAll("table.sortable").forEach(sortable);
  reveal();
})();
