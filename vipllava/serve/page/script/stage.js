// The picture and what lies on it; opening another one.

class Stage {
  constructor(page, root) {
    this.page = page;
    Object.assign(this, {draft: null, corners: null, cursor: null, keyStart: null, trail: null});
    this.byKeys = false;
    this.panning = false;
    this.image = el('img', {class: 'vip-image', alt: '', draggable: 'false'});
    this.seenImage = el('img', {class: 'vip-image vip-seen', draggable: 'false', hidden: true});
    this.layer = svg('svg', {class: 'vip-layer', preserveAspectRatio: 'none', 'aria-hidden': 'true'});
    this.tools = svg('svg', {class: 'vip-tools', 'aria-hidden': 'true'});
    this.sheet = el('div', {class: 'vip-sheet'}, this.image, this.seenImage, this.layer);
    this.seenNote = el('p', {class: 'vip-seen-note', hidden: true, 'data-t': 'seen_note'});
    this.frame = el(
      'div',
      {class: 'vip-window', tabindex: '0', role: 'application', 'data-t-label': 'canvas', 'aria-describedby': 'vip-keys'},
      this.sheet, this.tools, this.seenNote,
    );
    this.file = el('input', {type: 'file', class: 'vip-file', accept: 'image/*', tabindex: '-1', 'aria-hidden': 'true'});
    this.file.addEventListener('change', () => {
      if (this.file.files[0]) this.openFile(this.file.files[0]);
      this.file.value = '';
    });
    this.empty = this.buildEmpty();
    const keys = el('p', {id: 'vip-keys', class: 'vip-hidden', 'data-t': 'keys'});
    this.body = el('div', {class: 'vip-body'}, this.frame, this.empty, this.file, keys);
    this.body.dataset.empty = 'true';
    root.append(this.body);
    this.view = new View(this.frame, this.sheet, () => page.paint());
    new ResizeObserver(() => this.view.again()).observe(this.frame);
    this.acceptDrops(root);
  }

  buildEmpty() {
    const choose = el(
      'button', {type: 'button', class: 'vip-button primary', onclick: () => this.file.click()},
      icon('M10 13V4M6 7.5 10 3.5l4 4M4 13v3h12v-3'), el('span', {'data-t': 'open'}),
    );
    return el(
      'div', {class: 'vip-empty'},
      el('p', {class: 'vip-empty-title', 'data-t': 'empty_title'}),
      el('p', {class: 'vip-empty-text', 'data-t': 'empty_text'}),
      choose,
    );
  }

  acceptDrops(root) {
    const over = (event, on) => {
      event.preventDefault();
      this.body.classList.toggle('dropping', on);
    };
    root.addEventListener('dragover', (event) => over(event, true));
    root.addEventListener('dragleave', (event) => over(event, false));
    root.addEventListener('drop', (event) => {
      over(event, false);
      const file = [...event.dataTransfer.files].find((each) => each.type.startsWith('image/'));
      if (file) this.openFile(file);
    });
    document.addEventListener('paste', (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith('image/'));
      if (file) this.openFile(file);
    });
  }

  async openFile(file) {
    const most = this.page.limits.bytes;
    if (most && file.size > most) {
      this.page.say(t('too_large', {most: Math.round(most / 2 ** 20)}), true);
      return;
    }
    await this.open(() => send('pictures', file));
  }

  // Shows what `ask` returns, and begins anew.
  async open(ask) {
    const {page} = this;
    this.body.setAttribute('aria-busy', 'true');
    try {
      const said = await ask();
      this.image.src = route(`pictures/${said.picture}`);
      await this.image.decode();
      page.begin({name: said.picture, width: said.width, height: said.height}, said);
    } catch (error) {
      page.say(error.message, true);
    } finally {
      this.body.removeAttribute('aria-busy');
    }
  }

  show(picture) {
    this.body.dataset.empty = 'false';
    this.cursor = null;
    this.image.alt = t('picture_alt', {width: picture.width, height: picture.height});
    this.view.open([picture.width, picture.height]);
  }

  // What the model is shown instead of what is drawn here.
  async showSeen(on) {
    const {page} = this;
    this.frame.classList.toggle('seeing', on);
    this.seenNote.hidden = !on;
    if (!on) {
      this.seenImage.hidden = true;
      return;
    }
    if (!page.planner.drawn) await page.planner.now();
    if (!page.planner.drawn || !page.seen) return;
    this.seenImage.src = route(`drawn/${page.planner.drawn}.png`);
    this.seenImage.alt = t('seen');
    await this.seenImage.decode().catch(() => null);
    this.seenImage.hidden = !page.seen;
  }
}
