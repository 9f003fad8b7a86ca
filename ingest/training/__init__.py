"""How are sparse autoencoders trained on the stored activations of a run?"""

from .config import SaeTrainConfig
from .job import TrainProgress
from .report import HookPointReport, LossRecovered, SaeTrainReport
from .trainer import train_sae

__all__ = [
    "HookPointReport",
    "LossRecovered",
    "SaeTrainConfig",
    "SaeTrainReport",
    "TrainProgress",
    "train_sae",
]
