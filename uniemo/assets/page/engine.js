// What the page computes: a picture is read, an emotion is painted. No framework, no server.
// Everything comes from files beside this one; the networks run in onnxruntime-web.
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

const NETWORKS = ["reader", "words", "text", "denoiser", "decoder"];
const PLACEHOLDER = "<emotion>";

// ---- files

async function fetchBytes(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`${path} could not be loaded (${answer.status})`);
  return new Uint8Array(await answer.arrayBuffer());
}

// some servers unpack .gz files on the way, most do not
async function unpack(bytes) {
  const packed = bytes[0] === 0x1f && bytes[1] === 0x8b;
  if (!packed) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---- pictures

// round half to even, as Python does
function round(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// for each place of the result the first place of the input that counts, and the weights
function taps(size, target) {
  const scale = size / target;
  const spread = Math.max(scale, 1);
  const found = [];
  for (let i = 0; i < target; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - 2 * spread + 0.5));
    const end = Math.min(size, Math.floor(centre + 2 * spread + 0.5));
    const weights = [];
    for (let j = first; j < end; j++) weights.push(cubic((j - centre + 0.5) / spread));
    const sum = weights.reduce((a, b) => a + b, 0);
    found.push({ first, weights: weights.map((w) => w / sum) });
  }
  return found;
}

// bicubic with antialiasing, rows then columns, bytes in between: the resampling of the training
export function resize(pixels, [width, height], [newWidth, newHeight], channels, bytes = true) {
  const settle = bytes ? (x) => Math.min(255, Math.max(0, Math.round(x))) : (x) => x;
  const wide = new Float32Array(newWidth * height * channels);
  taps(width, newWidth).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) {
          sum += weights[k] * pixels[(y * width + first + k) * channels + c];
        }
        wide[(y * newWidth + x) * channels + c] = settle(sum);
      }
    }
  });
  const out = new Float32Array(newWidth * newHeight * channels);
  taps(height, newHeight).forEach(({ first, weights }, y) => {
    for (let x = 0; x < newWidth; x++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) {
          sum += weights[k] * wide[((first + k) * newWidth + x) * channels + c];
        }
        out[(y * newWidth + x) * channels + c] = settle(sum);
      }
    }
  });
  return out;
}

// RGB of the central square of an image, on white where it is transparent
export function centralSquare(bitmap) {
  const side = Math.min(bitmap.width, bitmap.height);
  const left = Math.min(round((bitmap.width - side) / 2), bitmap.width - side);
  const top = Math.min(round((bitmap.height - side) / 2), bitmap.height - side);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, side, side);
  context.drawImage(bitmap, -left, -top);
  const rgba = context.getImageData(0, 0, side, side).data;
  const rgb = new Uint8Array(side * side * 3);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) rgb[i * 3 + c] = rgba[i * 4 + c];
  }
  return { rgb, side };
}

// ---- the model

class Model {
  constructor(settings, sessions, draws) {
    this.settings = settings;
    this.sessions = sessions;
    this.draws = draws;
  }

  async run(name, inputs) {
    const tensors = {};
    for (const [key, [data, shape]] of Object.entries(inputs)) {
      const kind = data instanceof BigInt64Array ? "int64" : "float32";
      tensors[key] = new ort.Tensor(kind, data, shape);
    }
    const out = await this.sessions[name].run(tensors);
    return Object.fromEntries(Object.entries(out).map(([key, tensor]) => [key, tensor.data]));
  }

  // ---- reading

  async read({ rgb, side }) {
    const { side: wanted, mean, std } = this.settings.encoder;
    const small = resize(rgb, [side, side], [wanted, wanted], 3);
    const pixels = new Float32Array(3 * wanted * wanted);
    for (let c = 0; c < 3; c++) {
      for (let i = 0; i < wanted * wanted; i++) {
        pixels[c * wanted * wanted + i] = (small[i * 3 + c] / 255 - mean[c]) / std[c];
      }
    }
    const out = await this.run("reader", { pixel_values: [pixels, [1, 3, wanted, wanted]] });
    const best = (values) => values.indexOf(Math.max(...values));
    return {
      probabilities: Array.from(out.probabilities),
      emotion: this.settings.emotions[best(out.probabilities)],
      scene: this.settings.scenes[best(out.scene)],
      object: this.settings.objects[best(out.object)],
      maps: { scene: out.scene_map, object: out.object_map },
      distance: out.distance[0],
    };
  }

