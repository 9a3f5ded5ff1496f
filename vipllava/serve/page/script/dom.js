// Elements, texts in the reader's language, and requests to the page's own routes.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// An icon of strokes on a grid of 20.
function icon(...paths) {
  const shapes = paths.map((d) => svg('path', {d}));
  return svg('svg', {viewBox: '0 0 20 20', class: 'vip-icon', 'aria-hidden': 'true'}, ...shapes);
}

const TEXTS = {all: {}, language: 'en'};

function t(name, values) {
  const text = (TEXTS.all[TEXTS.language] || {})[name] || TEXTS.all.en[name] || name;
  return text.replace(/%(\w+)%/g, (whole, key) => (values && key in values ? values[key] : whole));
}

// What `data-t...` names is said anew in another language: the text, the label (and its tip), the
// placeholder.
function translate(root) {
  for (const node of root.querySelectorAll('[data-t]')) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll('[data-t-label]')) {
    const label = t(node.dataset.tLabel) + (node.dataset.key ? ` (${node.dataset.key})` : '');
    node.setAttribute('aria-label', label);
    if (node.tagName === 'BUTTON') node.title = label;
  }
  for (const node of root.querySelectorAll('[data-t-placeholder]')) {
    node.placeholder = t(node.dataset.tPlaceholder);
  }
}

function chosenLanguage() {
  const known = Object.keys(TEXTS.all);
  const asked = new URLSearchParams(location.search).get('lang');
  const wanted = [asked, remembered('language'), ...(navigator.languages || [])];
  for (const each of wanted) {
    const found = known.find((name) => each && each.toLowerCase().startsWith(name));
    if (found) return found;
  }
  return 'en';
}

function remembered(name) {
  try {
    return localStorage.getItem(`vipllava-${name}`);
  } catch (error) {
    return null; // storage may be forbidden
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`vipllava-${name}`, value);
  } catch (error) {
    // the page works without
  }
}

// The address of one of the page's own routes, wherever the page is mounted.
function route(path) {
  const root = (window.gradio_config && window.gradio_config.root) || '';
  const base = new URL(root || '/', location.href).pathname.replace(/\/$/, '');
  return `${location.origin}${base}/page/${path}`;
}

async function send(path, body, type = 'application/octet-stream') {
  const headers = {'Content-Type': type};
  const response = await fetch(route(path), {method: 'POST', body, headers});
  const said = await response.json().catch(() => ({}));
  const why = said.detail || (said.error && said.error.message);
  if (!response.ok) throw new Error(why || `${response.status} ${response.statusText}`);
  return said;
}

const sendJson = (path, value) => send(path, JSON.stringify(value), 'application/json');

function download(name, blob) {
  const link = el('a', {href: URL.createObjectURL(blob), download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
