"use strict";
{
  const table = document.getElementById("pairs");
  const body = table.tBodies[0];
  const tools = document.getElementById("tools");
  const find = document.getElementById("find");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const page = body.rows.length;
  const rows = [...body.rows, ...document.getElementById("rest").content.children].map(
    (row) => ({ row, text: row.textContent.toLowerCase() }),
  );
  let limit = page;

  const show = () => {
    const asked = find.value.toLowerCase().split(/\s+/);
    const found = rows.filter(({ text }) => asked.every((word) => text.includes(word)));
    body.replaceChildren(...found.slice(0, limit).map(({ row }) => row));
    const shown = Math.min(limit, found.length);
    count.textContent = `${shown.toLocaleString("en")} of ${found.length.toLocaleString("en")} pairs shown`;
    more.hidden = shown === found.length;
  };

  const number = (text) => parseFloat(text.replace("−", "-").replace(/[<+,]/g, ""));
  const words = new Intl.Collator(undefined, { numeric: true });
  const compare = (a, b, numeric, sign) => {
    if (!numeric) return sign * words.compare(a, b);
    const [x, y] = [number(a), number(b)];
    // What has no figure comes last either way.
    return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
  };
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.ariaSort === "ascending";
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.ariaSort = down ? "descending" : "ascending";
      const numeric = heading.classList.contains("n");
      const cell = ({ row }) => row.cells[column].textContent;
      rows.sort((a, b) => compare(cell(a), cell(b), numeric, down ? -1 : 1));
      show();
    });
  });

  find.addEventListener("input", () => { limit = page; show(); });
  more.addEventListener("click", () => { limit *= 4; show(); });
  tools.hidden = false;
  show();
}
