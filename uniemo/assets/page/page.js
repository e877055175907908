// What one sees and clicks. The computation is in engine.js.
import { centralSquare, fade, loadModel, toImageData } from "./engine.js";

const $ = (id) => document.getElementById(id);
const percent = (x) => `${Math.round(100 * x)}%`;
const plain = (name) => name.replaceAll("_", " ").toLowerCase();
let model = null;

function make(tag, settings = {}, ...children) {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...children);
  return element;
}

function show(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// one thing at a time, and a message where something fails
let queue = Promise.resolve();
function busy(errorPlace, work) {
  queue = queue.then(async () => {
    document.body.dataset.state = "busy";
    $("paint").disabled = true;
    show(errorPlace, "");
    try {
      await work();
    } catch (error) {
      show(errorPlace, error.message);
    }
    $("paint").disabled = false;
    document.body.dataset.state = "ready";
  });
  return queue;
}

// the browser draws what has changed before the next step is computed
function nextFrame() {
  return new Promise((resolve) => {
    const late = setTimeout(resolve, 50);
    requestAnimationFrame(() => {
      clearTimeout(late);
      setTimeout(resolve, 0);
    });
  });
}

// ---- reading

async function readFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name || "this file"} is no picture that this browser can open`);
  }
  await showReading(centralSquare(bitmap));
}

function draw(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

async function showReading(square) {
  const begin = performance.now();
  const read = await model.read(square);
  const seconds = (performance.now() - begin) / 1000;
  const best = Math.max(...read.probabilities);
  const names = `scene: ${plain(read.scene)}; object: ${plain(read.object)}`;
  $("sentence").replaceChildren(
    make("strong", { textContent: read.emotion }),
    ` ${percent(best)} · ${names} · ${seconds.toFixed(2)} s`,
  );
  const unlike = "This picture is unlike all that the model was trained on: do not rely on what it says.";
  show("unlike", read.distance > 1 ? unlike : "");
  const whole = Float32Array.of(1);
  draw($("look-picture"), fade(square, whole, 192, 1));
  for (const kind of ["scene", "object"]) {
    draw($(`look-${kind}`), fade(square, read.maps[kind], 192));
  }
  const rows = model.settings.emotions.map((emotion, e) => {
    const share = read.probabilities[e];
    const bar = make("div", { className: "bar" });
    bar.style.width = `${100 * share}%`;
    const row = make(
      "tr",
      { className: share === best ? "best" : "" },
      make("th", { scope: "row", textContent: emotion }),
      make("td", {}, bar),
      make("td", { className: "share", textContent: percent(share) }),
    );
    row.dataset.value = share;
    return row;
  });
  $("probabilities").tBodies[0].replaceChildren(...rows);
  Object.assign($("read-result").dataset, {
    scene: read.scene,
    object: read.object,
    distance: read.distance,
    seconds,
  });
  $("read-result").hidden = false;
}

function offerSamples() {
  for (const { file, title } of model.settings.samples) {
    const image = make("img", { src: `samples/${file}`, alt: `sample: ${title}`, title });
    const button = make("button", { type: "button" }, image);
    button.addEventListener("click", () =>
      busy("read-error", async () => readFile(await (await fetch(image.src)).blob())),
    );
    $("samples").append(button);
  }
}

function acceptFiles() {
  const take = (file) => file && busy("read-error", () => readFile(file));
  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    // the same file again is a change, too
    $("file").value = "";
  });
  const drop = $("drop");
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}

// ---- painting

function mixture() {
  const first = document.querySelector("#emotions input:checked").value;
  const second = $("second").value;
  const share = Number($("share").value);
  if (!second || second === first || share === 0) return { [first]: 1 };
  if (share === 1) return { [second]: 1 };
  return { [first]: 1 - share, [second]: share };
}

function pythonLine(wish) {
  const names = Object.entries(wish.mixture);
  const mixed = names.map(([name, share]) => `"${name}": ${Number(share.toFixed(2))}`).join(", ");
  const what = names.length === 1 ? `"${names[0][0]}"` : `{${mixed}}`;
  const settings = [what, `prompt=${JSON.stringify(wish.prompt)}`, `seed=${wish.seed}`];
  settings.push(`num_inference_steps=${wish.steps}`);
  if (wish.intensity !== 1) settings.push(`intensity=${wish.intensity}`);
  return `pipe.generate(${settings.join(", ")})`;
}

async function paint() {
  const wish = {
    mixture: mixture(),
    prompt: $("prompt").value,
    seed: Number($("seed").value),
    steps: Number($("steps").value),
    intensity: Number($("intensity").value),
  };
  const side = model.settings.side;
  const begin = performance.now();
  for (const id of ["judged", "same", "code", "save"]) $(id).hidden = true;
  $("film").replaceChildren();
  delete $("paint-result").dataset.seconds;
  const made = await model.paint(wish, async (step, steps, picture) => {
    const image = toImageData(picture, side);
    draw($("picture"), image);
    const small = make("canvas", { title: `step ${step}` });
    draw(small, image);
    $("film").append(small);
    $("step").textContent = `step ${step} of ${steps}`;
    $("paint-result").hidden = false;
    await nextFrame();
  });
  const image = toImageData(made.picture, side);
  draw($("picture"), image);
  const seconds = (performance.now() - begin) / 1000;
  const square = centralSquare(await createImageBitmap(image));
  const read = await model.read(square);
  const wanted = Object.keys(wish.mixture).map((name) => model.settings.emotions.indexOf(name));
  const faith = wanted.map((e) => `${model.settings.emotions[e]} ${percent(read.probabilities[e])}`);
  const found = `${plain(made.scene)} and ${plain(made.object)}`;
  $("step").textContent = `${wish.steps} steps in ${seconds.toFixed(1)} s; the word drawn is of ${found}.`;
  show("judged", `The model reads in it: ${faith.join(", ")}.`);
  $("same").hidden = false;
  show("code", pythonLine(wish));
  $("save").href = $("picture").toDataURL("image/png");
  $("save").hidden = false;
  $("paint-result").dataset.seconds = seconds;
}

function offerWishes() {
  const { emotions, words, steps, seeds, scenes, objects } = model.settings;
  emotions.forEach((name, e) => {
    const input = make("input", { type: "radio", name: "emotion", value: name, checked: e === 0 });
    $("emotions").append(make("label", {}, input, make("span", { textContent: name })));
    $("second").append(make("option", { value: name, textContent: name }));
  });
  const sorted = [...steps].sort((a, b) => a - b);
  sorted.forEach((n) => $("steps").append(make("option", { textContent: n, selected: n === steps[0] })));
  $("seed").max = seeds - 1;
  for (const name of [...objects, ...scenes]) {
    $("ideas").append(make("option", { value: `<emotion> ${plain(name)}` }));
  }
  for (const word of Object.keys(words)) {
    const button = make("button", { type: "button", textContent: word });
    button.addEventListener("click", () => ($("prompt").value = `${$("prompt").value.trim()} ${word}`));
    $("words").append(button);
  }
  const follow = (id) => ($(`${id}-out`).textContent = Number($(id).value).toFixed(2));
  for (const id of ["share", "intensity"]) $(id).addEventListener("input", () => follow(id));
  $("second").addEventListener("change", () => ($("share").disabled = !$("second").value));
  $("wish").addEventListener("submit", (event) => {
    event.preventDefault();
    busy("paint-error", paint);
  });
}

// ---- begin

async function begin() {
  const start = performance.now();
  try {
    model = await loadModel((share) => {
      $("progress").value = share;
    });
  } catch (error) {
    document.body.dataset.state = "failed";
    const local = location.protocol === "file:";
    const remedy = local ? "Open it through a server, such as: python -m http.server" : error.message;
    $("status").className = "error";
    $("status").textContent = `The page could not be loaded. ${remedy}`;
    return;
  }
  const seconds = (performance.now() - start) / 1000;
  show("warning", model.settings.warning);
  $("home").hidden = !model.settings.home;
  if (model.settings.home) $("home").href = model.settings.home;
  $("status").textContent = `Model “${model.settings.title}”, ready after ${seconds.toFixed(1)} s.`;
  offerSamples();
  acceptFiles();
  offerWishes();
  $("paint").disabled = false;
  document.body.dataset.loadSeconds = seconds;
  document.body.dataset.state = "ready";
}

begin();
