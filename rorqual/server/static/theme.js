// Before anything is painted: the theme that was chosen, if one was; else the system's.
"use strict";
try {
  const chosen = localStorage.getItem("rorqual.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* the system's, then */ }
