// Show a mark's numbers on hovering, and on the arrow keys once a figure has the focus. All else works without scripts.
"use strict";
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
let current = null;

function show(mark) {
  hide();
  const box = mark.getBoundingClientRect();
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const left = Math.min(box.left + box.width / 2 + 10, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(8, left) + window.scrollX + "px";
  tip.style.top = box.top + window.scrollY - tip.offsetHeight - 8 + "px";
  mark.classList.add("current");
  current = mark;
}

function hide() {
  tip.hidden = true;
  if (current) current.classList.remove("current");
  current = null;
}

function marks(figure) {
  const all = figure.querySelectorAll(".mark-symbol [aria-label], .mark-rect [aria-label]");
  return [...all].filter((mark) => mark.getClientRects().length > 0);
}

function step(event) {
  const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") hide();
  if (!move) return;
  const all = marks(event.currentTarget);
  if (all.length === 0) return;
  event.preventDefault();
  const at = all.indexOf(current);
  show(all[at < 0 ? (move > 0 ? 0 : all.length - 1) : (at + move + all.length) % all.length]);
}

for (const picture of document.querySelectorAll("figure svg")) {
  const title = picture.closest("figure").dataset.title;
  picture.setAttribute("tabindex", "0");
  picture.setAttribute("aria-label", title + ". Arrow keys move from point to point.");
  picture.addEventListener("keydown", step);
  picture.addEventListener("blur", hide);
  picture.addEventListener("mouseover", (event) => {
    const mark = event.target.closest(".mark-symbol [aria-label], .mark-rect [aria-label]");
    if (mark && !mark.closest(".role-legend")) show(mark);
  });
  picture.addEventListener("mouseout", hide);
}
