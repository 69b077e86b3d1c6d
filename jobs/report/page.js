"use strict";

// Sort a table by the column whose heading is pressed; numbers by value, what is empty last.
function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.sort;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return (up ? 1 : -1) * (both ? x - y : x.localeCompare(y));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}

// Plotly lies in the page compressed, which keeps the page small enough for a phone.
async function loadPlotly() {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function draw(id, figure) {
  const place = document.getElementById(id);
  place.replaceChildren();
  const narrow = place.clientWidth < 600;
  const layout = { ...figure.layout, dragmode: narrow ? false : "zoom" };
  const config = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
  return Plotly.newPlot(place, figure.data, layout, config);
}

sortable(document.getElementById("models"));
const figures = JSON.parse(document.getElementById("figures").textContent);
loadPlotly().then(async () => {
  await draw("trade-off", figures.trade_off);
  if (document.getElementById("speed")) await draw("speed", figures.speed);
  if (document.getElementById("history")) await draw("history", figures.history);
  if (document.getElementById("losses")) await draw("losses", figures.losses);
  const which = document.getElementById("which");
  if (document.getElementById("modules")) await draw("modules", figures.modules[0]);
  if (which) which.addEventListener("change", () => draw("modules", figures.modules[which.value]));
  document.body.dataset.drawn = "yes";
});
