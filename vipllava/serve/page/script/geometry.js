// Marks as geometry in pixels of the upright picture. A mark is never changed, only replaced:
// {number, shape, kind, points, colour, width, alpha}; `kind` is how its place is given:
// box (two corners), point, polygon (one ring), stroke (a line drawn by hand).

const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const rounded = (p) => [Math.round(p[0] * 100) / 100, Math.round(p[1] * 100) / 100];

function inside(p, size) {
  return [Math.min(Math.max(p[0], 0), size[0]), Math.min(Math.max(p[1], 0), size[1])];
}

function boundsOf(points) {
  const xs = points.map((p) => p[0]);
  const ys = points.map((p) => p[1]);
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  return [least(xs), least(ys), most(xs), most(ys)];
}

const cornersOf = (a, b) => {
  const [x1, y1, x2, y2] = boundsOf([a, b]);
  return [[x1, y1], [x2, y2]];
};

// The triangle that a drag from corner to corner means: its tip above the middle of its base.
const triangleIn = (a, b) => {
  const [x1, y1, x2, y2] = boundsOf([a, b]);
  return [[(x1 + x2) / 2, y1], [x2, y2], [x1, y2]];
};

function fromSegment(p, a, b) {
  const [dx, dy] = [b[0] - a[0], b[1] - a[1]];
  const length = dx * dx + dy * dy;
  const share = length ? ((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / length : 0;
  const at = Math.min(1, Math.max(0, share));
  return distance(p, [a[0] + at * dx, a[1] + at * dy]);
}

// Douglas-Peucker: drops points that lie within `reach` of the line without them.
function simplified(points, reach) {
  if (points.length < 3) return points.slice();
  const kept = new Array(points.length).fill(false);
  kept[0] = kept[points.length - 1] = true;
  const open = [[0, points.length - 1]];
  while (open.length) {
    const [first, last] = open.pop();
    let [worst, at] = [reach, -1];
    for (let i = first + 1; i < last; i += 1) {
      const off = fromSegment(points[i], points[first], points[last]);
      if (off > worst) [worst, at] = [off, i];
    }
    if (at >= 0) {
      kept[at] = true;
      open.push([first, at], [at, last]);
    }
  }
  return points.filter((_, i) => kept[i]);
}

function isInRing(p, ring) {
  let found = false;
  for (let i = 0, j = ring.length - 1; i < ring.length; j = i, i += 1) {
    const [[x1, y1], [x2, y2]] = [ring[i], ring[j]];
    if (y1 > p[1] !== y2 > p[1] && p[0] < ((x2 - x1) * (p[1] - y1)) / (y2 - y1) + x1) found = !found;
  }
  return found;
}

// Whether a press at `p` means this mark; `reach` is how far off it may be.
function isHit(mark, p, reach) {
  const {points, kind} = mark;
  if (kind === 'point') return distance(p, points[0]) <= reach * 1.5;
  if (kind === 'box') {
    const [[x1, y1], [x2, y2]] = points;
    return p[0] >= x1 - reach && p[0] <= x2 + reach && p[1] >= y1 - reach && p[1] <= y2 + reach;
  }
  const closed = kind === 'polygon' || mark.shape === 'triangle';
  if (closed && isInRing(p, points)) return true;
  const ends = closed ? [...points, points[0]] : points;
  return ends.some((end, i) => i > 0 && fromSegment(p, ends[i - 1], end) <= reach);
}

function areaOf(mark) {
  const [x1, y1, x2, y2] = boundsOf(mark.points);
  return (x2 - x1) * (y2 - y1);
}

// Moves a whole mark, as far as the picture reaches.
function moved(mark, dx, dy, size) {
  const [x1, y1, x2, y2] = boundsOf(mark.points);
  const right = Math.min(Math.max(dx, -x1), size[0] - x2);
  const down = Math.min(Math.max(dy, -y1), size[1] - y2);
  return {...mark, points: mark.points.map((p) => rounded([p[0] + right, p[1] + down]))};
}

// What a person can take hold of: corners and sides of a box, else the points themselves; the
// corners of the bounds where those are too many.
const MOST_HANDLES = 24;

function scalesWhole(mark) {
  return mark.kind === 'box' || mark.points.length > MOST_HANDLES;
}

function handlesOf(mark) {
  if (!scalesWhole(mark)) return mark.points;
  const [x1, y1, x2, y2] = boundsOf(mark.points);
  const [x, y] = [(x1 + x2) / 2, (y1 + y2) / 2];
  return [[x1, y1], [x, y1], [x2, y1], [x2, y], [x2, y2], [x, y2], [x1, y2], [x1, y]];
}

// The mark with handle `index` at `p`.
function pulled(mark, index, p, size) {
  const to = inside(p, size);
  if (!scalesWhole(mark)) {
    return {...mark, points: mark.points.map((old, i) => (i === index ? rounded(to) : old))};
  }
  const old = boundsOf(mark.points);
  const now = old.slice();
  if ([0, 6, 7].includes(index)) now[0] = to[0];
  if ([2, 3, 4].includes(index)) now[2] = to[0];
  if ([0, 1, 2].includes(index)) now[1] = to[1];
  if ([4, 5, 6].includes(index)) now[3] = to[1];
  if (mark.kind === 'box') {
    return {...mark, points: cornersOf(now.slice(0, 2), now.slice(2)).map(rounded)};
  }
  const along = (value, axis) => {
    const [from, to2] = [old[axis], old[axis + 2]];
    const share = to2 > from ? (value - from) / (to2 - from) : 0;
    return now[axis] + share * (now[axis + 2] - now[axis]);
  };
  return {...mark, points: mark.points.map((q) => rounded([along(q[0], 0), along(q[1], 1)]))};
}

// Whether there is something to draw: a box without area, e.g., is none.
function isWhole(mark) {
  const [x1, y1, x2, y2] = boundsOf(mark.points);
  if (mark.kind === 'box') return x2 - x1 >= 1 && y2 - y1 >= 1;
  if (mark.kind === 'polygon') return mark.points.length >= 3 && x2 > x1 && y2 > y1;
  if (mark.kind === 'stroke') return mark.points.length >= 2 && (x2 > x1 || y2 > y1);
  return true;
}

// The mark in the words of users' records, as Python reads it.
function fieldsOf(mark) {
  const fields = {shape: mark.shape, colour: mark.colour, alpha: mark.alpha};
  if (mark.width) fields.width = mark.width;
  const {points} = mark;
  if (mark.kind === 'box') fields.box = [...points[0], ...points[1]];
  else if (mark.kind === 'point') fields.point = points[0];
  else fields[mark.kind] = points;
  return fields;
}

// A mark from such words; the other way round.
function markOf(fields, number) {
  const kind = ['box', 'point', 'polygon', 'stroke'].find((name) => fields[name]);
  const place = fields[kind];
  const points = {
    box: () => [place.slice(0, 2), place.slice(2)], point: () => [place],
    polygon: () => place, stroke: () => place,
  }[kind]();
  const {shape, colour, width = null, alpha = 128} = fields;
  return {number, shape, kind, points, colour, width, alpha};
}
