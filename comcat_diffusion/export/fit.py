"""Which adapters can be other files, by what their headers say: nothing here waits for torch."""

from collections.abc import Sequence
from pathlib import Path

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import AdapterFileError, Header, kind_of, read_adapter
from comcat_diffusion.families.family import DENOISERS

# By part of a Stable Diffusion: the projections that a foldable adapter changes.
PROJECTIONS = {"unet": ("to_k", "to_v"), "text_encoder": ("k_proj", "v_proj"), "text_encoder_2": ("k_proj", "v_proj")}


def refuse_trigger(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError if an adapter acts on some tokens only: weights act on all."""
    waiting = [config["trigger"][0] for config in header.config.values() if config.get("trigger")]
    if waiting:
        raise AdapterFileError(
            f"{adapter} acts from '{waiting[0]}' on, which weights cannot tell: train it again with --everywhere and "
            "--kind foldable, or use it as it is with comcat-diffusion."
        )


def refuse_inexpressible(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter that is no LoRA of a model that other tools know."""
    refuse_trigger(header, adapter)
    kinds = {kind_of(config) for config in header.config.values()}
    if "tied" in kinds:
        raise AdapterFileError(f"{adapter} is tied, of which no LoRA is written: train it again with --kind foldable.")
    if "free" in kinds:
        raise AdapterFileError(
            f"{adapter} is a free adapter, which no LoRA can express: train it again with --kind foldable, or use it "
            "as it is with comcat-diffusion."
        )
    other, kind = sorted(set(header.config) - set(PROJECTIONS)), header.fingerprint.get("class")
    if other or kind != "UNet2DConditionModel":
        told = f"adapts {', '.join(other)}" if other else f"is for a {kind}"
        raise AdapterFileError(
            f"{adapter} {told}; LoRA files are written for the U-Net and the text encoders of Stable Diffusion 1.x, "
            "2.x and XL."
        )


def refuse_foldable(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter that is not approximated: one that need not be, or one of more parts."""
    refuse_trigger(header, adapter)
    if any(config.get("foldable") for config in header.config.values()):
        raise AdapterFileError(f"{adapter} is foldable already and exports exactly; nothing has to be approximated.")
    others = sorted(set(header.config) - set(DENOISERS))
    if others:
        raise AdapterFileError(f"{adapter} also adapts {', '.join(others)}, for which no approximation is offered.")


def refuse_missing(weights: str | Path) -> None:
    """Raise AdapterFileError if there is no such file."""
    if not Path(weights).is_file():
        raise AdapterFileError(f"There is no file {weights}.")


def refuse_unmergeable(adapters: Sequence[tuple[str | Path, float]], output: str | Path) -> None:
    """Raise ValueError or OSError unless adapter files, (file, weight) each, fold into a base in a new folder."""
    atomic.refuse_used(Path(output).expanduser())
    if not adapters:
        raise ValueError("Name at least one adapter to merge.")
    for path, _ in adapters:
        header = read_adapter(path)
        refuse_trigger(header, path)
        free = sorted(part for part, fields in header.config.items() if not fields.get("foldable"))
        if free:
            raise AdapterFileError(
                f"{path} is a free adapter ({', '.join(free)}), which folds into no stock checkpoint: train it again "
                "with --kind foldable, or use it as it is with comcat-diffusion."
            )
