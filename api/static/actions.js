// Forms that change something: <form data-action="/v1/jobs" data-method="POST" data-scope="tune" data-then="...">.
//
// The fields go as JSON to the same API that programs use, with this tab's token; one is asked for where it is wanted.
// {name} in data-action takes the field of that name out of the body; data-then is where to go when it is done ({a.b}
// takes a value of the reply), "stay" to stay, and by default the page is loaded again. data-confirm is asked before.
// What was refused is said at the form, what was typed stays.
import { ask, forget, token } from "./token.js";

export function actions() {
  for (const form of document.querySelectorAll("form[data-action]")) {
    for (const button of form.querySelectorAll("button[disabled]")) button.disabled = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (form.dataset.confirm && !confirm(form.dataset.confirm)) return;
      submit(form);
    });
  }
}

async function submit(form) {
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  say(form, "Working\u2026");
  try {
    const reply = await send(form);
    if (reply === null) say(form, "");
    else await done(form, reply);
  } catch (error) {
    say(form, error.message, error.retry);
    if (error.field) point(form, error.field);
  } finally {
    button.disabled = false;
  }
}

async function send(form, fault) {
  if (fault !== undefined && (await ask(form.dataset.scope, fault)) === null) return null;
  const { url, body } = request(form);
  const headers = { Accept: "application/json", "Content-Type": "application/json" };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  let reply;
  try {
    reply = await fetch(url, { method: form.dataset.method, headers, body: JSON.stringify(body) });
  } catch {
    throw new Error("The service cannot be reached. Whether it was done is not known: look before you try again.");
  }
  if (reply.ok) return reply;
  if (reply.status === 401) {
    const typed = token() !== null;
    forget();
    return send(form, typed ? "That token does not stand: it is mistyped, has ended or was revoked." : "");
  }
  throw await refusal(form, reply);
}

function request(form) {
  let url = form.dataset.action;
  const body = {};
  for (const field of form.elements) {
    if (!field.name || (field.type === "checkbox" && !field.checked)) continue;
    const place = `{${field.name}}`;
    if (url.includes(place)) url = url.replace(place, encodeURIComponent(field.value.trim()));
    else if (field.type === "checkbox") (body[field.name] ??= []).push(field.value);
    else if (field.value.trim() !== "") {
      body[field.name] = field.type === "number" ? Number(field.value) : field.value.trim();
    }
  }
  return { url, body };
}

async function refusal(form, reply) {
  let told = {};
  try {
    told = await reply.json();
  } catch {
    // no problem+json: a proxy answered
  }
  const error = new Error(told.detail ?? `The service answered ${reply.status}; nothing is known beyond that.`);
  error.field = told.field;
  if (reply.status === 403) error.retry = ["Use another token", () => again(form)];
  return error;
}

async function again(form) {
  forget();
  if ((await ask(form.dataset.scope)) !== null) submit(form);
}

async function done(form, reply) {
  const then = form.dataset.then ?? "";
  const told = reply.status === 204 ? {} : await reply.json();
  form.dispatchEvent(new CustomEvent("done", { detail: told }));
  if (then === "stay") say(form, "Done.");
  else if (then === "") location.reload();
  else location.assign(then.replace(/{([\w.]+)}/g, (_, path) => encodeURIComponent(path.split(".").reduce((a, b) => a[b], told))));
}

function say(form, text, retry) {
  let line = form.querySelector(".form-state");
  if (!line) {
    line = document.createElement("p");
    line.className = "form-state";
    line.setAttribute("role", "status");
    form.append(line);
  }
  line.replaceChildren(text);
  line.hidden = text === "";
  if (retry) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = retry[0];
    button.addEventListener("click", retry[1]);
    line.append(" ", button);
  }
}

function point(form, name) {
  const field = form.elements[name];
  if (!(field instanceof HTMLElement)) return;
  field.setAttribute("aria-invalid", "true");
  field.focus();
  field.addEventListener("input", () => field.removeAttribute("aria-invalid"), { once: true });
}
