"""Makes the LoRA adapters and expected logits of this folder with PEFT: see README.md.

pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0
python make.py ../llava_v1 .
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

POSITIONS = 12
"""Last positions of the prompt whose logits are kept."""
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    # As LLaVA's own training saves it: config.json beside it, the projector in a file of its own.
    "llava": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ATTENTION, *MLP],
        "task_type": "CAUSAL_LM",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[23]\.mlp\..*": 3},
        "alpha_pattern": {"v_proj": 12},
    },
    "rslora": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "mm_projector", "lm_head"],
        "fan_in_fan_out": True,
        "bias": "lora_only",
        "lora_bias": False,
    },
    "modules_to_save": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["embed_tokens", "down_proj", "o_proj"],
        "modules_to_save": ["mm_projector", "norm"],
    },
    "lora_bias": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["mm_projector"],
        "lora_bias": True,
        "bias": "all",
    },
}


def load_model(base: Path) -> LlamaForCausalLM:
    """LLaVA's class as far as logits need it: a Llama with ``model.mm_projector``."""
    settings = json.loads((base / "checkpoint" / "config.json").read_text())
    keys = LlamaConfig().to_dict().keys() & settings.keys() - {"model_type", "torch_dtype"}
    model = LlamaForCausalLM(LlamaConfig(**{key: settings[key] for key in keys}))
    model.model.mm_projector = nn.Linear(settings["mm_hidden_size"], settings["hidden_size"])
    tensors = load_file(base / "checkpoint" / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.float().eval()


@torch.no_grad()
def logits(model: LlamaForCausalLM, base: Path) -> torch.Tensor:
    with np.load(base / "expected.npz") as stored:
        ids, features = stored["input_ids"][0], torch.from_numpy(stored["vision_features"])
    place = ids.tolist().index(-200)
    before, after = (torch.from_numpy(part)[None] for part in (ids[:place], ids[place + 1 :]))
    embed, image = model.model.embed_tokens, model.model.mm_projector(features)
    embeds = torch.cat([embed(before), image, embed(after)], dim=1)
    found: torch.Tensor = model(inputs_embeds=embeds).logits[0, -POSITIONS:]
    return found


@torch.no_grad()
def disturb(model: nn.Module, random: torch.Generator) -> None:
    """Gives everything that is trained other values, as training would."""
    for name, value in model.named_parameters():
        if value.requires_grad:
            scale = 0.05 if "lora_" in name else 0.1 * float(value.std() if value.dim() > 1 else 1)
            value.add_(scale * torch.randn(value.shape, generator=random))


def main(base: Path, out: Path) -> None:
    expected = {"base": logits(load_model(base), base)}
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(load_model(base), LoraConfig(**settings))
        projector = model.base_model.model.model.mm_projector
        if name == "llava":
            projector.requires_grad_(True)
        disturb(model, torch.Generator().manual_seed(seed))
        folder = out / name
        model.save_pretrained(
            folder, safe_serialization=name != "rslora", save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if name == "llava":
            others = {
                key: value.detach().clone()
                for key, value in model.named_parameters()
                if value.requires_grad and "lora_" not in key
            }
            torch.save(others, folder / "non_lora_trainables.bin")
            config = (base / "checkpoint" / "config.json").read_text()
            (folder / "config.json").write_text(config)
        unmerged = logits(model.base_model.model, base)
        expected[name] = logits(model.merge_and_unload(), base)
        difference = float((unmerged - expected[name]).abs().max())
        change = float((expected["base"] - expected[name]).abs().max())
        print(f"{name}: merged against unmerged {difference:.2g}, against the base {change:.2g}")
    arrays: dict[str, Any] = {name: value.numpy() for name, value in expected.items()}
    np.savez_compressed(out / "expected.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
