"""Every kind of adapter on every family of attentions: what the adapter batteries run over."""

from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from comcat_diffusion.adapters.config import ComcatConfig

TARGETS = {
    "unet-cross": ("tiny_unet", "attn2"),
    "unet-self": ("tiny_unet", "attn1"),
    "clip": ("tiny_clip", "self_attn"),
    "vit": ("tiny_vit", "attention"),
}
WHOLES = {"tiny_unet": "conv_out", "tiny_clip": "final_layer_norm", "tiny_vit": "layernorm"}  # a module beside these
RANK, ALPHA = 3, 4.5  # a trained strength alpha / r that is not 1
CLEAR = 0.01  # an effect on the output this large cannot be rounding


@dataclass
class Case:
    """One kind of adapter on one tiny model."""

    tiny: object
    target: str  # ends of attentions' names, spaces between
    kind: str
    randomize: object
    close: float = 1e-10  # of float64 sums in another order; where the host takes some in float32, more

    @property
    def whole(self) -> str:
        """The name of a module that an adapter can train whole, since no attention is in it."""
        return WHOLES[self.tiny.name]

    @property
    def foldable(self) -> bool:
        return self.kind != "free"

    def config(self, **changes) -> ComcatConfig:
        kind = {"foldable": self.foldable, "tied": self.kind == "tied", "cores": self.kind == "cores"}
        return ComcatConfig(**{"r": RANK, "alpha": ALPHA, "target_modules": self.target.split()} | kind | changes)

    def adapted(self, *names: str, dtype: torch.dtype = torch.float64, **changes) -> PeftModel:
        """A fresh model with random adapters `names`, all of them active."""
        model = self.tiny(dtype)
        for seed, name in enumerate(names):
            config = self.config(**changes)
            if seed == 0:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            self.randomize(model, name, seed)
        model.base_model.set_adapter(list(names))
        return model.eval()

    def run(self, model: nn.Module) -> torch.Tensor:
        return self.tiny.run(model)

    def base(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The output without any adapter."""
        return self.tiny.base(dtype)


CASES = [f"{kind}-{target}" for kind in ("free", "foldable", "tied") for target in TARGETS]
CASES += ["cores-unet-cross"]  # and in tests/test_joint.py
# Each kind on the U-Net, and on the others what is another there: a tied text side, and wider heads of a causal mask.
OFTEN = ("free-unet-cross", "foldable-unet-self", "tied-unet-cross", "cores-unet-cross")
OFTEN += ("free-clip", "tied-clip", "foldable-vit")
FEW = ("free-unet-cross", "cores-unet-cross", "tied-clip", "foldable-vit")  # where all kinds are one to what is asked


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference."""
    return (left - right).abs().max().item()
