// Runs before the first paint, so that a dark console does not flash in white.
try {
  const theme = localStorage.getItem("harp.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  if (localStorage.getItem("harp.density") === "comfortable") document.documentElement.dataset.density = "comfortable";
} catch {
  // A browser that keeps nothing for this address: its own theme is used.
}
