// A key presses the button or follows the link that names it, unless somebody is writing.
"use strict";
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target instanceof Element && event.target.closest("input, textarea, select")) return;
  for (const one of document.querySelectorAll("[data-key]")) {
    if (one.dataset.key === event.key.toLowerCase()) {
      event.preventDefault();
      one.click();
      return;
    }
  }
});
