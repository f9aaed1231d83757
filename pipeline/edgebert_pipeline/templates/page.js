"use strict";
// Draws the charts, sorts tables, filters rows, and opens what is folded away before printing.
(() => {
  const look = {
    background: null,
    font: getComputedStyle(document.body).fontFamily,  // Vega measures texts with it
    view: { stroke: null },
    axis: {
      labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--rule)",
      domainColor: "var(--rule)", tickColor: "var(--rule)", titleFontWeight: "normal",
      labelFontSize: 12, titleFontSize: 12, gridOpacity: 0.7, labelLimit: 170, titlePadding: 8,
    },
    legend: {
      labelColor: "var(--ink)", titleColor: "var(--muted)", titleFontWeight: "normal",
      labelFontSize: 12, titleFontSize: 12, orient: "top", symbolStrokeWidth: 2, columns: 2,
      symbolBaseFillColor: "var(--ink)",
      labelLimit: 220, offset: 4, layout: { top: { direction: "vertical", margin: 6 } },
    },
    text: { color: "var(--ink)", fontSize: 12 },
    point: { filled: true, size: 80 },
    bar: { cornerRadiusEnd: 2 },
    rule: { color: "var(--muted)" },
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const spec = JSON.parse(plot.querySelector("script").textContent);
    const whole = {
      width: "container",
      autosize: { type: "fit-x", contains: "padding" },
      description: plot.getAttribute("aria-label"),
      ...spec,
      config: look,
    };
    vegaEmbed(plot, whole, { actions: false, renderer: "svg", tooltip: { theme: "custom" } })
      .catch((error) => {
        plot.classList.add("failed");
        plot.textContent = `This chart cannot be drawn: ${error.message}`;
        console.error(error);
      });
  }

  const valueOf = (cell) => {
    const raw = cell.dataset.value ?? cell.textContent.trim();
    const number = raw === "" ? NaN : Number(raw);
    return Number.isNaN(number) ? raw : number;
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    if (!table.tHead || body.rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
        rows.sort(([a], [b]) => (a === "" || b === "" ? compare(a, b) : (down ? -1 : 1) * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // Rows that variants answer differently: which two of them, which is right, which words.
  for (const form of document.querySelectorAll("form.filter")) {
    const rows = [...form.nextElementSibling.querySelectorAll("tbody tr")];
    const apply = () => {
      const [first, second, right] = ["first", "second", "right"].map((name) => form.elements[name].value);
      const words = form.elements.text.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        const given = row.dataset.given.split(" ");
        const one = first === "" ? given : [given[first]];
        const other = second === "" ? given : [given[second]];
        const fits = one.some((a) =>
          (right === "" || (a === row.dataset.right) === (right === "1")) && other.some((b) => a !== b));
        row.hidden = !fits || (words !== "" && !row.textContent.toLowerCase().includes(words));
        shown += !row.hidden;
      }
      form.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
    };
    for (const kind of ["input", "change"]) form.addEventListener(kind, apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // The section that is being read is marked in the list of sections.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) links.get(target.id)?.setAttribute("aria-current", "true");
      else links.get(target.id)?.removeAttribute("aria-current");
    }
  }, { rootMargin: "0px 0px -75% 0px" });
  for (const section of document.querySelectorAll("section")) watch.observe(section);

  addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details:not([open])")) {
      folded.open = true;
      folded.dataset.folded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const folded of document.querySelectorAll("details[data-folded]")) {
      folded.open = false;
      delete folded.dataset.folded;
    }
  });
})();
