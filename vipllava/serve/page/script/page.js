// The page: what is opened, chosen and drawn, and who is told about it.

class Page {
  constructor({element, props, trigger, watch}) {
    Object.assign(this, {element, trigger});
    this.shapes = props.shapes;
    this.palette = props.palette;
    this.limits = props.limits;
    this.numExamples = props.examples;
    this.picture = null;
    this.tool = 'rectangle';
    this.maskBy = 'outline';
    this.look = {colour: 'red', width: null, alpha: 128};
    this.seen = false;
    this.asked = null; // what is on its way
    this.mentioned = []; // marks that questions of this chat are about
    this.painting = false;
    const [head, stageRoot, talkRoot] = ['head', 'stage', 'talk'].map((name) => element.querySelector(`.vip-${name}`));
    this.buildHead(head);
    this.marks = new MarkList((onlySelection) => this.marksChanged(onlySelection));
    this.planner = new Planner(this);
    this.toolbar = new Toolbar(this, stageRoot);
    this.stage = new Stage(this, stageRoot);
    stageRoot.append(this.toolbar.strip);
    this.chips = new Chips(this, stageRoot);
    this.answers = new Answers(this, talkRoot);
    this.question = new Question(this, talkRoot);
    this.gestures = new Gestures(this);
    this.keyboard = new Keyboard(this);
    this.buildExamples(stageRoot);
    stageRoot.addEventListener('keydown', (event) => this.historyKeys(event));
    watch('value', () => this.answers.take(props.value || NO_VIEW));
    this.speak(chosenLanguage(), true);
    this.update();
  }

  buildHead(head) {
    this.languages = el('div', {class: 'vip-languages', role: 'radiogroup', 'data-t-label': 'language'});
    for (const name of Object.keys(TEXTS.all)) {
      this.languages.append(el('button', {
        type: 'button', class: 'vip-choice', role: 'radio', 'data-language': name, lang: name,
        onclick: () => {
          remember('language', name);
          this.speak(name);
        },
      }, TEXTS.all[name].own_name));
    }
    const theme = el(
      'button', {type: 'button', class: 'vip-tool', id: 'vip-theme', 'data-t-label': 'theme', onclick: () => switchTheme()},
      icon('M10 3a7 7 0 1 0 0 14z', 'M10 3a7 7 0 0 1 0 14'),
    );
    head.append(
      el('h1', {class: 'vip-title'}, 'ViP-LLaVA'), el('p', {class: 'vip-claim', 'data-t': 'claim'}),
      el('div', {class: 'vip-settings'}, this.languages, theme),
    );
  }

  buildExamples(root) {
    if (!this.numExamples) return;
    const row = el('div', {class: 'vip-examples', role: 'group', 'data-t-label': 'examples'},
      el('span', {class: 'vip-label', 'data-t': 'examples'}));
    for (let number = 0; number < this.numExamples; number += 1) {
      row.append(el(
        'button', {type: 'button', class: 'vip-example', 'data-example': number, 'aria-label': `${t('example')} ${number + 1}`,
          onclick: () => this.stage.open(() => send(`examples/${number}`, ''))},
        el('img', {src: route(`examples/${number}.jpg`), alt: '', loading: 'lazy'}),
      ));
    }
    root.append(row);
  }

  // Another picture is another conversation.
  begin(picture, said) {
    this.picture = picture;
    this.setSeen(false);
    this.gestures.cancel();
    if (said.question) this.question.clear();
    const mentioned = this.question.numbers();
    this.stage.show(picture);
    this.marks.restart((said.marks || []).map((fields) => markOf(fields, 0)), Math.max(-1, ...mentioned) + 1);
    if (said.question) this.question.text.value = said.question;
    this.question.update();
    if (this.answers.view.rounds.length || this.answers.busy) this.clear();
    this.say(t('opened', {width: picture.width, height: picture.height}), false, true);
  }

  clear() {
    this.mentioned = [];
    this.trigger('clear', {});
  }

  newMark(kind, points) {
    const {colour, width, alpha} = this.look;
    const shape = this.tool;
    const {size} = this.stage.view;
    return {
      shape, kind, points: points.map((p) => rounded(inside(p, size))), width, alpha,
      colour: this.freeColour(shape, colour),
    };
  }

  // The chosen colour, or the next of the palette that no mark of this shape has: words say it.
  freeColour(shape, wanted) {
    const key = (colour) => String(colour);
    const taken = new Set(this.marks.list.filter((m) => m.shape === shape).map((m) => key(m.colour)));
    if (!taken.has(key(wanted))) return wanted;
    return Object.keys(this.palette).find((name) => !taken.has(name)) || wanted;
  }

