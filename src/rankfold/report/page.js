"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const { plan, comparison, recovery, outlook } = facts;
  const element = (id) => document.getElementById(id);
  const timed = plan.before.latency_ms !== null;
  const COSTS = {
    macs: { label: "MACs", of: (cost) => cost.macs },
    params: { label: "parameters", of: (cost) => cost.parameters },
    latency: { label: "time", of: (cost) => cost.latency_ms },
  };

  // Text and numbers

  const SCALES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const digits = (value, count = 3) => Number(value.toPrecision(count)).toLocaleString("en");
  const counted = (value) => {
    const [scale, unit] = SCALES.find(([size]) => value >= size) ?? [1, ""];
    return digits(value / scale) + (unit && " " + unit);
  };
  const milliseconds = (value) => (value === null ? "" : digits(value) + " ms");
  const percent = (share, places = 0) => (100 * share).toFixed(places) + " %";
  const small = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-3 ? value.toExponential(1) : digits(value));
  const times = (ratio) => (ratio >= 1 ? digits(ratio) + "x less" : digits(1 / ratio) + "x more");
  const rankText = (rank) => (rank ?? []).join(" x ");

  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const definitions = (list, pairs) =>
    list.replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

  // Plots, drawn again when the theme changes

  const drawn = new Map();
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const draw = (id, figure) => {
    drawn.set(id, figure);
    const { data, layout } = figure();
    const axis = {
      gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"),
      automargin: true, exponentformat: "power",
    };
    const whole = {
      paper_bgcolor: color("paper"), plot_bgcolor: color("paper"),
      font: { color: color("ink"), size: 13 }, margin: { l: 64, r: 16, t: 16, b: 48 },
      hoverlabel: { bgcolor: color("soft"), font: { color: color("ink") } }, showlegend: false,
      legend: { orientation: "h", yanchor: "bottom", y: 1 }, ...layout,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
    Plotly.react(id, data, whole, { responsive: true, displaylogo: false, displayModeBar: false });
  };
  const setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    element("theme").textContent = theme === "dark" ? "Light" : "Dark";
    element("theme").setAttribute("aria-pressed", String(theme === "dark"));
    drawn.forEach((figure, id) => draw(id, figure));
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const currentTheme = () => document.documentElement.dataset.theme;

  // Before and after

  function showSummary() {
    element("title").textContent = facts.title;
    const factorized = plan.layers.filter((layer) => layer.method !== null).length;
    const parts = [`${factorized} of ${plan.layers.length} layers are factorized.`];
    if (comparison) {
      const { before, after } = comparison;
      const speed = before.latency_ms / after.latency_ms;
      parts.unshift(
        speed >= 1
          ? `${digits(speed)} times as fast (${milliseconds(before.latency_ms)} to ${milliseconds(after.latency_ms)} per batch), ` +
            `${times(before.parameters / after.parameters).replace(" less", " fewer")} parameters.`
          : `Not faster: ${milliseconds(before.latency_ms)} before, ${milliseconds(after.latency_ms)} after.`,
      );
      if (before.metric !== null && after.metric !== null)
        parts.push(`The metric went from ${digits(before.metric, 4)} to ${digits(after.metric, 4)}.`);
    }
    element("summary").textContent = parts.join(" ");
  }

  function showComparison() {
    const head = make("thead", {}, make("tr", {}, ...["", "before", "after", "change"].map((name, place) =>
      make("th", { scope: "col", className: place ? "number" : "" }, name))));
    const body = make("tbody");
    const row = (name, before, after, change, better) => body.append(make("tr", {},
      make("th", { scope: "row" }, name), make("td", { className: "number" }, before),
      make("td", { className: "number" }, after),
      make("td", { className: "number " + (better === null ? "" : better ? "better" : "worse") }, change)));
    const cost = (name, before, after, shown) =>
      row(name, shown(before), shown(after), after ? times(before / after) : "", after === before ? null : after < before);
    if (comparison) {
      const { before, after } = comparison;
      cost("parameters", before.parameters, after.parameters, counted);
      cost("MACs per sample", before.macs, after.macs, counted);
      cost("time per batch", before.latency_ms, after.latency_ms, milliseconds);
      cost("peak memory", before.peak_memory_bytes, after.peak_memory_bytes, (value) => counted(value) + "B");
      if (before.metric !== null && after.metric !== null) {
        const change = after.metric - before.metric;
        row("metric", digits(before.metric, 4), digits(after.metric, 4),
          (change > 0 ? "+" : "") + change.toFixed(4), change === 0 ? null : change > 0);
      }
      element("comparison-note").textContent =
        `Measured side by side: batch ${comparison.batch_size}, ${comparison.threads} threads, ${comparison.device}, ` +
        `${comparison.runtime}, memory format ${comparison.memory_formats.join(" / ")}. ` +
        `The outputs differ from the original's by ${percent(comparison.output_error, 1)} of their norm. ` +
        comparison.products.join(" ");
    } else {
      cost("parameters", plan.before.parameters, plan.after.parameters, counted);
      cost("MACs per sample", plan.before.macs, plan.after.macs, counted);
      if (timed) cost("time per batch, predicted", plan.before.latency_ms, plan.after.latency_ms, milliseconds);
      element("comparison-note").textContent = "As planned; not measured.";
    }
    element("comparison").append(head, body);
  }

  // What becomes of each layer: by this plan, or at the budget chosen

  const own = plan.layers.map(({ method, rank, after, loss }) => ({ method, rank, cost: after, loss }));
  let chosen = own; // of each layer: method, rank, cost, loss
  let selected = Math.max(0, plan.layers.findIndex((layer) => layer.method !== null));

  function showLayers() {
    const costs = timed ? ["latency", "params"] : ["macs", "params"];
    const names = ["layer", "becomes", ...costs.map((cost) => COSTS[cost].label), "predicted loss"];
    const head = make("thead", {}, make("tr", {}, ...names.map((name, place) =>
      make("th", { scope: "col", className: place > 1 ? "number" : "" }, name))));
    const rows = plan.layers.map((layer, place) => {
      const { method, rank, cost, loss } = chosen[place];
      const why = method ? rankText(rank) && `rank ${rankText(rank)}` : chosen === own ? layer.reason : "left dense";
      const cells = costs.map((name) => {
        const before = COSTS[name].of(layer.before), after = COSTS[name].of(cost);
        const shown = name === "latency" ? milliseconds : counted;
        const text = before === null || after === null ? "" : method ? `${shown(before)} → ${shown(after)}` : shown(before);
        return make("td", { className: "number" }, text);
      });
      const button = make("button", { type: "button" }, layer.name);
      const row = make("tr", {}, make("td", {}, button, make("small", {}, layer.layer)),
        make("td", {}, method ?? "dense", make("small", {}, why ?? "")), ...cells,
        make("td", { className: "number" }, method ? small(loss) : ""));
      if (place === selected) row.setAttribute("aria-current", "true");
      row.addEventListener("click", () => select(place));
      return row;
    });
    element("layers").replaceChildren(head, make("tbody", {}, ...rows));
    const used = new Map();
    chosen.forEach(({ method }) => method && used.set(method, (used.get(method) ?? 0) + 1));
    const counts = [...used].map(([method, count]) => `${count} by ${method}`).join(", ");
    element("layers-note").textContent = (counts || "No layer is factorized") +
      `; ${chosen.filter(({ method }) => !method).length} stay dense. Losses are in the ${plan.metric} metric.` +
      (chosen === own ? "" : " Shown for the budget chosen above, not for this network.");
    draw("shares", shares);
  }

  function shares() {
    const cost = COSTS[timed ? "latency" : "macs"];
    const kept = plan.layers.map((layer, place) => place).filter((place) => cost.of(plan.layers[place].before));
    const names = kept.map((place) => plan.layers[place].name);
    const bars = (name, of, fill) => ({
      type: "bar", orientation: "h", name, y: names, x: kept.map(of), marker: { color: fill },
      hovertemplate: "%{y}: %{x:.4s}" + (timed ? " ms" : "") + `<extra>${name}</extra>`,
    });
    element("shares-caption").textContent = `${timed ? "Milliseconds" : "MACs"} of each layer, before and after.`;
    return {
      data: [
        bars("before", (place) => cost.of(plan.layers[place].before), color("bar")),
        bars("after", (place) => cost.of(chosen[place].cost), color("accent")),
      ],
      layout: {
        height: 110 + 28 * names.length, showlegend: true, barmode: "group", bargap: 0.3,
        yaxis: { autorange: "reversed", automargin: true, tickfont: { size: 11 } },
        xaxis: { title: { text: timed ? "milliseconds" : "MACs" } },
      },
    };
  }

  function select(place) {
    selected = place;
    showLayers();
    showLayer();
    element("layers").querySelectorAll("button")[place].focus({ preventScroll: true });
  }

  function showLayer() {
    const layer = plan.layers[selected];
    const spectrum = outlook?.layers[selected].spectrum ?? [];
    element("layer").hidden = spectrum.length === 0;
    if (spectrum.length === 0) return;
    const checks = outlook.checks.filter((check) => check.layer === layer.name);
    element("layer-title").textContent = layer.name;
    element("layer-text").textContent = [layer.layer, ...checks.map(({ method, rank, predicted, measured }) =>
      `Replaced alone by ${method} of rank ${rankText(rank)}: predicted loss ${small(predicted)}, ` +
      `measured divergence ${measured === null ? "infinite" : small(measured)}.`)].join(" ");
    draw("spectrum", () => ({
      data: [{
        type: "scatter", mode: "lines", line: { color: color("accent") },
        x: spectrum.map((value, place) => place / Math.max(1, spectrum.length - 1)), y: spectrum,
        hovertemplate: "%{x:.0%} of full rank: %{y:.3g}<extra></extra>",
      }],
      layout: {
        height: 320, yaxis: { type: "log", title: { text: "singular value" } },
        xaxis: { tickformat: ".0%", title: { text: "rank, of full" }, range: [0, 1] },
      },
    }));
  }

  // Other budgets

  let cost = Object.keys(outlook?.curves ?? {}).find((name) => name in plan.request) ??
    (timed ? "latency" : "macs");
  const points = () => outlook.curves[cost];
  const shareOf = (one) => COSTS[cost].of(one) / COSTS[cost].of(plan.before);
  const nearest = () => {
    const target = shareOf(plan.after);
    const distances = points().map((point) => Math.abs(shareOf(point.cost) - target));
    return distances.indexOf(Math.min(...distances));
  };

  function showExplorer() {
    if (!outlook || Object.values(outlook.curves).every((curve) => curve.length === 0)) return;
    if (!outlook.curves[cost]?.length) cost = Object.keys(outlook.curves).find((name) => outlook.curves[name].length);
    element("explorer").hidden = false;
    for (const name of Object.keys(outlook.curves).filter((one) => outlook.curves[one].length)) {
      const choice = make("input", { type: "radio", name: "cost", value: name, checked: name === cost });
      choice.addEventListener("change", () => { cost = name; reset(); });
      element("costs").append(make("label", {}, choice, " " + COSTS[name].label));
    }
    element("budget").addEventListener("input", () => choose(Number(element("budget").value)));
    element("back").addEventListener("click", reset);
    element("copy").addEventListener("click", copyCommand);
    reset();
  }

  function reset() {
    element("budget").max = points().length - 1;
    element("budget").value = nearest();
    choose(nearest(), own);
  }

  function choose(place, options) {
    const point = points()[place];
    chosen = options ?? outlook.layers.map((layer, at) => layer.options[point.options[at]]);
    const now = options ? { cost: plan.after, loss: plan.layers.reduce((sum, one) => sum + one.loss, 0) } : point;
    element("budget-value").textContent = `${percent(shareOf(now.cost))} of ${COSTS[cost].label}` +
      (options ? " (this plan)" : "");
    const factorized = chosen.filter(({ method }) => method).length;
    definitions(element("point"), [
      ["parameters", `${counted(now.cost.parameters)} (${percent(now.cost.parameters / plan.before.parameters)})`],
      ["MACs", `${counted(now.cost.macs)} (${percent(now.cost.macs / plan.before.macs)})`],
      ...(timed && now.cost.latency_ms !== null
        ? [["time", `${milliseconds(now.cost.latency_ms)} (${percent(now.cost.latency_ms / plan.before.latency_ms)})`]] : []),
      ["predicted loss", small(now.loss)],
      ["layers factorized", `${factorized} of ${chosen.length}`],
    ]);
    // Rounded up, so that the plan still fits.
    const fraction = (value) => (value > 1 ? value : Math.ceil(1000 * value) / 1000);
    const asked = fraction((options && plan.request[cost]) || Math.min(1, point.budget));
    element("command").textContent = `${facts.command} ${facts.budgets[cost]} ${asked} --out smaller`;
    draw("curve", () => curve(now));
    showLayers();
    showLayer();
  }

  function curve(now) {
    const positive = points().filter((point) => point.loss > 0);
    return {
      data: [
        {
          type: "scatter", mode: "lines+markers", line: { color: color("bar") }, marker: { size: 5 },
          x: positive.map((point) => shareOf(point.cost)), y: positive.map((point) => point.loss),
          hovertemplate: "%{x:.0%} kept: predicted loss %{y:.3g}<extra></extra>",
        },
        {
          type: "scatter", mode: "markers", marker: { size: 13, color: color("accent") },
          x: now.loss > 0 ? [shareOf(now.cost)] : [], y: now.loss > 0 ? [now.loss] : [],
          hovertemplate: "%{x:.0%} kept: predicted loss %{y:.3g}<extra>chosen</extra>",
        },
      ],
      layout: {
        height: 380, yaxis: { type: "log", title: { text: "predicted loss" } },
        xaxis: { tickformat: ".0%", title: { text: COSTS[cost].label + " kept" } },
      },
    };
  }

  async function copyCommand() {
    const text = element("command").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a file may not use the clipboard: select the text instead
      getSelection().selectAllChildren(element("command"));
      return;
    }
    element("copy").textContent = "Copied";
    setTimeout(() => { element("copy").textContent = "Copy"; }, 1500);
  }

  // Checks, recovery, environment

  function showChecks() {
    const checks = (outlook?.checks ?? []).filter(({ predicted, measured }) => predicted > 0 && measured > 0);
    element("checks").hidden = checks.length === 0;
    if (checks.length === 0) return;
    const all = checks.flatMap(({ predicted, measured }) => [predicted, measured]);
    const ends = [Math.min(...all), Math.max(...all)];
    draw("check-plot", () => ({
      data: [
        { type: "scatter", mode: "lines", x: ends, y: ends, line: { color: color("bar"), dash: "dash" }, hoverinfo: "skip" },
        {
          type: "scatter", mode: "markers", marker: { color: color("accent"), size: 8 },
          x: checks.map((check) => check.predicted), y: checks.map((check) => check.measured),
          text: checks.map((check) => `${check.layer}, ${check.method} ${rankText(check.rank)}`),
          hovertemplate: "%{text}<br>predicted %{x:.3g}, measured %{y:.3g}<extra></extra>",
        },
      ],
      layout: {
        height: 380, xaxis: { type: "log", title: { text: "predicted loss" } },
        yaxis: { type: "log", title: { text: "measured divergence" } },
      },
    }));
  }

  function showRecovery() {
    const scored = (recovery?.epochs ?? []).filter((epoch) => epoch.score !== null);
    element("recovery").hidden = scored.length === 0;
    if (scored.length === 0) return;
    element("recovery-caption").textContent = `Score on data held out after each epoch (higher is better). ` +
      `Epoch ${recovery.best} was kept; ${recovery.ended}; ${digits(recovery.seconds)} seconds.`;
    draw("recovery-plot", () => ({
      data: [{
        type: "scatter", mode: "lines+markers", x: scored.map((epoch) => epoch.index), y: scored.map((epoch) => epoch.score),
        line: { color: color("accent") },
        marker: { size: scored.map((epoch) => (epoch.index === recovery.best ? 13 : 6)) },
        hovertemplate: "epoch %{x}: %{y:.4g}<extra></extra>",
      }],
      layout: { height: 320, xaxis: { title: { text: "epoch" }, dtick: 1 }, yaxis: { title: { text: "score" } } },
    }));
  }

  function showEnvironment() {
    definitions(element("environment"), [
      ["rankfold", facts.versions.rankfold],
      ["torch", facts.versions.torch],
      ["asked for", Object.entries(plan.request).map(([name, value]) => `${name} ${typeof value === "number" ? digits(value, 4) : value}`).join(", ") || "nothing"],
      ["metric of errors", plan.metric],
      ...(comparison ? [["measured on", `${comparison.device}, ${comparison.threads} threads, ${comparison.runtime}`]] : []),
      ...(facts.merged ? [["merged", `${facts.merged} pairs of layers`]] : []),
      ...(facts.removed ? [["taken out", `channels, ${facts.removed} times`]] : []),
    ]);
  }

  setTheme(preferred.matches ? "dark" : "light");
  preferred.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  element("theme").addEventListener("click", () => setTheme(currentTheme() === "dark" ? "light" : "dark"));
  addEventListener("beforeprint", () => setTheme("light"));
  showSummary();
  showComparison();
  showExplorer();
  if (element("explorer").hidden) { showLayers(); showLayer(); }
  showChecks();
  showRecovery();
  showEnvironment();
})();
