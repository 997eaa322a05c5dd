"""Abstract interfaces: the contract between core and plugins, and nothing concrete."""

from dmmd_core.interfaces.backbone import Backbone
from dmmd_core.interfaces.codec import Codec, ImageCodec, Images, TextCodec
from dmmd_core.interfaces.component import KINDS, Component, Requirement, Slot, option, slot
from dmmd_core.interfaces.data import Batch, Data, DataSpec, EnumerableData, FiniteData
from dmmd_core.interfaces.denoiser import (
    Condition,
    Denoiser,
    NetworkDenoiser,
    NetworkPrediction,
    Prediction,
    TablePrediction,
    network_times,
)
from dmmd_core.interfaces.generator import Generator
from dmmd_core.interfaces.image_source import ImageSource, Picture
from dmmd_core.interfaces.language_model import LanguageModel
from dmmd_core.interfaces.metric import Features, Metric, Subject, Value
from dmmd_core.interfaces.objective import Losses, Objective, Player
from dmmd_core.interfaces.observer import Observer
from dmmd_core.interfaces.process import Process, per_position
from dmmd_core.interfaces.sampler import Sampler, Samples
from dmmd_core.interfaces.schedule import Schedule
from dmmd_core.interfaces.teacher import Teacher

INTERFACES: dict[str, type[Component]] = {
    cls.kind: cls
    for cls in (
        Process, Schedule, Backbone, Generator, Objective, Teacher, Data, Codec, Sampler, Metric, Features,
        LanguageModel, ImageSource, Observer,
    )
}  # fmt: skip

__all__ = [
    "INTERFACES",
    "KINDS",
    "Backbone",
    "Batch",
    "Codec",
    "Component",
    "Condition",
    "Data",
    "DataSpec",
    "Denoiser",
    "EnumerableData",
    "Features",
    "FiniteData",
    "Generator",
    "ImageCodec",
    "ImageSource",
    "Images",
    "LanguageModel",
    "Losses",
    "Metric",
    "NetworkDenoiser",
    "NetworkPrediction",
    "Objective",
    "Observer",
    "Picture",
    "Player",
    "Prediction",
    "Process",
    "Requirement",
    "Sampler",
    "Samples",
    "Schedule",
    "Slot",
    "Subject",
    "TablePrediction",
    "Teacher",
    "TextCodec",
    "Value",
    "network_times",
    "option",
    "per_position",
    "slot",
]
