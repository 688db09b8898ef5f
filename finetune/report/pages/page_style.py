"""The looks that all pages share: two themes, rows in colour, tables."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #f5f6f8; --card: #fff; --ink: #1c2128; --soft: #59636e; --line: #dde1e6;
  --learned: #d5f2de; --learned-ink: #0c4a24; --learned-line: #2c9156; --pill: #ebe7fb; --pill-ink: #4a2f9a;
  --end: #1f7a45; --end-ink: #fff; --human: #2f5fb3; --model: #1f7a45; --system: #8a5a00;
  --cut: #fff0cf; --cut-ink: #6b4700; --split: #dbeafe; --split-ink: #1b4a91; --dropped: #fde1de;
  --dropped-ink: #8f1d14; --kept: #e6e9ed; --kept-ink: #3d454e; --bar: #5b8def; --odd: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1216; --card: #171b21; --ink: #e4e8ee; --soft: #9aa5b1;
  --line: #2b323b; --learned: #123a25; --learned-ink: #c3f3d4; --learned-line: #3fb46f; --pill: #2c2549;
  --pill-ink: #cfc3ff; --end: #3fb46f; --end-ink: #04160b; --human: #8db4ff; --model: #63d290; --system: #e9b857;
  --cut: #47350b; --cut-ink: #ffdf9a; --split: #17335d; --split-ink: #bcd8ff; --dropped: #521b17;
  --dropped-ink: #ffc9c3; --kept: #2b323b; --kept-ink: #ccd3db; --bar: #6f9dff; --odd: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.65 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", "Noto Color Emoji", sans-serif; }
.page { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h1 small { display: block; font-size: .82rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--soft); }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
.overview { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.5rem 2.5rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.5rem; }
dl { display: grid; align-content: start; grid-template-columns: max-content minmax(0, 1fr); margin: 0;
  gap: .3rem 1.25rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0; align-self: end; } figcaption, .axis { font-size: .8rem; color: var(--soft); }
figure > svg { display: block; width: 100%; height: 6.5rem; border-bottom: 1px solid var(--line); }
figure > svg rect { fill: var(--bar); } .axis { display: flex; justify-content: space-between; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: baseline; margin: 1.25rem 0 0;
  font-size: .88rem; color: var(--soft); }
.legend label { cursor: pointer; border: 1px solid var(--line); border-radius: 99px; padding: .05rem .75rem;
  background: var(--card); color: var(--ink); } .legend .tick.mono { margin-left: auto; }
.choice { position: fixed; top: 0; opacity: 0; pointer-events: none; }
.tick::before { content: "\\2610\\00a0"; } #mono:checked ~ .page .tick.mono::before,
#bare:checked ~ .page .tick.bare::before { content: "\\2611\\00a0"; }
#mono:focus-visible ~ .page .tick.mono, #bare:focus-visible ~ .page .tick.bare { outline: 2px solid var(--bar); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 1.1rem; }
.card > header { display: flex; flex-wrap: wrap; gap: .25rem .9rem; align-items: baseline; padding: .7rem 1.25rem;
  border-bottom: 1px solid var(--line); font-size: .88rem; color: var(--soft); overflow-wrap: anywhere; }
.card > header:last-child { border-bottom: 0; }
h3 { margin: 0; font-size: 1rem; color: var(--ink); }
.badge { border-radius: 99px; padding: .05rem .65rem; font-size: .8rem; font-weight: 600; }
.badge.kept { background: var(--kept); color: var(--kept-ink); }
.badge.cut { background: var(--cut); color: var(--cut-ink); }
.badge.split { background: var(--split); color: var(--split-ink); }
.badge.dropped { background: var(--dropped); color: var(--dropped-ink); }
.numbers { margin-left: auto; font-variant-numeric: tabular-nums; }
.reason { flex-basis: 100%; color: var(--ink); }
.example { padding: .6rem 1.25rem 1rem; } .example + .example { border-top: 1px dashed var(--line); }
.unshown { margin: 0; padding: .3rem 1.25rem 1rem; font-size: .85rem; color: var(--soft); }
.part { margin: .2rem 0 .4rem; font-size: .8rem; font-weight: 600; color: var(--soft); }
.turn { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); gap: .9rem; margin: .3rem 0; }
.role { font-size: .8rem; font-weight: 700; padding-top: .2rem; text-align: right; }
.human .role { color: var(--human); } .model .role { color: var(--model); } .system .role { color: var(--system); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; tab-size: 4;
  border-left: 3px solid var(--line); padding-left: .9rem; }
.human .text { border-color: var(--human); } .system .text { border-color: var(--system); }
.model .text { border-color: var(--model); }
.between { margin: .3rem 0 .3rem 6rem; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.lf::before { content: "\\21b5"; }
.learned { background: var(--learned); color: var(--learned-ink); box-shadow: inset 0 -1px var(--learned-line);
  padding: .14em 0; border-radius: 2px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.control { font: .78em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--pill); color: var(--pill-ink); border-radius: 5px; padding: .1em .42em; margin: 0 .12em;
  white-space: pre-wrap; unicode-bidi: isolate; }
.control.end { background: var(--end); color: var(--end-ink); }
.control.unread { background: none; color: var(--model); box-shadow: inset 0 0 0 1.5px var(--end); }
.odd { font: normal .75em ui-monospace, Menlo, Consolas, monospace; color: var(--odd); border: 1px dotted currentColor;
  border-radius: 3px; padding: 0 .2em; unicode-bidi: isolate; direction: ltr; white-space: nowrap; }
.list { border-collapse: collapse; width: 100%; font-size: .88rem; background: var(--card); }
.list td, .list th { text-align: left; vertical-align: top; padding: .35rem .8rem; border: 1px solid var(--line);
  overflow-wrap: anywhere; } .list th { color: var(--soft); font-weight: 600; }
#mono:checked ~ .page .text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  "Noto Sans Mono CJK SC", monospace; font-size: .86rem; }
#bare:checked ~ .page .between { display: none; }
@media (max-width: 640px) { .page { padding: 1.25rem .75rem 3rem; } .overview { grid-template-columns: minmax(0, 1fr);
  padding: 1rem; } .card > header, .example { padding-left: .9rem; padding-right: .9rem; } .numbers { margin-left: 0; }
  .turn { grid-template-columns: minmax(0, 1fr); gap: .05rem; } .role { text-align: left; padding-top: 0; }
  .between { margin-left: .95rem; } h1 { font-size: 1.3rem; } }
@media print { .card { break-inside: avoid; } body { background: none; } }
"""