  // ---- painting

  // token ids of a prompt, and where the emotion's word stands
  tokenize(prompt, wordTokens) {
    const { words, tokens } = this.settings;
    const ids = [tokens.start];
    const places = [];
    const parts = prompt.toLowerCase().match(/<[^<>]*>|\p{L}+|[^\s\p{L}]/gu) || [];
    for (const part of parts) {
      if (part === PLACEHOLDER) {
        for (let k = 0; k < wordTokens; k++) places.push(ids.length + k);
        ids.push(...Array(wordTokens).fill(0));
      } else if (Object.hasOwn(words, part)) {
        ids.push(...words[part]);
      } else {
        throw new Error(`this model has no word “${part}”: see the words that it knows`);
      }
    }
    ids.push(tokens.end);
    if (ids.length > tokens.length) {
      throw new Error(`this prompt has ${ids.length} tokens, the model reads ${tokens.length}`);
    }
    while (ids.length < tokens.length) ids.push(tokens.pad);
    return { ids, places };
  }

  // weights of all emotions, of {name: share}
  weights(mixture) {
    const total = Object.values(mixture).reduce((a, b) => a + b, 0);
    return Float32Array.from(this.settings.emotions, (name) => (mixture[name] || 0) / total);
  }

  // features c, s, o of a mixture and a seed, as the emotion space draws them
  features(weights, seed) {
    const { mean, deviation } = this.draws;
    const wide = 3 * this.settings.width;
    const sum = new Float32Array(wide);
    weights.forEach((weight, e) => {
      if (!weight) return;
      const start = (seed * weights.length + e) * wide;
      for (let i = 0; i < wide; i++) {
        sum[i] += weight * mean[e * wide + i] + Math.sqrt(weight) * deviation[start + i];
      }
    });
    return ["c", "s", "o"].map((name, k) => [name, sum.slice((k * wide) / 3, ((k + 1) * wide) / 3)]);
  }

  async states(texts, word, count) {
    const length = this.settings.tokens.length;
    const width = word.length / count;
    const ids = new BigInt64Array(texts.length * length);
    const mask = new BigInt64Array(texts.length * length);
    const values = new Float32Array(texts.length * length * width);
    texts.forEach((text, row) => {
      const found = this.tokenize(text, count);
      found.ids.forEach((id, i) => (ids[row * length + i] = BigInt(id)));
      found.places.forEach((place, k) => {
        mask[row * length + place] = 1n;
        const from = (k % count) * width;
        values.set(word.subarray(from, from + width), (row * length + place) * width);
      });
    });
    const shape = [texts.length, length];
    const inputs = { ids: [ids, shape], mask: [mask, shape], values: [values, [...shape, width]] };
    return (await this.run("text", inputs)).states;
  }

  async decode(latents) {
    return (await this.run("decoder", { latents: [latents, [1, ...this.settings.latents]] })).picture;
  }

  // wish: mixture, prompt, seed, steps, intensity; onStep(step, steps, picture) may wait
  async paint(wish, onStep = async () => {}) {
    const { seeds, guidance, schedules, latents: shape, width } = this.settings;
    const { prompt, seed, steps, intensity = 1 } = wish;
    if (!(Number.isInteger(seed) && seed >= 0 && seed < seeds)) {
      throw new Error(`a seed is a whole number from 0 to ${seeds - 1}`);
    }
    if (!prompt.includes(PLACEHOLDER)) {
      throw new Error(`the prompt needs a place for the emotion: write ${PLACEHOLDER}`);
    }
    const schedule = schedules[steps];
    if (!schedule) throw new Error(`steps are one of ${Object.keys(schedules).join(", ")}`);

    // 1. the word of the emotion
    const weights = this.weights(wish.mixture);
    const inputs = { weights: [weights, [1, weights.length]] };
    for (const [name, values] of this.features(weights, seed)) inputs[name] = [values, [1, width]];
    const drawn = await this.run("words", inputs);
    const count = this.settings.wordTokens;

    // 2. prompts: of nothing, without the emotion, with it
    const neutral = prompt.replaceAll(PLACEHOLDER, " ").trim();
    const texts = intensity === 1 ? ["", prompt] : ["", neutral, prompt];
    const states = await this.states(texts, drawn.words, count);
    const stateShape = [texts.length, this.settings.tokens.length, states.length / texts.length];
    stateShape[2] /= stateShape[1];

    // 3. denoise
    const size = shape.reduce((a, b) => a * b, 1);
    const vectors = [this.draws.noise.slice(seed * size, (seed + 1) * size)];
    for (let i = 0; i < steps; i++) {
      const latents = combine(schedule.latents[i], vectors);
      const batch = new Float32Array(texts.length * size);
      const scaled = latents.map((x) => x * schedule.scales[i]);
      texts.forEach((_, k) => batch.set(scaled, k * size));
      const out = await this.run("denoiser", {
        latents: [batch, [texts.length, ...shape]],
        timestep: [
          BigInt64Array.from(texts, () => BigInt(schedule.timesteps[i])),
          [texts.length],
        ],
        states: [states, stateShape],
      });
      vectors.push(guide(out.prediction, size, guidance, intensity));
      await onStep(i + 1, steps, await this.decode(combine(schedule.clean[i], vectors)));
    }
    return {
      picture: await this.decode(combine(schedule.latents[steps], vectors)),
      scene: this.settings.scenes[Number(drawn.scene[0])],
      object: this.settings.objects[Number(drawn.object[0])],
    };
  }
}

