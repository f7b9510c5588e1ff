"""Transition: everything that vlmamba_lite.model held, until its users import from its modules. Only this docstring stays at the end."""
import torch
from PIL import Image

from ..connector import plot_sight
from ..data import Batch
from ..files import (SWITCH, WEIGHTS, finish_save, naming, read_json, save_together, saved_files, tensors_in,  # noqa: F401
                     write_atomically, write_json)
from ..language_model import MambaConfig, MambaLM, repeat_state  # noqa: F401
from ..vision import find_file  # noqa: F401
from .chat import Chat, PromptFormat, check_state  # noqa: F401
from .memory import *  # noqa: F403
from .presets import *  # noqa: F403
from .presets import LANGUAGE_MODELS as LANGUAGES, VISION_ENCODERS as EYES, vision_spec as eye_spec  # noqa: F401
from .saving import *  # noqa: F403
from .vlmamba import VLMamba, picture_tokens, select_state

Speech = PromptFormat


def picture_pixels(model, image):
    return model.pixels(image)


def plot_model_sight(models, image, at, decades=6):
    return plot_sight({name: (model.connector, *picture_tokens(model, image)) for name, model in models.items()}, at, image, decades)


def ask_all(model, images, questions, max_new_tokens=8, template=None):
    "`ask` for many questions in one batch: vlmamba_lite.evaluation has it in future."
    if not questions:
        raise ValueError("questions: got none, need at least one")
    if isinstance(images, Image.Image) or (isinstance(images, list) and images and hasattr(images[0], "_fields")):
        images = [images] * len(questions)
    if not isinstance(images, (list, tuple)) or len(images) != len(questions):
        got = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(f"images: got {got} for {len(questions)} questions, need one for all or one for each")
    prompt = PromptFormat(model.tokenizer, template)
    prompts = [prompt.encode(question) for question in questions]
    states = {key: model.state_of(image) for key, image in {id(image): image for image in images}.items()}
    state = [type(parts[0])(*map(torch.cat, zip(*parts))) for parts in zip(*(states[id(image)] for image in images))]
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[False] * (T - len(p)) + [True] * len(p) for p in prompts], device=model.device)
    new = model.language.generate(ids, max_new_tokens, prompt.stops, mask, state)[:, T:]
    return [prompt.decode(row) for row in new.tolist()]


_forward = VLMamba.forward


def forward(self, batch, input_ids=None, labels=None, mask=None):
    "A `Batch`, or the old call `model(images, input_ids, labels, mask)`, which falls with this file."
    if isinstance(batch, Batch):
        return _forward(self, batch)
    q, rest = divmod(len(input_ids), len(batch))
    if rest or not q:
        raise ValueError(f"input_ids: got {len(input_ids)} rows, need a multiple of the {len(batch)} images")
    return self.language(input_ids, mask=mask, state=repeat_state(self.read(batch), q), labels=labels, return_state=False)


VLMamba.forward, VLMamba.ask_all, VLMamba.seen = forward, ask_all, VLMamba.state_of
del select_state
