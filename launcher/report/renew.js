/* A page that renews itself: what its server shows is asked for every few seconds, and the page is loaded again if it
   differs. Hidden variants stay hidden; browsers keep the scroll position. */

const EVERY_MS = 3000;
const KEPT = "headway-hidden";
const before = sessionStorage.getItem(KEPT);
if (before) setHidden(JSON.parse(before).filter((name) => looks.has(name)));
const state = () => document.querySelector("[data-state]")?.dataset.state;

async function renew() {
  const note = document.querySelector(".server-note");
  try {
    const answer = await fetch("state", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    note?.remove();
    if ((await answer.text()) !== state()) {
      sessionStorage.setItem(KEPT, JSON.stringify([...hidden]));
      location.reload();
      return;
    }
  } catch {
    if (!note) {
      const text = "The server has ended: this page shows its last state.";
      document.querySelector("main").prepend(make("p", { class: "warn server-note", role: "status" }, text));
    }
  }
  setTimeout(renew, EVERY_MS);
}

setTimeout(renew, EVERY_MS);
