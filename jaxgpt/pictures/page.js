"use strict";
// Tells what lies under the pointer or finger, and saves a picture. `values` has one readout per picture, in the order of
// the page: see readout.py.
const readouts = JSON.parse(document.getElementById("values").textContent);
const tip = document.getElementById("tip"), mark = document.getElementById("mark");

function percent(p) {
  return p >= 0.00005 || p === 0 ? (100 * p).toFixed(2) + "%" : "<0.01%";
}

// The cell of a readout at a place given as fractions of the picture, or null: its text, and where it lies.
function cell(readout, x, y) {
  const across = readout.columns.length, down = readout.rows.length;
  for (const [i, [name, left, top]] of readout.tiles.entries()) {
    const column = Math.floor((x - left) / readout.width * across), row = Math.floor((y - top) / readout.height * down);
    if (column < 0 || column >= across || row < 0 || row >= down) continue;
    let value = readout.texts[(i * down + row) * across + column];
    if (readout.weights) {
      readout.bytes ??= Uint8Array.from(atob(readout.weights), c => c.charCodeAt(0));
      const at = 2 * (i * down * (down + 1) / 2 + row * (row + 1) / 2 + column);
      value = column > row ? "not seen" : percent((readout.bytes[at] + 256 * readout.bytes[at + 1]) / 65535);
    }
    const place = [readout.rows[row], readout.columns[column]].join(", ");
    return {
      text: `${name && name + ": "}${place}: ${value}`, x: left + column * readout.width / across,
      y: top + row * readout.height / down, width: readout.width / across, height: readout.height / down,
    };
  }
  return null;
}

function hide() {
  tip.hidden = mark.hidden = true;
}

function show(svg, readout, event) {
  const box = svg.getBoundingClientRect();
  const found = cell(readout, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  if (!found) return hide();
  tip.hidden = mark.hidden = false;
  tip.textContent = found.text;
  mark.style.cssText = `left:${box.left + found.x * box.width}px;top:${box.top + found.y * box.height}px;` +
    `width:${found.width * box.width}px;height:${found.height * box.height}px`;
  // Above the finger or pointer, where there is room, and never beyond the window's edge.
  const above = event.clientY - tip.offsetHeight - 16, left = event.clientX - tip.offsetWidth / 2;
  tip.style.top = `${above > 0 ? above : event.clientY + 24}px`;
  tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
}

// The picture by itself, with the page's present colours in it.
function standalone(svg) {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.documentElement);
  const [ink, muted, paper] = ["--ink", "--muted", "--paper"].map(name => style.getPropertyValue(name).trim());
  const { width, height } = svg.viewBox.baseVal;
  copy.setAttribute("width", width * 4 / 3);
  copy.setAttribute("height", height * 4 / 3);
  copy.setAttribute("style", `color:${ink};--muted:${muted};--paper:${paper};background:${paper}`);
  copy.querySelectorAll("image").forEach(image => image.setAttribute("style", "image-rendering:pixelated"));
  return new XMLSerializer().serializeToString(copy);
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePng(svg) {
  const image = new Image(), { width, height } = svg.viewBox.baseVal;
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width * 8 / 3, height * 8 / 3];  // two pixels per CSS pixel
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--paper");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(blob => save(blob, `${svg.dataset.name}.png`));
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(standalone(svg));
}

for (const [i, svg] of document.querySelectorAll("figure svg").entries()) {
  const figure = svg.closest("figure"), caption = document.createElement("figcaption");
  const button = (label, act) => {
    const made = caption.appendChild(document.createElement("button"));
    made.textContent = label;
    made.addEventListener("click", () => act(made));
  };
  button("SVG", () => save(new Blob([standalone(svg)], { type: "image/svg+xml" }), `${svg.dataset.name}.svg`));
  button("PNG", () => savePng(svg));
  if (svg.getBoundingClientRect().width < parseFloat(svg.style.getPropertyValue("--width")) - 1)
    button("full size", made => {
      made.textContent = figure.classList.toggle("whole") ? "fit" : "full size";
      hide();
    });
  figure.append(caption);
  if (readouts[i]) {
    svg.addEventListener("pointermove", event => show(svg, readouts[i], event));
    svg.addEventListener("pointerdown", event => show(svg, readouts[i], event));
    svg.addEventListener("pointerleave", event => event.pointerType === "mouse" && hide());
  }
}
document.addEventListener("scroll", hide, true);
document.addEventListener("pointerdown", event => event.target.closest("figure svg") || hide());
