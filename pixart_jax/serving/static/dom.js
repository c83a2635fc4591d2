// Elements: found by id, built from text (never from markup).

export const $ = (id) => document.getElementById(id);

export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Show text in an element that is hidden while it is empty. */
export function say(node, text, ...more) {
  node.replaceChildren(text ?? "", ...more);
  node.hidden = !text;
}

/** For the screen reader alone. */
export const announce = (text) => { $("live").textContent = text; };

/** JSON in which seeds, up to 64 bits, stay decimal strings. */
export function parse(text) {
  return JSON.parse(text, (name, value, context) =>
    name === "seed" && typeof value === "number" ? context?.source ?? String(value) : value);
}
