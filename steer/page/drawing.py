"""HTML and CSS that the page's parts draw themselves: slider tracks and ends, marked words, heat maps, budget bars.

Colours work on light and on dark backgrounds. `rail` returns CSS, `colour` a colour and `markdown` Markdown; the other
functions that return `str` return HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

import streamlit as st

_STYLE = """
<style>
  .stMainBlockContainer { padding: 4.2rem 2rem 1rem; max-width: 64rem; }
  [data-testid="stBottomBlockContainer"] { padding: 1rem 2rem 1.5rem; max-width: 64rem; }
  @media (max-width: 640px) {
    .stMainBlockContainer { padding: 4.2rem .8rem 1rem; }
    [data-testid="stBottomBlockContainer"] { padding: .5rem .8rem .8rem; }
    /* The parts of the page in two whole rows; in one they are wider than a phone, and break into pieces. */
    .st-key-part, .st-key-part > div { width: 100% !important; }
    .st-key-part [role="radiogroup"] { max-width: none; display: grid; grid-template-columns: repeat(4, 1fr);
      gap: .3rem; }
    .st-key-part [role="radio"] { border-style: solid !important; border-width: 1px !important; border-radius: .5rem;
      margin: 0; padding: 0; min-height: 2.4rem; justify-content: center; }
    .st-key-part [role="radio"][aria-checked="false"] { border-color: rgba(128, 128, 128, .35) !important; }
    .st-key-part [role="radio"] p { font-size: .8rem; }
  }
  [data-testid="stSidebarUserContent"] { padding: 0 1.1rem 2rem; }
  /* Else the ring around a focused button makes its row scroll. */
  [data-testid="stSidebar"] [data-testid="stHorizontalBlock"] { overflow: visible; }
  [data-testid="stSidebarHeader"] { height: 3rem; margin-bottom: 0; }
  [data-testid="stSidebarUserContent"] [data-testid="stVerticalBlock"] { gap: .6rem; }
  [data-testid="stStatusWidget"], .st-key-script { display: none; }
  [data-stale="true"] { opacity: 1 !important; }
  [data-testid="stChatMessage"] { padding: .8rem .9rem .5rem; gap: .8rem; }
  [data-testid="stChatMessage"] [data-testid="stVerticalBlock"] { gap: .2rem; }

  /* Screen readers still read the name of a button that shows only an icon. */
  [class*="st-key-icons"] button [data-testid="stMarkdownContainer"] {
    position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
  }
  [class*="st-key-icons"] { gap: .1rem !important; }
  [class*="st-key-icons"] button { min-height: 2rem; min-width: 2rem; padding: 0 .3rem; opacity: .75; }
  [class*="st-key-icons"] button:hover, [class*="st-key-icons"] button:focus-visible { opacity: 1; }
  [class*="st-key-icons"] button:disabled { opacity: .3; }
  [class*="st-key-icons"] [data-testid="stPopoverButton"] > div > div[aria-hidden="true"] { display: none; }
  @media (pointer: coarse) { [class*="st-key-icons"] button { min-height: 2.6rem; min-width: 2.6rem; } }

  [class*="st-key-slider"] [data-testid="stVerticalBlock"], [class*="st-key-slider"] { gap: 0 !important; }
  [class*="st-key-slider"] [data-testid="stSliderTickBar"] { display: none; }
  .st-ends { display: flex; justify-content: space-between; gap: 1rem; font-size: .8rem; opacity: .75; }
  .st-ends span { line-height: 1.2; overflow-wrap: anywhere; }
  .st-ends span:last-child { text-align: right; }
  .st-budget { height: 8px; border-radius: 4px; background: rgba(128, 128, 128, .25); overflow: hidden; }
  .st-budget div { height: 100%; }
  .st-context { display: flex; gap: 1px; height: 8px; border-radius: 4px; overflow: hidden;
    background: rgba(128, 128, 128, .25); }
  .st-heat span { border-radius: 2px; padding: 1px 0; white-space: pre-wrap; }
  .st-heat { line-height: 1.9; overflow-wrap: anywhere; }
  .st-legend { display: flex; gap: .6rem; align-items: center; font-size: .8rem; flex-wrap: wrap; }
  .st-legend div { height: 10px; flex: 0 1 12rem; min-width: 6rem; border-radius: 5px; }
  mark.st-differs { background: rgba(250, 190, 50, .38); color: inherit; border-radius: 2px; }
</style>
"""
_KEEP_FOCUS = """
<script>
  if (window.steerDrawn && document.activeElement === document.body)
    document.querySelector('.st-key-part [aria-checked="true"]')?.focus();
  window.steerDrawn = true;
</script>
"""
"""A page with a chat input at its bottom is another element to Streamlit than one without: who chooses the part "Chat",
or another after it, gets a new page, and the focus is nowhere. This puts it on the chosen part, where it was."""
_LEVELS = {"fine": "rgba(60,160,90,.85)", "near": "rgba(230,160,30,.9)", "over": "rgba(220,60,60,.9)"}
_CONTEXT = ("rgba(80,120,220,.85)", "rgba(150,90,200,.85)", "rgba(60,160,90,.85)", "rgba(230,160,30,.6)")
"""Colours of the parts of a context."""
_SAFE, _RED = "rgba(60, 160, 90, .75)", "rgba(220, 60, 60, .6)"


def style() -> None:
    """Add the page's style sheet."""
    st.html(_STYLE)


