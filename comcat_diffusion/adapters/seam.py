"""Where the adapter meets a host attention: its projections found by structure, and a view that widens them.

The host keeps its Linears, its keys and its processor. Its class is swapped for a subclass whose forward runs the
host's own code on a `View`: an object that looks like the attention but whose projections emit wider heads. So every
processor and attention function works, without knowing of the adapter.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from comcat_diffusion.adapters.blend import blended
from comcat_diffusion.adapters.wide import WideHeads
from comcat_diffusion.attentions import Style, plain, style_of
from comcat_diffusion.families.family import STREAM_ROWS

# diffusers' processors whose way with norms and added projections is known: one softmax over picture and text. Those
# that rotate do it behind the norms, by a table of cosines and sines, or of complex numbers, for pairs of
# neighbouring columns.
ROTATING_PROCESSORS = frozenset(
    (
        "FluxAttnProcessor",
        "Flux2AttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "QwenDoubleStreamAttnProcessor2_0",
        "ZSingleStreamAttnProcessor",
    )
)
JOINT_PROCESSORS = ROTATING_PROCESSORS | {
    "JointAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "XFormersJointAttnProcessor",
}
TABLES = ("image_rotary_emb", "freqs_cis")  # the arguments that bring the table
ROTATIONS = frozenset(("position_embeddings", "rotary_pos_emb", *TABLES))  # arguments that rotate heads
SIDECAR = "comcat"  # name of the one child that an adapted attention has more than before


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot carry a head-level adapter, or None if it can."""
    style = style_of(module)
    if style is None:
        return "it is not an attention with query, key, value and output projections"
    processor = type(getattr(module, "processor", None)).__name__
    if "Linear" in processor:
        return f"its attention is linear ({processor}): it has no logits"
    if processor not in JOINT_PROCESSORS:
        for norm in ("norm_q", "norm_k", "q_norm", "k_norm"):
            if getattr(module, norm, None) is not None:
                return f"its queries and keys are normalized ({norm}), so a head is no longer a product of two matrices"
        for added in ("add_k_proj", "add_v_proj", "add_q_proj"):
            if getattr(module, added, None) is not None:
                return f"it has added key and value projections ({added}), which {processor} uses in an unknown way"
    rotates = processor in ROTATING_PROCESSORS
    for rotation in ROTATIONS & _arguments(type(module)) if not rotates else ():
        return f"its queries and keys are rotated by position ({rotation}), in which a wider head does not fit"
    if style.diffusers and not rotates and not getattr(module, "scale_qk", False):
        return "its logits have no scale of their own (scale_qk), about which processors disagree"
    if style.stream and not rotates:
        return f"its processor ({processor}) is not known"
    q, k, v, *out = (plain(projection) for projection in style.projections(module) if projection is not None)
    if not all(hasattr(p, "out_features") and hasattr(p, "in_features") for p in (q, k, v, *out)):
        return "its projections are not linear layers"
    if style.packed and module.to_qkv_mlp_proj.out_features != STREAM_ROWS * q.out_features:
        return "its feed-forward is not three times as wide as its heads"
    if len({q.out_features, k.out_features, v.out_features, *(p.in_features for p in out)}) > 1:
        return "its heads share keys and values (grouped queries)"
    return None


@functools.cache  # reading a signature takes as long as all else here, and loading asks it of each attention four times
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    """What a kind of module is called with."""
    return frozenset(inspect.signature(kind.forward).parameters)


def is_cross_attention(module: nn.Module) -> bool:
    """Whether an adapter's keys and values come from another sequence than its queries: from the text."""
    return bool(getattr(module, "is_cross_attention", False)) or getattr(module, "add_k_proj", None) is not None


def reads_text(module: nn.Module) -> bool:
    """Whether an adapter's keys and values come from the text, alone or before the picture in one stream."""
    style = style_of(module)
    return is_cross_attention(module) or (style is not None and style.stream)


def is_rotated(module: nn.Module) -> bool:
    """Whether queries and keys are rotated by position, in a way that is known."""
    return type(getattr(module, "processor", None)).__name__ in ROTATING_PROCESSORS


def is_normed(module: nn.Module) -> bool:
    """Whether queries and keys are normalized head by head.

    Where nothing rotates, diffusers leaves that out once projections are fused.
    """
    fused = getattr(module, "fused_projections", False) and not is_rotated(module)
    return getattr(module, "norm_k", None) is not None and not fused


