"""Blocks of ComfyUI's transformers while adapters are on their attentions: each runs its own forward on wider heads.

The text stands before the picture, also where in diffusers it stands behind. As there, an adapter changes keys and
values of the text, and in blocks of one stream the picture's too.

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from comcat_diffusion.adapters.blend import terms_of
from comcat_diffusion.adapters.seam import View, view_of
from comcat_diffusion.adapters.wide import WideHeads
from comcat_diffusion.attentions import JOINT
from comcat_diffusion.comfy.attended import Carrying, Said, Spread, of_picture, of_text
from comcat_diffusion.comfy.guests import Guest, Guests
from comcat_diffusion.comfy.places import PLACES, LookedEnough, of_both
from comcat_diffusion.comfy.sharing import SharedHeads
from comcat_diffusion.comfy.text import SAID

_FILLED = 32  # a multiple that Z-Image fills its tokens up to


class Block(Carrying):
    """A block's `forward` while adapters are on its attentions."""

    place = ""  # a pattern of its name

    def __init__(self, guests: Guests, name: str, block: nn.Module) -> None:
        on = dict.fromkeys(own for guest in guests.all for own in guest.attentions)
        super().__init__(guests, block, [own for own in on if own == name or own.startswith(f"{name}.")])
        self.block, self.name = block, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        options = kwargs.get("transformer_options") or {}
        said, places = options.get(SAID, {}), options.get(PLACES)
        live = {own: self.live(own, said) for own in self.on}
        if places is not None and places.at is None:  # the base draws, and shows where words are looked at
            seen = {
                guest.name: None for own in live if of_both(own) for guest in live[own] if guest.name in places.called
            }
            live = {own: [one for one in guests if one.name not in places.called] for own, guests in live.items()}
            if seen:
                watching = places.watching(options, list(seen), self.begin, alone := not any(live.values()))
                watched = {**kwargs, "transformer_options": watching}
                if alone:
                    return type(self.block).forward(self.block, *args, **watched)
                with contextlib.suppress(LookedEnough):  # with the base's own keys, whatever else acts
                    type(self.block).forward(self.block, *args, **watched)
        if not any(live.values()):
            return type(self.block).forward(self.block, *args, **kwargs)
        tokens = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))  # B, N, C
        wide = {
            own.removeprefix(self.name).removeprefix("."): self._wide(own, guests, said, options, tokens)
            for own, guests in live.items()
            if guests
        }
        if self.table:
            args, kwargs = (), self.asked(wide, dict(zip(_names(type(self.block)), args, strict=False)) | kwargs)
        return type(self.block).forward(self.view(wide), *args, **kwargs)

    def _wide(self, own: str, guests: list[Guest], said: Said, options: Mapping, tokens: torch.Tensor) -> WideHeads:
        """The heads of an attention while adapters act, by place if they have places."""
        within, device = own.removeprefix(self.name).removeprefix("."), tokens.device
        heads, width = self.size(within)
        spread = self.spread(within, tokens.shape[1])

        def acting(guests: list[Guest]) -> WideHeads:
            adapters = self.adapters(own, guests, said, device, spread)
            return WideHeads(heads, width, adapters, True, device.type, True, bool(self.table))

        shares = self._shares([guest.name for guest in guests], options, tokens)
        if not shares:
            return acting(guests)
        by_name = {guest.name: guest for guest in guests}
        like = tokens.new_empty(1, next(iter(shares.values())).shape[-2], 1)
        terms = terms_of(shares, list(by_name), like)
        return SharedHeads([share for share, _ in terms], [acting([by_name[n] for n in names]) for _, names in terms])

    def _shares(self, live: list[str], options: Mapping, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shares, (N, 1) or (B, N, 1), of those that have masks, and of those that are placed beside others.

        Of a stream's words, which have no place, they are the mean of the picture's.
        """
        return self.shares_of_tokens(live, options, tokens, self.begin if self.stream else None)

    stream = False  # whether picture and text are one sequence
    table = ""  # the argument that heads are rotated by, if they are

    def size(self, within: str) -> tuple[int, int]:
        """Heads H and their width D of an attention, called as within the block."""
        return self.block.num_heads, self.block.hidden_size // self.block.num_heads

    def spread(self, within: str, length: int) -> Spread:
        """Of so many tokens those that adapters act on."""
        return of_text

    @staticmethod
    def begin(tokens: int, places: int, words: int) -> int:
        """Where among so many tokens those of the picture begin."""
        return words

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """The block as its own forward should see it."""
        raise NotImplementedError

    def asked(self, wide: Mapping[str, WideHeads], arguments: dict[str, object]) -> dict[str, object]:
        """The arguments of its forward by name, with a table of rotations that is as wide as the heads.

        The table, (..., D / 2, 2, 2), turns pairs of columns; new ones stay as they are.
        """
        table, own = arguments.get(self.table), next(iter(wide.values()))
        if table is None or own.wide == own.width:
            return arguments
        new = torch.eye(2, dtype=table.dtype, device=table.device).expand(
            *table.shape[:-3], (own.wide - own.width) // 2, 2, 2
        )
        return {**arguments, self.table: torch.cat([table, new], dim=-3)}


@functools.cache
def _names(kind: type[nn.Module]) -> list[str]:
    """The arguments of a forward, by place."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def _fused(project: nn.Module, *widened: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """A projection into queries, keys and values side by side, each of them widened."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        own = project(hidden).chunk(3, dim=-1)
        return torch.cat(
            [widen(lambda _, one=one: one, hidden) for widen, one in zip(widened, own, strict=True)], dim=-1
        )

    return run


def _normed(wide: WideHeads, norm: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple:
    """The norm of queries and keys, (B, H, N, wide)."""
    query, key = wide.queries_normed(norm.query_norm, query), wide.keys_normed(norm.key_norm, key)
    return query.to(value), key.to(value)


class FluxDouble(Block):
    """Of two streams, of FLUX and Chroma."""

    place, table = r"(.*\.)?double_blocks\.\d+", "pe"

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """See `Block`."""
        (own,) = wide.values()
        picture, text = self.block.img_attn, self.block.txt_attn
        of_words = _fused(text.qkv, own.foreign_value, own.key, own.value)
        if own.as_the_host:
            return View(self.block, txt_attn=View(text, qkv=of_words))
        of_places = _fused(picture.qkv, own.query, own.foreign_key, own.foreign_value)
        normed = functools.partial(_normed, own)
        words, places = functools.partial(normed, text.norm), functools.partial(normed, picture.norm)
        text_out = functools.partial(own.foreign_output, text.proj)
        picture_out = functools.partial(own.output, picture.proj)
        return View(
            self.block,
            img_attn=View(picture, qkv=of_places, norm=places, proj=picture_out),
            txt_attn=View(text, qkv=of_words, norm=words, proj=text_out),
            num_heads=own.heads,
        )


class FluxSingle(Block):
    """Of one stream."""

    place, table, stream = r"(.*\.)?single_blocks\.\d+", "pe", True

    def spread(self, within: str, length: int) -> Spread:
        """The text's, and all of the picture's."""
        return functools.partial(_stream, length)

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """See `Block`."""
        (own,) = wide.values()
        block, into = self.block, functools.partial(own.stream, self.block.linear1)
        if own.as_the_host:
            return View(block, linear1=into)
        norm = functools.partial(_normed, own, block.norm)
        out = functools.partial(own.stream_output, block.linear2)
        size = {"num_heads": own.heads, "hidden_size": own.heads * own.wide}
        return View(block, linear1=into, norm=norm, linear2=out, **size)


def _stream(length: int, tokens: torch.Tensor) -> torch.Tensor:
    """(B, M, R) -> (B, length, R): behind the text what comes after a trigger is spoken for."""
    return torch.cat([tokens, of_picture(tokens).expand(-1, length - tokens.shape[1], -1)], dim=1)


class JointBlock(Block):
    """Of Stable Diffusion 3: the joint attention, and a self-attention of the picture that some have beside it."""

    place = r"(.*\.)?joint_blocks\.\d+"
    joint, alone = "context_block.attn", "x_block.attn2"

    def size(self, within: str) -> tuple[int, int]:
        """See `Block`."""
        attention = self.block.get_submodule(within)
        return attention.num_heads, attention.head_dim

    def spread(self, within: str, length: int) -> Spread:
        """See `Block`."""
        return of_text if within == self.joint else of_picture

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """See `Block`."""
        words, places = self.block.context_block, self.block.x_block
        text, picture = {}, {}
        if self.joint in wide:
            own = wide[self.joint]
            text["attn"] = _mmdit(words.attn, own, (own.foreign_value, own.key, own.value), own.foreign_output)
            seen = (own.query, own.foreign_key, own.foreign_value)
            picture["attn"] = _mmdit(places.attn, own, seen, own.output)
        if self.alone in wide:
            own = wide[self.alone]
            picture["attn2"] = _mmdit(places.attn2, own, (own.query, own.key, own.value), own.output)
        return View(self.block, context_block=View(words, **text), x_block=View(places, **picture))


def _mmdit(attention: nn.Module, wide: WideHeads, widened: tuple[Callable, ...], output: Callable) -> View:
    replaced = {
        "qkv": _fused(attention.qkv, *widened),
        "ln_q": functools.partial(wide.queries_normed, attention.ln_q),
        "ln_k": functools.partial(wide.keys_normed, attention.ln_k),
        "head_dim": wide.wide,
        "num_heads": wide.heads,
    }
    if not attention.pre_only:
        replaced["proj"] = functools.partial(output, attention.proj)
    return View(attention, **replaced)


class ZImageAttention(Block):
    """Of Z-Image: one stream, the text's tokens and the picture's each filled up."""

    place, table, stream = r"(.*\.)?layers\.\d+\.attention", "freqs_cis", True

    def size(self, within: str) -> tuple[int, int]:
        """See `Block`."""
        return self.block.n_local_heads, self.block.head_dim

    def spread(self, within: str, length: int) -> Spread:
        """The text's, all of the picture's, and what fills up."""
        return functools.partial(_stream, length)

    @staticmethod
    def begin(tokens: int, places: int, words: int) -> int:
        """See `Block`."""
        return tokens - -(-places // _FILLED) * _FILLED

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """See `Block`."""
        (own,) = wide.values()
        block, of_tokens = self.block, _fused(self.block.qkv, own.query, own.key, own.value)
        if own.as_the_host:
            return View(block, qkv=of_tokens)
        queries = functools.partial(own.queries_normed, block.q_norm)
        keys = functools.partial(own.keys_normed, block.k_norm)
        # As if without norms of its own, since those that it has are one kernel with the rotation, of the base's width.
        more = {"qk_norm": False, "q_norm": queries, "k_norm": keys, "head_dim": own.wide}
        more |= dict.fromkeys(("n_local_heads", "n_local_kv_heads"), own.heads)
        return View(block, qkv=of_tokens, out=functools.partial(own.output, block.out), **more)


class QwenImageAttention(Block):
    """Of Qwen-Image: a joint attention that is called as diffusers' is."""

    place, table = r"(.*\.)?transformer_blocks\.\d+\.attn", "image_rotary_emb"

    def size(self, within: str) -> tuple[int, int]:
        """See `Block`."""
        return self.block.heads, self.block.dim_head

    def view(self, wide: Mapping[str, WideHeads]) -> View:
        """See `Block`."""
        return view_of(self.block, JOINT, *wide.values())


_BLOCKS = (FluxDouble, FluxSingle, JointBlock, ZImageAttention, QwenImageAttention)


def block_of(attention: str) -> tuple[str, type[Block]] | None:
    """The block that has an attention, called as in ComfyUI: its name, and its kind; None for a U-Net's."""
    for kind in _BLOCKS:
        match = re.match(rf"({kind.place})(\.|$)", attention)
        if match:
            return match[1], kind
    return None
