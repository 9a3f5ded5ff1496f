// Marks on the screen: as the server planned them, and until it has answered as they will be.

const ANCHOR = 336; // the picture's longer side at which widths are as given

function widthOf(mark, size) {
  if (mark.width) return mark.width;
  const scale = Math.max(...size) / ANCHOR;
  if (mark.shape === 'point') return Math.max(5, Math.round(8 * scale));
  if (mark.shape === 'mask contour') return Math.max(1, Math.round(scale));
  return Math.max(3, Math.round(3 * scale));
}

// What the server will answer, nearly; for what is being drawn.
function strokesAtOnce(mark, size) {
  const width = widthOf(mark, size);
  const {points, shape, kind} = mark;
  if (kind === 'point') {
    const [x, y] = points[0];
    return [{kind: 'ellipse', points: [[x - width, y - width], [x + width, y + width]], width: 0}];
  }
  if (kind === 'box') {
    if (shape === 'mask') return [{kind: 'box', points, width: 0}];
    return [{kind: shape === 'ellipse' ? 'ellipse' : 'box', points, width}];
  }
  if (kind === 'polygon') {
    return shape === 'mask'
      ? [{kind: 'polygon', points, width: 0}]
      : [{kind: 'contour', points, width: 2 * width + 1}];
  }
  if (shape === 'triangle') return [{kind: 'polygon', points, width}];
  if (shape !== 'arrow' || points.length < 2) return [{kind: 'line', points, width}];
  const [tail, tip] = points;
  const [length, angle] = [distance(tail, tip), Math.atan2(tail[1] - tip[1], tail[0] - tip[0])];
  const ends = [-0.45, 0.45].map((turn) => [
    tip[0] + 0.35 * length * Math.cos(angle + turn), tip[1] + 0.35 * length * Math.sin(angle + turn),
  ]);
  return [{kind: 'line', points, width}, {kind: 'line', points: [ends[0], tip, ends[1]], width}];
}

function drawStroke(stroke, colour) {
  const {kind, points, width} = stroke;
  const look = width
    ? {fill: 'none', stroke: colour, 'stroke-width': width}
    : {fill: colour, stroke: 'none'};
  if (kind === 'box' || kind === 'ellipse') {
    const [x1, y1, x2, y2] = boundsOf(points);
    const inset = Math.min(width, x2 - x1, y2 - y1) / 2; // outlines are painted inwards
    const [w, h] = [Math.max(0, x2 - x1 - 2 * inset), Math.max(0, y2 - y1 - 2 * inset)];
    if (kind === 'box') {
      return svg('rect', {...look, x: x1 + inset, y: y1 + inset, width: w, height: h});
    }
    const middle = {cx: (x1 + x2) / 2, cy: (y1 + y2) / 2};
    return svg('ellipse', {...look, ...middle, rx: w / 2, ry: h / 2});
  }
  const list = points.map((p) => p.join(',')).join(' ');
  const join = kind === 'contour' ? 'miter' : 'round';
  const tag = kind === 'line' ? 'polyline' : 'polygon';
  return svg(tag, {...look, points: list, 'stroke-linejoin': join});
}

function cssColour(colour, palette) {
  const rgb = Array.isArray(colour) ? colour : palette[colour] || palette.red;
  return `rgb(${rgb.join(', ')})`;
}

function drawMark(mark, plan, size, palette) {
  const strokes = plan && plan.strokes ? plan.strokes : strokesAtOnce(mark, size);
  const colour = cssColour(plan && plan.rgb ? plan.rgb : mark.colour, palette);
  const group = svg('g', {opacity: mark.alpha / 255, 'data-mark': mark.number});
  for (const stroke of strokes) {
    if (stroke.points.length > 1 || stroke.kind === 'ellipse') group.append(drawStroke(stroke, colour));
  }
  return group;
}

// The layer whose unit is the picture's pixel.
function paintMarks(page) {
  const {layer, view, draft} = page.stage;
  layer.setAttribute('viewBox', `0 0 ${view.size[0]} ${view.size[1]}`);
  const replaced = draft && draft.number !== undefined ? draft.number : null;
  const marks = page.marks.list.map((mark) => (mark.number === replaced ? draft : mark));
  if (draft && replaced === null) marks.push({...draft, number: 'draft'});
  layer.replaceChildren(
    ...marks.map((mark) => drawMark(mark, page.planner.of(mark), view.size, page.palette)),
  );
}

// The layer whose unit is the screen's: numbers, handles, the keyboard's cursor.
function paintTools(page) {
  const {tools, view, draft, corners, cursor} = page.stage;
  const nodes = [];
  const at = (p) => view.toFrame(p).map((v) => Math.round(v * 10) / 10);
  for (const mark of page.marks.list) {
    const now = draft && draft.number === mark.number ? draft : mark;
    const [x1, y1] = boundsOf(now.points);
    const shown = page.planner.of(mark);
    const [x, y] = at(shown && shown.strokes ? topOf(shown.strokes, [x1, y1]) : [x1, y1]);
    nodes.push(numberTag(mark, x, y, mark.number === page.marks.selected));
  }
  const chosen = draft && draft.number !== undefined ? draft : page.marks.chosen;
  if (chosen && !page.seen) {
    if (scalesWhole(chosen)) {
      const [x1, y1, x2, y2] = boundsOf(chosen.points);
      const [[a, b], [c, d]] = [at([x1, y1]), at([x2, y2])];
      nodes.push(svg('rect', {class: 'vip-frame', x: a, y: b, width: c - a, height: d - b}));
    }
    handlesOf(chosen).forEach((p, index) => {
      const [x, y] = at(p);
      nodes.push(svg('circle', {class: 'vip-handle', cx: x, cy: y, r: 5, 'data-handle': index}));
    });
  }
  for (const p of corners || []) {
    const [x, y] = at(p);
    nodes.push(svg('circle', {class: 'vip-vertex', cx: x, cy: y, r: 4}));
  }
  if (cursor && page.stage.byKeys) {
    const [x, y] = at(cursor);
    const cross = `M${x - 12} ${y}H${x - 3}M${x + 3} ${y}H${x + 12}M${x} ${y - 12}V${y - 3}M${x} ${y + 3}V${y + 12}`;
    nodes.push(svg('path', {class: 'vip-cross back', d: cross}), svg('path', {class: 'vip-cross', d: cross}));
  }
  tools.replaceChildren(...nodes);
}

function topOf(strokes, other) {
  const points = strokes.flatMap((stroke) => stroke.points);
  if (!points.length) return other;
  const [x1, y1] = boundsOf(points);
  return [Math.max(0, x1), Math.max(0, y1)];
}

function numberTag(mark, x, y, chosen) {
  const text = `{${mark.number}}`;
  const width = 12 + 7 * text.length;
  const top = Math.max(0, y - 20);
  return svg(
    'g', {class: chosen ? 'vip-tag chosen' : 'vip-tag', transform: `translate(${Math.max(0, x)} ${top})`},
    svg('rect', {width, height: 18, rx: 5}),
    svg('text', {x: width / 2, y: 13}, text),
  );
}
