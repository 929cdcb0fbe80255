"use strict";
(() => {
  document.documentElement.classList.remove("no-js");
  const table = document.querySelector(".edits");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], FIRST = 25;
  const find = (id) => document.getElementById(id);
  const search = find("search"), state = find("state"), order = find("order"), more = find("more"), count = find("count");
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const compare = new Intl.Collator(undefined, {numeric: true}).compare;
  let everything = false, column = 0, down = false;

  const value = (row) => {
    const cell = row.cells[column];
    return cell.dataset.sort ?? cell.textContent.trim();
  };
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = rows.filter((row) =>
      words.every((word) => text.get(row).includes(word)) &&
      (!state.value || row.dataset.state === state.value || (state.value === "found" && row.dataset.found)));
    const chosen = new Set(everything ? fits : fits.slice(0, FIRST));
    rows.forEach((row) => { row.hidden = !chosen.has(row); });
    count.textContent = fits.length === rows.length ? `${rows.length} edits` : `${fits.length} of ${rows.length} edits`;
    more.hidden = chosen.size === fits.length;
    more.textContent = `Show all ${fits.length}`;
  };
  const sort = (next, turn) => {
    down = turn ?? (next === column && !down);
    column = next;
    rows.sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)) || a.dataset.number - b.dataset.number);
    body.append(...rows);
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    order.value = String(column);
    show();
  };
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) sort(button.parentNode.cellIndex);
  });
  order.addEventListener("change", () => sort(Number(order.value), false));
  search.addEventListener("input", show);
  state.addEventListener("change", show);
  more.addEventListener("click", () => {
    const next = rows.find((row) => row.hidden);
    everything = true;
    show();
    next?.querySelector("summary")?.focus();
  });
  sort(0, false);
})();