def keep_focus() -> None:
    """Keep the focus on the chosen part of the page, so that who uses keys goes on from there. Call it below them."""
    with st.container(key="script"):
        st.html(_KEEP_FOCUS, unsafe_allow_javascript=True)


def folded_thoughts(thoughts: str) -> None:
    """Draw the thoughts before a reply, folded away; nothing if there are none."""
    if thoughts:
        with st.expander("Thoughts", icon=":material/psychology:"):
            st.markdown(markdown(thoughts))


def rail(key: str, low: float, high: float, safe: tuple[float, float]) -> str:
    """Return a CSS rule for the rail of the slider in the container `key`: green in the safe range, red beyond it.

    `low`, `high`: ends of the track. `safe`: amounts between which replies stay coherent.
    """

    def at(x: float) -> float:
        return 100 * min(1.0, max(0.0, (x - low) / (high - low)))

    left, right = at(safe[0]), at(safe[1])
    stops = f"{_RED} {left:.1f}%, {_SAFE} {left:.1f}% {right:.1f}%, {_RED} {right:.1f}%"
    place = f'.st-key-{key} [data-testid="stSlider"] [role="group"] > [data-orientation] > div:first-child'
    return f"{place} {{ background: linear-gradient(90deg, {stops}) !important; }}"


def rails(rules: Iterable[str]) -> None:
    """Add the CSS rules of `rail` to the page."""
    st.html(f"<style>{' '.join(rules)}</style>")


def ends(low: str, high: str) -> str:
    """Return what the two ends of a slider do, for below its track."""
    return f'<div class="st-ends"><span>{_text(low)}</span><span>{_text(high)}</span></div>'


def budget_bar(share: float, limit: float, level: str) -> str:
    """Return a bar that shows how much of a site's budget is used."""
    width = 100 * min(1.0, share / limit)
    return (
        f'<div class="st-budget" role="meter" aria-valuemin="0" aria-valuemax="{limit:g}" aria-valuenow="{share:.2f}" '
        f'aria-label="share of the residual norm that the sliders move">'
        f'<div style="width:{width:.0f}%;background:{_LEVELS[level]}"></div></div>'
    )


def context_bar(parts: Mapping[str, int], context: int, words: str) -> str:
    """Return a bar of the context, one colour per part in tokens. `words`: the same as a sentence."""
    spans = (
        f'<div title="{html.escape(f"{name}: {tokens:,} tokens", quote=True)}" '
        f'style="width:{100 * tokens / context:.2f}%;background:{colour}"></div>'
        for (name, tokens), colour in zip(parts.items(), _CONTEXT, strict=True)
    )
    return f'<div class="st-context" role="img" aria-label="{html.escape(words, quote=True)}">{"".join(spans)}</div>'


def marked(spans: Iterable[tuple[str, bool]]) -> str:
    """Return a text with the differing spans marked."""
    parts = (f'<mark class="st-differs">{_text(t)}</mark>' if differs else _text(t) for t, differs in spans)
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{"".join(parts)}</div>'


def heat(pieces: Sequence[str], colours: Sequence[float], hints: Sequence[str]) -> str:
    """Return a text coloured piece by piece: -1 is blue, 0 has no colour, 1 is orange; the hint shows on hover."""
    spans = (
        f'<span title="{html.escape(hint, quote=True)}" style="background:{colour(c)}">{_text(p)}</span>'
        for p, c, hint in zip(pieces, colours, hints, strict=True)
    )
    return f'<div class="st-heat">{"".join(spans)}</div>'


def legend(scale: float, unit: str) -> str:
    """Return a legend for a heat map. `scale`: the value that has the strongest colour."""
    stops = ", ".join(colour(x / 4) for x in range(-4, 5))
    return (
        f'<div class="st-legend"><span>{-scale:.2g}</span>'
        f'<div style="background:linear-gradient(90deg,{stops})"></div>'
        f"<span>{scale:.2g} {html.escape(unit)}</span></div>"
    )


def colour(value: float) -> str:
    """Return the CSS colour of a value from -1 to 1. It is transparent, so that text is readable on light and dark.

    >>> colour(1.0)
    'rgba(240, 130, 40, 0.750)'
    """
    if math.isnan(value):
        return "transparent"
    rgb = "240, 130, 40" if value > 0 else "60, 130, 230"
    return f"rgba({rgb}, {0.75 * min(1.0, abs(value)):.3f})"


def markdown(text: str) -> str:
    """Escape a text for Streamlit's Markdown: `$` does not start a formula, and no picture is fetched.

    Streamlit reads labels, captions, errors, toasts and hints as Markdown too, so every text from a model, a file or a
    user must go through this function.
    """
    return text.replace("$", "\\$").replace("![", "!\\[")


def _text(text: str) -> str:
    return html.escape(text).replace("$", "&#36;")
