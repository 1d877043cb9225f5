"use strict";

// The slider between the two orders of an image.
for (const range of document.querySelectorAll(".compare input")) {
  const show = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", show);
  show(); // a browser may remember another value over a reload
}
