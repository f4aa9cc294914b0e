"use strict";
// The page of `dinov2 visualize --viewer`. Every scan has a grid of patches [h, w, d], numbered with h running fastest as in NIfTI:
// cell = i + h * (j + w * k). Layers of a scan: 0 the image, 1 a map on the patch grid (heat), 2 the colours of PCA.
(async function () {
  const given = JSON.parse(document.getElementById("data").textContent);
  const MODES = ["pca", "attention", "similarity", "none"];
  const VIEWS = ["all", "axial", "coronal", "sagittal", "render"];
  const at = (id) => document.getElementById(id);
  const state = { mode: "pca", head: given.heads.length - 1, opacity: 0.65, view: "all", scan: 0, cell: null };

  function bytes(base64) {
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  }

  // ---------------------------------------------------------------- arithmetic

  function lengthsOf(tokens, width) {
    const out = new Float32Array(tokens.length / width);
    for (let n = 0; n < out.length; n++) {
      let sum = 0;
      for (let e = 0; e < width; e++) sum += tokens[n * width + e] ** 2;
      out[n] = Math.sqrt(sum);
    }
    return out;
  }

  function similarity(asking, cell, other) {
    const width = given.width, query = asking.tokens.subarray(cell * width, (cell + 1) * width);
    const out = new Float32Array(other.lengths.length);
    for (let n = 0; n < out.length; n++) {
      let dot = 0;
      for (let e = 0; e < width; e++) dot += query[e] * other.tokens[n * width + e];
      out[n] = dot / Math.max(asking.lengths[cell] * other.lengths[n], 1e-12);
    }
    return out;
  }

  function times(matrix, point) {
    return matrix.slice(0, 3).map((row) => row[0] * point[0] + row[1] * point[1] + row[2] * point[2] + row[3]);
  }

  function cellAt(scan, mm) {
    const [i, j, k] = times(scan.to_grid, mm).map((v, a) => Math.min(scan.grid[a] - 1, Math.max(0, Math.round(v))));
    return i + scan.grid[0] * (j + scan.grid[1] * k);
  }

  function placeOf(scan, cell) {
    const [h, w] = scan.grid;
    return times(scan.affine, [cell % h, Math.floor(cell / h) % w, Math.floor(cell / (h * w))]);
  }

  function quantile(values, share) {
    const sorted = Float32Array.from(values).sort();
    return sorted[Math.min(sorted.length - 1, Math.round(share * (sorted.length - 1)))];
  }

  // ---------------------------------------------------------------- drawing

  function show(scan) {
    const heat = scan.nv.volumes[1], colours = scan.nv.volumes[2];
    let values = null;
    if (state.mode === "attention") values = scan.attention[state.head];
    if (state.mode === "similarity" && state.cell !== null) values = similarity(scans[state.scan], state.cell, scan);
    scan.values = values;
    if (values) {
      heat.img.set(values);
      const [low, high] = (state.mode === "similarity" ? [0.65, 0.9995] : [0.8, 0.998]).map((share) => quantile(values, share));
      heat.cal_min = low;
      heat.cal_max = high > low ? high : low + 1e-6;
    }
    heat.opacity = values ? state.opacity : 0;
    colours.opacity = state.mode === "pca" ? state.opacity : 0;
    scan.nv.updateGLVolume();
    describe(scan);
  }

  function describe(scan) {
    const number = (v) => v.toFixed(Math.abs(v) < 0.01 ? 5 : 2);
    const millimetres = (p) => p.map((v) => v.toFixed(0)).join(", ") + " mm";
    let said = { pca: "Principal components 2 to 4 of the patches as red, green and blue, where the first says foreground.",
      attention: "", similarity: "Click a place in a scan.", none: "" }[state.mode];
    if (state.mode === "attention") said = `Attention of the class token, ${given.heads[state.head]}.`;
    if (state.mode === "similarity" && scan.values) {
      const asking = scans[state.scan];
      said = `Similarity to the patch at ${millimetres(placeOf(asking, state.cell))}` + (asking === scan ? "." : ` of ${asking.name}.`);
      let best = 0;
      for (let n = 1; n < scan.values.length; n++) if (scan.values[n] > scan.values[best]) best = n;
      if (asking !== scan) said += ` Most similar: ${millimetres(placeOf(scan, best))}, cosine ${scan.values[best].toFixed(2)}.`;
      scan.best = best;
    }
    if (scan.values) said += ` Colours from ${number(scan.nv.volumes[1].cal_min)} to ${number(scan.nv.volumes[1].cal_max)}.`;
    scan.said.textContent = said;
  }

  function moveTo(scan, mm) {
    scan.nv.scene.crosshairPos = scan.nv.mm2frac(mm, 0, true); // true: of the world, also where the scan is oblique
    scan.nv.drawScene();
  }

  function refresh() {
    for (const name of MODES) at("mode-" + name).setAttribute("aria-pressed", String(state.mode === name));
    at("head-label").hidden = state.mode !== "attention";
    at("head").value = String(state.head);
    at("opacity").value = String(Math.round(state.opacity * 100));
    at("view").value = state.view;
    scans.forEach(show);
  }

  // a place of one scan asks: the map of both follows, and the other one goes to what is most like it
  function ask(index, mm) {
    const cell = cellAt(scans[index], mm);
    if (state.scan === index && state.cell === cell) return;
    state.scan = index;
    state.cell = cell;
    if (state.mode !== "similarity") return;
    scans.forEach(show);
    scans.forEach((scan, i) => { if (i !== index) moveTo(scan, placeOf(scan, scan.best)); });
  }

  function setMode(mode) { state.mode = mode; refresh(); }
  function setHead(head) { state.head = (head + given.heads.length) % given.heads.length; refresh(); }
  function setOpacity(value) { state.opacity = Math.min(1, Math.max(0, value)); refresh(); }
  function setView(view) {
    state.view = view;
    at("view").value = view;
    for (const { nv } of scans) {
      nv.setSliceType({ all: nv.sliceTypeMultiplanar, axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal,
        sagittal: nv.sliceTypeSagittal, render: nv.sliceTypeRender }[view]);
    }
  }

  function step(axis, sign) {
    const scan = scans[state.scan], h = scan.grid[0], w = scan.grid[1];
    const cell = state.cell ?? cellAt(scan, scan.middle);
    const place = [cell % h, Math.floor(cell / h) % w, Math.floor(cell / (h * w))];
    const rows = scan.affine.slice(0, 3).map((row) => row.slice(0, 3));
    const along = [0, 1, 2].reduce((best, a) => (Math.abs(rows[axis][a]) > Math.abs(rows[axis][best]) ? a : best), 0);
    place[along] = Math.min(scan.grid[along] - 1, Math.max(0, place[along] + sign * Math.sign(rows[axis][along] || 1)));
    const mm = times(scan.affine, place);
    moveTo(scan, mm);
    ask(state.scan, mm);
  }

  const KEYS = {
    1: () => setMode("pca"), 2: () => setMode("attention"), 3: () => setMode("similarity"), 0: () => setMode("none"),
    h: () => setHead(state.head + 1), v: () => setView(VIEWS[(VIEWS.indexOf(state.view) + 1) % VIEWS.length]),
    "+": () => setOpacity(state.opacity + 0.1), "=": () => setOpacity(state.opacity + 0.1), "-": () => setOpacity(state.opacity - 0.1),
    ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1), ArrowDown: () => step(1, -1), ArrowUp: () => step(1, 1),
    PageDown: () => step(2, -1), PageUp: () => step(2, 1),
  };
  document.addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const inField = ["SELECT", "INPUT"].includes(event.target.tagName);
    if (!KEYS[key] || event.ctrlKey || event.metaKey || event.altKey || (inField && key.length > 1)) return;
    event.preventDefault();
    event.stopPropagation();
    KEYS[key]();
  }, true);
  for (const type of ["keyup", "keypress"]) document.addEventListener(type, (event) => event.stopPropagation(), true);

  // ---------------------------------------------------------------- start

  async function open(scan, index) {
    const box = document.createElement("section");
    box.className = "scan";
    box.innerHTML = '<h2></h2><div class="canvas"><canvas tabindex="0"></canvas></div><p class="said" aria-live="polite"></p><p></p>';
    box.querySelector("h2").textContent = scan.name;
    box.querySelector("p:last-child").textContent = scan.note;
    box.querySelector("canvas").setAttribute("aria-label", scan.name);
    at("scans").append(box);
    scan.said = box.querySelector(".said");
    const packed = bytes(scan.tokens);
    scan.tokens = new Int8Array(packed.buffer);
    scan.lengths = lengthsOf(scan.tokens, given.width);
    scan.attention = scan.attention.map((head) => Float32Array.from(bytes(head.values), (v) => v * head.scale));
    const nv = new niivue.Niivue({ logLevel: "silent", dragAndDropEnabled: false, isOrientCube: false, show3Dcrosshair: true,
      crosshairColor: [0.3, 0.79, 0.94, 0.9], crosshairWidth: 0.5, crosshairGap: 7, backColor: [0, 0, 0, 1], multiplanarShowRender: 1,
      multiplanarLayout: 2, isColorbar: false, loadingText: "", isRuler: false });
    scan.nv = nv;
    nv.onLocationChange = (location) => { if (ready) ask(index, Array.from(location.mm).slice(0, 3)); };
    await nv.attachToCanvas(box.querySelector("canvas"));
    const layers = [["image", "gray", 1], ["map", "inferno", 0], ["colours", "gray", 0]];
    for (const [key, colormap, opacity] of layers) {
      const range = key === "image" ? { cal_min: 0, cal_max: 255 } : key === "map" ? { cal_min: 0, cal_max: 1 } : {};
      nv.addVolume(await niivue.NVImage.loadFromBase64({ base64: scan[key], name: key + ".nii.gz", colormap, opacity, ...range }));
      scan[key] = null;
    }
    moveTo(scan, scan.middle);
  }

  let ready = false;
  const scans = given.scans;
  for (const name of given.heads) at("head").append(new Option(name, String(at("head").length)));
  for (const name of MODES) at("mode-" + name).addEventListener("click", () => setMode(name));
  at("head").addEventListener("change", (event) => setHead(Number(event.target.value)));
  at("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  at("view").addEventListener("change", (event) => setView(event.target.value));
  window.viewer = { state, scans, ask, placeOf, ready: false };
  try {
    for (let i = 0; i < scans.length; i++) await open(scans[i], i);
  } catch (error) {
    at("scans").textContent = "This browser cannot draw the scans (WebGL 2 is needed): " + error.message;
    throw error;
  }
  state.cell = cellAt(scans[0], scans[0].middle);
  ready = true;
  refresh();
  window.viewer.ready = true;
})();
