// One chip per mark: its number, its words, a way to say it in the question, a way to delete it.

class Chips {
  constructor(page, root) {
    this.page = page;
    this.nodes = new Map(); // number -> its node, and what it shows
    this.list = el('ul', {class: 'vip-chips', 'data-t-label': 'marks'});
    this.hint = el('p', {class: 'vip-hint', 'data-t': 'hint_draw'});
    root.append(el('div', {class: 'vip-below'}, this.list, this.hint));
  }

  update() {
    const {page} = this;
    const focused = document.activeElement && document.activeElement.dataset.number;
    const nodes = page.marks.list.map((mark) => this.known(mark));
    const same = nodes.length === this.list.children.length
      && nodes.every((node, i) => node === this.list.children[i]);
    // A chip that is as before stays where it is: it may be being pressed.
    if (!same) this.list.replaceChildren(...nodes);
    this.list.hidden = !page.marks.list.length;
    this.hint.hidden = !page.picture || page.marks.list.length > 0;
    if (!same && focused !== undefined) {
      const again = this.list.querySelector(`[data-number="${focused}"]`);
      if (again) again.focus();
    }
  }

  known(mark) {
    const shown = this.page.planner.of(mark);
    const isChosen = mark.number === this.page.marks.selected;
    const said = [wordsOf(this.page, mark), shown && [shown.error, shown.ambiguous]];
    const key = JSON.stringify([TEXTS.language, mark.colour, isChosen, said]);
    const old = this.nodes.get(mark.number);
    if (old && old.key === key) return old.node;
    const node = this.chip(mark);
    this.nodes.set(mark.number, {key, node});
    return node;
  }

  chip(mark) {
    const {page} = this;
    const shown = page.planner.of(mark);
    const words = wordsOf(page, mark);
    const bad = shown && (shown.error || shown.ambiguous);
    const say = el(
      'button',
      {
        type: 'button', class: 'vip-chip-say', 'data-number': mark.number, title: t('chip_tip'),
        'aria-pressed': String(mark.number === page.marks.selected),
        onclick: () => {
          page.marks.select(mark.number);
          page.question.mention(mark.number);
        },
      },
      el('span', {class: 'vip-dot', style: `--colour: ${cssColour(mark.colour, page.palette)}`}),
      el('span', {class: 'vip-number'}, `{${mark.number}}`),
      el('span', {class: 'vip-words'}, words),
    );
    say.addEventListener('keydown', (event) => {
      if (event.key !== 'Delete' && event.key !== 'Backspace') return;
      event.preventDefault();
      page.remove(mark.number);
      page.stage.frame.focus();
    });
    const remove = el(
      'button',
      {type: 'button', class: 'vip-chip-remove', 'aria-label': t('delete_mark', {mark: `{${mark.number}}`}), onclick: () => page.remove(mark.number)},
      icon('M6 6l8 8M14 6l-8 8'),
    );
    const trouble = bad ? el('span', {class: 'vip-trouble'}, shown.error || t('same_words')) : null;
    const chosen = mark.number === page.marks.selected ? ' chosen' : '';
    return el('li', {class: `vip-chip${chosen}${bad ? ' bad' : ''}`}, say, trouble, remove);
  }
}

function wordsOf(page, mark) {
  const shown = page.planner.shown.get(mark.number);
  if (shown && shown.words) return shown.words;
  return Array.isArray(mark.colour) ? mark.shape : `${mark.colour} ${mark.shape}`;
}
