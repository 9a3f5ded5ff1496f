// Shapes, look, undo and zoom.

const ICONS = {
  select: ['M5 3l10 7-4.6 1.1L8 16z'],
  rectangle: ['M3.5 5h13v10h-13z'],
  ellipse: ['M10 4.5c4 0 7 2.4 7 5.5s-3 5.5-7 5.5-7-2.4-7-5.5 3-5.5 7-5.5z'],
  point: ['M10 7a3 3 0 1 1 0 6 3 3 0 0 1 0-6z'],
  triangle: ['M10 4l7 12H3z'],
  mask: ['M5 6c3-3 7-2 9 0s3 6 0 8-8 2-10-1-1-5 1-7z'],
  'mask contour': ['M5 6c3-3 7-2 9 0s3 6 0 8-8 2-10-1-1-5 1-7z'],
  arrow: ['M4 16 16 4M8.5 4H16v7.5'],
  scribble: ['M3 13c2-7 4-7 4-3s1 5 3 0 3-5 3-1 1 4 4 0'],
};

class Toolbar {
  constructor(page, root) {
    this.page = page;
    this.buttons = new Map();
    this.bar = el(
      'div', {class: 'vip-toolbar', role: 'toolbar', 'data-t-label': 'toolbar'},
      this.shapes(), this.look(), this.history(),
    );
    this.strip = this.zoom();
    root.append(this.bar);
  }

  button(name, onclick, paths, key) {
    return el(
      'button', {type: 'button', class: 'vip-tool', 'data-t-label': name, 'data-key': key || null, onclick},
      icon(...paths),
    );
  }

  shapes() {
    const group = el('div', {class: 'vip-group shapes', role: 'radiogroup', 'data-t-label': 'shapes'});
    ['select', ...this.page.shapes].forEach((name, index) => {
      const label = `shape_${name.replace(' ', '_')}`;
      const button = this.button(label, () => this.page.setTool(name), ICONS[name], String(index));
      button.setAttribute('role', 'radio');
      button.dataset.tool = name;
      this.buttons.set(name, button);
      group.append(button);
    });
    group.addEventListener('keydown', (event) => {
      const way = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (!way) return;
      event.preventDefault();
      const names = [...this.buttons.keys()];
      const name = names[(names.indexOf(this.page.tool) + way + names.length) % names.length];
      this.page.setTool(name);
      this.buttons.get(name).focus();
    });
    this.maskBy = el(
      'div', {class: 'vip-group vip-maskby', role: 'radiogroup', 'data-t-label': 'mask_by'},
      ...['outline', 'box'].map((way) =>
        el('button', {
          type: 'button', class: 'vip-choice', role: 'radio', 'data-way': way, 'data-t': `mask_${way}`,
          onclick: () => this.page.setMaskBy(way),
        })),
    );
    return group;
  }

