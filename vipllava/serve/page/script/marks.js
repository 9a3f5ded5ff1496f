// The marks on the picture, what was done to them, and what the server says about them.
//
// A mark keeps its number for good, and a number is not given twice: `{2}` in a question never
// comes to mean another mark, whatever is deleted. What is sent counts the marks that are there.

class MarkList {
  constructor(changed) {
    this.changed = changed;
    this.list = [];
    this.selected = null; // a number
    this.past = [];
    this.future = [];
    this.next = 0;
  }

  get(number) {
    return this.list.find((mark) => mark.number === number) || null;
  }

  get chosen() {
    return this.selected === null ? null : this.get(this.selected);
  }

  do(list, selected) {
    this.past.push(this.list);
    this.future = [];
    this.become(list, selected);
  }

  become(list, selected) {
    this.list = list;
    this.selected = list.some((mark) => mark.number === selected) ? selected : null;
    this.changed();
  }

  add(mark) {
    const numbered = {...mark, number: this.next};
    this.next += 1;
    this.do([...this.list, numbered], numbered.number);
    return numbered;
  }

  replace(mark) {
    this.do(this.list.map((old) => (old.number === mark.number ? mark : old)), mark.number);
  }

  remove(number) {
    this.do(this.list.filter((mark) => mark.number !== number), null);
  }

  select(number) {
    if (this.selected === number) return;
    this.selected = number;
    this.changed(true);
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.list);
    this.become(this.past.pop(), this.selected);
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.list);
    this.become(this.future.pop(), this.selected);
    return true;
  }

  // Another picture: nothing is left to undo. Numbers of a question that is being written are
  // not given again.
  restart(list, next) {
    this.past = [];
    this.future = [];
    this.next = next;
    this.list = [];
    this.selected = null;
    for (const mark of list) {
      this.list.push({...mark, number: this.next});
      this.next += 1;
    }
    this.changed();
  }
}

// Asks the server how the marks are drawn and named; the newest question wins.
class Planner {
  constructor(page) {
    this.page = page;
    this.shown = new Map(); // number -> {mark, words, strokes, ...} or {mark, error}
    this.drawn = null; // the name of the picture with all marks, when they are as planned
    this.asked = 0;
    this.timer = null;
  }

  of(mark) {
    const found = this.shown.get(mark.number);
    return found && found.mark === mark ? found : null;
  }

  soon() {
    this.drawn = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.now(), 40);
  }

  async now() {
    const {page} = this;
    const [picture, marks] = [page.picture, page.marks.list];
    this.asked += 1;
    const turn = this.asked;
    if (!picture) return;
    try {
      const body = {picture: picture.name, marks: marks.map(fieldsOf)};
      const said = await sendJson('plan', body);
      if (turn !== this.asked) return;
      this.drawn = said.drawn;
      this.shown = new Map(
        marks.map((mark, i) => [mark.number, {mark, ...said.marks[i]}]),
      );
    } catch (error) {
      if (turn !== this.asked) return;
      page.say(error.message, true);
    }
    page.emit('planned');
  }
}
