// The question: a text in which `{2}` stands for the words of mark 2.

const MENTION = /\{\{\d{1,6}\}\}|\{(\d{1,6})\}/g;

class Question {
  constructor(page, root) {
    this.page = page;
    this.text = el('textarea', {
      id: 'vip-question', rows: '2', 'data-t-placeholder': 'question_hint', 'data-t-label': 'question',
      role: 'combobox', 'aria-autocomplete': 'list', 'aria-expanded': 'false', 'aria-controls': 'vip-menu',
    });
    this.menu = el('ul', {id: 'vip-menu', class: 'vip-menu', role: 'listbox', 'data-t-label': 'marks', hidden: true});
    this.reading = el('p', {class: 'vip-reading', hidden: true});
    this.ask = el(
      'button', {type: 'button', class: 'vip-button primary vip-ask', onclick: () => this.send()},
      el('span', {'data-t': 'ask'}), icon('M4 10h11M11 5.5 15.5 10 11 14.5'),
    );
    this.stop = el(
      'button', {type: 'button', class: 'vip-button vip-stop', hidden: true, onclick: () => page.trigger('stop', {})},
      icon('M6 6h8v8H6z'), el('span', {'data-t': 'stop'}),
    );
    this.at = -1; // where the `@` is whose menu is open
    this.chosen = 0;
    root.append(el(
      'div', {class: 'vip-composer'},
      this.menu,
      el('div', {class: 'vip-write'}, this.text, el('div', {class: 'vip-send'}, this.stop, this.ask)),
      this.reading,
    ));
    this.text.addEventListener('input', () => this.typed());
    this.text.addEventListener('keydown', (event) => this.press(event));
    this.text.addEventListener('blur', () => setTimeout(() => this.closeMenu(), 150));
    this.text.addEventListener('click', () => this.closeMenu());
  }

  // Puts `{number}` where the text's cursor is, with blanks where words need them.
  mention(number, from) {
    const {text} = this;
    const [start, end] = [from === undefined ? text.selectionStart : from, text.selectionEnd];
    const before = text.value.slice(0, start);
    const after = text.value.slice(end);
    const said = `${before && !/[\s(（，。、？！]$/.test(before) ? ' ' : ''}{${number}}${/^[^\s,.?!;:)，。？！]/.test(after) ? ' ' : ''}`;
    text.value = before + said + after;
    const place = before.length + said.length;
    text.setSelectionRange(place, place);
    if (window.matchMedia('(pointer: fine)').matches || from !== undefined) text.focus();
    this.closeMenu();
    this.update();
  }

  numbers() {
    return [...this.text.value.matchAll(MENTION)].filter((m) => m[1]).map((m) => Number(m[1]));
  }

  // What keeps the question from being asked, in words; null if nothing does.
  trouble() {
    const {page} = this;
    const marks = this.numbers().map((number) => [number, page.marks.get(number)]);
    const gone = marks.find(([, mark]) => !mark);
    if (gone) return t('mark_gone', {mark: `{${gone[0]}}`});
    const unclear = marks.find(([, mark]) => (page.planner.of(mark) || {}).ambiguous);
    if (unclear) return t('mark_unclear', {mark: `{${unclear[0]}}`});
    return null;
  }

  send() {
    const {page} = this;
    const question = this.text.value.trim();
    if (page.answers.busy) return;
    const trouble = question ? this.trouble() : t('no_question');
    if (trouble) {
      page.say(trouble, true);
      this.text.focus();
      return;
    }
    // What is sent counts the marks that are there.
    const places = new Map(page.marks.list.map((mark, place) => [mark.number, place]));
    const sent = question.replace(MENTION, (all, number) =>
      number === undefined ? all : `{${places.get(Number(number))}}`);
    page.say('');
    page.asked = {text: this.text.value, marks: [...new Set(this.numbers())].map((n) => page.marks.get(n))};
    page.answers.expect();
    page.trigger('ask', {
      question: sent, picture: page.picture && page.picture.name, marks: page.marks.list.map(fieldsOf),
    });
  }

  clear() {
    this.text.value = '';
    this.update();
  }

  typed() {
    const before = this.text.value.slice(0, this.text.selectionStart);
    const found = /(?:^|[\s\S])@$/.test(before);
    if (found && this.page.marks.list.length) this.openMenu(before.length - 1);
    else this.closeMenu();
    this.update();
  }

  openMenu(at) {
    this.at = at;
    this.chosen = Math.max(0, this.page.marks.list.findIndex((m) => m.number === this.page.marks.selected));
    this.menu.hidden = false;
    this.text.setAttribute('aria-expanded', 'true');
    this.paintMenu();
  }

  closeMenu() {
    this.menu.hidden = true;
    this.at = -1;
    this.text.setAttribute('aria-expanded', 'false');
    this.text.removeAttribute('aria-activedescendant');
  }

  paintMenu() {
    const {page} = this;
    this.menu.replaceChildren(...page.marks.list.map((mark, place) =>
      el(
        'li',
        {
          id: `vip-option-${place}`, role: 'option', 'aria-selected': String(place === this.chosen),
          onpointerdown: (event) => {
            event.preventDefault();
            this.mention(mark.number, this.at);
          },
        },
        el('span', {class: 'vip-dot', style: `--colour: ${cssColour(mark.colour, page.palette)}`}),
        el('span', {class: 'vip-number'}, `{${mark.number}}`), wordsOf(page, mark),
      )));
    this.text.setAttribute('aria-activedescendant', `vip-option-${this.chosen}`);
  }

  press(event) {
    if (event.isComposing) return; // Enter chooses a word of an input method
    if (!this.menu.hidden) {
      const {list} = this.page.marks;
      const way = {ArrowDown: 1, ArrowUp: -1}[event.key];
      if (way) {
        this.chosen = (this.chosen + way + list.length) % list.length;
        this.paintMenu();
      } else if (event.key === 'Enter' || event.key === 'Tab') {
        this.mention(list[this.chosen].number, this.at);
      } else if (event.key === 'Escape') {
        this.closeMenu();
      } else {
        return;
      }
      event.preventDefault();
    } else if (event.key === 'Enter' && !event.shiftKey) {
      event.preventDefault();
      this.send();
    }
  }

  // How the model will read it; a mark that is not there is seen at once.
  update() {
    const {page, text} = this;
    text.style.height = 'auto';
    text.style.height = `${Math.min(text.scrollHeight + 2, 200)}px`;
    const parts = [];
    let at = 0;
    for (const match of text.value.matchAll(MENTION)) {
      if (match[1] === undefined) continue;
      parts.push(text.value.slice(at, match.index));
      at = match.index + match[0].length;
      const mark = page.marks.get(Number(match[1]));
      const plan = mark && page.planner.of(mark);
      const bad = !mark || (plan && plan.ambiguous);
      const colour = mark ? `--colour: ${cssColour(mark.colour, page.palette)}` : null;
      parts.push(el(
        'span', {class: bad ? 'vip-said bad' : 'vip-said', style: colour},
        mark ? wordsOf(page, mark) : t('mark_gone', {mark: match[0]}),
      ));
    }
    this.reading.hidden = !parts.length;
    if (parts.length) {
      const label = el('span', {class: 'vip-label'}, t('reads'));
      this.reading.replaceChildren(label, ' ', ...parts, text.value.slice(at));
    }
  }
}
