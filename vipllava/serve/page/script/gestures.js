// Mouse, pen and touch: presses and drags become marks, moves, pulls and zooms.

const CLICK = 4; // CSS pixels that a press may wander and be a click still
const DRAGGED = ['rectangle', 'ellipse', 'arrow']; // by a drag alone
const OUTLINED = ['mask', 'mask contour'];

const isOutline = (page) => OUTLINED.includes(page.tool) && page.maskBy === 'outline';

class Gestures {
  constructor(page) {
    this.page = page;
    this.pointers = new Map();
    this.doing = null;
    const {frame} = page.stage;
    frame.addEventListener('pointerdown', (event) => this.down(event));
    frame.addEventListener('pointermove', (event) => this.move(event));
    frame.addEventListener('pointerup', (event) => this.up(event));
    frame.addEventListener('pointercancel', (event) => this.cancelled(event));
    frame.addEventListener('dblclick', (event) => {
      event.preventDefault();
      this.closeOutline();
    });
    frame.addEventListener('wheel', (event) => this.wheel(event), {passive: false});
    frame.addEventListener('contextmenu', (event) => this.doing && event.preventDefault());
  }

  at(event) {
    const {view} = this.page.stage;
    return inside(view.toImage(event.clientX, event.clientY), view.size);
  }

  // How far a press may be off, in pixels of the picture.
  reach(event, css) {
    const coarse = event.pointerType === 'touch' ? 2 : 1;
    return (css * coarse) / this.page.stage.view.scale;
  }

  down(event) {
    const {page} = this;
    if (!page.picture || page.seen || event.target.closest('button')) return;
    page.stage.byKeys = false;
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    page.stage.frame.setPointerCapture(event.pointerId);
    if (this.pointers.size === 2) return this.beginPinch();
    if (this.pointers.size > 2) return undefined;
    if (event.button === 1 || page.stage.panning) return this.begin('pan', event);
    if (event.button !== 0) return undefined;
    const p = this.at(event);
    const handle = this.handleAt(p, event);
    if (handle >= 0) return this.begin('pull', event, {mark: page.marks.chosen, handle});
    if (page.tool !== 'select') return this.begin('draw', event, {points: [p]});
    const mark = this.markAt(p, event);
    page.marks.select(mark ? mark.number : null);
    return mark ? this.begin('carry', event, {mark}) : this.begin('pan', event);
  }

  begin(what, event, more) {
    const start = [event.clientX, event.clientY];
    this.doing = {what, id: event.pointerId, start, last: start, from: this.at(event), far: false, ...more};
    event.preventDefault();
    this.page.stage.frame.focus({preventScroll: true});
  }

  move(event) {
    const {page, doing} = this;
    const known = this.pointers.has(event.pointerId);
    if (known) this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (!doing) {
      if (page.picture) this.hover(event);
      return;
    }
    if (doing.what === 'pinch') {
      if (known) this.pinch();
      return;
    }
    if (event.pointerId !== doing.id) return;
    const now = [event.clientX, event.clientY];
    doing.far = doing.far || distance(doing.start, now) >= CLICK;
    if (doing.what === 'pan') {
      page.stage.view.pan(now[0] - doing.last[0], now[1] - doing.last[1]);
    } else if (doing.far) {
      const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
      for (const each of events.length ? events : [event]) this.follow(each);
      page.paint();
    }
    doing.last = now;
  }

  follow(event) {
    const {page, doing} = this;
    const p = this.at(event);
    const {size} = page.stage.view;
    if (doing.what === 'draw') {
      doing.points.push(p);
      page.stage.draft = this.drawn(doing.points, false);
    } else if (doing.what === 'pull') {
      page.stage.draft = pulled(doing.mark, doing.handle, p, size);
    } else if (doing.what === 'carry') {
      page.stage.draft = moved(doing.mark, p[0] - doing.from[0], p[1] - doing.from[1], size);
    }
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    const {page, doing} = this;
    if (!doing || (doing.what !== 'pinch' && event.pointerId !== doing.id)) return;
    if (doing.what === 'pinch') {
      if (this.pointers.size < 2) this.doing = null;
      return;
    }
    this.doing = null;
    const {draft} = page.stage;
    page.stage.draft = null;
    if (doing.what === 'draw') {
      if (doing.far) this.finish(this.drawn([...doing.points, this.at(event)], true));
      else this.click(doing.from, event);
    } else if (draft && isWhole(draft)) {
      page.marks.replace(draft);
    }
    page.paint();
  }

  cancelled(event) {
    this.pointers.delete(event.pointerId);
    if (this.doing && this.doing.id === event.pointerId) this.cancel();
  }

  // Escape: what is being done has not been begun.
  cancel() {
    const {stage} = this.page;
    const was = this.doing || stage.corners || stage.keyStart;
    this.doing = null;
    Object.assign(stage, {draft: null, corners: null, keyStart: null, trail: null});
    this.page.paint();
    return Boolean(was);
  }

