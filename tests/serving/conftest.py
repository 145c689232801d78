"""Recommenders of small models, untrained: weights large enough that every part of a model counts."""

import torch
from torch import nn

from recbole_ssm.data.identity import identity
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.vocabulary import Vocabulary

from ..conftest import build


def recommender(name: str, **settings) -> Recommender:
    """Of a model on the dataset ``tiny``."""
    config, model, (train_data, *_) = build(name, **settings)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.4)
    config.identity = {"file": "", **identity(train_data._dataset)}
    return Recommender(model, config, Vocabulary(config))
