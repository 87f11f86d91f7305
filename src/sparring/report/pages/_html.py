"""Build HTML from text that is always escaped: only what `tag` returned is taken as it is."""

from __future__ import annotations

import html

_VOID = {"img", "input", "meta"}


class Html(str):
    """Mark text that is HTML already."""

    __slots__ = ()


def join(*children: str | None) -> Html:
    """Return children one after the other, each escaped unless it is Html; None is left out."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children if c is not None))


def tag(name: str, /, *children: str | None, **attributes: str | bool | None) -> Html:
    """Return an element. `class_` becomes class, `data_norm` data-norm; True is a bare attribute, None or False no."""
    parts = [name]
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(label)
        elif value is not None and value is not False:
            parts.append(f'{label}="{html.escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")
