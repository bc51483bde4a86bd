"""The comparison page's style sheet: light and dark, wide and narrow, nothing fetched."""

from __future__ import annotations

from eval.comparison.plots import SERIES

# Eight hues of equal weight, chosen apart in hue and lightness; also told apart by order and by hovering.
_LIGHT = (
    "#1f5fa8",
    "#c2410c",
    "#15803d",
    "#8b3fa0",
    "#8a6a00",
    "#0e7490",
    "#be185d",
    "#57534e",
)
_DARK = (
    "#7cb7ff",
    "#ff9d5c",
    "#63d68c",
    "#d7a3ec",
    "#e2c044",
    "#5bd0e3",
    "#ff8fb8",
    "#b8b2ab",
)


def _colours(palette: tuple[str, ...]) -> str:
    assert len(palette) == SERIES
    return "".join(f"--s{index}:{colour};" for index, colour in enumerate(palette))


STYLE = (
    """
:root{color-scheme:light dark;--ink:#1c1b1a;--quiet:#63605c;--paper:#fdfdfc;--card:#f4f3f0;--rule:#dcd9d3;
--good:#15803d;--bad:#b91c1c;--warn:#fff1d6;--warn-ink:#7a4300;"""
    + _colours(_LIGHT)
    + """}
@media (prefers-color-scheme:dark){:root{--ink:#ecebe8;--quiet:#a5a19b;--paper:#171615;--card:#22201f;
--rule:#3b3835;--good:#63d68c;--bad:#ff8a80;--warn:#3d2c0c;--warn-ink:#ffd58a;"""
    + _colours(_DARK)
    + """}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p,ul{margin:.5rem 0}
ul{padding-left:1.2rem}
li{overflow-wrap:anywhere}
a{color:var(--s0)}
nav a{margin-right:1rem;white-space:nowrap}
.quiet,figcaption,small{color:var(--quiet)}
.forced{background:var(--warn);color:var(--warn-ink);border-radius:4px;padding:0 .4em;font-weight:600}
div.forced{padding:.75rem 1rem;font-weight:400}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{color:var(--quiet);font-weight:600}
th.n,td.n{text-align:right;padding-left:.75rem;padding-right:0}
.made td{text-align:left;padding-left:.75rem;max-width:22rem;overflow-wrap:anywhere}
.made td:first-child{padding-left:0;max-width:none;white-space:nowrap;color:var(--quiet)}
.made th{text-align:left;padding-left:.75rem}
.made th:first-child{padding-left:0}
.other{color:var(--warn-ink);background:var(--warn);border-radius:3px}
figure{margin:1rem 0;max-width:45rem}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:0 1.5rem}
.two figure{max-width:none}
figcaption{font-size:.875rem}
svg{width:100%;height:auto;display:block}
svg text{font:13px system-ui,sans-serif;fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:4px;
stroke-linejoin:round}
svg text.quiet{fill:var(--quiet)}
svg .grid{stroke:var(--rule)}
svg .zero{stroke:var(--quiet);stroke-dasharray:4 3}
svg .bar{stroke:var(--c);stroke-width:2.5;stroke-linecap:round}
svg .thin{stroke-width:1.5;opacity:.7}
svg .dot{fill:var(--c)}
svg .hollow{fill:var(--paper);stroke:var(--c);stroke-width:2}
svg .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
svg polyline{fill:none;stroke:var(--c);stroke-width:1.5;opacity:.6}
svg polyline.front{stroke:var(--ink);stroke-dasharray:2 4;opacity:.8}
.legend{font-size:.875rem}
.key{display:inline-block;margin-right:1rem}
.key i{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);margin-right:.4em}
details{margin:.5rem 0}
summary{cursor:pointer}
.example{background:var(--card);border-radius:6px;padding:.75rem 1rem;margin:.75rem 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.875rem;margin:.25rem 0 .75rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:0 1.5rem}
.gain{color:var(--good)}.loss{color:var(--bad)}
"""
    + "".join(f".s{index}{{--c:var(--s{index})}}" for index in range(SERIES))
    + "\n"
)