  addMark(mark) {
    const added = this.marks.add(mark);
    this.announceMark('added', added);
  }

  announceMark(what, mark) {
    const shape = t(`shape_${mark.shape.replace(' ', '_')}`);
    this.say(t(what, {mark: `{${mark.number}}`, shape}), false, true);
  }

  remove(number) {
    const mark = this.marks.get(number);
    if (!mark) return;
    this.marks.remove(number);
    const said = this.question.numbers().includes(number);
    this.announceMark('removed', mark);
    if (said) this.say(t('mark_gone', {mark: `{${number}}`}), true);
  }

  removeChosen() {
    if (this.marks.selected !== null) this.remove(this.marks.selected);
  }

  undo() {
    this.gestures.cancel();
    if (this.marks.undo()) this.say(t('undone'), false, true);
  }

  redo() {
    if (this.marks.redo()) this.say(t('redone'), false, true);
  }

  historyKeys(event) {
    if (event.defaultPrevented || event.target.matches('input, textarea')) return;
    const key = event.key.toLowerCase();
    if (!(event.ctrlKey || event.metaKey) || !['z', 'y'].includes(key)) return;
    event.preventDefault();
    if (key === 'y' || event.shiftKey) this.redo();
    else this.undo();
  }

  setTool(tool) {
    this.gestures.cancel();
    if (this.seen) this.setSeen(false);
    this.tool = tool;
    this.stage.frame.dataset.tool = tool;
    if (tool !== 'select') this.marks.select(null);
    this.say(t(`shape_${tool.replace(' ', '_')}`), false, true);
    this.update();
  }

  setMaskBy(way) {
    this.gestures.cancel();
    this.maskBy = way;
    this.update();
  }

  lookNow() {
    return this.marks.chosen || this.look;
  }

  // Of the selected mark, and of those to come.
  setLook(change) {
    this.look = {...this.look, ...change};
    if (this.marks.chosen) this.marks.replace({...this.marks.chosen, ...change});
    this.update();
  }

  setSeen(on) {
    this.seen = on && Boolean(this.picture);
    this.gestures.cancel();
    this.stage.showSeen(this.seen);
    this.update();
  }

  say(text, isError, onlyHeard) {
    this.toolbar.say(text, isError, onlyHeard);
  }

  emit(what) {
    if (what !== 'planned') return;
    this.update();
    this.question.update();
    if (this.seen) this.stage.showSeen(true);
  }

  marksChanged(onlySelection) {
    if (!onlySelection) {
      this.planner.soon();
      this.warnAboutEarlier();
    }
    this.update();
    this.question.update();
  }

  // The server refuses a question whose conversation is about a mark that has changed; said now.
  warnAboutEarlier() {
    const gone = this.mentioned.find((mark) => this.marks.get(mark.number) !== mark);
    if (gone) this.say(t('earlier_gone', {mark: `{${gone.number}}`}), true);
  }

  paint() {
    if (this.painting) return;
    this.painting = true;
    requestAnimationFrame(() => {
      this.painting = false;
      if (!this.picture) return;
      paintMarks(this);
      paintTools(this);
      this.toolbar.update();
    });
  }

  update() {
    this.toolbar.update();
    this.chips.update();
    this.paint();
  }

  speak(language, isFirst) {
    TEXTS.language = language;
    document.documentElement.lang = language === 'zh' ? 'zh-CN' : language;
    for (const button of this.languages.children) {
      button.setAttribute('aria-checked', String(button.dataset.language === language));
    }
    translate(this.element);
    this.answers.update();
    this.update();
    this.question.update();
    this.say(''); // what was said is in the language of before
    // Gradio's controls are in English until they are told otherwise.
    if (!isFirst || language !== 'en') this.trigger('language', {language});
  }
}

function switchTheme() {
  const dark = !document.body.classList.contains('dark');
  document.body.classList.toggle('dark', dark);
  remember('theme', dark ? 'dark' : 'light');
}

function startPage(given) {
  TEXTS.all = given.props.texts;
  const theme = new URLSearchParams(location.search).get('__theme') || remembered('theme');
  if (theme === 'dark' || theme === 'light') document.body.classList.toggle('dark', theme === 'dark');
  given.element.dataset.ready = 'true';
  return new Page(given);
}
