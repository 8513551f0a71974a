"""Whether two fingerprints are of one base. Nothing here imports torch, so that headers are compared before it is."""

NARROWER = "encoder_hid_dim_type"  # how a denoiser makes its text states narrower, in its settings; few do
MOST = 1e30  # of a weight; a file can say what is too large to compare
TOLERANCE = 0.02  # relative; bf16 keeps 8 bits of mantissa, so a copy is off by at most 0.004


def difference(trained: dict, present: dict) -> str | None:
    """Why two bases are not the same, as the end of a sentence; None if they are."""
    for key, words in (
        ("class", "another kind of model ({} instead of {})"),
        ("cross_attention_dim", "text states of another width ({} instead of {})"),
        (NARROWER, "text states that are made narrower in another way ({} instead of {})"),
        ("heads", "other attention heads ({} instead of {})"),
        ("layout", "another layout of attentions ({} instead of {})"),
        ("prediction_type", "another prediction type ({} instead of {})"),
    ):
        if trained.get(key) != present.get(key):
            return "it has " + words.format(present.get(key), trained.get(key))
    if other_weights(trained, present):
        return "it has the same shape but other weights"
    return None


def other_weights(trained: dict, present: dict) -> bool:
    """Whether the sampled weights differ by more than a change of precision."""
    before, now = map(sketch_of, (trained, present))
    if len(before) != len(now) or not before:
        return True
    floor = 1e-3 * sum(map(abs, before)) / len(before)
    return not all(abs(b - n) <= floor + TOLERANCE * abs(n) for b, n in zip(before, now, strict=True))


def sketch_of(side: dict) -> list[float]:
    """The sampled weights of a fingerprint; none where it holds other things than numbers."""
    sketch = side.get("sketch")
    numbers = isinstance(sketch, list) and all(
        isinstance(value, (int, float)) and abs(value) < MOST for value in sketch
    )
    return sketch if numbers else []
