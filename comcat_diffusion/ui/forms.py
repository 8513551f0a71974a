"""Settings as a form: a component per field of a settings dataclass, and the values back from what was typed in.

Names, help texts, choices and defaults are those of the command line, so that a message that names a flag names a field
of the form too.
"""

from dataclasses import dataclass
from typing import get_type_hints

import gradio as gr
from gradio.components import Component

from comcat_diffusion.config import fields_by_group, flag_of, value_type


@dataclass(frozen=True)
class Form:
    """The fields of `kind` that are asked for, in the order of `components`."""

    kind: type
    components: dict[str, Component]

    def given(self, values: tuple) -> dict[str, object]:
        """What was typed in, by name, as `kind` takes it; without the fields that were left empty."""
        hints, typed = get_type_hints(self.kind), zip(self.components, values, strict=True)
        given = {name: _value(value, *value_type(hints[name])) for name, value in typed}
        return {name: value for name, value in given.items() if value not in (None, "", [])}


def form(kind: type, first: tuple[str, ...], without: tuple[str, ...]) -> Form:
    """Place the fields of `kind`: those of `first` openly, the others folded by group, those `without` not at all."""
    groups, hints = fields_by_group(kind), get_type_hints(kind)
    every = {item.name: item for items in groups.values() for item in items}
    components = {name: _component(every[name], hints[name]) for name in first}
    for title, items in groups.items():
        rest = [item for item in items if item.name not in (*first, *without) and not item.metadata.get("file_only")]
        if rest:
            with gr.Accordion(title, open=False):
                components |= {item.name: _component(item, hints[item.name]) for item in rest}
    return Form(kind, components)


def _component(item: object, hint: object) -> Component:
    of, several = value_type(hint)
    told = {"label": flag_of(item), "info": item.metadata["help"], "interactive": True}
    default = None if several else item.default
    if of is bool:
        return gr.Checkbox(default, **told)
    if item.metadata.get("choices"):
        return gr.Dropdown(list(item.metadata["choices"]), value=default, **told)
    if of in (int, float):
        return gr.Number(default, precision=0 if of is int else None, **told)
    if several:
        told["info"] += " One a line."
    return gr.Textbox(default, lines=2 if several else 1, **told)


def _value(typed: object, kind: type, several: bool) -> object:
    if several and isinstance(typed, str):
        return [line.strip() for line in typed.splitlines() if line.strip()]
    if several:
        return list(typed or [])
    return kind(typed) if isinstance(typed, (int, float)) else typed
