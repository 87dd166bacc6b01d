(() => {
  const source = document.getElementById("playback-data");
  if (!source) return;
  const { orders, labels } = JSON.parse(source.textContent);
  const [play, range, count, pick, speed, tiles] = ["play", "step", "count", "image", "speed", "tiles"].map((id) => document.getElementById(id));
  const steps = Math.max(...orders.map((o) => o.order.length));
  let step = Math.round(steps * 0.4), image = 0, timer = null, last = 0;

  labels.forEach((label, i) => pick.add(new Option(label ? `${i + 1}: ${label}` : `image ${i + 1}`, i)));
  range.max = steps;

  const views = orders.map((o) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
    const chip = document.createElement("i"), strip = new Image();
    const zoom = Math.max(1, Math.ceil(256 / Math.max(...o.size)));
    canvas.height = o.size[0] * zoom;
    canvas.width = o.size[1] * zoom;
    canvas.setAttribute("role", "img");
    canvas.style.setProperty("--cell-x", `${100 / o.grid[1]}%`);
    canvas.style.setProperty("--cell-y", `${100 / o.grid[0]}%`);
    chip.className = "chip";
    chip.style.background = `var(${o.colour})`;
    caption.append(chip, o.label);
    figure.append(canvas, caption);
    tiles.append(figure);
    strip.onload = () => draw();
    strip.src = o.strip;
    return { ...o, canvas, strip, chip };
  });

  // A cell's edges in pixels: rounded the same way on both sides, so that neighbours meet without a seam.
  const edge = (i, cells, pixels) => Math.round((i * pixels) / cells);

  function drawTile(view) {
    const context = view.canvas.getContext("2d"), { width, height } = view.canvas, [rows, columns] = view.grid, [h, w] = view.size;
    context.clearRect(0, 0, width, height);
    if (!view.strip.complete) return;
    context.imageSmoothingEnabled = false;
    const cell = (p) => {
      const r = Math.floor(p / columns), c = p % columns;
      const x = edge(c, columns, width), y = edge(r, rows, height);
      return [x, y, edge(c + 1, columns, width) - x, edge(r + 1, rows, height) - y];
    };
    const shown = view.order.slice(0, step);
    for (const p of shown) {
      const [x, y, dx, dy] = cell(p);
      context.drawImage(view.strip, image * w + (x * w) / width, (y * h) / height, (dx * w) / width, (dy * h) / height, x, y, dx, dy);
    }
    if (shown.length && step < view.order.length) {
      const [x, y, dx, dy] = cell(shown[shown.length - 1]);
      context.strokeStyle = getComputedStyle(view.chip).backgroundColor;
      context.lineWidth = Math.max(3, width / 80);
      context.strokeRect(x, y, dx, dy);
    }
    view.canvas.setAttribute("aria-label", `${view.label}: ${Math.min(step, view.order.length)} of ${view.order.length} cells shown`);
  }

  function draw() {
    views.forEach(drawTile);
    range.value = step;
    range.setAttribute("aria-valuetext", `step ${step} of ${steps}`);
    count.textContent = `step ${step} of ${steps}`;
  }

  function stop() {
    cancelAnimationFrame(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }

  function tick(now) {
    const due = Math.floor(((now - last) * speed.value) / 1000);
    if (due > 0) {
      last += (due * 1000) / speed.value;
      step = Math.min(steps, step + due);
      draw();
    }
    if (step >= steps) stop();
    else timer = requestAnimationFrame(tick);
  }

  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (step >= steps) step = 0;
    last = performance.now();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = requestAnimationFrame(tick);
  });
  range.addEventListener("input", () => { stop(); step = Number(range.value); draw(); });
  pick.addEventListener("change", () => { image = Number(pick.value); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.querySelector("#playback .controls").hidden = false;
  draw();
})();
