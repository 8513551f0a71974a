"""The settings of a training run, in groups."""

from dataclasses import dataclass, fields

from comcat_diffusion.config import (
    EMBEDDED,
    EMBEDDED_FLOW,
    BaseSettings,
    Group,
    option,
    require,
    require_at_least,
    require_finite,
    require_seed,
)
from comcat_diffusion.training.names import shown
from comcat_diffusion.words import places

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
STEADY_SCHEDULES = ("constant", "constant_with_warmup")  # whose rate does not depend on how long the run is
CUT_AT = 0.8  # of all steps; the rest make good what cutting the ranks to a budget of bytes has cost
CUT_BESIDE_AT = 0.6  # the same with terms beside other modules, of which more is cut
PRIORS = ("none", "images", "teacher")
KINDS = {
    "tied": 1e-2,
    "foldable": 1e-2,
    "free": 5e-3,
    "cores": 5e-2,
}  # with the learning rates that suit them, see docs/results.md
# Settings that change what a run leaves beside its weights; a resumed run may have others.
BESIDE = (
    "output_dir", "name", "overwrite", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "validation_prompt", "num_validation_images", "validation_steps", "skip_final_inference", "report_to",
    "cache_dir", "save_precision", "thumbnail", "skip_broken", "as_",
)  # fmt: skip


def _require_said(prompt: str | None) -> None:
    said = prompt is None or bool(prompt.strip())
    require(said, "--instance_prompt is empty: say what the pictures show, like 'a photo of sks dog'.")


