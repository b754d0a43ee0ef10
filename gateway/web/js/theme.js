// Runs before the page is drawn, so that it is drawn once, in the right colours.
{
  const chosen = localStorage.getItem("miles.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
