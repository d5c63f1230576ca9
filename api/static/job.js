// The page of a job, as it happens: <article data-job="ID" data-after="N"> is where the page ends, event N; what comes
// behind it arrives as server-sent events. Where the connection breaks or is refused (the service starts again, a proxy
// answers for it), this asks again from behind the last event until it is back; a browser by itself would give up.
import { localTimes } from "./times.js";

const STATES = ["queued", "running", "succeeded", "failed", "cancelled"];
const FIRST_WAIT = 1000;
const LONGEST_WAIT = 15000;
const SHOWN = 500; // lines of the log

export function watchJob() {
  const job = document.querySelector("[data-job]");
  if (job && !job.dataset.ended) new Watcher(job).listen();
}

class Watcher {
  constructor(job) {
    this.job = job;
    this.after = Number(job.dataset.after);
    this.wait = FIRST_WAIT;
    this.line = job.querySelector(".live");
    addEventListener("pagehide", () => this.source?.close());
    addEventListener("pageshow", (event) => event.persisted && this.listen());
  }

  listen() {
    this.source = new EventSource(`/v1/jobs/${this.job.dataset.job}/events?after=${this.after}`);
    this.source.addEventListener("open", () => {
      this.wait = FIRST_WAIT;
      this.say("Live: what happens shows here at once.");
    });
    this.source.addEventListener("error", () => this.lost());
    for (const state of STATES) this.source.addEventListener(state, (event) => this.happened(JSON.parse(event.data)));
  }

  lost() {
    this.say("The service is away. This page asks again until it is back; nothing is lost.");
    this.source.close();
    setTimeout(() => this.listen(), this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }

  say(text) {
    if (this.line.textContent !== text) this.line.textContent = text;
  }

  happened(event) {
    if (event.id <= this.after) return;
    this.after = event.id;
    const state = this.job.querySelector(".state");
    state.textContent = event.state;
    state.className = `state tag state-${event.state}`;
    this.job.querySelector("progress").value = event.progress;
    this.job.querySelector(".percent").textContent = `${Math.round(100 * event.progress)} %`;
    this.job.querySelector(".message").textContent = event.message;
    this.write(event);
    if (["queued", "running"].includes(event.state)) this.best();
    else this.end();
  }

  write(event) {
    const line = document.querySelector("#log-line").content.firstElementChild.cloneNode(true);
    line.id = `event-${event.id}`;
    const time = line.querySelector("time");
    time.dateTime = event.at;
    line.querySelector(".what").textContent = event.state;
    line.querySelector(".how-far").textContent = `${Math.round(100 * event.progress)} %`;
    line.querySelector(".why").textContent = event.message;
    localTimes(line);
    const log = document.querySelector("#log");
    log.prepend(line);
    while (log.children.length > SHOWN) log.lastElementChild.remove();
  }

  // The best so far is in no event. One question at a time, and none in between.
  async best() {
    if (this.asking) return;
    this.asking = true;
    try {
      const reply = await fetch(`/v1/jobs/${this.job.dataset.job}`, { headers: { Accept: "application/json" } });
      const { best, best_ms: ms } = reply.ok ? await reply.json() : {};
      if (best) this.job.querySelector(".best").textContent = `${best.backend}, ${ms.toPrecision(4)} ms`;
    } catch {
      // the next event asks again
    } finally {
      this.asking = false;
    }
  }

  end() {
    this.source.close();
    this.say("It has ended. Load the page again for its times.");
    document.querySelector("[data-cancel]")?.remove();
  }
}
