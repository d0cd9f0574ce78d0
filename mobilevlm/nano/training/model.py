"""The trainable model: the torch reference of MobileVLM V2, initialised to learn from nothing.

With ``num_experts`` set, some decoder layers carry MoE-LLaVA's sparse experts in place of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.conversation import CONVERSATIONS, two_separator_template
from mobilevlm.decoder_spec import DecoderSpec, ExpertsSpec
from mobilevlm.families.towers import CLIP_MEAN, CLIP_STD
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import FixedImage, InputSpec
from mobilevlm.nano.training.packed_attention import PackedAttention, Packing
from mobilevlm.nano.training.window import attentions, install, keep_codes
from mobilevlm.reference.clip import ClipLayer, ClipMLP
from mobilevlm.reference.decoder import Attention, rotary_tables
from mobilevlm.reference.experts import SparseMLP
from mobilevlm.reference.mlp import GatedMLP
from mobilevlm.reference.model import ReferenceModel
from mobilevlm.spec import ConversationSpec, ModelSpec

EOS = 2
CONTEXT = 1024
"""Places that a checkpoint allows; training rows are shorter, two images need 400."""


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of a model; the defaults are those of the shipped ``nano``."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    image_size: int = 192
    patch_size: int = 8
    vision_hidden_size: int = 128
    vision_intermediate_size: int = 384
    vision_layers: int = 5
    """Layers that features come from; the checkpoint has one more, because layer -2 is selected."""
    vision_heads: int = 8
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    experts_per_token: int = 2

    @property
    def visual_tokens(self) -> int:
        """Tokens that one image becomes."""
        return (self.image_size // self.patch_size // 2) ** 2


def model_spec(config: NanoConfig, name: str = "nano") -> ModelSpec:
    """The spec of a model of these sizes."""
    grid = config.image_size // config.patch_size
    edge = config.image_size
    experts = None
    if config.num_experts:
        counts = (config.num_experts,) * len(config.moe_layers)
        experts = ExpertsSpec(config.moe_layers, counts, config.experts_per_token)
    return ModelSpec(
        family="mobilevlm",
        name=name,
        inputs={
            "image": InputSpec(
                preparation=FixedImage(edge, edge, "pad", CLIP_MEAN, CLIP_STD),
                encoder=TransformerEncoder(
                    hidden_size=config.vision_hidden_size,
                    intermediate_size=config.vision_intermediate_size,
                    num_hidden_layers=config.vision_layers,
                    num_attention_heads=config.vision_heads,
                    image_size=edge,
                    patch_size=config.patch_size,
                    hidden_act="quick_gelu",
                    layer_norm_eps=1e-5,
                ),
                connector=ConnectorSpec(
                    "ldpv2", config.vision_hidden_size, config.hidden_size, 2, grid, grid // 2
                ),
            )
        },
        decoder=DecoderSpec(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            rope_scaling=1.0,
            context_length=CONTEXT,
            tie_word_embeddings=False,
            experts=experts,
        ),
        conversation=ConversationSpec(
            chat_template=two_separator_template(CONVERSATIONS["v1"]),
            eos_token_ids=(EOS,),
            stop_strings=("</s>",),
        ),
    )


def config_of(spec: ModelSpec) -> NanoConfig:
    """The sizes that :func:`model_spec` made a spec of."""
    vision, decoder = spec.image.transformer, spec.decoder
    experts = decoder.experts or ExpertsSpec((), (0,), NanoConfig.experts_per_token)
    return NanoConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        rms_norm_eps=decoder.norm_eps,
        rope_theta=decoder.rope_theta,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        num_experts=experts.num_experts[0],
        moe_layers=experts.layers,
        experts_per_token=experts.top_k,
    )


class NanoModel(ReferenceModel):
    """The reference with batched passes and a free attention mask, so questions can be packed."""

    def __init__(self, config: NanoConfig) -> None:
        spec = model_spec(config)
        super().__init__(spec)
        self.config = config
        self.halfway = torch.zeros(0)
        """Hidden states (rows, length, hidden) of the last pass, after half of the layers."""
        install(self.vision, spec.image.transformer)
        for layer in self.decoder.layers:
            layer.attn = PackedAttention(spec.decoder)
        initialize(self)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised ``pixels`` (images, 3, edge, edge) to (images, visual_tokens, hidden)."""
        visual: Tensor = self.projector(self.vision(pixels))
        return visual

    def hidden_states(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        mask: Tensor | Packing,
        visual: Tensor,
    ) -> Tensor:
        """Final hidden states (rows, length, hidden).

        ``ids`` and ``positions`` are (rows, length); ``slots`` (rows, length) gives for each place
        the row of the flattened ``visual`` tokens that stands there, or -1 for text; ``mask`` is a
        packing, or (rows, 1, length, length), true where a query (third axis) sees a key (fourth).
        """
        embeds = self.decoder.embed_tokens(ids)
        tokens = F.pad(visual.flatten(0, 1).to(embeds.dtype), (0, 0, 1, 0))
        # Text places look up row 0, which as padding takes no part in the backward pass.
        images = F.embedding(slots + 1, tokens, padding_idx=0)
        embeds = torch.where((slots >= 0)[:, :, None], images, embeds)
        rotary = rotary_tables(self.spec.decoder, positions[:, None], layer=0)
        for index, layer in enumerate(self.decoder.layers, 1):
            embeds = layer(embeds, rotary, mask)
            if index == len(self.decoder.layers) // 2:
                self.halfway = embeds
        out: Tensor = self.decoder.norm(embeds)
        return out


def balance_loss(sparse: SparseMLP) -> Tensor:
    """How unevenly the last pass used the experts (Switch Transformer, Fedus et al. 2022, eq. 4): 1
    when the load is even."""
    first = F.one_hot(sparse.chosen[:, 0], len(sparse.experts)).float().mean(dim=0)
    return len(first) * (first * sparse.probabilities.mean(dim=0)).sum()


def initialize(model: NanoModel) -> None:
    """Random weights from which small models learn fast.

    Linears have standard deviation 1/sqrt(inputs); those that write to the residual stream are
    smaller the deeper the model. The tower looks at neighbours from the first step on (see
    window.py): shapes are learnt in far fewer steps.
    """
    vision, projector, decoder = model.vision, model.projector, model.decoder
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    tower_gain = (2 * len(vision.layers)) ** -0.5
    decoder_gain = (2 * len(decoder.layers)) ** -0.5
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ClipLayer):
                assert isinstance(module.mlp, ClipMLP)
                module.attn.out_proj.weight.mul_(tower_gain)
                module.mlp.fc2.weight.mul_(tower_gain)
            elif isinstance(module, Attention):
                module.o_proj.weight.mul_(decoder_gain)
            elif isinstance(module, GatedMLP):
                module.down_proj.weight.mul_(decoder_gain)
            elif isinstance(module, SparseMLP):
                module.router.weight.mul_(0.1)
        patch = vision.patch_embedding
        nn.init.normal_(patch.weight, std=(3 * patch.kernel_size[0] ** 2) ** -0.5)
        nn.init.zeros_(vision.class_embedding)
        keep_codes(vision)
        for attention in attentions(vision):
            attention.aim(60.0)
        for parameter in projector.get_submodule("peg").parameters():
            nn.init.zeros_(parameter)
        nn.init.normal_(decoder.embed_tokens.weight, std=0.3)
        decoder.lm_head.weight.mul_(0.5)
