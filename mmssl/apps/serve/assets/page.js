"use strict";
// What comes from data (captions, labels, words) reaches the page as textContent only.
(() => {
  const $ = (id) => document.getElementById(id);
  const status = $("status");
  const FIRST = 24; // hits of a request that names no number
  const SAID_FOR = 8000; // milliseconds; what goes on, or went wrong, stays
  let limits = null, chosen = null, shownUrl = null, turn = 0, fade = 0;

  function say(words, { bad = false, stay = bad } = {}) {
    status.classList.toggle("bad", bad);
    status.textContent = words;
    clearTimeout(fade);
    if (!stay) fade = setTimeout(() => { status.textContent = ""; }, SAID_FOR);
  }

  // Addresses are relative to the page, so that it works under a prefix too.
  async function ask(path, body) {
    const response = await fetch(path, body ? { method: "POST", body } : {}).catch(() => {
      throw new Error("The server does not answer. Is it still running?");
    });
    const answer = await response.json().catch(() => ({ detail: `The server answered with status ${response.status}.` }));
    if (!response.ok) throw new Error(answer.detail);
    return answer;
  }

  // One thing at a time for each button: pressed twice, it does its work once.
  async function work(button, words, task) {
    if (button.getAttribute("aria-busy") === "true") return;
    button.setAttribute("aria-busy", "true");
    say(words, { stay: true });
    try {
      say(await task());
    } catch (error) {
      say(error.message, { bad: true });
    } finally {
      button.removeAttribute("aria-busy");
    }
  }

  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function form(fields, image = chosen) {
    const body = new FormData();
    body.append("image", image);
    for (const [name, value] of fields) body.append(name, value);
    return body;
  }

  // Hits

  // A comma separates conditions where another one follows; others belong to a value.
  const conditions = () => $("where").value.split(/,(?=[^,]*[=<>~])/).map((text) => text.trim()).filter(Boolean);

  // `fields` are those of the request, an image goes as a form.
  async function find(title, path, fields, image = null) {
    const mine = ++turn, only = conditions();
    const sent = [...fields, ...only.map((text) => ["where", text])];
    const { hits } = await (image ? ask(path, form(sent, image)) : ask(`${path}?${new URLSearchParams(sent)}`));
    if (mine !== turn) return ""; // a later search has been started
    $("found-title").textContent = only.length ? `${title}, only ${only.join(", ")}` : title;
    $("nothing").hidden = hits.length > 0;
    $("nothing").textContent = only.length ? "No image meets the condition." : "The index holds no images.";
    $("hits").replaceChildren(...hits.map(card));
    const wanted = fields.some(([name]) => name === "k");
    $("more").hidden = wanted || !limits || hits.length < FIRST || limits.hits <= FIRST;
    $("more").onclick = () =>
      work($("more"), "Searching.", () => find(title, path, [...fields, ["k", limits.hits]], image));
    if (!wanted && $("found").getBoundingClientRect().top > innerHeight * 0.6) $("found").scrollIntoView();
    return hits.length ? `${hits.length} ${hits.length === 1 ? "image" : "images"}, the most similar first.` : "";
  }

  function card(hit) {
    const item = $("hit").content.cloneNode(true);
    const words = hit.caption || hit.key;
    const image = item.querySelector("img"), button = item.querySelector("button");
    image.alt = words;
    image.addEventListener("error", () => { // of a remote shard, gone or broken; the caption stays
      image.replaceWith(Object.assign(document.createElement("span"), { className: "missing", textContent: "cannot be shown here" }));
    });
    image.src = `api/images/${hit.row}`;
    item.querySelector(".caption").textContent = words;
    item.querySelector(".note").textContent = hit.match === null
      ? `similarity ${hit.similarity.toFixed(3)}`
      : `match ${percent(hit.match)}, similarity ${hit.similarity.toFixed(3)}`;
    const place = item.querySelector(".place");
    place.textContent = place.title = hit.caption ? `${hit.key} in ${hit.shard}` : `in ${hit.shard}`;
    button.setAttribute("aria-label", `More like this: ${words}`);
    button.addEventListener("click", () =>
      work(button, "Searching.", () => find(`Images like “${words}”`, `api/images/${hit.row}/nearest`, [])));
    return item;
  }

  $("find-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("text").value.trim();
    if (text) work(event.submitter ?? $("find-form").querySelector("button"), "Searching.", () =>
      find(`Images for “${text}”`, "api/search", [["text", text]]));
  });

  // One's own image

  function choose(file) {
    if (!file) return;
    if (limits && file.size > limits.upload_bytes - 4096) {
      say(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; the server takes ${(limits.upload_bytes / 2 ** 20).toFixed(0)}.`, { bad: true });
      return;
    }
    chosen = file;
    if (shownUrl) URL.revokeObjectURL(shownUrl);
    shownUrl = URL.createObjectURL(file);
    const image = Object.assign(document.createElement("img"), { src: shownUrl, alt: `Your image, ${file.name}` });
    image.addEventListener("error", () => image.replaceWith(file.name)); // TIFF, which browsers do not show
    $("shown").replaceChildren(image);
    $("shown").hidden = false;
    $("invitation").textContent = "Choose or drop another";
    $("tools").hidden = false;
    $("guesses").hidden = $("map").hidden = true;
    say("");
  }

  $("file").addEventListener("change", () => choose($("file").files[0]));
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // an image that misses the field must not be opened instead of the page
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") choose(event.dataTransfer.files[0]);
    });
  document.addEventListener("paste", (event) => choose([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));

  $("similar").addEventListener("click", () =>
    work($("similar"), "Searching.", () => find("Images like yours", "api/search", [], chosen)));

  // Labels and words, with bars

  function bar(text, value, share, press) {
    const item = document.createElement("li");
    const fill = Object.assign(document.createElement("span"), { className: "fill" });
    fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    const words = Object.assign(document.createElement(press ? "button" : "span"), { className: "text", textContent: text });
    if (press) {
      words.type = "button";
      words.title = "Show where it is";
      words.addEventListener("click", () => press(words));
    }
    item.append(fill, words, Object.assign(document.createElement("span"), { className: "p", textContent: value }));
    return item;
  }

  $("labels-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const labels = [...new Set($("labels").value.split(/[\n,]/).map((label) => label.trim()).filter(Boolean))];
    if (!labels.length) return;
    work(event.submitter ?? $("labels-form").querySelector("button"), "Classifying.", async () => {
      const { labels: guesses, none } = await ask("api/labels", form(labels.map((label) => ["labels", label])));
      $("guesses").replaceChildren(...guesses.map((guess) =>
        bar(guess.label, percent(guess.probability), guess.probability, (button) => {
          $("word").value = guess.label;
          locate(button, guess.label);
        })));
      if (none !== null) $("guesses").append(bar("none of these", percent(none), none));
      $("guesses").hidden = false;
      const best = `${guesses[0].label}, ${percent(guesses[0].probability)} among your labels`;
      if (none === null) return `Most likely ${best}.`;
      return none > 0.5 ? `Probably none of these (${percent(none)}); the nearest is ${best}.`
        : `Most likely ${best}; none of these: ${percent(none)}.`;
    });
  });

  function locate(button, text) {
    return work(button, "Looking. This takes a few seconds.", async () => {
      const found = await ask("api/map", form([["text", text]]));
      const said = `Orange is where the model sees “${text}”; similarity ${found.similarity.toFixed(3)}.`;
      $("overlay").src = found.overlay;
      $("overlay").alt = `Your image as the model sees it, with a map. ${placed(found.grid)}`;
      $("map-words").textContent = said;
      const most = Math.max(1e-9, ...found.words.map((word) => word.fall));
      $("words").replaceChildren(...found.words.map((word) =>
        bar(word.word, `${word.fall >= 0 ? "+" : "−"}${Math.abs(word.fall).toFixed(3)}`, word.fall / most)));
      $("words").hidden = found.words.length < 2;
      $("map").hidden = false;
      return `${said} ${placed(found.grid)}`;
    });
  }

  // Where the map is highest, in words, for those who do not see it.
  function placed(grid) {
    const rows = grid.length, columns = grid[0].length;
    let best = [0, 0];
    grid.forEach((row, y) => row.forEach((value, x) => { if (value > grid[best[0]][best[1]]) best = [y, x]; }));
    const third = (place, count, names) => names[Math.min(2, Math.floor((3 * (place + 0.5)) / count))];
    const across = third(best[1], columns, ["left", "middle", "right"]), down = third(best[0], rows, ["top", "middle", "bottom"]);
    return `It is strongest at the ${down === across ? "middle" : `${down} ${across}`}.`;
  }

  $("map-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("word").value.trim();
    if (text) locate(event.submitter ?? $("map-form").querySelector("button"), text);
  });

  ask("api/model").then((facts) => {
    limits = facts.limits;
    for (const id of ["text", "word"]) $(id).maxLength = limits.text_chars;
    const names = facts.fields.map((name) => (name.length > 40 ? `${name.slice(0, 39)}…` : name));
    $("fields").textContent = `Fields: ${["key", "caption", "shard", ...names].join(", ")}. ` +
      "Signs: = != < <= > >= and ~ for a part of a text.";
    const words = facts.images === null ? "no index, so nothing to search" : `${facts.images.toLocaleString("en")} images`;
    $("facts").textContent = `${words}; ${facts.vision}, ${facts.image_size} px, embeddings of length ${facts.dimensions}.`;
    if (facts.calibrated) $("probabilities").textContent = "Probabilities compare the labels you give. Matches and " +
      "“none of these” are calibrated on held-out images, half of which matched.";
    if (facts.images === null) {
      for (const id of ["find", "found", "similar"]) $(id).hidden = true;
      $("main").classList.add("alone");
    }
  }).catch((error) => say(error.message, { bad: true }));
})();
