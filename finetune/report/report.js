"use strict";
// Draws the numbers of the page with Plotly in the colours of the page, and updates the page during a run.
(() => {
  const SMOOTH_FROM = 60, MARKERS_UP_TO = 40, COLOURS = 8;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const AXES = { step: "step", tokens: "tokens", seconds: "time" };
  const SMOOTHED = ["loss", "grad_norm", "supervised_tokens_per_second", "step_seconds", "loss_by_source",
    "loss_by_turn"];
  const byId = (id) => document.getElementById(id);
  const every = Number(document.body.dataset.every || 0);
  let numbers = JSON.parse(byId("numbers").textContent);
  let choice = { x: "step", smooth: null, hidden: [] };

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (number) => css(`--series-${(number % COLOURS) + 1}`);
  // Plotly reads some HTML in names; these say what they say.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, "\ufffd");
  const last = (values) => values.findLast((one) => one !== null);
  const format = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") :
    value && Math.abs(value) < 1e-3 ? String(Number(value.toPrecision(4)).toExponential()) :
      String(Number(value.toPrecision(4)));

  // A mean over neighbours on both sides, the nearer the heavier, so that a curve does not lag behind.
  function smoothed(values) {
    const reach = Math.max(2, Math.round(values.length * 0.02));
    return values.map((own, at) => {
      if (own === null) return null;
      let sum = 0, weights = 0;
      for (let away = -reach; away <= reach; away++) {
        const value = values[at + away] ?? null;
        if (value === null) continue;
        const weight = reach + 1 - Math.abs(away);
        sum += weight * value;
        weights += weight;
      }
      return sum / weights;
    });
  }

  function isSmooth() {
    const longest = Math.max(0, ...numbers.runs.map((run) => run.x.step.length));
    return choice.smooth === null ? longest >= SMOOTH_FROM : choice.smooth;
  }

  function line(run, y, name, shade, dash, smooth) {
    const x = run.x[choice.x], few = x.length <= MARKERS_UP_TO;
    const base = { x, name: plain(name), type: "scatter", connectgaps: false, hovertemplate: "%{y}" };
    const drawn = { ...base, y: smooth ? smoothed(y) : y, mode: few ? "lines+markers" : "lines",
      line: { color: shade, width: 2, dash }, marker: { color: shade, size: 5 } };
    const raw = { ...base, y, mode: "lines", line: { color: shade, width: 1 }, opacity: 0.3, hoverinfo: "skip",
      hovertemplate: null, showlegend: false };
    return smooth ? [raw, drawn] : [drawn];
  }

  function traces(plot) {
    const several = numbers.runs.length > 1, found = [];
    const smooth = isSmooth() && SMOOTHED.includes(plot.key);
    numbers.runs.forEach((run, number) => {
      if (choice.hidden.includes(number)) return;
      if (plot.grouped) {
        Object.entries(run.groups[plot.key]).forEach(([name, values], place) => {
          const named = plot.key === "loss_by_turn" ? label(`answer ${name}`) : name;
          found.push(...line(run, values, several ? `${run.name}: ${named}` : named, colour(place),
            DASHES[number % DASHES.length], smooth));
        });
        return;
      }
      const values = run.columns[plot.key].map((value) => value === null ? null : value * plot.scale);
      const name = several ? run.name : label(plot.key === "loss" ? "training" : plot.title);
      if (values.some((value) => value !== null))
        found.push(...line(run, values, name, colour(number), "solid", smooth));
      if (plot.key === "loss" && run.evaluations.loss.length) {
        const shade = several ? colour(number) : colour(1);
        found.push({ x: run.evaluations.x[choice.x], y: run.evaluations.loss, type: "scatter",
          name: several ? plain(label(`${run.name}, evaluation`)) : label("evaluation"), mode: "lines+markers",
          line: { color: shade, width: 2, dash: "dot" }, marker: { color: shade, size: 8, symbol: "diamond" },
          hovertemplate: "%{y}" });
      }
    });
    return found;
  }

  function marks(plot) {
    if (choice.x !== "step" || plot.grouped) return [];
    const upright = (x, shade, dash) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: shade, width: 1, dash } });
    return numbers.runs.flatMap((run, number) => choice.hidden.includes(number) ? [] : [
      ...(plot.key === "loss" ? run.lost.map((step) => upright(step, css("--bad"), "dot")) : []),
      ...run.resumed.map((step) => upright(step, css("--soft"), "dash")),
    ]);
  }

  function layout(plot, found) {
    const ink = css("--soft"), grid = css("--grid");
    const axis = { color: ink, gridcolor: grid, linecolor: css("--line"), zeroline: false, automargin: true,
      tickfont: { size: 11.5 }, exponentformat: "power", hoverformat: ".5~g" };
    const units = { step: "step", tokens: "tokens seen", seconds: "seconds in steps" };
    const legend = plot.grouped || found.filter((one) => one.showlegend !== false).length > 1;
    return {
      margin: { l: 46, r: 14, t: 10, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: css("--card"),
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink"), size: 12 },
      xaxis: { ...axis, spikecolor: ink, spikethickness: 1, spikedash: "dot",
        hoverformat: choice.x === "step" ? "d" : ",.3~s",
        title: { text: label(units[choice.x]), standoff: 6, font: { size: 11.5, color: ink } } },
      yaxis: { ...axis, ticksuffix: plot.unit ? ` ${plot.unit}` : "",
        rangemode: plot.key.startsWith("l") ? "normal" : "tozero" },  // losses and the learning rate
      hovermode: choice.x === "step" ? "x unified" : "closest",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12.5 },
        namelength: 40 },
      showlegend: legend && (plot.grouped || numbers.runs.length === 1),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink, size: 11.5 } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: css("--ink") },
      shapes: marks(plot), uirevision: choice.x,
    };
  }

  // Plotly's own choice of buttons has one that sends the numbers to its makers: these are all there are.
  const OPTIONS = { responsive: true, displaylogo: false, doubleClick: "reset", showTips: false,
    showSendToCloud: false, plotlyServerURL: "", modeBarButtons: [["toImage", "resetScale2d"]] };

  // No more ticks than steps are shown, so that all are integers.
  function wholeSteps(drawn) {
    const [from, to] = drawn.layout.xaxis.range, span = Math.ceil(to - from);
    const nticks = choice.x === "step" && span < 20 ? Math.min(span, Math.ceil(drawn.clientWidth / 70)) : 0;
    if ((drawn.layout.xaxis.nticks || 0) !== nticks) return Plotly.relayout(drawn, { "xaxis.nticks": nticks });
  }

  function caption(plot) {
    if (plot.grouped || numbers.runs.length > 1) return "";
    const value = last(numbers.runs[0].columns[plot.key]);
    return value === undefined ? "" : `${format(value * plot.scale)}${plot.unit ? ` ${plot.unit}` : ""}`;
  }

  function drawing(plot) {
    let figure = byId(`plot-${plot.key}`);
    if (figure) return figure;
    figure = document.createElement("figure");
    figure.id = `plot-${plot.key}`;
    figure.className = plot.key === "loss" || plot.grouped ? "plot large" : "plot";
    const head = document.createElement("figcaption"), drawn = document.createElement("div");
    head.append(label(plot.title), document.createElement("span"));
    drawn.className = "drawing";
    figure.append(head, drawn);
    if (plot.key === "loss") {
      const note = document.createElement("p");
      note.className = "marks";
      figure.append(note);
    }
    byId(plot.key === "loss" ? "first" : "plots").append(figure);
    return figure;
  }

  function explain() {
    const note = document.querySelector(".marks");
    if (!note) return;
    const lost = numbers.runs.some((run) => run.lost.length), resumed = numbers.runs.some((run) => run.resumed.length);
    const thinned = numbers.runs.some((run) => run.x.step.length < run.logged);
    note.textContent = [lost && "dotted: a non-finite step", resumed && "dashed: resumed from a checkpoint",
      thinned && "of neighbouring steps the lowest and highest are drawn"].filter(Boolean).map(label).join(" · ");
  }

  function draw() {
    byId("curves").hidden = !numbers.plots.length;
    const wanted = numbers.plots.map((plot) => `plot-${plot.key}`);
    document.querySelectorAll(".plot").forEach((one) => wanted.includes(one.id) || one.remove());
    const figures = numbers.plots.map(drawing);
    explain();
    return Promise.all(numbers.plots.map((plot, number) => {
      const figure = figures[number], found = traces(plot);
      figure.querySelector("figcaption span").textContent = caption(plot);
      const drawn = figure.querySelector(".drawing"), isNew = !drawn.on;
      const done = Plotly.react(drawn, found, layout(plot, found), OPTIONS).then(() => wholeSteps(drawn));
      if (isNew) drawn.on("plotly_relayout", () => wholeSteps(drawn));
      return done;
    }));
  }

  function button(text, pressed, press) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", () => { press(); tools(); draw(); });
    return made;
  }

  function tools() {
    const runs = document.createElement("div"), axes = document.createElement("div");
    runs.className = "runs";
    axes.className = "axis-choice";
    if (numbers.runs.length > 1) numbers.runs.forEach((run, number) => {
      const hidden = choice.hidden.includes(number);
      const made = button(run.name, !hidden, () => {
        choice.hidden = hidden ? choice.hidden.filter((one) => one !== number) : [...choice.hidden, number];
      });
      made.style.setProperty("--own", `var(--series-${(number % COLOURS) + 1})`);
      runs.append(made);
    });
    if (numbers.runs.some((run) => run.x.seconds.some(Boolean)))
      Object.entries(AXES).forEach(([x, name]) => axes.append(button(label(name), choice.x === x, () => { choice.x = x; })));
    const smooth = button(label("smooth"), isSmooth(), () => { choice.smooth = !isSmooth(); });
    byId("tools").replaceChildren(runs, ...(axes.childElementCount ? [axes] : []), smooth);
  }

  // ---- a run in progress

  const shown = {};  // the HTML of each part, as it came
  let seen = null;
  async function look() {
    let text;
    try {
      text = await (await fetch("now", { cache: "no-store" })).text();
    } catch (gone) {
      return;  // the watch has ended: what was seen last stays
    }
    if (text !== seen) {
      seen = text;
      const news = JSON.parse(text);
      for (const [name, html] of Object.entries(news.parts)) {
        const part = document.querySelector(`[data-part="${name}"]`);
        if (shown[name] === html) continue;
        part.innerHTML = shown[name] = html;
        label.translate(part);
      }
      numbers = news.numbers;
      tools();
      await draw();
      if (news.ended) return;
    }
    setTimeout(look, every * 1000);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  tools();
  draw().then(() => every && look());
})();
