// With it the contents follow, and a box that scrolls can be reached with the keyboard.
const contents = document.querySelector("nav details");
const links = [...contents.querySelectorAll("a")];
const headings = links.map(link => document.querySelector(link.getAttribute("href")));
const phone = matchMedia("(max-width: 960px)");

function follow() {
  const read = headings.findLastIndex(heading => heading.getBoundingClientRect().top < 120);
  links.forEach((link, k) => link.toggleAttribute("aria-current", k === read));
  if (phone.matches || read < 0) return;
  // Not scrollIntoView: beside a text that scrolls it would scroll the text.
  const { offsetTop, offsetHeight } = links[read], { scrollTop, clientHeight } = contents;
  if (offsetTop < scrollTop || offsetTop + offsetHeight > scrollTop + clientHeight)
    contents.scrollTop = offsetTop - clientHeight / 2;
}

function fit() {
  contents.open = !phone.matches;
  for (const box of document.querySelectorAll("pre, .scroll, .output_html")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

addEventListener("scroll", follow, { passive: true });
addEventListener("resize", fit);
contents.addEventListener("click", event => {
  if (phone.matches && event.target.matches("a")) contents.open = false;
});
fit();
follow();
