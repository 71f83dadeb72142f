// Before anything is drawn: the colours that were chosen the last time, here or in a report.
"use strict";
(() => {
  const root = document.documentElement, prefers = matchMedia("(prefers-color-scheme: dark)");
  try { root.dataset.theme = localStorage.getItem("mist-theme") || ""; } catch { /* no storage: the system's */ }
  const isDark = () => (root.dataset.theme || (prefers.matches ? "dark" : "light")) === "dark";
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("mist-theme", root.dataset.theme); } catch { /* for this visit, then */ }
      label();
    });
    prefers.addEventListener("change", label);
    label();
  });
})();
