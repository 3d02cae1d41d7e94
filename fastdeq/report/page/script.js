"use strict";
const number = (text) => {
  const found = text.replaceAll(",", "").match(/^-?\d+(\.\d+)?(e[+-]?\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
};
const table = document.querySelector("#runs");
if (table) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.tHead.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[place].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!x || !y) return x ? -1 : y ? 1 : 0; // empty cells last, in both directions
        const [n, m] = [number(x), number(y)];
        const order = Number.isNaN(n) || Number.isNaN(m) ? x.localeCompare(y) : n - m;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
  const search = document.querySelector("#filter");
  const count = document.querySelector("#count");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${body.rows.length} rows`;
  };
  search.addEventListener("input", filter);
  filter();
}
const all = document.querySelector("#all");
if (all) {
  all.addEventListener("change", () => {
    document.querySelector(".settings").classList.toggle("only", !all.checked);
  });
}