class View:
    """An object seen with some attributes replaced; methods of the object run with the view as their self."""

    def __init__(self, host: object, **replaced: object) -> None:
        self.__dict__.update(replaced, _host=host)

    def __getattr__(self, name: str):
        found = getattr(self.__dict__["_host"], name)
        if inspect.ismethod(found) and found.__self__ is self.__dict__["_host"]:
            return functools.partial(found.__func__, self)
        return found

    def asked(self, arguments: dict[str, object]) -> dict[str, object]:
        """The arguments of its forward, of which the table of rotations is as wide as its heads."""
        widen = self.__dict__.get("_widen_table")
        found = {name: arguments[name] for name in TABLES if widen is not None and arguments.get(name) is not None}
        return arguments | {name: widen(table) for name, table in found.items()} if found else arguments


class _ProcessorView(View):
    """A processor that is a module itself (IP-Adapter) with its own projections widened."""

    def __init__(self, host: object, **replaced: object) -> None:
        # diffusers reads the accepted keyword arguments off the instance's __call__.
        super().__init__(host, **replaced, __call__=functools.partial(type(host).__call__, self))

    def __call__(self, *args, **kwargs):
        return self.__dict__["__call__"](*args, **kwargs)


def view_of(attention: nn.Module, style: Style, wide: WideHeads) -> View:
    """The attention as its own forward should see it while adapters make its heads `wide`."""
    replaced = _width_attributes(attention, style, wide.wide)
    if is_rotated(attention):
        replaced["_widen_table"] = wide.table
    if is_normed(attention):
        replaced |= _norms(attention, wide)
    if style.packed:
        into, out = style.held(attention)
        replaced |= {style.q: functools.partial(wide.stream, into), "inner_dim": wide.heads * wide.wide}
        return View(attention, **replaced, **{style.out: functools.partial(wide.stream_output, out)})
    q, k, v, out = style.projections(attention)
    query, key = functools.partial(wide.query, q), functools.partial(wide.key, k)
    value, output = functools.partial(wide.value, v), functools.partial(wide.output, out)
    if style.joint:
        return View(attention, **replaced, **_joint(attention, wide, query, key, value, output))
    if not style.diffusers:
        return View(attention, **replaced, **{style.q: query, style.k: key, style.v: value, style.out: output})
    replaced |= {"to_q": query, "to_k": key, "to_v": value}
    if style.out:
        replaced["to_out"] = [output, *attention.to_out[1:]]
    if getattr(attention, "fused_projections", False):
        replaced["to_qkv"] = functools.partial(wide.fused, query, key, value)
        replaced["to_kv"] = functools.partial(wide.fused, key, value)
    if hasattr(attention.processor, "to_k_ip"):
        replaced["processor"] = _ProcessorView(
            attention.processor,
            to_k_ip=[functools.partial(wide.foreign_key, project) for project in attention.processor.to_k_ip],
            to_v_ip=[functools.partial(wide.foreign_value, project) for project in attention.processor.to_v_ip],
        )
    return View(attention, **replaced)


def _norms(attention: nn.Module, wide: WideHeads) -> dict[str, object]:
    """The norms of queries and keys, of the picture's and of the text's."""
    found = {}
    for name, normed in (
        ("norm_q", wide.queries_normed),
        ("norm_k", wide.keys_normed),
        ("norm_added_q", wide.queries_normed),
        ("norm_added_k", wide.keys_normed),
    ):
        if getattr(attention, name, None) is not None:
            found[name] = functools.partial(normed, getattr(attention, name))
    return found


def _joint(
    attention: nn.Module, wide: WideHeads, query: Callable, key: Callable, value: Callable, output: Callable
) -> dict[str, object]:
    """The projections of a joint attention: the text's keys and values are an adapter's, the picture's are not."""
    made = {
        "to_q": query,
        "to_k": functools.partial(wide.foreign_key, attention.to_k),
        "to_v": functools.partial(wide.foreign_value, attention.to_v),
        "add_q_proj": functools.partial(wide.foreign_value, attention.add_q_proj),
        "add_k_proj": key,
        "add_v_proj": value,
        "to_out": [output, *attention.to_out[1:]],
        "heads": wide.heads,
        "inner_dim": wide.heads * wide.wide,
    }
    if getattr(attention, "to_add_out", None) is not None:
        made["to_add_out"] = functools.partial(wide.foreign_output, attention.to_add_out)
    if getattr(attention, "fused_projections", False):
        made["to_qkv"] = functools.partial(wide.fused, query, made["to_k"], made["to_v"])
        made["to_added_qkv"] = functools.partial(wide.fused, made["add_q_proj"], key, value)
    return made


