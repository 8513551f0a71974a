"""Pictures that are nearly one: a photograph again, in other sizes or brightness, mirrored, or a crop of it.

A picture is looked for in each of the others, at several sizes and every place, in thumbnails of a few pixels; where
it seems to be, it is looked for once more in finer ones. Two places are the same if their pixels correlate.

Letters: H x W of the thumbnail searched, h x w of the pattern, P places, N patterns, D = 3 h w.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageFilter, ImageOps

COARSE, FINE = 24, 48  # longest side of a thumbnail in pixels
BLUR = {COARSE: 0.7, FINE: 1.5}  # pixels; so a place half a pixel beside the right one still looks like it
SHARES = (1.0, 0.93, 0.87, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the other picture that a crop is looked for at
NEARBY = tuple(share / 100 for share in range(94, 107))  # times the share that looked promising
# Of 500 pairs of 33 different photographs and plates none reached 0.965, and one in twenty crops of them did not.
PROMISING, SAME = 0.85, 0.965  # correlations
NARROWEST = 7  # pixels of a pattern; with fewer, every edge is like every other
FLAT = 3.0  # levels of 255 that the pixels of a place must spread by: nothing is like a plain wall
MOST = 200  # pictures that are compared; it takes seconds, which grow with the square of their number


def small(picture: Image.Image) -> Image.Image:
    """A thumbnail of an RGB picture that `twins` takes."""
    return picture.reduce(max(1, max(picture.size) // (4 * FINE)))


def twins(thumbnails: Sequence[Image.Image]) -> list[list[int]]:
    """Groups of pictures, by number, that show nearly the same; the first `MOST` of all are compared."""
    group = {number: {number} for number in range(len(thumbnails))}
    for one, other in _pairs(thumbnails[:MOST]):
        if group[one] is not group[other]:
            group[one] |= group[other]
            group |= dict.fromkeys(group[other], group[one])
    return sorted(sorted(found) for found in {id(own): own for own in group.values()}.values() if len(found) > 1)


def _pairs(thumbnails: Sequence[Image.Image]) -> Iterator[tuple[int, int]]:
    """(picture searched in, picture found in it); the patterns are the pictures and then their mirror images."""
    patterns = [*thumbnails, *map(ImageOps.mirror, thumbnails)]

    @cache
    def row(number: int, size: tuple[int, int]) -> np.ndarray:
        return _centred(_pixels(patterns[number], size, COARSE)[None])[0]  # D

    for place, searched in enumerate(thumbnails):
        whole = _pixels(searched, _fitted(searched.size, (COARSE, COARSE)), COARSE)  # H, W, 3
        best = dict.fromkeys(range(len(patterns)), (-1.0, 0.0))  # by pattern: its correlation and its share
        for share in SHARES:
            for size, numbers in _by_size(patterns, whole.shape[1::-1], share).items():
                rows = np.stack([row(number, size) for number in numbers])  # N, D
                scores = (_places(whole, size) @ rows.T).max(0).tolist()  # P, D by D, N -> N
                best |= {n: max(best[n], (score, share)) for n, score in zip(numbers, scores, strict=True)}
        for number, (score, share) in best.items():
            other = number % len(thumbnails)
            if other != place and score > PROMISING and _found(searched, patterns[number], share):
                yield place, other


def _by_size(patterns: Sequence[Image.Image], room: tuple[int, int], share: float) -> dict[tuple[int, int], list[int]]:
    """The numbers of the patterns by the width and height that they have at a share of a room; narrow ones left out."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, pattern in enumerate(patterns):
        size = _fitted(pattern.size, room, share)
        if min(size) >= NARROWEST:
            found.setdefault(size, []).append(number)
    return found


def _found(searched: Image.Image, pattern: Image.Image, share: float) -> bool:
    """Whether a pattern is there in a finer thumbnail, at one of the sizes around a share."""
    whole = _pixels(searched, _fitted(searched.size, (FINE, FINE)), FINE)
    sizes = {_fitted(pattern.size, whole.shape[1::-1], min(1.0, share * factor)) for factor in NEARBY}
    rows = {size: _centred(_pixels(pattern, size, FINE)[None]) for size in sizes}
    return max((_places(whole, size) @ row.T).max() for size, row in rows.items()) > SAME


def _fitted(size: tuple[int, int], room: tuple[int, int], share: float = 1.0) -> tuple[int, int]:
    """A width and a height scaled to a share of a room, their proportions kept."""
    scale = share * min(room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _pixels(picture: Image.Image, size: tuple[int, int], longest: int) -> np.ndarray:
    """(height, width, 3) of a size, blurred as thumbnails of this longest side are."""
    shown = picture.resize(size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(BLUR[longest]))
    return np.asarray(shown, dtype=np.float32)


def _places(whole: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """All places of a size in a picture, (P, D), ready to be correlated."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, size[::-1], axis=(0, 1))  # y, x, 3, h, w
    return _centred(windows.transpose(0, 1, 3, 4, 2).reshape(-1, *size[::-1], 3))


def _centred(places: np.ndarray) -> np.ndarray:
    """(P, h, w, 3) -> (P, D), of mean zero in each colour and of length one, or zeros where a place is flat."""
    rows = (places - places.mean((1, 2), keepdims=True)).reshape(len(places), -1)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > FLAT * rows.shape[1] ** 0.5, rows / np.maximum(length, 1e-9), 0)
