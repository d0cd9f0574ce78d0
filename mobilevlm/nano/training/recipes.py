"""Training recipes: the stages of the literature, each as data."""

from __future__ import annotations

from dataclasses import dataclass

from mobilevlm.nano.questions import KINDS
from mobilevlm.nano.training.model import NanoConfig
from mobilevlm.nano.training.window import WINDOW_TRAINED

ALL_KINDS = (*KINDS, "two_images", "text", "caption")
"""Kinds of question in the order of their numbers in logs and batches."""


@dataclass(frozen=True)
class Recipe:
    """One stage of training."""

    name: str
    steps: int
    """Optimizer steps, unless the caller gives a number or a time budget."""
    learning_rate: float
    images: int
    """Images per step; each becomes one packed row."""
    pair_rows: int
    """Rows per step about two of those images."""
    text_rows: int
    """Rows per step of text-only questions."""
    length: int
    """Places per row: prefix, visual tokens and as many questions as fit."""
    captions: float
    """Share of images that are also described."""
    dense_weight: float
    """Weight of the dense targets of the visual tokens (see dense.py)."""
    grounding_weight: float = 0.0
    """Weight of the grounding of noun phrases (see grounding.py)."""
    warmup: float = 0.03
    """Share of the stage over which the learning rate rises."""
    final: float = 0.02
    """Learning rate at the end, as a share of the peak; the fall is a cosine."""
    weight_decay: float = 0.05
    clip: float = 1.0
    balance_weight: float = 0.0
    """Weight of the experts' load-balancing loss."""
    beta: float = 0.0
    """DPO's temperature; 0: ordinary next-token loss."""
    trained: str = WINDOW_TRAINED
    """Pattern of the names of the parameters that are trained; the others stay."""
    window: bool = True
    """The tower gathers neighbours instead of computing attention (see window.py)."""

    @property
    def language(self) -> bool:
        """True if the decoder is trained at all."""
        return self.length > 0


SPARSE_PARTS = r".*\.mlp\.(experts|router)\..*"
"""Experts and routers: what MoE-tuning trains (MoE-LLaVA, stage III)."""

RECIPES = {
    "vision": Recipe("vision", 4000, 1.0e-3, 16, 0, 0, 0, 0.0, 1.0),
    "pretrain": Recipe("pretrain", 1500, 1.2e-3, 32, 2, 1, 384, 1.0, 0.5, 1.0),
    "sft": Recipe("sft", 6000, 1.0e-3, 32, 4, 2, 880, 0.1, 0.3, 1.0),
    "dpo": Recipe("dpo", 200, 3e-5, 16, 0, 0, 640, 0.0, 0.0, weight_decay=0.0, beta=0.1),
    "moe": Recipe(
        "moe",
        1500,
        5e-4,
        32,
        4,
        2,
        880,
        0.1,
        0.0,
        balance_weight=0.01,
        trained=SPARSE_PARTS,
        window=False,
    ),
}
"""``vision`` stands in for CLIP's own pre-training; then as MobileVLM V2 and MoE-LLaVA do."""

SIZES = {
    "nano": NanoConfig(),
    "test": NanoConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_hidden_size=32,
        vision_intermediate_size=64,
        vision_layers=1,
        vision_heads=2,
    ),
}
"""``nano`` is what ships; ``test`` is for tests."""
