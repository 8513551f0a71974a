"""Prompts and triggers as a base's tokenizer reads them: what is cut off, and what it knows too well."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from comcat_diffusion.words import Subject, is_everyday

FREQUENT = 0.5  # CLIP's vocabulary is in order of frequency: below this share of it a word is well known
_LARGE = 10_000  # tokens; in the embedded base's few hundred there is no such order


def cut_off(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], most: int) -> Iterator[str]:
    """A sentence for every prompt that has more tokens than the `most` that the text encoder reads."""
    for prompt in dict.fromkeys(prompts):
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > most:
            yield f"'{prompt[:60]}' has {count} tokens, of which the text encoder reads {most}: the end is cut off."


def well_known(tokenizer: PreTrainedTokenizerBase, subjects: Iterable[Subject]) -> Iterator[str]:
    """A sentence for every trigger that means something to everybody, and so to the base."""
    for subject in subjects:
        ids = tokenizer(subject.trigger, add_special_tokens=False).input_ids
        frequent = len(ids) == 1 and len(tokenizer) > _LARGE and ids[0] < FREQUENT * len(tokenizer)
        if is_everyday(subject.trigger) or frequent:
            yield (
                f"'{subject.trigger}' is a word that the base knows well, and every prompt with it will call the "
                f"adapter: a rare one learns faster, like --trigger sks --class_word {subject.class_word or 'dog'}."
            )
