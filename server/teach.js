
// -- tabs ------------------------------------------------------------------------------------------------------------

const FEWEST = 3; // pictures of a class
const GOOD = 10; // pictures of a class that are a good number
const SIDE = 1024; // pixels that a picture is made smaller to before it is sent
const BETWEEN_MS = 700; // between two pictures of "Take ten"
const TABS = ["look", "teach"];
const tray = []; // the pictures of the class: {blob, url}
let judging = false; // a question about them is on its way
let stale = false; // they have changed since
let judged = ""; // what was asked last
let eye = null; // the camera's stream in the Teach tab
let lastTaught = null; // its name, for Undo
let obstacle = false; // nothing can be taught to this bundle

function showTab(name) {
  for (const tab of TABS) {
    $(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    $(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
    $(`view-${tab}`).hidden = tab !== name;
  }
  if (name === "teach") {
    stop();
    taught();
    gallery();
  } else {
    closeEye();
  }
}

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => showTab(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = TABS[(TABS.indexOf(tab) + 1) % TABS.length];
    showTab(other);
    $(`tab-${other}`).focus();
  });
}

function admin() {
  const token = $("teach-token").value || $("token").value;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

// -- pictures of the class -------------------------------------------------------------------------------------------

async function smaller(picture) {
  const image = await createImageBitmap(picture);
  const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

async function add(pictures) {
  problem("teach-problem", "");
  for (const picture of pictures) {
    try {
      const blob = await smaller(picture);
      tray.push({ blob, url: URL.createObjectURL(blob) });
    } catch {
      problem("teach-problem", `${picture.name || "The picture"} is no picture that this browser can read.`);
    }
  }
  layOut();
}

function thumbnail(url, name) {
  return element("img", { src: url, alt: name });
}

function layOut() {
  $("teach-tray").replaceChildren(...tray.map((picture, i) => {
    const off = element("button", { type: "button", className: "off", textContent: "×", ariaLabel: `Leave picture ${i + 1} out` });
    off.addEventListener("click", () => {
      tray.splice(tray.indexOf(picture), 1);
      URL.revokeObjectURL(picture.url);
      layOut();
    });
    return element("li", {}, thumbnail(picture.url, `picture ${i + 1}`), off);
  }));
  $("teach-clear").disabled = !tray.length;
  judge();
}

function empty() {
  for (const picture of tray.splice(0)) URL.revokeObjectURL(picture.url);
  layOut();
}

function form() {
  const made = new FormData();
  tray.forEach((picture, i) => made.append("image", picture.blob, `picture ${i + 1}`));
  return made;
}

async function judge() {
  const name = $("teach-name").value.trim();
  $("teach-count").replaceChildren(tray.length ? `${tray.length}${tray.length > GOOD ? "" : ` of ${GOOD}`} pictures` : element("span", { className: "note", textContent: "No picture yet." }));
  $("teach-go").disabled = tray.length === 0 || !name;
  if (judging) {
    stale = true;
    return;
  }
  const asked = [name, admin().Authorization, ...tray.map((picture) => picture.url)].join();
  if (asked === judged) return; // a field was left as it was
  judged = asked;
  $("teach-figures").replaceChildren(bar("pictures", tray.length / GOOD, `${tray.length}`));
  if (tray.length < FEWEST || !name || !admin().Authorization) {
    const missing = tray.length < FEWEST ? `at least ${FEWEST} pictures` : name ? "the token" : "a name";
    $("teach-sentence").textContent = `To be judged it needs ${missing}.`;
    return;
  }
  judging = true;
  $("teach-sentence").textContent = `Judging ${tray.length} pictures …`;
  try {
    figures(await ask(`/enrolments/judge?${new URLSearchParams({ name })}`, { method: "POST", body: form(), headers: admin() }));
    problem("teach-problem", "");
  } catch (error) {
    $("teach-sentence").textContent = "";
    problem("teach-problem", error.message);
  }
  judging = false;
  if (stale) {
    stale = false;
    judge();
  }
}

function figures(found) {
  const own = found.leave_one_out;
  const { selftest, means } = found.old_classes;
  const share = (value) => `${value.toFixed(0)} %`;
  $("teach-figures").replaceChildren(
    bar("pictures", found.pictures / GOOD, `${found.pictures}`),
    bar("recognised", own.accuracy / 100, share(own.accuracy)),
    bar("at least", own.low / 100, share(own.low)),
    bar("others kept", 1 - Math.max(selftest.drop, means.drop) / 100, share(100 - Math.max(selftest.drop, means.drop))),
  );
  $("teach-sentence").textContent = own.sentence;
}

$("teach-files").addEventListener("change", () => { add([...$("teach-files").files]).then(() => { $("teach-files").value = ""; }); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("teach-drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("teach-drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add([...event.dataTransfer.files]);
  });
}
for (const id of ["teach-name", "teach-token"]) $(id).addEventListener("change", () => { judge(); gallery(); });
$("teach-name").addEventListener("input", () => { $("teach-go").disabled = tray.length === 0 || !$("teach-name").value.trim(); });
$("teach-clear").addEventListener("click", empty);

// -- its camera ------------------------------------------------------------------------------------------------------

async function openEye() {
  eye = await openCamera("teach-problem");
  if (!eye) return;
  $("teach-video").srcObject = eye;
  await $("teach-video").play();
  eyeIs(true);
}

function closeEye() {
  if (!eye) return;
  for (const track of eye.getTracks()) track.stop();
  eye = null;
  eyeIs(false);
}

function eyeIs(open) {
  $("teach-video").hidden = !open;
  $("teach-hint").hidden = open;
  $("teach-one").disabled = $("teach-ten").disabled = !open;
  $("teach-camera").textContent = open ? "Stop the camera" : "Use the camera";
  $("teach-camera").setAttribute("aria-pressed", String(open));
}

async function takeFrames(count) {
  $("teach-one").disabled = $("teach-ten").disabled = true;
  for (let i = 0; i < count && eye; i++) {
    await add([$("teach-video")]);
    if (i + 1 < count) await new Promise((done) => setTimeout(done, BETWEEN_MS));
  }
  $("teach-one").disabled = $("teach-ten").disabled = !eye;
}

$("teach-camera").addEventListener("click", () => (eye ? closeEye() : openEye()));
$("teach-one").addEventListener("click", () => takeFrames(1));
$("teach-ten").addEventListener("click", () => takeFrames(GOOD));

// -- teach, undo -----------------------------------------------------------------------------------------------------

async function alter(path, body, doing, done) {
  problem("teach-problem", "");
  $("teach-state").textContent = doing;
  $("teach-go").disabled = $("teach-undo").disabled = true;
  try {
    const answer = await ask(path, { method: "POST", body, headers: admin() });
    $("teach-state").textContent = `${done} Version ${answer.version} answers now.`;
    await state();
    await taught();
    return answer;
  } catch (error) {
    $("teach-state").textContent = "";
    if (error.status === 401) $("teach-token").focus();
    problem("teach-problem", error.message);
    return null;
  } finally {
    $("teach-go").disabled = tray.length === 0;
    $("teach-undo").disabled = false;
  }
}

$("teach-go").addEventListener("click", async () => {
  const name = $("teach-name").value.trim();
  const query = new URLSearchParams({ name });
  const answer = await alter(`/enrolments?${query}`, form(), `Teaching ${name} …`, `${name} is learnt.`);
  if (!answer) return;
  figures(answer.taught);
  lastTaught = name;
  $("teach-undo").hidden = false;
  $("teach-undo").textContent = `Undo: take ${name} out`;
  for (const picture of tray.splice(0)) URL.revokeObjectURL(picture.url);
  $("teach-tray").replaceChildren();
  judged = "";
  $("teach-clear").disabled = $("teach-go").disabled = true;
});

async function takeOut(name) {
  const query = new URLSearchParams({ name });
  const answer = await alter(`/enrolments/remove?${query}`, null, `Taking ${name} out …`, `${name} is taken out.`);
  if (!answer || name !== lastTaught) return;
  $("teach-undo").hidden = true;
  judged = ""; // what stands there was of the class that is gone
  judge();
}

$("teach-undo").addEventListener("click", () => takeOut(lastTaught));

async function taught() {
  const found = await ask("/enrolments").catch(() => ({ enrolments: [] }));
  obstacle = Boolean(found.obstacle);
  problem("teach-obstacle", obstacle ? `This bundle learns no class here: ${found.obstacle}.` : "");
  $("teach-pictures").inert = obstacle;
  choose();
  const counts = new Map();
  for (const entry of found.enrolments) counts.set(entry.name, (counts.get(entry.name) || 0) + entry.images);
  $("taught").replaceChildren(...[...counts].map(([name, images]) => {
    const out = element("button", { type: "button", textContent: "Take out", ariaLabel: `Take ${name} out` });
    out.addEventListener("click", () => takeOut(name));
    return element("li", {}, element("span", { textContent: `${name}, ${images} pictures` }), out);
  }));
  if (!counts.size) $("taught").replaceChildren(element("li", {}, element("span", { className: "note", textContent: "Nothing yet." })));
  const known = await ask("/classes").catch(() => ({ tasks: [] }));
  $("teach-names").replaceChildren(...known.tasks.flatMap((task) => task.classes).map((value) => element("option", { value })));
}

// -- pictures worth keeping ------------------------------------------------------------------------------------------

const shownPictures = new Map(); // id -> its blob

async function gallery() {
  problem("gallery-problem", "");
  let found;
  try {
    found = await ask("/collected", { headers: admin() });
  } catch (error) {
    $("gallery-note").textContent = error.status === 404 ? "This server keeps no pictures; start it with --collect DIR."
      : "Pictures that got no sure answer. Give the token to see them.";
    return;
  }
  for (const id of [...shownPictures.keys()]) if (!found.pictures.some((p) => p.id === id)) shownPictures.delete(id);
  const mebibytes = (bytes) => (bytes && bytes < 104858 ? "less than 0.1" : (bytes / 1048576).toFixed(1));
  $("gallery-note").textContent = `Pictures that got no sure answer: ${found.pictures.length}. With the sorted ones they take ` +
    `${mebibytes(found.bytes)} of ${(found.most_bytes / 1048576).toFixed(0)} MiB.`;
  const before = chosen();
  $("gallery-pictures").replaceChildren(...found.pictures.map((picture) => {
    const box = element("input", { type: "checkbox", value: picture.id, checked: before.includes(picture.id) });
    box.addEventListener("change", choose);
    const image = element("img", { alt: picture.label });
    lookAt(picture.id, image);
    const text = picture.unknown ? "unknown" : `${picture.label} ${(100 * picture.confidence).toFixed(0)} %`;
    return element("li", {}, element("label", {}, image, box, text));
  }));
  const sorted = Object.entries(found.sorted).map(([name, count]) => `${name} ${count}`);
  $("gallery-sorted").textContent = sorted.length ? `Sorted: ${sorted.join(", ")}.` : "";
  choose();
}

async function pictureOf(id) {
  if (!shownPictures.has(id)) {
    const answer = await fetch(`/collected/picture?${new URLSearchParams({ id })}`, { headers: admin() }).catch(() => null);
    if (!answer || !answer.ok) return null;
    shownPictures.set(id, await answer.blob());
  }
  return shownPictures.get(id);
}

async function lookAt(id, image) {
  const blob = await pictureOf(id);
  if (!blob) return;
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
}

const chosen = () => [...$("gallery-pictures").querySelectorAll("input:checked")].map((box) => box.value);

function choose() {
  const some = chosen().length > 0;
  $("gallery-row").hidden = !$("gallery-pictures").children.length;
  $("gallery-sort").disabled = !some || !$("gallery-name").value.trim();
  $("gallery-teach").disabled = $("gallery-sort").disabled || obstacle;
  $("gallery-discard").disabled = !some;
}

async function move(to, name) {
  const query = new URLSearchParams(chosen().map((id) => ["id", id]));
  if (name) query.set("name", name);
  try {
    await ask(`/collected/${to}?${query}`, { method: "POST", headers: admin() });
  } catch (error) {
    problem("gallery-problem", error.message);
    return;
  }
  await gallery();
}

$("gallery-name").addEventListener("input", choose);
$("gallery-sort").addEventListener("click", () => move("sort", $("gallery-name").value.trim()));
$("gallery-discard").addEventListener("click", () => move("discard"));
$("gallery-teach").addEventListener("click", async () => {
  const name = $("gallery-name").value.trim();
  $("teach-name").value = name;
  // Also those that have not come yet: a picture that is sorted away without being taught would be lost to the class.
  await add((await Promise.all(chosen().map(pictureOf))).filter(Boolean));
  await move("sort", name);
});

layOut();
