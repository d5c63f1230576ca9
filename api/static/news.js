// A page never loads itself again. Where something new is there, a notice offers it; what one was reading stays.
const SECONDS = 20;

export function watchNews() {
  const notice = document.querySelector(".news[data-url]");
  if (!notice) return;
  const timer = setInterval(async () => {
    if (document.hidden) return;
    try {
      const reply = await fetch(notice.dataset.url, { headers: { Accept: "application/json" } });
      if (!reply.ok) return;
      const { mark } = await reply.json();
      if (mark !== notice.dataset.mark) {
        notice.hidden = false;
        clearInterval(timer);
      }
    } catch {
      // The service is away for a moment: the page stays as it is, and asks again.
    }
  }, SECONDS * 1000);
  notice.querySelector("button").addEventListener("click", () => location.reload());
}