def _require_text(settings: object) -> None:
    """Raise ValueError, naming the flag, for a name or a text that run.toml, which is UTF-8, could not hold."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        for text in value if isinstance(value, list) else [value]:
            told = f"--{item.name} '{shown(str(text))}' is not UTF-8, as the settings of a run are kept: rename it."
            require(not isinstance(text, str) or text == text.encode("utf-8", "ignore").decode(), told)


def _require_word(prompt: str | None, word: str | None, kind: str = "") -> None:
    if prompt and word:
        require(bool(places(word, prompt)), f"--instance_prompt '{prompt}' does not contain {kind}'{word}'.")


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """One subject; several stand in a TOML file as [[subjects]] tables."""

    instance_data_dir: str
    instance_prompt: str | None = None
    trigger: str | None = None
    class_word: str | None = None
    class_prompt: str | None = None
    class_data_dir: str | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        require(
            self.instance_prompt is not None or self.trigger is not None,
            f"--instance_prompt is missing: say in words what {self.instance_data_dir} shows (or, where every picture "
            "has a caption, name the --trigger), or name the --trigger and its --class_word.",
        )
        _require_said(self.instance_prompt)
        _require_text(self)
        for flag in ("trigger", "class_word"):
            word = getattr(self, flag)
            require(word is None or bool(word.strip()), f"--{flag} is empty: write a word, or leave it out.")
        require(self.repeats >= 1, f"--repeats must be at least 1, not {self.repeats}.")
        _require_word(self.instance_prompt, self.trigger, "the trigger ")

    @property
    def prompt(self) -> str | None:
        """What pictures without a caption show: as was said, or as follows from the names."""
        if self.instance_prompt or not self.class_word:
            return self.instance_prompt
        return f"a photo of {self.trigger} {self.class_word}"


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Group):
    """The pictures"""

    instance_data_dir: str | None = option(
        None, "Folder with the pictures of the subject. Default: the sample subject.", usual=True
    )
    instance_prompt: str | None = option(
        None, "A prompt that names the subject, for instance 'a photo of sks dog'.", usual=True
    )
    trigger: str | None = option(
        None,
        "The rare word in the prompt that stands for the subject, for instance sks. Default: found in the prompt.",
        usual=True,
    )
    class_word: str | None = option(
        None,
        "What kind of thing the subject is, for instance dog. Default: what stands behind the trigger.",
        usual=True,
    )
    repeats: int = option(1, "Times that every picture counts in a pass; of use with several subjects.")
    subjects: list[SubjectConfig] = option(
        [], "Several subjects, each a [[subjects]] table with the settings above.", file_only=True
    )
    resolution: int | None = option(
        None, "Side in pixels of the training pictures. Default: the base's own.", usual=True
    )
    aspect_ratio_buckets: bool = option(False, "Cut pictures to the nearest of several shapes instead of a square.")
    center_crop: bool = option(True, "Crop the middle; otherwise four random places of every picture.")
    random_flip: bool = option(False, "Also learn from mirrored pictures.")
    alpha_mask: bool = option(False, "Use the alpha channel as a mask (files like PICTURE-mask.png are always used).")
    auto_mask: bool = option(
        True,
        "Where a picture has no mask, let the base find the subject in it by its class word, so that what is around it "
        "is not learned as the subject's.",
    )
    background_augmentation: bool = option(
        True,
        "Also learn from pictures that have a plain background before others, which the prompt names, so that the "
        "subject is not learned together with its own.",
    )
    unmasked_weight: float = option(0.1, "Weight of what the mask leaves out, where the mask has weight 1.")
    caption_dropout_rate: float = option(
        0.5,
        "How often a picture with a caption is learned by the prompt of all instead, like 'a photo of sks dog', so "
        "that it can be drawn by that one too.",
    )
    skip_broken: bool = option(False, "Leave out pictures that cannot be read, instead of refusing the folder.")
    cache_dir: str | None = option(None, "Keep latents in this folder, so that the next run starts faster.")

    def check(self) -> None:
        """Numbers make sense; one subject or several, not both."""
        _require_said(self.instance_prompt)
        require_at_least(self, 1, "resolution", "repeats")
        require_finite(self, "unmasked_weight")
        rate = self.caption_dropout_rate
        require(0 <= rate <= 1, f"--caption_dropout_rate must be 0 to 1, not {rate}.")
        require(0 <= self.unmasked_weight <= 1, f"--unmasked_weight must be 0 to 1, not {self.unmasked_weight}.")
        require(
            not (self.subjects and self.instance_data_dir),
            "--instance_data_dir and [[subjects]] tables exclude each other: put the folder into a table.",
        )
        require(
            not (self.subjects and (self.instance_prompt or self.trigger or self.class_word)),
            "--instance_prompt, --trigger and --class_word belong into the [[subjects]] tables, where there are any.",
        )


@dataclass(frozen=True, kw_only=True)
class AdapterShape(Group):
    """The adapter"""

    rank: int = option(8, "Rank added to each head's two products.", usual=True)
    alpha: float | None = option(None, "Strength: the term is scaled by alpha / rank. Default: rank.")
    kind: str | None = option(
        None,
        "What a head is given. Free, the default: any term of this rank. Foldable: one in the span of the base's "
        "heads, which folds into stock weights. Tied: a foldable one whose text side all heads share, and that of a "
        "self-attention its own. Cores: rank x rank numbers a head, between directions that its keys and values have.",
        choices=tuple(KINDS),
        usual=True,
    )
    as_: str | None = option(
        None,
        "lora: what becomes, exactly, a LoRA for ComfyUI, Forge, A1111, kohya's scripts, InvokeAI and diffusers "
        "(comcat export): --kind foldable --everywhere. Default: the kind above, for this tool and its ComfyUI node.",
        choices=("lora",),
        usual=True,
    )
    everywhere: bool = option(
        False,
        "Act on the whole of every prompt. Default: from the trigger on; without it, the base is as it was.",
    )
    target_modules: list[str] | None = option(
        None,
        "Attentions to adapt, for instance attn2. Default: cross-attention, and of a free adapter on a U-Net without "
        "--convolutions self-attention too.",
    )
    up_blocks_only: bool = option(
        False,
        "Adapt a U-Net's up blocks alone: a quicker step and half the file, for a little less likeness.",
        formerly="way_up",
    )

    convolutions: int | None = option(
        None,
        "Rank of terms beside the second convolution of each residual block of a U-Net, which carry fine detail. "
        "Default: 16 for a free adapter on a U-Net, and none for others. 0: none, and self-attention in their place.",
    )

    feed_forwards: int = option(
        0,
        "Rank of terms beside the Linears of a transformer's feed-forwards, which bring detail where pictures have "
        "captions. Default: none.",
    )

    def check(self) -> None:
        """A head is given something, at a strength that is a number; `as_` chooses kind and place."""
        if self.as_ == "lora":
            told = "--kind free is outside of what a LoRA can express: leave it out, or leave out --as lora."
            require(self.kind != "free", told)
            for name, value in (("kind", "foldable"), ("everywhere", True)):
                object.__setattr__(self, name, value)
        object.__setattr__(self, "kind", self.kind or "free")
        require_at_least(self, 1, "rank")
        require_at_least(self, 0, "convolutions")
        require_at_least(self, 0, "feed_forwards")
        require_finite(self, "alpha", above=0)


@dataclass(frozen=True, kw_only=True)
class LearningSettings(AdapterShape):
    """What is learned with it"""

    learn_name: bool = option(
        False,
        "Make the subject's name, like 'sks dog', one new word that starts as its class and is learned together with "
        "the adapter; text is then encoded at every step.",
    )
    init_adapter: str | None = option(
        None, "Start from this adapter file, whose subject, kind, rank and targets stay what they are."
    )
    train_text_encoder: bool = option(False, "Also adapt the text encoder(s); text is then encoded at every step.")
    placeholder_token: str | None = option(
        None, "Learn a new token together with the adapter, for instance '<my-cat>'."
    )
    initializer_token: str | None = option(None, "A known word that the new token starts from, for instance cat.")
    num_vectors: int = option(1, "Embeddings that the new token consists of.")

    def check(self) -> None:
        """A new token starts from a known one."""
        require_at_least(self, 1, "num_vectors")
        require(
            self.num_vectors == 1 or self.placeholder_token is not None,
            "--num_vectors is of a --placeholder_token: name one, or leave it out.",
        )
        require(
            (self.placeholder_token is None) == (self.initializer_token is None),
            "--placeholder_token and --initializer_token belong together: a new token starts from a known word.",
        )
        require(
            not (self.learn_name and (self.everywhere or self.placeholder_token)),
            "--learn_name is for adapters that act from the trigger on, and for names without a --placeholder_token: "
            "leave one of them out.",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Group):
    """The loss"""

    snr_gamma: float | None = option(None, "Min-SNR weighting of the loss; 5.0 is usual. Default: none.")
    noise_offset: float = option(0.0, "Constant noise per channel; about 0.1 helps very dark or bright subjects.")
    prior: str = option(
        "none",
        "Keep the class as it is: by pictures of it, or by the frozen base as a teacher, which needs none.",
        choices=PRIORS,
    )
    with_prior_preservation: bool = option(False, "The same as --prior images.")
    prior_loss_weight: float = option(1.0, "Weight of the prior loss.")
    class_prompt: str | None = option(None, "Prompt of the class. Default: the instance prompt without the trigger.")
    class_data_dir: str | None = option(None, "Pictures of the class; missing ones are drawn by the base.")
    num_class_images: int = option(100, "Pictures of the class that there must be.")

    def check(self) -> None:
        """Weights are positive, and only one kind of prior is asked for."""
        require_finite(self, "snr_gamma", "prior_loss_weight", above=0)
        require_finite(self, "noise_offset")
        require_at_least(self, 1, "num_class_images")
        require(
            not (self.with_prior_preservation and self.prior == "teacher"),
            "--with_prior_preservation means --prior images; it excludes --prior teacher.",
        )


@dataclass(frozen=True, kw_only=True)
class PaceSettings(Group):
    """The pace"""

    max_train_steps: int = option(400, "Number of optimizer steps.", usual=True)
    train_batch_size: int | None = option(
        None, "Pictures a step. Default: 1; on the embedded base, all up to 4.", usual=True
    )
    gradient_accumulation_steps: int = option(1, "Batches whose gradients are added up before a step.")
    learning_rate: float | None = option(None, "Peak learning rate. Default: 1e-2; of free adapters 5e-3.", usual=True)
    text_encoder_lr: float | None = option(None, "That of the text encoders' adapters. Default: a tenth of the other.")
    token_lr: float | None = option(None, "That of a new token. Default: the learning rate.")
    lr_scheduler: str = option("linear", "Course of the learning rate.", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "Steps over which the learning rate rises from zero.")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment.")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment.")
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW: epsilon.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = option(False, "Save a running mean of the weights instead of the last ones.")
    ema_decay: float = option(0.99, "Decay of that mean per step.")

    def check(self) -> None:
        """Something can be learned at this pace."""
        require_at_least(self, 1, "max_train_steps", "gradient_accumulation_steps", "train_batch_size")
        rates = ("learning_rate", "text_encoder_lr", "token_lr", "max_grad_norm", "adam_epsilon")
        require_finite(self, *rates, above=0)
        for flag in ("adam_beta1", "adam_beta2"):
            value = getattr(self, flag)
            require(0 <= value < 1, f"--{flag} must be at least 0 and below 1, not {value}.")
        require_finite(self, "adam_weight_decay")
        require_at_least(self, 0, "adam_weight_decay")
        require(0 < self.ema_decay < 1, f"--ema_decay must be between 0 and 1, not {self.ema_decay}.")
        require(
            0 <= self.lr_warmup_steps < self.max_train_steps,
            f"--lr_warmup_steps {self.lr_warmup_steps} must be shorter than --max_train_steps {self.max_train_steps}: "
            "the learning rate would never reach its peak.",
        )


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Group):
    """The machine"""

    mixed_precision: str | None = option(
        None,
        "Precision of the frozen base. Default: that of accelerate launch, else bf16 where the device is fast in it.",
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    allow_tf32: bool = option(False, "Faster, slightly less exact float32 products on recent GPUs.")
    compile: bool = option(False, "Compile the U-Net: a slow first step, then faster ones.")
    seed: int = option(
        0,
        "Seed of everything random. On one machine, a CPU with as many threads gives the same file again.",
        usual=True,
    )

    def check(self) -> None:
        """The seed is one."""
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Group):
    """What is written"""

    output_dir: str = option("out", "Folder for the adapter, its settings, metrics and samples.", usual=True)
    name: str | None = option(None, "Name of the adapter file. Default: the trigger and class words.")
    overwrite: bool = option(False, "Replace an adapter of the same name in --output_dir.", usual=True)
    save_precision: str = option("fp16", "Precision of the adapter file.", choices=("fp16", "bf16", "fp32"))
    checkpointing_steps: int | None = option(None, "Steps between checkpoints. Default: only one, at Ctrl-C.")
    checkpoints_total_limit: int | None = option(None, "Checkpoints to keep; the oldest go. Default: all.")
    resume_from_checkpoint: str | None = option(None, "Go on from this checkpoint folder, or from the latest.")
    max_bytes: int | None = option(
        None,
        "The most bytes of the file. Late in the run it is shrunk to them; the last steps make up for it. Default: of "
        "free adapters that wait for their trigger a twentieth of what is learned, of others all of it. 0: all of it.",
        usual=True,
    )
    thumbnail: bool = option(False, "Put a small sample into the file's header, where galleries look for one.")
    report_to: list[str] = option([], "Trackers that Accelerate knows, for instance tensorboard.")

    def check(self) -> None:
        """Counts are positive."""
        require_at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        require_at_least(self, 0, "max_bytes")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Group):
    """How it is judged"""

    validation_prompt: list[str] = option(
        [], "Prompts that samples are drawn from. Default: the instance prompt.", usual=True
    )
    num_validation_images: int = option(4, "Samples per prompt, from fixed seeds.")
    validation_steps: int | None = option(
        None, "Steps between samples and held-out losses, and samples before the first. Default: only at the end."
    )
    skip_final_inference: bool = option(False, "Draw no samples at the end.")
    validation_data_dir: str | None = option(None, "Pictures that are not learned from but judged by.")
    validation_fraction: float = option(0.0, "Share of the pictures to keep out of the training and judge by.")

    def check(self) -> None:
        """Counts are positive and shares below one."""
        require_at_least(self, 1, "num_validation_images", "validation_steps")
        require(
            0 <= self.validation_fraction < 1,
            f"--validation_fraction must be at least 0 and below 1, not {self.validation_fraction}.",
        )
        require(
            not (self.validation_fraction and self.validation_data_dir),
            "--validation_fraction and --validation_data_dir exclude each other: pictures are kept out, or there are "
            "others.",
        )
        require(all(p.strip() for p in self.validation_prompt), "--validation_prompt is empty: say what to draw.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ValidationSettings,
    RunSettings,
    MachineSettings,
    PaceSettings,
    ObjectiveSettings,
    LearningSettings,
    BaseSettings,
    PictureSettings,
):
    """Settings of a training run. Without any, it teaches the sample subject to the embedded base."""

    def check(self) -> None:
        """The groups fit each other, and can be kept."""
        _require_text(self)
        for flag, asked in (("prior", self.prior_kind != "none"), ("train_text_encoder", self.train_text_encoder)):
            require(
                self.everywhere or not asked,
                f"--{flag} is for adapters that change every prompt, and this one acts from the trigger on only: leave "
                "it out, or add --everywhere.",
            )
        told = "--max_bytes is for other kinds: cores have few numbers and all of them count; choose a smaller --rank."
        require(not (self.kind == "cores" and self.max_bytes), told)
        bare = self.skip_final_inference or bool(self.max_bytes)
        require(not (self.thumbnail and bare), "--thumbnail needs a final sample, and room: no --max_bytes.")
        own_base = self.pretrained_model_name_or_path not in (None, EMBEDDED, EMBEDDED_FLOW)
        own_pictures = bool(self.subjects) or self.instance_data_dir is not None
        require(
            own_pictures or not own_base,
            "--instance_data_dir is missing: the sample subject belongs to the embedded base.",
        )
        _require_word(self.instance_prompt, self.trigger, "the trigger ")
        _require_word(self.instance_prompt, self.placeholder_token)
        require(
            not (
                self.prior_kind == "images" and self.subjects and any(s.class_data_dir is None for s in self.subjects)
            ),
            "--prior images needs a class_data_dir in every [[subjects]] table.",
        )
        if self.instance_data_dir is not None:
            self.all_subjects()  # which checks its words

    @property
    def cut_step(self) -> int | None:
        """The step after which what is learned is shrunk to a budget of bytes, where there is one."""
        at = CUT_BESIDE_AT if self.convolutions or self.feed_forwards else CUT_AT
        return max(1, round(at * self.max_train_steps)) if self.max_bytes else None

    @property
    def prior_kind(self) -> str:
        """none, images or teacher."""
        return "images" if self.with_prior_preservation else self.prior

    def all_subjects(self) -> list[SubjectConfig]:
        """The subjects: those of the tables, or the one that the flags describe."""
        own = {item.name: getattr(self, item.name) for item in fields(SubjectConfig)}
        return list(self.subjects) or [SubjectConfig(**own | {"trigger": self.trigger or self.placeholder_token})]


@dataclass(frozen=True, kw_only=True)
class ValidateConfig(TrainConfig):
    """The check"""

    measure: bool = option(False, "Also run a few real steps: seconds per step and the peak of the memory.", usual=True)
