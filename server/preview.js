"use strict";
// Asks for the frame behind the one that is shown, again and again; the server answers when there is one.
const $ = (id) => document.getElementById(id);

function show(answer) {
  $("label").textContent = answer.label;
  $("frame").hidden = false;
  const known = answer.unknown === true ? "looks like none of the classes" : "known";
  $("state").textContent = known;
  $("state").className = answer.unknown === true ? "badge warn" : "badge good";
  const prompts = answer.prompts.selected.length ? `, prompts ${answer.prompts.selected.join(", ")}` : "";
  $("about").textContent =
    `confidence ${(100 * answer.confidence).toFixed(1)} %, task ${answer.task + 1}, frame ${answer.frame}${prompts}`;
}

async function look() {
  let after = 0;
  for (;;) {
    try {
      const answer = await fetch(`/frame.jpg?after=${after}`);
      if (answer.status === 200) {
        const found = JSON.parse(answer.headers.get("x-answer"));
        const before = $("frame").src;
        $("frame").src = URL.createObjectURL(await answer.blob());
        if (before) URL.revokeObjectURL(before);
        after = found.frame;
        show(found);
      }
    } catch {
      $("state").textContent = "not watching any more";
      $("state").className = "badge warn";
      after = 0;
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

look();
