// The two panels beside the conversation: columns where there is room, drawers over it where there is not; and the theme.

import { $, say } from "./dom.js";

const WIDE = { side: matchMedia("(min-width: 60rem)"), panel: matchMedia("(min-width: 72rem)") };
const STORED = "rorqual.theme";

export class Layout {
  #from = null;        // what had the focus before a drawer opened

  // `onPanel(tab)` hears which tab of the right panel is in view, null for none.
  constructor(onPanel) {
    this.onPanel = onPanel;
    this.isOpen = { side: WIDE.side.matches, panel: false };
    this.tab = "engine";
    for (const name of ["side", "panel"]) {
      WIDE[name].addEventListener("change", () => { this.#set(name, WIDE[name].matches && (name === "side" || this.isOpen.panel)); });
      $(name).querySelector(".close").addEventListener("click", () => this.close(name));
    }
    $("scrim").addEventListener("click", () => this.closeDrawer());
    $("show-side").addEventListener("click", () => this.toggle("side"));
    for (const tab of ["engine", "settings"]) {
      $(`show-${tab}`).addEventListener("click", () => this.toggleTab(tab));
      $(`tab-${tab}`).addEventListener("click", () => this.showTab(tab));
    }
    $("tabs").addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      this.showTab(this.tab === "engine" ? "settings" : "engine");
      $(`tab-${this.tab}`).focus();
    });
    this.#draw();
  }

  #isDrawer(name) {
    return this.isOpen[name] && !WIDE[name].matches;
  }

  toggle(name) {
    this.isOpen[name] ? this.close(name) : this.#set(name, true);
  }

  toggleTab(tab) {
    if (this.isOpen.panel && this.tab === tab) this.close("panel");
    else this.showTab(tab);
  }

  showTab(tab) {
    this.tab = tab;
    this.#set("panel", true);
  }

  close(name) {
    const wasDrawer = this.#isDrawer(name);
    const hadFocus = $(name).contains(document.activeElement);
    this.#set(name, false);
    if (wasDrawer || hadFocus) (this.#from?.isConnected ? this.#from : $("prompt")).focus();
    this.#from = null;
  }

  // Whether there was a drawer to close.
  closeDrawer() {
    const name = ["panel", "side"].find((one) => this.#isDrawer(one));
    if (name) this.close(name);
    return Boolean(name);
  }

  #set(name, isOpen) {
    const wasOpen = this.isOpen[name];
    this.isOpen[name] = isOpen;
    const other = name === "side" ? "panel" : "side";
    if (isOpen && this.#isDrawer(name) && this.#isDrawer(other)) this.isOpen[other] = false;
    if (isOpen && !wasOpen) this.#from = document.activeElement;
    this.#draw();
    if (isOpen && !wasOpen && this.#isDrawer(name)) $(name).querySelector(".close").focus();
  }

  #draw() {
    const isOver = this.#isDrawer("side") || this.#isDrawer("panel");
    for (const name of ["side", "panel"]) {
      $(name).hidden = !this.isOpen[name];
      $(name).classList.toggle("drawer", this.#isDrawer(name));
      $(name).inert = isOver && !this.#isDrawer(name);
    }
    $("stage").inert = isOver;
    $("scrim").hidden = !isOver;
    $("show-side").setAttribute("aria-expanded", String(this.isOpen.side));
    for (const tab of ["engine", "settings"]) {
      const isShown = this.isOpen.panel && this.tab === tab;
      $(`show-${tab}`).setAttribute("aria-expanded", String(isShown));
      $(`tab-${tab}`).setAttribute("aria-selected", String(this.tab === tab));
      $(`tab-${tab}`).tabIndex = this.tab === tab ? 0 : -1;
      $(tab).hidden = this.tab !== tab;
    }
    this.onPanel(this.isOpen.panel ? this.tab : null);
  }
}

export function nextTheme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = root.dataset.theme ?? system, next = now === "dark" ? "light" : "dark";
  if (next === system) delete root.dataset.theme;           // follows the system again
  else root.dataset.theme = next;
  try {
    next === system ? localStorage.removeItem(STORED) : localStorage.setItem(STORED, next);
  } catch { /* it then lasts as long as the page */ }
  say(`${next === "dark" ? "Dark" : "Light"} colours.`);
  document.dispatchEvent(new Event("themechange"));
}
