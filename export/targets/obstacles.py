"""Parts of a model that runtimes beside ours have no place for."""

from __future__ import annotations

from mobilevlm.errors import TargetError
from mobilevlm.export.targets import Target
from mobilevlm.input_spec import SquareImages
from mobilevlm.spec import ModelSpec


def obstacle(spec: ModelSpec) -> str | None:
    """Return what a model has that takes more than squares of images, and more of a sequence than
    its length, keys and values; none where it has nothing of the kind."""
    if spec.has_sound:
        return "sound for input"
    if not spec.has_images:
        return "no images"
    image, decoder = spec.image, spec.decoder
    if not isinstance(image.preparation, SquareImages):
        return f"images that are prepared as {image.preparation.kind!r}"
    if image.connector.reads_text:
        return "an image encoder that reads the question"
    if decoder.encoder_layers:
        return "a language model with an encoder"
    if decoder.image_blocks:
        return "images whose rows see each other"
    if spec.draws:
        return "images that it draws"
    return next(iter(decoder.rare_parts), None)


def check_drawing(target: Target, spec: ModelSpec) -> None:
    """Refuse a model that makes images for a device whose accelerator's graphs do not.

    Raises:
        TargetError: it does.
    """
    if spec.draws and target.provider is not None:
        raise TargetError(
            f"target {target.name}: {spec.name} draws images, and the stages that do are not made "
            f"for {target.provider.name}: choose another model, or a target that is a processor "
            f"('mobilevlm targets')"
        )


def check_page(target: Target, spec: ModelSpec) -> None:
    """Refuse a model that the page of examples/web cannot run.

    Raises:
        TargetError: it has an :func:`obstacle`.
    """
    found = obstacle(spec)
    if found is not None:
        raise TargetError(
            f"target {target.name}: {spec.name} has {found}, which the page (examples/web) does "
            f"not compute: choose another model or another target ('mobilevlm targets')"
        )