  // What a drag through `points` draws with the present tool.
  drawn(points, simple) {
    const {page} = this;
    const [first, last] = [points[0], points[points.length - 1]];
    const thin = (list) => (simple ? simplified(list, 0.6 / page.stage.view.scale) : list);
    if (page.tool === 'point') return page.newMark('point', [last]);
    if (page.tool === 'arrow') return page.newMark('stroke', [first, last]);
    if (page.tool === 'triangle') return page.newMark('stroke', triangleIn(first, last));
    if (page.tool === 'scribble') return page.newMark('stroke', thin(points));
    if (isOutline(page)) return page.newMark('polygon', thin(points));
    return page.newMark('box', cornersOf(first, last));
  }

  click(p, event) {
    const {page} = this;
    const {stage} = page;
    if (page.tool === 'point') return this.finish(page.newMark('point', [p]));
    if (page.tool === 'triangle' || isOutline(page)) {
      const corners = stage.corners || [];
      const closing = corners.length > 2 && distance(corners[0], p) <= this.reach(event, 10);
      if (closing) return this.closeOutline();
      return this.addCorner(p);
    }
    const mark = this.markAt(p, event);
    page.marks.select(mark ? mark.number : null);
    if (!mark) page.say(t('hint_drag'));
    return undefined;
  }

  // Of a triangle or an outline that is drawn corner by corner.
  addCorner(p) {
    const {page} = this;
    const {stage} = page;
    const last = (stage.corners || []).slice(-1)[0];
    if (last && distance(last, p) < 0.5) return;
    stage.corners = [...(stage.corners || []), p];
    if (page.tool === 'triangle' && stage.corners.length === 3) {
      this.finish(page.newMark('stroke', stage.corners));
      return;
    }
    stage.draft = page.newMark(page.tool === 'triangle' ? 'stroke' : 'polygon', stage.corners);
    page.say(t(page.tool === 'triangle' ? 'hint_triangle' : 'hint_outline'));
    page.paint();
  }

  closeOutline() {
    const {page} = this;
    const {corners} = page.stage;
    if (!corners) return false;
    if (page.tool !== 'triangle' && corners.length >= 3) this.finish(page.newMark('polygon', corners));
    return true;
  }

  finish(mark) {
    const {page} = this;
    Object.assign(page.stage, {draft: null, corners: null, keyStart: null, trail: null});
    if (isWhole(mark)) page.addMark(mark);
    else page.paint();
  }

  handleAt(p, event) {
    const chosen = this.page.marks.chosen;
    if (!chosen || this.page.stage.corners) return -1;
    const reach = this.reach(event, 9);
    return handlesOf(chosen).findIndex((handle) => distance(handle, p) <= reach);
  }

  // Of several marks the smallest: the larger ones can be taken hold of elsewhere.
  markAt(p, event) {
    const hit = this.page.marks.list.filter((mark) => isHit(mark, p, this.reach(event, 6)));
    return hit.sort((a, b) => areaOf(a) - areaOf(b))[0] || null;
  }

  hover(event) {
    const {page} = this;
    const p = this.at(event);
    const over = this.handleAt(p, event) >= 0 ? 'handle' : this.markAt(p, event) ? 'mark' : 'none';
    page.stage.frame.dataset.over = over;
    if (page.stage.corners && event.pointerType !== 'touch') {
      const kind = page.tool === 'triangle' ? 'stroke' : 'polygon';
      page.stage.draft = page.newMark(kind, [...page.stage.corners, p]);
      page.paint();
    }
  }

  beginPinch() {
    this.cancel();
    const [a, b] = [...this.pointers.values()];
    this.doing = {what: 'pinch', apart: distance(a, b), middle: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]};
  }

  pinch() {
    const [a, b] = [...this.pointers.values()];
    if (!b) return;
    const {doing} = this;
    const {view} = this.page.stage;
    const [apart, middle] = [distance(a, b), [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]];
    view.pan(middle[0] - doing.middle[0], middle[1] - doing.middle[1]);
    view.zoomBy(apart / (doing.apart || 1), middle);
    Object.assign(doing, {apart, middle});
  }

  // The wheel zooms with Ctrl (as a pinch on a trackpad does) or once the picture has the focus;
  // before that it scrolls the page.
  wheel(event) {
    const {stage, picture} = this.page;
    const mine = event.ctrlKey || event.metaKey || document.activeElement === stage.frame;
    if (!picture || !mine) return;
    event.preventDefault();
    const notches = event.deltaMode ? event.deltaY * 16 : event.deltaY;
    stage.view.zoomBy(Math.exp(-notches / 400), [event.clientX, event.clientY]);
  }
}
