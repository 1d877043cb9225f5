"use strict";

// The slider between the two orders of a case.
for (const range of document.querySelectorAll(".compare input")) {
  const show = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", show);
  show(); // a browser may remember another value over a reload
}

// Which cases are shown.
const filter = document.getElementById("filter");
if (filter) {
  const cases = document.querySelectorAll(".case");
  const shown = document.getElementById("shown");
  const none = document.getElementById("none");
  const apply = () => {
    const section = filter.elements.section.value;
    const name = filter.elements.class.value;
    let count = 0;
    for (const item of cases) {
      const fits =
        (section === "" || item.dataset.section === section) &&
        (name === "" || item.dataset.classes.split(" ").includes(name));
      item.hidden = !fits;
      count += fits;
    }
    shown.textContent = count + " of " + cases.length + " cases";
    none.hidden = count > 0;
  };
  filter.addEventListener("change", apply);
  filter.addEventListener("submit", (event) => event.preventDefault());
  filter.hidden = false;
  apply();
}
