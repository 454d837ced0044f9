"""Small random models in the oracle, fp64, for the tests of the oracle itself."""

from functools import lru_cache

import models
import torch
from reference.model import ReferenceModel


@lru_cache
def oracle(family, **changes):
    """A small model of a family; changes: of its config."""
    config = models.config_of(family, **changes)
    return ReferenceModel(config, models.random_tensors(config), torch.float64)


def prompt_of(model, length, seed=0):
    """Random ids without the model's mask and EOS."""
    config = {"vocab_size": model.vocab_size, "mask_token_id": model.shape.mask_id, "eos_token_id": model.shape.eos_id}
    return models.random_prompt(config, length, seed)
