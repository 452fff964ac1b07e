// Figures of the charts inside `element` follow the pointer.
function followCharts(element) {
  const text = (v) => Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(4));
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  let rest = () => {};
  element.addEventListener("pointermove", (event) => {
    rest();
    const svg = event.target.closest(".chart svg");
    if (!svg) return;
    const figure = svg.closest(".chart"), rule = svg.querySelector(".rule");
    const cells = [...figure.querySelectorAll("output"), figure.querySelector(".at")];
    const before = cells.map((cell) => cell.textContent);
    rest = () => {
      cells.forEach((cell, i) => { cell.textContent = before[i]; });
      rule.setAttribute("hidden", "");
      rest = () => {};
    };
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = JSON.parse(figure.dataset.curves).map((points) => nearest(points, x));
    near.forEach((point, i) => { cells[i].textContent = text(point[3]); });
    const first = nearest(near, x);
    cells.at(-1).textContent = "step " + text(first[2]);
    rule.setAttribute("x1", first[0]); rule.setAttribute("x2", first[0]); rule.removeAttribute("hidden");
  });
  element.addEventListener("pointerleave", () => rest());
}
