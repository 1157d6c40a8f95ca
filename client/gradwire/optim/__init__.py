"""Optimizers by their torch.optim names and arguments, as plain frozen values: the update itself runs on the ranks.

    optim.AdamW(
        lr=3e-4,
        groups=[optim.ParamGroup("*.bias", weight_decay=0.0)],
        schedule=optim.schedule.CosineAnnealingLR(T_max=100),
    )

A spec checks itself where it is written: `SGD(lr=-1)` raises InvalidArgument and names the field and the bound.
"""

from gradwire.optim import schedule
from gradwire.optim.optimizers import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)
from gradwire.optim.spec import Optimizer, ParamGroup

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "Optimizer",
    "ParamGroup",
    "RAdam",
    "RMSprop",
    "Rprop",
    "schedule",
]