def _width_attributes(attention: nn.Module, style: Style, width: int) -> dict[str, object]:
    """The attributes in which a host remembers the width of its heads, as they are for another width."""
    known = {"scale": width**-0.5, "head_dim": width} if style.diffusers else {"head_dim": width}
    return {name: value for name, value in known.items() if hasattr(attention, name)}


def set_projections(
    attention: nn.Module, style: Style, projections: tuple[nn.Module, ...], width: int | dict
) -> dict[str, object]:
    """Put other projections, with heads of another width, in place. Returns what undoes the width, for `width`."""
    for path, projection in zip(style.paths, projections, strict=True):
        parent, _, name = path.rpartition(".")
        setattr(attention.get_submodule(parent), name, projection)
    attributes = width if isinstance(width, dict) else _width_attributes(attention, style, width)
    before = {name: getattr(attention, name) for name in attributes}
    for name, value in attributes.items():
        setattr(attention, name, value)
    return before


@contextmanager
def bare_projections(attention: nn.Module, style: Style) -> Iterator[None]:
    """An attention whose projections have no side-cars of their own while it is merged or unmerged.

    Afterwards these are on what stands in the places of their hosts, as if they had been merged last.
    """
    held = {path: module._modules.get(SIDECAR) for path, module in zip(style.paths, style.held(attention), strict=True)}
    layers = {path: (layer, layer.come_off()) for path, layer in held.items() if hasattr(layer, "come_off")}
    try:
        yield
    finally:
        for path, (layer, merged) in layers.items():
            layer.go_on(attention.get_submodule(path), merged)


def _blank(host: type, make: Callable[[type], type] | None = None) -> nn.Module:
    cls = (make or adapted)(host)
    return cls.__new__(cls)


@functools.cache
def adapted(host: type) -> type:
    """The subclass of an attention class that looks at its side-car before it runs the host's forward."""
    host_forward = host.forward  # taken here, not looked up in forward: what torch.compile can trace

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        layer = self.__dict__["_modules"][SIDECAR]
        live = layer.live

        def attend(names: list[str]) -> object:
            if not names:
                return host_forward(self, *args, **kwargs)
            view = layer.view(names, hidden.shape[1])
            return host_forward(view, *args, **view.asked(kwargs))

        hidden = args[0] if args else kwargs["hidden_states"]
        shares = layer.shares(live, args, kwargs) if live else None
        return attend(live) if shares is None else blended(shares, live, hidden, attend)

    return with_sidecar(host, forward)


def with_sidecar(host: type, forward: Callable, make: Callable[[type], type] | None = None) -> type:
    """The subclass of a host class with this forward, which looks at its side-car; `make` (default `adapted`) made it.

    The host is its very own class again once the side-car is taken off.
    """

    def __setattr__(self: nn.Module, name: str, value: object) -> None:
        if name == SIDECAR:  # diffusers' unload_lora puts what it takes for a base layer in the side-car's place
            detach(self)
        else:
            host.__setattr__(self, name, value)

    # The class is made at run time, so copies and pickles name the host's instead.
    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        return _blank, (host, make) if make else (host,), self.__dict__

    body = {"forward": forward, "__setattr__": __setattr__, "__reduce_ex__": __reduce_ex__, "__module__": __name__}
    body["host"] = host
    return type(f"Comcat{host.__name__}", (host,), body)


def is_adapted(attention: nn.Module) -> bool:
    """Whether the attention already carries a side-car."""
    return SIDECAR in attention._modules


def attach(host: nn.Module, layer: nn.Module, make: Callable[[type], type] = adapted) -> None:
    """Give a host its side-car, by the subclass that `make` makes; `why_not` says which attentions can carry one."""
    if not hasattr(type(host), "host"):
        host.__class__ = make(type(host))
    host.add_module(SIDECAR, layer)


def detach(host: nn.Module) -> None:
    """Take the side-car off; the host is then the very module that it was. The inverse of `attach`."""
    layer = host._modules.pop(SIDECAR)
    host.__class__ = type(host).host
    layer.leave()
