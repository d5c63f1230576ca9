// A new token is shown once, where it was made.
export function showOnce() {
  const form = document.querySelector("form[data-shows]");
  form?.addEventListener("done", ({ detail }) => {
    const box = document.querySelector(form.dataset.shows);
    box.querySelector("code").textContent = detail.secret;
    box.querySelector(".of").textContent = detail.token.name;
    box.hidden = false;
    box.focus();
    form.reset();
  });
}