// a row of the scheduler's table times the noise and the predictions
function combine(row, vectors) {
  const sum = new Float32Array(vectors[0].length);
  row.forEach((number, k) => {
    const vector = vectors[k];
    for (let i = 0; i < sum.length; i++) sum[i] += number * vector[i];
  });
  return sum;
}

// away from nothing, and from the prompt without its emotion
function guide(predictions, size, scale, intensity) {
  const parts = predictions.length / size;
  const guided = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    const nothing = predictions[i];
    const full = predictions[(parts - 1) * size + i];
    const plain = parts === 3 ? predictions[size + i] : full;
    guided[i] = nothing + scale * (plain - nothing + intensity * (full - plain));
  }
  return guided;
}

// RGBA of a picture [3, side, side] in [0, 1]
export function toImageData(picture, side) {
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < 3; c++) {
      image.data[i * 4 + c] = round(picture[c * side * side + i] * 255);
    }
    image.data[i * 4 + 3] = 255;
  }
  return image;
}

// RGBA of a square, faded to white where a map is low
export function fade({ rgb, side }, map, target, floor = 0.12) {
  const grid = Math.sqrt(map.length);
  const low = Math.min(...map);
  const range = Math.max(Math.max(...map) - low, 1e-12);
  const even = Float32Array.from(map, (x) => (x - low) / range);
  const large = resize(even, [grid, grid], [target, target], 1, false);
  const small = resize(rgb, [side, side], [target, target], 3);
  const image = new ImageData(target, target);
  for (let i = 0; i < target * target; i++) {
    const colour = floor + (1 - floor) * Math.min(1, Math.max(0, large[i]));
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = 255 - (255 - small[i * 3 + c]) * colour;
    image.data[i * 4 + 3] = 255;
  }
  return image;
}

// ---- loading

// onProgress(share from 0 to 1)
export async function loadModel(onProgress = () => {}) {
  const settings = JSON.parse(new TextDecoder().decode(await fetchBytes("model.json")));
  const paths = ["runtime/ort-wasm-simd-threaded.wasm.gz", "draws.bin"];
  paths.push(...NETWORKS.map((name) => `models/${name}.onnx`));
  let loaded = 0;
  const contents = await Promise.all(
    paths.map(async (path) => {
      const bytes = await fetchBytes(path);
      loaded += 1;
      onProgress((0.6 * loaded) / paths.length);
      return bytes;
    }),
  );
  const [runtime, table, ...networks] = contents;
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await unpack(runtime)).buffer;
  const sessions = {};
  for (const [k, name] of NETWORKS.entries()) {
    onProgress(0.6 + (0.4 * k) / NETWORKS.length);
    sessions[name] = await ort.InferenceSession.create(networks[k], { executionProviders: ["wasm"] });
  }
  onProgress(1);
  return new Model(settings, sessions, tables(settings, table));
}

function tables(settings, bytes) {
  const numbers = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  const wide = 3 * settings.width;
  const mean = settings.emotions.length * wide;
  const deviation = mean + settings.seeds * settings.emotions.length * wide;
  return {
    mean: numbers.subarray(0, mean),
    deviation: numbers.subarray(mean, deviation),
    noise: numbers.subarray(deviation),
  };
}
