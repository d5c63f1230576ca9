// Times come in UTC. They are shown in the reader's own time zone, with UTC in the title; ages keep their words.
const two = (number) => String(number).padStart(2, "0");

const local = (when) =>
  `${when.getFullYear()}-${two(when.getMonth() + 1)}-${two(when.getDate())} ${two(when.getHours())}:${two(when.getMinutes())}`;

export function localTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const when = new Date(element.dateTime);
    if (Number.isNaN(when.getTime())) continue;
    const utc = when.toISOString().slice(0, 16).replace("T", " ") + " UTC";
    if ("age" in element.dataset) {
      element.title = `${local(when)} (${utc})`;
    } else {
      element.textContent = local(when);
      element.title = utc;
    }
  }
}
