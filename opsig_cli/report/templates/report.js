"use strict";
// Everything is on the page without this: it adds sorting, filters, values under the pointer, and the samples of one pair.
for (const chart of document.querySelectorAll(".chart")) {
  const { steps, lines } = JSON.parse(chart.dataset.chart);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), at = chart.querySelector(".at");
  const values = [...chart.querySelectorAll("output.value")];
  const first = steps[0], span = Math.max(steps[steps.length - 1] - first, 1);
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    at.hidden = true;
    values.forEach((value) => { value.textContent = ""; });
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = first + span * (event.clientX - box.left) / box.width;
    let near = 0;
    steps.forEach((step, i) => { if (Math.abs(step - wanted) < Math.abs(steps[near] - wanted)) near = i; });
    const place = 100 * (steps[near] - first) / span + "%";
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    at.hidden = false;
    at.querySelector("output").textContent = steps[near];
    values.forEach((value, i) => { value.textContent = lines[i][near] ?? "–"; });
  });
  plot.addEventListener("pointerleave", leave);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim().replace("\u2212", "-");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [key(row), row]);
      const numeric = rows.every(([value]) => value !== "" && Number.isFinite(Number(value)));
      rows.sort(([x], [y]) => (numeric ? x - y : x.localeCompare(y)) * (down ? -1 : 1));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

for (const box of document.querySelectorAll(".filters")) {
  const table = document.getElementById(box.dataset.table), rows = [...table.tBodies[0].rows];
  const text = document.createElement("input"), way = document.createElement("select"), count = document.createElement("output");
  text.type = "search";
  text.placeholder = "label, prediction, number, ...";
  text.setAttribute("aria-label", "Show rows with these words");
  way.setAttribute("aria-label", "Show rows by the direction of the change");
  for (const [value, name] of [["", "up and down"], ["up", "loss rose"], ["down", "loss fell"]]) way.add(new Option(name, value));
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const said = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word)) || (way.value && row.dataset.way !== way.value);
    }
    count.textContent = rows.filter((row) => !row.hidden).length + " of " + rows.length;
    const folded = table.closest("details");
    if (folded && (words.length || way.value)) folded.open = true;
  };
  text.addEventListener("input", apply);
  way.addEventListener("change", apply);
  box.append("Filter", text, way, count);
  box.hidden = false;
}

const unfold = () => {
  const row = location.hash.startsWith("#sample-") && document.getElementById(location.hash.slice(1));
  if (!row) return;
  row.hidden = false;
  row.closest("details").open = true;
  row.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", unfold);
unfold();

const members = document.querySelector("#member-table");
if (members) {
  const filter = document.querySelector(".filter");
  for (const button of document.querySelectorAll("button[data-pair]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const pair = button.dataset.pair;
      for (const row of members.tBodies[0].rows) row.hidden = pair && !row.dataset.pairs.split(" ").includes(pair);
      filter.hidden = !pair;
      filter.firstElementChild.textContent = "Only the samples of pair " + pair + ".";
      members.closest("details").open = true;
      document.querySelector("#members").scrollIntoView();
    });
  }
}

addEventListener("beforeprint", () => document.querySelectorAll(".pair details").forEach((part) => { part.open = true; }));
