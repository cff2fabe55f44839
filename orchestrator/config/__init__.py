"""Every knob, frozen and checked, without torch or ray."""

from orchestrator.config.base import Base, Identity
from orchestrator.config.cluster import Cluster, Tracking, Workers, Zero
from orchestrator.config.data import Data, Source
from orchestrator.config.evaluation import Evaluation
from orchestrator.config.home import home
from orchestrator.config.manifest import Manifest
from orchestrator.config.method import (
    IA3,
    BitFit,
    Bottleneck,
    Full,
    Knobs,
    LastLayers,
    Lora,
    Method,
    Norms,
    Peft,
    Prefix,
    Prompt,
    Sparse,
)
from orchestrator.config.run import NAME_PATTERN, Run
from orchestrator.config.search import Search
from orchestrator.config.serving import Serving
from orchestrator.config.task import CausalLM, Classification, Task
from orchestrator.config.train import Train

__all__ = [
    "IA3",
    "NAME_PATTERN",
    "Base",
    "BitFit",
    "Bottleneck",
    "CausalLM",
    "Classification",
    "Cluster",
    "Data",
    "Evaluation",
    "Full",
    "Identity",
    "Knobs",
    "LastLayers",
    "Lora",
    "Manifest",
    "Method",
    "Norms",
    "Peft",
    "Prefix",
    "Prompt",
    "Run",
    "Search",
    "Serving",
    "Source",
    "Sparse",
    "Task",
    "Tracking",
    "Train",
    "Workers",
    "Zero",
    "home",
]
