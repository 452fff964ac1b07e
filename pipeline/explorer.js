// The latent explorer: a pad on which a dot roams the latent space, and the picture that is decoded there.
//
// root: an empty element. data: LatentMap.for_browser(). backend, all asynchronous:
//   decode(z)        -> something to draw: an image element or ImageData; z is an array of D numbers
//   encode(number)   -> {mean, std} of a preset picture; std is null where the encoder gives no distribution
//   deviation(z)     -> {std} that the encoder gives to what is decoded at z
// One request is in flight at a time, and the newest wish wins.
function latentExplorer(root, data, backend) {
  "use strict";
  const LIGHT = ["#b4552d", "#2f6f8f", "#5b8c3a", "#a5334f", "#7a5ba6", "#b98a12", "#23897f", "#c2629a", "#6b6257", "#4560bd"];
  const DARK = ["#ec9465", "#6fb6d8", "#9bcf76", "#ee7f95", "#b99be6", "#e6bd52", "#5fcabd", "#eda0ca", "#bdb2a4", "#92a6f2"];
  const JITTER = matchMedia("(prefers-reduced-motion: reduce)").matches ? 800 : 90; // ms between two samples
  const DEVIATION = 150; // ms between two questions for the deviation, at least
  const numbers = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const mean = numbers(data.mean), size = mean.length, flat = numbers(data.directions);
  const directions = data.shares.map((_, k) => flat.subarray(k * size, (k + 1) * size));
  const names = data.axes === "code" ? ["z₁", "z₂"] : data.shares.map((_, k) => `PC ${k + 1}`);
  const z = Float64Array.from(mean); // where the dot is; everything else follows from it
  let std = null, stale = true, asked = 0; // the deviation (D) there, whether the dot has moved on since, and when we asked
  let eps = new Float64Array(size), vae = false, trail = [], preset = -1, lit = null;
  const sliders = [];
  let fresh = true, held = null, wanted = 0, shown = 0, frames = 0, times = [], running = false;

  const decimals = (x) => x.toFixed(2).replace("-", "\u2212"); // a minus, not a hyphen

  // What is on the page

  const make = (tag, name, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), { className: name ? `lx-${name}` : "" });
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const [ground, canvas] = [0, 1].map(() => make("canvas", "", { "aria-hidden": "true" })); // points stay, the dot moves
  const pad = make("div", "pad", {
    role: "slider", tabindex: "0", "aria-label": "Place in the latent space; arrow keys move it",
    "aria-roledescription": "two-dimensional slider", "aria-valuemin": -data.range, "aria-valuemax": data.range,
  }, ground, canvas);
  const picture = make("canvas", "picture", {
    role: "img", "aria-label": "The picture decoded there", width: data.size[1], height: data.size[0],
  });
  if (Math.max(...data.size) > 128) picture.style.imageRendering = "auto";
  const readout = make("output", "readout"), rate = make("span", "rate", { "aria-hidden": "true" });
  const note = make("p", "note", { role: "status" });
  const side = make("div", "side", {}, make("div", "frame", {}, picture), make("div", "line", {}, readout, rate), note);
  const legend = make("div", "legend", { role: "group", "aria-label": "Classes; press one to see it alone" });
  const presets = make("div", "presets", { role: "group", "aria-label": "Pictures to encode" });
  root.classList.add("lx");
  root.replaceChildren(
    make("div", "start", {}, make("span", "heading", {}, "Encode a picture, or drag the dot"), presets),
    make("div", "plane", {}, pad, legend), side);

  function addSwitch() {
    const box = make("input", "", { type: "checkbox", role: "switch" });
    box.addEventListener("change", () => {
      vae = box.checked;
      eps.fill(0);
      trail = [[0, 0]];
      want();
    });
    const words = make("span", "", {}, make("b", "", {}, "VAE mode"), " the code is a distribution, its samples jitter");
    side.append(make("label", "switch", {}, box, words));
  }

  function addSlider(title, about, low, high, read, write) {
    const range = make("input", "", { type: "range", min: low, max: high, step: (high - low) / 400, "aria-label": about });
    const value = make("output", "");
    range.addEventListener("input", () => {
      write(Number(range.value));
      moved(range);
    });
    sliders.push((source) => {
      if (source !== range) range.value = read();
      value.textContent = decimals(read());
    });
    side.append(make("div", "slider", {}, title, range, value));
  }

  function addSliders() {
    names.forEach((name, k) => {
      const about = data.axes === "code" ? `Number ${k + 1} of the code` : `Principal component ${k + 1}`;
      addSlider(make("span", "", {}, name), about, -data.range, data.range, () => along(k), (to) => move(k, to - along(k)));
    });
    if (data.axes === "code") return;
    const which = make("input", "which", { type: "number", min: 1, max: size, value: 1, "aria-label": `Which of the ${size} numbers of the code` });
    const at = () => Math.min(size, Math.max(1, Math.round(which.value) || 1)) - 1;
    const title = make("span", "", {}, "z", which);
    addSlider(title, "That number of the code", -data.limit / 2, data.limit / 2, () => z[at()], (to) => (z[at()] = to));
    which.addEventListener("input", refresh);
  }

  function addPresets() {
    data.pictures.forEach((source, i) => {
      const name = data.classes[data.pictureLabels[i]];
      const about = `Encode picture ${i + 1}${name === undefined ? "" : `: ${name}`}`;
      const button = make("button", "preset", { type: "button", "aria-label": about, title: about, "aria-pressed": "false" },
        make("img", "", { alt: "", src: source, draggable: "false" }));
      button.addEventListener("click", () => encode(i));
      presets.append(button);
    });
    const centre = make("button", "chip", { type: "button" }, data.axes === "code" ? "go to 0, 0" : "go to the mean");
    centre.addEventListener("click", () => {
      z.set(mean);
      moved();
    });
    root.firstChild.append(centre);
  }

  function addLegend() {
    data.classes.forEach((name, i) => {
      const chip = make("button", "chip", { type: "button", "aria-pressed": "false" }, make("i", ""), name);
      chip.addEventListener("click", () => {
        lit = lit === i ? null : i;
        [...legend.children].forEach((other, j) => other.setAttribute("aria-pressed", String(lit === j)));
        paintGround();
      });
      legend.append(chip);
    });
    legend.hidden = !data.classes.length;
  }

  // The code

  const along = (k, code = z) => directions[k].reduce((sum, d, i) => sum + d * (code[i] - mean[i]), 0);
  const move = (k, by) => directions[k].forEach((d, i) => (z[i] += by * d));
  const place = (code = z) => [along(0, code), directions[1] ? along(1, code) : 0];
  const clamp = (x, most) => Math.min(most, Math.max(-most, x));
  const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  const sample = () => (vae && std ? z.map((x, i) => x + std[i] * eps[i]) : z);
  const rounded = (code) => Array.from(code, (x) => Math.round(x * 1e4) / 1e4);
  const spread = (k) => (directions[k] ? Math.sqrt(directions[k].reduce((sum, d, i) => sum + (d * std[i]) ** 2, 0)) : 0);

  function moveTo(x, y) {
    const [px, py] = place();
    move(0, clamp(x, data.range) - px);
    if (directions[1]) move(1, clamp(y, data.range) - py);
    moved();
  }

  function moved(source) {
    stale = true;
    arrived(-1, source);
  }

  function arrived(number, source) {
    choose(number);
    held = source;
    want();
  }

  function choose(i) {
    if (preset === i) return;
    preset = i;
    [...presets.children].forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
  }

  async function encode(i) {
    try {
      const found = await backend.encode(i);
      z.set(found.mean);
      [std, stale] = [found.std, false];
      arrived(i);
    } catch (error) {
      complain(error);
    }
  }

  // Frames

  function want() {
    wanted += 1;
    refresh();
    if (!running) run();
  }

  function refresh() { // once for each frame of the screen, however often the pointer moves
    if (!fresh) return;
    fresh = false;
    requestAnimationFrame(() => {
      fresh = true;
      sliders.forEach((show) => show(held));
      paint();
    });
  }

  async function run() {
    running = true;
    while (wanted !== shown && root.isConnected) {
      const number = wanted;
      try {
        if (vae && stale && performance.now() - asked > DEVIATION) await askDeviation();
        const [drawn] = await Promise.all([backend.decode(rounded(sample())), nextFrame()]);
        show(drawn);
        shown = number;
      } catch (error) {
        complain(error);
        await new Promise((resolve) => setTimeout(resolve, 400));
      }
    }
    running = false;
  }

  async function askDeviation() {
    [asked, stale] = [performance.now(), false];
    std = (await backend.deviation(rounded(z))).std;
    refresh();
  }

  const nextFrame = () => new Promise((resolve) => requestAnimationFrame(resolve));

  function show(drawn) {
    const context = picture.getContext("2d");
    if (drawn instanceof ImageData) context.putImageData(drawn, 0, 0);
    else context.drawImage(drawn, 0, 0, picture.width, picture.height);
    root.dataset.frames = ++frames;
    times = [...times, performance.now()].filter((time) => time > performance.now() - 1000);
    note.textContent = "";
  }

  function complain(error) {
    note.textContent = String(error.message || error);
  }

  function tick() {
    if (!root.isConnected) return timers.forEach(clearInterval);
    times = times.filter((time) => time > performance.now() - 1000);
    rate.textContent = times.length > 5 ? `${times.length} frames/s` : "";
  }

  function jitter() {
    if (!vae || !root.offsetParent) return;
    eps = eps.map(normal);
    const at = place();
    trail = [...trail, place(sample()).map((x, k) => x - at[k])].slice(-24); // offsets: it follows the dot
    want();
  }

  // Painting

  let unit = 1, middle = 0, scale = 1, look = {};
  const onPad = ([x, y]) => [middle + x * unit, middle - y * unit];
  const colour = (i) => {
    if (i < 0) return look.subdued;
    if (data.classes.length <= LIGHT.length) return (look.dark ? DARK : LIGHT)[i];
    return `hsl(${(i * 137.5) % 360} ${look.dark ? 65 : 55}% ${(look.dark ? 62 : 38) + 8 * ((i % 3) - 1)}%)`;
  };

  function resize() {
    if (!pad.clientWidth) return; // in a tab that is not shown
    scale = window.devicePixelRatio || 1;
    const side = Math.round(pad.clientWidth * scale);
    for (const layer of [ground, canvas]) layer.width = layer.height = side;
    [middle, unit] = [side / 2, side / 2 / data.range];
    repaint();
  }

  function repaint() {
    const style = getComputedStyle(root), [r, g, b] = style.color.match(/[\d.]+/g).map(Number);
    const [line, subdued, paper, accent] = ["line", "subdued", "paper", "accent"].map((name) => style.getPropertyValue(`--lx-${name}`));
    look = { dark: r + g + b > 384, line, subdued, paper, accent, ink: style.color, font: style.fontFamily };
    [...legend.children].forEach((chip, i) => chip.firstChild.style.setProperty("background", colour(i)));
    paintGround();
    paint();
  }

  function paintGround() {
    const context = ground.getContext("2d");
    context.clearRect(0, 0, ground.width, ground.height);
    paintGrid(context);
    data.points.forEach((point, i) => {
      const hidden = lit !== null && data.labels[i] !== lit;
      context.globalAlpha = hidden ? 0.08 : 0.62;
      context.fillStyle = colour(data.labels[i]);
      context.beginPath();
      context.arc(...onPad(point), (hidden ? 1.6 : 2.6) * scale, 0, 7);
      context.fill();
    });
    context.globalAlpha = 1;
    paintNames(context);
  }

  function paintGrid(context) {
    const ten = 10 ** Math.floor(Math.log10(data.range)), step = data.range / ten > 5 ? 2 * ten : data.range / ten > 2 ? ten : ten / 2;
    const last = Math.floor(data.range / step);
    context.font = `${11 * scale}px ${look.font}`;
    for (let n = -last; n <= last; n++) {
      const [x, y] = onPad([n * step, n * step]), far = canvas.width;
      context.globalAlpha = n ? 0.45 : 1;
      context.fillStyle = look.line;
      context.fillRect(Math.round(x), 0, Math.ceil(scale), far);
      context.fillRect(0, Math.round(y), far, Math.ceil(scale));
      [context.globalAlpha, context.fillStyle, context.textAlign] = [0.8, look.subdued, "left"];
      if (!n || Math.abs(n) * step > 0.93 * data.range) continue;
      context.fillText(String(n * step).replace("-", "\u2212"), x + 4 * scale, far - 7 * scale);
      context.fillText(String(n * step).replace("-", "\u2212"), 6 * scale, y - 4 * scale);
    }
  }

  function paintNames(context) {
    const share = (k) => (data.axes === "code" ? "" : ` · ${(100 * data.shares[k]).toFixed(0)} %`);
    const write = (words, align, x, y) => {
      context.textAlign = align;
      context.strokeText(words, x, y);
      context.fillText(words, x, y);
    };
    Object.assign(context, { fillStyle: look.ink, strokeStyle: look.paper, lineWidth: 5 * scale, lineJoin: "round" });
    context.font = `600 ${12 * scale}px ${look.font}`;
    write(names[0] + share(0), "right", canvas.width - 10 * scale, middle - 8 * scale);
    if (names[1]) write(names[1] + share(1), "left", middle + 8 * scale, 18 * scale);
  }

  function paint() {
    const at = place(), words = names.slice(0, 2).map((name, k) => `${name} = ${decimals(at[k])}`).join(", ");
    readout.textContent = words;
    pad.setAttribute("aria-valuenow", at[0].toFixed(2));
    pad.setAttribute("aria-valuetext", words);
    if (!middle) return;
    const context = canvas.getContext("2d"), samples = vae && std;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (samples) paintEllipse(context, at);
    if (!samples) paintDot(context, at, 9, look.accent);
    else trail.forEach(([dx, dy], i) => paintSample(context, [at[0] + dx, at[1] + dy], (i + 1) / trail.length));
  }

  function paintEllipse(context, at) {
    [context.fillStyle, context.strokeStyle, context.lineWidth] = [look.accent, look.accent, 1.5 * scale];
    for (const deviations of [2, 1]) {
      context.beginPath();
      context.ellipse(...onPad(at), deviations * spread(0) * unit, deviations * spread(1) * unit, 0, 0, 7);
      context.globalAlpha = 0.13;
      context.fill();
      context.globalAlpha = 0.9;
      context.stroke();
    }
    context.globalAlpha = 1;
  }

  function paintSample(context, at, age) {
    if (age === 1) return paintDot(context, at, 4.5, look.accent);
    context.globalAlpha = 0.9 * age;
    context.fillStyle = look.ink;
    context.beginPath();
    context.arc(...onPad(at), 2.4 * scale, 0, 7);
    context.fill();
    context.globalAlpha = 1;
  }

  function paintDot(context, at, radius, fill) {
    for (const [grow, shade] of [[3, look.ink], [2, look.paper], [0, fill]]) {
      context.beginPath();
      context.arc(...onPad(at), (radius + grow) * scale, 0, 7);
      context.fillStyle = shade;
      context.fill();
    }
  }

  // Hands

  let box = null, half = 1; // where the pad is, while it is held

  function follow(event) {
    moveTo(((event.clientX - box.left - half) / half) * data.range, ((box.top + half - event.clientY) / half) * data.range);
  }

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    pad.focus({ preventScroll: true });
    [box, half] = [pad.getBoundingClientRect(), pad.clientWidth / 2];
    follow(event);
    event.preventDefault();
  });
  pad.addEventListener("pointermove", (event) => pad.hasPointerCapture(event.pointerId) && follow(event));
  pad.addEventListener("keydown", (event) => {
    const step = (event.shiftKey ? 0.1 : 0.02) * data.range, [x, y] = place();
    const moves = {
      ArrowLeft: [x - step, y], ArrowRight: [x + step, y], ArrowUp: [x, y + step], ArrowDown: [x, y - step], Home: [0, 0],
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moveTo(...moves[event.key]);
  });

  if (data.noise) addSwitch();
  addSliders();
  addPresets();
  addLegend();
  const timers = [setInterval(jitter, JITTER), setInterval(tick, 250)];
  new ResizeObserver(resize).observe(pad);
  for (const element of [document.documentElement, document.body]) new MutationObserver(repaint).observe(element, { attributes: true, attributeFilter: ["class"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  want();
}
