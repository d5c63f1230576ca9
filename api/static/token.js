// The token that this tab acts with: typed by a person, kept until the tab is closed, sent with what changes something.
const KEY = "tilewise-token";

export const token = () => sessionStorage.getItem(KEY);

export function forget() {
  sessionStorage.removeItem(KEY);
}

// Who signs in to look has typed the token that acts as well.
export function rememberSignIn() {
  const form = document.querySelector("form[data-sign-in]");
  form?.addEventListener("submit", () => sessionStorage.setItem(KEY, form.elements.token.value.trim()));
  document.querySelector("form[data-sign-out]")?.addEventListener("submit", forget);
}

// Asks for a token in a dialog; resolves to it, or to null where the person gave up.
export function ask(scope, fault) {
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-labelledby", "ask-token");
  dialog.innerHTML = `
    <form method="dialog" class="stacked">
      <h2 id="ask-token">A token, please</h2>
      <p class="fault bad" role="alert" hidden></p>
      <p>This needs a token with the scope <b class="scope"></b>. This tab keeps it until it is closed.</p>
      <label class="field"><span>Token</span>
        <input name="token" type="password" required maxlength="200" autocomplete="off" spellcheck="false"></label>
      <div class="buttons">
        <button class="primary" type="submit">Go on</button>
        <button type="button" class="give-up">Give up</button>
      </div>
    </form>`;
  dialog.querySelector(".scope").textContent = scope;
  const said = dialog.querySelector(".fault");
  said.hidden = !fault;
  said.textContent = fault ?? "";
  dialog.querySelector(".give-up").addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  return new Promise((resolve) => {
    let given = null;
    dialog.querySelector("form").addEventListener("submit", () => {
      given = dialog.querySelector("input").value.trim();
      sessionStorage.setItem(KEY, given);
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(given);
    });
    dialog.showModal();
  });
}
