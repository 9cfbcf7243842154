"use strict";
// Heads of tables that sort become buttons; rows without a value stay last.
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort;
  const text = (row, column) => row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : !numeric;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows];
      const missing = (row) => (numeric ? key(row, column) === undefined : text(row, column) === "–");
      rows.sort((a, b) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        const order = numeric
          ? Number(key(a, column)) - Number(key(b, column))
          : text(a, column).localeCompare(text(b, column), undefined, { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
  const hint = table.parentElement.nextElementSibling;
  if (hint && hint.classList.contains("hint")) hint.hidden = false;
}