  look() {
    this.swatches = Object.entries(this.page.palette).map(([name, rgb]) =>
      el('button', {
        type: 'button', class: 'vip-swatch', role: 'radio', 'data-t-label': `colour_${name}`, 'data-colour': name,
        style: `--colour: rgb(${rgb.join(', ')})`, onclick: () => this.page.setLook({colour: name}),
      }));
    this.custom = el('input', {type: 'color', class: 'vip-custom', value: '#00a0a0', 'data-t-label': 'colour_custom'});
    this.custom.addEventListener('input', () => {
      const value = parseInt(this.custom.value.slice(1), 16);
      this.page.setLook({colour: [value >> 16, (value >> 8) & 255, value & 255]});
    });
    this.width = el('input', {type: 'range', min: '0', max: '60', step: '1', value: '0', id: 'vip-width'});
    this.alpha = el('input', {type: 'range', min: '5', max: '100', step: '1', value: '50', id: 'vip-alpha'});
    this.widthSaid = el('output', {for: 'vip-width'});
    this.alphaSaid = el('output', {for: 'vip-alpha'});
    const seen = (input) => () => this.slide(input);
    for (const input of [this.width, this.alpha]) {
      input.addEventListener('input', seen(input));
      input.addEventListener('change', () => this.page.setLook(this.slid(input)));
    }
    const colours = el('div', {class: 'vip-swatches', role: 'radiogroup', 'data-t-label': 'colour'}, ...this.swatches, this.custom);
    const panel = el(
      'div', {class: 'vip-panel', id: 'vip-look', hidden: true},
      colours,
      el('label', {for: 'vip-width'}, el('span', {'data-t': 'width'}), this.widthSaid), this.width,
      el('label', {for: 'vip-alpha'}, el('span', {'data-t': 'opacity'}), this.alphaSaid), this.alpha,
    );
    this.dot = el('span', {class: 'vip-dot'});
    const open = el(
      'button', {type: 'button', class: 'vip-tool wide', 'data-t-label': 'look', 'aria-expanded': 'false', 'aria-controls': 'vip-look'},
      this.dot, icon('M6 8l4 4 4-4'),
    );
    const show = (on) => {
      panel.hidden = !on;
      open.setAttribute('aria-expanded', String(on));
    };
    open.addEventListener('click', () => show(panel.hidden));
    document.addEventListener('pointerdown', (event) => {
      if (!holder.contains(event.target)) show(false);
    });
    const holder = el('div', {class: 'vip-group vip-look'}, open, panel);
    holder.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape' || panel.hidden) return;
      show(false);
      open.focus();
    });
    return holder;
  }

  slid(input) {
    const value = Number(input.value);
    if (input === this.width) return {width: value || null};
    return {alpha: Math.max(1, Math.round(value * 2.55))};
  }

  slide(input) {
    const value = Number(input.value);
    if (input === this.width) this.widthSaid.value = value ? `${value} px` : t('automatic');
    else this.alphaSaid.value = `${value} %`;
  }

  history() {
    const {page} = this;
    this.undo = this.button('undo', () => page.undo(), ['M8 5 4 9l4 4', 'M4 9h8a4 4 0 0 1 0 8h-2'], 'Ctrl+Z');
    this.redo = this.button('redo', () => page.redo(), ['M12 5l4 4-4 4', 'M16 9H8a4 4 0 0 0 0 8h2'], 'Ctrl+Y');
    this.remove = this.button('delete', () => page.removeChosen(), ['M4 6h12M8 6V4h4v2M6 6l.7 10h6.6L14 6'], 'Del');
    this.another = this.button('open_another', () => page.stage.file.click(), ['M10 13V4M6 7.5 10 3.5l4 4M4 13v3h12v-3']);
    return el('div', {class: 'vip-group'}, this.undo, this.redo, this.remove, this.another);
  }

  zoom() {
    const {page} = this;
    const view = () => page.stage.view;
    this.percent = el('button', {type: 'button', class: 'vip-tool wide', 'data-t-label': 'zoom_fit', onclick: () => view().fit()}, '100 %');
    this.seen = el(
      'button', {type: 'button', class: 'vip-tool wide', 'aria-pressed': 'false', onclick: () => page.setSeen(!page.seen)},
      icon('M2 10c2-4 5-6 8-6s6 2 8 6c-2 4-5 6-8 6s-6-2-8-6z', 'M10 7.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5z'),
      el('span', {class: 'vip-word', 'data-t': 'seen'}),
    );
    this.status = el('p', {class: 'vip-status', role: 'status', 'aria-live': 'polite'});
    return el(
      'div', {class: 'vip-strip', role: 'group', 'data-t-label': 'view'},
      this.seen, this.maskBy, this.status,
      this.button('zoom_out', () => view().zoomBy(0.8), ['M4 10h12'], '-'),
      this.percent,
      this.button('zoom_in', () => view().zoomBy(1.25), ['M4 10h12M10 4v12'], '+'),
    );
  }

  // Says something: to read, and to hear. What is only to be heard does not fill the line.
  say(text, isError, onlyHeard) {
    this.status.textContent = text;
    this.status.title = text;
    this.status.classList.toggle('error', Boolean(isError));
    this.status.classList.toggle('heard', Boolean(onlyHeard));
  }

  update() {
    const {page} = this;
    const look = page.lookNow();
    for (const [name, button] of this.buttons) {
      button.setAttribute('aria-checked', String(name === page.tool));
      button.tabIndex = name === page.tool ? 0 : -1;
    }
    this.maskBy.hidden = !OUTLINED.includes(page.tool);
    for (const button of this.maskBy.children) {
      button.setAttribute('aria-checked', String(button.dataset.way === page.maskBy));
    }
    const colour = look.colour || 'red';
    for (const swatch of this.swatches) {
      swatch.setAttribute('aria-checked', String(swatch.dataset.colour === colour));
    }
    this.custom.classList.toggle('chosen', Array.isArray(colour));
    this.dot.style.setProperty('--colour', cssColour(colour, page.palette));
    this.width.value = look.width || 0;
    this.alpha.value = Math.round(look.alpha / 2.55);
    this.slide(this.width);
    this.slide(this.alpha);
    this.undo.disabled = !page.marks.past.length;
    this.redo.disabled = !page.marks.future.length;
    this.remove.disabled = page.marks.selected === null;
    this.percent.textContent = `${Math.round(page.stage.view.zoom * 100)} %`;
    this.seen.setAttribute('aria-pressed', String(page.seen));
    this.strip.dataset.off = String(!page.picture);
    for (const button of this.bar.querySelectorAll('button')) {
      if (!page.picture) button.disabled = true;
      else if (![this.undo, this.redo, this.remove].includes(button)) button.disabled = false;
    }
  }
}
