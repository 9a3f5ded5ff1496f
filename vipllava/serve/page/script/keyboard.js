// Everything without a mouse: arrow keys move a cursor (or the selected mark), Space draws.

class Keyboard {
  constructor(page) {
    this.page = page;
    const {frame} = page.stage;
    frame.addEventListener('keydown', (event) => this.press(event));
    frame.addEventListener('focus', () => {
      // A press of the mouse gives the focus, too; its cursor is the pointer.
      if (frame.matches(':focus-visible') && !page.gestures.doing) this.show();
    });
    frame.addEventListener('blur', () => {
      page.stage.byKeys = false;
      page.paint();
    });
  }

  show() {
    const {stage, picture} = this.page;
    if (!picture) return;
    stage.byKeys = true;
    if (!stage.cursor) stage.cursor = stage.view.size.map((length) => Math.round(length / 2));
    this.page.paint();
  }

  press(event) {
    const {page} = this;
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (command && key === 'z') return this.done(event, event.shiftKey ? page.redo() : page.undo());
    if (command && key === 'y') return this.done(event, page.redo());
    if (command || event.altKey || !page.picture) return undefined;
    if (key === 'Escape') return this.escape(event);
    if (page.seen) return undefined;
    if (/^[1-8]$/.test(key)) return this.done(event, page.setTool(page.shapes[Number(key) - 1]));
    if (key === '0' || key === 'v') return this.done(event, page.setTool('select'));
    if (key === '+' || key === '=') return this.done(event, page.stage.view.zoomBy(1.25));
    if (key === '-') return this.done(event, page.stage.view.zoomBy(0.8));
    if (key === 'f') return this.done(event, page.stage.view.fit());
    if (key === '[' || key === ']') return this.done(event, this.next(key === ']' ? 1 : -1));
    if (key === 'Delete' || key === 'Backspace') return this.done(event, page.removeChosen());
    if (key === ' ') return this.done(event, this.place());
    if (key === 'Enter') return this.done(event, page.gestures.closeOutline() || this.place());
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
    if (way) return this.done(event, this.step(way, event.shiftKey));
    return undefined;
  }

  done(event) {
    event.preventDefault();
  }

  escape(event) {
    const {page} = this;
    if (page.gestures.cancel()) event.preventDefault();
    else if (page.seen) page.setSeen(false);
    else page.marks.select(null);
  }

  next(way) {
    const {list, selected} = this.page.marks;
    if (!list.length) return;
    const at = list.findIndex((mark) => mark.number === selected);
    const mark = list[(at + way + list.length) % list.length];
    this.page.marks.select(mark.number);
    this.page.announceMark('selected', mark);
  }

  // A step is a hundredth of the picture, with Shift one pixel.
  step(way, fine) {
    const {page} = this;
    const {stage} = page;
    const length = fine ? 1 : Math.max(1, Math.round(Math.max(...stage.view.size) / 100));
    const by = way.map((v) => v * length);
    if (page.tool === 'select' && page.marks.chosen) {
      const mark = moved(page.marks.chosen, by[0], by[1], stage.view.size);
      page.marks.replace(mark);
      page.say(t('at', whereOf(boundsOf(mark.points))), false, true);
      return;
    }
    this.show();
    const last = stage.view.size.map((v) => Math.max(0, v - 1));
    stage.cursor = inside([stage.cursor[0] + by[0], stage.cursor[1] + by[1]], last);
    stage.view.reveal(stage.cursor);
    if (stage.trail) stage.trail.push(stage.cursor);
    if (stage.trail || stage.keyStart) {
      stage.draft = page.gestures.drawn(stage.trail || [stage.keyStart, stage.cursor], false);
    }
    page.say(t('at', whereOf(stage.cursor)), false, true);
    page.paint();
  }

  // Space: a corner, a point, or where a drag begins and where it ends.
  place() {
    const {page} = this;
    const {stage} = page;
    this.show();
    const p = stage.cursor;
    if (page.tool === 'select') {
      const mark = page.gestures.markAt(p, {pointerType: 'key'});
      page.marks.select(mark ? mark.number : null);
      if (mark) page.announceMark('selected', mark);
    } else if (page.tool === 'point') {
      page.gestures.finish(page.newMark('point', [p]));
    } else if (page.tool === 'triangle' || isOutline(page)) {
      page.gestures.addCorner(p);
    } else if (stage.trail) {
      page.gestures.finish(page.gestures.drawn(stage.trail, true));
    } else if (stage.keyStart) {
      page.gestures.finish(page.gestures.drawn([stage.keyStart, p], true));
    } else {
      if (page.tool === 'scribble') stage.trail = [p];
      else stage.keyStart = p;
      page.say(t('hint_keys'));
    }
  }
}

const whereOf = (p) => ({x: Math.round(p[0]), y: Math.round(p[1])});
