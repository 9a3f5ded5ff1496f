// Where the picture is in its window: zoom, pan, and from one kind of coordinates to the other.

class View {
  constructor(frame, sheet, changed) {
    this.frame = frame; // the window
    this.sheet = sheet; // the picture and what lies on it
    this.changed = changed;
    this.size = [1, 1];
    this.zoom = 1; // 1: the whole picture is seen
    this.shown = [1, 1]; // width and height on the screen, CSS pixels
    this.at = [0, 0]; // of the sheet's corner in the frame, CSS pixels
  }

  get fitting() {
    const [w, h] = this.size;
    const most = 8; // a picture of few pixels does not become a wall
    return Math.min(this.frame.clientWidth / w, this.frame.clientHeight / h, most) || 1;
  }

  get scale() {
    return this.fitting * this.zoom;
  }

  open(size) {
    this.size = size;
    this.fit();
  }

  fit() {
    this.zoom = 1;
    this.place(0, 0);
  }

  // Puts the sheet's corner somewhere; what is smaller than its window stays in the middle.
  place(left, top) {
    const {scale} = this;
    const within = (value, length, room) =>
      length <= room ? (room - length) / 2 : Math.min(0, Math.max(room - length, value));
    // Whole pixels of the screen: the browser paints pictures there, whatever it is told, and what
    // is seen would not be what is pressed.
    const dots = window.devicePixelRatio || 1;
    const whole = (value) => Math.round(value * dots) / dots;
    const [width, height] = this.size.map((length) => Math.max(1, whole(length * scale)));
    this.shown = [width, height];
    this.at = [
      whole(within(left, width, this.frame.clientWidth)),
      whole(within(top, height, this.frame.clientHeight)),
    ];
    Object.assign(this.sheet.style, {
      width: `${width}px`, height: `${height}px`,
      transform: `translate(${this.at[0]}px, ${this.at[1]}px)`,
    });
    this.changed();
  }

  again() {
    this.place(...this.at);
  }

  pan(dx, dy) {
    this.place(this.at[0] + dx, this.at[1] + dy);
  }

  // Zooms so that what is at a place of the screen stays there; the middle by default.
  zoomBy(factor, client) {
    const frame = this.frame.getBoundingClientRect();
    const [x, y] = client
      ? [client[0] - frame.left, client[1] - frame.top]
      : [frame.width / 2, frame.height / 2];
    const most = Math.max(1, 40 / this.fitting);
    const zoom = Math.min(most, Math.max(1, this.zoom * factor));
    const ratio = zoom / this.zoom;
    this.zoom = zoom;
    this.place(x - (x - this.at[0]) * ratio, y - (y - this.at[1]) * ratio);
  }

  toImage(clientX, clientY) {
    const box = this.sheet.getBoundingClientRect();
    return [
      ((clientX - box.left) / box.width) * this.size[0],
      ((clientY - box.top) / box.height) * this.size[1],
    ];
  }

  // In CSS pixels of the frame.
  toFrame(p) {
    return p.map((value, axis) => (value * this.shown[axis]) / this.size[axis] + this.at[axis]);
  }

  // Brings a place of the picture into the window.
  reveal(p) {
    const [x, y] = this.toFrame(p);
    const edge = 24;
    const off = (value, room) =>
      value < edge ? edge - value : value > room - edge ? room - edge - value : 0;
    const [dx, dy] = [off(x, this.frame.clientWidth), off(y, this.frame.clientHeight)];
    if (dx || dy) this.pan(dx, dy);
  }
}
