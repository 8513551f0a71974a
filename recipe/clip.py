"""Stage 2, a small CLIP: its text tower is where the base's text encoder starts, and it is the project's own metric."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from recipe.autoencoder import as_tensor
from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Batch, Schedule, fast_precision, fit
from recipe.world import OBJECTS, PIXELS, RARE_WORDS, Scene, caption

WIDTH = 128
TOKENS = 32  # longest prompt, begin and end included
BATCH = 128
WORDINGS = 4  # captions of each scene
THROUGH_VAE = 10_000  # of the 30,000 pictures
LATENT_ERROR = 0.6  # most noise on latents whose spread is one
UNNAMED = -100  # instead of the name of what a picture shows, where it shows two things


def new_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with its own byte-level BPE, learned from the world's captions; any other text still encodes."""
    rng = random.Random(0)
    corpus = [caption(scene, rng) for scene in scenes(4000, seed=3)]
    corpus += [" ".join(RARE_WORDS)] * 200 + [
        "picture of the in with under over near big tiny two three dark light"
    ] * 200
    learned = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learned.train_from_iterator(corpus, trainer)
    model = json.loads(learned.to_str())["model"]
    # As in OpenAI's vocabulary: letters, letters that end a word, merges, and the two special tokens last.
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    known = set(tokens)
    tokens += [token for token in model["vocab"] if token not in known and not token.startswith("<|")]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=TOKENS)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialized CLIPModel of the base's shape."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def new_processor() -> CLIPImageProcessor:
    """What makes the CLIP's input of a picture of any size: values from -1 to 1, as `as_tensor` does."""
    half = [0.5] * 3
    whole = {"height": PIXELS, "width": PIXELS}
    return CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=whole, image_mean=half, image_std=half)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> (B, TOKENS) ids, padded with the end token as Stable Diffusion does."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def worded(tokenizer: CLIPTokenizer, world: list[Scene]) -> torch.Tensor:
    """Token ids of WORDINGS captions of every scene, (N, WORDINGS, TOKENS)."""
    rng = random.Random(23)
    texts = [caption(scene, rng) for scene in world for _ in range(WORDINGS)]
    return token_ids(tokenizer, texts).view(len(world), WORDINGS, -1)


def _name_texts() -> list[str]:
    return [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in OBJECTS]


def _blemished(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little blur and noise, so that generated pictures are judged by what they show and not by their texture."""
    soft = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    share, strength = torch.rand(2, len(pixels), 1, 1, 1, generator=generator, device=DEVICE)
    noise = torch.randn(pixels.shape, generator=generator, device=DEVICE)
    return pixels.lerp(soft, share) + 0.06 * strength * noise


@torch.no_grad()
def _through(vae: AutoencoderKL, pool: np.ndarray) -> np.ndarray:
    """The pictures as a U-Net might give them: decoded from latents that are a little off."""
    vae.to(DEVICE)
    generator, seen = torch.Generator(DEVICE).manual_seed(0), []
    for start in range(0, len(pool), 50):
        latents = vae.encode(as_tensor(pool[start : start + 50]).to(DEVICE)).latent_dist.mean
        off = LATENT_ERROR * torch.rand(len(latents), 1, 1, 1, generator=generator, device=DEVICE)
        noise = torch.randn(latents.shape, generator=generator, device=DEVICE)
        decoded = vae.decode(latents + off * noise).sample
        seen.append(decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().movedim(1, -1).cpu().numpy())
    return np.concatenate(seen)


def train(state: Path, steps: int, vae: AutoencoderKL) -> None:
    """Contrastive training on captioned scenes, a third of them seen through the VAE; `state` has the weights.

    Trained on drawn scenes alone, it named 92 % of those and called well drawn bananas mushrooms (docs/log.md).
    """
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    model = new_clip(tokenizer).to(DEVICE)
    world: list[Scene] = scenes(30_000, seed=11)
    pool = pictures(world, seed=12)
    pool[:THROUGH_VAE] = _through(vae, pool[:THROUGH_VAE])
    seen = torch.from_numpy(pool).to(DEVICE)

    ids = worded(tokenizer, world).to(DEVICE)  # N, W, M
    names = list(OBJECTS)
    name_ids = token_ids(tokenizer, _name_texts()).to(DEVICE)
    only_things = [names.index(scene.things[0].name) if len(scene.things) == 1 else UNNAMED for scene in world]
    only_things = torch.tensor(only_things, device=DEVICE)
    itself = torch.arange(BATCH, device=DEVICE)
    precision = fast_precision()

    def batch_of(step: int) -> Batch:
        generator = torch.Generator(DEVICE).manual_seed(step)
        on = {"generator": generator, "device": DEVICE}
        chosen, wording = torch.randint(len(pool), (BATCH,), **on), torch.randint(WORDINGS, (BATCH,), **on)
        texts = torch.cat([ids[chosen, wording], name_ids])
        return _blemished(as_tensor(seen[chosen]), generator), texts, only_things[chosen]

    def loss_of(pixels: torch.Tensor, texts: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        with precision:
            logits = model(input_ids=texts, pixel_values=pixels).logits_per_image.float()
        pairs, named = logits.split((BATCH, len(names)), dim=1)  # B pictures x texts
        told_apart = (cross_entropy(pairs, itself) + cross_entropy(pairs.T, itself)) / 2
        # Background, place and size are enough to tell the pictures of a batch apart, and then names are not learned.
        # So each picture of one thing must also prefer its name to all others.
        return told_apart + cross_entropy(named, shown, ignore_index=UNNAMED)

    fit(model, batch_of, loss_of, Schedule(steps, learning_rate=8e-4, weight_decay=0.05, ema_decay=0.998), state)


@torch.no_grad()
def name_objects(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: torch.Tensor) -> list[str]:
    """Which of the world's objects each picture (B, 3, H, W) shows, zero-shot from 'a photo of a NAME'."""
    texts = _name_texts()
    names = np.array(list(OBJECTS))
    found = []
    for batch in pixels.split(100):
        logits = model(input_ids=token_ids(tokenizer, texts), pixel_values=batch).logits_per_image
        found.extend(names[logits.argmax(-1).numpy()])
    return found
