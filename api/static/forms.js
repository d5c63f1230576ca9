// A choice of a filter shows at once; without this the form's button does it. What was left empty stays out of the URL.
export function forms() {
  for (const form of document.querySelectorAll("form[data-live]")) {
    form.addEventListener("submit", () => {
      for (const field of form.elements) {
        if (field.name && (field.value === "" || field.value === field.dataset.default)) field.disabled = true;
      }
    });
    form.addEventListener("change", (event) => {
      if (event.target.matches("select, input[type=checkbox], input[type=radio]")) form.requestSubmit();
    });
  }
  // When the page comes back from the browser's memory, a field that was left out is there again, and a choice is what
  // the page shows, not what was chosen before leaving it.
  addEventListener("pageshow", () => {
    for (const form of document.querySelectorAll("form[data-live]")) form.reset();
    for (const field of document.querySelectorAll("form[data-live] :disabled")) field.disabled = false;
  });
}
