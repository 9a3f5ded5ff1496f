"""What the inspect page adds to :mod:`vipllava.report.style`: tokens, chips, marks."""

from typing import Final

INSPECT_STYLE: Final = """
:root {
  --learned: #0a5535; --learned-bg: #d3f1df; --learned-tick: #8fcfa9; --tick: #dddcd6;
  --chip: #43425a; --chip-bg: #ebeaf4; --chip-line: #c9c7dd; --view: #1f5fc4; --view-bg: #e4eefc;
  --code: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --learned: #a6efc6; --learned-bg: #17442f; --learned-tick: #33805a; --tick: #3f3f47;
    --chip: #d2d0ea; --chip-bg: #32313f; --chip-line: #55536b; --view: #9cc3ff; --view-bg: #1e314e;
  }
}
html { scroll-padding-top: 1rem; }
a { color: var(--view); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
code, .key { font-family: var(--code); font-size: .92em; overflow-wrap: anywhere; }
.job { display: grid; gap: 1rem; margin-top: 1.4rem; }
.job.with-marks { grid-template-columns: minmax(0, 3fr) minmax(16rem, 1fr); }
.job .left { display: grid; gap: 1rem; grid-template-rows: auto 1fr; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr));
  gap: 1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.1rem; }
.tile .number { font-size: 2rem; font-weight: 650; line-height: 1.1;
  font-variant-numeric: tabular-nums; }
.tile .number small { font-size: .95rem; font-weight: 400; color: var(--soft); }
.tile p { margin: .3rem 0 0; font-size: .92rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 100%), 1fr));
  gap: .7rem 1.4rem; margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 1rem 1.1rem; }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts .wide { grid-column: 1 / -1; }
.shapes { list-style: none; margin: .7rem 0 0; padding: 0; font-size: .86rem; display: grid;
  grid-template-columns: auto 1fr auto; gap: .2rem .6rem; align-items: center; }
.shapes li { display: contents; }
.shapes i { height: .5rem; border-radius: 3px; background: var(--marked); min-width: 2px; }
.shapes b { font-weight: 400; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; margin: 1rem 0 0; padding: 0;
  list-style: none; font-size: .9rem; line-height: 1.7; }
.legend .blank { white-space: pre; }
.contents { display: grid; gap: .1rem 1.2rem; margin: .6rem 0 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); font-size: .9rem; }
.contents a { display: flex; gap: .7rem; align-items: baseline; padding: .22rem 0;
  border-bottom: 1px solid var(--line); }
.contents .at { color: var(--soft); min-width: 1.6em; text-align: right;
  font-variant-numeric: tabular-nums; }
.contents .key { flex: 1; }
.contents .soft { font-variant-numeric: tabular-nums; }
.contents .wrong { padding: 0 .4rem; border-radius: 4px; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  margin-top: 1.4rem; overflow: hidden; }
.sample > header { display: flex; flex-wrap: wrap; gap: .25rem .9rem; align-items: baseline;
  padding: .85rem 1.2rem .75rem; border-bottom: 1px solid var(--line); }
.sample h2 { margin: 0; font-size: 1.05rem; line-height: 1.3; display: flex; gap: .7rem;
  align-items: baseline; }
.sample h2 .at { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums; }
.badge { font-size: .8rem; padding: .06rem .55rem; border-radius: 999px; color: var(--chip);
  background: var(--chip-bg); white-space: nowrap; }
.badge.wrong { color: var(--wrong); background: var(--wrong-bg); }
.sample .where { font-size: .84rem; color: var(--soft); overflow-wrap: anywhere; }
.body { display: grid; grid-template-columns: 336px minmax(0, 1fr); gap: 1.3rem 1.6rem;
  padding: 1.2rem; }
.view { margin: 0; }
.view label { display: block; cursor: zoom-in; width: min(var(--shown), 100%); }
.view img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line);
  image-rendering: pixelated; }
.view figcaption { min-height: 0; margin-top: .5rem; font-size: .86rem; line-height: 1.45; }
.zoom { position: absolute; opacity: 0; }
.zoom:focus-visible + img { outline: 3px solid var(--view); outline-offset: 2px; }
.body:has(.zoom:checked) { grid-template-columns: minmax(0, 1fr); }
.body:has(.zoom:checked) label { width: min(var(--large), 100%); cursor: zoom-out; }
.none { display: grid; place-items: center; text-align: center; min-height: 8rem; padding: 1rem;
  border: 1.5px dashed var(--line); border-radius: 8px; color: var(--soft); font-size: .92rem; }
.budget { display: flex; height: .5rem; border-radius: 4px; overflow: hidden;
  background: var(--line); margin-bottom: .45rem; }
.budget i { min-width: 1px; }
.of-picture { background: var(--marked); }
.of-text { background: var(--unmarked); }
.of-answer { background: var(--right); }
.counts { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 1rem; padding: 0;
  list-style: none; font-size: .86rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.counts b { color: var(--ink); font-weight: 600; }
.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 2px;
  margin-right: .35rem; }
.talk { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .55rem .9rem; }
.talk .side { font-size: .78rem; line-height: 1.35; color: var(--soft); text-align: right;
  padding-top: .28rem; font-variant-numeric: tabular-nums; }
.talk .side b { display: block; font-weight: 600; }
.talk .side.learned b { color: var(--right); }
.said { margin: 0; font-size: .95rem; line-height: 1.75; white-space: pre-wrap;
  overflow-wrap: anywhere; padding-left: .9rem; border-left: 3px solid var(--line); min-width: 0; }
.said.learned { border-left-color: var(--right); }
.said.dropped { color: var(--soft); border-left-style: dashed; }
.t { box-shadow: inset -1px 0 0 var(--tick); }
.t.fixed { color: var(--soft); }
.learned .t { color: var(--learned); background: var(--learned-bg);
  box-shadow: inset -1px 0 0 var(--learned-tick); }
.t.special, .t.odd { font-family: var(--code); font-size: .84em; padding: .08em .34em;
  color: var(--chip); background: var(--chip-bg); border-radius: 4px;
  box-shadow: inset 0 0 0 1px var(--chip-line); white-space: nowrap; }
.learned .t.special { color: var(--learned); background: var(--learned-bg);
  box-shadow: inset 0 0 0 1.5px var(--right); font-weight: 600; }
.t.image { color: var(--view); background: var(--view-bg); border-radius: 999px; font-size: .86em;
  padding: .14em .7em; box-shadow: none; white-space: nowrap; }
.t.silent::before { content: "\\2581"; opacity: .7; }
.t.blank { background-image: radial-gradient(circle, currentColor 1px, transparent 1.3px);
  background-size: .28em 100%; background-position: center; }
.nl::before { content: "\\21b5"; opacity: .75; }
.tab::before { content: "\\21e5"; opacity: .75; }
.code-point { font-family: var(--code); font-size: .72em; padding: 0 .25em; border-radius: 3px;
  box-shadow: inset 0 0 0 1px currentColor; }
.why { font-size: .86rem; color: var(--soft); margin: .1rem 0 0; }
.fault { grid-column: 1 / -1; margin: 0; max-width: none; padding: .7rem .9rem;
  border-radius: 8px; color: var(--wrong); background: var(--wrong-bg); overflow-wrap: anywhere;
  white-space: pre-wrap; }
.sample > .fault { margin: 1.2rem; }
.sample h3 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 1.4rem 0 .5rem; }
.marks { display: grid; gap: .7rem; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.marks li { display: grid; grid-template-columns: 1.7rem minmax(0, 1fr); gap: 0 .7rem;
  border: 1px solid var(--line); border-radius: 9px; padding: .6rem .7rem; }
.swatch { width: 1.7rem; height: 1.7rem; border-radius: 6px; border: 1px solid var(--soft);
  background: linear-gradient(100deg, rgb(var(--rgb)) 50%, rgb(var(--rgb) / var(--alpha)) 50%),
    conic-gradient(#888 25%, #eee 0 50%, #888 0 75%, #eee 0) 0 0 / .6rem .6rem; }
.marks .words { font-weight: 600; line-height: 1.35; }
.marks dl { grid-column: 2; display: grid; grid-template-columns: auto minmax(0, 1fr);
  gap: .05rem .7rem; margin: .25rem 0 0; font-size: .84rem; line-height: 1.45; }
.marks dt { color: var(--soft); }
.marks dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.marks .wrong { border-radius: 4px; padding: 0 .3rem; }
@media (max-width: 860px) {
  .job.with-marks { grid-template-columns: minmax(0, 1fr); }
  .body { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 520px) {
  body { padding-left: .8rem; padding-right: .8rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  .body, .sample > header { padding-left: .85rem; padding-right: .85rem; }
  .talk { grid-template-columns: minmax(0, 1fr); gap: .15rem; }
  .talk .side { text-align: left; padding-top: .5rem; }
  .talk .side b { display: inline; }
}
@media print {
  .sample { break-inside: avoid; }
}
"""
