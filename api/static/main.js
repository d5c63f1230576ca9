// What every page runs. Pages work without it: it makes times local, draws charts, and offers what is new.
import { localTimes } from "./times.js";
import { watchNews } from "./news.js";
import { copyButtons } from "./copy.js";
import { drawCharts } from "./charts.js";
import { forms } from "./forms.js";
import { rememberSignIn } from "./token.js";
import { actions } from "./actions.js";
import { watchJob } from "./job.js";
import { showOnce } from "./once.js";

localTimes(document);
watchNews();
copyButtons();
forms();
drawCharts(document);
rememberSignIn();
actions();
showOnce();
watchJob();
