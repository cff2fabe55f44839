"""Every knob, frozen and checked, without torch or ray."""

from orchestrator.config.base import Base, Identity
from orchestrator.config.cluster import Cluster, Tracking, Workers, Zero
from orchestrator.config.data import Data, Source
from orchestrator.config.home import home
from orchestrator.config.manifest import Manifest
from orchestrator.config.method import Lora, Method
from orchestrator.config.run import NAME_PATTERN, Run
from orchestrator.config.serving import Serving
from orchestrator.config.task import CausalLM, Task
from orchestrator.config.train import Train

__all__ = [
    "NAME_PATTERN",
    "Base",
    "CausalLM",
    "Cluster",
    "Data",
    "Identity",
    "Lora",
    "Manifest",
    "Method",
    "Run",
    "Serving",
    "Source",
    "Task",
    "Tracking",
    "Train",
    "Workers",
    "Zero",
    "home",
]
