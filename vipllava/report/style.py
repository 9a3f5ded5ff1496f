"""The pages' style sheet: system fonts, light and dark, narrow and wide."""

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #16161a; --soft: #5c5b57; --line: #e4e3df;
  --marked: #2a6fdb; --unmarked: #a3a29d; --right: #12784a; --right-bg: #e3f4ea;
  --wrong: #b3261e; --wrong-bg: #fce8e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16161a; --card: #1f1f24; --ink: #f1f0ec; --soft: #a9a8a2; --line: #34343a;
    --marked: #5b9bff; --unmarked: #77767a; --right: #6fd6a0; --right-bg: #14352a;
    --wrong: #ff9a91; --wrong-bg: #3f1f1d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 2.2rem 1.2rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .3rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 .8rem; max-width: 70ch; }
.soft, figcaption, footer { color: var(--soft); }
figcaption { font-size: .9rem; min-height: 3em; }
.ends { float: right; font-weight: 400; font-variant-numeric: tabular-nums; }
.hero { display: grid; grid-template-columns: minmax(15rem, 1fr) 2fr; gap: 2rem;
  align-items: center; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; padding: 1.4rem 1.6rem; margin-top: 1.4rem; }
.hero .number { font-size: 3.4rem; font-weight: 650; line-height: 1.05; }
.hero p { margin: .4rem 0 0; }
.bars .label { margin: .5rem 0 .2rem; }
.track { position: relative; height: 1.6rem; border-radius: 4px; background-color: var(--line); }
.bar { height: 100%; border-radius: 4px; }
.bar.marked { background: var(--marked); }
.bar.unmarked { background: var(--unmarked); }
.whisker { position: absolute; top: 25%; height: 50%; border: solid var(--ink);
  border-width: 0 2px; }
.whisker::after { content: ""; position: absolute; inset: calc(50% - 1px) 0 auto;
  border-top: 2px solid var(--ink); }
.ticks { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem;
  margin-top: .3rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0 2.4rem; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr));
  gap: 1rem; margin-top: .8rem; }
.card, figure.panel { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: .9rem; }
.card { display: flex; flex-direction: column; }
.card img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  background: var(--paper); border-radius: 6px; margin-bottom: .7rem; }
.card .question { font-size: .9rem; margin: 0 0 .3rem; }
.card .suffix { font-size: .78rem; margin: 0 0 .6rem; line-height: 1.35; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .3rem .8rem;
  margin: auto 0 0; font-size: .9rem; align-items: baseline; }
.card dt { color: var(--soft); }
.card dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: .02rem .5rem; border-radius: 999px; font-weight: 600; }
.right { color: var(--right); background: var(--right-bg); }
.wrong { color: var(--wrong); background: var(--wrong-bg); }
.sheet { display: block; width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .93rem; }
th, td { padding: .34rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
.total th, .total td { font-weight: 650; border-bottom: 0; border-top: 2px solid var(--line); }
td .soft { font-size: .85em; font-weight: 400; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg .tick { fill: var(--soft); font-size: 12.5px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .raw { fill: none; stroke: var(--marked); stroke-opacity: .3; stroke-width: 1; }
svg .smooth { fill: none; stroke: var(--marked); stroke-width: 2.2; stroke-linejoin: round; }
svg .end { fill: var(--marked); stroke: var(--card); stroke-width: 1.5; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: .88rem; }
footer dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1.2rem; margin: 0; }
footer dt { font-weight: 600; }
footer dd { margin: 0; }
@media (max-width: 720px) {
  .hero { grid-template-columns: 1fr; gap: 1rem; padding: 1.1rem; }
  .sheet { width: 46rem; max-width: none; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .7rem; }
  .card { padding: .6rem; }
  .card dl { grid-template-columns: 1fr; gap: .1rem; }
  .card dd { text-align: left; margin-bottom: .3rem; }
}
"""
