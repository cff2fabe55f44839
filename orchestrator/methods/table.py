"""Every method by name. A new one is its file, its knobs and one line here."""

from orchestrator.methods.lora import LoRA
from orchestrator.methods.method import Method

METHODS: dict[str, Method] = {
    "lora": LoRA(),
}
